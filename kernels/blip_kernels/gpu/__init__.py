"""Triton kernels and their launches. Imported only when an op runs through Triton: a CPU needs no Triton."""
