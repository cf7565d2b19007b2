"""Training state into and out of a run. With the same state, features and losses equal the textbook's."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from blip_train.checkpoint.training_state import export_state, restore_state
from blip_train.prepare import prepare_step, prepare_tokenizer
from blip_train.recipe import Recipe
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from published import assert_same, read
from reference import pretraining as textbook
from reference.model import Sizes

from blip_fast.checkpoint import load_model, load_training_state, save_native, save_original
from blip_fast.model.config import BlipConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.tokenizer import BERT_TOKENS, Tokenizer
from blip_fast.model.vision import resize_positions

SIZES = Sizes(image_size=32, patch_size=16, vision_width=32, vision_layers=2, vision_heads=2, positions=32,
              text_width=32, text_layers=2, text_heads=2, text_feed_forward=64, projection=16)
QUEUE = 7
OBJECTIVES = {"pretraining": Objective(queue_size=QUEUE, momentum=0.9),
              "retrieval": Objective(losses=("itc", "itm"), queue_size=QUEUE, momentum=0.9, positives="id",
                                     negative_floor=0.0)}
POINTERS = {"pretraining": "queue_ptr", "retrieval": "ptr_queue"}
TEXTS = [[101, 2000, 2001, 102], [101, 102], [101, 2005, 102], [101, 2006, 2007, 2008, 102], [101, 2009, 102]]
TOKENIZER = Tokenizer([*BERT_TOKENS, *"abcdefg"])


@pytest.fixture(params=OBJECTIVES)
def kind(request) -> str:
    return request.param


def make(kind: str) -> textbook.TextbookPretraining:
    """The textbook in the middle of training: momentum copies far from the
    model, and a queue with entries."""
    retrieval = kind == "retrieval"
    torch.manual_seed(4)
    model = textbook.TextbookPretraining(SIZES, QUEUE, 0.9, decoder=not retrieval, retrieval=retrieval)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(0.1 * torch.randn_like(parameter))
    getattr(model, POINTERS[kind]).fill_(4)
    if retrieval:
        model.idx_queue[0, :4] = torch.tensor([0, 3, 0, 1])
    return model


def save(model: textbook.TextbookPretraining, path: Path) -> Path:
    torch.save({"model": model.state_dict()}, path)
    path.with_suffix(".json").write_text(json.dumps({"text_config": {"num_attention_heads": 2},
                                                     "vit_config": {"num_heads": 2}}))
    return path


@pytest.fixture
def path(kind, tmp_path) -> Path:
    return save(make(kind), tmp_path / "x.pth")


def restored(path: Path, kind: str) -> Pretraining:
    model, _ = load_model(path)
    pretraining = Pretraining(model, OBJECTIVES[kind], seed=0).eval()
    restore_state(pretraining, load_training_state(path, model.config))
    return pretraining


def make_batch() -> tuple[Batch, textbook.Batch]:
    texts, ids = PackedTexts.from_lists(TEXTS), torch.tensor([0, 1, 0, 2, 3])
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    padded, mask = texts.to_padded(0)
    return Batch(images, texts, ids), textbook.Batch(images, padded, mask.long(), ids)


# ------------------------------------------------------------ against the textbook


def test_momentum_features_equal_the_textbook(kind, path):
    ours, (batch, padded) = restored(path, kind), make_batch()
    theirs = make(kind)
    for feature, expected in zip(ours.momentum.features(batch.images, batch.texts),
                                 theirs.momentum_features(padded), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-5)


def test_the_next_step_equals_the_textbook(kind, path):
    """Losses, and the queue's entries afterwards. The queue wraps, and in retrieval
    its ids count as positives."""
    ours, (batch, padded) = restored(path, kind), make_batch()
    theirs = make(kind)
    ours.follow()
    output = ours(batch, StepContext(alpha=0.4))
    expected = theirs.step([padded], 0.4, [textbook.Negatives(output.negatives.image_for_text,
                                                              output.negatives.text_for_image)])
    ours.enqueue(output)
    for name, loss in output.losses.items():
        torch.testing.assert_close(loss, getattr(expected, name)[0], rtol=1e-4, atol=0)
    after = export_state(ours)
    for name, tensor in theirs.state_dict().items():
        if "queue" in name:
            torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ out and back in


def test_export_is_what_was_restored(kind, path):
    """Every tensor that the published code stores. Its copy's cross-attention, which
    nothing reads, is the model's."""
    expected = {name: tensor for name, tensor in read(path).items() if "_m." in name or "queue" in name}
    for name in expected:
        if ".crossattention." in name:
            expected[name] = read(path)[name.replace("_m.", ".")]
    assert_same(export_state(restored(path, kind)), expected)


def test_a_run_goes_on_from_its_own_export(kind, path, tmp_path):
    """Through our directory and through a `.pth`, which holds every key that the published code asks for."""
    ours = restored(path, kind)
    save_native(ours.model, None, tmp_path / "native", export_state(ours))
    save_original(ours.model, None, tmp_path / "ours.pth",
                  load_training_state(tmp_path / "native", ours.model.config))
    assert read(tmp_path / "ours.pth").keys() == read(path).keys()
    for source in ("native", "ours.pth"):
        assert_same(restored(tmp_path / source, kind).state_dict(), ours.state_dict())


def test_a_step_without_itc_has_no_state(tmp_path):
    path = save(make("pretraining"), tmp_path / "x.pth")
    assert export_state(Pretraining(load_model(path)[0], Objective(losses=("lm",)), seed=0)) == {}
    captioning = dataclasses.replace(recipe(path, "pretraining"), objective=Objective(losses=("lm",)))
    assert export_state(prepare_step(captioning, TOKENIZER)) == {}


# ------------------------------------------------------------ a new run's start


def recipe(init: Path, kind: str, image_size: int = 32, **objective) -> Recipe:
    parts = {"text_stacks": "tied" if kind == "pretraining" else "encoder"}
    return Recipe(init=str(init), model=BlipConfig(vision=VisionConfig(image_size=image_size), **parts),
                  objective=dataclasses.replace(OBJECTIVES[kind], **objective))


def test_fine_tuning_starts_from_the_copies_and_queue_of_pretraining(tmp_path):
    """All ids are empty; the pointer, which has another name there, is at the start."""
    path = save(make("pretraining"), tmp_path / "x.pth")
    start = prepare_step(recipe(path, "retrieval"), TOKENIZER)
    expected = restored(path, "pretraining")
    assert_same(start.momentum.state_dict(), expected.momentum.state_dict())
    assert torch.equal(start.queue.image, expected.queue.image) and torch.equal(start.queue.text,
                                                                                expected.queue.text)
    assert (start.queue.ids == -100).all() and start.queue.pointer == 0


def test_a_second_round_keeps_the_pointer_but_not_the_ids(kind, path):
    """The ids are those of other data's images."""
    start = prepare_step(recipe(path, kind), TOKENIZER)
    assert start.queue.pointer == 4 and (start.queue.ids == -100).all()


def test_a_queue_of_another_length_starts_anew_and_says_so(tmp_path, capsys):
    path = save(make("pretraining"), tmp_path / "x.pth")
    start = prepare_step(recipe(path, "pretraining", queue_size=9), TOKENIZER)
    fresh = Pretraining(load_model(path)[0], Objective(queue_size=9), seed=0)
    assert_same(start.queue.state_dict(), fresh.queue.state_dict())
    assert_same(start.momentum.state_dict(), restored(path, "pretraining").momentum.state_dict())
    assert "x.pth holds 7 entries, objective.queue_size is 9: it starts anew" in capsys.readouterr().err


def test_positions_of_the_copy_are_resized(tmp_path):
    path = save(make("pretraining"), tmp_path / "x.pth")
    start = prepare_step(recipe(path, "pretraining", image_size=48), TOKENIZER)
    expected = resize_positions(read(path)["visual_encoder_m.pos_embed"][0], 10)
    assert torch.equal(start.momentum.copy.vision.position_embeds, expected)


def test_without_training_state_the_copy_is_the_model(tmp_path):
    path = save(make("pretraining"), tmp_path / "x.pth")
    save_native(load_model(path)[0], None, tmp_path / "native")
    start = prepare_step(recipe(tmp_path / "native", "pretraining"), TOKENIZER)
    own = start.model.state_dict()
    assert all(torch.equal(tensor, own[name.replace("text.encoder", "text.tied")])
               for name, tensor in start.momentum.copy.state_dict().items())


def test_the_tokenizer_of_a_published_file(tmp_path):
    path = save(make("pretraining"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth brings no tokenizer \(x\.tokenizer\): name one with "
                                          "--tokenizer"):
        prepare_tokenizer(recipe(path, "pretraining"), [])
    TOKENIZER.save(tmp_path / "x.tokenizer")
    assert prepare_tokenizer(recipe(path, "pretraining"), []).vocab_size == TOKENIZER.vocab_size


# ------------------------------------------------------------ faults


def test_state_that_does_not_fit(path, kind):
    pretraining = restored(path, kind)
    state = load_training_state(path, pretraining.model.config)
    del state["text_encoder_m.encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"momentum copy.*missing: "
                                          "text_encoder.encoder.layer.1.output.dense.bias"):
        restore_state(pretraining, state)
    with pytest.raises(ValueError, match=r"text_queue has shape \[16, 1\] instead of \[16, 7\]"):
        restore_state(pretraining, {"text_queue": torch.zeros(16, 1)})
