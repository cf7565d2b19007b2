"""Annotation files: every row, and the same row read again by its place."""

import csv
import io
import json
import random
from pathlib import Path

import pytest

from blip_fast.data.shards.annotated import AnnotationFile, read_annotations

CAPTIONS = ["a dog", "Zürich, \u2028 “at night”", "two\nlines\r\nand a third", 'she said "no"', "", "日本"]


def content(kind: str, end: str) -> str:
    if kind == "jsonl":
        rows = [json.dumps({"image": f"{i}.jpg", "caption": text}, ensure_ascii=i % 2 == 0)
                for i, text in enumerate(CAPTIONS)]
        return end.join([rows[0], "", "  ", *rows[1:]])
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=end)
    writer.writerow(["image", "caption"])
    for i, text in enumerate(CAPTIONS):
        writer.writerow([f"{i}.jpg", text])
        stream.write(end if i == 2 else "")  # a blank line
    return stream.getvalue()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_is_found_again_by_its_place(tmp_path, kind, end, mark):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(mark + content(kind, end).encode())
    expected = [{"image": f"{i}.jpg", "captions": [text]} for i, text in enumerate(CAPTIONS)]
    assert read_annotations(path) == expected
    file = AnnotationFile(path)
    placed = list(file)
    assert [row for _, row in placed] == expected == [row for _, row in file]
    random.Random(0).shuffle(placed)
    for place, row in placed:
        assert file.row(place) == row


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_empty_file_has_no_row(tmp_path, kind):
    (tmp_path / f"rows.{kind}").write_text("")
    assert read_annotations(tmp_path / f"rows.{kind}") == []


def test_what_is_not_there_or_changed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        AnnotationFile(tmp_path / "lost.jsonl")
    path = Path(tmp_path / "rows.jsonl")
    path.write_text('{"image": "a.jpg"}\n{"image": "b.jpg"}\n')
    file = AnnotationFile(path)
    places = [place for place, _ in file]
    path.write_text('{"image": 3}       \n{"image": "b.jpg"}\n')
    assert file.row(places[1])["image"] == "b.jpg"
    with pytest.raises(ValueError, match=r'rows\.jsonl, byte 0 has no "image"'):
        file.row(places[0])
