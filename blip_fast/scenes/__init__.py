"""Drawn scenes: pictures, captions and questions whose truth is known."""
