"""Networks, recipes, training plans and strategies as frozen values."""
