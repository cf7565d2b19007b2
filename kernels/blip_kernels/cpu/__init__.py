"""Implementations for CPUs: matrix products, packed and quantised weights, attention without Triton."""
