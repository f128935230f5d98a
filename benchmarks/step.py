"""Stock TRL against the packed step, from a source tree: the same as `grpo-nb bench step`, with the same options."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_nb.app.cli import main

if __name__ == "__main__": sys.exit(main(["bench", "step", *sys.argv[1:]]))
