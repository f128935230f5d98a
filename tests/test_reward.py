"""Reward and process-reward trainers: stock TRL beside the packed step, under whatever TRL is installed."""
import warnings
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, GPT2Config

from grpo_nb.ground import events
from grpo_nb.patch.core import PatchSet
from grpo_nb.trainers import reward
from grpo_nb.step.forward import uninstall
from grpo_nb.step.read import causal_lm
from parity import FAMILIES, VOCAB, assert_same, gradients, tokenizer

warnings.filterwarnings("ignore")
CLASSES = {"reward": AutoModelForSequenceClassification, "prm": AutoModelForTokenClassification}
needs_prm = pytest.mark.skipif(find_spec("trl.experimental.prm") is None, reason="this TRL has no process-reward trainer")
BOTH = ["reward", pytest.param("prm", marks=needs_prm)]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    "Each test hears what is said once."
    monkeypatch.setattr(events, "said", set())


def classifier(algorithm, family="qwen3", labels=None, lora=False, seed=0, **changes):
    torch.manual_seed(seed)
    config = FAMILIES[family]() if isinstance(family, str) else family
    config.num_labels = labels or (1 if algorithm == "reward" else 2)
    for name, value in changes.items(): setattr(config, name, value)
    model = CLASSES[algorithm].from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 0.15)
    if lora:
        from peft import LoraConfig, get_peft_model
        kind = "SEQ_CLS" if algorithm == "reward" else "TOKEN_CLS"
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type=kind)
        )
    return model


def pairs(n=6, seed=0, eos=1, margin=False):
    "Pairs with a common beginning, ragged, a pad id in the middle of one."
    g = torch.Generator().manual_seed(seed)
    def draw(low, high): return torch.randint(3, VOCAB, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    rows = []
    for i in range(n):
        prompt = draw(1, 14)
        chosen, rejected = prompt + draw(1, 9) + [eos], prompt + draw(1, 9 + 3 * i) + [eos]
        if i == 1: chosen[1] = rejected[1] = 0
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected} | ({"margin": 0.1 * i} if margin else {}))
    return rows


def steps(n=6, seed=0):
    "Solutions with labels at the ends of their steps; the last has none at its last tokens."
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = int(torch.randint(8, 10 + 4 * i, (1,), generator=g))
        ids, labels = torch.randint(3, VOCAB, (size,), generator=g).tolist(), [-100] * size
        for at in range(4, size, 3): labels[at] = int(torch.randint(0, 2, (1,), generator=g))
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trainer_of(algorithm, model, path, rows=None, budget=None, **config):
    common = dict(output_dir=str(path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
                  per_device_train_batch_size=6, disable_dropout=config.pop("disable_dropout", True)) | config
    rows = rows or (pairs() if algorithm == "reward" else steps())
    if algorithm == "reward":
        from trl import RewardConfig as Config, RewardTrainer as Trainer
    else:
        from trl.experimental.prm import PRMConfig as Config, PRMTrainer as Trainer
    args = Config(**common)
    args.max_tokens_per_pack = budget
    return Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())


def batch_of(trainer): return trainer.data_collator(list(trainer.train_dataset))


def one(trainer, batch, scale=1.0, items=None):
    trainer.model.train().zero_grad()
    if hasattr(trainer, "_metrics"): trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, {k: v.clone() for k, v in batch.items()}, num_items_in_batch=items)
    (loss * scale).backward()
    logged = {k: list(v) for k, v in trainer._metrics["train"].items()} if hasattr(trainer, "_metrics") else {}
    trainer._total_train_tokens = 0
    return loss.detach(), gradients(trainer.model), logged


def same(trainer, algorithm, batch=None, **given):
    batch = batch_of(trainer) if batch is None else batch
    theirs = one(trainer, batch, **given)
    with PatchSet(reward.patches(algorithm)): ours = one(trainer, batch, **given)
    uninstall(trainer.model)
    assert set(theirs[2]) <= set(ours[2])
    assert_same(ours, theirs, lambda change: one(trainer, change(batch), **given), trainer.model, metric=(0, 1e-5))
    return ours[2]


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("algorithm", BOTH)
def test_same_loss_and_gradients(algorithm, lora, budget, tmp_path):
    trainer = trainer_of(algorithm, classifier(algorithm, lora=lora), tmp_path, budget=budget)
    logged = same(trainer, algorithm, scale=3.0)
    if algorithm == "reward": assert (logged["packing/packs"][0] > 1) == (budget is not None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("algorithm", BOTH)
def test_families(algorithm, family, tmp_path):
    if family == "gemma3" and algorithm == "prm": pytest.skip("Transformers has no token classification for Gemma 3's text model")
    trainer = trainer_of(algorithm, classifier(algorithm, family), tmp_path, budget=60)
    assert reward.has_head(trainer.model)
    same(trainer, algorithm)


def test_loss_options(tmp_path):
    trainer = trainer_of("reward", classifier("reward"), tmp_path, rows=pairs(margin=True), center_rewards_coefficient=0.3)
    assert "margin" in batch_of(trainer)
    same(trainer, "reward")


@needs_prm
@pytest.mark.parametrize("config", [dict(label_smoothing_factor=0.2), dict(disable_dropout=False)])
def test_prm_options(config, tmp_path):
    trainer = trainer_of("prm", classifier("prm", classifier_dropout=0.0), tmp_path, **config)
    same(trainer, "prm", items=torch.tensor(17))


def test_end_of_sequence_as_pad(tmp_path):
    "The row's last token is the pad id, and Transformers reads one before it."
    trainer = trainer_of("reward", classifier("reward"), tmp_path, rows=pairs(eos=0))
    same(trainer, "reward")


def test_a_pair_shares_its_beginning(tmp_path):
    rows = [{"chosen_ids": [*range(3, 33), 40, 1], "rejected_ids": [*range(3, 33), 41, 42, 1]}]
    trainer = trainer_of("reward", classifier("reward"), tmp_path, rows=rows)
    assert same(trainer, "reward")["packing/tokens"] == [35]


@pytest.mark.parametrize("change", ["left", "id and mask", "hole", "one token"])
def test_odd_batches(change, tmp_path, capsys):
    "Left padding is laid out; what the rule by id and the mask disagree on is left to TRL."
    trainer = trainer_of("reward", classifier("reward"), tmp_path)
    batch = batch_of(trainer)
    if change == "left": batch = {k: v.flip(1) for k, v in batch.items()}
    if change == "id and mask": batch["input_ids"][0, -1] = 5
    if change == "hole": batch["attention_mask"][0, 1] = 0
    if change == "one token": batch["input_ids"][0, 1:] = batch["attention_mask"][0, 1:] = 0
    logged = same(trainer, "reward", batch)
    assert ("packing/packs" in logged) == (change == "left")
    if change != "left": assert "TRL's own path is taken" in capsys.readouterr().out


def test_other_heads_and_models_are_left_to_trl(tmp_path, capsys):
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0)
    trainer = trainer_of("reward", classifier("reward", config), tmp_path)
    assert "packing/packs" not in same(trainer, "reward")
    assert "trl" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", BOTH)
def test_dropout_takes_the_rows_path(algorithm, tmp_path):
    model = classifier(algorithm, "llama", classifier_dropout=0.0, attention_dropout=0.0, lora=False)
    trainer = trainer_of(algorithm, model, tmp_path, disable_dropout=False)
    model.model.layers[0].mlp.down_proj = torch.nn.Sequential(model.model.layers[0].mlp.down_proj, torch.nn.Dropout(1e-9))
    same(trainer, algorithm)


@pytest.mark.parametrize("algorithm", BOTH)
def test_evaluation(algorithm, tmp_path):
    trainer = trainer_of(algorithm, classifier(algorithm), tmp_path, budget=40, per_device_eval_batch_size=6)
    theirs = trainer.predict(trainer.train_dataset)
    with PatchSet(reward.patches(algorithm)): ours = trainer.predict(trainer.train_dataset)
    torch.testing.assert_close(torch.tensor(ours.predictions), torch.tensor(theirs.predictions), rtol=1e-5, atol=1e-5)
    for name in ("test_loss", "test_accuracy", "eval_accuracy"):
        if name in theirs.metrics: assert ours.metrics[name] == pytest.approx(theirs.metrics[name], abs=1e-5)


@pytest.mark.parametrize("algorithm", BOTH)
def test_training_is_the_same(algorithm, tmp_path):
    "Accumulation, gradient checkpointing and several packs: the same curve."
    curves, rows = [], pairs(24) if algorithm == "reward" else steps(24)
    for patched in (False, True):
        trainer = trainer_of(
            algorithm, classifier(algorithm), tmp_path, rows=rows, budget=50, per_device_train_batch_size=2, max_steps=4,
            gradient_accumulation_steps=3, logging_steps=1, learning_rate=1e-3, gradient_checkpointing=True, save_strategy="no",
        )
        with PatchSet(reward.patches(algorithm) if patched else ()): trainer.train()
        curves.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    assert len(curves[0]) == 4
    assert torch.tensor(curves[1]).allclose(torch.tensor(curves[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", BOTH)
def test_twenty_steps(algorithm, tmp_path):
    "The loss falls on a rule that can be learned: a token that only good answers hold."
    g = torch.Generator().manual_seed(0)
    def body(): return torch.randint(5, VOCAB, (8,), generator=g).tolist()
    if algorithm == "reward": rows = [{"chosen_ids": (b := body()) + [3, 1], "rejected_ids": b + [4, 1]} for _ in range(32)]
    else:
        rows = [{"input_ids": body() + [3, 1] + body() + [4, 1], "labels": [-100] * 9 + [1] + [-100] * 9 + [0]} for _ in range(32)]
    trainer = trainer_of(
        algorithm, classifier(algorithm), tmp_path, rows=rows, budget=80, max_steps=20,
        logging_steps=1, learning_rate=3e-3, per_device_train_batch_size=8, save_strategy="no",
    )
    with PatchSet(reward.patches(algorithm)): trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_patches():
    assert reward.patches("reward") is reward.patches("reward")
    with pytest.raises(ValueError, match="algorithm='dpo'"): reward.patches("dpo")


def test_uninstall(tmp_path):
    trainer = trainer_of("reward", classifier("reward"), tmp_path)
    with PatchSet(reward.patches("reward")): one(trainer, batch_of(trainer))
    assert "forward" in vars(causal_lm(trainer.model))
    uninstall(trainer.model)
    assert "forward" not in vars(causal_lm(trainer.model))
