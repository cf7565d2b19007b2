"""Kernels over packed segments. This package knows tensors and nothing of BLIP."""

from blip_kernels.attention import attention

__all__ = ["attention"]
