"""`blip-fast data` from the command line."""

import json
from pathlib import Path

import odd_files
import pytest

from blip_fast.cli import main
from blip_fast.scenes.scenes import parse_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Good, odd and broken images with annotations; the captions of good ones are their names."""
    directory = tmp_path_factory.mktemp("images")
    files = {**odd_files.good_files(), **odd_files.grey_files(), **odd_files.bad_files()}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    rows = [{"image": name, "captions": [name], "split": "test" if i % 3 == 0 else "train"}
            for i, name in enumerate(files)]
    (directory / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


GOOD, BAD = len(odd_files.good_files()) + len(odd_files.grey_files()), len(odd_files.bad_files())


def data(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def fails(capsys, *arguments: object) -> str:
    """Run a command that is refused. Returns the one line that it prints."""
    assert data(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class TestPack:
    @pytest.fixture(autouse=True)
    def decoder(self):
        pytest.importorskip("nvidia.nvimgcodec", reason="packing needs the extra `train`")

    def test_broken_images_are_left_out_and_the_quarantine_is_named(self, folder, tmp_path, capsys):
        assert data("pack", folder, "--output", tmp_path / "out", "--samples-per-shard", 10) == 0
        packed, refused = capsys.readouterr().out.splitlines()
        assert packed == f"{tmp_path}/out: {GOOD} images in 2 shards, 0 of them without a caption"
        assert refused == f"{tmp_path}/out/quarantine.jsonl: {BAD} images left out, and why"

    def test_json(self, folder, tmp_path, capsys):
        assert data("pack", folder, "--output", tmp_path / "out", "--split", "test", "--json") == 0
        said = json.loads(capsys.readouterr().out)
        quarantined = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
        assert said == {"samples": -(-(GOOD + BAD) // 3) - len(quarantined),
                        "without_caption": 0, "shards": 1,
                        "quarantined": len(quarantined), "directory": str(tmp_path / "out"),
                        "quarantine": str(tmp_path / "out" / "quarantine.jsonl")}

    def test_annotations_elsewhere_or_none(self, folder, tmp_path, capsys):
        (tmp_path / "captions.csv").write_text("image,caption\nplain.jpg,one\nplain.png,two\n")
        assert data("pack", folder, "--annotations", tmp_path / "captions.csv", "--output",
                    tmp_path / "a") == 0
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "plain.jpg").write_bytes(odd_files.good_files()["plain.jpg"])
        assert data("pack", tmp_path / "images", "--output", tmp_path / "b") == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{tmp_path}/a: 2 images in 1 shards, 0 of them without a caption",
            f"{tmp_path}/b: 1 images in 1 shards, 1 of them without a caption"]

    def test_the_same_options_give_the_same_bytes(self, folder, tmp_path):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert data("pack", folder, "--output", tmp_path / name, "--shuffle-seed", seed) == 0
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert contents(tmp_path / "a")["000000.tar"] != contents(tmp_path / "c")["000000.tar"]

    def test_bad_input_is_one_line(self, folder, tmp_path, capsys):
        assert data("pack", folder, "--output", tmp_path / "out") == 0
        before = contents(tmp_path / "out")
        capsys.readouterr()
        assert f"{tmp_path}/out holds shards already" in fails(capsys, "pack", folder, "--output",
                                                               tmp_path / "out")
        assert contents(tmp_path / "out") == before
        new = ("--output", tmp_path / "new")
        assert "nowhere is no folder" in fails(capsys, "pack", tmp_path / "nowhere", *new)
        assert "no image of split 'valid'" in fails(capsys, "pack", folder, "--split", "valid", *new)
        assert "nowhere.csv" in fails(capsys, "pack", folder, "--annotations", "nowhere.csv", *new)
        assert "pack.output" in fails(capsys, "pack", folder)
        assert not (tmp_path / "new").exists()


def test_scenes_are_seeded_and_their_noise_is_counted(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert data("scenes", tmp_path / name, "--count", 20, "--seed", seed, "--noise", 0.25,
                    "--image-size", 32, "--split", "test", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {
            "directory": str(tmp_path / name), "images": 20, "wrong_captions": 5}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    rows = [json.loads(line) for line in (tmp_path / "a" / "annotations.jsonl").read_text().splitlines()]
    assert {parse_caption(row["captions"][0]).split for row in rows} == {"test"}
    assert {row["split"] for row in rows} == {"test"}


def test_scenes_can_be_packed_by_their_split(tmp_path, capsys):
    pytest.importorskip("nvidia.nvimgcodec", reason="packing needs the extra `train`")
    assert data("scenes", tmp_path / "new" / "scenes", "--count", 3, "--image-size", 32) == 0
    assert data("pack", tmp_path / "new" / "scenes", "--output", tmp_path / "shards", "--split", "train") == 0
    drawn, packed = capsys.readouterr().out.splitlines()
    assert drawn.endswith("scenes: 3 scenes of split train, 0 of them with a wrong caption")
    assert packed.endswith("shards: 3 images in 1 shards, 0 of them without a caption")


def test_scenes_refuse_bad_input_and_never_overwrite(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert f"{tmp_path} exists already" in fails(capsys, "scenes", tmp_path)
    assert f"{tmp_path}/kept.txt exists already" in fails(capsys, "scenes", tmp_path / "kept.txt")
    new = tmp_path / "new"
    assert "noise is 1.5" in fails(capsys, "scenes", new, "--noise", 1.5)
    assert "--count" in fails(capsys, "scenes", new, "--count", 0)
    assert "--image-size" in fails(capsys, "scenes", new, "--image-size", 0)
    assert "scenes with two objects asked for" in fails(capsys, "scenes", new, "--count", 10**7)
    assert "invalid choice: 'valid'" in fails(capsys, "scenes", new, "--split", "valid")
    assert "pick" in fails(capsys, "pick", new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.txt"]
