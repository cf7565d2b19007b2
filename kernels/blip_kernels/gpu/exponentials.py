"""Softmax weights, two at a time and some without the MUFU: for sm_100, whose tensor cores outrun it.

A pass of attention's forward over 128 × 256 logits takes 1,024 cycles of B200's tensor cores and 2,048 of its
MUFU if the MUFU computes every exponential. So five of sixteen pairs are computed on the FMA pipe, as
FlashAttention-4 does (Zadouri et al. 2026), and every multiply, add and multiply-add takes two numbers at
once (PTX `f32x2`):

    x = max(s · scale − reference, −126)
    t = x + magic            magic = 1.5 · 2²³ rounds to an integer, which t's low bits hold
    f = x − (t − magic)      in [−½, ½]
    2^x = 2^f · 2^(x − f)    2^f by a cubic, the integer added to its exponent

The cubic's relative error is 1.01e-4, a fifth of float16's rounding of the weights. Weights below 2^−126 are
0 on the MUFU and 2^−126 here. A NaN stays a NaN on the MUFU and becomes 3.4e38 here, which is infinite as a
16-bit weight: a non-finite input still gives a non-finite output.

Triton's interpreter cannot run PTX and uses the plain formulas; tests/kernels/test_exponentials.py runs the
PTX text itself.
"""

# Triton's stubs do not know that a constexpr stands for its value.
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from blip_kernels.gpu.kernel_launch import INTERPRETED

PACK = 32  # weights of one block of PTX
POLYNOMIAL_PAIRS = (1, 4, 7, 10, 13)  # of the sixteen pairs in a block
# Minimax of 2^f on [−½, ½] in relative error, c₀ = 1.
CUBIC = (0x3F800000, 0x3F317AFD, 0x3E780627, 0x3D61510C)
MAGIC, LEAST = 0x4B400000, 0xC2FC0000  # 1.5 · 2²³, and −126


def pair(operation: str) -> str:
    """Return the PTX of one packed operation: $0, $1 = operation($2, $3; $4, $5)."""
    return ("{ .reg .b64 a, b; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; "
            f"{operation}.rn.f32x2 a, a, b; mov.b64 {{$0, $1}}, a; }}")


def weights_ptx() -> str:
    """Return the PTX of PACK weights: operands are outputs, then as many logits, scales, negated references."""
    lines = ["{", ".reg .b64 magic, s, scale, shift, x, t, f, y, c0, c1, c2, c3;",
             ".reg .b32 xa, xb, ta, tb, ya, yb;"]
    lines += [f"mov.b64 {name}, {{0f{bits:08X}, 0f{bits:08X}}};"
              for name, bits in zip(("magic", "c0", "c1", "c2", "c3"), (MAGIC, *CUBIC), strict=True)]
    for i, (a, b) in enumerate(zip(range(0, PACK, 2), range(1, PACK, 2), strict=True)):
        lines += [f"mov.b64 {name}, {{${first + a}, ${first + b}}};"
                  for name, first in (("s", PACK), ("scale", 2 * PACK), ("shift", 3 * PACK))]
        lines += ["fma.rn.f32x2 x, s, scale, shift;", "mov.b64 {xa, xb}, x;"]
        if i not in POLYNOMIAL_PAIRS:
            lines += [f"ex2.approx.ftz.f32 ${a}, xa;", f"ex2.approx.ftz.f32 ${b}, xb;"]
            continue
        lines += [f"max.NaN.f32 xa, xa, 0f{LEAST:08X};", f"max.NaN.f32 xb, xb, 0f{LEAST:08X};",
                  "mov.b64 x, {xa, xb};", "add.rn.f32x2 t, x, magic;", "sub.rn.f32x2 f, t, magic;",
                  "sub.rn.f32x2 f, x, f;", "fma.rn.f32x2 y, f, c3, c2;", "fma.rn.f32x2 y, f, y, c1;",
                  "fma.rn.f32x2 y, f, y, c0;", "mov.b64 {ta, tb}, t;", "mov.b64 {ya, yb}, y;",
                  "shl.b32 ta, ta, 23;", "shl.b32 tb, tb, 23;", f"add.s32 ${a}, ta, ya;",
                  f"add.s32 ${b}, tb, yb;"]
    return "\n".join([*lines, "}"])


_INTERPRETED = tl.constexpr(INTERPRETED)
_PACK = tl.constexpr(PACK)
_WEIGHTS = tl.constexpr(weights_ptx())
_WEIGHTS_REGISTERS = tl.constexpr(",".join(["=r"] * PACK + ["r"] * (3 * PACK)))
_ADD, _MULTIPLY = tl.constexpr(pair("add")), tl.constexpr(pair("mul"))
_PAIR_REGISTERS = tl.constexpr("=r,=r,r,r,r,r")


@triton.jit
def weights(b_s, scale, b_reference):
    """2^(b_s · scale − b_reference) of logits [rows, columns], PACK or more per thread, a reference per row."""
    if _INTERPRETED:
        return tl.exp2(b_s * scale - b_reference[:, None])
    return tl.inline_asm_elementwise(_WEIGHTS, _WEIGHTS_REGISTERS, [b_s, scale, -b_reference[:, None]],
                                     dtype=tl.float32, is_pure=True, pack=_PACK)


@triton.jit
def row_sum(b_x):
    """Sum of each row, [rows, columns] → [rows]; even and odd columns are added two at a time."""
    if _INTERPRETED:
        return tl.sum(b_x, 1)
    b_even, b_odd = tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))
    b_even, b_odd = tl.reduce((b_even, b_odd), 1, _added)
    return b_even + b_odd


@triton.jit
def scaled(b_x, b_factor):
    """b_x [rows, columns] times one factor per row."""
    if _INTERPRETED:
        return b_x * b_factor[:, None]
    return tl.inline_asm_elementwise(_MULTIPLY, _PAIR_REGISTERS, [b_x, b_factor[:, None]],
                                     dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _added(a_even, a_odd, b_even, b_odd):
    return tl.inline_asm_elementwise(_ADD, _PAIR_REGISTERS, [a_even, a_odd, b_even, b_odd],
                                     dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
