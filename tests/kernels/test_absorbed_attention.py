"""Attention without keys and values, held to the textbook's with them."""

import pytest
import torch
from blip_kernels import absorbed_attention


def make(segments, each, heads, head_dim, width, keys, dtype=torch.float32):
    generator = torch.Generator().manual_seed(segments + each)
    def draw(*shape):
        return torch.randn(shape, generator=generator)

    q, states = draw(segments * each, heads, head_dim).to(dtype), draw(segments, keys, width).to(dtype)
    weight, bias = draw(2, heads, head_dim, width) / width**0.5, draw(2, heads, head_dim)
    return q, states, weight.to(dtype), bias.to(dtype)


def ours(q, states, lengths, weight, bias):
    return absorbed_attention(q, states, lengths, weight[0].contiguous(),
                              weight[1].transpose(1, 2).contiguous(), bias[1], q.shape[-1] ** -0.5)


def textbook(q, states, lengths, weight, bias):
    """Keys and values of all states with their biases, then softmax, in float64."""
    q, states, weight, bias = (x.double() for x in (q, states, weight, bias))
    keys, values = (torch.einsum("skw,hdw->skhd", states, w) + b for w, b in zip(weight, bias, strict=True))
    out, each = torch.empty_like(q), len(q) // len(states)
    for row in range(len(q)):
        segment = row // each
        n = int(lengths[segment])
        logits = torch.einsum("hd,khd->hk", q[row], keys[segment, :n]) * q.shape[-1] ** -0.5
        out[row] = torch.einsum("hk,khd->hd", logits.softmax(-1), values[segment, :n])
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize(("segments", "each", "keys"), [(1, 1, 5), (3, 2, 7), (5, 5, 17), (2, 13, 33)])
def test_equals_the_textbook(segments, each, keys, dtype, tolerance):
    q, states, weight, bias = make(segments, each, 3, 16, 40, keys, dtype)
    lengths = torch.tensor([keys - (i % 3) for i in range(segments)], dtype=torch.int32)
    found = ours(q, states, lengths, weight, bias)
    assert found.dtype == dtype and found.shape == q.shape
    torch.testing.assert_close(found.double(), textbook(q, states, lengths, weight, bias), rtol=tolerance,
                               atol=tolerance)


@pytest.mark.parametrize("each", [1, 3, 5])
def test_neighbours_change_no_bit(each):
    q, states, weight, bias = make(9, each, 12, 64, 768, 50)
    lengths = torch.full((9,), 50, dtype=torch.int32)
    together = ours(q, states, lengths, weight, bias)
    for first, last in ((0, 1), (3, 4), (2, 4), (0, 5), (4, 9)):
        rows = slice(first * each, last * each)
        assert torch.equal(ours(q[rows], states[first:last], lengths[first:last], weight, bias),
                           together[rows])
