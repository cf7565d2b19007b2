"""Drawn scenes: pictures, captions and questions with known ground truth."""
