"""The doctor: whatever a package does becomes a sentence, and the report follows from the findings."""

import json
from dataclasses import replace

import pytest
from blip_kernels.cpu import processor

from blip_fast import doctor
from blip_fast.cli import main
from blip_fast.doctor import PACKAGES, Finding, Probe, decide, diagnose, look_for, look_for_java
from blip_fast.inference.precision import resolve
from blip_fast.tasks.model_loading import chosen_device

APEX = next(probe for probe in PACKAGES if probe.name == "NVIDIA Apex")
ODD_CODE = "import json, odd\nprint(json.dumps({'detail': 'fine', 'more': 1}))"
ODD = Probe("Odd", "odd", "odd", "tests", ODD_CODE, "get it")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a module where Python finds it, in this process and in the probes' processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


@pytest.mark.parametrize("content, usable, said", [
    ("", True, "fine"),
    ("print('noise on stdout')", True, "fine"),
    ("raise ImportError('undefined symbol: _ZN3c10')", False,
     "cannot be used: ImportError: undefined symbol: _ZN3c10"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", False, "crashes on import (signal 11)"),
    ("import os; os._exit(0)", False, "cannot be used: no message"),
    ("import sys; sys.exit(3)", False, "cannot be used: no message"),
    ("import time; time.sleep(60)", False, "did not import within 2 s"),
    ("this is no Python", False, "cannot be used: SyntaxError"),
])
def test_whatever_a_package_does_becomes_a_sentence(install, monkeypatch, content, usable, said):
    monkeypatch.setattr(doctor, "TIMEOUT", 2 if "sleep" in content else 60)
    install("odd.py", content)
    finding = look_for(ODD)
    assert finding.usable == usable and said in finding.detail
    assert finding.facts == ({"more": 1} if usable else {})


def test_a_missing_package_comes_with_its_remedy():
    assert look_for(ODD) == Finding("Odd", "tests", False, "not installed: get it")
    assert not look_for(replace(ODD, module="no.such.parent")).usable


def test_a_folder_in_the_working_directory_is_not_the_package(install, tmp_path, monkeypatch):
    install("odd.py", "")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "odd.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path / "here")
    assert look_for(ODD).usable


def test_apex_of_pypi_is_told_from_nvidias(install):
    install("torch.py", "")
    install("apex/__init__.py", "")
    assert "not NVIDIA's" in look_for(APEX).detail
    install("apex/optimizers.py", "class FusedAdam: pass")
    assert "without its CUDA extensions" in look_for(APEX).detail
    install("amp_C.py", "")
    assert look_for(APEX).usable


def test_java_that_is_missing_or_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not look_for_java().usable
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'no Java runtime present' >&2\nexit 1\n")
    java.chmod(0o755)
    assert look_for_java() == Finding("Java", look_for_java().purpose, False, "no Java runtime present")


def test_a_machine_without_anything_is_diagnosed(monkeypatch):
    monkeypatch.setattr(doctor, "is_there", lambda module: False)
    monkeypatch.setenv("PATH", "")
    diagnosis = diagnose()
    assert not any(finding.usable for finding in diagnosis.findings)
    uses = {part.name: part.uses for part in diagnosis.parts}
    assert uses["device"] == "CPU"
    unused = ("attention", "precision", "training", "training input")
    assert all(uses[name].startswith("nothing") for name in unused)


def found(**changed):
    """The findings of a machine on which everything works, except those named."""
    names = ("PyTorch", "CUDA", "blip_kernels", "Precision", "Java", "DALI on the GPU",
             *(probe.name for probe in PACKAGES))
    facts = {"known": ["auto", "triton", "sdpa", "flash_attn"], "auto": "bfloat16",
             "slow": {"float16": "no products"}}
    every = {name: Finding(name, "", True, "triton" if name == "blip_kernels" else f"{name} found",
                           facts=facts)
             for name in names}
    for name, reason in changed.items():
        every[name] = Finding(name, "", False, reason)
    return tuple(every.values())


def parts(findings):
    return {part.name: part for part in decide(findings)}


def test_a_machine_with_everything():
    decided = parts(found())
    assert decided["device"].uses == "CUDA found"
    assert decided["attention"].uses == "triton"
    assert decided["attention"].why_not == {"FlashAttention": "can be chosen: BLIP_FAST_ATTENTION=flash_attn",
                                            "xFormers": "this version has no such backend"}
    assert decided["precision"].uses == "auto is bfloat16 in inference and training, float32 in heat maps"
    assert decided["precision"].why_not == {"float16": "no products"}
    assert "NCCL" in decided["training"].uses and "GPU" in decided["training input"].uses


@pytest.mark.parametrize("missing, part, alternative", [
    ("FlashAttention", "attention", "FlashAttention"),
    ("CUDA", "device", "CUDA"),
    ("DeepSpeed", "training", "DeepSpeed"),
    ("NVIDIA Apex", "optimiser", "NVIDIA Apex FusedAdam"),
    ("DALI on the GPU", "training input", "DALI on the GPU"),
    ("pycocoevalcap", "caption metrics", "BLEU, METEOR, ROUGE-L, CIDEr, SPICE"),
    ("Java", "caption metrics", "PTB tokenizer, METEOR, SPICE"),
])
def test_a_part_says_why_it_does_without(missing, part, alternative):
    assert parts(found(**{missing: "because"}))[part].why_not[alternative] == "because"


def test_the_command_reports_this_machine_as_json(monkeypatch, capsys):
    monkeypatch.setenv("BLIP_FAST_ATTENTION", "sideways")
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in said["findings"]}
    assert findings["PyTorch"]["usable"] and findings["PyTorch"]["version"]
    assert {"CUDA", "Triton", "FlashAttention", "xFormers", "NVIDIA Apex", "DALI on the CPU",
            "DALI on the GPU",
            "DeepSpeed", "torchao", "Ray", "Java", "pycocoevalcap", "PyAV"} <= set(findings)
    assert findings["Precision"]["detail"] == f"the processor multiplies {processor.instruction_set()}"
    assert findings["Precision"]["facts"]["auto"] == resolve("auto", chosen_device(None))
    attention = next(part for part in said["parts"] if part["name"] == "attention")
    assert "'sideways' is not known" in attention["uses"]  # reported, not replaced by another backend


def test_the_command_prints_tables(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "is_there", lambda module: False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    # square brackets are text, not mark-up
    assert "'blip-fast[flash]'" in out and "Why not the others" in out
