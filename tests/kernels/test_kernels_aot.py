"""The ahead-of-time report: it compiles like a launch, for three generations; no kernel exceeds its budget.

Triton compiles nothing in a process that interprets kernels, as this one may: everything is compiled in
others.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from blip_kernels.compiled import budgets, tune
from blip_kernels.compiled.aot import OPS, TARGETS, KernelReport
from patience import PATIENCE

from blip_fast.cli import main
from blip_fast.commands import kernels as command

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
FIELDS = {"op", "kernel", "target", "dtype", "config", "registers", "spill_bytes", "shared_bytes",
          "tensor_core_instructions", "loop_instructions", "instructions_per_mma", "occupancy", "ceiling"}
# Launches that compile in seconds, not minutes, and include each kind of kernel
QUICK = ["--launch", "*head_dim 64", "--launch", "*width 256, positives by pair", "--launch", "forward",
         "--launch", "backward", "--launch", "decode, head_dim 64, 8 images", "--launch",
         "cached, head_dim 64", "--launch", "draw, width 256, excluded by pair"]

GEMM = '''
import torch, triton, triton.language as tl
from blip_kernels.compiled.aot import Launch, measure

@triton.jit
def gemm(p_a, p_b, p_c, M, N, K, s_a, s_ak, s_b, s_bn, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK_K)
    b_c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(0, K, BLOCK_K):
        b_a = tl.load(p_a + o_m[:, None] * s_a + (i + o_k)[None, :] * s_ak)
        b_b = tl.load(p_b + (i + o_k)[:, None] * s_b + o_n[None, :] * s_bn)
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], b_c)

def launch(columns=1024, **meta):
    a, b = (torch.empty(1024, columns, dtype=torch.float16, device="meta") for _ in range(2))
    sizes = {"M": 1024, "N": 1024, "K": 1024}
    strides = {"s_a": a.stride(0), "s_ak": a.stride(1), "s_b": b.stride(0), "s_bn": b.stride(1)}
    meta = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2} | meta
    c = torch.empty(1024, 1024, device="meta")
    return Launch("gemm", gemm, (8, 8), {"p_a": a, "p_b": b, "p_c": c, **sizes, **strides, **meta})

def report(generation, columns=1024, **meta):
    return measure("test", launch(columns, **meta), generation, torch.float16)
'''


@pytest.fixture
def with_gemm(tmp_path):
    """Run Python code that sees `report`, `launch` and `gemm` of above; its last line of output as JSON."""
    pytest.importorskip("triton")

    def run(code):
        (tmp_path / "gemm.py").write_text(GEMM)
        code = f"import json\nfrom dataclasses import asdict\nfrom gemm import *\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE,
                              env=COMPILING | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def compile_all(*options: str) -> list[KernelReport]:
    """What `python -m blip_kernels.compiled.aot` reports."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "blip_kernels.compiled.aot", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=COMPILING)
    assert done.returncode == 0, done.stderr
    return [KernelReport(**json.loads(line)) for line in done.stdout.splitlines()]


def check(reports: list[KernelReport]) -> None:
    """Budgets hold for one version of Triton: others allocate registers differently, and may spill a few."""
    measured = version("triton").startswith(budgets.TRITON)
    if measured:
        assert budgets.excesses(reports,
                                budgets.load()) == [], "meant? then run blip-fast kernels --write-budgets"
    for row in reports:
        where = f"{row.op}, {row.launch}, {row.kernel}, {row.target}"
        assert row.spill_bytes <= (0 if measured else 32), where
        assert 0 < row.occupancy <= 1 and 0 < row.registers <= 255, where
        assert row.ceiling is None or 0 < row.ceiling <= 1, where
    # a further variant may be one masked tile at the end, without a loop
    kinds = {(row.op, row.launch, row.kernel, row.target, row.dtype)
             for row in reports if row.tensor_core_instructions}
    looping = {(row.op, row.launch, row.kernel, row.target, row.dtype)
               for row in reports if row.instructions_per_mma}
    assert kinds == looping != set(), "tensor-core instructions in no loop"


def test_the_tensor_cores_of_each_generation_are_used_in_the_loop(with_gemm):
    """One process compiles for all three in turn: the cache does not mix up kernels of different targets."""
    rows = [KernelReport(**row) for row in with_gemm(
        "print(json.dumps([asdict(report(g)) for g in (90, 80, 100, 90)]))")]
    assert [row.target for row in rows] == ["sm_90", "sm_80", "sm_100", "sm_90"] and rows[0] == rows[3]
    # 128 × 128 × 64: 512 HMMA.16816 on four warps; 8 HGMMA.64x128x16; 4 UTCHMMA of 128 × 128 × 16
    assert [row.loops[0]["tensor_core_instructions"] for row in rows[:3]] == [8, 128, 4]
    for row in rows:
        assert len(row.loops) == 1
        flops_of_a_warp = 2 * 128 * 128 * 64 / 4
        assert row.instructions_per_mma == pytest.approx(row.loop_instructions / (flops_of_a_warp / 4096),
                                                         abs=0.01)
        assert 0.5 < row.instructions_per_mma < 4
        assert row.config == {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
        assert row.shared_bytes >= 2 * 128 * 64 * 2  # a stage of both operands at the least
    own = with_gemm("from triton import knobs\nprint(json.dumps(knobs.nvidia.ptxas.version))")
    assert {row.target: row.ptxas for row in rows}["sm_90"] == own


def test_specialisation_hints_are_those_of_a_launch(with_gemm):
    """Strides that 16 divides let 16 bytes load at once; the odd ones of 1,023 columns do not."""
    even, odd = with_gemm("print(json.dumps([report(80, columns).instructions for columns in (1024, 1023)]))")
    assert odd > 1.5 * even


def test_registers_and_spills_are_what_ptxas_says(with_gemm):
    rows = with_gemm("""
import re, subprocess, tempfile
from triton import knobs
from blip_kernels.compiled.aot import compiled
rows = []
for generation, ptxas in ((80, knobs.nvidia.ptxas), (90, knobs.nvidia.ptxas), (100, knobs.nvidia.ptxas_blackwell)):
    options = {"maxnreg": 96}
    found = report(generation, **options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled(launch(**options), generation).asm["ptx"])
        file.flush()
        command = [ptxas.path, "-v", "-lineinfo", "--regAllocOptLevel=2", file.name, "-o", "/dev/null",
                   f"--gpu-name=sm_{generation}{'a' if generation >= 90 else ''}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    rows.append([found.registers, int(re.search(r"Used (\\d+) registers", said)[1]),
                 found.spill_bytes, int(re.search(r"(\\d+) bytes spill stores", said)[1])])
print(json.dumps(rows))""")
    for registers, used, spilled, stored in rows:
        assert registers == used <= 96 and spilled == stored
    assert rows[0][2] > 0


def test_a_kernel_that_does_not_fit_is_an_error(with_gemm):
    said = with_gemm("""
try:
    report(80, BLOCK_K=128, num_stages=4)
except ValueError as error:
    print(json.dumps(str(error)))""")
    assert said.startswith("test, gemm, gemm cannot be launched on sm_80: it needs ") and "shared memory" in said


def test_the_driver_is_as_before_afterwards(with_gemm):
    assert with_gemm("""
from triton.runtime import driver
driver.set_active("mine")
report(90)
before = driver._active
try:
    report(80, BLOCK=7)  # no power of two: does not compile
except Exception:
    print(json.dumps([before, driver._active]))""") == ["mine", "mine"]


def test_kernels_of_one_target_keep_to_their_budgets():
    rows = compile_all("--target", "sm_90", *QUICK)
    assert {row.op for row in rows} == set(OPS)
    check(rows)


@pytest.mark.slow
def test_every_kernel_keeps_to_its_budget():
    rows = compile_all("--dtype", "float16", "--dtype", "bfloat16", "--jobs",
                       str(min(4, os.cpu_count() or 1)))
    check(rows)
    launched = {(row.op, row.target, name) for name, row in budgets.named(rows)}
    stale = [key for op, targets in budgets.load().items() for target, kernels in targets.items()
             for name in kernels if (key := (op, target, name)) not in launched]
    assert stale == [] and {row.op for row in rows} == set(OPS)


@pytest.mark.slow
@pytest.mark.parametrize("op, launch, kernels, most",
                         [("attention", "forward, head_dim 64", "forward_kernel", (5.5, 4.1, 3.9)),
                          ("attention", "backward, head_dim 64", "dq_kernel dkv_kernel", (4.9, 2.7, 2.7)),
                          ("contrastive", "forward, width 256, positives by pair", "_forward_kernel",
                           (3.2, 2.4, 2.3)), ("contrastive", "backward, width 256, positives by pair",
                                              "_queries_kernel _keys_kernel", (4.4, 4.4, 4.4)),])
def test_loops_are_no_longer_than_those_of_published_kernels(op, launch, kernels, most):
    """Instructions per m16n8k16 of the best published Triton kernels, same ptxas; ours take any size."""
    rows = compile_all("--op", op, "--launch", launch)
    for target, figure in zip(TARGETS, most, strict=True):
        ours = {row.kernel: row.instructions_per_mma for row in rows if row.target == target}
        assert all(ours[kernel] <= figure for kernel in kernels.split()), (target, ours)


@pytest.mark.slow
def test_the_newest_forward_leaves_the_limit_of_the_mufu():
    """Published forwards of head width 64 stop at 49 % of B200's tensor cores, limited by the MUFU."""
    rows = compile_all("--op", "attention", "--launch", "forward, head_dim 64*", "--target", "sm_100")
    whole = [row for row in rows if row.kernel == "forward_kernel" and row.config["BLOCK_N"] == 256]
    assert len(whole) == 2 and all(row.ceiling >= 0.7 for row in whole)


def report(**changes) -> KernelReport:
    values = {field.name: None for field in fields(KernelReport)} | {
        "op": "attention", "launch": "forward", "kernel": "_kernel", "target": "sm_80", "dtype": "float16",
        "registers": 100, "spill_bytes": 0, "shared_bytes": 1024, "instructions_per_mma": 4.0} | changes
    return KernelReport(**values)


def test_budgets_are_written_read_and_left(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps({"contrastive": {"sm_80": {"kept": {"registers": 1}}},
                                "attention": {"sm_80": {"gone": {}}, "sm_90": {"kept": {}}}}))
    rows = [report(), report(dtype="bfloat16", registers=104),
            report(registers=40, instructions_per_mma=None)]
    budgets.write(rows, path)
    written = json.loads(path.read_text())
    assert written["contrastive"] == {"sm_80": {"kept": {"registers": 1}}}
    assert written["attention"]["sm_90"] == {"kept": {}}
    first = {"registers": 104, "spill_bytes": 0, "shared_bytes": 1024, "instructions_per_mma": 4.08}
    second = {"registers": 40, "spill_bytes": 0, "shared_bytes": 1024, "instructions_per_mma": None}
    assert written["attention"]["sm_80"] == {"forward · _kernel": first, "forward · _kernel 2": second}
    assert budgets.excesses(rows, written) == []


@pytest.mark.parametrize("change, said", [
    ({"registers": 101}, "registers is 101, budget 100"),
    ({"spill_bytes": 4}, "spill_bytes is 4, budget 0"),
    ({"shared_bytes": 2048}, "shared_bytes is 2048, budget 1024"),
    ({"instructions_per_mma": 4.1}, "instructions_per_mma is 4.1, budget 4.08"),
    ({"instructions_per_mma": None}, "instructions_per_mma is None, budget 4.08"),
    ({"launch": "backward"}, "has no budget"),
])
def test_leaving_a_budget_is_said(tmp_path, change, said):
    budgets.write([report()], tmp_path / "budgets.json")
    known = json.loads((tmp_path / "budgets.json").read_text())
    (sentence,) = budgets.excesses([report(**change)], known)
    assert sentence.endswith(said) and sentence.startswith("attention, ")


def test_a_spill_gets_no_budget(tmp_path):
    budgets.write([report(spill_bytes=8)], tmp_path / "budgets.json")
    assert budgets.excesses([report(spill_bytes=8)], json.loads((tmp_path / "budgets.json").read_text()))


def test_the_command_prints_an_object_a_line_even_where_triton_interprets(monkeypatch, capfd):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels", "--json", "--op", "linear_cross_entropy", "--target", "sm_80", "--dtype",
                 "bfloat16", "--launch", "forward", "--jobs", "2"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert rows and all(row.keys() >= FIELDS for row in rows)
    assert {(row["op"], row["target"], row["dtype"])
            for row in rows} == {("linear_cross_entropy", "sm_80", "bfloat16")}


def test_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    rows = [asdict(replace(report(), loops=[], occupancy=0.125, ceiling=0.49, limit="MUFU",
                           loop_instructions=300, tensor_core_instructions=16, ptxas="12.8"))]
    # The same kernel in another launch.
    command._print([*rows, rows[0] | {"launch": "another", "spill_bytes": 0}])
    shown = capsys.readouterr().out
    assert all(text in shown
               for text in ("attention", "100", "0 B", "1 KiB", "4.00", "12%", "49% MUFU", "sm_80 12.8"))
    assert "another" not in shown


@pytest.mark.parametrize("options, said",
                         [(["--target", "sm_70"],
                           "--target: 'sm_70' is not known, choose from sm_80, sm_90, sm_100"),
                          (["--op", "attention,atention"], "--op: 'atention' is not known"),
                          (["--dtype", "int8"], "--dtype: 'int8' is not known"),
                          (["--jobs", "0"], "--jobs is 0: at least 1"),
                          (["--write-budgets", "--dtype", "float16"], "drop --launch and --dtype"),
                          (["--op", "linear_cross_entropy", "--launch", "no such", "--jobs", "1"],
                           "no launch of linear_cross_entropy"),])
def test_bad_options_are_one_clear_line(capfd, options, said):
    pytest.importorskip("triton")
    assert main(["kernels", *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("blip-fast: ") and said in line


def test_without_triton_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["kernels"]) == 2
    assert "needs the package triton, which is not installed" in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "blip_kernels.compiled.aot"], capture_output=True, text=True,
                          env=COMPILING | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and tuning would begin")
def test_tuning_needs_a_gpu(capfd, tmp_path):
    pytest.importorskip("triton")
    assert main(["kernels", "--tune", "--output", str(tmp_path / "configs.json")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "blip-fast: tuning measures on an NVIDIA GPU, and PyTorch finds none here: see blip-fast doctor"
    assert not (tmp_path / "configs.json").exists()


ENTRY = {"BLOCK_M": 128, "BLOCK_N": 16, "TILES": 4, "num_warps": 16, "num_stages": 1}


def test_candidates_differ_in_one_or_two_values_and_stay_in_bounds():
    found = list(tune.candidates(ENTRY))
    steps = {"BLOCK_M": {64, 256}, "BLOCK_N": {32}, "num_warps": {8}, "num_stages": {2}}
    for candidate in found:
        changed = {name: value for name, value in candidate.items() if value != ENTRY[name]}
        assert candidate.keys() == ENTRY.keys() and 1 <= len(changed) <= 2
        assert all(value in steps[name] for name, value in changed.items())
    assert len(found) == len({tuple(candidate.values()) for candidate in found}) == 5 + 2 * 3 + 3


def test_the_best_candidate_that_runs_is_chosen():
    def time(config):
        if config["BLOCK_M"] == 64:
            return None  # like a configuration that spills
        return 10.0 - (config["num_warps"] == 8) * 2 - (config["num_stages"] == 2) * 0.01
    # A tiny gain is no reason to change.
    assert tune.best(ENTRY, time) == (ENTRY | {"num_warps": 8}, 8.0, 10.0)
    with pytest.raises(RuntimeError, match="cannot run"):
        tune.best(ENTRY, lambda config: None)


def test_tuning_writes_a_table_that_launches_read(monkeypatch, tmp_path):
    """With a stand-in for the clock to which small is fast. An earlier run's entries stay."""
    configs = pytest.importorskip("blip_kernels.gpu.configs")
    output, said = tmp_path / "tuned.json", []
    table = configs.table("hard_negatives")
    output.write_text(json.dumps({"hard_negatives": {"merge": {"sm_80": table["merge"]["sm_80"]}}}))
    monkeypatch.setattr(tune, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "workloads", lambda op, dtype, device: [("a workload", lambda: [])])
    name = "draw, width 64, 16 bit"
    monkeypatch.setattr(tune, "entries_read", lambda op, table, target, noted: [name])
    monkeypatch.setattr(tune, "_timer", lambda *_: lambda config: 1.0 + sum(config.values()))
    before = dict(table[name]["sm_80"])
    try:
        tune.tune(["hard_negatives"], ["float16"], output, said.append)
        written = json.loads(output.read_text())["hard_negatives"]
        assert written.keys() == {"merge", name} and written[name]["sm_80"] != before
        assert "hard_negatives, draw, width 64, 16 bit (a workload, float16):" in said[0]
        configs.table.cache_clear()
        monkeypatch.setenv(configs.TUNED_VARIABLE, str(output))
        assert configs.config("hard_negatives", name, 80) == written[name]["sm_80"]
        monkeypatch.delenv(configs.TUNED_VARIABLE)
    finally:
        configs.table.cache_clear()
    assert configs.config("hard_negatives", name, 80) == before


def test_results_may_differ_by_rounding_only():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert tune._same(x * 1.001, x) and not tune._same(x * 1.1, x) and not tune._same(x * torch.nan, x)
    drawn = torch.arange(1000)
    assert tune._same(drawn.clone().index_fill_(0, drawn[:10], -1), drawn)
    assert not tune._same(drawn.clone().index_fill_(0, drawn[:30], -1), drawn)


def test_every_entry_of_the_tables_is_tuned_by_a_workload(tmp_path):
    """Which entries the workloads read, in 16 bit and float32. On a CPU: launches are recorded, none runs."""
    pytest.importorskip("triton")
    code = """
import json, torch
from blip_kernels.compiled import tune, workloads
from blip_kernels.compiled.aot import OPS
from blip_kernels.gpu import configs, kernel_launch
kernel_launch.why_not = lambda x: None
unread, device = {}, torch.device("cpu")
workloads._random = lambda *shape, dtype, device: torch.zeros(shape, dtype=dtype)  # at once
for op in OPS:
    table = configs.table(op)
    unread[op] = set(table)
    before = json.dumps(table)
    for dtype in (torch.bfloat16, torch.float32):
        with kernel_launch.noting(80, lambda *noted: None):
            calls = list(workloads.workloads(op, dtype, device))
        for label, run in calls:
            found = tune.entries_read(op, table, "sm_80", lambda: tune._noted(run, device))
            assert found and json.dumps(table) == before, label
            unread[op] -= set(found)
print(json.dumps({op: sorted(names) for op, names in unread.items()}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unread = json.loads(done.stdout)
    assert set(unread) == set(OPS) and not any(unread.values()), unread


def test_budgets_are_packaged():
    assert Path(budgets.FILE).is_relative_to(Path(budgets.__file__).parents[1]) and budgets.load().keys() <= set(OPS)
