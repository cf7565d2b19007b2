"""Re-ranked captions: the formula by hand, scores by transformers' modules, prompts and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import IMAGE_SIZE, save_model, small_tokenizer
from PIL import Image
from torch.nn.functional import normalize

from blip_fast import cli
from blip_fast.checkpoint import save_native
from blip_fast.commands.caption import COMMAND
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import ImageError, evaluation_transform
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.tasks.captioner import Captioner
from blip_fast.tasks.classifier import TEMPLATES, Classifier
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.reranking import BeliefScorer, Candidate, ItmScorer, reranked, revised_belief

PROMPT = "a picture of"
FIVE = GenerationConfig(beams=5, max_length=14, min_length=6, n_best=5)
LABELS = ["dog", "red ball", "man", "wooden table"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directories of a captioner and a matcher, and transformers' model of the matcher."""
    captioner, matcher = tmp_path_factory.mktemp("captioner"), tmp_path_factory.mktemp("matcher")
    save_model("BlipForConditionalGeneration", small_tokenizer(), captioner, sep_bias=4.0, seed=2)
    return captioner, matcher, save_model("BlipForImageTextRetrieval", small_tokenizer(), matcher)


@pytest.fixture(scope="module")
def captioner(checkpoints) -> Captioner:
    return Captioner.from_pretrained(checkpoints[0], dtype="float32")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures and a broken one among them."""
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1b.png").write_bytes(b"no image")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    return tmp_path


def stripped(captioner: Captioner, paths: list[Path], prompt: str = PROMPT) -> dict[tuple[int, ...], str]:
    """Each text's words without the prompt."""
    return {tuple(text.token_ids): text.caption
            for caption in captioner(paths, prompt, FIVE, strip_prompt=True)
            for text in (caption, *caption.others)}


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return evaluation_transform([image.convert("RGB")], IMAGE_SIZE)


def feature(theirs, text: str) -> torch.Tensor:
    """[CLS]'s projection, a unit vector in float64."""
    ids = torch.tensor([small_tokenizer().encode(text)])
    states = theirs.text_encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return normalize(theirs.text_proj(states[0, 0]).double(), dim=0)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize(("probability", "similarity", "confidence", "expected"), [
    (0.25, 0.6, 0.5, 0.5),  # α = (0.4 / 1.6) ** 0.5 = 1/2
    (0.09, 0.6, 0.5, 0.3),
    (0.25, -0.6, 0.5, 0.0625),  # α = (1.6 / 0.4) ** 0.5 = 2
    (0.0001, 0.6, 0.0, 0.1),  # α = 1/4: an unexpected context changes most
    (0.3, 0.0, 0.7, 0.3),  # unrelated: unchanged
    (0.3, 0.9, 1.0, 0.3),  # a certain context changes nothing
    (0.3, -0.9, 1.0, 0.3),
    (0.3, 1.0, 0.5, 1.0), (0.3, -1.0, 0.5, 0.0), (0.3, 1.0, 1.0, 0.3), (0.3, -1.0, 1.0, 0.3),
    (0.3, 1 + 1e-9, 0.5, 1.0), (0.3, -1 - 1e-9, 0.5, 0.0),  # rounding
    (0.0, 0.6, 0.5, 0.0), (1.0, 0.6, 0.5, 1.0), (1.0, -1.0, 0.5, 1.0),
])
def test_belief_by_hand(probability, similarity, confidence, expected):
    values = (torch.tensor([value], dtype=torch.float64) for value in (probability, similarity, confidence))
    assert revised_belief(*values).tolist() == pytest.approx([expected], abs=1e-12)


# ---------------------------------------------------------------- the scores


@pytest.mark.parametrize("first_token", ["[CLS]", "[ENC]"])
@torch.no_grad()
def test_itm(checkpoints, captioner, folder, first_token):
    """A text's score is transformers' matching probability without the prompt; the best comes first."""
    _, directory, theirs = checkpoints
    paths = [folder / "0.png", folder / "2.png"]
    words = stripped(captioner, paths)
    scorer = ItmScorer(Matcher.from_pretrained(directory, dtype="float32"), first_token)
    stream = captioner.stream(paths, PROMPT, FIVE)
    for captioned, path, before in zip(reranked(captioner, stream, scorer, PROMPT, 8), paths,
                                       captioner(paths, PROMPT, FIVE), strict=True):
        texts = [captioned.result, *captioned.result.others]
        for text in texts:
            said = words[tuple(text.token_ids)]
            ids = torch.tensor([captioner.tokenizer.encode(said, first_token)])
            expected = theirs(ids, pixels_of(path)).itm_score.softmax(-1)[0, 1].item() if said else 0.0
            assert text.rerank == pytest.approx(expected, abs=1e-5)
        assert not any(text.others for text in texts[1:])
        assert [text.rerank for text in texts[1:]] == sorted((text.rerank for text in texts[1:]),
                                                             reverse=True)
        assert texts[0].rerank == max(text.rerank for text in texts)
        assert sorted((text.token_ids, text.score, text.caption) for text in texts) == sorted(
            (text.token_ids, text.score, text.caption) for text in (before, *before.others))


@torch.no_grad()
def test_belief(checkpoints, captioner, folder):
    """All parts of the formula by transformers' modules, combined in float64."""
    _, directory, theirs = checkpoints
    path = folder / "1.png"
    states = theirs.vision_model(pixels_of(path)).last_hidden_state
    image = normalize(theirs.vision_proj(states[0, 0]).double(), dim=0)
    labels = [normalize(sum(feature(theirs, template.format(label)) for template in TEMPLATES), dim=0)
              for label in LABELS]
    confidences = (torch.stack(labels) @ image / 0.07).softmax(0)
    context, confidence = labels[int(confidences.argmax())], confidences.max().item()
    classifier = Classifier.from_pretrained(directory, dtype="float32")
    scorer = BeliefScorer(classifier, classifier.labels(LABELS))
    (captioned,) = reranked(captioner, captioner.stream([path], PROMPT, FIVE), scorer, PROMPT, 8)
    texts = [captioned.result, *captioned.result.others]
    assert len(texts) == 5 and texts == sorted(texts, key=lambda text: -text.rerank)
    words = stripped(captioner, [path])
    for text in texts:
        similarity = (feature(theirs, words[tuple(text.token_ids)]) @ context).item()
        alpha = ((1 - similarity) / (1 + similarity)) ** (1 - confidence)
        assert text.rerank == pytest.approx(np.exp(text.score) ** alpha, rel=1e-4)
    assert len({round(text.rerank, 6) for text in texts}) > 1


def test_scores_that_belief_cannot_read():
    BeliefScorer.check_scores(FIVE)
    BeliefScorer.check_scores(GenerationConfig(top_p=0.9, n_best=3))
    for options in ({"beam_rule": "authors"}, {"length_penalty": 2.0}, {"repetition_penalty": 1.1}):
        with pytest.raises(ValueError, match="log-probabilities per token"):
            BeliefScorer.check_scores(GenerationConfig(beams=3, **options))


# ---------------------------------------------------------------- on the way


class Shortest:
    """The fewer letters, the better."""

    def __init__(self, model: BlipModel) -> None:
        self.model, self.seen = model, []

    def score(self, pixels, candidates) -> torch.Tensor:
        assert len(pixels) == len(candidates)
        self.seen.append(candidates)
        return torch.tensor([-len(each.text) for mine in candidates for each in mine], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_stream(captioner, folder, batch_size):
    """In order for every batch size; broken images pass through; texts are scored without their prompts."""
    paths = sorted(folder.glob("*.png"))
    given = [(paths[0], "two dogs"), *paths[1:]]
    scorer = Shortest(captioner.model)
    results = list(reranked(captioner, captioner.stream(given, PROMPT, FIVE), scorer, PROMPT, batch_size))
    assert [each.image for each in results] == [str(path) for path in paths]
    broken = results.pop(2)
    assert isinstance(broken.result, ImageError) and "1b" in str(broken.result)
    candidates = [mine for batch in scorer.seen for mine in batch]
    for captioned, mine in zip(results, candidates, strict=True):
        words = stripped(captioner, [captioned.source], captioned.prompt or PROMPT)
        texts = [captioned.result, *captioned.result.others]
        said = [words[tuple(text.token_ids)] for text in texts]
        assert sorted(each.text for each in mine) == sorted(filter(None, said))
        assert [text.rerank for text in texts] == sorted((-len(text) for text in said), reverse=True)


def test_ties_and_texts_without_words(captioner, folder):
    """Ties keep the decoder's order. A text that ends at once has no word to score, so it scores 0."""
    class Half(Shortest):
        def score(self, pixels, candidates):
            assert all(each.text for mine in candidates for each in mine)
            return super().score(pixels, candidates) * 0 + 0.5

    generation = GenerationConfig(beams=5, max_length=14, n_best=5)
    path = folder / "0.png"
    with torch.no_grad():
        captioner.model.lm_head.bias[captioner.tokenizer.sep_id] += 20
    try:
        (before,) = captioner(path, "", generation)
        (captioned,) = reranked(captioner, captioner.stream([path], "", generation),
                                Half(captioner.model), "", 4)
    finally:
        with torch.no_grad():
            captioner.model.lm_head.bias[captioner.tokenizer.sep_id] -= 20
    words = [text.caption for text in (before, *before.others)]
    assert words[0] == "" and any(words), "the test needs an empty text, and another"
    assert [(text.caption, text.rerank) for text in (captioned.result, *captioned.result.others)] == [
        *((text, 0.5) for text in words if text), *(("", 0.0) for text in words if not text)]


def test_an_image_that_is_gone(checkpoints, captioner, folder):
    """An image that was captioned but cannot be read again yields its error."""
    path = folder / "0.png"
    captioned = list(captioner.stream([path, folder / "2.png"], PROMPT, FIVE))
    path.unlink()
    gone, other = reranked(captioner, captioned, Shortest(captioner.model), PROMPT, 8)
    assert isinstance(gone.result, ImageError) and "0.png" in str(gone.result)
    assert other.result.rerank is not None


def test_no_candidates_at_all(checkpoints):
    """If no text has a word, the scorer has nothing to do."""
    matcher = Matcher.from_pretrained(checkpoints[1], dtype="float32")
    pixels = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert ItmScorer(matcher).score(pixels, [[], []]).tolist() == []
    one = ItmScorer(matcher).score(pixels, [[], [Candidate("a dog", -1.0)]])
    alone = matcher.score_pixels(pixels, matcher.pack(["a dog"])).itm[1]
    assert one.tolist() == pytest.approx(alone.tolist())


# ---------------------------------------------------------------- the command


def run(capsys, model, *arguments) -> tuple[int, list[str], str]:
    status = cli._run("caption", COMMAND, ["--model", str(model), "--dtype", "float32", "--max-length", "14",
                                           *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_command(checkpoints, captioner, folder, capsys):
    """The library's order and scores; --n-best raises the number of beams."""
    directory, matching, _ = checkpoints
    classifier = Classifier.from_pretrained(matching, dtype="float32")
    generation = GenerationConfig(beams=4, max_length=14, min_length=5, n_best=4)
    paths = [folder / "0.png", folder / "2.png"]
    for by, options, scorer in (
        ("itm", ("--first-token", "[ENC]"),
         ItmScorer(Matcher.from_pretrained(matching, dtype="float32"), "[ENC]")),
        ("belief", ("--labels", folder / "labels.txt"), BeliefScorer(classifier, classifier.labels(LABELS))),
    ):
        status, lines, _ = run(capsys, directory, "--rerank", by, "--matcher", matching,
                               "--n-best", 4, *options, "--json", *paths)
        expected = list(reranked(captioner, captioner.stream(paths, PROMPT, generation), scorer, PROMPT, 16))
        assert status == 0 and len(lines) == 2
        for row, captioned in zip(map(json.loads, lines), expected, strict=True):
            texts = [captioned.result, *captioned.result.others]
            assert row["image"] == captioned.image and len(row["others"]) == 3
            for told, text in zip((row, *row["others"]), texts, strict=True):
                assert (told["caption"], told["token_ids"]) == (text.caption, text.token_ids)
                assert (told["score"], told["rerank"]) == pytest.approx((text.score, text.rerank), abs=1e-5)


def test_one_model_for_both(folder, tmp_path, capsys):
    """A pre-training checkpoint captions and re-ranks by itself."""
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    tokens = SpecialTokens(tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.bos_id,
                           tokenizer.enc_id)
    config = BlipConfig(vision=VisionConfig(image_size=32, width=32, layers=2, heads=2),
                        text=TextConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=2,
                                        mlp_width=64),
                        tokens=tokens, embed_dim=16)
    save_native(BlipModel(config), tokenizer, tmp_path / "model")
    for by, *labels in (["itm"], ["belief", "--labels", folder / "labels.txt"]):
        status, lines, _ = run(capsys, tmp_path / "model", "--rerank", by, *labels, "--n-best", 3, "--json",
                               folder / "0.png")
        row = json.loads(lines[0])
        assert status == 0 and row["rerank"] >= row["others"][0]["rerank"] >= row["others"][1]["rerank"]


def test_command_refuses(checkpoints, folder):
    directory, matching, _ = checkpoints
    image, labels = folder / "0.png", folder / "labels.txt"
    for said, arguments in {
        "--rerank must be itm, belief or bert-cnn, got 'best'": ("--rerank", "best", "--n-best", 3),
        "ask for them, for example --n-best 20": ("--rerank", "itm", "--matcher", matching),
        "--matcher is for --rerank": ("--matcher", matching),
        "need each other": ("--rerank", "belief", "--n-best", 3, "--matcher", matching),
        "--rerank belief or bert-cnn and --labels": ("--rerank", "itm", "--n-best", 3, "--labels", labels),
        "log-probabilities per token": ("--rerank", "belief", "--n-best", 3, "--labels", labels,
                                        "--beam-rule", "authors"),
        "no matching head": ("--rerank", "itm", "--n-best", 3),
        "no contrastive head": ("--rerank", "belief", "--n-best", 3, "--labels", labels),
        "first token 'DOG'": ("--rerank", "itm", "--n-best", 3, "--matcher", matching,
                              "--first-token", "DOG"),
    }.items():
        with pytest.raises(ValueError, match=said):
            cli._run("caption", COMMAND, ["--model", str(directory), *map(str, (*arguments, image))])
