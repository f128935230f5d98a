"""A run in processes of its own: what goes along, how it is started, what the kernel sees."""
