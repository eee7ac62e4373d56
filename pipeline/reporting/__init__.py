"""Report page, figures, and the paper's published numbers."""
