"""Modular arithmetic: which parts of the table of an operation help a transformer to learn it."""
