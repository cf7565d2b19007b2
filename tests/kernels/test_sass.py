"""Counts in disassemblies written by hand, and the limits of an SM that follow from them."""

from dataclasses import replace

import pytest
from blip_kernels.compiled.hardware import ceiling, occupancy
from blip_kernels.compiled.sass import CodeLoop, Instruction, Listing, Mma, loops, mma_shapes, parse


def listing(text: str) -> tuple[Instruction, ...]:
    """One line per instruction, as `cuobjdump -sass` prints them; `name:` labels one, `name` is its address."""
    lines = [line.strip() for line in text.strip().splitlines()]
    names = {line.partition(":")[0]: 16 * i for i, line in enumerate(lines) if ":" in line}
    printed = []
    for i, line in enumerate(lines):
        words = [f"{names[word]:#x}" if word in names else word for word in line.rpartition(": ")[2].split()]
        guard = words.pop(0) if words[0].startswith("@") else ""
        printed.append(f"        /*{16 * i:04x}*/  {guard:>12} {' '.join(words)} ;      /* 0x0000df00ff017b82 */\n"
                       f"{'':60}/* 0x000fe20000000800 */")
    return parse("\t.headerflags\t@\"EF_CUDA_SM90\"\n" + "\n".join(printed))


def hot(text: str) -> list[list[str]]:
    """The opcodes of each loop that counts."""
    return [[i.opcode for i in loop.code] for loop in loops(listing(text))]


def test_a_line_of_a_disassembly():
    first, second = listing("@!UP1 BRA.U 0x20\nHMMA.16816.F32.BF16 R4, R8.reuse, R6, R4")
    assert first == Instruction(0, "!UP1", "BRA.U", "0x20")
    assert second == Instruction(16, None, "HMMA.16816.F32.BF16",
                                 "R4, R8.reuse, R6, R4") and second.base == "HMMA"


def test_the_loop_is_found_among_retries_subroutines_and_far_jumps():
    """As ptxas writes it: the wait's retry after the end, the loop's exit as CALL.REL, a division called inside."""
    assert hot("""
               MOV R1, R2
        head:  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0x10000], R4
               @!P0 BRA retry
        go:    HGMMA.64x64x16.F32 R56, gdesc[UR8], R56
               BSSY B0, join
               CALL.REL.NOINC divide
        join:  FMUL R2, R2, R3
               @P1 CALL.REL.NOINC out
               BRA head
        out:   STG.E [R2.64], R4
               EXIT
        divide: MUFU.RCP R9, R9
               RET.REL.NODEC R20 0x0
        retry: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9+0x10000], R4
               @!P0 BRA retry
               BRA go
        end:   BRA end
    """) == [["SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "HGMMA.64x64x16.F32", "BSSY", "CALL.REL.NOINC", "FMUL",
              "CALL.REL.NOINC", "BRA", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "BRA"]]


def test_main_loop_and_masked_tail_are_two_loops_and_loops_around_them_are_none():
    assert hot("""
        outer: MOV R1, R2
        main:  HMMA.16816.F32 R4, R8, R6, R4
               BRA.U UP0, main
        tail:  FSEL R2, R3, R4, P1
               HMMA.16816.F32 R4, R8, R6, R4
               @P0 BRA tail
               HMMA.16816.F32 R4, R8, R6, R4
               @!P2 BRA outer
               EXIT
    """) == [["HMMA.16816.F32", "BRA.U"], ["FSEL", "HMMA.16816.F32", "BRA"]]


def test_a_loop_inside_without_tensor_cores_counts_to_the_one_around_it():
    assert hot("""
        head:  HMMA.16816.F32 R4, R8, R6, R4
        spin:  LDS R2, [R3]
               @P0 BRA spin
               @P1 BRA head
               EXIT
    """) == [["HMMA.16816.F32", "LDS", "BRA", "BRA"]]


def test_without_tensor_cores_the_innermost_loops_count_and_straight_code_has_none():
    assert hot("outer: MOV R1, R2\ninner: LDG.E R2, [R4.64]\n@P0 BRA inner\n@P1 BRA outer\nEXIT") == [["LDG.E", "BRA"]]
    assert hot("HMMA.16816.F32 R4, R8, R6, R4\nEXIT\nend: BRA end") == []


def test_a_branch_that_only_diverged_warps_take_leads_nowhere():
    assert hot("""
        head:  HMMA.16816.F32 R4, R8, R6, R4
               BRA.DIV UR4, slow
        back:  @P0 BRA head
               EXIT
        slow:  WARPSYNC.COLLECTIVE R15, slow
               BRA back
    """) == [["HMMA.16816.F32", "BRA.DIV", "BRA"]]


def test_a_way_into_the_middle_makes_no_natural_loop():
    """Every path from the entry must pass the header: here the jump at the top skips it."""
    assert hot("@P0 BRA middle\nhead: MOV R1, R2\nmiddle: HMMA.16816.F32 R4, R8, R6, R4\n@P1 BRA head\nEXIT") == []


@pytest.mark.parametrize("opcode, flops, tf32", [
    ("HMMA.16816.F32.BF16 R4, R8, R6, R4", 4096, False),
    ("HMMA.16816.F32 R4, R8, R6, R4", 4096, False),
    ("HMMA.1688.F32.TF32 R4, R8, R6, R4", 2048, True),
    ("HMMA.1684.F32.TF32 R4, R8, R6, R4", 1024, True),
    ("HGMMA.64x64x16.F32 R56, gdesc[UR8], R56", 131072 / 4, False),
    ("HGMMA.64x256x16.F32.BF16 R56, gdesc[UR8], R56", 4 * 131072 / 4, False),
    ("HGMMA.64x32x8.F32.TF32 R56, gdesc[UR8], R56", 32768 / 4, True),
])
def test_flops_of_a_warp(opcode, flops, tf32):
    assert mma_shapes(listing(opcode), warps=8) == {0: Mma(flops, tf32)}


def test_a_blackwell_instruction_is_known_by_its_descriptor():
    """0x8110010: M = 128, N = 64, fp16; 0x8200910: M = 128, N = 128, TF32, K = 8; shared by eight warps."""
    code = listing("""
        UMOV UR29, 0x8110010
        UMOV UR28, 0x0
        UTCHMMA gdesc[UR6], gdesc[UR24], tmem[UR21], tmem[UR28], idesc[UR29], !UPT
        UMOV UR29, 0x8200910
        UTCHMMA tmem[UR6], gdesc[UR24], tmem[UR21], tmem[UR28], idesc[UR29], UPT
    """)
    shapes = mma_shapes(code, warps=8)
    assert shapes == {32: Mma(2 * 128 * 64 * 16 / 8, False), 64: Mma(2 * 128 * 128 * 8 / 8, True)}


@pytest.mark.parametrize("text", ["QGMMA.64x64x32.F32 R56, gdesc[UR8], R56", "HMMA.884.F32 R4, R8, R6, R4",
                                  "UIADD3 UR29, UR4, UR5\nUTCHMMA gdesc[UR6], gdesc[UR4], tmem[UR1], idesc[UR29], UPT",
                                  "UTCHMMA gdesc[UR6], gdesc[UR4], tmem[UR1], idesc[UR29], UPT"])
def test_an_unknown_shape_is_an_error_and_no_guess(text):
    with pytest.raises(ValueError, match="not known"):
        mma_shapes(listing(text), warps=4)


def test_what_one_warp_issues_for_all_is_issued_once():
    """A block with UTCHMMA that a pass can skip belongs to one warp; one in every pass belongs to all."""
    text = """
        head: FADD R1, R1, R2
              @P0 BRA join
              UMOV UR29, 0x8100910
              UTCHMMA gdesc[UR6], gdesc[UR4], tmem[UR1], tmem[UR8], idesc[UR29], UPT
              UTCHMMA gdesc[UR6], gdesc[UR4], tmem[UR1], tmem[UR8], idesc[UR29], UPT
              UTCBAR [UR8], URZ
        join: BAR.SYNC 0x0
              @P1 BRA head
              EXIT
    """
    (loop,) = loops(listing(text))
    assert (len(loop.code), loop.elected) == (8, 4)
    (loop,) = loops(listing(text.replace("@P0 BRA join", "FADD R3, R3, R2")))
    assert (len(loop.code), loop.elected) == (8, 0)
    work = [Mma(4 * 128 * 64 * 64 / 4, False)]
    everyone, one = (replace(loop_of(work, FADD=200, UIADD3=300), elected=n) for n in (0, 300))
    assert ceiling(everyone, 4,
                   100).share == 256 / 500 and ceiling(one, 4, 100).share == 256 / (200 + 300 / 4)


def test_spilled_bytes_are_what_is_stored_to_local_memory():
    code = listing("""
        STL [R1], R2
        STL.64 [R1+0x4], R4
        STL.128 [R1+0x10], R4
        STL.U8 [R1+0x20], R4
        LDL.64 R4, [R1+0x4]
    """)
    assert Listing(255, 64, code).spill_bytes == 4 + 8 + 16 + 1


def loop_of(mma: list[Mma], **counts: int) -> CodeLoop:
    code = [Instruction(0, None, name, "") for name, count in counts.items() for _ in range(count)]
    return CodeLoop(0, tuple(code), tuple(mma))


def test_instructions_per_m16n8k16_compares_generations():
    """The same work and the same overhead give the same figure, whichever warp issues the tensor-core instructions."""
    ampere = loop_of([Mma(4096, False)] * 32, HMMA=32, FADD=128)
    hopper = loop_of([Mma(131072 / 4, False)] * 4, HGMMA=4, FADD=156)
    assert ampere.instructions_per_mma == hopper.instructions_per_mma == 5.0


def test_the_ceiling_is_set_by_the_busiest_pipe():
    """128×64 scores of head width 64 on four warps: 512 tensor-core cycles an H100 takes, 256 a B200."""
    work = [Mma(4 * 128 * 64 * 64 / 4, False)]
    exponentials = 128 * 64 // (4 * 32)  # a thread's
    assert ceiling(loop_of(work, MUFU=exponentials), 4, 90).share == 1.0  # both 512 cycles
    bound = ceiling(loop_of(work, MUFU=exponentials), 4, 100)
    assert (bound.share, bound.pipe) == (0.5, "MUFU")
    bound = ceiling(loop_of(work, HGMMA=1, FADD=128, FFMA2=128, MUFU=1), 4, 100)
    # A packed instruction is two lanes' work.
    assert (bound.pipe, bound.share) == ("FMA", 256 / (128 + 2 * 128))
    bound = ceiling(loop_of(work, ISETP=512, UIADD3=512), 4, 90)
    assert (bound.pipe, bound.share) == ("issue", 512 / 1024)
    assert ceiling(loop_of(work, ISETP=512), 4, 90).pipe == "ALU"
    # TF32: half the rate.
    assert ceiling(loop_of([Mma(work[0].flops, True)], MUFU=exponentials), 4, 100).share == 1.0


@pytest.mark.parametrize("resources, share, why", [
    ((80, 4, 32, 0), 1.0, "16 blocks of 4 warps"),
    ((80, 4, 255, 0), 2 * 4 / 64, "2 blocks of 255 → 256 registers"),
    ((80, 8, 128, 0), 2 * 8 / 64, "2 blocks of 128 registers"),
    ((80, 4, 32, 49152), 3 * 4 / 64, "3 blocks of 48 + 1 KiB in 164"),
    ((90, 4, 32, 49152), 4 * 4 / 64, "4 blocks of 48 + 1 KiB in 228"),
    ((90, 4, 32, 232448), 4 / 64, "all that a block can have"),
    ((100, 4, 32, 1024, 256), 2 * 4 / 64, "256 of 512 columns of tensor memory"),
    ((100, 4, 32, 1024, 130), 2 * 4 / 64, "130 → 256 columns"),
    ((90, 1, 24, 0), 32 / 64, "no more than 32 blocks"),
])
def test_occupancy(resources, share, why):
    assert occupancy(*resources) == share, why


@pytest.mark.parametrize("resources, said", [
    ((80, 4, 32, 166913), r"166,913 bytes of shared memory, and a block of A100 can have 166,912"),
    ((90, 4, 32, 232449), r"a block of H100 can have 232,448"),
    ((90, 16, 255, 0), r"255 registers × 512 threads, and a block can have 65,536"),
    ((100, 4, 64, 0, 513), r"513 columns of tensor memory, and B200 has 512"),
])
def test_a_block_that_does_not_fit_is_an_error(resources, said):
    with pytest.raises(ValueError, match=said):
        occupancy(*resources)
