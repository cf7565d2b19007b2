"""Processes apart from the server: those that open pictures, and those that hold models."""
