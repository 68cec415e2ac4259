"""Measured once and told in README.md and docs/: one command each."""
