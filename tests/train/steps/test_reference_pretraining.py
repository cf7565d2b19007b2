"""The yardstick itself: the textbook losses and the pre-training step against torch's
own functions and arithmetic."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.losses import (
    contrastive_loss,
    diagonal_positives,
    equal_id_positives,
    fine_tuning_negative_weights,
    language_loss,
    matching_loss,
    pretraining_negative_weights,
)
from reference.pretraining import Batch, Negatives, TextbookPretraining
from reference.samples import SMALL, assert_close, roughened, texts
from reference.tasks import DEC, ENC, with_first_token


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_contrastive_loss_is_cross_entropy_with_soft_targets():
    query, momentum, keys = (F.normalize(torch.randn(n, 16), dim=1) for n in (5, 5, 12))
    temperature = torch.tensor(0.07, requires_grad=True)
    query.requires_grad_()
    positives = diagonal_positives(5, 12)
    hard = contrastive_loss(query, momentum, keys, positives, temperature, alpha=0.0)
    assert_close(hard, F.cross_entropy(query @ keys.T / temperature, torch.arange(5)))
    soft = contrastive_loss(query, momentum, keys, positives, temperature, alpha=0.4)
    targets = 0.4 * F.softmax(momentum @ keys.T / 0.07, dim=1) + 0.6 * F.one_hot(torch.arange(5), 12)
    wanted = F.cross_entropy(query @ keys.T / temperature, targets)
    assert_close(soft, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(soft, (query, temperature)), torch.autograd.grad(wanted, (query, temperature)),
        strict=True
    ):
        assert_close(ours, theirs)


def test_equal_ids_share_the_target():
    positives = equal_id_positives(torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, -100, 7, 9]))
    third = 1 / 3
    wanted = [[third, 0, third, 0, third, 0], [0, 1, 0, 0, 0, 0], [third, 0, third, 0, third, 0]]
    assert_close(positives, torch.tensor(wanted))


def test_negative_weights():
    similarities = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    ids = torch.tensor([3, 4]), torch.tensor([3, 4, 3])
    weights = fine_tuning_negative_weights(similarities, *ids)
    assert_close(weights, torch.tensor([[0, np.e / (np.e**2 + np.e + 1), 0], [1 / 3, 0, 1 / 3]]))
    weights = pretraining_negative_weights(torch.zeros(4, 4))
    assert_close(weights, 0.2501 * (1 - torch.eye(4)))


def test_matching_and_language_loss_are_torchs():
    logits = torch.randn(12, 2)
    labels = torch.tensor([1] * 4 + [0] * 8)
    assert_close(matching_loss(logits), F.cross_entropy(logits, labels))
    logits, targets = torch.randn(3, 6, 50), torch.randint(0, 50, (3, 6))
    targets[0, :3] = targets[1, 4:] = -100
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), label_smoothing=0.1)
    assert_close(language_loss(logits, targets), wanted)


def ranks_batches(ranks: int, pairs: int, ids: list[list[int]] | None = None) -> list[Batch]:
    batches = []
    for rank in range(ranks):
        image_ids = None if ids is None else torch.tensor(ids[rank])
        lengths = torch.randint(3, 11, (pairs,)).tolist()
        batches.append(Batch(torch.randn(pairs, 3, 32, 32), *texts(*lengths, padded_to=10), image_ids))
    return batches


def next_pair(ranks: int, pairs: int) -> list[Negatives]:
    """Each rank takes its next pair, cyclically, as negative."""
    drawn = (torch.arange(pairs) + 1) % pairs
    return [Negatives(drawn, drawn) for _ in range(ranks)]


def test_all_but_self_attention_is_tied():
    model = TextbookPretraining(SMALL, queue_length=8)
    own = {name for name, _ in model.named_parameters() if name.startswith("text_decoder.")}
    parts = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    wanted = {
        f"text_decoder.bert.encoder.layer.{layer}.attention.{part}.{kind}"
        for layer in range(2) for part in parts for kind in ("weight", "bias")
    }  # fmt: skip
    wanted |= {f"text_decoder.cls.predictions.transform.{part}.{kind}"
               for part in ("dense", "LayerNorm") for kind in ("weight", "bias")}  # fmt: skip
    assert own == wanted | {"text_decoder.cls.predictions.bias"}
    assert model.state_dict()["text_decoder.cls.predictions.decoder.weight"].data_ptr() == (
        model.text_encoder.embeddings.word_embeddings.weight.data_ptr()
    )


def test_step_by_published_formulas():
    """One pre-training step of one rank, recomputed with torch's own losses from the model's outputs."""
    model = roughened(TextbookPretraining(SMALL, queue_length=8, momentum=0.9))
    with torch.no_grad():
        model.temp.fill_(0.001 / 2)
    old_momentum = model.visual_encoder_m.pos_embed.clone()
    image_queue, text_queue = model.image_queue.clone(), model.text_queue.clone()
    (batch,), (drawn,) = ranks_batches(1, 4), next_pair(1, 4)
    output = model.step([batch], 0.3, [drawn])

    assert model.temp.item() == pytest.approx(0.001)
    assert_close(model.visual_encoder_m.pos_embed, 0.9 * old_momentum + 0.1 * model.visual_encoder.pos_embed)
    images, ids, mask, _ = batch
    embeds = model.visual_encoder(images)
    image, text = model.image_features(embeds), model.text_features(ids, mask)
    image_m, text_m = model.momentum_features(batch)
    assert_close(model.image_queue[:, :4], image_m.T)
    assert_close(model.text_queue, torch.cat([text_m.T, text_queue[:, 4:]], dim=1))
    assert model.queue_ptr.item() == 4

    losses = []
    for query, query_m, keys in (
        (image, image_m, torch.cat([text_m.T, text_queue], dim=1)),
        (text, text_m, torch.cat([image_m.T, image_queue], dim=1)),
    ):
        targets = 0.3 * F.softmax(query_m @ keys / model.temp, dim=1) + 0.7 * torch.eye(4, 12)
        losses.append(F.cross_entropy(query @ keys / model.temp, targets.detach()))
    assert_close(output.itc[0], (losses[0] + losses[1]) / 2)
    off_diagonal = 1 - torch.eye(4)
    assert_close(output.weights_t2i[0],
                 (F.softmax(text @ image_m.T / model.temp, dim=1) + 1e-4) * off_diagonal)
    assert_close(output.weights_i2t[0],
                 (F.softmax(image @ text_m.T / model.temp, dim=1) + 1e-4) * off_diagonal)

    enc, following = with_first_token(ids, ENC), [1, 2, 3, 0]
    logits = torch.cat([
        model.matching_logits(embeds, enc, mask),
        model.matching_logits(embeds[following], enc, mask),
        model.matching_logits(embeds, enc[following], mask[following]),
    ])  # fmt: skip
    assert_close(output.matching_logits[0], logits)
    assert_close(output.itm[0], F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8)))
    decoded = model.text_decoder(with_first_token(ids, DEC), mask, embeds)[:, :-1]
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    wanted = F.cross_entropy(decoded.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert_close(output.lm[0], wanted)
    assert_close(output.loss, output.itc[0] + output.itm[0] + output.lm[0])


def test_two_ranks_average_each_ranks_gradients():
    model = roughened(TextbookPretraining(SMALL, queue_length=8))
    batches, negatives = ranks_batches(2, 3), next_pair(2, 3)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    alone = []
    for rank in range(2):
        model.load_state_dict(start)
        model.zero_grad()
        model.step(batches[rank : rank + 1], 0.2, negatives[rank : rank + 1]).loss.backward()
        alone.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    model.load_state_dict(start)
    model.zero_grad()
    model.step(batches, 0.2, negatives).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, (alone[0][name] + alone[1][name]) / 2)
    images_m, texts_m = zip(*(model.momentum_features(b) for b in batches), strict=True)
    assert_close(model.image_queue[:, :6], torch.cat(images_m).T)
    assert_close(model.text_queue[:, :6], torch.cat(texts_m).T)


def test_queue_wraps_where_it_does_not_divide():
    model = TextbookPretraining(SMALL, queue_length=5, retrieval=True, decoder=False)
    model.enqueue(torch.ones(3, 16), torch.ones(3, 16), torch.tensor([1, 2, 3]))
    assert model.idx_queue.tolist() == [[1, 2, 3, -100, -100]]
    model.enqueue(torch.full((4, 16), 2.0), torch.full((4, 16), 3.0), torch.tensor([4, 5, 6, 7]))
    assert model.idx_queue.tolist() == [[6, 7, 3, 4, 5]]
    assert model.image_queue[0].tolist() == [2, 2, 1, 2, 2]
    assert model.text_queue[0].tolist() == [3, 3, 1, 3, 3]
    assert model.ptr_queue.item() == 2
    with pytest.raises(ValueError, match="6 pairs do not fit a queue of 5"):
        model.enqueue(torch.ones(6, 16), torch.ones(6, 16), torch.arange(6))


def test_retrieval_step():
    """Equal ids are positives in batch and queue and are never drawn; all ranks' pairs are candidates."""
    model = roughened(TextbookPretraining(SMALL, queue_length=7, retrieval=True, all_ranks=True,
                                          decoder=False))
    batches = ranks_batches(2, 3, ids=[[1, 2, 1], [2, 3, 4]])
    negatives = [Negatives(torch.tensor([3, 0, 4]), torch.tensor([5, 4, 1])),
                 Negatives(torch.tensor([0, 0, 3]), torch.tensor([0, 3, 4]))]  # fmt: skip
    model.step(batches, 0.0, negatives)
    image_queue, text_queue = model.image_queue.T.clone(), model.text_queue.T.clone()
    assert model.idx_queue.tolist() == [[1, 2, 1, 2, 3, 4, -100]]
    output = model.step(batches, 0.0, negatives)
    assert output.lm.tolist() == [0, 0]

    wanted = [[0, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1]]
    assert torch.equal(output.weights_t2i[0] > 0, torch.tensor(wanted).bool())
    with torch.no_grad():
        images, pair_texts = zip(
            *((model.image_features(model.visual_encoder(b.images)), model.text_features(*b[1:3]))
              for b in batches),
            strict=True,
        )
        to_texts = F.softmax(images[1] @ torch.cat(pair_texts).T / model.temp, dim=1)
        same = batches[1].image_ids[:, None] == torch.cat([b.image_ids for b in batches])
        assert_close(output.weights_i2t[1], to_texts * ~same)

        image_m, text_m = model.momentum_features(batches[0])
        i2t = (images[0] @ torch.cat([text_m, text_queue]).T / model.temp).log_softmax(dim=1)
        t2i = (pair_texts[0] @ torch.cat([image_m, image_queue]).T / model.temp).log_softmax(dim=1)
        # Ids 1, 2, 1 are keys 0, 1, 2; the queue's 1, 2, 1, 2, 3, 4, -100 are keys 3 to 9.
        positives = [[0, 2, 3, 5], [1, 4, 6], [0, 2, 3, 5]]
        rows = [d[row, keys].mean() for d in (i2t, t2i) for row, keys in enumerate(positives)]
        assert_close(output.itc[0], -torch.stack(rows).mean())


def test_gradients_reach_images_of_other_ranks():
    model = roughened(TextbookPretraining(SMALL, queue_length=8, retrieval=True, all_ranks=True))
    batches = ranks_batches(2, 2, ids=[[1, 2], [3, 4]])
    images = [b.images.requires_grad_() for b in batches]
    negatives = [Negatives(torch.tensor([3, 3]), torch.tensor([2, 2])),
                 Negatives(torch.tensor([0, 2]), torch.tensor([1, 1]))]  # fmt: skip
    output = model.step(batches, 0.4, negatives)
    (from_rank_1,) = torch.autograd.grad(output.itm[1], images[0], retain_graph=True)
    assert from_rank_1[0].abs().max() > 0
    assert from_rank_1[1].abs().max() == 0  # rank 1 drew image 0 of rank 0, not image 1
    (from_rank_0,) = torch.autograd.grad(output.itm[0], images[1])
    assert from_rank_0[0].abs().max() == 0
    assert from_rank_0[1].abs().max() > 0


def test_three_optimiser_steps_and_their_moving_average():
    model = TextbookPretraining(SMALL, queue_length=11, momentum=0.9)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3,
                                  weight_decay=0.05)
    average = model.text_proj.weight.detach().clone()
    losses = []
    batches, negatives = ranks_batches(2, 3), next_pair(2, 3)
    for _ in range(3):
        average = 0.9 * average + 0.1 * model.text_proj.weight.detach()
        optimiser.zero_grad()
        output = model.step(batches, 0.1, negatives)
        output.loss.backward()
        optimiser.step()
        assert_close(model.text_proj_m.weight, average)
        losses.append(output.loss.item())
    assert losses[2] < losses[0]
    assert model.queue_ptr.item() == 18 % 11


def test_loading_weights_names_what_is_missing_and_restarts_the_momentum():
    source, model = roughened(TextbookPretraining(SMALL, queue_length=8)), TextbookPretraining(SMALL,
                                                                                               queue_length=8)
    own = {k: v for k, v in source.state_dict().items() if "_m." not in k and "queue" not in k}
    model.load_weights(own)
    assert torch.equal(model.vision_proj_m.weight, source.vision_proj.weight)
    own.pop("temp")
    with pytest.raises(ValueError, match=r"missing weights \['temp'\]"):
        model.load_weights(own)
