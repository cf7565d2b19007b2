"""The pre-training and fine-tuning system."""
