"""Train language models with GRPO in a notebook."""
import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

# bitsandbytes warns at import, on every machine without the optional package `kernels`, that it cannot download a faster CPU kernel
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in record.getMessage())

try:
    __version__ = version("grpo_nb")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

# The public face. Each name is imported on first use, so that `import grpo_nb` and the command line stay quick.
_public = {
    "FastLanguageModel": ("grpo_nb.models.load", "FastLanguageModel"),
    "PatchFastRL": ("grpo_nb.trainers.patch", "PatchFastRL"),
    "UnpatchFastRL": ("grpo_nb.trainers.patch", "UnpatchFastRL"),
    "GRPORun": ("grpo_nb.run.run", "GRPORun"),
    "rewards": ("grpo_nb.tasks.rewards", None),
    "save": ("grpo_nb.models.save", None),
    "tasks": ("grpo_nb.tasks.library", None),
    "doctor": ("grpo_nb.advice.doctor", "doctor"),
    "runs": ("grpo_nb.record.runs", "runs"),
    "studio": ("grpo_nb.ui.studio.studio", "studio"),
}
__all__ = list(_public)

# What a name has beside it: a step without memory says what the estimate is, which is made on a higher floor than the step
# for; what shows a run is made where views are; loaded models get `fast_generate`, whose engines stand higher, and the ways out
_beside = {"PatchFastRL": ("advice.memory",), "GRPORun": ("advice.memory",), "runs": ("ui.runs.page", "launch.watched"),
           "FastLanguageModel": ("engines.vllm.fast", "models.save")}


def __getattr__(name):
    if name not in _public: raise AttributeError(f"module 'grpo_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _public[name]
    found = import_module(module)
    for beside in _beside.get(name, ()): import_module(f"grpo_nb.{beside}")
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


def __dir__(): return sorted([*globals(), *__all__])
