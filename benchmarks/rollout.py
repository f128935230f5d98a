"""The engines against each other, from a source tree: the same as `grpo-nb bench rollout`, with the same options."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_nb.bench_rollout import arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments(parser)
    sys.exit(main(parser.parse_args()))
