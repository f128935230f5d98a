"""Two processes: no all-reduce but on the last pack, and ranks with different numbers of packs."""
from torchrun import in_turn

KINDS = ("ddp", "fsdp2", "fsdp2-bf16")


def test_two_processes(tmp_path):
    "A run and its steering, then TRL's step and ours under DDP and FSDP2, then micro-batches in one forward."
    said = in_turn(
        ("run_script.py", tmp_path / "run"),
        *(("distributed_script.py", kind) for kind in KINDS),
        ("joint_script.py", tmp_path / "joint"),
    )
    assert "the processes agree" in said
    for kind in KINDS: assert f"{kind}: gradients agree" in said
    assert said.count("joint forwards agree") == 4
