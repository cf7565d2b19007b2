"""The distributed engine and what keeps its ranks together."""
