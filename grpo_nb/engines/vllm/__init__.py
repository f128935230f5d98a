"""vLLM in this process, on the training weights or on a copy."""
