"""Scores ``F(S)`` of subsets of tasks: what surrogates are fitted to."""
