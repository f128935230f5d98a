"""What it costs to cut one optimiser step into micro-batches, for the trainers whose loss is TRL's own code.

    python benchmarks/accumulation.py
    python benchmarks/accumulation.py --device cuda --model qwen2.5-3b --lora 64 --prompts 16

The rows of each case of `preference.py` and `supervised.py`, as one micro-batch and as four, stock and patched in turns: seconds of all forwards
and backwards (on a CPU the process's own), medians. "cut" is what four micro-batches cost for each second that one costs. GRPO and RLOO are
in `grpo-nb bench step`.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import preference
import supervised
import torch

from grpo_nb.app.bench import MODELS, machine
from grpo_nb.patch.core import PatchSet

CASES = {name: case for name, case in (preference.CASES | supervised.CASES).items() if name in ("dpo", "kto", "sft", "reward")}


def batches(case, shape, parts, device):
    "The step's rows in so many micro-batches."
    def one(seed):
        ids = preference.rows(replace(shape, prompts=shape.prompts // parts), MODELS[shape.model][1], case.paired, seed)
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.batch(*ids).items()}
    return [one(seed) for seed in range(parts)]


def optimiser_step(trainer, given, device) -> None:
    "As transformers' loop: all batches are taken from the loader, and then trained on one after the other."
    found, items = trainer.get_batch_samples(iter(given), len(given), device)
    trainer.current_gradient_accumulation_steps = len(found)
    for i, batch in enumerate(found):
        trainer.accelerator.gradient_state._set_sync_gradients(i == len(found) - 1)
        trainer.training_step(trainer.model, batch, items)
    trainer.state.global_step += 1
    trainer.model.zero_grad()


def measure(case, shape, device, repeats):
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = {(kind, parts): [] for kind in ("trl", "grpo_nb") for parts in (1, 4)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = preference.make(case, shape, folder, device)
        steps = {parts: batches(case, shape, parts, device) for parts in (1, 4)}
        for turn in range(repeats + 1): # the first is not counted
            for kind, parts in seconds:
                with nullcontext() if kind == "trl" else PatchSet(case.patches()):
                    if device == "cuda": torch.cuda.synchronize()
                    start = clock()
                    optimiser_step(trainer, steps[parts], device)
                    if device == "cuda": torch.cuda.synchronize()
                    if turn: seconds[kind, parts].append(clock() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--algorithm", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", choices=list(MODELS), default=preference.SHAPE.model)
    parser.add_argument("--prompts", type=int, default=8, help="of the whole step, two rows each")
    parser.add_argument("--lora", type=int, default=0)
    a = parser.parse_args()
    if a.device == "cpu": torch.set_num_threads(1)
    shape = replace(preference.SHAPE, model=a.model, prompts=a.prompts, lora=a.lora)
    print(json.dumps(machine(a.device)), f"{shape}", f"{'':8} {'TRL 1x':>8} {'4x':>7} {'cut':>5} {'ours 1x':>8} {'4x':>7} {'cut':>5} {'TRL/ours at 4x':>15}", sep="\n")
    for name in a.algorithm:
        with redirect_stdout(sys.stderr): found = measure(CASES[name], shape, a.device, a.repeats)
        (t1, t4), (o1, o4) = ([found[kind, parts] for parts in (1, 4)] for kind in ("trl", "grpo_nb"))
        print(f"{name:8} {t1:8.3f} {t4:7.3f} {t4 / t1:5.2f} {o1:8.3f} {o4:7.3f} {o4 / o1:5.2f} {t4 / o4:15.2f}", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
