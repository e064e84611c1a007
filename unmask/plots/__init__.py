"""Figures, drawn from rows of results alone."""
