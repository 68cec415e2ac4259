"""Tables of scores: files, the roles of their columns, masks and scores."""
