"""The model: image encoder, text stack, heads, and what they read."""
