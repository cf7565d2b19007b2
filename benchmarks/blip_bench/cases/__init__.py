"""The benchmark cases: one file per task."""
