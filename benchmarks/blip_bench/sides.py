"""Which dtypes are measured here, and which implementations are compared.

An implementation's name consists of who made it and the dtype; a variant follows a comma:
`openvino float32, streams 2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blip_kernels.cpu.processor import has_bfloat16, has_int8

from blip_bench.timing import Comparison

# Whether the processor has products of each dtype.
PRODUCTS = {"float32": lambda: True, "bfloat16": has_bfloat16, "int8": has_int8}
OURS, THEIRS = "best of ours", "best of theirs"
Targets = Mapping[tuple[str, str], float]


def dtypes_for(task: str, named: str | None) -> list[str]:
    """The comma-separated dtypes in `named`. The default is those that the processor multiplies in hardware;
    for rerank, which takes minutes, only the last of them. The published loops of rerank and vqa have no
    int8.

    Raises:
        ValueError: a dtype is unknown, or the task does not have it.
    """
    known = list(PRODUCTS) if task in ("caption", "encode") else ["float32", "bfloat16"]
    if named is None:
        here = [dtype for dtype in known if PRODUCTS[dtype]()]
        return here[-1:] if task == "rerank" else here
    dtypes = list(dict.fromkeys(named.split(",")))
    for dtype in dtypes:
        if dtype not in known:
            raise ValueError(f"--dtypes {dtype}: {task} has {', '.join(known)}")
    return dtypes


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The groups to compare: the variants of each implementation, all of ours, and all of theirs."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(",")[0], []).append(name)
        if not name.startswith("matrix products"):
            found.setdefault(OURS if name.startswith("ours") else THEIRS, []).append(name)
    return found


def comparisons(names: Iterable[str], targets: Targets) -> tuple[Comparison, ...]:
    """Compare ours with each other implementation of the same dtype, the remaining pairs of `targets`, and
    the best of ours with the best of theirs. A target applies only if the processor multiplies the dtype of
    ours in hardware."""
    there = groups(names)
    alike = ((f"ours {dtype_of(label)}", label) for label in there if not label.startswith(("ours", "best")))
    pairs = [pair for pair in dict.fromkeys((*alike, *targets, (OURS, THEIRS))) if set(pair) <= there.keys()]
    return tuple(Comparison(*pair, targets.get(pair) if _has_products(pair[0]) else None) for pair in pairs)


def dtype_of(name: str) -> str:
    return name.partition(",")[0].rpartition(" ")[2]


def reference_of(results: Iterable[str]) -> str:
    """The implementation with the reference results: transformers in float32, or the nearest available."""
    results = list(results)
    return next(name for name in ("transformers float32", "ours float32", results[0]) if name in results)


def _has_products(ours: str) -> bool:
    dtype = dtype_of(ours)
    return dtype in PRODUCTS and PRODUCTS[dtype]()
