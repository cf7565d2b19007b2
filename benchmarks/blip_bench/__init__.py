"""What is measured and beside what: cases, peers and clock of `blip-fast bench` and of `pytest benchmarks/`."""
