"""Sampling from the training weights, in this process."""
