"""Which dtypes are measured here, and who is compared with whom.

An implementation is named after who it is and its dtype, a variant after a comma: `openvino float32, streams
2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from blip_kernels.cpu.processor import has_bfloat16, has_int8

from blip_bench.timing import Comparison

PRODUCTS = {"float32": lambda: True, "bfloat16": has_bfloat16, "int8": has_int8}  # has the processor any?
OURS, THEIRS = "best of ours", "best of theirs"
Targets = Mapping[tuple[str, str], float]


def dtypes_for(task: str, named: str | None) -> list[str]:
    """The dtypes that are `named`, with commas between; by default those that the processor multiplies, and
    for rerank, which takes minutes, the last of them. The published loops of rerank and vqa have no int8.

    Raises:
        ValueError: a dtype is unknown, or the task has none such.
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
    """Everyone's variants, and the best of either side."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition(",")[0], []).append(name)
        if not name.startswith("matrix products"):
            found.setdefault(OURS if name.startswith("ours") else THEIRS, []).append(name)
    return found


def comparisons(names: Iterable[str], targets: Targets) -> tuple[Comparison, ...]:
    """Ours beside each other one of the same dtype, the other pairs of `targets`, the best beside the best. A
    target counts where the processor multiplies the dtype of ours."""
    there = groups(names)
    alike = ((f"ours {dtype_of(label)}", label) for label in there if not label.startswith(("ours", "best")))
    pairs = [pair for pair in dict.fromkeys((*alike, *targets, (OURS, THEIRS))) if set(pair) <= there.keys()]
    return tuple(Comparison(*pair, targets.get(pair) if _counts(pair[0]) else None) for pair in pairs)


def dtype_of(name: str) -> str:
    return name.partition(",")[0].rpartition(" ")[2]


def reference_of(results: Iterable[str]) -> str:
    """Whose results the others' are compared with: the published code's in float32, or the nearest there
    is."""
    results = list(results)
    return next(name for name in ("transformers float32", "ours float32", results[0]) if name in results)


def _counts(ours: str) -> bool:
    dtype = dtype_of(ours)
    return dtype in PRODUCTS and PRODUCTS[dtype]()
