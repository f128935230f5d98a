"""The packed step: a model, an Accelerator and a few numbers."""
