"""Packing folders of good, odd and broken images into shards, and reading the shards back."""

import csv
import hashlib
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import odd_files
import pytest

pytest.importorskip("nvidia.nvimgcodec", reason="packing needs the extra `train`")
from blip_fast.data.shards.integrity import image_format, what_is_wrong
from blip_fast.data.shards.pack import pack
from blip_fast.data.shards.shards import Sample, iterate, read_index, write_shards
from blip_fast.media.images import load_image


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory) -> Path:
    """Good, odd and broken files, each with a caption, and one that is missing."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {**odd_files.good_files(), **odd_files.grey_files(), **odd_files.bad_files()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = [{"image": name, "captions": [f"this is {name}"], "split": "train"}
            for name in [*files, "missing.jpg"]]
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def folder_with(tmp_path: Path, names: list[str]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(names):
        (folder / name).write_bytes(odd_files.encoded(odd_files.picture(seed=seed), "JPEG"))
    return folder


def test_good_and_odd_files_are_packed_and_broken_ones_quarantined(mixed_folder: Path, tmp_path) -> None:
    report = pack(mixed_folder, mixed_folder / "annotations.jsonl", tmp_path / "out", samples_per_shard=4,
                  threads=2)
    samples = {sample.record["image"]: sample for sample in iterate(tmp_path / "out")}
    assert set(samples) == set(odd_files.good_files()) | set(odd_files.grey_files())
    for name, sample in samples.items():
        original = load_image(mixed_folder / name)
        assert np.array_equal(np.asarray(load_image(sample.image)), np.asarray(original)), name
        if image_format((mixed_folder / name).read_bytes()):
            assert sample.image == (mixed_folder / name).read_bytes(), "stored as it was found"
        assert sample.record["captions"] == [f"this is {name}"] and sample.record["split"] == "train"

    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["image"]: line["reason"] for line in lines}
    assert set(reasons) == {*odd_files.bad_files(), "missing.jpg"}
    assert all(reasons.values())
    assert "30000 × 30000" in reasons["bomb.png"] and "checksum" in reasons["bad checksum.png"]
    assert "0 bytes" in reasons["empty.jpg"] and "No such file" in reasons["missing.jpg"]
    assert ((report.samples, report.quarantined, report.shards)
            == (len(samples), len(reasons), -(-len(samples) // 4)))


def test_the_decoder_has_the_last_word(tmp_path) -> None:
    """Damage invisible in the structure: a JPEG with overwritten Huffman tables."""
    folder = folder_with(tmp_path, ["good.jpg", "bad.jpg"])
    content = bytearray((folder / "bad.jpg").read_bytes())
    table = content.index(b"\xff\xc4") + 5
    content[table : table + 16] = b"\xfe" * 16
    (folder / "bad.jpg").write_bytes(content)
    assert what_is_wrong(bytes(content)) is None
    assert pack(folder, None, tmp_path / "out").quarantined == 1
    assert "decoder refuses it" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_the_same_input_gives_the_same_bytes_on_any_number_of_threads(mixed_folder: Path, tmp_path) -> None:
    for name, threads in (("one", 1), ("two", 3)):
        pack(mixed_folder, mixed_folder / "annotations.jsonl", tmp_path / name, threads=threads,
             shuffle_seed=7)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1]
    index = read_index(tmp_path / "one")
    assert index.shards[0].sha256 == hashlib.sha256(contents[0]["000000.tar"]).hexdigest()


def test_shuffling_keeps_every_sample(tmp_path) -> None:
    folder = folder_with(tmp_path, [f"{i}.jpg" for i in range(12)])
    orders = []
    for seed in (None, 1, 2):
        pack(folder, None, tmp_path / str(seed), shuffle_seed=seed)
        orders.append([sample.key for sample in iterate(tmp_path / str(seed))])
    assert orders[0] == sorted(orders[0]) and len({tuple(order) for order in orders}) == 3
    assert sorted(orders[1]) == sorted(orders[2]) == orders[0]


def test_rows_of_one_image_become_one_sample(tmp_path) -> None:
    folder = folder_with(tmp_path, ["a.jpg", "b.jpg"])
    table = tmp_path / "captions.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [
                ["image", "caption", "id", "mood"],
                ["a.jpg", "one, two", 7, "calm"],
                ["b.jpg", "x", 8, ""],
                ["a.jpg", "three", 7, "calm"],
            ]
        )
    pack(folder, table, tmp_path / "out")
    first, second = iterate(tmp_path / "out")
    assert first.record["captions"] == ["one, two", "three"] and second.record["captions"] == ["x"]
    assert (first.record["id"], first.record["mood"], second.record["id"]) == (7, "calm", 8)


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch) -> None:
    """Four times as many dialogues with many answers, packed in another order than they are written in."""
    monkeypatch.setattr("blip_fast.data.shards.pack.READ_AHEAD", 4)
    folder, path, peaks = folder_with(tmp_path, ["a.jpg"]), tmp_path / "rows.jsonl", []
    for count in (5, 40, 160):  # the first run pays for imports
        with path.open("w") as stream:
            for number in range(count):
                answers = [f"answer {i} to question {number}" for i in range(1000)]
                rounds = [{"question": "what?", "candidates": answers, "right": 0}]
                stream.write(json.dumps({"image": "a.jpg", "caption": "a", "dialog": rounds}) + "\n")
        tracemalloc.start()
        report = pack(folder, path, tmp_path / str(count), shuffle_seed=1, threads=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        asked = [sample.record["dialog"][0]["candidates"][7] for sample in iterate(tmp_path / str(count))]
        assert (report.samples == count
                and sorted(asked) == sorted(f"answer 7 to question {n}" for n in range(count)))
        assert asked != sorted(asked)
    assert peaks[2] < 1.3 * peaks[1]


def test_split_and_extra_fields(tmp_path) -> None:
    folder = folder_with(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    truth = {"things": [{"colour": "red"}], "caption_is_right": False}
    rows = [
        {"image": f"{n}.jpg", "caption": n, "split": s, **truth}
        for n, s in zip("abc", ("train", "test", "train"), strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    report = pack(folder, tmp_path / "rows.jsonl", tmp_path / "out", split="train")
    assert report.samples == 2
    assert [sample.record["captions"] for sample in iterate(tmp_path / "out")] == [["a"], ["c"]]
    assert all(truth.items() <= sample.record.items() for sample in iterate(tmp_path / "out"))
    with pytest.raises(ValueError, match="no image of split 'valid'"):
        pack(folder, tmp_path / "rows.jsonl", tmp_path / "other", split="valid")


def test_equal_images_have_equal_ids_wherever_they_are_packed(tmp_path) -> None:
    folder = folder_with(tmp_path, ["a.jpg", "b.jpg"])
    (folder / "copy of a.jpg").write_bytes((folder / "a.jpg").read_bytes())
    pack(folder, None, tmp_path / "out")
    ids = {sample.record["image"]: sample.record["id"] for sample in iterate(tmp_path / "out")}
    assert ids["a.jpg"] == ids["copy of a.jpg"] != ids["b.jpg"]
    assert all(0 <= i < 2**63 for i in ids.values())
    assert read_index(tmp_path / "out").without_caption == 3


def test_what_dali_and_others_read(mixed_folder: Path, tmp_path) -> None:
    """The index points to the members' bytes, and the tar is plain webdataset."""
    pack(mixed_folder, mixed_folder / "annotations.jsonl", tmp_path / "out")
    raw = (tmp_path / "out" / "000000.tar").read_bytes()
    header, *lines = (tmp_path / "out" / "000000.idx").read_text().splitlines()
    samples = list(iterate(tmp_path / "out"))
    assert header == f"v1.2 {len(samples)}" and len(lines) == len(samples)
    for line, sample in zip(lines, samples, strict=True):
        fields = line.split()
        parts = {fields[i]: raw[int(fields[i + 1]) :][: int(fields[i + 2])] for i in range(0, len(fields), 4)}
        assert fields[3::4] == [f"{sample.key}.{extension}" for extension in parts]
        assert json.loads(parts.pop("json")) == sample.record
        assert list(parts.values()) == [sample.image]
    import webdataset

    theirs = list(webdataset.WebDataset(str(tmp_path / "out" / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in samples]


def test_bad_annotations_are_named_before_any_work(tmp_path) -> None:
    folder = folder_with(tmp_path, ["a.jpg"])
    for name, content, words in [
        ("a.jsonl", '{"image": "a.jpg"}\n{"image": ', "row 2 is not JSON"),
        ("b.jsonl", '{"file": "a.jpg"}', 'row 1 has no "image"'),
        ("c.jsonl", '{"image": "a.jpg", "captions": "text"}', "list of texts"),
        ("d.jsonl", '{"image": "a.jpg", "caption": 3}', "must be a text"),
        ("e.jsonl", '{"image": "a.jpg", "id": "x7"}', "not an integer"),
        ("f.csv", "image,caption\na.jpg,a dog, running", "more fields than the header"),
        ("g.csv", "picture,caption\na.jpg,a dog", 'has no "image"'),
        ("h.jsonl", "", "names no image"),
        ("i.json", "[]", "must be JSONL or CSV"),
        ("j.jsonl", '\n{"image": "a.jpg"}\n\nnull', 'row 4 has no "image"'),
        ("k.csv", f'image,caption\na.jpg,"{"never closed " * 20_000}', "cannot be read as CSV"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            pack(folder, tmp_path / name, tmp_path / "out")
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv cannot be read as CSV in UTF-8"):
        pack(folder, tmp_path / "latin.csv", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder"):
        pack(tmp_path / "nowhere", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_never_overwritten_nor_read_half(tmp_path) -> None:
    folder = folder_with(tmp_path, ["a.jpg", "b.jpg"])
    pack(folder, None, tmp_path / "out", samples_per_shard=1)
    with pytest.raises(FileExistsError, match="holds shards already"):
        pack(folder, None, tmp_path / "out")
    shard = tmp_path / "out" / "000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:600])
    with pytest.raises(ValueError, match=r"000001\.tar has 600 of 10,240 bytes"):
        read_index(tmp_path / "out")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lists 000001\.tar, which is missing"):
        list(iterate(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="blip-fast data pack"):
        read_index(folder)


def test_a_folder_of_broken_files_says_so(tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"none of 1 images can be read: .*quarantine\.jsonl says why"):
        pack(folder, None, tmp_path / "out")
    assert "a.jpg" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_samples_that_cannot_be_stored(tmp_path) -> None:
    image = odd_files.encoded(odd_files.picture(), "PNG")
    for number, (key, content, words) in enumerate([("a.b", image, "a dot, a slash"),
                                                    ("ok", b"GIF89a", "convert it")]):
        with pytest.raises(ValueError, match=words):
            write_shards([Sample(key, content, {})], tmp_path / str(number))
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        write_shards([], tmp_path / "none", samples_per_shard=0)


def test_members_are_small_enough_for_plain_tar_names(tmp_path) -> None:
    """GNU long names break other programs' index files."""
    write_shards([Sample("k" * 90, odd_files.encoded(odd_files.picture(), "PNG"), {})], tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert [member.name for member in tar] == ["k" * 90 + ".json", "k" * 90 + ".png"]
