"""Search with a model: scores as in the published re-ranking, incremental indexing, kills, odd images, the
command."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from html_page import Page
from PIL import Image

from blip_fast.cli import main
from blip_fast.media.images import ImageError, evaluation_transform, load_image
from blip_fast.search import Index
from blip_fast.search.sheet import contact_sheet
from blip_fast.search.store import BROKEN

TEXT = "a red ball on a table"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)


def write_picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve pictures, and one that is broken."""
    (tmp_path / "photos").mkdir()
    for i in range(12):
        write_picture(tmp_path / "photos" / f"{i:02}.png", i)
    (tmp_path / "photos" / "cut.png").write_bytes((tmp_path / "photos" / "00.png").read_bytes()[:300])
    return tmp_path / "photos"


@pytest.fixture
def index(checkpoint, folder, tmp_path) -> Index:
    index = Index.create(tmp_path / "index", checkpoint[0], dtype="float32")
    index.add([folder])
    return index


def features(index: Index) -> dict[str, np.ndarray]:
    store = index._store
    rows = np.setdiff1d(np.arange(store.row_count), store.holes())
    return {image.name: row for image, row in zip(store.images(rows), store.rows(rows), strict=True)}


def command(capsys, *arguments) -> tuple[int, list[str], str]:
    status = main(["search", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_scores_are_transformers(checkpoint, index, folder):
    """All images by cosine; the best five by 'matched' logit + cosine, pair by pair, with [ENC] first."""
    _, theirs = checkpoint
    paths = sorted(folder.glob("[0-9]*.png"))
    pixels = evaluation_transform([load_image(path) for path in paths], IMAGE_SIZE)
    tokenizer = index.matcher.tokenizer
    with torch.no_grad():
        cosines = theirs(torch.tensor([tokenizer.encode(TEXT)] * 12), pixels,
                         use_itm_head=False).itm_score[:, 0]
        logits = theirs(torch.tensor([tokenizer.encode(TEXT, "[ENC]")] * 12), pixels).itm_score
    best = cosines.argsort(descending=True)
    scores = logits[:, 1] + cosines
    order = [*sorted(best[:5].tolist(), key=lambda i: -scores[i]), *best[5:].tolist()]
    hits = index.query(TEXT, top=10, rerank=5)
    assert [hit.image.where for hit in hits] == [paths[i] for i in order[:10]]
    for hit, i in zip(hits, order, strict=False):
        assert hit.itc == pytest.approx(float(cosines[i]), abs=1e-5)
        if hit.itm is None:
            assert hit.score == hit.itc
        else:
            assert hit.score == pytest.approx(float(scores[i]), abs=1e-4)
            assert hit.itm == pytest.approx(float(logits[i].softmax(0)[1]), abs=1e-5)
    assert sum(hit.itm is not None for hit in hits) == 5
    assert ([hit.image for hit in index.query(TEXT, rerank=0)]
            == [hit.image for hit in index.query(TEXT, rerank=1)])
    assert len(index.query(TEXT, top=3, rerank=8)) == 3


def test_an_image_finds_itself_and_its_copies_first(index, folder):
    """Copies tie, so they come in the order in which they were added. None of them is re-ranked."""
    for name in ("z.png", "y.png"):
        shutil.copy(folder / "05.png", folder / name)
        index.add([folder / name])
    hits = index.query(image=folder / "05.png", top=4)
    assert [hit.image.where.name for hit in hits[:3]] == ["05.png", "z.png", "y.png"]
    assert [hit.score for hit in hits[:3]] == pytest.approx([1.0] * 3, abs=1e-6)
    assert hits[0].score == hits[2].score and hits[3].score < 0.999
    assert all(hit.itm is None for hit in hits)
    assert index.query(image=Image.open(folder / "05.png"), top=1)[0].image == hits[0].image
    with pytest.raises(ImageError, match=r"cut\.png"):
        index.query(image=folder / "cut.png")


def test_only_new_and_changed_images_are_encoded(checkpoint, index, folder, tmp_path):
    """Features equal those of a new index bit for bit. Images that could not be read are tried again."""
    before = features(index)
    report = index.add([folder])
    assert (report.added, report.changed, report.unchanged, report.broken) == (0, 0, 12, 1)
    write_picture(folder / "03.png", 100)
    shutil.copy(write_picture(folder / "new.png", 101), folder / "cut.png")
    report = index.add([folder, folder / "03.png", folder / ".." / "photos" / "new.png"])
    assert (report.added, report.changed, report.unchanged, report.broken) == (2, 1, 13, 0)
    assert not (tmp_path / "index" / BROKEN).exists()
    fresh = Index.create(tmp_path / "fresh", checkpoint[0], dtype="float32")
    fresh.add([folder])
    now, anew = features(index), features(fresh)
    assert now.keys() == anew.keys() and all(np.array_equal(now[name], anew[name]) for name in anew)
    changed = {name for name in before if not np.array_equal(before[name], now[name])}
    assert changed == {str(folder / "03.png")}


def test_removed_files_are_reported_and_pruned(index, folder):
    (folder / "02.png").unlink()
    (folder / "cut.png").unlink()
    index.add([folder])
    assert sorted(index.missing()) == [str(folder / "02.png"), str(folder / "cut.png")]
    (gone,) = [hit for hit in index.query(TEXT, rerank=12) if hit.error]
    assert gone.image.where.name == "02.png" and "no such file" in gone.error and gone.itm is None
    assert index.query(TEXT, rerank=12)[-1] == gone
    before = features(index)
    assert index.prune() == 1 and not [*index.missing()]
    assert len(index) == 11 and index._store.row_count == 11
    assert all(np.array_equal(row, before[name]) for name, row in features(index).items())
    assert not [hit for hit in index.query(TEXT, rerank=12) if hit.error]


def test_shards_and_odd_names(checkpoint, folder, tmp_path):
    """Members of a tar have the same features as their files. Names may contain anything that a file system
    allows."""
    names = ["Füße 犬.png", "two\nlines.png", os.fsdecode(b"latin \xe9.png")]
    for i, name in enumerate(names):
        write_picture(folder / name, 50 + i)
    shard = tmp_path / "000000.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    index = Index.create(tmp_path / "index", checkpoint[0], dtype="float32")
    report = index.add([folder, shard])
    assert (report.added, report.broken) == (30, 2)
    found = features(index)
    for name in names:
        assert np.array_equal(found[str(folder / name)], found[f"{shard}/{name}"])
        assert index.query(image=folder / name, top=1)[0].image.where == folder / name
    assert all(hit.itm is not None for hit in index.query(TEXT, top=30))
    lines = [json.loads(line) for line in (tmp_path / "index" / BROKEN).read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted([f"{shard}/cut.png", str(folder / "cut.png")])
    assert all("cut.png" in line["error"] for line in lines)


KILLED = """
import os, signal, sys
import blip_fast.search.adding as adding
from blip_fast.search import Index
from blip_fast.search.store import Store

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_row(store, rows, features):
    with store._features().open("ab") as stream:
        stream.write(features.tobytes()[:100])
    die()

def features_alone(store, rows, features):
    append(store, rows, features)
    die()

def one_write(store, entries):
    write(store, entries)
    die()

append, write = Store._append, Store.write
adding.WRITE_IMAGES = 4
faults = ("_append", half_a_row), ("_append", features_alone), ("write", one_write), ("_append", half_a_row)
for name, fault in faults:
    if (child := os.fork()) == 0:
        setattr(Store, name, fault)
        Index.open(sys.argv[1]).add([sys.argv[2]])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(len(Index.open(sys.argv[1])))
"""


def test_a_killed_run_goes_on_where_it_was(checkpoint, index, folder, tmp_path):
    """Killed within a row, before and after a commit. Afterwards every image is indexed once, bit for bit the
    same."""
    Index.create(tmp_path / "killed", checkpoint[0], dtype="float32").close()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(folder)],
                          capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "4", "4"]
    resumed = Index.open(tmp_path / "killed")
    report = resumed.add([folder])
    assert (report.added, report.unchanged, report.broken) == (8, 4, 1)
    expected, got = features(index), features(resumed)
    assert resumed._store.row_count == len(got) == 12 and got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_an_interruption_keeps_what_is_encoded(checkpoint, folder, tmp_path):
    index = Index.create(tmp_path / "index", checkpoint[0], dtype="float32")

    def interrupt(report):
        if report.added == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add([folder], progress=interrupt)
    assert len(index) == 3 and index.add([folder]).added == 9


def test_another_model_is_refused(index, tmp_path):
    """The same weights in another place are the same model. Other weights are not, nor the same weights in
    another dtype."""
    shutil.copytree(index.model_name, tmp_path / "copy")
    assert Index.open(tmp_path / "index", model=tmp_path / "copy").query(TEXT, top=1, rerank=0)
    save_model("BlipForImageTextRetrieval", small_tokenizer(), tmp_path / "other", seed=1)
    other = Index.open(tmp_path / "index", model=tmp_path / "other")
    for use in (lambda: other.query(TEXT), lambda: other.add([])):
        with pytest.raises(ValueError, match="other is another model than the one that the index"):
            use()


def test_an_empty_index(checkpoint, tmp_path):
    index = Index.create(tmp_path / "index", checkpoint[0], storage="float16", dtype="float32")
    assert index.add([]).images == len(index) == 0
    assert index.query(TEXT) == [] and index.prune() == 0
    assert "Nothing found" in contact_sheet(index, [], TEXT).html()


def test_float16_storage_and_bfloat16_compute(checkpoint, index, folder, tmp_path):
    half = Index.create(tmp_path / "half", checkpoint[0], storage="float16", dtype="bfloat16")
    half.add([folder])
    assert (tmp_path / "half" / "features.0.float16").stat().st_size == 12 * 32 * 2
    exact = {hit.image: hit.itc for hit in index.query(TEXT, rerank=0)}
    assert all(hit.itc == pytest.approx(exact[hit.image], abs=0.03) for hit in half.query(TEXT, rerank=0))
    reopened = Index.open(tmp_path / "half")
    assert reopened.matcher.model.vision.cls_token.dtype == torch.bfloat16
    assert reopened.query(TEXT, top=3, rerank=2) == half.query(TEXT, top=3, rerank=2)


@pytest.mark.parametrize("backend", ["faiss", "usearch"])
def test_approximate_search_gives_exact_scores(index, backend):
    pytest.importorskip(backend, reason=f"approximate search needs the extra `{backend}`")
    assert index.query(TEXT, top=7, backend=backend) == index.query(TEXT, top=7)
    index.prune()
    assert index.query(TEXT, top=12, backend=backend) == index.query(TEXT, top=12)


@pytest.mark.parametrize(("backend", "package"), [("faiss", "faiss-cpu"), ("usearch", "usearch")])
def test_a_backend_that_is_not_installed_names_its_package(
    index, folder, capsys, monkeypatch, backend, package
):
    for name in ("faiss", "usearch", "usearch.index"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        index.query(TEXT, backend=backend)
    asked = ("query", "--index", folder.parent / "index", "--text", "a", "--backend", backend)
    status, lines, err = command(capsys, *asked)
    assert (status, lines) == (2, []) and package in err and err.count("\n") == 1


def test_wrong_queries(index, folder):
    for arguments, message in (({}, "either a text or an image"),
                               ({"text": "a", "image": folder}, "either a text"),
                               ({"text": " "}, "has no token"), ({"text": "a", "top": 0}, "top must be"),
                               ({"text": "a", "rerank": -1}, "rerank at least 0"),
                               ({"text": "a", "backend": "x"}, "exact, faiss"),
                               ({"text": "a", "first_token": "[DOG]"}, "DOG")):
        with pytest.raises(ValueError, match=re.escape(message)):
            index.query(**arguments)


def test_command(checkpoint, folder, tmp_path, capsys):
    """Index, update, prune, and query with output in three forms."""
    where = ("--index", tmp_path / "index")
    status, lines, err = command(capsys, "index", *where, "--model", checkpoint[0], folder, "--json")
    assert status == 1 and f"1 images could not be read: {tmp_path}/index/broken.jsonl" in err
    assert json.loads(lines[0]) == {"images": 12, "added": 12, "changed": 0, "unchanged": 0, "broken": 1,
                                    "missing": 0, "pruned": 0}
    (folder / "cut.png").unlink()
    (folder / "11.png").unlink()
    status, _, err = command(capsys, "index", *where, folder)
    assert status == 0 and "2 indexed images are not where they were" in err
    status, lines, err = command(capsys, "index", *where, "--prune")
    assert (status, err) == (0, "") and "11 images, 0 of them new" in lines[0]
    status, lines, _ = command(capsys, "query", *where, "--text", TEXT, "--json", "--top", 5, "--rerank", 3)
    rows, hits = ([json.loads(line) for line in lines],
                  Index.open(tmp_path / "index").query(TEXT, top=5, rerank=3))
    assert status == 0
    assert rows == [{"image": h.image.name, "score": h.score, "itc": h.itc, "itm": h.itm} for h in hits]
    page = tmp_path / "pages" / "found.html"
    status, lines, _ = command(capsys, "query", *where, "--image", folder / "07.png", "--html", page)
    assert status == 0 and len(lines) == 11 and lines[0].endswith("07.png") and "+1.000" in lines[0]
    assert page.read_text().count("<img") == 12


def test_command_refuses(checkpoint, folder, tmp_path, capsys):
    where, model = ("--index", tmp_path / "index"), ("--model", checkpoint[0])
    (tmp_path / "empty").mkdir()
    assert command(capsys, "index", *where, *model, "--dtype", "float32")[0] == 0
    for message, arguments in {
        "no such image": ("index", *where, "nowhere.jpg"),
        "holds no images": ("index", *where, tmp_path / "empty"),
        "dtype float32, not bfloat16": ("index", *where, *model, "--dtype", "bfloat16"),
        "storage float32, not float16": ("index", *where, "--storage", "float16"),
        "name the model": ("index", "--index", tmp_path / "new", folder),
        "storage must be one of": ("index", "--index", tmp_path / "new", *model, "--storage", "int8"),
        "holds no index": ("query", "--index", tmp_path / "new", "--text", "a"),
        "either a text or an image": ("query", *where),
    }.items():
        status, lines, err = command(capsys, *arguments)
        assert (status, lines) == (2, []) and message in err and err.count("\n") == 1, f"{message}: {err}"
    assert not (tmp_path / "new" / "index.sqlite").exists()


def test_contact_sheet_is_escaped_self_contained_and_linked(checkpoint, folder, tmp_path):
    evil = folder / '<b>"&\n.png'
    write_picture(evil, 70)
    index = Index.create(tmp_path / "index", checkpoint[0], dtype="float32")
    index.add([folder])
    hits = index.query('<script>alert("x")</script> a', top=20, rerank=4)
    evil.rename(folder / "moved.png")
    sheet = contact_sheet(index, hits, '<script>alert("x")</script> a')
    html = sheet.write(tmp_path / "sheet.html").read_text()
    page = Page(html)
    assert "<script" not in html and "<b>\"" not in html and '<b>"&\\n.png: no such file' in page.text
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 12 and all(source.startswith("data:image/") for source in sources)
    links = [value for name, value in page.attributes if name == "href"]
    assert sorted(links) == sorted(hit.image.where.as_uri() for hit in hits if hit.image.where != evil)
    assert {value for name, value in page.attributes if name == "alt"} == {f"{i:02}.png" for i in range(12)}
    assert "match " in page.text and ":focus-visible" in html and "prefers-color-scheme: dark" in html
