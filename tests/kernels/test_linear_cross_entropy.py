"""blip_kernels.linear_cross_entropy against the formula in float64: the twin, and the interpreted kernels."""

import pytest
import torch
import torch.nn.functional as F
from blip_kernels.linear_cross_entropy import linear_cross_entropy, upstream
from cross_entropies import BACKENDS, NAMES, TOLERANCE, check, inputs, module, small_tiles, textbook
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


SIZES = [(1, 1, 1), (1, 7, 2), (2, 16, 31), (7, 64, 64), (17, 33, 65), (64, 65, 127), (65, 128, 129),
         (129, 31, 257)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"T{s[0]}-D{s[1]}-V{s[2]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend, sizes, reduction):
    tensors, targets = inputs(*sizes)
    targets[0] = 0  # one row counts, so that the mean is a number
    check(backend, tensors, targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend, reduction):
    check(backend, *inputs(37, 48, 150, torch.float16), reduction=reduction)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 30), width=st.integers(1, 20), vocabulary=st.integers(1, 80),
       seed=st.integers(0, 99), smoothing=st.sampled_from([0.0, 0.1, 1.0]),
       kept=st.sampled_from([0, 300, 10**6]), bias=st.booleans())
def test_any_size_of_the_twin(rows, width, vocabulary, seed, smoothing, kept, bias):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEPT", kept)
        tensors, targets = inputs(rows, width, vocabulary, torch.float64, seed, bias=bias)
        check("reference", tensors, targets, smoothing, reduction="sum", tolerance=TOLERANCE[torch.float64])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_smoothing_and_bias(backend, bias, smoothing):
    check(backend, *inputs(11, 24, 90, bias=bias), smoothing=smoothing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_within_the_vocabulary(backend):
    tensors, targets = inputs(23, 16, 40, ignored=0.3, ignore_index=3)
    assert (targets == 3).any()
    check(backend, tensors, targets, ignore_index=3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts(backend, rows, reduction):
    """All rows ignored, or no rows: as F.cross_entropy, NaN for the mean; gradients are zeros."""
    (hidden, weight, bias), _ = inputs(rows, 8, 40)
    targets = torch.full((rows,), -100)
    loss = linear_cross_entropy(hidden, weight, bias, targets, reduction=reduction, backend=backend)
    plain = F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(loss, plain, equal_nan=True)
    loss.sum().backward()
    for x in (hidden, weight, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    (hidden, weight, bias), targets = inputs(18, 20, 50)
    wide = [torch.randn(18, 3, 20), torch.randn(20, 50).T, torch.randn(100)[::2]]
    views = [wide[0][:, 1], wide[1], wide[2]]
    targets = torch.stack([targets, targets], 1)[:, 0]
    for a, b in zip(views, (hidden, weight, bias), strict=True):
        a.copy_(b.detach())
    got, want = [x.detach().requires_grad_() for x in views], [x.detach().double().requires_grad_()
                                                              for x in (hidden, weight, bias)]
    grad = torch.randn(18, 2)[:, 0]
    linear_cross_entropy(*got, targets, reduction="none", backend=backend).backward(grad)
    textbook(*want, targets, 0.1, -100, "none").backward(grad.double())
    for name, a, b in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, msg=lambda m, n=name: f"d {n}: {m}",
                                   **TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_gradients_that_are_asked_for(backend, wanted):
    tensors, targets = inputs(9, 12, 40)
    full = torch.autograd.grad(linear_cross_entropy(*tensors, targets, backend=backend), tensors)
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    linear_cross_entropy(*some, targets, backend=backend).backward()
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            torch.testing.assert_close(x.grad, full[i])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_finite_differences(reduction):
    tensors, targets = inputs(9, 4, 35, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(*x, targets, reduction=reduction, backend="reference"), tensors)


def test_kernel_has_the_slope_of_its_own_loss():
    """Finite differences of the kernels' float32 loss along a random direction, summed up in float64."""
    tensors, targets = inputs(19, 40, 70)
    grads = torch.autograd.grad(linear_cross_entropy(*tensors, targets, reduction="sum", backend="triton"),
                                tensors)
    steps = [torch.randn_like(x) * 1e-2 for x in tensors]
    ends = [linear_cross_entropy(*(x.detach() + sign * s for x, s in zip(tensors, steps, strict=True)),
                                 targets, reduction="none", backend="triton").double().sum()
            for sign in (1, -1)]
    slope = sum((g.double() * s.double()).sum() for g, s in zip(grads, steps, strict=True))
    # Third-order terms of a step of 1e-2 and float32's rounding of a difference near 1: below a hundredth.
    torch.testing.assert_close((ends[0] - ends[1]) / 2, slope, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_gives_the_same(backend):
    """The backward can run twice on what the forward keeps."""
    tensors, targets = inputs(9, 12, 60)
    loss = linear_cross_entropy(*tensors, targets, backend=backend)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, tensors)))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 16, 1 << 25])
def test_kernels_in_chunks(monkeypatch, chunk_bytes):
    gpu = pytest.importorskip("blip_kernels.gpu.linear_cross_entropy_kernels")
    monkeypatch.setattr(gpu, "CHUNK_BYTES", chunk_bytes)
    check("triton", *inputs(70, 40, 300), reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """A shift of all logits by 1,000 leaves losses within float32's rounding of 1,000, and no infinity."""
    (hidden, weight, bias), targets = inputs(9, 12, 60)
    plain = linear_cross_entropy(hidden, weight, bias, targets, reduction="none", backend=backend)
    for shift in (1000.0, -1000.0):
        moved = linear_cross_entropy(hidden, weight, bias + shift, targets, reduction="none", backend=backend)
        torch.testing.assert_close(moved, plain, atol=5e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_mean_over_many_rows_keeps_small_gradients(backend):
    """d logits of a mean over 2,000 rows lie below float16's smallest number; the gradients must not."""
    tensors, targets = inputs(2000, 4, 40, torch.float16, ignored=0.0)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    linear_cross_entropy(*tensors, targets, backend=backend).backward(torch.tensor(1e-3))
    (F.cross_entropy(F.linear(*exact), targets, label_smoothing=0.1) * 1e-3).backward()
    # Gradients near 1e-6 are multiples of 6e-8 in float16 itself; at least they are not lost.
    for x, e in zip(tensors, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), e.grad, atol=6e-8, rtol=5e-3)


def test_the_unit_of_float16():
    targets = torch.tensor([1, -100, 2])
    per_row, unit = upstream(torch.tensor([1e-6, 7.0, -4e-6]), targets, -100, torch.float16)
    torch.testing.assert_close(per_row * unit, torch.tensor([1e-6, 0.0, -4e-6]))
    assert per_row.abs().max() == pytest.approx(1024)
    per_row, unit = upstream(torch.zeros(3), targets, -100, torch.float16)
    assert torch.equal(per_row, torch.zeros(3)) and unit > 0
    assert upstream(torch.ones(3), targets, -100, torch.bfloat16)[1] == 1


def test_bfloat16_errs_less_than_twice_the_plain_form():
    tensors, targets = inputs(200, 64, 500, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    plain = [x.detach().requires_grad_() for x in tensors]
    losses = {}
    losses["exact"] = F.cross_entropy(F.linear(*exact), targets, label_smoothing=0.1)
    losses["plain"] = F.cross_entropy(F.linear(*plain).float(), targets, label_smoothing=0.1)
    losses["ours"] = linear_cross_entropy(*tensors, targets)
    for loss in losses.values():
        loss.backward()
    assert abs(losses["ours"] - losses["exact"]) <= 2 * abs(losses["plain"] - losses["exact"]) + 1e-6
    for name, x, p, e in zip(NAMES, tensors, plain, exact, strict=True):
        errors = [(y.grad.double() - e.grad).norm() for y in (x, p)]
        assert errors[0] <= 2 * errors[1], (name, errors)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs():
    """Weight gradients of a float32 weight are sums in float32, not a bfloat16 sum that was widened."""
    tensors, targets = inputs(64, 32, 200)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*tensors, targets)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors]
    torch.testing.assert_close(loss, linear_cross_entropy(*low, targets))
    loss.backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)
    assert not torch.equal(tensors[1].grad, tensors[1].grad.bfloat16().float())


def test_few_logits_are_left_to_pytorch(monkeypatch):
    """The plain form gives the same values as chunks."""
    tensors, targets = inputs(9, 12, 60)
    chunked = linear_cross_entropy(*tensors, targets)
    gradients = torch.autograd.grad(chunked, tensors)
    monkeypatch.setattr(module, "PLAIN", 9 * 60)
    monkeypatch.setattr(module, "_forward", None)
    whole = linear_cross_entropy(*tensors, targets)
    torch.testing.assert_close(whole, chunked)
    for a, b in zip(torch.autograd.grad(whole, tensors), gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 31, 128, 257])
@pytest.mark.parametrize("vocabulary", [63, 300, 1025])
def test_wide_sweep(backend, dtype, rows, vocabulary):
    for width in (1, 64, 97, 200):
        for reduction in ("mean", "none"):
            tensors, targets = inputs(rows, width, vocabulary, dtype, seed=width)
            targets[0] = 0
            # In float16 257 rows are 33 partial products of the twin with its small tiles, each rounded.
            tolerance = {"atol": 3e-2, "rtol": 4e-3} if dtype == torch.float16 else None
            check(backend, tensors, targets, reduction=reduction, tolerance=tolerance)
