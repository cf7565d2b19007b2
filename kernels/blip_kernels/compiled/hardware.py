"""What a streaming multiprocessor (SM) of each GPU generation holds and issues: occupancy, loop ceilings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from blip_kernels.compiled.sass import CodeLoop

# Per SM, the same for A100, H100 and B200 (CUDA C++ programming guide, table "Technical specifications per
# compute capability"): 64 warps, 32 blocks, 64 Ki registers handed out to a warp in units of 256, four
# schedulers.
WARPS, BLOCKS, REGISTERS, REGISTER_UNIT, SCHEDULERS, WARP = 64, 32, 65536, 256, 4, 32
REGISTERS_PER_THREAD = 255
RESERVED_SHARED_BYTES = 1024  # of shared memory, which the system takes for every block
TENSOR_MEMORY_COLUMNS = 512  # of an SM, from sm_100 on; allocated in powers of two from 32


@dataclass(frozen=True)
class Multiprocessor:
    """One SM. Rates are operations of threads per clock."""

    name: str
    shared_bytes: int  # for all blocks; one block can have all but RESERVED_SHARED_BYTES
    mma_fma: int  # dense fp16/bf16 multiply-adds on tensor cores; TF32 at half the rate
    fma: int  # fp32 lanes
    alu: int  # integer, compare, select, convert-to-16-bit lanes
    imad: int  # integer multiply-adds, which run on some or all of the fp32 lanes
    mufu: int  # exp2, log2, reciprocal, …


# Tensor rates: data sheets' dense FLOPS / (2 · SMs · clock), A100 312e12 / (2 · 108 · 1.41e9) = 1,024, H100
# SXM 989e12 / (2 · 132 · 1.83e9) = 2,048, B200 2.25e15 / (2 · 148 · 1.85e9) = 4,096. The others: CUDA C++
# programming guide, table "Throughput of native arithmetic instructions", columns 8.0, 9.0 and 10.0.
MULTIPROCESSORS = {
    80: Multiprocessor("A100", 164 * 1024, mma_fma=1024, fma=64, alu=64, imad=64, mufu=16),
    90: Multiprocessor("H100", 228 * 1024, mma_fma=2048, fma=128, alu=64, imad=64, mufu=16),
    100: Multiprocessor("B200", 228 * 1024, mma_fma=4096, fma=128, alu=64, imad=64, mufu=16),
}

_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "FSWZADD"}
_PACKED = {"FFMA2", "FMUL2", "FADD2"}  # two results per thread: one issue, the work of two lanes
_IMAD = {"IMAD", "IDP"}
_MUFU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_ALU = {
    "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "FCHK", "F2FP", "I2FP", "F2IP", "HMNMX2", "HSET2", "HSETP2",
    "IADD", "IADD3", "IABS", "IMNMX", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "ISETP", "ISET", "LEA", "LOP", "LOP3",
    "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "SHL", "SHR", "BMSK", "MOV", "P2R", "R2P", "PSETP",
}  # fmt: skip


@dataclass(frozen=True)
class Ceiling:
    """The largest share of the tensor cores' peak that a loop could reach, and the pipe that limits it."""

    share: float
    pipe: str  # "tensor", "issue", "MUFU", "FMA", "ALU"


def ceiling(loop: CodeLoop, warps: int, generation: int) -> Ceiling:
    """Return tensor-core cycles / busiest pipe's cycles for one pass of a CTA through `loop`.

    It is a bound for comparing kernels, not a forecast: nothing waits, memory is infinitely fast, and every
    tensor-core instruction runs at the peak rate (an HMMA newer than Ampere does not). `loop` must contain
    tensor-core instructions; `warps`: of the CTA.
    """
    sm = MULTIPROCESSORS[generation]
    count = Counter(instruction.base for instruction in loop.code)

    def threads(names: set[str]) -> int:
        return sum(count[name] for name in names) * warps * WARP

    cycles = {
        "tensor": sum(mma.flops * (2 if mma.tf32 else 1) for mma in loop.mma) * warps / (2 * sm.mma_fma),
        "issue": ((len(loop.code) - loop.elected) * warps + loop.elected) / SCHEDULERS,
        "MUFU": threads(_MUFU) / sm.mufu,
        "FMA": (threads(_FMA) + 2 * threads(_PACKED)) / sm.fma + threads(_IMAD) / sm.imad,
        "ALU": threads(_ALU) / sm.alu,
    }
    busiest = max(cycles, key=lambda pipe: cycles[pipe])
    return Ceiling(cycles["tensor"] / cycles[busiest], busiest)


def occupancy(generation: int, warps: int, registers: int, shared_bytes: int,
              tensor_memory_columns: int = 0) -> float:
    """Return the share of an SM's 64 warps that blocks with these resources can fill.

    Raises:
        ValueError: not even one block fits; the message names the resource.
    """
    sm = MULTIPROCESSORS[generation]
    most = sm.shared_bytes - RESERVED_SHARED_BYTES
    if shared_bytes > most:
        raise ValueError(f"{shared_bytes:,} bytes of shared memory, and a block of {sm.name} can have {most:,}")
    block_registers = warps * -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    if block_registers > REGISTERS:
        raise ValueError(f"{registers} registers × {warps * WARP} threads, and a block can have {REGISTERS:,} in all")
    if tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        raise ValueError(f"{tensor_memory_columns} columns of tensor memory, and {sm.name} has {TENSOR_MEMORY_COLUMNS}")
    fitting = [BLOCKS, WARPS // warps, REGISTERS // block_registers,
               sm.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES)]
    if tensor_memory_columns:
        fitting.append(TENSOR_MEMORY_COLUMNS // max(32, 1 << (tensor_memory_columns - 1).bit_length()))
    return min(fitting) * warps / WARPS
