"""The language model's head and loss in one op: cross-entropy with label smoothing, without stored logits.

    x[t] = weight · hidden[t] + bias                                                [vocabulary]
    loss[t] = logsumexp(x[t]) − (1 − ε) · x[t, target] − ε / V · Σ x[t]         0 if the target is ignored
    d x[t] = d loss[t] · (softmax(x[t]) − ε / V − (1 − ε) · onehot(target))

with ε the label smoothing: the formula of `F.cross_entropy(F.linear(hidden, weight, bias).float(), …)`, whose
logits and their copies take 30,524 × 12 bytes per token. Here forward and backward process the vocabulary in
chunks.

What the backward computes and why (T tokens, width D, vocabulary V; a product of T × D × V costs 2TDV FLOPs):

- Here: logits are computed again (2TDV), d logits of one chunk of the vocabulary are written in the input
  dtype, and two products read them, d hidden += d logits · weight and d weight = d logitsᵀ · hidden (2TDV
  each). With the forward that is 8TDV, against 6TDV of the plain form. A chunk of 32 MiB stays in an A100's
  or H100's L2, is written once and read twice: T × V × 6 bytes, which at 5 TB/s take as long as 2TDV FLOPs of
  D = 400 at 700 TFLOP/s (data sheets and estimates, not measurements). Sums over chunks are float32 and
  rounded once; rows of d weight are complete within one chunk.
- Kernels that fuse the recomputation into both products would write no d logits. But a program that makes all
  of a row's d hidden holds D = 768 accumulators per row: 64 rows fill three quarters of an SM's registers.
  With D split over n programs, each recomputes the logits for both products: (6 + 4n)TDV, 18TDV at 256
  columns per program.
- Gradients made in the forward over chunks of rows (6TDV) would read and write a float32 d weight (94 MB) for
  each chunk, and assume one gradient of the loss for all rows: no `reduction="none"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_kernels.backends import op_backend
from blip_kernels.cpu.products import matmul
from blip_kernels.linear import linear

# The twin's sizes, in float32 elements. A tile is computed, summed and turned into gradients while it is in a
# cache.
ROWS = 2048  # rows of a tile, at most
TILE = 1 << 20
WIDTHS = 256, 4096  # columns of a chunk, within these bounds
# Softmax values that the forward may keep: the backward does not recompute this bounded part of the
# vocabulary.
KEPT = 1 << 23
PLAIN = 1 << 20  # up to so many logits are left to PyTorch


# --------------------------------------------------------------------------------------------- the eager twin


def _plan(rows: int, vocabulary: int, keep: bool) -> tuple[int, int, int]:
    """Return the width of a chunk of the vocabulary, and the numbers of chunks and of columns that are kept.

    It is arithmetic only: `rows` may be symbolic under torch.compile.
    """
    tile_rows = torch.sym_max(torch.sym_min(rows, ROWS), 1)
    width = torch.sym_min(torch.sym_max(TILE // tile_rows, WIDTHS[0]), WIDTHS[1])
    chunks = (vocabulary + width - 1) // width
    kept = torch.sym_min(KEPT // (torch.sym_max(rows, 1) * width) * width, vocabulary) if keep else 0
    return width, chunks, kept  # pyright: ignore[reportReturnType]


def _spans(end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, end)) for start in range(0, end, step))


def _forward_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
                       ignore_index: int, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses [rows], log-sum-exp of each chunk [chunks, rows], softmax in the kept chunks (flat)."""
    rows, vocabulary = len(hidden), len(weight)
    _check_targets(targets, vocabulary, ignore_index)
    wide = torch.promote_types(dtype, torch.float32)
    width, chunks, kept_columns = _plan(rows, vocabulary, keep)
    hidden = hidden.to(dtype)
    chunk_lse = hidden.new_empty(chunks, rows, dtype=wide)
    kept = hidden.new_empty(rows * kept_columns, dtype=wide)
    logit_sum, target_logit = (hidden.new_zeros(rows, dtype=wide) for _ in range(2))
    for number, (c0, c1) in enumerate(_spans(vocabulary, width)):
        for r0, r1 in _spans(rows, ROWS):
            logits = _logits(hidden[r0:r1], weight, bias, c0, c1)
            place = _kept_tile(kept, rows, c0, c1, r0, r1) if c1 <= kept_columns else None
            softmax = torch.softmax(logits, 1, out=place)
            # logits = log softmax + log-sum-exp, which is exact at the largest logit: read it there.
            chunk_lse[number, r0:r1] = logits.amax(1) - softmax.amax(1).log_()
            if smoothing:
                logit_sum[r0:r1] += logits.sum(1)
            at, column = _targets_within(targets[r0:r1], c0, c1)
            target_logit[r0 + at] = logits[at, column]
    losses = torch.logsumexp(chunk_lse, 0) - (1.0 - smoothing) * target_logit
    if smoothing:
        losses -= smoothing / vocabulary * logit_sum
    return losses.masked_fill_(targets == ignore_index, 0.0), chunk_lse, kept


def _backward_reference(d_losses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
                        targets: Tensor, chunk_lse: Tensor, kept: Tensor, smoothing: float, ignore_index: int,
                        dtype: torch.dtype, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias; those that `needs` excludes are empty."""
    rows, vocabulary, wide = len(hidden), len(weight), chunk_lse.dtype
    width, kept_columns = _plan(rows, vocabulary, True)[0], len(kept) // max(rows, 1)
    per_row, unit = upstream(d_losses, targets, ignore_index, dtype)
    low = hidden.to(dtype)
    d_hidden = torch.zeros_like(hidden if needs[0] else hidden[:0], dtype=wide)
    d_weight = torch.empty_like(weight if needs[1] else weight[:0])
    d_bias = hidden.new_zeros(vocabulary if needs[2] else 0, dtype=wide)
    lse = torch.logsumexp(chunk_lse, 0)
    for number, (c0, c1) in enumerate(_spans(vocabulary, width)):
        share = torch.exp(chunk_lse[number] - lse) * per_row
        chunk_weight = weight[c0:c1].to(dtype)
        d_chunk = hidden.new_zeros(c1 - c0 if needs[1] else 0, hidden.shape[1], dtype=wide)
        for r0, r1 in _spans(rows, ROWS):
            if c1 <= kept_columns:
                d_logits = _kept_tile(kept, rows, c0, c1, r0, r1) * share[r0:r1, None]
            else:
                d_logits = torch.softmax(_logits(low[r0:r1], weight, bias, c0, c1),
                                         1).mul_(share[r0:r1, None])
            if smoothing:
                d_logits -= (smoothing / vocabulary * per_row[r0:r1])[:, None]
            at, column = _targets_within(targets[r0:r1], c0, c1)
            d_logits[at, column] -= (1.0 - smoothing) * per_row[r0 + at]
            if needs[2]:
                d_bias[c0:c1] += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            if needs[1]:
                _add_product(d_chunk, d_logits.T, low[r0:r1])
            if needs[0]:
                _add_product(d_hidden[r0:r1], d_logits, chunk_weight)
        if needs[1]:
            torch.mul(d_chunk, unit, out=d_weight[c0:c1])
    d_bias = (d_bias * unit).to(hidden.dtype if bias is None else bias.dtype)
    return (d_hidden * unit).to(hidden.dtype), d_weight, d_bias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, c0: int, c1: int) -> Tensor:
    """Return the logits of a tile in float32 or wider, computed in `hidden`'s dtype."""
    part = linear(hidden, weight[c0:c1].to(hidden.dtype),
                  None if bias is None else bias[c0:c1].to(hidden.dtype))
    return part.to(torch.promote_types(hidden.dtype, torch.float32))


def _kept_tile(kept: Tensor, rows: int, c0: int, c1: int, r0: int, r1: int) -> Tensor:
    """Return the view [r1 − r0, c1 − c0] of a tile; chunks are stored one after another, each contiguous."""
    width = c1 - c0
    return kept[rows * c0 + r0 * width : rows * c0 + r1 * width].view(r1 - r0, width)


def _targets_within(targets: Tensor, c0: int, c1: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose target lies in a chunk, and its column there."""
    at = ((targets >= c0) & (targets < c1)).nonzero().flatten()
    return at, targets[at] - c0


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's dtype: float32 whatever the operands' dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += matmul(a, b)


def upstream(d_losses: Tensor, targets: Tensor, ignore_index: int,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient of each row's loss, 0 for ignored rows, in a unit, and that unit (a scalar tensor).

    The mean of 2,000 rows needs d logits near 1e-8, which float16 cannot represent. In float16 the unit
    therefore makes the largest row 1,024. Products are multiplied by the unit in float32.
    """
    per_row = torch.where(targets == ignore_index, 0.0, d_losses)
    if dtype != torch.float16 or per_row.numel() == 0:
        return per_row, per_row.new_ones(())
    largest = per_row.abs().amax()
    unit = torch.where(largest > 0, largest, 1.0) / 1024
    return per_row / unit, unit


# ----------------------------------------------------------------------------------------------- registration


@torch.library.custom_op("blip_kernels::linear_cross_entropy", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
             ignore_index: int, dtype: torch.dtype, keep: bool,
             backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return _forward_reference(hidden, weight, bias, targets, smoothing, ignore_index, dtype, keep)
    from blip_kernels.gpu.linear_cross_entropy_kernels import forward

    losses, lse = forward(hidden, weight, bias, targets, smoothing, ignore_index, dtype)
    return losses, lse[None], lse.new_empty(0)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
      ignore_index: int, dtype: torch.dtype, keep: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], torch.promote_types(dtype, torch.float32)
    _, chunks, kept = _plan(rows, weight.shape[0], keep)
    if backend != "reference":
        chunks, kept = 1, 0
    shapes = (rows,), (chunks, rows), (rows * kept,)
    return tuple(hidden.new_empty(shape, dtype=wide) for shape in shapes)  # type: ignore[return-value]


@torch.library.custom_op("blip_kernels::linear_cross_entropy_backward", mutates_args=())
def _backward(d_losses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
              chunk_lse: Tensor, kept: Tensor, smoothing: float, ignore_index: int, dtype: torch.dtype,
              needs: Sequence[bool], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return _backward_reference(d_losses, hidden, weight, bias, targets, chunk_lse, kept, smoothing,
                                   ignore_index, dtype, needs)
    from blip_kernels.gpu.linear_cross_entropy_kernels import backward

    per_row, unit = upstream(d_losses, targets, ignore_index, dtype)
    return backward(per_row, unit, hidden, weight, bias, targets, chunk_lse[0], smoothing, dtype, needs)


@_backward.register_fake
def _(d_losses: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
      chunk_lse: Tensor, kept: Tensor, smoothing: float, ignore_index: int, dtype: torch.dtype,
      needs: Sequence[bool], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden.shape[1]
    return (hidden.new_empty(hidden.shape[0] if needs[0] else 0, width),
            weight.new_empty(weight.shape[0] if needs[1] else 0, width),
            (hidden if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0))


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, ctx.smoothing, ctx.ignore_index, ctx.dtype, _, ctx.backend = inputs
    _, chunk_lse, kept = output
    ctx.mark_non_differentiable(chunk_lse, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, chunk_lse, kept)


def _gradients(ctx, d_losses: Tensor | None, *_):
    if d_losses is None:
        return (None,) * 9
    needs = list(ctx.needs_input_grad[:3])
    found = _backward(d_losses, *ctx.saved_tensors, ctx.smoothing, ctx.ignore_index, ctx.dtype, needs,
                      ctx.backend)
    return *(x if needed else None for x, needed in zip(found, needs, strict=True)), *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


# ---------------------------------------------------------------------------------------- the public function


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, …)` without its logits: BLIP's LM loss.

    Under autocast the products are computed in its dtype, as in F.linear. Pass weights uncast: float32
    weights then get sums over chunks in float32. The twin computes logits in that dtype, the kernels keep
    them in float32; softmax and losses are float32 (float64 for float64). Besides inputs and gradients it
    takes memory for T × D and a bounded tile, on a CPU up to 32 MiB more from forward to backward (`KEPT`).
    On a CPU, up to a million logits are left to PyTorch (`PLAIN`), except in float16, whose d logits need a
    unit (`upstream`).

    Args:
        hidden: [rows, width], float32, bfloat16 or float16 (the twin takes float64 as well).
        weight: [vocabulary, width], same device as `hidden`, same dtype except under autocast.
        bias: [vocabulary] or None.
        targets: int64 [rows], 0 to vocabulary − 1, or `ignore_index`.
        label_smoothing: ε, the share of the target that is spread over the whole vocabulary.
        ignore_index: the target of rows that are ignored.
        reduction: `mean` over rows that are not ignored (NaN if all are, as in PyTorch), `sum`, or `none`:
            each row's loss, 0 where ignored.
        backend: `auto` (default), `triton` or `reference`, see `blip_kernels.backends.op_backend`.

    Returns:
        float32: a scalar, or [rows] with `none`. Differentiable once in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument. A target outside the
            vocabulary is an error on a CPU and makes its row's loss NaN on a GPU. A row with a NaN or
            infinite logit has a NaN or infinite loss.
    """
    dtype = _check(hidden, weight, bias, targets, label_smoothing, reduction)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    chosen = op_backend(hidden, backend)
    if chosen == "triton" and dtype == torch.float64:
        raise ValueError("backend 'triton' cannot run: hidden is float64; choose auto or reference")
    if chosen == "reference" and len(hidden) * len(weight) <= PLAIN and dtype != torch.float16:
        return _small(hidden, weight, bias, targets, label_smoothing, ignore_index, reduction)
    losses, _, _ = _forward(hidden, weight, bias, targets, float(label_smoothing), ignore_index, dtype, keep,
                            chosen)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


def _small(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
           ignore_index: int, reduction: str) -> Tensor:
    """The plain form, for few logits: nothing needs chunks, and PyTorch's own backward is the cheapest."""
    if not torch.compiler.is_compiling():
        _check_targets(targets, len(weight), ignore_index)
    logits = linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets,
                           ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float,
           reduction: str) -> torch.dtype:
    """Raise what `linear_cross_entropy` documents; return the dtype of its products."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [rows, width], got shape {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [vocabulary, {hidden.shape[1]}] as hidden's width, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as weight's rows, got {tuple(bias.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden.shape[0]}] as hidden's rows, got {targets.dtype} "
                         f"{tuple(targets.shape)}")
    for name, x in (("weight", weight), ("bias", bias), ("targets", targets)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}: move it there")
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if not all(d.is_floating_point for d in dtypes):
        raise ValueError(f"hidden, weight and bias must be floating, got {', '.join(map(str, dtypes))}")
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(set(dtypes)) > 1:
        raise ValueError(f"hidden, weight and bias must share one dtype, got {', '.join(map(str, dtypes))}")
    return hidden.dtype


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(wrong.any()):
        raise ValueError(f"targets must lie in 0 to {vocabulary - 1} or be {ignore_index}, got "
                         f"{int(targets[wrong][0])}")
