"""Input: packed shards, the DALI pipeline and the drawn scenes."""
