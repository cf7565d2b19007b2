"""How a model is run for inference: its precision, its weights packed, images encoded in batches."""
