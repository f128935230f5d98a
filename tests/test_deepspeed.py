"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3: TRL's step and ours, with different numbers of packs on each rank."""
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

here = Path(__file__).resolve().parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")]


@pytest.mark.parametrize("kind", ["full", "lora", "train"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, kind):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(here / "deepspeed_script.py"),
                           str(stage), kind], cwd=here, env=env, capture_output=True, text=True, timeout=280) # the first builds an operator
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"ZeRO-{stage} {kind}: the same step" in done.stdout
