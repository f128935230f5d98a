"""Settings as a value: code, YAML, a script."""
