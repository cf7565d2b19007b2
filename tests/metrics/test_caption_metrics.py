"""Caption metrics compared with textbook formulas, with pycocoevalcap run by itself, and with values computed
by hand."""

import math
import random
import shutil
from collections import Counter

import pytest

pytest.importorskip("pycocoevalcap", reason="caption metrics need the extra `eval`")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from blip_fast.metrics.captions import CaptionMetrics, check_references, words

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java, which is not here")

SUBJECTS, VERBS, PLACES = ("a dog", "the dog", "two men", "a girl"), ("runs", "is running", "stands"), (
    "on the grass", "on a beach", "in the snow near a dog")
SPLIT = {  # a text: its words as the Penn Treebank has them, punctuation left out
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "Two-story T-shirt, e.g. 3,000 people; 2.5 dogs!": "two-story t-shirt e.g 3,000 people 2.5 dogs",
    "I can't, they cannot; we won't -- they're \"quoted\"": "i ca n't they can not we wo n't they 're quoted",
    "text/slash at 1/2 café": "text/slash at 1/2 café",
    "dogs' tails, a man’s hat": "dogs tails a man 's hat",
    "": "", " ? ": "",
}


def some_captions(count: int, seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)
    caption = lambda: " ".join(rng.choice(part) for part in (SUBJECTS, VERBS, PLACES)[: rng.randint(1, 3)])  # noqa: E731
    return [caption() for _ in range(count)], [[caption() for _ in range(rng.randint(1, 4))]
                                               for _ in range(count)]


def grams(text: str, n: int) -> Counter:
    split = text.split()
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def bleu(captions, references, most):
    """Papineni et al. 2002, over the corpus. The reference length is the closest one, or the shorter of two
    equally close."""
    precisions = []
    for n in range(1, most + 1):
        right = total = 0
        for caption, texts in zip(captions, references, strict=True):
            allowed = Counter()
            for text in texts:
                allowed |= grams(text, n)
            right += (grams(caption, n) & allowed).total()
            total += grams(caption, n).total()
        precisions.append(right / total)
    written = sum(len(caption.split()) for caption in captions)
    human = sum(min((abs(len(text.split()) - len(caption.split())), len(text.split())) for text in texts)[1]
                for caption, texts in zip(captions, references, strict=True))
    return math.prod(precisions) ** (1 / most) * min(1.0, math.exp(1 - human / written))


def cider(captions, references):
    """CIDEr-D, Vedantam et al. 2015: clipped cosines of tf-idf, a Gaussian of the lengths' difference (σ =
    6)."""
    images, scores = len(captions), []
    seen = Counter(gram for texts in references
                   for gram in {gram for text in texts for n in range(1, 5) for gram in grams(text, n)})

    def weights(text, n):
        return {gram: count * math.log(images / max(1, seen[gram])) for gram, count in grams(text, n).items()}

    def length(text):
        return max(0, len(text.split()) - 1)  # counted in pairs of words, as in the published code

    for caption, texts in zip(captions, references, strict=True):
        score = 0.0
        for text in texts:
            for n in range(1, 5):
                ours, theirs = weights(caption, n), weights(text, n)
                dot = sum(min(value, theirs.get(gram, 0)) * theirs.get(gram, 0)
                          for gram, value in ours.items())
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                gauss = math.exp(-((length(caption) - length(text)) ** 2) / 72)
                score += dot / (norms or 1) * gauss / 4 / len(texts)
        scores.append(10 * score)
    return sum(scores) / images


def rouge_l(caption, texts):
    """Lin 2004, β = 1.2; precision and recall are each the best over the references."""
    def common(a, b):
        row = [0] * (len(b) + 1)
        for word in a:
            before = row[:]
            for j, other in enumerate(b, 1):
                row[j] = before[j - 1] + 1 if word == other else max(before[j], row[j - 1])
        return row[-1]

    ours = caption.split()
    shared = [(common(ours, text.split()), len(text.split())) for text in texts]
    precision, recall = max(c for c, _ in shared) / len(ours), max(c / n for c, n in shared)
    return 0 if precision == 0 else (1 + 1.44) * precision * recall / (recall + 1.44 * precision)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_the_formulas(seed):
    captions, references = some_captions(25, seed)
    found = CaptionMetrics("java-free")(captions, references)
    assert list(found) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    for n in range(1, 5):
        assert found[f"bleu_{n}"] == pytest.approx(bleu(captions, references, n), rel=1e-6, abs=2e-5)
    assert found["cider"] == pytest.approx(cider(captions, references), rel=1e-9)
    each = [rouge_l(caption, texts) for caption, texts in zip(captions, references, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(each) / len(each), rel=1e-9)


def test_by_hand():
    """4 of 5 words and 2 of 4 pairs match; the closest reference length is 6 words; the longest common
    subsequence is 4."""
    found = CaptionMetrics("java-free")(["a dog sat on mats"], [["A dog lay on mats, asleep."]])
    brevity = math.exp(1 - 6 / 5)
    assert found["bleu_1"] == pytest.approx(4 / 5 * brevity)
    assert found["bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4) * brevity)
    assert found["rouge_l"] == pytest.approx((2.44 * 4 / 5 * 4 / 6) / (4 / 6 + 1.44 * 4 / 5))
    assert found["cider"] == 0  # always 0 for a single image


def test_captions_of_people_score_highest_and_an_empty_one_nothing():
    captions, references = some_captions(12, 5)
    best = CaptionMetrics("java-free")([texts[0] for texts in references], references)
    assert best["bleu_1"] == pytest.approx(1) and best["rouge_l"] == pytest.approx(1)
    none = CaptionMetrics("java-free")([""] * 12, references)
    assert none == pytest.approx(dict.fromkeys(none, 0.0), abs=1e-9)
    assert CaptionMetrics("java-free")(captions, references)["cider"] < best["cider"]


@pytest.mark.parametrize("text", SPLIT)
def test_words(text):
    assert words([text], [[text, "x"]]) == ({0: [SPLIT[text]]}, {0: [SPLIT[text], "x"]})


@needs_java
def test_words_and_the_ptb_tokenizer_split_alike():
    """Except for the point after an abbreviation, which PTB keeps."""
    by_ptb = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(SPLIT)})
    assert [by_ptb[i][0].replace("e.g.", "e.g") for i in range(len(SPLIT))] == list(SPLIT.values())


@needs_java
def test_photographs_score_as_by_pycocoevalcap_alone(photographs):
    """With its own tokenizer and scorers, and images in another order. A human caption serves as the
    generated one."""
    captions, references = ([texts[0] for texts in photographs.captions[:150]],
                            [texts[1:] for texts in photographs.captions[:150]])
    order = random.Random(0).sample(range(150), 150)
    human = PTBTokenizer().tokenize({i: [{"caption": text} for text in references[i]] for i in order})
    written = PTBTokenizer().tokenize({i: [{"caption": captions[i]}] for i in order})
    expected = dict(zip([f"bleu_{n}" for n in range(1, 5)],
                        Bleu(4).compute_score(human, written, verbose=0)[0], strict=True))
    expected |= {"rouge_l": Rouge().compute_score(human, written)[0],
                 "cider": Cider().compute_score(human, written)[0]}
    assert CaptionMetrics("java-free")(captions, references) == pytest.approx(expected, rel=1e-9)


@needs_java
@pytest.mark.slow
def test_with_java():
    """PTB takes U+2028 for a line end. If it were not replaced, all later captions would shift."""
    captions, references = some_captions(20, 7)
    captions[3], references[4] = "a dog\u2028runs on\nthe grass", ["a dog runs on the\x85beach", ""]
    found = CaptionMetrics("coco-without-spice")(captions, references)
    meteor = found.pop("meteor")
    assert found == pytest.approx(CaptionMetrics("java-free")(captions, references), rel=1e-9)
    assert 0 < meteor < 1
    of_people = CaptionMetrics("coco-without-spice")([texts[0] for texts in references], references)
    assert of_people["meteor"] == pytest.approx(1, abs=1e-6)


def test_what_is_missing_is_named_before_work(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="java-free, coco-without-spice, coco, got 'bleu'"):
        CaptionMetrics("bleu")
    monkeypatch.setattr("blip_fast.metrics.captions._require_java", lambda: None)
    monkeypatch.setattr("pycocoevalcap.spice.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ValueError, match=r"python -m pycocoevalcap\.spice.get_stanford_models"):
        CaptionMetrics("coco")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"need Java \(not installed: install a Java .*java-free"):
        CaptionMetrics("coco-without-spice")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(ValueError, match=r"need Java \(no message\)"):
        CaptionMetrics("coco-without-spice")
    CaptionMetrics("java-free")
    monkeypatch.setattr("blip_fast.metrics.captions.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'blip-fast\[eval\]'"):
        CaptionMetrics("java-free")


def test_what_cannot_be_scored():
    metrics = CaptionMetrics("java-free")
    for captions, references in ((["a", "b"], [["a"]]), (["a"], []), ([], [])):
        with pytest.raises(ValueError,
                           match=f"got {len(captions)} captions and the references of {len(references)} "):
            metrics(captions, references)
    with pytest.raises(ValueError, match="image 1 has no caption with a word"):
        metrics(["a", "b"], [["a"], ["", "?!"]])
    with pytest.raises(ValueError, match=r"a\.png has no caption"):
        check_references([("a.png", [])])
