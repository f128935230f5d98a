"""Run by torchrun in two processes: TRL's step and ours under DeepSpeed's ZeRO, with different numbers of packs on each rank."""
import copy
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad, safe_get_full_fp32_param
from parity import grpo_trainer, micro_batch, relative, tiny
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from grpo_nb.trainers import grpo

stage, kind = int(sys.argv[1]), sys.argv[2]
stock_loss, stock_logps = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
packed_loss, packed_logps = grpo.compute_loss(stock_loss), grpo.per_token_logps(stock_logps)
config = dict(train_batch_size="auto", train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto",
              zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False,
              zero_optimization=dict(stage=stage, reduce_bucket_size=2000, stage3_param_persistence_threshold=100,
                                     stage3_prefetch_bucket_size=2000, stage3_max_live_parameters=10000)) # many small collectives


def prepared(model, **changes):
    "The trainer, and its model in DeepSpeed's engine; the optimiser leaves the weights where they are."
    trainer = grpo_trainer(model, tempfile.mkdtemp(), loss_type="grpo", deepspeed=config, gradient_accumulation_steps=2, **changes)
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.0)
    engine, _ = trainer.accelerator.prepare(trainer.model, optimizer)
    trainer.args.max_tokens_per_pack = 20 if trainer.accelerator.process_index == 0 else 45
    engine.train()
    return trainer, engine


def run(trainer, engine, compute, batches, scale=1.0):
    "Gradients and metrics of one optimiser step."
    trainer._metrics["train"].clear()
    trainer.current_gradient_accumulation_steps = len(batches)
    for i, inputs in enumerate(batches):
        engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
        engine.backward(compute(trainer, engine, copy.copy(inputs)) * scale, scale_wrt_gas=False)
    grads = {n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.step()
    return grads, {k: list(v) for k, v in trainer._metrics["train"].items()}


def compare(trainer, engine, n, seed, one=False):
    batches = [micro_batch(seed=seed + trainer.accelerator.process_index + 5 * i, completion=(0, 12)) for i in range(n)]
    theirs, metrics = run(trainer, engine, stock_loss, batches)
    assert max(v.abs().max() for v in theirs.values()) > 1e-4
    ours, found = run(trainer, engine, packed_loss, batches)
    packs = [None, None]
    dist.all_gather_object(packs, found["packing/packs"])
    assert packs == [[1.0] * n] * 2 if one else packs[0] != packs[1], packs
    errors = [relative(ours, theirs)]
    for name, value in metrics.items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(value), rtol=1e-4, atol=1e-5), name
    halves, _ = run(trainer, engine, packed_loss, batches, scale=0.5)
    errors.append(relative({k: 2 * v for k, v in halves.items()}, theirs))
    GRPOTrainer._get_per_token_logps_and_entropies = packed_logps # TRL's own loss over our log-probs
    replayed, _ = run(trainer, engine, stock_loss, batches)
    GRPOTrainer._get_per_token_logps_and_entropies = stock_logps
    errors.append(relative(replayed, theirs))
    print(n, errors, packs, flush=True)
    assert max(errors) < 1e-5, errors


def trained(model, loss, logps, folder):
    "The weights after two steps of training, generation and reference included."
    torch.manual_seed(0)
    GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies = loss, logps
    trainer = grpo_trainer(
        model, folder, deepspeed=config, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_steps=2,
        beta=0.04, gradient_accumulation_steps=2, save_strategy="no", logging_steps=1, max_grad_norm=1.0,
    )
    trainer.reward_funcs = [lambda completions, **kw: [float(sum(map(ord, c)) % 7) for c in completions]]
    trainer.args.max_tokens_per_pack = 20 if trainer.accelerator.process_index == 0 else 45
    trainer.train()
    GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies = stock_loss, stock_logps
    return {n: safe_get_full_fp32_param(p).clone() for n, p in trainer.model.named_parameters()}, trainer.state.log_history


if kind == "full":
    trainer, engine = prepared(tiny())
    assert trainer.accelerator.distributed_type == "DEEPSPEED" and trainer.accelerator.num_processes == 2
    for n in (1, 2): compare(trainer, engine, n, 10 * n)
    for reentrant in (False, True):
        trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant: trainer.model.enable_input_require_grads()
        compare(trainer, engine, 2, 20, one=reentrant)
elif kind == "lora":
    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer, engine = prepared(get_peft_model(tiny(), adapter))
    for n in (1, 2): compare(trainer, engine, n, 10 * n)
else:
    models = [tiny(), tiny()] # before ZeRO-3 shards every model that is made
    start = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    folder = tempfile.mkdtemp() # each rank's own, with the reference: later the first rank alone would write it
    models[0].save_pretrained(f"{folder}/model")
    deepspeed.init_distributed("gloo")
    theirs, stock = trained(models[0], stock_loss, stock_logps, folder)
    ours, packed = trained(models[1], packed_loss, packed_logps, folder)
    moved = {n: v - start[n] for n, v in theirs.items()}
    error = relative({n: v - start[n] for n, v in ours.items()}, moved)
    print(
        error,
        [
            (a.get("loss"), b.get("loss"), a.get("grad_norm"), b.get("grad_norm"), a.get("kl"), b.get("kl"))
            for a, b in zip(stock, packed)
        ],
        flush=True,
    )
    assert max(v.abs().max() for v in moved.values()) > 1e-3 and error < 1e-4, error
if dist.get_rank() == 0: print(f"ZeRO-{stage} {kind}: the same step", flush=True)
dist.destroy_process_group()
