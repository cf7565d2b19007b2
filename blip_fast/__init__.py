"""blip_fast: BLIP (Li et al., ICML 2022) for training and inference at speed."""
