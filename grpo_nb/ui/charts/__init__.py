"""Metrics, live."""
