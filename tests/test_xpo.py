"""XPO's log-probs through packs, beside stock TRL's (1.12 and 1.13 have the trainer)."""
import warnings
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from grpo_nb.patch.core import PatchSet
from grpo_nb.trainers import xpo
from grpo_nb.step.forward import uninstall
from parity import FAMILIES, assert_same, gradients, tiny, tokenizer

warnings.filterwarnings("ignore")
pytestmark = pytest.mark.skipif(find_spec("trl.experimental.xpo") is None, reason="this TRL has no XPO trainer")
PROMPTS = ["w3 w4 w5", "w7", "w9 w9 w10 w11 w12", "w3 w20"]


def trainer_of(path, lora=False, budget=None, **config):
    from trl.experimental.xpo import XPOConfig, XPOTrainer
    torch.manual_seed(1)
    reward_config = FAMILIES["llama"]()
    reward_config.num_labels = 1
    judge = AutoModelForSequenceClassification.from_config(reward_config)
    args = XPOConfig(
        **dict(
            output_dir=str(path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, max_new_tokens=8,
            per_device_train_batch_size=4, alpha=1e-2, temperature=0.7, missing_eos_penalty=None,
        )
        | config
    )
    args.max_tokens_per_pack = budget
    peft = {}
    if lora:
        from peft import LoraConfig
        peft["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return XPOTrainer(
        model=tiny("llama"), reward_funcs=judge, reward_processing_classes=tokenizer(), args=args,
        processing_class=tokenizer(), train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS * 8]), **peft,
    )


def step(trainer, model=None):
    "One training step with the draws of a fixed seed."
    torch.manual_seed(5)
    trainer.model.train().zero_grad()
    for values in trainer.stats.values(): values.clear()
    loss = trainer.training_step(trainer.model, {"prompt": list(PROMPTS)})
    return loss, gradients(trainer.model), {k: list(v) for k, v in trainer.stats.items()}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("budget", [None, 30])
def test_same_step(loss_type, lora, budget, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, lora, budget, loss_type=loss_type, gradient_accumulation_steps=2)
    if not lora: # a policy that is not its reference
        with torch.no_grad(): trainer.model.model.layers[0].mlp.up_proj.weight.mul_(1.3)
    sampled, generate = [], trainer._generate_completions
    monkeypatch.setattr(trainer, "_generate_completions", lambda *a: sampled.append(generate(*a)) or sampled[-1])
    theirs = step(trainer)
    with PatchSet(xpo.patches()): ours = step(trainer)
    uninstall(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(*sampled)) and set(ours[2]) == set(theirs[2])
    monkeypatch.setattr(trainer, "_generate_completions", lambda *a: sampled[0]) # fp64 would draw other tokens
    models = [m for m in (trainer.model, trainer.ref_model, trainer.reward_funcs) if m is not None]
    assert_same(ours, theirs, lambda change: step(trainer), *models, metric=(1e-5, 1e-4))


def test_step_trl(tmp_path):
    "step='trl' leaves everything to TRL."
    trainer = trainer_of(tmp_path)
    trainer.args.step = "trl"
    with PatchSet(xpo.patches()): loss, _, _ = step(trainer)
    assert loss.isfinite() and "forward" not in vars(trainer.model)


def test_twenty_steps(tmp_path):
    trainer = trainer_of(tmp_path, budget=40, max_steps=20, logging_steps=1, learning_rate=3e-3, save_strategy="no", alpha=0.05)
    with PatchSet(xpo.patches()): trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
