"""The ahead-of-time report: every kernel in every configuration that is launched, compiled without a GPU.

Each op's `samples` run its launchers on `meta` tensors while `gpu.kernel_launch.noting` records the launches.
The JIT then compiles each of them, including specialisation hints (divisibility by 16, strides of 1: without
them it is another kernel), for a GPU that a stand-in driver reports. `blip_kernels.compiled.sass` counts the
instructions of the result.

    python -m blip_kernels.compiled.aot --target sm_90 --dtype bfloat16 --op attention
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import product, starmap
from multiprocessing import get_context
from typing import Any

import torch

from blip_kernels.compiled import sass
from blip_kernels.compiled.hardware import ceiling, occupancy

# Each op's module of launchers, in `blip_kernels.gpu`.
LAUNCHERS = {
    "attention": "attention_kernels",
    "decode_attention": "decode_kernels",
    "contrastive": "contrastive_kernels",
    "hard_negatives": "hard_negative_kernels",
    "linear_cross_entropy": "linear_cross_entropy_kernels",
}
OPS = tuple(LAUNCHERS)
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class HotLoop:
    """A loop with tensor-core instructions."""

    address: int
    instructions: int
    tensor_core_instructions: int
    instructions_per_mma: float | None  # as `sass.CodeLoop` defines it
    ceiling: float | None  # upper bound on the share of the tensor cores' peak
    limit: str | None  # the pipe that sets the ceiling: tensor, issue, MUFU, FMA or ALU


@dataclass(frozen=True)
class KernelReport:
    """What one kernel of one launch compiled to. The fields of the loop are those of the first of `loops`."""

    op: str
    launch: str
    kernel: str
    target: str
    dtype: str
    config: dict[str, Any]
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: int
    tensor_core_instructions: int
    loop_instructions: int | None
    instructions_per_mma: float | None
    occupancy: float
    ceiling: float | None
    limit: str | None
    loops: list[HotLoop]  # fewest instructions per MMA first: the unmasked main loop, then masked tails
    ptxas: str


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, with num_warps and num_stages

    @property
    def meta(self) -> dict[str, Any]:
        """The constexprs, num_warps and num_stages: arguments that are fixed when a kernel is compiled."""
        runtime = {parameter.name for parameter in self.kernel.params if not parameter.is_constexpr}
        return {name: value for name, value in self.arguments.items() if name not in runtime}


class _StandIn:
    """A driver of a GPU that is not present, with just enough for the JIT to compile for it."""

    def __init__(self, generation: int) -> None:
        self.generation = generation

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.generation, 32)

    def get_current_device(self) -> int:
        return -self.generation  # the JIT caches kernels by device; no real device has this number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pretending(generation: int) -> Iterator[None]:
    """Inside, Triton compiles for a GPU of `generation` and cannot run kernels."""
    from triton.runtime import driver

    before = driver._active  # `active` would look for a GPU
    driver.set_active(_StandIn(generation))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        driver._active = before


def launches(op: str, generation: int, dtype: torch.dtype, patterns: Sequence[str] = ("*",)) -> list[Launch]:
    """Return the launches of an op's samples on a GPU of `generation` whose names match a pattern."""
    from blip_kernels.gpu.kernel_launch import noting

    noted: list[Launch] = []
    for name, call in import_module(f"blip_kernels.gpu.{LAUNCHERS[op]}").samples(dtype):
        def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], name: str = name) -> None:
            noted.append(Launch(name, kernel, grid, arguments))

        if any(fnmatchcase(name, pattern) for pattern in patterns):
            with noting(generation, note):
                call()
    return noted


def compiled(launch: Launch, generation: int) -> Any:
    """Return the kernel that the JIT would launch, a `triton.compiler.CompiledKernel`."""
    with pretending(generation):
        return launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments)


def measure(op: str, launch: Launch, generation: int, dtype: torch.dtype) -> KernelReport:
    """Compile a launch and count its instructions and resources.

    Raises:
        ValueError: it needs more registers, shared or tensor memory than such a GPU has.
    """
    binary = compiled(launch, generation)
    listing = sass.disassemble(binary.asm["cubin"], binary.name)
    shapes = sass.mma_shapes(listing.code, binary.metadata.num_warps)
    loops = sorted((_hot_loop(sass.with_shapes(loop, shapes), binary.metadata.num_warps, generation)
                    for loop in sass.loops(listing.code)), key=_main_first)
    main = loops[0] if loops else HotLoop(0, 0, 0, None, None, None)
    columns = getattr(binary.metadata, "tmem_size", 0) or 0
    target = f"sm_{generation}"
    try:
        share = occupancy(generation, binary.metadata.num_warps, listing.registers, binary.metadata.shared,
                          columns)
    except ValueError as error:
        where = f"{op}, {launch.name}, {binary.name}"
        raise ValueError(f"{where} cannot be launched on {target}: it needs {error}") from None
    return KernelReport(
        op=op, launch=launch.name, kernel=binary.name, target=target, dtype=str(dtype).removeprefix("torch."),
        config=_configuration(launch, binary), registers=listing.registers, spill_bytes=listing.spill_bytes,
        shared_bytes=binary.metadata.shared, tensor_memory_columns=columns, instructions=len(listing.code),
        tensor_core_instructions=len(shapes), loop_instructions=main.instructions or None,
        instructions_per_mma=main.instructions_per_mma, occupancy=share, ceiling=main.ceiling, limit=main.limit,
        loops=loops, ptxas=_ptxas(generation))  # fmt: skip


def _hot_loop(loop: sass.CodeLoop, warps: int, generation: int) -> HotLoop:
    if not loop.mma:
        return HotLoop(loop.address, len(loop.code), 0, None, None, None)
    bound = ceiling(loop, warps, generation)
    return HotLoop(loop.address, len(loop.code), len(loop.mma), round(loop.instructions_per_mma, 2),
                   round(bound.share, 3), bound.pipe)


def _main_first(loop: HotLoop) -> tuple[float, int]:
    return loop.instructions_per_mma or float("inf"), -loop.instructions


def _configuration(launch: Launch, binary: Any) -> dict[str, Any]:
    """The launch's constexprs, warps and stages."""
    plain = {name: value
             for name, value in launch.meta.items() if isinstance(value, int | float | str | bool)}
    return plain | {"num_warps": binary.metadata.num_warps, "num_stages": binary.metadata.num_stages}


def _ptxas(generation: int) -> str:
    from triton import knobs

    return (knobs.nvidia.ptxas_blackwell if generation >= 100 else knobs.nvidia.ptxas).version


def _reports(op: str, target: str, dtype: str, patterns: Sequence[str]) -> list[KernelReport]:
    generation, measured = TARGETS[target], {}
    found: dict[tuple[str, str], KernelReport] = {}  # one row for a kernel launched twice
    for launch in launches(op, generation, DTYPES[dtype], patterns):
        binary = compiled(launch, generation).hash
        if binary not in measured:
            measured[binary] = measure(op, launch, generation, DTYPES[dtype])
        found.setdefault((launch.name, binary), replace(measured[binary], launch=launch.name))
    return list(found.values())


def reports(ops: Sequence[str], targets: Sequence[str], dtypes: Sequence[str],
            patterns: Sequence[str] = ("*",), jobs: int = 1) -> Iterator[KernelReport]:
    """Compile and measure all kernels of launches whose name matches one of `patterns`, in `jobs` processes.

    Raises:
        ValueError: Triton would interpret kernels instead of compiling them, a kernel exceeds its GPU's
            limits, or no launch has such a name.
    """
    work = list(product(ops, targets, dtypes, [tuple(patterns)]))
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: Triton would interpret the kernels and compile none")
    some = False
    for found in _parts(work, jobs):
        some |= bool(found)
        yield from found
    if not some:
        raise ValueError(f"no launch of {', '.join(ops)} is called {' or '.join(patterns)}")


def _parts(work: Sequence[tuple[str, str, str, tuple[str, ...]]], jobs: int) -> Iterator[list[KernelReport]]:
    if jobs == 1:
        yield from starmap(_reports, work)
        return
    # Workers ignore Ctrl-C. This process handles it and gives them no more work.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(_reports, *zip(*work, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    """Print a line per kernel, target and dtype, or with --json an object. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blip_kernels.compiled.aot", description=main.__doc__)
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--launch", action="append", help="pattern of launches' names, '*head_dim 64*'")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    rows = reports(args.op or OPS, args.target or list(TARGETS), args.dtype or ["bfloat16"],
                   args.launch or ["*"], args.jobs)
    try:
        for row in rows:
            print(json.dumps(asdict(row)) if args.json else _line(row), flush=True)
    except ValueError as error:
        print(f"blip-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _line(row: KernelReport) -> str:
    loops = "; ".join(f"{loop.instructions} instructions, {loop.tensor_core_instructions} MMA, per "
                      f"{loop.instructions_per_mma}, ceiling {loop.ceiling} {loop.limit}"
                      for loop in row.loops)
    return (f"{row.op} | {row.launch} | {row.kernel} {row.target} {row.dtype} {row.config}: {row.registers} registers, "
            f"{row.spill_bytes} B spilled, {row.shared_bytes} B shared, occupancy {row.occupancy:.2f}; {loops}")


if __name__ == "__main__":
    sys.exit(main())
