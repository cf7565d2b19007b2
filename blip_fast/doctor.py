"""Finds the accelerators and optional packages that work here, and what each part of blip_fast uses as a
result, and why not more.

Each probe imports its package in its own process. A package that is missing, does not fit PyTorch or crashes
on import thus becomes a sentence in the report and stops nothing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from blip_fast.metrics.java import find_java

NEEDS_CUDA = "needs CUDA (see there)"
TIMEOUT = 120  # seconds for one import; the first import after an installation compiles bytecode


@dataclass(frozen=True)
class Probe:
    """A package to look for.

    `code` runs in its own process and prints a JSON object as its last line, with a readable `detail`. If the
    package cannot be used, it exits with a sentence instead.
    """

    name: str
    module: str
    distribution: str
    purpose: str
    code: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """What a probe found. `detail` describes it, or says why it cannot be used and what helps."""

    name: str
    purpose: str
    usable: bool
    detail: str
    version: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One part of blip_fast: what it uses here, and why it does not use the alternatives."""

    name: str
    uses: str
    why_not: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor knows about this machine."""

    system: str
    findings: tuple[Finding, ...]
    parts: tuple[Part, ...]


_TORCH = """
import json, os, torch
cuda = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        cuda.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    why = ""
elif torch.version.cuda is None:
    why = f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build from pytorch.org"
else:
    why = f"no GPU answers to PyTorch {torch.__version__}: see what nvidia-smi says"
cpu = torch.backends.cpu.get_cpu_capability()
print(json.dumps({"detail": f"{torch.get_num_threads()} CPU threads, {cpu}", "cuda": cuda, "why_no_cuda": why}))
"""

_ATTENTION = """
import json
import torch
from blip_kernels.backends import ATTENTION_BACKENDS, attention_backend
device = "cuda" if torch.cuda.is_available() else "cpu"
queries = [torch.empty(1, 1, 64, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)]
chosen = [attention_backend(q) for q in queries]
print(json.dumps({"detail": chosen[0] if len(set(chosen)) == 1 else f"{chosen[0]} in float32, {chosen[1]} in 16 bits",
                  "known": ATTENTION_BACKENDS}))
"""

_PRECISION = """
import json
import torch
from blip_fast.inference.precision import PRECISIONS, advice, check, resolve
from blip_kernels.cpu.processor import instruction_set
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
def slow(name):
    try:
        check(name, device)
    except ValueError as error:
        return str(error).removeprefix(f"dtype {name} ")
    return (advice(name, device) or "").removeprefix(f"precision: {name} ").strip("()")
print(json.dumps({"detail": f"the processor multiplies {instruction_set()}", "auto": resolve("auto", device),
                  "slow": {name: slow(name) for name in PRECISIONS[1:] if slow(name)}}))
"""

_APEX = """
import json, sys
try:
    from apex.optimizers import FusedAdam
except Exception:
    sys.exit("the installed package named apex is not NVIDIA's (it has no apex.optimizers.FusedAdam): uninstall it and "
             "build github.com/NVIDIA/apex")
try:
    import torch, amp_C
except ImportError:
    sys.exit("NVIDIA Apex is here without its CUDA extensions: build it again with --cpp_ext --cuda_ext")
print(json.dumps({"detail": "FusedAdam"}))
"""

_DALI = """
import json
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
pipeline = Pipeline(batch_size=1, num_threads=1, device_id={device_id})
with pipeline:
    pipeline.set_outputs(fn.random.uniform(device="{device}"))
pipeline.build()
pipeline.run()
print(json.dumps({{"detail": "a pipeline ran on the {device}"}}))
"""


def _imports(statement: str, detail: str) -> str:
    return f"import json\n{statement}\nprint(json.dumps({{'detail': {detail!r}}}))"


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


_EXTRA = "pip install 'blip-fast[{}]'".format
_DALI_EXTRA = f"{_EXTRA('dali-cuda12')}, or dali-cuda13 (Linux only)"
_DALI_DISTRIBUTION = ("nvidia-dali-cuda130" if _installed_version("nvidia-dali-cuda130")
                      else "nvidia-dali-cuda120")

TORCH = Probe("PyTorch", "torch", "torch", "tensors", _TORCH, "pip install blip-fast")
ATTENTION = Probe("blip_kernels", "blip_kernels", "blip-fast", "attention over segments", _ATTENTION,
                  "pip install blip-fast")
PRECISION = Probe("Precision", "blip_fast", "blip-fast", "types with products in hardware", _PRECISION,
                  "pip install blip-fast")
DALI_GPU = Probe("DALI on the GPU", "nvidia.dali", _DALI_DISTRIBUTION, "decoding on the GPU",
                 _DALI.format(device_id=0, device="gpu"), _DALI_EXTRA)
PACKAGES = (
    Probe("Triton", "triton", "triton", "our own GPU kernels", _imports("import triton.language", "imports"),
          "pip install triton (Linux only)"),
    Probe("FlashAttention", "flash_attn", "flash-attn", "attention on GPUs",
          _imports("from flash_attn import flash_attn_varlen_func", "flash_attn_varlen_func"),
          _EXTRA("flash")),
    Probe("xFormers", "xformers", "xformers", "attention on GPUs",
          _imports("from xformers.ops import memory_efficient_attention", "memory_efficient_attention"),
          _EXTRA("xformers")),
    Probe("NVIDIA Apex", "apex", "apex", "fused optimiser on GPUs", _APEX,
          "build github.com/NVIDIA/apex (apex on PyPI is another package)"),
    Probe("DALI on the CPU", "nvidia.dali", _DALI_DISTRIBUTION, "decoding and augmentation",
          _DALI.format(device_id=None, device="cpu"), _DALI_EXTRA),
    Probe("DeepSpeed", "deepspeed", "deepspeed", "training", _imports("import deepspeed", "imports"),
          _EXTRA("train")),
    Probe("PEFT", "peft", "peft", "low-rank adapters", _imports("from peft import LoraConfig", "LoRA"),
          _EXTRA("peft")),
    Probe("torchao", "torchao", "torchao", "low-precision weights", _imports("import torchao", "imports"),
          _EXTRA("int8")),
    Probe("Ray", "ray", "ray", "many machines", _imports("import ray.data", "ray.data"), _EXTRA("scale")),
    Probe("FastAPI", "fastapi", "fastapi", "serving",
          _imports("import fastapi, prometheus_client, python_multipart, uvicorn", "imports"),
          _EXTRA("serve")),
    Probe("pycocoevalcap", "pycocoevalcap", "pycocoevalcap", "BLEU, METEOR, CIDEr, SPICE",
          _imports("from pycocoevalcap.eval import COCOEvalCap", "COCOEvalCap"), _EXTRA("eval")),
    Probe("PyAV", "av", "av", "video", _imports("import av", "imports"), _EXTRA("video")),
)


def diagnose() -> Diagnosis:
    """Run all probes, several at a time, and decide what each part uses."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        torch, kernels, precision, *packages = pool.map(look_for, (TORCH, ATTENTION, PRECISION, *PACKAGES))
    cuda = _cuda(torch)
    dali_gpu = (look_for(DALI_GPU) if cuda.usable
                else Finding(DALI_GPU.name, DALI_GPU.purpose, False, NEEDS_CUDA))
    findings = (torch, cuda, kernels, precision, *packages, dali_gpu, look_for_java())
    system = (f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
              f"{os.cpu_count()} CPU cores")
    return Diagnosis(system, findings, decide(findings))


def look_for(probe: Probe) -> Finding:
    """Import a package in its own process. Nothing that the package does there raises here."""
    if not is_there(probe.module):
        return Finding(probe.name, probe.purpose, False, f"not installed: {probe.remedy}")
    installed = _installed_version(probe.distribution)
    # -P: a folder of the same name in the working directory must not be taken for the package.
    command = [sys.executable, "-P", "-c", probe.code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Finding(probe.name, probe.purpose, False, f"did not import within {TIMEOUT} s", installed)
    if done.returncode < 0:
        return Finding(probe.name, probe.purpose, False, f"crashes on import (signal {-done.returncode})",
                       installed)
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        return Finding(probe.name, probe.purpose, True, facts.pop("detail"), installed, facts)
    except (IndexError, ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(probe.name, probe.purpose, False, f"installed, but cannot be used: {reason}",
                       installed)


def remedy(package: str | None) -> str:
    """How to install the package named by a failed import."""
    return next((probe.remedy for probe in PACKAGES if probe.module.partition(".")[0] == package),
                "see `blip-fast doctor`")


def look_for_java() -> Finding:
    """Look for the `java` command."""
    purpose = "PTB tokenizer, METEOR, SPICE"
    java = find_java()
    return Finding("Java", purpose, java.runs, java.description)


def is_there(module: str) -> bool:
    """Whether the module can be found. It is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):  # a parent package is missing or broken
        return False


def _cuda(torch: Finding) -> Finding:
    devices = torch.facts.get("cuda", [])
    detail = "; ".join(devices) or torch.facts.get("why_no_cuda") or torch.detail
    return Finding("CUDA", "GPU", bool(devices), detail)


def decide(findings: tuple[Finding, ...]) -> tuple[Part, ...]:
    """What each part uses, given the findings. This describes the rules of the code elsewhere; it does not
    set them."""
    found = {finding.name: finding for finding in findings}
    inference = Part("images for inference", "Pillow in threads",
                     {"DALI": "here inference equals transformers', which uses Pillow"})
    return (_device(found), _precision(found), _attention(found), _training(found), _optimiser(found),
            _input(found), inference, _caption_metrics(found))


def _device(found: Mapping[str, Finding]) -> Part:
    cuda = found["CUDA"]
    return Part("device", cuda.detail) if cuda.usable else Part("device", "CPU", {"CUDA": cuda.detail})


def _precision(found: Mapping[str, Finding]) -> Part:
    precision = found["Precision"]
    if not precision.usable:
        return Part("precision", f"nothing: {precision.detail}")
    return Part("precision",
                f"auto is {precision.facts['auto']} in inference and training, float32 in heat maps",
                precision.facts["slow"])


def _attention(found: Mapping[str, Finding]) -> Part:
    kernels = found["blip_kernels"]
    if not kernels.usable:
        return Part("attention", f"nothing: {kernels.detail}")
    why_not = {}
    for backend, name in (("triton", "Triton"), ("flash_attn", "FlashAttention"), ("xformers", "xFormers")):
        if backend == kernels.detail:
            continue
        if backend not in kernels.facts["known"]:
            why_not[name] = "this version has no such backend"
        elif not found[name].usable:
            why_not[name] = found[name].detail
        elif not found["CUDA"].usable:
            why_not[name] = NEEDS_CUDA
        else:
            why_not[name] = f"can be chosen: BLIP_FAST_ATTENTION={backend}"
    return Part("attention", kernels.detail, why_not)


def _training(found: Mapping[str, Finding]) -> Part:
    deepspeed = found["DeepSpeed"]
    if not deepspeed.usable:
        return Part("training", "nothing: blip-fast train cannot run", {"DeepSpeed": deepspeed.detail})
    if found["CUDA"].usable:
        return Part("training", "DeepSpeed with NCCL on the GPUs")
    return Part("training", "DeepSpeed with gloo on the CPU", {"NCCL": NEEDS_CUDA})


def _optimiser(found: Mapping[str, Finding]) -> Part:
    apex = found["NVIDIA Apex"]
    return Part("optimiser", "PyTorch's fused AdamW", {
        "NVIDIA Apex FusedAdam": "not used by this version" if apex.usable else apex.detail,
        "DeepSpeed's CPU Adam": "does not resume to the same bits"})


def _input(found: Mapping[str, Finding]) -> Part:
    cpu, gpu = found["DALI on the CPU"], found["DALI on the GPU"]
    if gpu.usable:
        return Part("training input", "DALI, JPEG decoding on the GPU")
    if cpu.usable:
        return Part("training input", "DALI on the CPU", {"DALI on the GPU": gpu.detail})
    return Part("training input", "nothing: blip-fast train and data pack cannot run", {"DALI": cpu.detail})


def _caption_metrics(found: Mapping[str, Finding]) -> Part:
    coco, java = found["pycocoevalcap"], found["Java"]
    if not coco.usable:
        return Part("caption metrics", "LM loss, unigram entropy, slots of scenes",
                    {"BLEU, METEOR, ROUGE-L, CIDEr, SPICE": coco.detail})
    if not java.usable:
        return Part("caption metrics", "BLEU, ROUGE-L and CIDEr, words split without Java",
                    {"PTB tokenizer, METEOR, SPICE": java.detail})
    return Part("caption metrics", "BLEU, METEOR, ROUGE-L, CIDEr; SPICE once its models are fetched")
