"""The settings of a run as a value, as Python code, as YAML for TRL, and as a plain TRL script."""
