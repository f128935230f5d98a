"""Two processes: no all-reduce but on the last pack, and ranks with different numbers of packs."""
import pytest
from torchrun import in_two_processes


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-bf16"])
def test_two_processes(kind): assert f"{kind}: gradients agree" in in_two_processes("distributed_script.py", kind)


def test_a_run_in_two_processes(tmp_path): assert "the processes agree" in in_two_processes("run_script.py", tmp_path)


def test_micro_batches_in_one_forward(tmp_path): assert in_two_processes("joint_script.py", tmp_path).count("joint forwards agree") == 4
