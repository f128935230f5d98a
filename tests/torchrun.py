"""Shared by the tests of several processes: a script in two of them."""
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def in_two_processes(script, *args, **env) -> str: # what it printed
    "Run a script of this folder under torchrun; it must end well."
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", str(HERE / script), *map(str, args),
        ],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=800, # of the 900 of a test: a busy machine is eight times slower
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def in_turn(*scripts) -> str: # each: (script, *args), which leaves the process group alone
    "Run several scripts in the same two processes; all must end well."
    return in_two_processes("scripts_in_turn.py", json.dumps([list(map(str, s)) for s in scripts]))
