"""Data sheets of the GPUs for which runs are planned and against which they are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """A data sheet's dense rates: FLOP/s by precision (`tf32` if PyTorch may round float32 products to it),
    and bytes/s of the memory, of NVLink and of the GPU's network card in an eight-GPU node, each one way."""

    name: str
    memory: float
    peaks: dict[str, float]
    bandwidth: float
    nvlink: float
    network: float

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in a recipe's `precision`, by PyTorch's current settings."""
        if precision == "float32" and torch.get_float32_matmul_precision() != "highest":
            precision = "tf32"
        return self.peaks[precision]

    def link(self, ranks: int) -> float:
        """Bytes/s that one GPU sends in a ring of `ranks`: NVLink within a node,
        its network card across nodes."""
        return self.nvlink if ranks <= GPUS_PER_NODE else self.network


def _peaks(half: float, tf32: float, float32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32}


# NVIDIA's data sheets of the SXM boards; network: a DGX's cards, 200 Gbit/s per GPU
# for A100, 400 for later ones.
GPUS = [
    Gpu("A100", 80e9, _peaks(312e12, 156e12, 19.5e12), 2.04e12, 300e9, 25e9),
    Gpu("H100", 80e9, _peaks(989e12, 494e12, 67e12), 3.35e12, 450e9, 50e9),
    Gpu("H200", 141e9, _peaks(989e12, 494e12, 67e12), 4.8e12, 450e9, 50e9),
    Gpu("B200", 180e9, _peaks(2250e12, 1125e12, 75e12), 8.0e12, 900e9, 50e9),
]


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name` names; None if its data sheet is not here,
    as for PCIe and NVL boards."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((gpu for gpu in GPUS if gpu.name in device_name.replace("-", " ").split()), None)
