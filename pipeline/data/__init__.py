"""Data sets: facts, sources, Zarr stores and seeding."""
