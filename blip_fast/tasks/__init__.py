"""The uses of a BLIP model: one file per task."""
