"""Runs that were, beside each other: the list, overlays, a report."""
