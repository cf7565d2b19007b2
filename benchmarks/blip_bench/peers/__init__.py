"""Other inference engines, each in its strongest form, with transformers' weights."""
