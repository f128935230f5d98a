"""What needs nothing of ours: checks of what was given, and events."""
