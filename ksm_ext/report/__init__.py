"""The page that shows a surrogate, in one file."""
