"""`blip-fast capfilt`: the shards that it writes, what it reads and what it refuses."""

import io
import json
import tarfile
from dataclasses import replace

import fsspec
import numpy as np
import odd_files
import pytest
import torch
from capfilt_runs import (
    CAPTIONS,
    IMAGES,
    SHARDS,
    arguments,
    contents,
    picture,
    samples_of,
    texts_of,
)

from blip_fast.capfilt.clean import NUCLEUS
from blip_fast.cli import main
from blip_fast.data.shards.shards import INDEX, iterate, read_index
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import load_image
from blip_fast.model.tokenizer import clean_caption
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.matcher import Matcher


def test_texts_scores_and_verdicts_equal_those_made_one_at_a_time(cleaners, web_shards, cleaned):
    captioner = Captioner.from_pretrained(cleaners / "captioner", dtype="float32")
    matcher = Matcher.from_pretrained(cleaners / "filter", dtype="float32")
    found = {sample.record["image"]: sample for sample in samples_of(cleaned)}
    assert len(found) == SHARDS * IMAGES == len(samples_of(cleaned))
    for sample in iterate(web_shards):
        (caption,) = captioner(sample.image, "a picture of", replace(NUCLEUS, max_length=10),
                               strip_prompt=True)
        texts = [*sample.record["captions"], caption.caption]
        written = found[sample.record["image"]]
        assert [text["text"] for text in written.record["texts"]] == texts
        assert [t["origin"] for t in written.record["texts"]] == ["web"] * (len(texts) - 1) + ["synthetic"]
        cut = caption.token_ids[-1] != captioner.tokenizer.sep_id
        assert [t["cut"] for t in written.record["texts"]] == [False] * (len(texts) - 1) + [cut]
        for text, row in zip(texts, written.record["texts"], strict=True):
            if not any(map(str.isalnum, text)):
                assert not row["kept"]
                continue
            scores = matcher.score(load_image(sample.image), clean_caption(text), first_token="[ENC]")
            assert (row["itm"], row["itc"]) == pytest.approx((scores.itm.item(), scores.itc.item()), abs=1e-5)
            assert row["kept"] == (row["itm"] >= 0.5)
        kept = [row for row in written.record["texts"] if row["kept"]]
        assert written.record["captions"] == [row["text"] for row in kept]
        assert written.record["origins"] == [row["origin"] for row in kept]
        assert (written.image, written.key, written.record["id"], written.record["note"]) == (
            sample.image, sample.key, sample.record["id"], sample.record["note"])


def test_shards_and_index_agree(cleaned):
    """Shards of kept images hold only kept texts as captions; the rows of the index are the records'
    texts."""
    assert read_index(cleaned).without_caption == 0
    assert all(sample.record["captions"] for sample in iterate(cleaned))
    assert not any(sample.record["captions"] for sample in iterate(cleaned / "dropped"))
    assert len(list(iterate(cleaned))) > 0 and len(list(iterate(cleaned / "dropped"))) > 0
    rows = texts_of(cleaned)
    by_key = {(row["file"], row["key"]): [] for row in rows}
    for row in rows:
        by_key[row["file"], row["key"]].append((row["text"], row["origin"], np.float32(row["itm"]),
                                                np.float32(row["itc"]), row["kept"], row["cut"]))
    for part in ("", "dropped"):
        for shard in read_index(cleaned / part).shards:
            with tarfile.open(cleaned / part / shard.file) as tar:
                for name in tar.getnames():
                    if name.endswith(".json"):
                        record = json.loads(tar.extractfile(name).read())
                        stored = [tuple(text.values()) for text in record["texts"]]
                        assert by_key.pop((f"{part}/{shard.file}".strip("/"), record["key"])) == stored
    assert not by_key
    assert len(rows) == SHARDS * (IMAGES + sum(map(len, CAPTIONS)))


def test_the_best_of_several_captions(cleaners, web_shards, tmp_path):
    """n samples of an image are n texts. Of those that pass only the likeliest is kept; an image without one
    is dropped. Beam search is an option."""
    output = tmp_path / "best"
    assert main(arguments(cleaners, web_shards / "000000.tar", "--output", output, "--captions", 3, "--keep",
                          "best", "--threshold", 0.3)) == 0
    for sample in samples_of(output):
        texts = sample.record["texts"]
        assert [text["origin"] for text in texts].count("synthetic") == 3
        passing = [text["itm"] for text in texts
                   if text["itm"] >= 0.3 and any(map(str.isalnum, text["text"]))]
        assert [text["itm"] for text in texts if text["kept"]] == ([max(passing)] if passing else [])
    beams = tmp_path / "beams"
    assert main(arguments(cleaners, web_shards / "000000.tar", "--output", beams, "--beams", 2)) == 0
    made = {row["image"]: row["text"] for row in texts_of(beams) if row["origin"] == "synthetic"}
    captioner = Captioner.from_pretrained(cleaners / "captioner", dtype="float32")
    for sample in iterate(web_shards):
        if (name := sample.record["image"]) in made:
            (caption,) = captioner(sample.image, "a picture of",
                                   GenerationConfig(beams=2, max_length=10, min_length=5), strip_prompt=True)
            assert made[name] == caption.caption


# ---------------------------------------------------------------- what is read


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_broken_images_are_quarantined_and_lose_nothing_else(cleaners, tmp_path, capsys):
    """A foreign tar with every kind of broken image, odd records, and a break within its last sample."""
    path, output = tmp_path / "web.tar", tmp_path / "clean"
    good = {**odd_files.good_files(), **odd_files.grey_files()}
    with tarfile.open(path, "w") as tar:
        for i, (name, content) in enumerate([*good.items(), *odd_files.bad_files().items()]):
            add_member(tar, f"part one/{i:03d}.{name.rpartition('.')[2]}", content)
            add_member(tar, f"part one/{i:03d}.txt", f"a man with number {i}\n".encode())
        add_member(tar, "odd/json.jpg", picture(1))
        add_member(tar, "odd/json.json", b"{")
        add_member(tar, "odd/lone.jpg", picture(2))
        add_member(tar, "odd/lone.json", b'{"caption": "a \\ud800 dog", "id": "x7", "url": "http://a.b"}')
        add_member(tar, "odd/list.jpg", picture(3))
        add_member(tar, "odd/list.json", b'{"captions": [1]}')
        add_member(tar, "odd/text alone.txt", b"no picture")
        add_member(tar, "odd/two.jpg", picture(4))
        add_member(tar, "odd/two.second.jpg", picture(5))
        add_member(tar, "odd/damaged.jpg", picture(6))
        add_member(tar, "odd/damaged.json", b'{"crc32": 1, "captions": []}')
        add_member(tar, "odd/last.jpg", picture(7))
        add_member(tar, "odd/last.json", b"{}")
    content = bytearray(path.read_bytes())
    cut = content.index(b"odd/last.json")
    content[cut : cut + 512] = b"x" * 512
    path.write_bytes(content)

    assert main(arguments(cleaners, path, "--output", output, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    refused = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    bad = len(odd_files.bad_files())
    # An SVG is not an image by its name, so its sample holds no image.
    assert ((summary["images"], summary["refused"])
            == (len(good) + 1, bad + 6) == (len(good) + 1, len(refused)))
    names = [row["image"] for row in refused]
    assert names[:bad] == [f"{path}/part one/{len(good) + i:03d}" for i in range(bad)]
    reasons = {row["image"].removeprefix(f"{path}/odd/"): row["reason"] for row in refused[bad:]}
    assert reasons["json"] == "its record is no JSON object" and "no list of texts" in reasons["list"]
    assert "holds 0 images" in reasons["text alone"] and "holds 2 images" in reasons["two"]
    assert "checksum differs" in reasons["damaged"] and "no whole uncompressed tar" in reasons[str(path)]
    samples = {sample.record["image"]: sample.record for sample in samples_of(output)}
    assert set(samples) == {f"part one/{i:03d}" for i in range(len(good))} | {"odd/lone"}
    assert samples["part one/004"]["texts"][0]["text"] == "a man with number 4"
    assert samples["odd/lone"]["texts"][0]["text"] == "a ? dog" and samples["odd/lone"]["url"] == "http://a.b"
    assert all(isinstance(record["id"], int) for record in samples.values())
    assert (refused[0]["reason"] in (page := (output / "report.html").read_text())
            and "Images left out" in page)


def test_urls_and_a_tar_that_cannot_be_fetched(cleaners, web_shards, cleaned, tmp_path, capsys):
    """The other tars are processed, the run fails with that tar's name, and a resume continues when the tar
    is there."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in web_shards.iterdir():
        if path.name != "000001.tar":
            system.pipe_file(f"/capfilt/{path.name}", path.read_bytes())
    output = tmp_path / "clean"
    command = arguments(cleaners, "memory://capfilt", "--output", output, "--cache", tmp_path / "cache")
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert "000001.tar is missing" in errors and "2 of 3 shards are done" in errors
    system.pipe_file("/capfilt/000001.tar", (web_shards / "000001.tar").read_bytes())
    assert main([*command, "--resume"]) == 0
    assert {name: content for name, content in contents(output).items()
            if name.endswith((".tar", ".parquet", INDEX))} \
        == {name: content for name, content in contents(cleaned).items()
            if name.endswith((".tar", ".parquet", INDEX))}


def test_shards_are_named_as_files_folders_and_patterns(cleaners, web_shards, tmp_path, capsys):
    (tmp_path / "flat" / "deep").mkdir(parents=True)
    for i in (0, 1):
        (tmp_path / "flat" / "deep" / f"{i}.tar").write_bytes((web_shards / f"00000{i}.tar").read_bytes())
    outputs = []
    for name, argument in (("folder", tmp_path / "flat"), ("pattern", tmp_path / "flat" / "*" / "*.tar")):
        outputs.append(tmp_path / name)
        assert main(arguments(cleaners, argument, "--output", outputs[-1])) == 0
    assert texts_of(outputs[0]) == texts_of(outputs[1]) and len(read_index(outputs[0]).shards) <= 2
    for argument, sentence in ((tmp_path / "nowhere", "no such shard"), (__file__, "holds no shards"),
                               (tmp_path / "models", "no such shard"),
                               (tmp_path / "flat" / "*.tar", "no shards")):
        assert main(arguments(cleaners, argument, "--output", tmp_path / "none")) == 2
        assert sentence in capsys.readouterr().err
    assert main(arguments(cleaners, web_shards, "--output", web_shards)) == 2
    assert "holds shards already" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "sentence"), [
    ("--threshold", "2", "it is a probability"), ("--keep", "most", "must be matched or best"),
    ("--batch-size", "0", "must be at least 1"), ("--captions", "0", "n_best is 0"),
    ("--shard", "3/3", "is none")])
def test_bad_options_are_refused_before_anything_is_written(
    cleaners, web_shards, tmp_path, capsys, option, value, sentence
):
    assert main(arguments(cleaners, web_shards, "--output", tmp_path / "none", option, value)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_options_that_do_not_fit_the_models_begin_nothing(cleaners, web_shards, cleaned, tmp_path, capsys):
    """They are refused when the models are loaded, and the same folder then accepts other options."""
    output = tmp_path / "clean"
    assert main(arguments(cleaners, web_shards, "--output", output, "--first-token", "[SEP]")) == 2
    assert "first token '[SEP]' is none of" in capsys.readouterr().err
    assert main(arguments(cleaners, web_shards, "--output", output)) == 0
    assert contents(output) == contents(cleaned)


def test_without_pyarrow_there_is_one_clear_line(cleaners, web_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blip_fast.capfilt.folder.find_spec", lambda name: None)
    assert main(arguments(cleaners, web_shards, "--output", tmp_path / "none")) == 2
    assert "pip install 'blip-fast[capfilt]'" in capsys.readouterr().err


# ---------------------------------------------------------------- what is written


def test_training_reads_kept_texts_with_their_origins(cleaned):
    """Texts of both origins are drawn, each with its own origin."""
    pytest.importorskip("nvidia.dali", reason="training input needs the extra `train`")
    from blip_fast.data.input.pipeline import InputConfig, TrainInput
    from blip_fast.data.input.sources import Source

    config = InputConfig([Source("web", str(cleaned))], image_size=32, batch_size=2, threads=1, flip=False,
                         rand_augment=False)
    reader, seen = TrainInput(config), set()
    for _ in range(6):
        for batch in reader:
            assert batch.images.shape == (2, 3, 32, 32) and batch.sources == ["web", "web"]
            for caption, origin, record in zip(batch.captions, batch.origins, batch.records, strict=True):
                assert origin in {o for text, o in zip(record["captions"], record["origins"], strict=True)
                                  if clean_caption(text) == caption}
                seen.add((record["key"], caption, origin))
    assert {origin for *_, origin in seen} == {"web", "synthetic"}
    assert torch.isfinite(batch.images).all()


def test_the_report_counts_what_the_index_holds(cleaned):
    page, rows = (cleaned / "report.html").read_text(), texts_of(cleaned)
    for origin in ("web", "synthetic"):
        total, kept = (sum(row["origin"] == origin and row["kept"] in verdicts for row in rows)
                       for verdicts in ((True, False), (True,)))
        assert (f"<td>{origin}</td><td class=\"number\">{total}</td><td class=\"number\">{kept}</td>"
                f"<td class=\"number\">{total - kept}</td>") in page
    changed = {key: (max(web, default=-1), max(made, default=-1)) for key, web, made in (
        (key, [r["itm"] for r in rows if r["key"] == key and r["origin"] == "web"],
         [r["itm"] for r in rows if r["key"] == key and r["origin"] == "synthetic" and r["kept"]])
        for key in dict.fromkeys(row["key"] for row in rows)
        if not any(r["kept"] for r in rows if r["key"] == key and r["origin"] == "web"))}
    wanted = sorted((web - made, key) for key, (web, made) in changed.items() if web >= 0 and made >= 0)
    section = page.split("Most changed captions")[1].split("</section>")[0] if wanted else ""
    shown = [section.index(next(r["text"] for r in rows if r["key"] == key and r["origin"] == "synthetic"))
             for _, key in wanted]
    assert len(section.split("<article")) - 1 == len(wanted) and len(shown) == len(wanted)
    assert page.count("<img") >= 3 and "<script" not in page


@pytest.mark.parametrize(("length", "many"), [(10, True), (200, False)])
def test_captions_that_were_cut_off_are_counted(cleaners, web_shards, tmp_path, capsys, length, many):
    """In the index, the report, the summary line and its JSON; if there are many, the page gives advice."""
    output = tmp_path / "clean"
    command = arguments(cleaners, web_shards, "--output", output, "--captions", 4, "--max-length", length)
    assert main(command) == 0
    printed = capsys.readouterr().out
    made = [row for row in texts_of(output) if row["origin"] == "synthetic"]
    cut = sum(row["cut"] for row in made)
    assert (cut / len(made) > 0.05) == many and 0 <= cut < len(made) == 4 * SHARDS * IMAGES
    share = f"{100 * cut / len(made):.1f}%"
    assert f"{cut} synthetic ones ({share}) were cut off at {length} tokens (--max-length)" in printed
    assert main([*command, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["synthetic_cut"] == cut
    page = (output / "report.html").read_text()
    assert f'<td>were cut off</td><td class="number">{cut}</td><td>{share}</td>' in page
    assert ("raise --max-length" in page) == many
