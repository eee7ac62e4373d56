"""params.yaml as frozen values, and what they ask for."""
