"""The data of a step and how it is laid out: a batch, the plan of its packs, the mask of a pack."""
