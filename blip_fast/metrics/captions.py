"""Compares generated captions with human ones: BLEU, METEOR, ROUGE-L, CIDEr and SPICE, all computed by
pycocoevalcap, the standard implementation.

Its tokenizer (Stanford's PTB), METEOR and SPICE are Java programs. The set `java-free` leaves out METEOR and
SPICE and splits words by `words` below, so its figures compare with published ones only as far as both split
alike.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blip_fast.metrics.java import find_java

SETS = {
    "java-free": ("bleu", "rouge_l", "cider"),
    "coco-without-spice": ("bleu", "meteor", "rouge_l", "cider"),
    "coco": ("bleu", "meteor", "rouge_l", "cider", "spice"),
}
JAVA_FREE = "java-free"
# Clitics are separate words as in the Penn Treebank: does n't, man 's, can not.
WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|can(?=not\b)|\w+(?:[-.,/]\w+)*")

Texts = dict[int, list[str]]  # by image


class CaptionMetrics:
    """The metrics of one of `SETS`. The constructor checks that everything they need is installed."""

    def __init__(self, which: str) -> None:
        """Raises ValueError if the set is unknown, or if the extra `eval`, Java or SPICE's models are
        missing."""
        if which not in SETS:
            raise ValueError(f"the caption metrics are {', '.join(SETS)}, got {which!r}")
        if find_spec("pycocoevalcap") is None:
            raise ValueError("caption metrics need pycocoevalcap: pip install 'blip-fast[eval]'")
        self.which, self._names = which, SETS[which]
        if which != JAVA_FREE:
            _require_java()
        if "spice" in self._names:
            _require_spice_models()

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Score one caption of each image against human captions of it.

        Args:
            captions: one per image; an empty caption scores 0.
            references: for each image, its human captions, at least one of them with a word.

        Returns:
            `bleu_1` to `bleu_4`, `meteor`, `rouge_l` and `spice`, 0 to 1 (published: 0 to 100), and `cider`,
            0 to 10 (published: 0 to 1000). CIDEr weights words by how few of these images have them: for a
            single image it is 0.

        Raises:
            ValueError: there is no image, the number of references differs, an image has no reference with a
                word, or a Java program fails.
        """
        if not captions or len(captions) != len(references):
            raise ValueError("one caption an image and one image at least are needed, "
                             f"got {len(captions)} captions and the references of {len(references)} images")
        check_references((f"image {image}", texts) for image, texts in enumerate(references))
        split = words if self.which == JAVA_FREE else _ptb
        written, human = split(captions, references)
        found: dict[str, float] = {}
        for name in self._names:
            value = _SCORERS[name](human, written)
            found |= ({f"bleu_{n}": float(v) for n, v in enumerate(value, 1)} if name == "bleu"
                      else {name: float(value)})
        return found

    def by_domain(self, captions: Sequence[str], references: Sequence[Sequence[str]],
                  domains: Sequence[str | None]) -> dict[str, float]:
        """The same metrics for the images of each domain separately, as NoCaps is reported:
        `cider_in-domain`. CIDEr then weights words by the domain's own images. Empty unless every image has a
        domain and there is more than one domain."""
        named = sorted({domain for domain in domains if domain is not None})
        if None in domains or len(named) < 2:
            return {}
        found: dict[str, float] = {}
        for domain in named:
            mine = [image for image, its in enumerate(domains) if its == domain]
            figures = self([captions[image] for image in mine], [references[image] for image in mine])
            found |= {f"{name}_{domain}": value for name, value in figures.items()}
        return found


def check_references(references: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise ValueError naming the first image that has no caption with a word. `references` are (name,
    captions)."""
    for name, texts in references:
        if not any(WORD.search(text.lower()) for text in texts):
            raise ValueError(f"{name} has no caption with a word: "
                             "caption metrics need one of every image to compare with")


def words(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Texts, Texts]:
    """Captions and references as lower-case words separated by spaces, without Java. A word is a run of
    letters, digits and underscores, perhaps with a hyphen, slash, point or comma inside; clitics are separate
    words (`does n't`, `man 's`); everything else is left out."""
    return ({image: [_words(caption)] for image, caption in enumerate(captions)},
            {image: [_words(text) for text in texts] for image, texts in enumerate(references)})


def _words(text: str) -> str:
    return " ".join(WORD.findall(text.lower().replace("’", "'")))


def _ptb(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Texts, Texts]:
    """As `words`, but by Stanford's PTB tokenizer without punctuation, as published, in one run for both."""
    both = [[caption, *texts] for caption, texts in zip(captions, references, strict=True)]
    # The tokenizer reads one text per line, and takes other characters than \n for line ends too.
    given = {image: [{"caption": " ".join(text.split())} for text in texts]
             for image, texts in enumerate(both)}
    split = _library("tokenizer.ptbtokenizer").PTBTokenizer().tokenize(given)
    if [len(split.get(image, ())) for image in range(len(both))] != [len(texts) for texts in both]:
        raise ValueError("the PTB tokenizer gave other lines than it got: see what Java says above")
    return {image: split[image][:1] for image in split}, {image: split[image][1:] for image in split}


def _bleu(human: Texts, written: Texts) -> Any:
    return _library("bleu.bleu").Bleu(4).compute_score(human, written, verbose=0)[0]


def _meteor(human: Texts, written: Texts) -> Any:
    try:
        return _library("meteor.meteor").Meteor().compute_score(human, written)[0]
    except (OSError, ValueError) as error:  # raised when the Java program has exited
        raise ValueError(f"METEOR's Java program failed ({error})") from None


def _rouge(human: Texts, written: Texts) -> Any:
    return _library("rouge.rouge").Rouge().compute_score(human, written)[0]


def _cider(human: Texts, written: Texts) -> Any:
    return _library("cider.cider").Cider().compute_score(human, written)[0]


def _spice(human: Texts, written: Texts) -> Any:
    try:
        with _stdout_to_stderr():
            return _library("spice.spice").Spice().compute_score(human, written)[0]
    except subprocess.CalledProcessError as error:
        raise ValueError(f"SPICE's Java program failed with status {error.returncode}: "
                         "see what it says above, or take the metrics coco-without-spice") from None


_SCORERS: dict[str, Callable[[Texts, Texts], Any]] = {
    "bleu": _bleu, "meteor": _meteor, "rouge_l": _rouge, "cider": _cider, "spice": _spice}


def _library(module: str) -> Any:
    return import_module(f"pycocoevalcap.{module}")


def _require_java() -> None:
    java = find_java()
    if not java.runs:
        raise ValueError(f"METEOR, SPICE and the PTB tokenizer need Java ({java.description}): "
                         f"or take the metrics {JAVA_FREE}")


def _require_spice_models() -> None:
    """Check before any work: pycocoevalcap would download them unasked at the end, hundreds of megabytes."""
    if not list(Path(_library("spice").__file__).parent.glob("lib/stanford-corenlp-*-models.jar")):
        raise ValueError("SPICE needs the models of Stanford CoreNLP 3.6.0: fetch them once by `python -m "
                         "pycocoevalcap.spice.get_stanford_models`, or take the metrics coco-without-spice")


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """SPICE's program prints its progress to standard output, which is for figures."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
