"""Tasks, their answers and rewards, and the small models that they are shown with."""
from importlib import import_module


def __getattr__(name): # the names of `tasks.library`, imported on first use: `grpo_nb.tasks.get("sort_digits")`
    if name.startswith("__"): raise AttributeError(name)
    return getattr(import_module(".library", __name__), name)


def __dir__(): return sorted([*globals(), *import_module(".library", __name__).__all__])
