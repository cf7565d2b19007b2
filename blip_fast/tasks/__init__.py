"""What a BLIP model is used for: one file a task."""
