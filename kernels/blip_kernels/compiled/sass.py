"""What a compiled kernel does, read from its machine code: registers, spills, loops and their instructions.

The hot loop of a GEMM-like kernel is the innermost *natural* loop with tensor-core instructions. A natural
loop is a back edge to a block that dominates its source, and all blocks from which that edge can be reached.
Taking the last backward branch would find other loops: mbarrier retries also branch backwards, ptxas puts
cold blocks after the kernel's end, and it writes far jumps as `CALL.REL`. Kernels of different generations
are compared by

    instructions per m16n8k16 equivalent = loop instructions of a warp / (MMA FLOPs that it owns / 4,096)

and not by instructions per tensor-core instruction: an HMMA.16816 is 4,096 FLOPs of one warp, an
HGMMA.64x64x16 131,072 of four warps, and a UTCHMMA belongs to a whole CTA.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

MMA_FLOPS = 4096  # of one m16n8k16, counting multiplies and adds

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;", re.M)
_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$", re.M)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")  # no known successor, unless guarded


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: `@!P0 BRA 0x1a0`."""

    address: int
    guard: str | None
    opcode: str  # with its modifiers, "HMMA.16816.F32"
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Mma:
    """The FLOPs of one tensor-core instruction that a warp owns, and whether it runs at TF32's half rate."""

    flops: float
    tf32: bool


@dataclass(frozen=True)
class CodeLoop:
    """A natural loop: every instruction in it once, nested loops included."""

    address: int  # of the header, the first block of every pass
    code: tuple[Instruction, ...]
    mma: tuple[Mma, ...] = ()
    elected: int = 0  # instructions that one warp issues for the whole CTA: blocks around a UTCHMMA

    @property
    def instructions_per_mma(self) -> float:
        """Instructions that a warp issues in one pass, per 4,096 MMA FLOPs that it owns."""
        return len(self.code) / (sum(mma.flops for mma in self.mma) / MMA_FLOPS)


@dataclass(frozen=True)
class Listing:
    """A kernel's machine code and its resources."""

    registers: int
    stack_bytes: int
    code: tuple[Instruction, ...]

    @property
    def spill_bytes(self) -> int:
        """Bytes written by stores to local memory; `ptxas -v` calls them spill stores."""
        return sum(_width(i.opcode) for i in self.code if i.base == "STL")


def disassemble(cubin: bytes, kernel: str) -> Listing:
    """Return the listing of one kernel, made by the cuobjdump in Triton's wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(file)]
        # it finds nvdisasm in its own folder, and warns about ELF flavours on stderr
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(rf"^ *Function {re.escape(kernel)}:\s+REG:(\d+) STACK:(\d+)", text, re.M)
    if usage is None:
        raise ValueError(f"cuobjdump says nothing of a kernel {kernel}")
    parts = _FUNCTION.split(text)  # preamble, name, body, name, body, …
    body = dict(zip(parts[1::2], parts[2::2], strict=True))[kernel]
    return Listing(int(usage[1]), int(usage[2]), parse(body))


def parse(text: str) -> tuple[Instruction, ...]:
    """Return the instructions in a `cuobjdump -sass` text of one function."""
    return tuple(Instruction(int(address, 16), guard or None, opcode, operands)
                 for address, guard, opcode, operands in _INSTRUCTION.findall(text))


def loops(code: Sequence[Instruction]) -> list[CodeLoop]:
    """Return the innermost natural loops with tensor-core instructions; if there are none, of all loops.

    `with_shapes` fills their `mma`.
    """
    blocks = _blocks(code)
    successors = _successors(code, blocks)
    dominators = _dominators(successors)
    found = _natural_loops(successors, dominators)
    bodies = {header: tuple(code[i] for block in sorted(body) for i in range(*blocks[block]))
              for header, body in found.items()}
    hot = {header for header in found if any(is_mma(i) for i in bodies[header])} or set(found)
    innermost = [h for h in hot if not any(other != h and other in found[h] for other in hot)]
    return [CodeLoop(bodies[h][0].address, bodies[h],
                     elected=_elected(code, blocks, _passed_by(h, found[h], successors, dominators)))
            for h in sorted(innermost)]


def _elected(code: Sequence[Instruction], blocks: Sequence[tuple[int, int]], skipped: set[int]) -> int:
    """Count the instructions of the `skipped` blocks that contain a UTCHMMA."""
    ranges = (blocks[block] for block in skipped)
    return sum(stop - start for start, stop in ranges if any(i.base == "UTCHMMA" for i in code[start:stop]))


def is_mma(instruction: Instruction) -> bool:
    """Whether it runs on the tensor cores."""
    return instruction.base.endswith("MMA")


def mma_shapes(code: Sequence[Instruction], warps: int) -> dict[int, Mma]:
    """Return what each tensor-core instruction of a kernel does, by address. `warps`: of a CTA."""
    return {i.address: _mma(code, index, warps) for index, i in enumerate(code) if is_mma(i)}


def with_shapes(loop: CodeLoop, shapes: dict[int, Mma]) -> CodeLoop:
    """Return the loop with its `mma` filled from `mma_shapes`."""
    return replace(loop, mma=tuple(shapes[i.address] for i in loop.code if i.address in shapes))


def _mma(code: Sequence[Instruction], index: int, warps: int) -> Mma:
    opcode = code[index].opcode
    if opcode.startswith("UTCHMMA"):  # one per CTA: each warp owns a part
        m, n, tf32 = _descriptor(code, index)
        return Mma(2 * m * n * (8 if tf32 else 16) / warps, tf32)
    if shape := re.match(r"HMMA\.168(16|8|4)\b", opcode):
        return Mma(2 * 16 * 8 * int(shape[1]), ".TF32" in opcode)
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\b", opcode):  # of four warps
        return Mma(2 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4, ".TF32" in opcode)
    raise ValueError(f"the shape of {opcode} is not known")


def _descriptor(code: Sequence[Instruction], index: int) -> tuple[int, int, bool]:
    """Return M, N and whether TF32 of a UTCHMMA, from the register that holds its instruction descriptor.

    ptxas loads the register with an immediate, `UMOV UR29, 0x4100010`, a few instructions before. The bits of
    the descriptor (PTX ISA, section "Instruction descriptor" of tcgen05.mma): 7–9 the left operand's type (2
    is TF32), 17–22 N / 8, 24–28 M / 16.
    """
    register = re.search(r"idesc\[(UR\d+)\]", code[index].operands)
    for earlier in reversed(code[:index]):
        if register and re.match(rf"{register[1]}\b", earlier.operands):
            value = re.search(r", 0x([0-9a-f]+)$", earlier.operands)
            if earlier.base != "UMOV" or value is None:
                break
            bits = int(value[1], 16)
            return (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, bits >> 7 & 7 == 2
    raise ValueError(f"the descriptor of {code[index].opcode} {code[index].operands} is not known")


def _width(opcode: str) -> int:
    return next((_BYTES[part] for part in opcode.split(".") if part in _BYTES), 4)


def _target(instruction: Instruction) -> int | None:
    """Return the target of a direct branch. Calls count too: ptxas writes some far jumps as calls."""
    if instruction.base not in ("BRA", "JMP", "CALL") or instruction.opcode.startswith("BRA.DIV"):
        return None  # BRA.DIV: only diverged warps take it, to a slow copy of the code after it
    address = re.search(r"\b0x([0-9a-f]+)$", instruction.operands)
    return int(address[1], 16) if address else None


def _falls_through(instruction: Instruction) -> bool:
    if instruction.base in ("BRA", "JMP") and not instruction.opcode.startswith("BRA.DIV"):
        return instruction.guard is not None or "," in instruction.operands  # BRA.U !UP0, 0x160
    return instruction.guard is not None or instruction.base not in _ENDS


def _blocks(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Return the basic blocks as ranges of indices."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    starts = {0}
    for i, instruction in enumerate(code):
        target = _target(instruction)
        if target in index:
            starts.add(index[target])
        if target is not None or not _falls_through(instruction) or instruction.base in _ENDS:
            starts.add(i + 1)
    return list(pairwise([*sorted(starts - {len(code)}), len(code)]))


def _successors(code: Sequence[Instruction], blocks: Sequence[tuple[int, int]]) -> list[list[int]]:
    at = {code[start].address: block for block, (start, _) in enumerate(blocks)}
    following: list[list[int]] = []
    for block, (_, stop) in enumerate(blocks):
        last = code[stop - 1]
        targets = [at[t]] if (t := _target(last)) in at else []
        if _falls_through(last) and block + 1 < len(blocks):
            targets.append(block + 1)
        following.append(targets)
    return following


def _natural_loops(successors: Sequence[Sequence[int]],
                   dominators: dict[int, set[int]]) -> dict[int, set[int]]:
    """Return header → blocks, with loops of one header merged. Block 0 is the entry."""
    predecessors = _predecessors(successors)
    found: dict[int, set[int]] = {}
    for source in predecessors:
        for header in successors[source]:
            if header in dominators[source]:
                found.setdefault(header, {header}).update(_reaching(source, header, predecessors))
    return found


def _passed_by(header: int, body: set[int], successors: Sequence[Sequence[int]],
               dominators: dict[int, set[int]]) -> set[int]:
    """Return the blocks of a loop that some path from its header back to it skips."""
    return body - set.intersection(*(dominators[block] for block in body if header in successors[block]))


def _predecessors(successors: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return the predecessors of every block that the entry reaches."""
    order = _postorder(successors)
    found: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in successors[block]:
            found[target].append(block)
    return found


def _postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, targets = stack[-1]
        fresh = next((t for t in targets if t not in seen), None)
        if fresh is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(fresh)
            stack.append((fresh, iter(successors[fresh])))
    return order


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Return for each block the blocks on every path from the entry to it, itself included."""
    order, predecessors = _postorder(successors)[::-1], _predecessors(successors)
    found = {block: set(order) for block in order}
    found[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = {block}.union(set.intersection(*(found[p] for p in predecessors[block])))
            changed |= new != found[block]
            found[block] = new
    return found


def _reaching(source: int, header: int, predecessors: dict[int, list[int]]) -> set[int]:
    body, stack = {header, source}, [source]
    while stack:
        block = stack.pop()
        if block != header:
            fresh = [p for p in predecessors[block] if p not in body]
            body.update(fresh)
            stack.extend(fresh)
    return body
