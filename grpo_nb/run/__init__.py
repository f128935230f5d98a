"""A run: what it is given, how it is steered and measured."""
