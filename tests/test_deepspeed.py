"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3: TRL's step and ours, with different numbers of packs on each rank."""
from importlib.util import find_spec

import pytest
from torchrun import in_two_processes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")]


@pytest.mark.parametrize("kind", ["full", "lora", "train"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, kind):
    found = in_two_processes("deepspeed_script.py", stage, kind, DS_ACCELERATOR="cpu") # the first builds an operator
    assert f"ZeRO-{stage} {kind}: the same step" in found
