"""What others would take to caption, each in its strongest form, with transformers' weights."""
