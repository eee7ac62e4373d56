"""Measuring models on stores; cells, aggregates and the files that hold them."""
