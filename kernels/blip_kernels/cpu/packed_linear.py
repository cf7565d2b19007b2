"""Linear layers on a CPU with packed weights: stored in the order that products read. For inference only.

    out = x weightᵀ + bias,  or its GELU (the exact one, by erf) before it is rounded

A plain `F.linear` packs the weight in every call, which for the few rows of a decoding step takes as long as
the product. `blip_kernels.cpu.products` says which library packs: MKL or oneDNN. If the processor has no
16-bit products, the weight is packed in float32, and each result is rounded once.

A row's result is the same to the last bit for any number of rows. Each library needs something for that:

- MKL computes the remainder of a multiple of `MKL_ROWS_TOGETHER` rows in another way, so it gets a multiple.
  Widths that its vectors do not divide (`MKL_MULTIPLE`) are left to oneDNN.
- oneDNN computes a single row in another way, so that row is computed together with a copy of itself.
- oneDNN with AMX sums in an order that depends on the number of rows. So rows are computed in blocks of one
  size, `row_blocks`, and the last block is filled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blip_kernels.cpu import processor, products

PACKED_DTYPES = (torch.float32, torch.bfloat16)
MKL_ROWS_TOGETHER = 4
MKL_MULTIPLE = 16  # of inputs and outputs
ROWS = 64  # default number of rows to pack a weight for; the packed weight takes any number
BLOCK = 128  # rows that AMX multiplies together by default, see `row_blocks`

# Rows of a block, and whether a block is one input.
_block: ContextVar[tuple[int, bool]] = ContextVar("row_blocks", default=(BLOCK, False))


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in the order in which a library reads it."""

    tensor: Tensor  # opaque (layout `torch._mkldnn`)
    library: Literal["mkl", "onednn"]
    shape: torch.Size  # [out, in]
    dtype: torch.dtype  # of the weight and the activations; slow types are multiplied as float32

    def to_dense(self) -> Tensor:
        """Return the original weight, to the bit."""
        if self.library == "onednn":
            return self.tensor.to_dense().to(self.dtype)
        identity = torch.eye(self.shape[1])  # products with 1 and 0 are exact
        return _mkl(identity, self, None).t().contiguous().to(self.dtype)


@contextmanager
def row_blocks(rows: int, one_input: bool = False) -> Iterator[None]:
    """Inside, rows come in blocks of this size, and AMX multiplies one block at a time.

    With `one_input`, rows always come as one whole block that is an input by itself (an image). Then nothing
    is filled up, and a row's result may depend on the whole block.
    """
    before = _block.set((rows, one_input))
    try:
        yield
    finally:
        _block.reset(before)


def is_one_input(rows: Tensor) -> bool:
    """Whether these rows [rows, in] are one block that is an input by itself."""
    size, one_input = _block.get()
    return one_input and len(rows) == size


def sums_depend_on_rows(dtype: torch.dtype) -> bool:
    """Whether packed products of this dtype sum in an order that depends on the numbers of rows and threads."""
    return dtype == torch.bfloat16 and processor.has_amx()


def packing_cannot(weight: Tensor) -> str | None:
    """Return why a weight cannot be packed here, or None if it can."""
    if weight.device.type != "cpu":
        return f"it is for a CPU, and the weight is on {weight.device}"
    if weight.dtype not in PACKED_DTYPES:
        return f"it takes float32 and bfloat16, not {weight.dtype}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    return None


def pack_weight(weight: Tensor, rows: int = ROWS) -> PackedWeight:
    """Copy a weight into the order in which products read it.

    Args:
        weight: [out, in], float32 or bfloat16, on a CPU.
        rows: the number of rows to be fast for.

    Raises:
        ValueError: it is not a matrix, or cannot be packed here; the message says why.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [out, in], got shape {tuple(weight.shape)}")
    if reason := packing_cannot(weight):
        raise ValueError(f"a weight cannot be packed: {reason}")
    dense = weight.detach().contiguous()
    if products.is_slow(weight):
        dense = dense.float()
    by_mkl = dense.dtype == torch.float32 and products.prefers_mkl() and not any(
        size % MKL_MULTIPLE for size in weight.shape)
    packed = (torch.ops.mkl._mkl_reorder_linear_weight(dense, rows) if by_mkl
              else torch.ops.mkldnn._reorder_linear_weight(dense))
    return PackedWeight(packed, "mkl" if by_mkl else "onednn", weight.shape, weight.dtype)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *,
                  gelu: bool = False) -> Tensor:
    """x [..., in] → [..., out] in x's dtype.

    Args:
        x: float32 or bfloat16, same as the weight.
        packed: [out, in], from `pack_weight`.
        bias: [out], same dtype.
        gelu: apply GELU to the result before it is rounded.

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument requires grad while gradients are recorded:
            use `F.linear`, or `torch.no_grad()`.
    """
    if not isinstance(packed, PackedWeight):
        raise ValueError("packed must come from pack_weight, got a plain tensor: use F.linear")
    check_operands(x, bias, packed.shape, packed.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if products.is_slow(rows):
        rows, bias = rows.float(), None if bias is None else bias.float()
    parts = [_product(_fill(part, packed.library), packed, bias, gelu)[: len(part)] for part in _parts(rows)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.to(x.dtype).view(*x.shape[:-1], packed.shape[0])


def _parts(rows: Tensor) -> Sequence[Tensor]:
    size = _block.get()[0]
    return rows.split(size) if len(rows) > size and sums_depend_on_rows(rows.dtype) else [rows]


def _fill(rows: Tensor, library: str) -> Tensor:
    """Append copies of the last row, up to a number of rows that gives each row the same bits as always."""
    number = len(rows)
    if number == 0 or is_one_input(rows):
        return rows
    if sums_depend_on_rows(rows.dtype):
        lacking = _block.get()[0] - number
    elif library == "mkl":
        lacking = -number % MKL_ROWS_TOGETHER
    else:
        lacking = int(number == 1)
    return torch.cat([rows, rows[-1:].expand(lacking, -1)]) if lacking else rows


def _product(rows: Tensor, packed: PackedWeight, bias: Tensor | None, gelu: bool) -> Tensor:
    if len(rows) == 0:
        return rows.new_empty(0, packed.shape[0])
    if packed.library == "mkl":
        out = _mkl(rows, packed, bias)
        return torch.ops.aten.gelu_(out) if gelu else out
    return torch.ops.mkldnn._linear_pointwise(rows, packed.tensor, bias, "gelu" if gelu else "none", [],
                                              "none" if gelu else "")


def _mkl(rows: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    # The operator reads the plain weight only if the number of rows differs from the one passed. Otherwise it
    # needs just its shape: one expanded number is enough.
    shape_alone = rows.new_zeros(1).expand(packed.shape)
    return torch.ops.mkl._mkl_linear(rows.contiguous(), packed.tensor, shape_alone, bias, len(rows))


def check_operands(x: Tensor, bias: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise ValueError as `packed_linear` does, for a weight of this shape and dtype."""
    if x.shape[-1:] != shape[1:] or x.dtype != dtype:
        raise ValueError(f"x must be {dtype} [..., {shape[1]}] as the weight, got {x.dtype} {tuple(x.shape)}")
    if bias is not None and (bias.shape != shape[:1] or bias.dtype != dtype):
        raise ValueError(f"bias must be {dtype} [{shape[0]}] as the weight, got {bias.dtype} {tuple(bias.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("x or bias requires grad, but a packed layer has no gradient: call it under torch.no_grad(), "
                         "or take F.linear")
