"""Helpers for chat templates: each name says what TRL or transformers has for it."""
from ...app.unsloth import __getattr__ # noqa: F401
