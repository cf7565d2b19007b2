"""`blip-fast evaluate video-retrieval` and `video-qa` against the textbook model. It encodes every frame
separately and matches a text with one video at a time: the frames' tokens are concatenated, their projected
[CLS] averaged."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import generate as textbook_generate
from reference import tasks
from reference.samples import SMALL, roughened

from blip_fast.cli import main
from blip_fast.data.shards.annotated import AnnotatedImage, annotated_images
from blip_fast.data.shards.tars import LocalTar
from blip_fast.data.shards.videos import as_videos
from blip_fast.evaluation import evaluate_retrieval
from blip_fast.generate import GenerationConfig
from blip_fast.media.images import evaluation_transform
from blip_fast.model.tokenizer import Tokenizer
from blip_fast.scenes.clips import write_clips
from blip_fast.scenes.scene_tasks import WORDS
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.matcher import Matcher
from blip_fast.tasks.model_loading import load_for_task

av = pytest.importorskip("av", reason="videos need the extra `video`")

# The special tokens' ids are those of bert-base-uncased, since the textbook model knows no others.
BERT = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TOKENIZER = Tokenizer([*BERT, *(f"[unused{i}]" for i in range(99, 99 + 30_522 - len(BERT)))])
CLIPS, FRAMES, SIZES = 5, 6, replace(SMALL, positions=40)
CHOICES = ["top", "bottom", "left", "right", "small", "red", "2", "a cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips; the first one has two captions."""
    folder = tmp_path_factory.mktemp("clips")
    rows = write_clips(folder, CLIPS, "test", seed=2, image_size=32)
    rows[0]["captions"].append("A red circle moves!")
    (folder / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def checkpoint(kind, directory):
    """The textbook model, and the options that load it."""
    torch.manual_seed(1)
    model = roughened(kind(SIZES)).eval()
    with torch.no_grad():  # otherwise all frames look alike, and all answers are the same
        model.visual_encoder.patch_embed.proj.weight.mul_(3)
        for name, weight in model.named_parameters():
            if name.startswith("text_decoder") and "crossattention.output.dense.weight" in name:
                weight.mul_(16)
    path = directory / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    path.with_suffix(".json").write_text(json.dumps({
        "text_config": {"num_attention_heads": SIZES.text_heads},
        "vit_config": {"num_heads": SIZES.vision_heads}}))
    TOKENIZER.save(directory)
    return model, ["--model", str(path), "--tokenizer", str(directory)]


@pytest.fixture(scope="module")
def matching(tmp_path_factory):
    return checkpoint(tasks.Matcher, tmp_path_factory.mktemp("matching"))


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    return checkpoint(tasks.QuestionAnswerer, tmp_path_factory.mktemp("answering"))


def frames_of(path, places):
    """Frames [frames, 3, 32, 32]: decode all, and take some."""
    with av.open(str(path)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)]
    return evaluation_transform([images[place] for place in places], SIZES.image_size)


PLACES = [0, 2, 4, 6, 8, 10]  # 6 of 16


def ids_and_mask(text, first):
    ids = torch.tensor([TOKENIZER.encode(text, first)])
    return ids, torch.ones_like(ids)


@torch.no_grad()
def textbook_scores(model, folder, captions):
    """Cosines and matching logits, both [videos, texts]."""
    cosines, logits = torch.zeros(CLIPS, len(captions)), torch.zeros(CLIPS, len(captions))
    for i in range(CLIPS):
        embeds = model.visual_encoder(frames_of(folder / f"{i:06d}.mp4", PLACES))
        feature = F.normalize(model.vision_proj(embeds[:, 0]).mean(dim=0), dim=0)
        tokens = torch.cat(list(embeds))[None]
        for j, caption in enumerate(captions):
            cosines[i, j] = model.text_features(*ids_and_mask(caption, "[CLS]"))[0] @ feature
            logits[i, j] = model.matching_logits(tokens, *ids_and_mask(caption, "[ENC]"))[0, 1]
    return cosines, logits


def reranked(cosines, logits, k):
    """cosine + logit for the k best of each row, −100 elsewhere."""
    chosen = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, cosines.topk(k, dim=1).indices, True)
    return torch.where(chosen, cosines + logits, torch.tensor(-100.0))


def test_video_retrieval(matching, folder, capsys):
    textbook, options = matching
    images = annotated_images(folder, "test")
    captions = [caption.lower().replace("!", "") for image in images for caption in image.captions]
    cosines, logits = textbook_scores(textbook, folder, captions)
    assert cosines.std() > 0.01 and logits.std() > 0.01
    i2t, t2i = reranked(cosines, logits, 3), reranked(cosines.T, logits.T, 3)

    model, tokenizer = load_for_task(options[1], tokenizer=options[3], dtype="float32")
    result, of_text = evaluate_retrieval(model, tokenizer, as_videos(images, FRAMES), top_k=3)
    torch.testing.assert_close(result.image_to_text.dense(), i2t, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.text_to_image.dense(), t2i, atol=1e-4, rtol=1e-4)
    scores = Matcher(model, tokenizer).score_pixels(
        torch.stack([video.pixels(32) for video in as_videos(images, FRAMES)]),
        tokenizer.pack(captions, "[ENC]"))
    torch.testing.assert_close(scores.itc, cosines, atol=1e-4, rtol=1e-4)

    one_frame = evaluate_retrieval(model, tokenizer, as_videos(images, 1), top_k=CLIPS + 1)[0].image_to_text
    assert (one_frame.dense() - cosines - logits).abs().max() > 0.01  # so all frames matter

    assert main(["evaluate", "video-retrieval", *options, "--dtype", "float32", "--data",
                 str(folder), "--frames", str(FRAMES), "--top-k", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = {"task": "video-retrieval", "images": CLIPS, "frames": FRAMES, "texts": CLIPS + 1, "top_k": 3}
    assert {name: said[name] for name in expected} == expected
    right = of_text[None] == torch.arange(CLIPS)[:, None]
    for name, table, marks in (("i2t", i2t, right), ("t2i", t2i, right.T)):
        ranks = [int(((row >= row[mark].max()) & ~mark).sum())
                 for row, mark in zip(table, marks, strict=True)]
        assert said[f"{name}_median_rank"] == statistics.median(ranks) + 1
        for k in (1, 5, 10):
            assert said[f"{name}_r{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]))


def test_video_retrieval_looks_at_eight_frames_and_64_candidates(matching, folder, capsys):
    assert main(["evaluate", "video-retrieval", *matching[1], "--data", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["frames"], said["top_k"], said["pairs"]) == (8, 64, CLIPS * (CLIPS + 1))


@torch.no_grad()
def textbook_answers(model, folder, rows, ranked):
    """A list of (answer, score)."""
    found = []
    lists = [TOKENIZER.encode(choice, "[DEC]") for choice in CHOICES]
    ids = torch.tensor([row + [0] * (max(map(len, lists)) - len(row)) for row in lists])
    for row in rows:
        embeds = model.visual_encoder(frames_of((folder / row["image"]).resolve(), PLACES))
        question, mask = ids_and_mask(row["question"].lower(), "[ENC]")
        states = model.text_encoder(question, mask, torch.cat(list(embeds))[None])
        if ranked:
            chosen = model.first_token_probabilities(states[0], mask[0], ids).topk(4).indices
            scores = model.answer_scores(states[0], mask[0], ids[chosen], (ids[chosen] != 0).long())
            found.append((CHOICES[chosen[scores.argmax()]], float(scores.max())))
        else:
            text, score = textbook_generate.beam_search_transformers5(
                tasks.next_token_logits(model.text_decoder, states), [tasks.DEC], beams=2,
                max_length=6, min_length=1)
            found.append((TOKENIZER.decode(text), score))
    return found


@pytest.mark.parametrize("ranked", [True, False])
def test_video_qa(answering, folder, tmp_path, capsys, ranked):
    textbook, options = answering
    asked = folder / "questions"
    rows = [image.row for image in annotated_images(asked, "test")]
    expected = textbook_answers(textbook, asked, rows, ranked)
    assert len({answer for answer, _ in expected}) > 1
    answerer = Answerer.from_pretrained(options[1], tokenizer=options[3], dtype="float32")
    generation = GenerationConfig(beams=2, max_length=6, min_length=1)
    for i, video in enumerate(as_videos(annotated_images(asked, "test"), FRAMES)):
        packed = answerer.pack([rows[i]["question"].lower()], "[ENC]")
        pixels = video.pixels(32)[None]
        ours = (answerer.rank_pixels(pixels, packed, answerer.answer_list(CHOICES), top_k=4)[0][0]
                if ranked else
                answerer.answer_pixels(pixels, packed, generation)[0])
        assert (ours.answer, ours.score) == (expected[i][0],
                                             pytest.approx(expected[i][1], abs=1e-4, rel=1e-4))

    (tmp_path / "choices.txt").write_text("\n".join(CHOICES))
    ranking = ["--answers", str(tmp_path / "choices.txt"), "--top-k", "4"]
    how = ranking if ranked else ["--beams", "2", "--max-length", "6"]
    for i, row in enumerate(rows):  # 13 of 20 are right
        row |= {"answers": [expected[i][0] if i % 3 else "never said"],
                "image": str((asked / row["image"]).resolve())}
    (tmp_path / "annotations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "video-qa", *options, "--dtype", "float32", "--data", str(tmp_path), "--frames",
                 str(FRAMES), *how, "--output", str(tmp_path / "said.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"task": "video-qa", "images": 4 * CLIPS,
                                                   "precision": "float32",
                                                   "frames": FRAMES, "accuracy": pytest.approx(13 / 20)}
    written = json.loads((tmp_path / "said.json").read_text())
    assert [one["answer"] for one in written] == [answer for answer, _ in expected]


def test_what_is_refused(matching, folder, tmp_path, capsys):
    row = {"image": "lost.mp4", "captions": ["a dog"]}
    (tmp_path / "annotations.jsonl").write_text(json.dumps(row))
    for arguments, said in ((["--data", str(tmp_path)], "lost.mp4: no such file"),
                            (["--data", str(folder), "--frames", "0"], "frames is 0"),
                            (["--data", str(folder / "questions")], "../000000.mp4 has no caption")):
        assert main(["evaluate", "video-retrieval", *matching[1], *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="a lies in packed shards, which hold images alone"):
        as_videos([AnnotatedImage("a", LocalTar(tmp_path), 0, 1, captions=[], row={})], 8)
