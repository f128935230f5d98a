"""Hugging Face's generate against the engines, from a source tree: the same as `grpo-nb bench rollout`, with the same options."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_nb.app.cli import main

if __name__ == "__main__": sys.exit(main(["bench", "rollout", *sys.argv[1:]]))
