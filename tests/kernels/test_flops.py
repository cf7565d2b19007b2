"""FLOPs of ops against the plain formulation's, counted by PyTorch; of a step against the published code's."""

import blip_kernels.flops  # noqa: F401 (registers the counts)
import pytest
import torch
import torch.nn.functional as F
from blip_kernels import (
    attention,
    cached_attention,
    contrastive,
    decode_attention,
    hard_negatives,
    linear_cross_entropy,
)
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.step import StepContext
from torch.utils.flop_counter import FlopCounterMode

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts

HEADS, WIDTH = 3, 32


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def offsets(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    """Forward and backward: two and five products over the pairs that see each other, none over padding."""
    q_lengths, kv_lengths = [3, 0, 7, 9], [5, 2, 7, 4]
    q, k, v = (torch.randn(sum(n), HEADS, WIDTH, requires_grad=True)
               for n in (q_lengths, kv_lengths, kv_lengths))
    seen = [torch.ones(n, m).tril(m - n) if causal else torch.ones(n, m)
            for n, m in zip(q_lengths, kv_lengths, strict=True)]
    pairs = int(sum(mask.sum() for mask in seen))
    where = offsets(q_lengths), offsets(kv_lengths)
    forward = counted(lambda: attention(q, k, v, *where, causal=causal, backend="reference"))
    both = counted(lambda: attention(q, k, v, *where, causal=causal, backend="reference").sum().backward())
    assert (forward, both) == (2 * 2 * pairs * HEADS * WIDTH, 7 * 2 * pairs * HEADS * WIDTH)
    if not causal:
        segments = [(torch.randn(HEADS, n, WIDTH), torch.randn(HEADS, WIDTH, m))
                    for n, m in zip(q_lengths, kv_lengths, strict=True)]
        assert forward == 2 * counted(lambda: [a @ b for a, b in segments])


def test_generation():
    k, lengths = torch.randn(10, HEADS, WIDTH), torch.tensor([4, 6], dtype=torch.int32)
    images = torch.randn(2, 7, HEADS, WIDTH)
    found = counted(lambda: decode_attention(torch.randn(6, HEADS, WIDTH), images, images, lengths,
                                             backend="reference"))
    assert found == 2 * 2 * 3 * 10 * HEADS * WIDTH  # three rows an image over ten keys in all
    slots = torch.arange(12).view(2, 6) % 10
    found = counted(lambda: cached_attention(torch.randn(2, HEADS, WIDTH), k, k, slots, lengths,
                                             backend="reference"))
    assert found == 2 * 2 * (4 + 6) * HEADS * WIDTH


def test_losses():
    q, q_m, keys, queue = (torch.randn(n, WIDTH, requires_grad=i == 0) for i, n in enumerate((4, 4, 4, 20)))
    tau = torch.tensor([0.1])
    plain = counted(lambda: (q @ keys.T, q @ queue.T, q_m @ keys.T, q_m @ queue.T))
    assert counted(lambda: contrastive(q, q_m, keys, queue, tau, 0.4, backend="reference")) == plain
    both = counted(lambda: contrastive(q, q_m, keys, queue, tau, 0.4, backend="reference").sum().backward())
    assert both == plain + plain * 3 // 2
    assert counted(lambda: hard_negatives(q, keys, tau, backend="reference")) == counted(lambda: q @ keys.T)
    hidden, weight, targets = torch.randn(7, WIDTH), torch.randn(50, WIDTH), torch.arange(7)
    assert counted(lambda: linear_cross_entropy(hidden, weight, None, targets,
                                                backend="reference")) == counted(lambda: hidden @ weight.T)
    hidden.requires_grad_(), weight.requires_grad_()
    both = counted(lambda: linear_cross_entropy(hidden, weight, None, targets,
                                                backend="reference").backward())
    small = counted(lambda: F.cross_entropy(hidden @ weight.T, targets).backward())
    assert small <= both <= small * 4 // 3  # the logits a second time, unless the forward kept them


@pytest.mark.slow
def test_a_step_of_the_base_model_takes_at_most_210_gflop_a_pair(monkeypatch):
    """At 224 px, eight captions of 13.9 tokens on average, queue 57,600; the published code counts 306.6."""
    monkeypatch.setenv("BLIP_FAST_ATTENTION", "reference")
    config = BlipConfig(vision=VisionConfig(image_size=224), text=TextConfig(dropout=0.0))
    torch.manual_seed(0)
    pretraining = Pretraining(BlipModel(config), Objective(), seed=0)
    lengths = [14, 11, 17, 13, 12, 19, 10, 15]
    texts = PackedTexts.from_lists([[101, *torch.randint(1000, 30000, (n - 2,)).tolist(), 102]
                                    for n in lengths])
    batch = Batch(torch.randn(8, 3, 224, 224), texts, torch.arange(8))

    def step():
        pretraining.follow()
        pretraining(batch, StepContext(alpha=0.4)).total.backward()

    assert 150e9 < counted(step) / 8 <= 210e9
