"""Measured once and told in docs/: one command each."""
