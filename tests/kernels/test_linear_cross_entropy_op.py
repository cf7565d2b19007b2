"""blip_kernels.linear_cross_entropy as an op: registration, compilation, bad input, and memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from blip_kernels.linear_cross_entropy import linear_cross_entropy
from cross_entropies import BACKENDS, inputs, module, small_tiles


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, keep):
    (hidden, weight, bias), targets = inputs(9, 12, 40)
    for b in (bias, None):
        arguments = (hidden, weight, b, targets, 0.1, -100, torch.float32, keep, backend)
        torch.library.opcheck(torch.ops.blip_kernels.linear_cross_entropy.default, arguments)
    losses, lse, kept = torch.ops.blip_kernels.linear_cross_entropy(*arguments)
    tensors = [x.detach() for x in (losses, hidden, weight, bias, targets, lse, kept)]
    torch.library.opcheck(torch.ops.blip_kernels.linear_cross_entropy_backward.default,
                          (*tensors, 0.1, -100, torch.float32, [True, False, True], backend))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, dynamic):
    def head(hidden, weight, bias, targets):
        return linear_cross_entropy(hidden.tanh(), weight, bias, targets, backend=backend) * 2

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 21):
        tensors, targets = inputs(rows, 12, 40)
        expected = torch.autograd.grad(head(*tensors, targets), tensors)
        for a, b in zip(torch.autograd.grad(compiled(*tensors, targets), tensors), expected, strict=True):
            torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------------------------------- errors


def faulty_calls():
    h, w, b, t = torch.randn(4, 8), torch.randn(10, 8), torch.randn(10), torch.tensor([1, 2, -100, 9])
    yield "hidden must be", (h[0], w, b, t), {}
    yield "weight must be", (h, w.T, b, t), {}
    yield "bias must be", (h, w, b[:3], t), {}
    yield "targets must be int64", (h, w, b, t.int()), {}
    yield "targets must be int64", (h, w, b, t[:3]), {}
    yield "targets must lie in 0 to 9 or be -99, got 10", (h, w, b, t + 1), {"ignore_index": -99}
    yield "targets must lie in 0 to 9 or be 5, got -100", (h, w, b, t), {"ignore_index": 5}
    yield "label_smoothing", (h, w, b, t), {"label_smoothing": 1.5}
    yield "reduction", (h, w, b, t), {"reduction": "max"}
    yield "share one dtype", (h.half(), w, b, t), {}
    yield "must be floating", (h.long(), w.long(), b.long(), t), {}
    yield "weight is on meta", (h, w.to("meta"), b, t), {}
    yield "backend 'fast' is not known", (h, w, b, t), {"backend": "fast"}
    yield "hidden is float64", (h.double(), w.double(), b.double(), t), {"backend": "triton"}


@pytest.mark.parametrize(("message", "arguments", "options"), list(faulty_calls()),
                         ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_named(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)


def test_bad_target_is_named_for_few_logits_too(monkeypatch):
    monkeypatch.setattr(module, "PLAIN", 1 << 20)
    with pytest.raises(ValueError, match="targets must lie in 0 to 9"):
        linear_cross_entropy(torch.randn(2, 8), torch.randn(10, 8), None, torch.tensor([1, 10]))


def test_kernel_marks_a_bad_target():
    (hidden, weight, bias), targets = inputs(5, 8, 40, ignored=0.0)
    targets[2] = 40
    loss = linear_cross_entropy(hidden, weight, bias, targets, reduction="none", backend="triton")
    assert loss.isnan().tolist() == [False, False, True, False, False]


# ----------------------------------------------------------------------------------------------------- memory

MEMORY = textwrap.dedent("""
    import re, sys, torch, torch.nn.functional as F
    from pathlib import Path
    from blip_kernels.linear_cross_entropy import linear_cross_entropy
    def status(name):
        return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
    hidden, weight, bias = tensors = torch.randn(2048, 768), torch.randn(30524, 768), torch.randn(30524)
    for x in tensors:
        x.requires_grad_()
    targets = torch.randint(30524, (2048,))
    def step(rows):
        if sys.argv[1] == "plain":
            loss = F.cross_entropy(F.linear(hidden[:rows], weight, bias).float(), targets[:rows], label_smoothing=0.1)
        else:
            loss = linear_cross_entropy(hidden[:rows], weight, bias, targets[:rows])
        return torch.autograd.grad(loss, tensors)
    step(64)  # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    gradients = step(2048)
    print(status("VmHWM") - before - sum(x.nbytes for x in gradients) / 2**20)
""")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_memory_is_an_eighth_of_the_plain_form():
    """Peak of forward and backward, 2,048 tokens × 30,524 words, MiB beyond the inputs; the size of the
    gradients is taken off both forms alike (the plain form's peak comes before it makes that of the weight,
    so it gains by that)."""
    peak = {}
    for form in ("plain", "ours"):
        run = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True, check=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
        peak[form] = float(run.stdout)
    assert peak["plain"] > 2 * 238, peak  # logits of 238 MiB are there twice at least
    assert 0 < peak["ours"] < peak["plain"] / 8, peak
