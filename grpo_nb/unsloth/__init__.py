"""The names that Unsloth's notebooks import, which stand in `grpo_nb.app.unsloth`. Importing this patches TRL's trainers."""
from ..app.unsloth import * # noqa: F403
from ..app.unsloth import __getattr__ # noqa: F401
