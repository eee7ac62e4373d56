"""Benchmarks, run by hand in the root of a checkout; they are not tests."""
