"""The two-pass training step against the textbook model: losses and every gradient,
three steps, one and two ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from ranks import spawn
from reference import losses
from reference import pretraining as textbook
from small_pretraining import CONFIG, PAIRS, SIZES, check_gradients, everyone, make_batch, make_model, padded

from blip_fast.checkpoint.names import original_layout

STEPS, LR = 3, 0.5  # a large rate: EMA, queue and weights must really move between steps
OBJECTIVES = {
    "pretraining": Objective(queue_size=23, momentum=0.9),
    "ids": Objective(queue_size=23, momentum=0.9, positives="id", negative_floor=0.0),
    "ids-all-ranks": Objective(queue_size=23, momentum=0.9, positives="id", negatives="all_ranks",
                               negative_floor=0.0),
}


def run_product(name: str, ranks: int) -> list[dict]:
    """Three SGD steps. Per step: losses by rank, negatives by rank, gradients averaged over ranks."""
    pretraining = Pretraining(make_model(), OBJECTIVES[name], seed=3)
    parameters = dict(pretraining.model.named_parameters())
    rank, record = (dist.get_rank() if ranks > 1 else 0), []
    torch.manual_seed(rank)
    for step in range(STEPS):
        pretraining.follow()
        output = pretraining(make_batch(step, rank), StepContext(alpha=0.2 * step))
        pretraining.zero_grad()
        output.total.backward()
        pretraining.enqueue(output)
        losses = torch.stack([output.losses[key].detach() for key in ("itc", "itm", "lm")])
        drawn = torch.stack([output.negatives.image_for_text, output.negatives.text_for_image])
        if ranks > 1:
            for parameter in parameters.values():
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        record.append({"losses": everyone(losses, ranks), "negatives": everyone(drawn, ranks),
                       "gradients": {key: p.grad.clone() for key, p in parameters.items()}})
        with torch.no_grad():
            for parameter in parameters.values():
                parameter -= LR * parameter.grad
    queue = pretraining.queue
    record[-1]["queue"] = {key: value.clone() for key, value in queue.state_dict().items()}
    return record


def _rank(rank: int, ranks: int, port: int, name: str, result) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    record = run_product(name, ranks)
    if rank == 0:
        torch.save(record, result)
    dist.destroy_process_group()


def product_record(name: str, ranks: int, tmp_path) -> list[dict]:
    if ranks == 1:
        return run_product(name, 1)
    spawn(_rank, ranks, name, str(tmp_path / "record.pt"))
    return torch.load(tmp_path / "record.pt")


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(monkeypatch):
    """Each block is one graph for any text lengths. Only the backend differs from a GPU's."""
    monkeypatch.setenv("BLIP_FAST_ATTENTION", "reference")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = {}
    for compiled in (False, True):
        pretraining = Pretraining(make_model(), OBJECTIVES["pretraining"], seed=3).train()
        if compiled:
            pretraining.model.compile_blocks(backend="aot_eager")
        for step in range(2):
            torch.manual_seed(step)
            output = pretraining(make_batch(step, 0), StepContext(alpha=0.3))
            output.total.backward()
            pretraining.enqueue(output)
        found[compiled] = {name: p.grad for name, p in pretraining.model.named_parameters()}
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-4, atol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("name", "ranks"), [
    ("pretraining", 1), ("pretraining", 2), ("ids", 1), ("ids-all-ranks", 2), ("ids-all-ranks", 4)], ids=str)
def test_losses_and_gradients_equal_the_textbook(name, ranks, tmp_path):
    record = product_record(name, ranks, tmp_path)
    objective, layout, model = OBJECTIVES[name], original_layout(CONFIG), make_model()
    reference = textbook.TextbookPretraining(SIZES, objective.queue_size, objective.momentum,
                                             retrieval=objective.positives == "id",
                                             all_ranks=objective.negatives == "all_ranks")
    state = layout.split(dict(model.state_dict()))
    state |= layout.stored_twice(state)
    buffers = {key: value for key, value in reference.state_dict().items() if key.endswith("position_ids")}
    reference.load_weights({key: value for key, value in (state | buffers).items()
                            if key in reference.state_dict()})
    queue = Pretraining(model, objective, seed=3).queue
    reference.image_queue.copy_(queue.image.T)
    reference.text_queue.copy_(queue.text.T)

    for step, ours in enumerate(record):
        batches = [padded(make_batch(step, rank)) for rank in range(ranks)]
        negatives = [textbook.Negatives(*drawn) for drawn in ours["negatives"]]
        assert all((drawn >= 0).all() for drawn in ours["negatives"]), "every row of these batches has a negative"
        expected = reference.step(batches, 0.2 * step, negatives)
        reference.zero_grad()
        expected.loss.backward()
        for rank in range(ranks):
            wanted = torch.stack([expected.itc[rank], expected.itm[rank], expected.lm[rank]])
            torch.testing.assert_close(ours["losses"][rank], wanted, rtol=1e-4, atol=0)
            check_drawn(negatives[rank], expected, rank)
        check_gradients(layout.split(ours["gradients"]), dict(reference.named_parameters()))
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter -= LR * parameter.grad
    torch.testing.assert_close(record[-1]["queue"]["image"], reference.image_queue.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record[-1]["queue"]["text"], reference.text_queue.T, rtol=1e-4, atol=1e-5)
    assert record[-1]["queue"]["pointer"] == STEPS * PAIRS * ranks % objective.queue_size


def check_drawn(negatives: textbook.Negatives, expected: textbook.StepOutput, rank: int) -> None:
    """Every drawn negative has a positive probability under the textbook's weights."""
    rows = torch.arange(PAIRS)
    assert (expected.weights_t2i[rank][rows, negatives.negative_image_for_text] > 0).all()
    assert (expected.weights_i2t[rank][rows, negatives.negative_text_for_image] > 0).all()


def test_gradients_reach_images_of_another_rank(tmp_path):
    """With negatives of all ranks some come from the other rank's batch, so that the
    parity test above covers them."""
    record = product_record("ids-all-ranks", 2, tmp_path)
    crossing = sum(int(((drawn[0] // PAIRS) != rank).sum()) for step in record
                   for rank, drawn in enumerate(step["negatives"]))
    assert crossing > 0


def test_a_batch_of_one_image_trains_without_negatives():
    """All ids are equal: no pair is a negative, ITM sees only positives, and nothing fails."""
    batch = make_batch(0, 0)
    batch = Batch(batch.images, batch.texts, torch.zeros_like(batch.ids))
    output = Pretraining(make_model(), OBJECTIVES["ids"], seed=3)(batch, StepContext(alpha=0.4))
    assert (output.negatives.image_for_text == -1).all()
    assert output.total.isfinite()


@pytest.mark.parametrize("kind", ["pretraining", "ids"])
def test_negatives_are_drawn_from_the_published_weights(kind):
    """χ² of 3,000 draws. Pre-training ranks by the momentum features, fine-tuning by the
    model's own without equal ids."""
    torch.manual_seed(0)
    batch, pretraining = make_batch(0, 0), Pretraining(make_model(), OBJECTIVES[kind], seed=3)
    batch = Batch(batch.images, batch.texts, torch.tensor([0, 1, 2, 1, 3]))
    features = pretraining._features(batch, pretraining.model.encode_images(batch.images))
    image, text, image_m, text_m = (torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
                                    for _ in range(4))
    features = type(features)(image, text, image_m, text_m)
    with torch.no_grad():
        pretraining.model.temperature.fill_(0.5)
    if kind == "pretraining":
        weights = [losses.pretraining_negative_weights(q @ k.T / 0.5)
                   for q, k in ((text, image_m), (image, text_m))]
    else:
        weights = [losses.fine_tuning_negative_weights(q @ k.T / 0.5, batch.ids, batch.ids)
                   for q, k in ((text, image), (image, text))]
    drawn = [pretraining._negatives(batch, features) for _ in range(3000)]
    for want, draws in zip(weights, (torch.stack([d.image_for_text for d in drawn]),
                                     torch.stack([d.text_for_image for d in drawn])), strict=True):
        for row in range(5):
            expected = want[row].double() / want[row].sum() * len(drawn)
            counts = torch.bincount(draws[:, row], minlength=5).double()
            assert (counts[expected == 0] == 0).all()
            possible = expected > 0
            chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
            assert chi_square < 16.3  # p = 0.001 at 3 degrees of freedom, seed fixed


def test_language_first_trains_lm_alone():
    """The same LM loss, no gradient outside vision and decoder; the momentum copy
    follows, the queue does not change."""
    batch, pretraining = make_batch(0, 0), Pretraining(make_model(), OBJECTIVES["pretraining"], seed=3)
    both = Pretraining(make_model(), OBJECTIVES["pretraining"], seed=3)(batch, StepContext())
    queue = pretraining.queue.image.clone()
    pretraining.follow()
    output = pretraining(batch, StepContext(language_only=True))
    assert list(output.losses) == ["lm"]
    torch.testing.assert_close(output.losses["lm"], both.losses["lm"])
    output.total.backward()
    pretraining.enqueue(output)
    model = pretraining.model
    assert model.itm_head.weight.grad is None and model.vision_projection.weight.grad is None
    assert model.vision.cls_token.grad.norm() > 0
    assert torch.equal(pretraining.queue.image, queue) and pretraining.queue.pointer == 0
    with torch.no_grad():
        model.vision.cls_token.add_(1.0)
    moved = pretraining.momentum.copy.vision.cls_token.clone()
    pretraining.follow()
    # m = 0.9
    torch.testing.assert_close(pretraining.momentum.copy.vision.cls_token, moved + 0.1, atol=1e-5, rtol=0)
