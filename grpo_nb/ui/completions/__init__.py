"""Completions, by step and prompt."""
