"""Run by torchrun in two processes: TRL's step and ours under DDP or FSDP2, with different numbers of packs on each rank."""
import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from parity import gradients, grpo_trainer, micro_batch, relative, tiny
from trl import GRPOTrainer
from windows import generation_batch, optimiser_steps, prepare

from grpo_nb.trainers import grpo
from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL
from grpo_nb.trainers.tokens import token_stats

kind = sys.argv[1] # ddp, fsdp2, fsdp2-bf16
stock_loss, stock_logps = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
trainer = grpo_trainer(tiny(), tempfile.mkdtemp(), loss_type="grpo", per_device_train_batch_size=8)
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2


def shard(model):
    "FSDP2, as accelerate sets it up; in bf16 with outputs cast to bf16 and with checkpoints too."
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16
    policy = (
        MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=half)
        if kind == "fsdp2-bf16"
        else MixedPrecisionPolicy()
    )
    mesh = init_device_mesh("cpu", (2,))
    if kind == "fsdp2-bf16": model.model.layers = torch.nn.ModuleList(checkpoint_wrapper(layer) for layer in model.model.layers)
    for layer in model.model.layers: fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


if kind == "ddp": model = trainer.accelerator.prepare_model(trainer.model)
else:
    model = shard(trainer.model)
    type(trainer.accelerator).is_fsdp2 = property(lambda self: True) # as accelerate says when it has sharded the model itself
trainer.model_wrapped = model
trainer.current_gradient_accumulation_steps = 1
trainer.args.max_tokens_per_pack = 20 if rank == 0 else 45


def full(grads):
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in grads.items()}
    return {k.replace("_checkpoint_wrapped_module.", ""): v for k, v in whole.items()}


def truth(batches):
    "The gradient in fp32 without wrappers, averaged over the ranks."
    plain = tiny().train()
    # which is TRL's to 1e-6 in fp32
    for inputs in batches: grpo.compute_loss(stock_loss)(trainer, plain, copy.copy(inputs)).backward()
    for p in plain.parameters(): dist.all_reduce(p.grad.div_(2))
    return gradients(plain)


def agree(ours, theirs, batches):
    "In fp32 to 1e-5; in bf16 ours is as near to fp32's gradient as TRL's own, plus a tenth."
    if kind != "fsdp2-bf16":
        assert relative(ours, theirs) < 1e-5, relative(ours, theirs)
        return relative(ours, theirs)
    exact = truth(batches)
    a, b = (mean_error({n.removeprefix("module."): g for n, g in grads.items()}, exact) for grads in (ours, theirs))
    assert a < 1.1 * b + 1e-4, (a, b)
    return a / b


def mean_error(grads, exact):
    "Root mean square difference over the root mean square of the gradient."
    def flat(d): return torch.cat([d[n].float().flatten() for n in sorted(exact)])
    return ((flat(grads) - flat(exact)).norm() / flat(exact).norm()).item()


def run(compute, batches, model=model):
    model.zero_grad()
    trainer._metrics["train"].clear()
    for i, inputs in enumerate(batches):
        last = i == len(batches) - 1
        if last: compute(trainer, model, copy.copy(inputs)).backward()
        else:
            with trainer.accelerator.no_sync(model): compute(trainer, model, copy.copy(inputs)).backward()
    return full(gradients(model)), {k: list(v) for k, v in trainer._metrics["train"].items()}


close = dict(rtol=1e-4, atol=1e-5) if kind != "fsdp2-bf16" else dict(rtol=0.05, atol=0.05)
for n in (1, 2): # micro-batches in an optimiser step
    batches = [micro_batch(seed=10 * n + rank + 5 * i, completion=(0, 12)) for i in range(n)]
    theirs, metrics = run(stock_loss, batches)
    ours, found = run(grpo.compute_loss(stock_loss), batches)
    packs = [None, None]
    dist.all_gather_object(packs, found["packing/packs"])
    assert packs[0] != packs[1], packs
    worst = agree(ours, theirs, batches)
    for name, value in metrics.items(): assert torch.allclose(torch.tensor(found[name]), torch.tensor(value), **close), name
    GRPOTrainer._get_per_token_logps_and_entropies = grpo.per_token_logps(stock_logps) # TRL's own loss over replayed log-probs
    replayed, _ = run(stock_loss, batches)
    GRPOTrainer._get_per_token_logps_and_entropies = stock_logps
    agree(replayed, theirs, batches)
    grpo.compute_loss(stock_loss)(trainer, model, copy.copy(batches[0])) # a loss that is dropped leaves nothing behind
    again, _ = run(grpo.compute_loss(stock_loss), batches)
    agree(again, theirs, batches)
if rank == 0: print(f"{kind}: gradients agree, packs {packs}, worst {worst:.1e}", flush=True)

if kind != "fsdp2-bf16": # windows, through the trainer's own training step
    for sizes, cut in (([4, 4], (4, 4, 1)), ([4, 3], (4, 2, 2))):
        every = cut[1] * cut[2]
        batches = [generation_batch(8 * cut[1], seed=50 + 10 * i + rank) for i in range(-(-sum(sizes) // every))]
        runs = []
        for patched in (False, True):
            if patched: PatchFastRL("grpo")
            prepare(trainer, *cut, batches, stock_logps, old=cut[2] > 1)
            runs.append(optimiser_steps(trainer, sizes, model=model, no_sync=True))
            UnpatchFastRL()
        for (a, g), (b, h) in zip(runs[1][0], runs[0][0]):
            assert torch.allclose(a, b, atol=1e-5) and relative(full(g), full(h)) < 1e-5, relative(full(g), full(h))
        assert len(runs[1][1]["packing/packs"]) < len(runs[1][1]["entropy"])
    if rank == 0: print(f"{kind}: windows agree", flush=True)

if kind == "ddp": # rows without a gradient in one rank only, also in the second step, where DDP lays out its buckets anew
    fresh = torch.nn.parallel.DistributedDataParallel(tiny()) # as with gradient checkpointing: it looks for no unused parameters
    for seed in range(3):
        inputs = micro_batch(seed=70 + 2 * seed + rank, completion=(4, 12))
        inputs["advantages"][:2] = float(rank)
        theirs, _ = run(stock_loss, [inputs])
        ours, _ = run(grpo.compute_loss(stock_loss), [inputs], fresh)
        assert relative(ours, theirs) < 1e-5, relative(ours, theirs)
# the other trainers' log-probs: one rank has a single pack, the other runs its packs again in the backward; both log something
# in between
if kind == "ddp":
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
