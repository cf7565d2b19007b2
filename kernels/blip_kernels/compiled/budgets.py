"""What each kernel may use, `gpu/budgets.json`: tests notice without a GPU if a kernel needs more.

    {"attention": {"sm_80": {"forward, head_dim 64 · _forward_kernel":
        {"registers": 128, "spill_bytes": 0, "shared_bytes": 49152, "instructions_per_mma": 5.6}}}}

`blip-fast kernels --write-budgets` writes the file after an intended change.
`tests/kernels/test_kernels_aot.py` compares kernels with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from blip_kernels.compiled.aot import KernelReport

FILE = Path(__file__).parents[1] / "gpu" / "budgets.json"
TRITON = "3.7."  # the budgets were measured with this version's compiler
SLACK = 1.02  # factor on instructions per MMA: one more address computation is acceptable

Budget = dict[str, float | None]
Budgets = dict[str, dict[str, dict[str, Budget]]]  # op → target → launch · kernel → its budget


def load() -> Budgets:
    """Return the budgets that are checked in."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def named(reports: Iterable[KernelReport]) -> Iterator[tuple[str, KernelReport]]:
    """Yield each report with its name in the table; more variants of a kernel in one launch are numbered."""
    seen: Counter[tuple[str, ...]] = Counter()
    for row in reports:
        place = (row.op, row.target, row.dtype, row.launch, row.kernel)
        seen[place] += 1
        yield f"{row.launch} · {row.kernel}{f' {seen[place]}' if seen[place] > 1 else ''}", row


def excesses(reports: Iterable[KernelReport], budgets: Budgets) -> list[str]:
    """Return a sentence for each kernel that has no budget or exceeds it."""
    found = []
    for name, row in named(reports):
        where = f"{row.op}, {name}, {row.target}, {row.dtype}"
        budget = budgets.get(row.op, {}).get(row.target, {}).get(name)
        if budget is None:
            found.append(f"{where}: has no budget")
            continue
        for field, most in budget.items():
            used = getattr(row, field)
            if (used is None) != (most is None) or (used is not None and most is not None and used > most):
                found.append(f"{where}: {field} is {used}, budget {most}")
    return found


def write(reports: Iterable[KernelReport], path: Path = FILE) -> None:
    """Make the figures of `reports` the budgets of the ops and targets that they cover; keep all others.

    The budget of spilled bytes is always 0. If dtypes differ, the larger figure is the budget.
    """
    budgets: Budgets = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    fresh: Budgets = {}
    for name, row in named(reports):
        budget = fresh.setdefault(row.op, {}).setdefault(row.target, {}).setdefault(name, {})
        per = None if row.instructions_per_mma is None else round(row.instructions_per_mma * SLACK, 2)
        figures = {"registers": row.registers, "spill_bytes": 0, "shared_bytes": row.shared_bytes,
                   "instructions_per_mma": per}
        for field, figure in figures.items():
            before = budget.get(field)
            budget[field] = figure if before is None or figure is None else max(before, figure)
    for op, targets in fresh.items():
        budgets.setdefault(op, {}).update(targets)
    path.write_text(_text(budgets), encoding="utf-8")


def _text(budgets: Budgets) -> str:
    """Format budgets as JSON with one line per kernel."""
    ops = []
    for op, targets in sorted(budgets.items()):
        parts = []
        for target, kernels in sorted(targets.items(), key=lambda item: int(item[0].removeprefix("sm_"))):
            lines = ",\n".join(f"      {json.dumps(name, ensure_ascii=False)}: {json.dumps(budget)}"
                               for name, budget in kernels.items())
            parts.append(f'    "{target}": {{\n{lines}\n    }}')
        ops.append(f'  "{op}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"
