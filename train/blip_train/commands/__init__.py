"""The commands of `blip-fast` that train."""
