"""Stock TRL against the packed step: the same as `grpo-nb bench step`, runnable from a source tree.

    python benchmarks/step.py [--device cpu|cuda] [--shape NAME ...] [--repeats N] [--max-tokens N] [--json]
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_nb.bench import DEFAULTS, bench_step, machine, report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(json.dumps(machine(options.device)))
    for name in options.shape or DEFAULTS[options.device]:
        print(report(bench_step(name, options.device, options.repeats, options.max_tokens), options.json), flush=True)
