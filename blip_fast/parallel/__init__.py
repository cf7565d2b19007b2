"""Threads, processes and machines that share work."""
