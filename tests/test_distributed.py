"""Two processes: no all-reduce but on the last pack, and ranks with different numbers of packs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

here = Path(__file__).resolve().parent


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(here / "distributed_script.py"), kind],
                          cwd=here, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{kind}: gradients agree" in done.stdout


def test_a_run_in_two_processes(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(here / "run_script.py"), str(tmp_path)],
                          cwd=here, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the processes agree" in done.stdout
