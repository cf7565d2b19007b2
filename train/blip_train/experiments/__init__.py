"""Whole experiments: the demo, the tasks, the bootstrapping loop, the re-ranker."""
