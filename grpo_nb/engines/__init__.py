"""What samples completions: Hugging Face's generate, ours in place, vLLM."""
