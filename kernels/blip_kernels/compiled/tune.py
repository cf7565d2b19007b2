"""Launch configurations measured on the GPU at hand: `blip-fast kernels --tune`.

For every entry of an op's table that a workload reads, small variations (block sizes, warps, stages) are
compiled. Those that spill no register and give the same result are timed with the whole workload, forward and
backward. The best are written to a file that `BLIP_FAST_KERNEL_CONFIGS` may name, see
`blip_kernels.gpu.configs`. There is one pass over the entries: each is tuned with the best found so far for
the entries before it.

    python -m blip_kernels.compiled.tune --op attention --output kernel-configs.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_kernels.compiled import sass
from blip_kernels.compiled.aot import DTYPES, OPS, Launch, compiled
from blip_kernels.compiled.workloads import workloads

Config = dict[str, int]
BLOCKS, WARPS, STAGES = (16, 256), (1, 16), (1, 6)  # smallest and largest tried
TOLERANCE = 0.02  # relative to the result's norm: 16-bit sums round differently in other tiles
FASTER = 0.99  # a candidate replaces the table's entry if it takes less than this share of its time


def candidates(entry: Config) -> Iterator[Config]:
    """Yield variations of one or two values of an entry: blocks and warps halved or doubled, stages ± 1."""
    def steps(name: str) -> list[int]:
        value = entry[name]
        low, high = WARPS if name == "num_warps" else STAGES if name == "num_stages" else BLOCKS
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        return [v for v in near if low <= v <= high]

    names = [name for name in entry if name.startswith(("BLOCK", "num_"))]
    for chosen in [*combinations(names, 1), *combinations(names, 2)]:
        variants: list[Config] = [{}]
        for name in chosen:
            variants = [variant | {name: value} for variant in variants for value in steps(name)]
        yield from (entry | variant for variant in variants)


def entries_read(op: str, table: dict[str, dict[str, Config]], target: str,
                 noted: Callable[[], list[Launch]]) -> list[str]:
    """Return the names in `table` whose entry a workload reads: changing it changes what is launched."""
    before = _metas(noted())
    found = []
    for name, generations in table.items():
        entry = generations[target]
        try:
            generations[target] = {key: value * 2 for key, value in entry.items()}
            if _metas(noted()) != before:
                found.append(name)
        finally:
            generations[target] = entry
    return found


def best(entry: Config, time: Callable[[Config], float | None]) -> tuple[Config, float, float]:
    """Return the fastest of an entry and its candidates, its time, and the entry's.

    `time` returns None for a configuration that cannot run.
    """
    start = time(entry)
    if start is None:
        raise RuntimeError(f"the configuration in the table cannot run: {entry}")
    chosen, shortest = entry, start
    for candidate in candidates(entry):
        taken = time(candidate)
        if taken is not None and taken < shortest * FASTER:
            chosen, shortest = candidate, taken
    return chosen, shortest, start


def tune(ops: Sequence[str], dtypes: Sequence[str], output: Path, say: Callable[[str], None] = print) -> None:
    """Measure on the current GPU and write `output` after every entry. It keeps entries of earlier runs.

    Raises:
        ValueError: there is no NVIDIA GPU that the kernels run on.
    """
    from blip_kernels.gpu import configs
    from blip_kernels.gpu.kernel_launch import generation

    device = _gpu()
    target = f"sm_{generation(device)}"
    written = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for op in ops:
        table = configs.table(op)
        for dtype in dtypes:
            for label, run in workloads(op, DTYPES[dtype], device):
                for name in entries_read(op, table, target, lambda run=run: _noted(run, device)):
                    entry = table[name][target]
                    chosen, taken, before = best(entry, _timer(run, table[name], target, device))
                    table[name][target] = chosen
                    written.setdefault(op, {}).setdefault(name, {})[target] = chosen
                    output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
                    say(f"{op}, {name} ({label}, {dtype}): {before:.3f} → {taken:.3f} ms, {chosen}")


def _gpu() -> torch.device:
    from blip_kernels.gpu.kernel_launch import why_not

    if not torch.cuda.is_available():
        raise ValueError("tuning measures on an NVIDIA GPU, and PyTorch finds none here: see blip-fast doctor")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := why_not(torch.empty(1, device=device)):
        raise ValueError(f"tuning needs the kernels to run: {reason}")
    return device


def _timer(run: Callable[[], Sequence[Tensor]], generations: dict[str, Config], target: str,
           device: torch.device) -> Callable[[Config], float | None]:
    """Return a function from a configuration to the workload's milliseconds with it.

    It returns None if the configuration spills registers, fails, or gives another result.
    """
    from triton.testing import do_bench

    entry = generations[target]
    right = [x.detach().clone() for x in run()]

    def time(config: Config) -> float | None:
        generations[target] = config
        try:
            if config != entry and any(_spills(launch, device) for launch in _noted(run, device)):
                return None
            if not all(_same(x, y) for x, y in zip(run(), right, strict=True)):
                return None
            return float(do_bench(run, warmup=50, rep=200, return_mode="median"))  # pyright: ignore[reportArgumentType]
        except Exception:  # whatever the error of compiler or driver, this GPU cannot use the configuration
            if config == entry:
                raise
            return None
        finally:
            generations[target] = entry

    return time


def _noted(run: Callable[[], object], device: torch.device) -> list[Launch]:
    """Record the launches of a workload without running them."""
    from blip_kernels.gpu.kernel_launch import generation, noting

    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        found.append(Launch("", kernel, grid, arguments))

    with noting(generation(device), note):
        run()
    return found


def _spills(launch: Launch, device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    binary = compiled(launch, 10 * major + minor)
    return sass.disassemble(binary.asm["cubin"], binary.name).spill_bytes > 0


def _same(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():  # drawn indices: rounding may decide ties differently
        return bool((x == y).float().mean() >= 1 - TOLERANCE)
    return bool((x.float() - y.float()).norm() <= TOLERANCE * y.float().norm())


def _metas(launches: Sequence[Launch]) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    return [(launch.kernel.__name__, launch.grid, launch.meta) for launch in launches]


def main(arguments: list[str] | None = None) -> int:
    """Tune on the GPU at hand. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_kernels.compiled.tune", description=main.__doc__)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--output", type=Path, default=Path("kernel-configs.json"))
    args = parser.parse_args(arguments)
    try:
        tune(args.op or OPS, args.dtype or ["bfloat16"], args.output,
             lambda line: print(line, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        print(f"blip-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
