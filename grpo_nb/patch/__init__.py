"""Find a place in source by its syntax tree; a patch that checks, applies, reverts and shows its difference."""
