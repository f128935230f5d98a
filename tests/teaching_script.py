"""Run by torchrun in two processes: groups that are sampled again stand in two of them, and both decide alike."""
import json
import sys
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from grpo_nb import PatchFastRL
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers.resample import teaching_of

PatchFastRL("grpo")
task = get("sort_digits", n_train=48, n_test=8)
model, tokenizer = tiny_model(task, steps=0, hidden_size=64, layers=1)
folder = Path(sys.argv[1])


def rare(completions, log_extra, **kwargs):
    texts = [c[-1]["content"] for c in completions]
    log_extra("text", texts)
    return [float(sum(map(ord, text)) % 6 == 0) for text in texts]


args = GRPOConfig(output_dir=str(folder), max_steps=2, logging_steps=1, per_device_train_batch_size=12, num_generations=8,
                  max_completion_length=3, use_cpu=True,
                  learning_rate=0.1, optim="sgd", report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False,
                  disable_tqdm=True, self_check=False, resample="zero_spread", curriculum="pass_rate")
trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=rare, args=args, train_dataset=task.train)
rank = trainer.accelerator.process_index
assert trainer.accelerator.num_processes == 2
trainer.train()
sums = torch.stack([p.detach().double().abs().sum() for p in trainer.model.parameters()]).sum().item()
logs = trainer._logs
texts = [c[-1]["content"] for c in logs["completion"]]
assert texts == list(logs["extra"]["text"]), "a text stands beside another's completion"
rates = teaching_of(trainer).curriculum.rates.plain()
history = [log for log in trainer.state.log_history if "resample/extra" in log]
told = dict(weights=sums, rates=rates, drawn=list(teaching_of(trainer).drawn), texts=texts)
(folder / f"{rank}.json").write_text(json.dumps(told))
if rank == 0: (folder / "logs.json").write_text(json.dumps([[log["frac_reward_zero_std"],
                                                             log["resample/extra"]] for log in history]))
