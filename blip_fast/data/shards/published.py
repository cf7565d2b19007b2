"""Converts the annotation files that data sets are published with into the rows that `annotated.py` reads.

Each reader takes the JSON as published by the data set's authors, or with the published BLIP, and yields rows
one by one. It does not open images; the path of an image below the folder of images comes from the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from blip_fast.data.shards.annotated import json_rows

VISUAL_GENOME_WEIGHT = 0.2  # of an answer in VQA training, as published

KINDS = {str: "a text", int: "a whole number", list: "a list"}

Row = dict[str, Any]
Value = TypeVar("Value", str, int, list)


@dataclass(frozen=True)
class Format:
    """How a data set is published: `files` names its files in order, `least` to `most` of them; `rows` reads
    them."""

    files: str
    rows: Callable[..., Iterator[Row]]
    least: int = 1
    most: int = 1


def published_rows(name: str, files: list[str], split: str | None = None, prefix: str = "") -> Iterator[Row]:
    """Rows of one of `FORMATS`.

    Args:
        files: as described by the format's `files`.
        split: given to rows without a split.
        prefix: a folder to put before every image.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the format is unknown, the number of files is wrong, or a file is no JSON or has another
            format; names the file and the entry.
    """
    if name not in FORMATS:
        raise ValueError(f"the published formats are {', '.join(FORMATS)}, got {name!r}")
    if not FORMATS[name].least <= len(files) <= FORMATS[name].most:
        raise ValueError(f"{name} takes {FORMATS[name].files}, got {len(files)} files")
    for row in FORMATS[name].rows(*map(Path, files)):
        for image in ("image", "second_image"):
            if image in row and prefix:
                row[image] = str(PurePosixPath(prefix) / row[image])
        yield row if split is None else {"split": split} | row


def karpathy_rows(path: Path) -> Iterator[Row]:
    """Karpathy's splits of COCO, Flickr30k and Flickr8k (`dataset_coco.json`), or the published BLIP's files
    of them (`coco_karpathy_test.json`): one row per image, with all its captions. `restval` becomes `train`,
    since everybody trains on both. `id` is the image's number in COCO, or in the file."""
    content = _load(path)
    if isinstance(content, list):
        yield from _captions_by_image(content, path)
        return
    for entry, where in _entries(content, "images", path):
        folder, split = entry.get("filepath", ""), _get(entry, "split", str, where)
        captions = [_get(sentence, "raw", str, where) for sentence in _get(entry, "sentences", list, where)]
        yield {"image": str(PurePosixPath(folder) / _get(entry, "filename", str, where)),
               "captions": captions, "split": "train" if split == "restval" else split,
               "id": entry.get("cocoid", entry.get("imgid"))}


def _captions_by_image(content: list[Any], path: Path) -> Iterator[Row]:
    """Entries with one or more captions; all entries of an image become one row, in any order."""
    rows: dict[str, Row] = {}
    for entry, where in _each(content, path):
        image, captions = _get(entry, "image", str, where), entry.get("caption", [])
        row = rows.setdefault(image, {"image": image, "captions": [], "id": len(rows)})
        row["captions"] += [captions] if isinstance(captions, str) else captions
        if not all(isinstance(caption, str) for caption in row["captions"]):
            raise ValueError(f'{where}: "caption" must be a text or a list of texts')
        row |= {key: entry[key] for key in ("domain",) if key in entry}
    yield from rows.values()


def coco_rows(path: Path) -> Iterator[Row]:
    """COCO's own format of captions, which NoCaps uses too (`nocaps_val_4500_captions.json`), or the
    published BLIP's files of NoCaps: one row per image, with its captions, which a test set lacks. NoCaps'
    `domain` is kept."""
    content = _load(path)
    if isinstance(content, list):
        yield from _captions_by_image(content, path)
        return
    captions: dict[int, list[str]] = {}
    if "annotations" in content:
        for entry, where in _entries(content, "annotations", path):
            captions.setdefault(
                _get(entry, "image_id", int, where), []).append(_get(entry, "caption", str, where))
    for entry, where in _entries(content, "images", path):
        number = _get(entry, "id", int, where)
        domain = {"domain": entry["domain"]} if "domain" in entry else {}
        image = _get(entry, "file_name", str, where)
        yield {"image": image, "captions": captions.get(number, []), "id": number} | domain


def vqa_rows(questions: Path, annotations: Path | None = None) -> Iterator[Row]:
    """VQA v2's questions with their annotations; or one of the published BLIP's files (`vqa_train.json`,
    `vg_qa.json`, `vqa_test.json`). A test set has no annotations: its `answers` are null."""
    content = _load(questions)
    if isinstance(content, list):
        yield from _blip_questions(content, questions)
        return
    answered = {} if annotations is None else {
        _get(entry, "question_id", int, where): (entry, where)
        for entry, where in _entries(_load(annotations), "annotations", annotations)}
    asked = _entries(content, "questions", questions)
    folder = _get(content, "data_subtype", str, str(questions)).replace("test-dev", "test")
    for entry, where in asked:
        number, image = _get(entry, "question_id", int, where), _get(entry, "image_id", int, where)
        row = {"image": f"{folder}/COCO_{folder}_{image:012d}.jpg",
               "question": _get(entry, "question", str, where), "question_id": number, "answers": None}
        if annotations is not None:
            if number not in answered:
                raise ValueError(f"{where}: question {number} has no annotation in {annotations}")
            annotation, place = answered[number]
            row["answers"] = [_get(answer, "answer", str, place)
                              for answer in _get(annotation, "answers", list, place)]
            row |= {key: annotation[key] for key in ("answer_type", "question_type") if key in annotation}
        yield row


def _blip_questions(content: list[Any], path: Path) -> Iterator[Row]:
    for entry, where in _each(content, path):
        answers = entry.get("answer")  # a test set has none
        if isinstance(answers, str):  # Visual Genome's one answer
            answers = {answers: VISUAL_GENOME_WEIGHT}
        yield {"image": _get(entry, "image", str, where), "question": _get(entry, "question", str, where),
               "answers": answers} | {key: entry[key] for key in ("question_id",) if key in entry}


def visual_genome_rows(questions: Path, images: Path) -> Iterator[Row]:
    """Visual Genome's `question_answers.json`, and `image_data.json` for the paths of images: one answer per
    question, with weight 0.2."""
    places: dict[int, str] = {}
    for entry, where in _each(_load(images), images):
        places[_get(entry, "image_id", int, where)] = "/".join(_get(entry, "url", str, where).split("/")[-2:])
    for entry, where in _each(_load(questions), questions):
        for asked in _get(entry, "qas", list, where):
            image = _get(asked, "image_id", int, where)
            if image not in places:
                raise ValueError(f"{where}: image {image} is not in {images}")
            yield {"image": places[image], "question": _get(asked, "question", str, where),
                   "answers": {_get(asked, "answer", str, where): VISUAL_GENOME_WEIGHT}}


def nlvr2_rows(path: Path) -> Iterator[Row]:
    """NLVR2's `train.json`, `dev.json` and `test1.json` (one entry per line), or the published BLIP's
    `nlvr_dev.json`. `sentence_id`, by which consistency is computed, is the identifier without the pair's
    number. The published BLIP's files have neither."""
    for entry, where in _each(_load_lines(path), path):
        label = _get(entry, "label", str, where)
        if label not in ("True", "False"):
            raise ValueError(f'{where}: "label" is {label!r}, not "True" or "False"')
        row = {"caption": _get(entry, "sentence", str, where), "label": label == "True"}
        if "images" in entry:
            images = _get(entry, "images", list, where)
            if len(images) != 2 or not all(isinstance(image, str) for image in images):
                raise ValueError(f'{where}: "images" must be two paths')
            yield {"image": images[0], "second_image": images[1]} | row
            continue
        parts = _get(entry, "identifier", str, where).split("-")
        if len(parts) != 4:
            raise ValueError(f'{where}: "identifier" is {"-".join(parts)!r}, not SPLIT-SET-PAIR-SENTENCE')
        subset, number, pair, sentence = parts
        folder = f"images/train/{entry['directory']}" if "directory" in entry else subset
        first, second = (f"{folder}/{subset}-{number}-{pair}-img{i}.png" for i in (0, 1))
        yield {"image": first, "second_image": second, **row, "identifier": "-".join(parts),
               "sentence_id": f"{subset}-{number}-{sentence}"}


def visdial_rows(dialogues: Path, companion: Path | None = None) -> Iterator[Row]:
    """VisDial 1.0: an image, its caption and `dialog`, the rounds in `AnnotationFile`'s form. In memory are
    all questions and answers, and one dialogue at a time.

    Args:
        dialogues: `visdial_1.0_train.json`, `visdial_1.0_val.json` or `visdial_1.0_test.json`.
        companion: for the validation set, optionally `visdial_1.0_val_dense_annotations.json`; for the
            training set, Karpathy's `dataset_coco.json`, which says which images are in COCO's `train2014`
            and which in `val2014`.
    """
    split = next(_stream_json(dialogues, "split"), None)
    if split not in ("train", "val", "test"):
        raise ValueError(f'{dialogues} has no "split" that is train, val or test: it is of another format')
    if split == "train" and companion is None:
        raise ValueError(f"{dialogues} does not say which of COCO's folders its images are in: "
                         "name dataset_coco.json of Karpathy's split after it")
    coco = _coco_images(companion) if split == "train" and companion is not None else {}
    relevance = {} if split == "train" or companion is None else {
        (_get(entry, "image_id", int, where), _get(entry, "round_id", int, where)):
            _get(entry, "gt_relevance", list, where) for entry, where in _each(_load(companion), companion)}
    texts = {key: [*_stream_json(dialogues, f"data.{key}.item")] for key in ("questions", "answers")}
    entry = None
    for entry, where in _objects(_stream_json(dialogues, "data.dialogs.item"), dialogues, " of dialogs"):
        image, folder = _get(entry, "image_id", int, where), f"VisualDialog_{split}2018"
        if split == "train" and image not in coco:
            raise ValueError(f"{where}: image {image} is not in {companion}")
        rounds = _each(_get(entry, "dialog", list, where), dialogues, f" of the dialogue about image {image}")
        yield {"image": coco.get(image, f"{folder}/{folder}_{image:012d}.jpg"),
               "captions": [_get(entry, "caption", str, where)], "split": split, "id": image,
               "dialog": [_round(asked, texts, relevance.get((image, number)), place)
                          for number, (asked, place) in enumerate(rounds, 1)]}
    if entry is None:
        raise ValueError(f'{dialogues} has no list "dialogs" with an entry: it is of another format')


def _coco_images(karpathy: Path) -> dict[int, str]:
    """The path of each of COCO's images, by its number."""
    entries = _objects(_stream_json(karpathy, "images.item"), karpathy, " of images")
    return {_get(entry, "cocoid", int, where):
            f"{_get(entry, 'filepath', str, where)}/{_get(entry, 'filename', str, where)}"
            for entry, where in entries}


def _round(asked: Row, texts: dict[str, list[Any]], relevance: list[Any] | None, where: str) -> Row:
    one: Row = {"question": _text_of_number(texts, "questions", asked.get("question"), where)}
    if "answer" in asked:
        one["answer"] = _text_of_number(texts, "answers", asked["answer"], where)
    if "answer_options" in asked:
        one["candidates"] = [_text_of_number(texts, "answers", option, where)
                             for option in _get(asked, "answer_options", list, where)]
    one |= {"right": asked["gt_index"]} if "gt_index" in asked else {}
    return one | ({} if relevance is None else {"relevance": relevance})


def _text_of_number(texts: dict[str, list[Any]], key: str, number: Any, where: str) -> str:
    """The text that a dialogue refers to by its place in the list `key`."""
    if not isinstance(number, int) or not 0 <= number < len(texts[key]):
        raise ValueError(f'{where} names {number!r} of "{key}", which is not there')
    return texts[key][number]


def msrvtt_rows(path: Path) -> Iterator[Row]:
    """MSRVTT's videos and captions for retrieval: `MSRVTT_JSFUSION_test.csv` (the 1k-A test), or the
    published BLIP's `msrvtt_test.jsonl`. `image` is the video."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            entries, video, caption = list(csv.DictReader(stream)), "video_id", "sentence"
    else:
        entries, video, caption = _load_lines(path), "clip_name", "caption"
    yield from _captions_by_image([{"image": f"{_get(entry, video, str, where)}.mp4",
                                    "caption": _get(entry, caption, str, where)}
                                   for entry, where in _each(entries, path)], path)


def msrvtt_qa_rows(questions: Path) -> Iterator[Row]:
    """MSRVTT-QA's `train_qa.json`, `val_qa.json` and `test_qa.json`: one answer per question. `image` is the
    video."""
    for entry, where in _each(_load(questions), questions):
        yield _video_question(entry, where, f"video{_get(entry, 'video_id', int, where)}.mp4")


def msvd_qa_rows(questions: Path, mapping: Path) -> Iterator[Row]:
    """MSVD-QA's `train_qa.json`, `val_qa.json` and `test_qa.json`, with `youtube_mapping.txt`, which numbers
    MSVD's videos (one `NAME vid12` per line): one answer per question. `image` is the video."""
    names: dict[str, str] = {}
    for number, line in enumerate(mapping.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) != 2:
            raise ValueError(f"{mapping}, line {number} is not a video's name and number")
        names[words[1]] = words[0]
    for entry, where in _each(_load(questions), questions):
        video = f"vid{_get(entry, 'video_id', int, where)}"
        if video not in names:
            raise ValueError(f"{where}: {video} is not in {mapping}")
        yield _video_question(entry, where, f"{names[video]}.avi")


def _video_question(entry: Row, where: str, video: str) -> Row:
    return {"image": video, "question": _get(entry, "question", str, where),
            "question_id": _get(entry, "id", int, where), "answers": [_get(entry, "answer", str, where)]}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON in UTF-8: {error}") from None


def _load_lines(path: Path) -> Any:
    """The entries of a JSON list, or of a file with one entry per line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[0].lstrip().startswith("["):
        return _load(path)
    return [entry for _, entry in json_rows(lines, path)]


def _stream_json(path: Path, prefix: str) -> Iterator[Any]:
    """The values at `prefix` of a JSON file, one by one: the file may be larger than memory. In ijson's
    notation "a.item" is each entry of the list "a"."""
    if find_spec("ijson") is None:
        raise ValueError("VisDial's annotations need ijson, which is not installed: "
                         "pip install 'blip-fast[visdial]'")
    import ijson  # pyright: ignore[reportMissingImports]

    try:
        with path.open("rb") as stream:
            yield from ijson.items(stream, prefix, use_float=True)
    except (ijson.JSONError, UnicodeDecodeError):  # their own messages take several lines
        raise ValueError(f"{path} is no whole JSON in UTF-8: fetch it again") from None


def _entries(content: Any, key: str, path: Path) -> Iterator[tuple[Row, str]]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f'{path} has no list "{key}": it is of another format')
    return _each(content[key], path, f" of {key}")


def _each(content: Any, path: Path, of: str = "") -> Iterator[tuple[Row, str]]:
    """`_objects` of `content`, which must be a list."""
    if not isinstance(content, list):
        raise ValueError(f"{path} is no list: it is of another format")
    return _objects(content, path, of)


def _objects(entries: Iterable[Any], path: Path, of: str) -> Iterator[tuple[Row, str]]:
    """Each entry, which must be an object, with its name in messages."""
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}{of}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no object")
        yield entry, where


def _get(entry: Row, key: str, kind: type[Value], where: str) -> Value:
    value = entry.get(key)
    if not isinstance(value, kind):
        raise ValueError(f'{where} has no "{key}", {KINDS[kind]}')
    return value


FORMATS = {
    "karpathy": Format("FILE of Karpathy's split, or the published BLIP's", karpathy_rows),
    "coco": Format("FILE of captions as COCO and NoCaps publish them, or the published BLIP's of NoCaps",
                   coco_rows),
    "vqa": Format("QUESTIONS ANNOTATIONS, QUESTIONS of a test set, or FILE of the published BLIP", vqa_rows,
                  most=2),
    "visual-genome": Format("question_answers.json image_data.json", visual_genome_rows, least=2, most=2),
    "nlvr2": Format("FILE as published, or the published BLIP's", nlvr2_rows),
    "visdial": Format("DIALOGUES, DIALOGUES DENSE_ANNOTATIONS, or of the training set DIALOGUES "
                      "dataset_coco.json", visdial_rows, most=2),
    "msrvtt": Format("MSRVTT_JSFUSION_test.csv, or FILE.jsonl of the published BLIP", msrvtt_rows),
    "msrvtt-qa": Format("FILE as published", msrvtt_qa_rows),
    "msvd-qa": Format("FILE youtube_mapping.txt", msvd_qa_rows, least=2, most=2),
}
