"""Run by torchrun in two processes: TRL's step and ours under DDP (or FSDP2), with different numbers of packs on each rank."""
import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from parity import gradients, grpo_trainer, micro_batch, relative, tiny
from trl import GRPOTrainer

from grpo_nb.trainers import grpo
from grpo_nb.step import packed as steps
from grpo_nb.step.tokens import token_stats

kind = sys.argv[1]
stock_loss, stock_logps = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
trainer = grpo_trainer(tiny(), tempfile.mkdtemp(), loss_type="grpo")
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
if kind == "fsdp2":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = trainer.model
    for layer in model.model.layers: fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    type(trainer.accelerator).is_fsdp2 = property(lambda self: True) # as accelerate says when it has sharded the model itself
    steps.collective_forward = lambda trainer: True
else: model = trainer.accelerator.prepare_model(trainer.model)
trainer.current_gradient_accumulation_steps = 1
trainer.args.max_tokens_per_pack = 20 if rank == 0 else 45


def full(grads): return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in grads.items()}


def run(compute, batches, model=model):
    model.zero_grad()
    trainer._metrics["train"].clear()
    for i, inputs in enumerate(batches):
        last = i == len(batches) - 1
        if last: compute(trainer, model, copy.copy(inputs)).backward()
        else:
            with trainer.accelerator.no_sync(model): compute(trainer, model, copy.copy(inputs)).backward()
    return full(gradients(model)), {k: list(v) for k, v in trainer._metrics["train"].items()}


for n in (1, 2): # micro-batches in an optimiser step
    batches = [micro_batch(seed=10 * n + rank + 5 * i, completion=(0, 12)) for i in range(n)]
    theirs, metrics = run(stock_loss, batches)
    ours, found = run(grpo.compute_loss(stock_loss), batches)
    packs = [None, None]
    dist.all_gather_object(packs, found["packing/packs"])
    assert packs[0] != packs[1], packs
    assert relative(ours, theirs) < 1e-5, relative(ours, theirs)
    for name, value in metrics.items(): assert torch.allclose(torch.tensor(found[name]), torch.tensor(value), rtol=1e-4, atol=1e-5), name
    for scale in (0.5,): # a guess that has to be put right, in both ranks
        trainer._grpo_nb_factor = scale
        again, _ = run(grpo.compute_loss(stock_loss), batches)
        assert relative(again, theirs) < 1e-5
    if kind == "ddp": # TRL's own loss over replayed log-probs
        GRPOTrainer._get_per_token_logps_and_entropies = grpo.per_token_logps(stock_logps)
        replayed, _ = run(stock_loss, batches)
        GRPOTrainer._get_per_token_logps_and_entropies = stock_logps
        assert relative(replayed, theirs) < 1e-5
if kind == "ddp": # rows without a gradient in one rank only, also in the second step, where DDP lays out its buckets anew
    fresh = torch.nn.parallel.DistributedDataParallel(tiny()) # as with gradient checkpointing: it looks for no unused parameters
    for seed in range(3):
        inputs = micro_batch(seed=70 + 2 * seed + rank, completion=(4, 12))
        inputs["advantages"][:2] = float(rank)
        theirs, _ = run(stock_loss, [inputs])
        ours, _ = run(grpo.compute_loss(stock_loss), [inputs], fresh)
        assert relative(ours, theirs) < 1e-5, relative(ours, theirs)
if kind == "ddp": # the other trainers' log-probs: one rank has a single pack, the other runs its packs again in the backward; both log something in between
    fresh, plain = torch.nn.parallel.DistributedDataParallel(tiny()), tiny()
    for seed in range(3):
        inputs = micro_batch(seed=90 + 2 * seed + rank, completion=(4, 12), pad_inside=False)
        ids, mask = (torch.cat([inputs["prompt_" + n], inputs["completion_" + n]], 1) for n in ("ids", "mask"))
        target = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
        fresh.zero_grad(), plain.zero_grad()
        values = token_stats(trainer, fresh, ids, mask, target, ()).log_probs
        dist.all_reduce(values.detach().sum())
        values.sum().backward()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float() / trainer.temperature
        (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * target[:, 1:]).sum().backward()
        for p in plain.parameters(): p.grad is None or dist.all_reduce(p.grad.div_(2))
        assert relative({n.removeprefix("module."): g for n, g in gradients(fresh).items()}, gradients(plain)) < 1e-5
if rank == 0: print(f"{kind}: gradients agree, packs {packs}", flush=True)
dist.destroy_process_group()
