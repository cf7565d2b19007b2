"""The type that a model computes in: what `auto` means on a device, and the advice about types that the
device does not multiply."""

from __future__ import annotations

import sys
from functools import cache

import torch
from blip_kernels.cpu import processor

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str, device: torch.device, differentiable: bool = False) -> str:
    """Which precision one of PRECISIONS means on a device: `auto` is resolved, another name stays.

    `auto` is bfloat16 where a GPU or CPU multiplies it, float16 on other GPUs, else float32. For the
    gradients of one image (`differentiable`) it is always float32: rounding would show in the map, and speed
    hardly matters for one image.

    Raises ValueError for a name that is none of them.
    """
    if name not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "auto":
        return name
    return "float32" if differentiable else _best(device)


def parameter_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of a model's parameters in a resolved precision; with `int8`, of the parameters that are not
    8-bit weights."""
    return TYPES[_best(device) if precision == "int8" else precision]


def check(precision: str, device: torch.device) -> None:
    """Raises ValueError for float16 on a CPU without products of it, where every other precision is
    faster."""
    if precision == "float16" and device.type == "cpu" and not processor.has_float16():
        raise ValueError("dtype float16 has no products on this CPU and is slower than float32 here: choose "
                         f"{_best(device)}, as auto does, or a device that multiplies float16")


def advice(name: str, device: torch.device) -> str | None:
    """One line with the better choice if a named precision gains nothing on a device; None if it gains."""
    here, best = _kind(device), _best(device)
    if (name == "bfloat16" and best != name) or (name == "float16" and device.type == "cpu"
                                                 and not processor.has_float16()):
        return (f"precision: {name} (right, but slower than {best} on this {here}, which has no products of "
                f"it: {best} or auto is the better choice)")
    if name == "int8" and device.type == "cpu" and (not processor.has_int8() or processor.has_amx()):
        why = "multiplies bfloat16 as fast" if processor.has_amx() else "has no products of 8-bit integers"
        return f"precision: int8 (saves memory, not time, on this {here}, which {why}; all else in {best})"
    return None


def explained(name: str, device: torch.device, differentiable: bool = False, hint: str = "") -> str:
    """One line that says what a name means on a device, and why; `hint` is added where that has 16 bits.
    Raises ValueError as `resolve`."""
    precision, here = resolve(name, device, differentiable), _kind(device)
    if (line := advice(name, device)) is not None:
        return line
    if name == "auto" and differentiable:
        why = " (gradients are computed in it)"
    elif precision == "int8":
        why = f" (all else in {_best(device)})"
    elif precision == "float32":
        why = f" (this {here} has no products of bfloat16)" * (name == "auto")
    else:
        why = f" (this {here} multiplies it{hint})"
    return f"precision: {precision}{why}"


@cache
def say(line: str) -> None:
    """Print a line on the error stream, once per process, however many models it loads."""
    print(f"blip-fast: {line}", file=sys.stderr, flush=True)


def _best(device: torch.device) -> str:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if device.type == "cpu" and processor.has_bfloat16() else "float32"


def _kind(device: torch.device) -> str:
    return {"cuda": "GPU", "cpu": "processor"}.get(device.type, "device")
