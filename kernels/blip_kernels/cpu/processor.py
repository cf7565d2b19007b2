"""What this machine's processor multiplies in hardware, as far as oneDNN may use it.

`ONEDNN_MAX_CPU_ISA` limits what oneDNN uses; a better processor then counts as the lesser one here. oneDNN
reads the variable once, and so does this module.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Values of ONEDNN_MAX_CPU_ISA under which a type has no products.
_NO_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
_NO_FLOAT16 = _NO_BFLOAT16 | {"AVX512_CORE_BF16"}
_NO_AVX512 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"})
_NO_AVX2 = frozenset({"SSE41", "AVX"})
_NO_INT8 = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})


@cache
def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 (AVX-512 BF16, AMX, AVX-NE-CONVERT, ARM BF16) faster than float32.

    oneDNN computes bfloat16 on any AVX-512 processor, but where it converts to float32 first, this says
    False.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = capabilities()
    return _allowed(_NO_BFLOAT16) and any(known.get(name)
                                          for name in ("avx512_bf16", "amx_bf16", "avx_ne_convert"))


@cache
def has_float16() -> bool:
    """Whether the CPU multiplies float16 (AVX-512 FP16, AMX FP16)."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return False
    return _allowed(_NO_FLOAT16)


@cache
def has_int8() -> bool:
    """Whether the CPU multiplies 8-bit integers into 32-bit sums (VNNI, AMX)."""
    known = capabilities()
    return (torch.backends.mkldnn.is_available() and _allowed(_NO_INT8)
            and any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")))


@cache
def has_amx() -> bool:
    """Whether oneDNN multiplies 16-bit types with AMX tiles, whose sums depend on the number of rows."""
    return has_bfloat16() and bool(capabilities().get("amx_bf16")) and _allowed(_NO_FLOAT16
                                                                                | {"AVX512_CORE_FP16"})


@cache
def has_avx512() -> bool:
    """Whether float32 products may use AVX-512."""
    return bool(capabilities().get("avx512_f")) and _allowed(_NO_AVX512)


@cache
def has_avx2() -> bool:
    """Whether float32 products may use AVX2."""
    return bool(capabilities().get("avx2")) and _allowed(_NO_AVX2)


@cache
def is_intel() -> bool:
    """Whether Intel made the processor: MKL uses its AVX-512 kernels only on those."""
    return "GenuineIntel" in _cpu_info() or "GenuineIntel" in platform.processor()


def instruction_set() -> str:
    """Describe for people what products run on: "AVX2", "AVX-512 with bfloat16, int8 and AMX"."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine() + (" with bfloat16" if has_bfloat16() else "")
    base = "AVX-512" if has_avx512() else "AVX2" if has_avx2() else "SSE"
    more = [name for name, there in (("bfloat16", has_bfloat16()), ("float16", has_float16()),
                                     ("int8", has_int8()), ("AMX", has_amx())) if there]
    return base + (" with " + ", ".join(more) if more else "")


@cache
def capabilities() -> dict[str, Any]:
    """Return the processor's features by PyTorch's names; empty if PyTorch cannot tell."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else _from_cpu_info()


def _from_cpu_info() -> dict[str, bool]:
    flags = next((line for line in _cpu_info().splitlines() if line.startswith("flags")), "").split()
    return {flag.replace("avx512f", "avx512_f"): True for flag in flags}


@cache
def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _allowed(lower: frozenset[str]) -> bool:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper() not in lower
