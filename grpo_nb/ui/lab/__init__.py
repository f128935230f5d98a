"""Rewards tried on completions before they train a model."""
