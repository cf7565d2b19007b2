"""Rewritten published code, as a baseline for ours."""
