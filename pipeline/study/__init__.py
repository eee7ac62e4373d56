"""params.yaml as frozen values, and the planned work."""
