"""Data sets on disk: annotated folders, published formats, tar shards."""
