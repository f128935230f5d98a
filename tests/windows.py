"""Shared by the tests of windows: optimiser steps as transformers' loop runs them, on a prepared generation batch."""
import copy

import torch
from parity import gradients, micro_batch

TIMES = ("step_time", "step/tokens_per_second")


def generation_batch(rows, seed=0, groups=None, **shape):
    "What TRL's sampling hands on, before it is shuffled and split."
    batch = micro_batch(rows=rows, groups=groups or max(1, rows // 4), seed=seed, **shape)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch


def prepare(trainer, accumulation, per_generation, iterations, batches, logps=None, old=False, check=False):
    """Give a trainer its next generation batches; `old`: with log-probs of the weights that are there when it asks.

    `check`: the first step is compared with TRL's own loss, as it is by default; tests/test_drift.py does so."""
    args = trainer.args
    args.self_check = check
    args.gradient_accumulation_steps, args.steps_per_generation, trainer.num_iterations = accumulation, per_generation, iterations
    trainer._step, trainer._buffered_inputs, trainer.state.global_step = 0, None, 0
    trainer.__dict__.pop("_grpo_nb", None)
    left = iter(copy.copy(b) for b in batches)

    def sampled(inputs):
        batch = dict(next(left))
        if old:
            ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            with torch.no_grad():
                batch["old_per_token_logps"] = logps(trainer, trainer.model, ids, mask, batch["completion_ids"].shape[1])[0]
        return batch
    trainer._generate_and_score_completions = sampled


def optimiser_steps(trainer, sizes, lr=0.01, model=None, no_sync=False):
    "Gradients and losses of optimiser steps of so many micro-batches; between two, the largest gradient moves a weight by `lr`."
    model, found = model or trainer.model, []
    trainer._metrics["train"].clear()
    trainer._current_train_step_time = 0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(5) # TRL shuffles
    for size in sizes:
        model.zero_grad()
        trainer.current_gradient_accumulation_steps, losses = size, []
        for i in range(size):
            trainer.accelerator.gradient_state._set_sync_gradients(i == size - 1)
            if no_sync and i < size - 1:
                with trainer.accelerator.no_sync(model): losses.append(trainer.training_step(model, None, None))
            else: losses.append(trainer.training_step(model, None, None))
        found.append((torch.stack(losses), gradients(model)))
        with torch.no_grad():
            there = [p for p in model.parameters() if p.grad is not None]
            largest = max([p.grad.abs().max().item() for p in there], default=0) or 1.0
            for p in there: p -= lr / largest * p.grad
        trainer.state.global_step += 1
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(before[n])
    model.zero_grad()
    return found, {k: list(v) for k, v in trainer._metrics["train"].items() if k not in TIMES}
