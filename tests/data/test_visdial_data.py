"""VisDial 1.0's published files: the rows that they become, the paths of images, and the memory needed."""

import json
import tracemalloc

import pytest
from visdial_files import DENSE, VISDIAL, written

from blip_fast.cli import main
from blip_fast.data.shards.annotated import read_annotations
from blip_fast.data.shards.published import published_rows

pytest.importorskip("ijson", reason="VisDial's files need the extra `visdial`")


def test_published_files(tmp_path):
    files = [written(tmp_path / "visdial.json", VISDIAL), written(tmp_path / "dense.json", DENSE)]
    rows = list(published_rows("visdial", files))
    assert rows == [
        {"image": "VisualDialog_val2018/VisualDialog_val2018_000000000007.jpg", "captions": ["a dog"],
         "split": "val", "id": 7, "dialog": [
            {"question": "where is it?", "answer": "on the grass",
             "candidates": ["no", "on the grass", "two"], "right": 1},
            {"question": "is it red?", "answer": "no", "candidates": ["red", "two", "no"], "right": 2,
             "relevance": [0.0, 0.5, 1.0]}]},
        {"image": "VisualDialog_val2018/VisualDialog_val2018_000000000123.jpg", "captions": ["two dogs"],
         "split": "val", "id": 123, "dialog": [
            {"question": "how many?", "answer": "two", "candidates": ["two", "no", "red"], "right": 0,
             "relevance": [0, 0, 0]}]}]
    sparse = list(published_rows("visdial", files[:1]))
    assert not any("relevance" in one for row in sparse for one in row["dialog"])
    asked = [{"question": 0, "answer": 0}, {"question": 1, "answer_options": [2, 1]}]
    dialogs = [{"image_id": 1, "caption": "c", "dialog": asked}]
    test = {**VISDIAL, "split": "test", "data": {**VISDIAL["data"], "dialogs": dialogs}}
    (row,) = published_rows("visdial", [written(tmp_path / "test.json", test)])
    assert row["image"] == "VisualDialog_test2018/VisualDialog_test2018_000000000001.jpg"
    assert row["dialog"] == [{"question": "is it red?", "answer": "no"},
                             {"question": "where is it?", "candidates": ["two", "on the grass"]}]


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: [], 'has no "split" that is train, val or test'),
    (lambda c: {**c, "split": "train"},
     r"which of COCO's folders its images are in: name dataset_coco\.json"),
    (lambda c: {**c, "data": []}, 'has no list "dialogs" with an entry'),
    (lambda c: {**c, "data": {**c["data"], "answers": []}},
     'entry 1 of the dialogue about image 7 names 1 of "answers", which is not there'),
    (lambda c: {**c, "data": {**c["data"], "dialogs": [{"image_id": 7, "caption": "a", "dialog": [3]}]}},
     "is no object"),
])
def test_published_files_that_are_not_understood(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        list(published_rows("visdial", [written(tmp_path / "visdial.json", change(VISDIAL))]))


def karpathy(images: dict[int, str]) -> dict:
    """Karpathy's split of COCO: images by number, and the folder of each."""
    return {"images": [{"filepath": folder, "filename": f"COCO_{folder}_{number:012d}.jpg", "cocoid": number,
                        "split": "restval", "sentences": [{"raw": "not of VisDial"}]}
                       for number, folder in images.items()]}


def test_the_training_set_is_on_images_of_two_folders(tmp_path):
    """Karpathy's file says where images are. An image that it lacks, or a file of another format, is
    named."""
    train = written(tmp_path / "train.json", {**VISDIAL, "split": "train"})
    coco = written(tmp_path / "dataset_coco.json", karpathy({123: "val2014", 7: "train2014", 8: "val2014"}))
    first, second = published_rows("visdial", [train, coco], prefix="../coco")
    assert first == {
        "image": "../coco/train2014/COCO_train2014_000000000007.jpg", "captions": ["a dog"], "split": "train",
        "id": 7,
        "dialog": [{"question": "where is it?", "answer": "on the grass",
                    "candidates": ["no", "on the grass", "two"], "right": 1},
                   {"question": "is it red?", "answer": "no", "candidates": ["red", "two", "no"],
                    "right": 2}]}
    assert second["image"] == "../coco/val2014/COCO_val2014_000000000123.jpg"
    for images in (karpathy({7: "train2014"}), [{"image": f"{i}.jpg", "caption": "a"} for i in range(200)]):
        with pytest.raises(ValueError, match=r"entry [12] of dialogs: image (7|123) is not in .*other\.json"):
            list(published_rows("visdial", [train, written(tmp_path / "other.json", images)]))


@pytest.mark.parametrize("content", [b'{"split": "val", "data": {"questions": ["a"',
                                     b'{"split": "val" "data"}', b'{"split": "\xff\xfe"}', b""])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json is no whole JSON in UTF-8: fetch it again$"):
        list(published_rows("visdial", [str(tmp_path / "broken.json")]))


def test_without_ijson_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blip_fast.data.shards.published.find_spec", lambda name: None)
    path = written(tmp_path / "visdial.json", VISDIAL)
    assert main(["data", "annotations", "visdial", path, "--output",
                 str(tmp_path / "annotations.jsonl")]) == 2
    assert "pip install 'blip-fast[visdial]'" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_dialogues(tmp_path):
    """Four times as many dialogues of published size. The first file pays for imports."""
    peaks = []
    for count in (5, 50, 200):
        answers = [f"answer number {i}" for i in range(1000)]
        rounds = [{"question": i, "answer": i, "answer_options": list(range(i, i + 100)), "gt_index": 0}
                  for i in range(10)]
        content = {"split": "train", "data": {
            "questions": [f"what is {i}?" for i in range(10)], "answers": answers,
            "dialogs": [{"image_id": i, "caption": "a", "dialog": rounds} for i in range(count)]}}
        files = [written(tmp_path / "train.json", content),
                 written(tmp_path / "coco.json", karpathy(dict.fromkeys(range(count), "train2014")))]
        output = tmp_path / f"{count}.jsonl"
        tracemalloc.start()
        assert main(["data", "annotations", "visdial", *files, "--output", str(output)]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(read_annotations(output)) == count
        assert json.loads(output.read_text().splitlines()[-1])["dialog"][9]["candidates"] == answers[9:109]
    assert peaks[2] < 1.3 * peaks[1]
