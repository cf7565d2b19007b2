"""blip_kernels.attention against the formula written per segment in float64."""

import pytest
import torch
from blip_kernels import attention
from blip_kernels.backends import attention_backend
from blip_kernels.cpu import processor, sliced_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook_attention import offsets_of, textbook

BACKENDS = ("sdpa", "sliced", "reference")


lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, heads=st.sampled_from([1, 3]), head_dim=st.sampled_from([8, 32]),
       seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_attention_equals_the_formula(backend, lengths, heads, head_dim, seed):
    check(backend, [n for n, _ in lengths], [m for _, m in lengths], heads, head_dim, seed, causal=False)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=6),
       seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_attention_equals_the_formula(backend, lengths, seed):
    check(backend, [n for n, _ in lengths], [n + extra for n, extra in lengths], 2, 16, seed, causal=True)


def check(backend, q_lengths, kv_lengths, heads, head_dim, seed, causal):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(q_lengths), heads, head_dim)] + [(sum(kv_lengths), heads, head_dim)] * 2
    fast = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in fast]
    out = attention(*fast, offsets_of(q_lengths), offsets_of(kv_lengths), causal=causal, backend=backend)
    expected = textbook(*exact, q_lengths, kv_lengths, causal)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    upstream = torch.randn(out.shape, generator=generator)
    if not out.requires_grad or not expected.requires_grad:
        return
    out.backward(upstream)
    expected.backward(upstream.double())
    for name, a, b in zip("qkv", fast, exact, strict=True):
        got = torch.zeros_like(a) if a.grad is None else a.grad
        want = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5,
                                   msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    qkv = torch.randn(7, 3, 2, 16)
    q, k, v = qkv.unbind(1)
    offsets = offsets_of([3, 4])
    got = attention(q, k, v, offsets, offsets, backend=backend)
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), offsets, offsets, backend=backend)
    assert torch.equal(got, want)


def test_one_key_segment_serves_all_rows_of_its_query_segment():
    """Two texts of one image in one segment give what each text alone would."""
    k, v, q = torch.randn(5, 2, 8), torch.randn(5, 2, 8), torch.randn(6, 2, 8)
    together = attention(q, k, v, offsets_of([6]), offsets_of([5]))
    apart = [attention(q[rows], k, v, offsets_of([3]), offsets_of([5]))
             for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean(backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(64, 2, 8), torch.randn(64, 2, 8), torch.rand(64, 2, 8)
    offsets = offsets_of([64])
    clean = attention(q, k, v, offsets, offsets, backend=backend)
    dropped = torch.stack([attention(q, k, v, offsets, offsets, dropout=0.3, backend=backend)
                           for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - clean).abs().max() < 6 * (dropped.std(0) / 20).max()


def faulty_calls():
    x, ok = torch.randn(4, 2, 8), offsets_of([1, 3])
    yield "q must be", (torch.randn(4, 8), x, x, ok, ok), {}
    yield "k and v must be", (x, torch.randn(4, 1, 8), x, ok, ok), {}
    yield "share one floating dtype", (x, x.double(), x.double(), ok, ok), {}
    yield "q_offsets must be int32", (x, x, x, ok.long(), ok), {}
    yield "kv_offsets must rise from 0 to 4", (x, x, x, ok, offsets_of([1, 2])), {}
    yield "q_offsets must rise", (x, x, x, torch.tensor([0, 5, 4], dtype=torch.int32), ok), {}
    yield "of one length", (x, x, x, ok, offsets_of([4])), {}
    yield "dropout", (x, x, x, ok, ok), {"dropout": 1.0}
    yield "backend 'fast' is not known", (x, x, x, ok, ok), {"backend": "fast"}


@pytest.mark.parametrize(("message", "arguments", "options"), list(faulty_calls()),
                         ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_named(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        attention(*arguments, **options)


def test_the_environment_names_the_backend(monkeypatch):
    q = torch.randn(4, 2, 8)
    monkeypatch.setenv("BLIP_FAST_ATTENTION", "reference")
    assert attention_backend(q) == "reference"
    assert attention_backend(q, "sdpa") == "sdpa"


@pytest.mark.parametrize(("bfloat16", "amx", "inference", "training"), [
    (False, False, "sdpa", "sdpa"), (True, False, "sliced", "sliced"), (True, True, "sdpa", "sliced")])
def test_auto_takes_slices_where_they_are_faster(monkeypatch, bfloat16, amx, inference, training):
    """In 16 bits that the processor multiplies; with AMX, where gradients are needed."""
    monkeypatch.delenv("BLIP_FAST_ATTENTION", raising=False)
    monkeypatch.setattr(processor, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(processor, "has_amx", lambda: amx)
    q = torch.randn(4, 2, 8)
    assert attention_backend(q) == "sdpa"
    assert attention_backend(q.bfloat16()) == inference
    assert attention_backend(q.bfloat16().requires_grad_()) == training
    with pytest.raises(ValueError, match="runs on a CPU only"):
        attention_backend(q.to("meta"), "sliced")


@pytest.mark.parametrize("slice_elements", [1, 100, 10_000])
@pytest.mark.parametrize("causal", [False, True])
def test_the_size_of_slices_changes_nothing(monkeypatch, slice_elements, causal):
    torch.manual_seed(0)
    q = torch.randn(30, 3, 8, requires_grad=True)
    k, v = torch.randn(30, 3, 8), torch.randn(30, 3, 8)
    offsets = offsets_of([7, 0, 13, 10])
    whole = attention(q, k, v, offsets, offsets, causal=causal, backend="sliced")
    (gradient,) = torch.autograd.grad(whole.square().sum(), q)
    monkeypatch.setattr(sliced_attention, "SLICE_ELEMENTS", slice_elements)
    parts = attention(q, k, v, offsets, offsets, causal=causal, backend="sliced")
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), q)[0], gradient)


def test_sliced_dropout_has_the_gradient_of_its_own_mask():
    """Finite differences in float64: forward and backward must drop the same weights."""
    offsets = offsets_of([3, 5])
    inputs = [torch.randn(8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def seeded(q, k, v):
        torch.manual_seed(5)
        return attention(q, k, v, offsets, offsets, dropout=0.4, backend="sliced")

    assert torch.autograd.gradcheck(seeded, inputs)


@pytest.mark.parametrize("backend", ["sdpa", "sliced"])
def test_bfloat16_stays_close_to_the_formula(backend):
    """Within twice the rounding error of the formula evaluated in bfloat16 step by step."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, 2, 32) for _ in range(3))
    offsets = offsets_of([13, 27])
    exact = attention(q.double(), k.double(), v.double(), offsets, offsets, backend="reference")
    low = [x.bfloat16() for x in (q, k, v)]
    got = attention(*low, offsets, offsets, backend=backend)
    steps = torch.cat([torch.softmax(torch.einsum("qhd,khd->hqk", a, b) * 32**-0.5, -1).transpose(0, 1).unsqueeze(2)
                       .matmul(c.transpose(0, 1).unsqueeze(0)).squeeze(2)
                       for a, b, c in zip(*(x.split([13, 27]) for x in low), strict=True)])
    assert (got.double() - exact).abs().max() <= 2 * (steps.double() - exact).abs().max()
