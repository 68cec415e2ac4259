"""What ``benchmarks/peers.py`` compares: a section each, with its methods, measures and tables."""
