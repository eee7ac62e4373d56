"""Measurements that are not tests: run by hand, in the root of a checkout."""
