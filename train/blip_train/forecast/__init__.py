"""What a run will ask of each GPU, as formulas."""
