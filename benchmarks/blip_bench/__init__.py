"""Benchmarks: the cases, peers and timing of `blip-fast bench` and of `pytest benchmarks/`."""
