"""Figures, the page, and the paper's published numbers."""
