"""Images and videos, opened."""
