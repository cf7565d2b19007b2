"""Plain, padded reference models written straight from the paper: slow, obvious, independent of the product."""
