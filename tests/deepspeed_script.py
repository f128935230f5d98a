"""Run by torchrun in two processes: TRL's step and ours under DeepSpeed, with different numbers of packs on each rank."""
import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from parity import grpo_trainer, micro_batch, relative, tiny
from trl import GRPOTrainer

from grpo_nb.rl import grpo

stage, kind = int(sys.argv[1]), sys.argv[2]
from deepspeed.utils import safe_get_full_grad

stock_loss, stock_logps = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
config = dict(train_batch_size="auto", train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto",
              zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False,
              zero_optimization=dict(stage=stage, reduce_bucket_size=2000, stage3_param_persistence_threshold=100,
                                     stage3_prefetch_bucket_size=2000, stage3_max_live_parameters=10000))
trainer = grpo_trainer(tiny(), tempfile.mkdtemp(), loss_type="grpo", deepspeed=config, gradient_accumulation_steps=2)
acc = trainer.accelerator
print("TYPE", acc.distributed_type, acc.num_processes, acc.device, type(trainer.model), flush=True)
optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0)
model, optimizer = acc.prepare(trainer.model, optimizer)
rank = acc.process_index
trainer.model_wrapped = model
trainer.model.train(); model.train()
trainer.args.max_tokens_per_pack = 20 if rank == 0 else 45
print(type(model), dist.get_backend(), flush=True)

def run(compute, batches):
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = len(batches)
    for i, inputs in enumerate(batches):
        model.set_gradient_accumulation_boundary(i == len(batches) - 1)
        loss = compute(trainer, model, copy.copy(inputs))
        model.backward(loss, scale_wrt_gas=False)
    grads = {n: safe_get_full_grad(p).clone() for n, p in model.module.named_parameters()}
    model.step()
    return grads, {k: list(v) for k, v in trainer._metrics["train"].items()}

for n in (1, 2):
    batches = [micro_batch(seed=10 * n + rank + 5 * i, completion=(0, 12)) for i in range(n)]
    theirs, metrics = run(stock_loss, batches)
    again, _ = run(stock_loss, batches)
    print("stock twice", relative(again, theirs), max(v.abs().max() for v in theirs.values()), flush=True)
    GRPOTrainer._get_per_token_logps_and_entropies = grpo.per_token_logps(stock_logps)
    f = stock_loss if kind == "replay" else grpo.compute_loss(stock_loss)
    ours, found = run(f, batches)
    GRPOTrainer._get_per_token_logps_and_entropies = stock_logps
    print("ours", n, relative(ours, theirs), found.get("packing/packs"), flush=True)
