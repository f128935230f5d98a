"""Peak memory of a step by the number of micro-batches in its window: `python benchmarks/window_memory.py [micro-batches ...]`."""
import sys
import tempfile
from dataclasses import replace

import torch

from grpo_nb import PatchFastRL
from grpo_nb.app import bench
from grpo_nb.tasks import shapes


def peak(micro_batches:int, patched:bool) -> int: # bytes
    "Of one optimiser step with so many micro-batches of 8 rows, one prompt of 256 tokens each; TRL shuffles the rows."
    shape = replace(shapes.SHAPES["qwen3-cpu-4x256+8x64"], prompts=micro_batches, micro_batches=micro_batches)
    trainer = bench.make_trainer(shapes.make_model(shape, "cpu", torch.float32), shape, tempfile.mkdtemp(), "cpu")
    bench.begin(trainer)
    bench.hand_out(trainer, shapes.make_batch(shape, shapes.MODELS[shape.model][1], "cpu"))
    if patched: bench.optimiser_step(trainer)
    return bench.peak_on_cpu(lambda: bench.optimiser_step(trainer))


def main(counts=(1, 4, 16)):
    torch.set_num_threads(1)
    theirs = peak(1, False)
    PatchFastRL("grpo")
    for n in counts:
        ours = peak(n, True)
        print(f"{n:3} micro-batches of 8 rows: {ours / 2**20:.0f} MiB "
              f"(stock TRL, one micro-batch at a time: {theirs / 2**20:.0f} MiB)", flush=True)


if __name__ == "__main__": main([int(a) for a in sys.argv[1:]] or (1, 4, 16))
