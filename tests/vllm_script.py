"""Run by torchrun in two processes: each has a vLLM engine of its own, on the weights that it trains; samples follow every step."""
import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from grpo_nb.engines.base import Sampling
from grpo_nb.engines.hf import HuggingFace
from grpo_nb.trainers.patch import PatchFastRL
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers.state import vllm_engines

PatchFastRL("grpo")
from trl import GRPOConfig, GRPOTrainer

model, tokenizer = tiny_model(get("sort_digits", n_train=8, n_test=4), steps=0, hidden_size=64, layers=1)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def variety(completion_ids, **_): return [float(len(set(c))) for c in completion_ids]


trainer = GRPOTrainer(
    model,
    variety,
    GRPOConfig(
        output_dir=sys.argv[1], engine="vllm", use_cpu=True, bf16=False, max_steps=3, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=8, learning_rate=1e-2, beta=0.0, logging_steps=1, save_strategy="no",
        report_to=[], gradient_checkpointing=False, ddp_find_unused_parameters=False,
    ),
    Dataset.from_list([{"prompt": f"{i} 3"} for i in range(8)]),
    processing_class=tokenizer,
)
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
trainer.train()
for line in trainer.state.log_history[:-1]: assert line["sampling/sampling_logp_difference/max"] < 1e-4, line

engine = vllm_engines[trainer.vllm_generation]
engine.sync(model)
prompts, greedy = [tokenizer(f"{i + 2 * rank} 1").input_ids for i in range(2)], Sampling(greedy=True, max_tokens=8)
assert engine.generate(prompts, 2, greedy).completions == HuggingFace(model, tokenizer).generate(prompts, 2, greedy).completions
mine = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(*both) and mine.abs().sum() > 0
engine.close()
dist.barrier()
if rank == 0: print("both sampled from their own weights")
