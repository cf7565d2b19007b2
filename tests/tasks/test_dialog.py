"""Ranking answers in dialogues, against transformers' modules candidate by candidate;
`blip-fast evaluate visdial`."""

import json
from pathlib import Path

import odd_files
import published
import pytest
import torch
from hf_models import save_model, small_tokenizer
from visdial_files import DENSE, VISDIAL, written

from blip_fast.checkpoint import load_model
from blip_fast.cli import main
from blip_fast.data.shards.annotated import annotated_images, read_annotations
from blip_fast.evaluation import evaluate_dialogues
from blip_fast.media.images import image_pixels
from blip_fast.metrics.dialog import dialog_figures, ndcg
from blip_fast.model.tokenizer import clean_caption, clean_question
from blip_fast.parallel.ranks import ALONE, Ranks, dealt, merged
from blip_fast.tasks.dialog_ranking import DialogRanker, Dialogue, Round

ANSWERS = ["red", "Yes!", "a dog", "two dogs", "on the grass", "no", "left of it", "a long wooden table"]
DIALOGUES = [
    Dialogue("A small dog.", [Round("What is it?", "a dog", ANSWERS[:5]),
                              Round("is it red?", "no", ANSWERS[2:7]),
                              Round("Where is it?", "on the grass", ANSWERS[3:])]),
    Dialogue("The red ball on a table",
             [Round("a ball?", "Yes!"), Round("which table", "long", ANSWERS[:40])]),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory, and transformers' model in it."""
    directory = tmp_path_factory.mktemp("matching")
    return str(directory), save_model("BlipForImageTextRetrieval", small_tokenizer(), directory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return odd_files.save_pictures(tmp_path_factory.mktemp("pictures"), 2)


def plain_scores(theirs, tokenizer, image, dialogue: Dialogue, caption_in: str) -> list[list[float]]:
    """One candidate at a time, nothing shared."""
    turns = [tokenizer.encode(f"{clean_question(r.question)} {clean_question(r.answer)}")[1:]
             for r in dialogue.rounds]
    caption = tokenizer.encode(clean_caption(dialogue.caption))
    found = []
    for number, one in enumerate(dialogue.rounds):
        scores = []
        for candidate in one.candidates:
            ids = [tokenizer.enc_id, *(caption[1:] if caption_in == "text" else [])]
            ids += [token for turn in turns[:number] for token in turn]
            ids += tokenizer.encode(f"{clean_question(one.question)} {clean_question(candidate)}")[1:]
            seen = theirs.vision_model(image[None]).last_hidden_state
            if caption_in == "attention":
                states = theirs.text_encoder(torch.tensor([caption]),
                                             torch.ones(1, len(caption))).last_hidden_state
                seen = torch.cat([seen, states], dim=1)
            hidden = theirs.text_encoder(torch.tensor([ids]), torch.ones(1, len(ids)),
                                         encoder_hidden_states=seen,
                                         encoder_attention_mask=torch.ones(seen.shape[:2])).last_hidden_state
            logits = theirs.itm_head(hidden[:, 0])[0]
            scores.append(float(logits[1] - logits[0]))
        if scores:
            found.append(scores)
    return found


@pytest.mark.parametrize("caption_in", ["attention", "text"])
@torch.no_grad()
def test_scores_are_those_of_one_candidate_at_a_time(checkpoint, pictures, caption_in, monkeypatch):
    monkeypatch.setattr("blip_fast.tasks.matcher.CPU_TEXTS", 4)  # splits rounds into several passes
    ranker = DialogRanker.from_pretrained(checkpoint[0], dtype="float32")
    images = [image_pixels(pictures / f"{i}.png", 64) for i in range(2)]
    together = ranker.score_pixels(torch.stack(images), DIALOGUES, caption_in=caption_in)
    assert [[len(scores) for scores in rounds] for rounds in together] == [[5, 5, 5], [8]]
    for i, dialogue in enumerate(DIALOGUES):
        expected = plain_scores(checkpoint[1], ranker.tokenizer, images[i], dialogue, caption_in)
        for ours, theirs in zip(together[i], expected, strict=True):
            torch.testing.assert_close(ours, torch.tensor(theirs), atol=2e-4, rtol=1e-4)
            assert ours.std() > 0.01
        alone = ranker(pictures / f"{i}.png", dialogue, caption_in=caption_in)
        torch.testing.assert_close(torch.cat(alone), torch.cat(together[i]), atol=1e-5, rtol=1e-5)


def test_the_earliest_rounds_give_way_to_a_long_dialogue(checkpoint):
    ranker = DialogRanker.from_pretrained(checkpoint[0], dtype="float32")
    rounds = [Round("red " * 30, "dog " * 19 + "no") for _ in range(30)]
    ids = ranker.pack(Dialogue("a dog", [*rounds, Round("why?", "", ["no"])]), 30, "text").token_ids.tolist()
    caption, turn = (ranker.tokenizer.encode(text)[1:]
                     for text in ("a dog", "red " * 30 + "dog " * 19 + "no"))
    end = ranker.tokenizer.encode("why? no")[1:]
    most = ranker.model.config.text.max_positions
    kept = (most - 1 - len(caption) - len(end)) // len(turn)
    assert 0 < kept < 30 and ids == [ranker.tokenizer.enc_id, *caption, *turn * kept, *end]
    with pytest.raises(ValueError, match=r"take more than 512 tokens"):
        ranker.pack(Dialogue("", [Round("gogegogego " * 50, "", ["gogegogego " * 50])]), 0)


def test_what_a_ranker_refuses(checkpoint, tmp_path):
    ranker = DialogRanker.from_pretrained(checkpoint[0], dtype="float32")
    pixels = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="caption_in must be one of attention, text, got 'image'"):
        ranker.score_pixels(pixels, DIALOGUES[:1], caption_in="image")
    model, _ = load_model(published.save_kind("matching", tmp_path / "narrow.pth"))
    with pytest.raises(ValueError, match="images are 24 wide and its texts 16"):
        DialogRanker(model, ranker.tokenizer).score_pixels(torch.zeros(1, 3, 24, 24), DIALOGUES[:1])
    model, _ = load_model(published.save_kind("captioning", tmp_path / "captioning.pth"))
    with pytest.raises(ValueError, match="no matching head"):
        DialogRanker(model, ranker.tokenizer)


# ---------------------------------------------------------------- rows, and the command


@pytest.mark.parametrize("dialog", [
    [], "a", [{"question": 3}], [{"question": "a"}, {"question": "b"}],
    [{"question": "a", "candidates": [1]}],
    [{"question": "a", "candidates": ["b"], "right": 1}], [{"question": "a", "right": 0}],
    [{"question": "a", "candidates": ["b"], "relevance": [-1]}],
    [{"question": "a", "candidates": ["b"], "relevance": []}],
])
def test_rows_without_a_dialogue_are_refused(tmp_path, dialog):
    path = tmp_path / "annotations.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": "a", "dialog": dialog}))
    with pytest.raises(ValueError, match='row 1: a "dialog" needs rounds'):
        read_annotations(path)


@pytest.fixture
def data(tmp_path, pictures) -> Path:
    """A small VisDial, converted to rows by the command."""
    pytest.importorskip("ijson", reason="VisDial's files need the extra `visdial`")
    folder = tmp_path / "visdial"
    (folder / "VisualDialog_val2018").mkdir(parents=True)
    for i, number in enumerate((7, 123)):
        picture = folder / "VisualDialog_val2018" / f"VisualDialog_val2018_{number:012d}.jpg"
        picture.write_bytes((pictures / f"{i}.png").read_bytes())
    files = [written(tmp_path / "visdial.json", VISDIAL), written(tmp_path / "dense.json", DENSE)]
    assert main(["data", "annotations", "visdial", *files, "--output",
                 str(folder / "annotations.jsonl")]) == 0
    return folder


@pytest.mark.parametrize("options", [[], ["--caption-in", "text"]])
def test_evaluate_visdial(checkpoint, data, capsys, options):
    capsys.readouterr()
    assert main(["evaluate", "visdial", "--model", checkpoint[0], "--dtype", "float32", "--data",
                 str(data), "--split", "val", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ranker, scores = DialogRanker.from_pretrained(checkpoint[0], dtype="float32"), []
    for row in read_annotations(data / "annotations.jsonl"):
        rounds = [Round(one["question"], one["answer"], one["candidates"]) for one in row["dialog"]]
        scores += ranker(data / row["image"], Dialogue(row["captions"][0], rounds),
                         caption_in="text" if options else "attention")
    expected = dialog_figures(torch.stack(scores), torch.tensor([1, 2, 0]))
    chance = {"r1": pytest.approx(1 / 3), "r5": 1, "r10": 1}
    assert found == {"task": "visdial", "images": 2, "precision": "float32", "rounds": 3, "chance": chance,
                     "ndcg": pytest.approx(ndcg(scores[1][None], torch.tensor([[0, 0.5, 1]]))),
                     **{name: pytest.approx(value) for name, value in expected.items()}}
    assert main(["data", "pack", str(data), "--output", str(data / "shards")]) == 0
    assert main(["evaluate", "visdial", "--model", checkpoint[0], "--dtype", "float32", "--data",
                 str(data / "shards"), "--split", "val", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert main(["evaluate", "visdial", "--model", checkpoint[0], "--dtype", "float32", "--data", str(data),
                 "--split", "val"]) == 0
    assert "mean_rank" in capsys.readouterr().out


def test_ranks_share_dialogues(checkpoint, data):
    """Two ranks, run one after the other, together compute the scores of a single one."""
    class TwoRanks(Ranks):
        def share(self, work, items):
            return merged([list(work(dealt(items, rank, 2))) for rank in range(2)], len(items))

    ranker = DialogRanker.from_pretrained(checkpoint[0], dtype="float32")
    images = annotated_images(data, "val")
    shared, alone = (evaluate_dialogues(ranker, images, ranks=ranks) for ranks in (TwoRanks(), ALONE))
    assert shared.pop("chance") == alone.pop("chance") and shared == pytest.approx(alone)


@pytest.mark.parametrize(("change", "said"), [
    ({"dialog": None}, "is no dialogue"), ({"captions": []}, "is no dialogue"),
    ({"dialog": [{"question": "a"}]}, "no round has candidates"),
    ({"dialog": [{"question": "a", "candidates": ["b"]}]}, 'has a round without "right"'),
    ({"dialog": [{"question": "a", "answer": "b", "candidates": ["b"], "right": 0},
                 {"question": "a", "candidates": ["b", "c"], "right": 0}]}, "or without 1 candidates"),
])
def test_what_cannot_be_evaluated(checkpoint, data, capsys, change, said):
    row = read_annotations(data / "annotations.jsonl")[0] | change
    row = {key: value for key, value in row.items() if value is not None}
    (data / "annotations.jsonl").write_text(json.dumps(row))
    assert main(["evaluate", "visdial", "--model", checkpoint[0], "--dtype", "float32", "--data", str(data),
                 "--split", "val"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
