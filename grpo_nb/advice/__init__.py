"""What is wrong, and what would be right: rules over settings, data and a run that goes on."""
