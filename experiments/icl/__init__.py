"""In-context learning: which demonstrations in a prompt help a language model."""
