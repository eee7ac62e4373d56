"""Classifiers: built from a description, saved, loaded, and run on a device."""
