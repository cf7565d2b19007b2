"""blip_kernels.contrastive, twin and kernels, against the loss written out in float64 with all matrices."""

import re
import subprocess
import sys
import textwrap
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import contrastive
from blip_kernels.backends import triton_cannot
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ("reference", "triton")
op = import_module("blip_kernels.contrastive")  # its name in the package is the function

# Float32 against float64: logits up to 1/τ = 14 carry an error of 1e-6 each, losses about that. Gradients are
# sums of terms that cancel, (softmax − target) · feature, so they are compared on the scale of the terms:
# |upstream| / τ, and for the temperature, where a logit stands in the place of a feature, Σ |upstream| / τ².
# Float16 inputs are exact on both sides; only a gradient's weights and its result are rounded, to 11 bits.
LOSS = 5e-6
GRADIENT = {torch.float32: 2e-6, torch.float16: 5e-4}


def textbook(q, q_m, batch_keys, queue_keys, temperature, alpha, first_own_key=0, ids=None, key_ids=None,
             queue_ids=None):
    """The definition. Positives of a row share its weight; a row without any has no hard part."""
    keys = torch.cat([batch_keys, queue_keys])
    logits = q @ keys.T / temperature
    soft = torch.softmax(q_m @ keys.T / temperature, dim=1).detach()
    if ids is None:
        positives = F.one_hot(torch.arange(len(q)) + first_own_key, len(keys)).to(logits.dtype)
    else:
        equal = (ids[:, None] == torch.cat([key_ids, queue_ids])) & (ids != -100)[:, None]
        positives = equal / equal.sum(1, keepdim=True).clamp(min=1)
    return -((alpha * soft + (1 - alpha) * positives) * torch.log_softmax(logits, dim=1)).sum(1)


def features(rows, width, dtype=torch.float32):
    return F.normalize(torch.randn(rows, width), dim=1).to(dtype)


def case(rows, keys, queued, width, kind, dtype=torch.float32, first_own_key=None):
    """Tensors and options of a call; by id, row 0 has the id of empty slots, the last row an id of its own."""
    tensors = [features(rows, width, dtype), features(rows, width, dtype), features(keys, width, dtype),
               features(queued, width, dtype), torch.tensor([0.07])]
    if kind == "pair":
        return tensors, {"first_own_key": keys - rows if first_own_key is None else first_own_key}
    ids, key_ids, queue_ids = (torch.randint(0, 12, (n,)) for n in (rows, keys, queued))
    queue_ids[::3] = -100
    ids[-1] = 77
    ids[0] = -100
    return tensors, {"ids": ids, "key_ids": key_ids, "queue_ids": queue_ids}


def differentiate(function, tensors, alpha, options, upstream):
    q, q_m, keys, queue, temperature = (x.detach().clone().requires_grad_() for x in tensors)
    loss = function(q, q_m, keys, queue, temperature, alpha, **options)
    gradients = torch.autograd.grad(loss, (q, keys, temperature), upstream.to(loss.dtype))
    return loss, dict(zip(("queries", "batch_keys", "temperature"), gradients, strict=True))


def check(backend, rows, keys, queued, width, kind, alpha, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors, options = case(rows, keys, queued, width, kind, dtype)
    upstream = torch.randn(rows)
    loss, gradients = differentiate(lambda *a, **k: contrastive(*a, **k, backend=backend), tensors, alpha,
                                    options, upstream)
    exact, exact_gradients = differentiate(textbook, [x.double() for x in tensors], alpha, options, upstream)
    torch.testing.assert_close(loss.double(), exact, atol=LOSS, rtol=LOSS)
    assert loss.dtype == torch.float32
    close(gradients, exact_gradients, upstream, float(tensors[4]), GRADIENT[dtype])


def close(gradients, exact, upstream, temperature, tolerance):
    scales = dict.fromkeys(("queries", "batch_keys"), upstream.abs().max() / temperature)
    scales["temperature"] = upstream.abs().sum() / temperature**2
    for name, want in exact.items():
        assert (gradients[name].double() - want).abs().max() <= tolerance * scales[name], name


SHAPES = [  # rows, batch keys, queue, width
    (1, 1, 0, 8), (1, 2, 1, 16), (5, 5, 131, 24), (33, 66, 127, 64), (64, 64, 64, 32), (129, 131, 65, 17),
    (3, 9, 700, 256), (17, 300, 0, 100),
]


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize(("rows", "keys", "queued", "width"), SHAPES, ids=lambda x: str(x))
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_equal_the_definition(backend, rows, keys, queued, width, kind):
    check(backend, rows, keys, queued, width, kind, alpha=0.4)


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_soft_targets_and_with_nothing_else(backend, alpha, kind):
    check(backend, 19, 40, 70, 16, kind, alpha)


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend, kind):
    check(backend, 65, 70, 140, 64, kind, 0.4, torch.float16)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), more=st.integers(0, 20), queued=st.integers(0, 90), width=st.integers(1, 40),
       kind=st.sampled_from(["pair", "id"]), alpha=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_any_sizes(rows, more, queued, width, kind, alpha, seed):
    for backend in BACKENDS:
        check(backend, rows, rows + more, queued, width, kind, alpha, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize("width", [31, 128, 255])
@pytest.mark.parametrize(("rows", "keys", "queued"),
                         [(127, 127, 513), (128, 256, 512), (257, 300, 999), (64, 64, 900)])
def test_a_wide_sweep(rows, keys, queued, width, kind, dtype):
    for backend in BACKENDS:
        check(backend, rows, keys, queued, width, kind, 0.4, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_the_ends_of_the_temperatures_range(backend, temperature):
    """At 0.001 logits reach ±1000 and most weights underflow: no overflow, no NaN, losses exact to rounding."""
    torch.manual_seed(0)
    tensors, options = case(21, 21, 90, 16, "pair")
    tensors[4] = torch.tensor([temperature])
    upstream = torch.randn(21)
    loss, gradients = differentiate(lambda *a, **k: contrastive(*a, **k, backend=backend), tensors, 0.4,
                                    options, upstream)
    exact, exact_gradients = differentiate(textbook, [x.double() for x in tensors], 0.4, options, upstream)
    torch.testing.assert_close(loss.double(), exact, atol=1e-6 / temperature, rtol=1e-5)
    close(gradients, exact_gradients, upstream, temperature, 2e-7 / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    torch.manual_seed(0)
    tensors, options = case(13, 20, 70, 16, "pair")
    strided = [torch.stack([x, x], dim=1)[:, 0]
               for x in tensors[:3]] + [tensors[3].T.contiguous().T, tensors[4]]
    upstream = torch.randn(13, 2)
    call = lambda *a, **k: contrastive(*a, **k, backend=backend)  # noqa: E731
    plain, plain_gradients = differentiate(call, tensors, 0.4, options, upstream[:, 0].contiguous())
    inputs = [x.requires_grad_(x.is_leaf) for x in strided]
    q, keys = (x.requires_grad_() for x in (strided[0].detach(), strided[2].detach()))
    assert not q.is_contiguous()
    loss = call(q, inputs[1], keys, inputs[3], inputs[4], 0.4, **options)
    gradients = torch.autograd.grad(loss, (q, keys), upstream[:, 0])
    torch.testing.assert_close(loss, plain, atol=0, rtol=0)
    for name, got in zip(("queries", "batch_keys"), gradients, strict=True):
        torch.testing.assert_close(got, plain_gradients[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["pair", "id"])
def test_finite_differences(kind):
    """The twin in float64 against finite differences; α = 0, because targets count as constants."""
    torch.manual_seed(0)
    tensors, options = case(4, 6, 9, 5, kind)
    q, q_m, keys, queue, temperature = (x.double() for x in tensors)
    inputs = [x.requires_grad_() for x in (q, keys, temperature)]
    assert torch.autograd.gradcheck(lambda q, k, t: contrastive(q, q_m, k, queue, t, 0.0, **options), inputs)


def test_targets_carry_no_gradient():
    torch.manual_seed(0)
    q, q_m, keys, queue, temperature = [x.requires_grad_() for x in case(4, 4, 9, 8, "pair")[0]]
    contrastive(q, q_m, keys, queue, temperature, 1.0).sum().backward()
    assert q_m.grad is None and queue.grad is None
    assert q.grad is not None and keys.grad is not None and temperature.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_want_no_gradient_get_none(backend, monkeypatch):
    torch.manual_seed(0)
    tensors, options = case(7, 7, 9, 8, "pair")
    q, temperature = tensors[0].requires_grad_(), tensors[4].requires_grad_()
    asked = []
    original = op._contrastive_backward
    monkeypatch.setattr(op, "_contrastive_backward", lambda *a: asked.append(a[-2]) or original(*a))
    contrastive(*tensors[:4], temperature, 0.4, backend=backend, **options).sum().backward()
    assert asked == [False] and q.grad is not None and tensors[2].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_queue(backend):
    torch.manual_seed(0)
    (q, q_m, keys, queue, temperature), options = case(6, 8, 0, 16, "id")
    del options["queue_ids"]
    got = contrastive(q, q_m, keys, None, temperature, 0.4, backend=backend, **options)
    assert torch.equal(got, contrastive(q, q_m, keys, queue, temperature, 0.4, backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_no_rows(backend):
    q, keys = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = contrastive(q, q.detach(), keys, None, temperature, 0.4, backend=backend)
    loss.sum().backward()
    assert loss.shape == (0,) and q.grad.shape == (0, 8)
    assert not keys.grad.any() and not temperature.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_a_nan_key_reaches_all(backend):
    torch.manual_seed(0)
    tensors, options = case(5, 5, 40, 16, "pair")
    tensors[0][2, 3] = float("nan")
    losses = contrastive(*tensors, 0.4, backend=backend, **options)
    assert losses.isnan().tolist() == [False, False, True, False, False]
    tensors[3][17, 0] = float("nan")
    assert contrastive(*tensors, 0.4, backend=backend, **options).isnan().all()


@pytest.mark.parametrize("slice_elements", [1, 100, 10_000])
def test_the_size_of_slices_changes_nothing(monkeypatch, slice_elements):
    torch.manual_seed(0)
    tensors, options = case(9, 30, 200, 16, "id")
    upstream = torch.randn(9)
    whole, gradients = differentiate(contrastive, tensors, 0.4, options, upstream)
    monkeypatch.setattr(op, "SLICE_ELEMENTS", slice_elements)
    parts, part_gradients = differentiate(contrastive, tensors, 0.4, options, upstream)
    torch.testing.assert_close(parts, whole)
    for name, gradient in gradients.items():
        torch.testing.assert_close(part_gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("units", [1, 7, 400])
def test_the_number_of_shares_changes_nothing(monkeypatch, units):
    """One program over all keys, or one share per tile: the GPU's size does not change the result."""
    streaming = pytest.importorskip("blip_kernels.gpu.streaming")
    torch.manual_seed(0)
    tensors, options = case(20, 40, 300, 16, "id")
    upstream = torch.randn(20)
    monkeypatch.setattr(streaming, "MULTIPROCESSOR_COUNTS", {80: units})
    loss, gradients = differentiate(lambda *a, **k: contrastive(*a, **k, backend="triton"), tensors, 0.4,
                                    options, upstream)
    exact, exact_gradients = differentiate(textbook, [x.double() for x in tensors], 0.4, options, upstream)
    torch.testing.assert_close(loss.double(), exact, atol=LOSS, rtol=LOSS)
    close(gradients, exact_gradients, upstream, 0.07, GRADIENT[torch.float32])


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    tensors, options = case(9, 9, 50, 16, "pair")
    upstream = torch.randn(9)
    plain, gradients = differentiate(contrastive, tensors, 0.4, options, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_gradients = differentiate(contrastive, tensors, 0.4, options, upstream)
    assert torch.equal(plain, cast) and torch.equal(gradients["queries"], cast_gradients["queries"])


def test_bfloat16_twin_computes_in_float32():
    """The dtype rounds inputs and returned gradients, and nothing between them."""
    torch.manual_seed(0)
    tensors, options = case(9, 9, 50, 16, "pair", torch.bfloat16)
    got, gradients = differentiate(contrastive, tensors, 0.4, options, torch.ones(9))
    want, exact = differentiate(textbook, [x.double() for x in tensors], 0.4, options, torch.ones(9))
    torch.testing.assert_close(got.double(), want, atol=LOSS, rtol=LOSS)
    assert gradients["queries"].dtype == torch.bfloat16
    torch.testing.assert_close(gradients["queries"].double(), exact["queries"], atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend, kind):
    (q, q_m, keys, queue, temperature), options = case(4, 6, 9, 16, kind)
    item_ids = torch.cat([options["key_ids"], options["queue_ids"]]) if kind == "id" else None
    inputs = [x.requires_grad_() for x in (q, keys, temperature)]
    torch.library.opcheck(op._contrastive,
                          (inputs[0], q_m, inputs[1], queue, inputs[2], 0.4, options.get("ids"), item_ids,
                           options.get("first_own_key", 0), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    torch.manual_seed(0)
    tensors, options = case(6, 6, 20, 16, "id")

    def both_ways(q, q_m, keys, queue, temperature, alpha, **options):
        loss = contrastive(q * 1.0, q_m, keys, queue, temperature, alpha, backend=backend, **options)
        return (loss + contrastive(keys, q_m, q * 2.0, queue, temperature, alpha, backend=backend,
                                   **options)) / 2

    compiled = torch.compile(both_ways, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(6)
    want, want_gradients = differentiate(both_ways, tensors, 0.4, options, upstream)
    got, got_gradients = differentiate(compiled, tensors, 0.4, options, upstream)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_gradients, want_gradients)


def faulty_calls():
    q, t = torch.randn(4, 8), torch.tensor(0.1)
    ids = torch.arange(4)
    yield "queries must be floating", (q[0], q[0], q, None, t, 0.4), {}
    yield "queries must be floating", (q.long(), q.long(), q, None, t, 0.4), {}
    yield "momentum_queries must be \\(4, 8\\)", (q, q[:3], q, None, t, 0.4), {}
    yield "batch_keys must be \\[any, 8\\]", (q, q, torch.randn(4, 7), None, t, 0.4), {}
    yield "queue_keys must be torch.float32", (q, q, q, q.half(), t, 0.4), {}
    yield "queue_keys must be torch.float32 on cpu", (q, q, q, q.to("meta"), t, 0.4), {}
    yield "temperature must be one", (q, q, q, None, torch.ones(2), 0.4), {}
    yield "alpha must lie in \\[0, 1\\], got 1.5", (q, q, q, None, t, 1.5), {}
    yield "first_own_key 1 with 4 rows leaves the 4 keys", (q, q, q, None, t, 0.4), {"first_own_key": 1}
    yield "first_own_key -1", (q, q, q, None, t, 0.4), {"first_own_key": -1}
    yield "first_own_key 1 and ids exclude", (q, q, q, None, t, 0.4), {"first_own_key": 1, "ids": ids}
    yield "need ids", (q, q, q, None, t, 0.4), {"key_ids": ids}
    yield "both empty", (q, q, q[:0], None, t, 0.4), {"ids": ids, "key_ids": ids[:0]}
    yield "queue_ids are needed", (q, q, q, q, t, 0.4), {"ids": ids}
    yield "key_ids must be int64 \\[3\\]", (q, q, q[:3], None, t, 0.4), {"ids": ids}
    yield "ids must be int64 \\[4\\]", (q, q, q, None, t, 0.4), {"ids": ids.int()}
    yield "backend 'fast' is not known", (q, q, q, None, t, 0.4), {"backend": "fast"}
    wide = torch.randn(4, 257)
    yield "features up to 256 wide", (wide, wide, wide, None, t, 0.4), {"backend": "triton"}


@pytest.mark.parametrize(("message", "arguments", "options"), list(faulty_calls()),
                         ids=lambda x: re.sub(r"\W+", " ", x) if isinstance(x, str) else "")
def test_bad_input_is_named(message, arguments, options):
    if options.get("backend") == "triton" and triton_cannot(arguments[0]):
        pytest.skip("Triton neither runs nor is interpreted here")
    with pytest.raises(ValueError, match=message):
        contrastive(*arguments, **options)


MEMORY = textwrap.dedent("""
    import sys, torch
    import torch.nn.functional as F
    from blip_kernels.contrastive import contrastive
    def status(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024
    def published(q, q_m, batch, queue, t, alpha):
        keys = torch.cat([batch, queue])
        with torch.no_grad():
            soft = torch.softmax(q_m @ keys.T / t, dim=1)
            targets = alpha * soft + (1 - alpha) * torch.eye(len(q), len(keys))
        return -(targets * torch.log_softmax(q @ keys.T / t, dim=1)).sum(1)
    def step(function, rows, queued):
        q, q_m, batch, queue = (F.normalize(torch.randn(n, 256), dim=1) for n in (rows, rows, rows, queued))
        t = torch.tensor([0.07], requires_grad=True)
        q.requires_grad_()
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        function(q, q_m, batch, queue, t, 0.4).mean().backward()
        assert q.grad.isfinite().all()
        return status("VmHWM") - before
    function = {"streamed": contrastive, "published": published}[sys.argv[1]]
    step(function, 16, 128)  # libraries and threads are loaded
    print(step(function, 512, 57600))
""")


@pytest.mark.skipif(sys.platform != "linux",
                    reason="the peak of a process's memory is read and reset in /proc")
@pytest.mark.parametrize(("form", "least", "most"), [("streamed", 0, 64), ("published", 700, 2000)])
def test_memory_beyond_the_inputs(form, least, most):
    """Forward and backward at 512 rows, 57,600 queued keys, 256 wide, float32, in a process of its own: the
    most resident memory that the kernel has counted since the inputs were made, less what was resident then.
    One matrix of logits would be 119 MB.
    """
    out = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True,
                         check=True).stdout
    assert least <= float(out) <= most, f"{float(out):.0f} MB"
