"""Triton kernels, one file an op. Imported only where an op runs through Triton, so that a CPU needs no Triton."""
