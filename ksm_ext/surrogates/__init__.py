"""Surrogates ``F(S)``: fitting, choosing, asking, storing."""
