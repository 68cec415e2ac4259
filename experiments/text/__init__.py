"""Which domain of text helps which, and which mixture of them is best."""
