"""All views of one run."""
