"""Data, scoring and the two stages of training."""
