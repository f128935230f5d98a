"""Run by torchrun in two processes: SFT and DPO, stock and patched, one rank's pack with fewer micro-batches than the other's.

Whole runs under DDP, and two optimiser steps under FSDP2."""
import sys
from itertools import islice

import torch
import torch.distributed as dist
from parity import gradients, relative
from test_joint import Joint, make, patches, trained

counts, init = [], Joint.__init__


def counted(self, step, packs, read, jobs, first):
    counts.append(len(jobs))
    return init(self, step, packs, read, jobs, first)


Joint.__init__ = counted
for algorithm, room in (("sft", (120, 2000)), ("dpo", (200, 2000)), ("sft", (2000, 2000))):
    runs = []
    for on in (False, True):
        trainer = make(algorithm, sys.argv[1], ddp_find_unused_parameters=False)
        trainer.args.max_tokens_per_pack = room[trainer.accelerator.process_index]
        assert trainer.accelerator.num_processes == 2
        if not on: runs.append(trained(trainer)[0])
        else:
            counts.clear()
            with patches(algorithm): runs.append(trained(trainer)[0])
    assert len(runs[0]) == len(runs[1]) == 2
    for g, h in zip(*runs): assert relative(g, h) < 1e-5, (algorithm, relative(g, h))
    every = [None, None]
    dist.all_gather_object(every, list(counts))
    assert every[0] == every[1] and every[0], every
    if dist.get_rank() == 0: print(f"{algorithm} {room}: joint forwards agree, {every[0]}", flush=True)


def sharded(trainer):
    "FSDP2, as accelerate sets it up."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), trainer.model
    for layer in model.model.layers: fully_shard(layer, mesh=mesh)
    trainer.model_wrapped = fully_shard(model, mesh=mesh)
    type(trainer.accelerator).is_fsdp2 = property(lambda self: True) # as accelerate says when it has sharded the model itself
    return trainer.model_wrapped


def optimiser_steps(trainer, model):
    "Gradients of two steps of four micro-batches, as transformers' loop runs them."
    torch.manual_seed(0)
    batches, found = list(islice(trainer.get_train_dataloader(), 4)), []
    for step in range(2):
        trainer.state.global_step = step
        given, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.accelerator.device)
        trainer.current_gradient_accumulation_steps = len(given)
        for i, batch in enumerate(given):
            last = i == len(given) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            if last: trainer.training_step(model, batch, items)
            else:
                with trainer.accelerator.no_sync(model): trainer.training_step(model, batch, items)
        found.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in gradients(model).items()})
        model.zero_grad()
    return found


trainer = make("sft", sys.argv[1])
model = sharded(trainer)
model.train()
trainer.args.max_tokens_per_pack = (120, 2000)[dist.get_rank()]
theirs = optimiser_steps(trainer, model)
counts.clear()
with patches("sft"): ours = optimiser_steps(trainer, model)
for g, h in zip(ours, theirs, strict=True): assert relative(g, h) < 1e-5, relative(g, h)
assert counts
if dist.get_rank() == 0: print(f"fsdp2: joint forwards agree, {counts}", flush=True)
