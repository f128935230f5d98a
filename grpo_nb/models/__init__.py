"""The model and the machine: loading, modes, and what is installed."""
