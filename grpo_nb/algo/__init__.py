"""The objectives, one short function each."""
