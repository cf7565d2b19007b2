"""Helpers for tests of linear_cross_entropy: formula in float64, inputs, comparison of loss and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch
from blip_kernels.linear_cross_entropy import linear_cross_entropy

# The package exports the function of the same name, which hides the module from a plain import.
module = importlib.import_module("blip_kernels.linear_cross_entropy")
BACKENDS = ("reference", "triton")
NAMES = ("hidden", "weight", "bias")
# Errors against the float64 formula of the rounded inputs. float32 sums of up to 300 products of size 1 are
# off by a few 1e-6, and so is TF32 in three passes (the kernels). float16 rounds d logits, each of the twin's
# partial products and the gradients (of size 10) to 2⁻¹¹ of themselves.
TOLERANCE = {torch.float32: {"atol": 5e-6, "rtol": 2e-5}, torch.float16: {"atol": 1e-2, "rtol": 4e-3},
             torch.float64: {"atol": 1e-12, "rtol": 1e-12}}


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile sizes with which small tests reach every loop: chunks with a remainder, blocks of rows, columns
    kept and not."""
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "TILE", 8 * 16)
    monkeypatch.setattr(module, "WIDTHS", (16, 40))
    monkeypatch.setattr(module, "KEPT", 700)
    monkeypatch.setattr(module, "PLAIN", 0)


def textbook(hidden, weight, bias, targets, smoothing, ignore_index, reduction):
    """The formula, row by row: −Σ target distribution · log softmax."""
    losses = []
    for h, t in zip(hidden, targets.tolist(), strict=True):
        logits = weight @ h + (0 if bias is None else bias)
        if t == ignore_index:
            losses.append(logits.sum() * 0)
            continue
        log_p = logits - logits.max() - (logits - logits.max()).exp().sum().log()
        distribution = torch.full_like(log_p, smoothing / len(weight))
        distribution[t] += 1 - smoothing
        losses.append(-(distribution * log_p).sum())
    losses = torch.stack(losses) if losses else hidden.new_zeros(0)
    counted = int((targets != ignore_index).sum())
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted if counted
            else losses.sum() / 0.0}[
        reduction]


def inputs(rows, width, vocabulary, dtype=torch.float32, seed=0, ignored=0.25, bias=True, ignore_index=-100):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 2 / width**0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = ignore_index
    return [None if x is None else x.requires_grad_() for x in (hidden, weight, bias)], targets


def check(backend, tensors, targets, smoothing=0.1, ignore_index=-100, reduction="mean",
          tolerance=None, seed=1):
    """Compare the loss and all gradients, given a random gradient of the loss."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    loss = linear_cross_entropy(*tensors, targets, label_smoothing=smoothing, ignore_index=ignore_index,
                                reduction=reduction, backend=backend)
    expected = textbook(*exact, targets, smoothing, ignore_index, reduction)
    tolerance = tolerance or TOLERANCE[tensors[0].dtype]
    assert loss.dtype == torch.promote_types(tensors[0].dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)
    given_grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss.backward(given_grad.to(loss.dtype))
    expected.backward(given_grad)
    for name, x, e in zip(NAMES, tensors, exact, strict=True):
        if x is not None:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
            torch.testing.assert_close(x.grad.double(), e.grad, msg=lambda m, n=name: f"d {n}: {m}",
                                       **tolerance)
