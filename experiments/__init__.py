"""Experiments: real training, subset by subset, and what a surrogate makes of the scores."""
