"""Data sets on disk (`shards/`) and the batches that training reads from them (`input/`)."""
