"""Settings and rewards to choose."""
