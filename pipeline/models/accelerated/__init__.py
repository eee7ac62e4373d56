"""Layers that compute the same as torch's, faster on CPU."""
