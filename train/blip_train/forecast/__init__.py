"""What a run will need of each GPU, by formulas."""
