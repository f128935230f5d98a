"""What a run leaves: its folder, written as it goes and read back."""
