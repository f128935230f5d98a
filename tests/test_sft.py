"""The supervised trainer: stock TRL beside the packed step, every loss type, under whatever TRL is installed."""
import warnings
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset

from grpo_nb.ground import events
from grpo_nb.patch.core import PatchSet, release
from grpo_nb.trainers import sft
from grpo_nb.step.forward import uninstall
from parity import VOCAB, PlainHead, assert_same, gradients, tiny, tokenizer

warnings.filterwarnings("ignore")
OLD = release(version("trl")) < (1, 15)
LOSSES = ["nll", "dft", pytest.param("chunked_nll", marks=pytest.mark.skipif(not OLD, reason="this TRL's chunked_nll is its nll"))]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    "Each test hears what is said once."
    monkeypatch.setattr(events, "said", set())


@pytest.fixture(autouse=True)
def head_on_cpu(monkeypatch):
    if release(version("trl"))[:2] != (1, 15) or torch.cuda.is_available(): return
    from trl.trainer import utils
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", PlainHead)


def rows(n=6, seed=0, kind="completion"):
    "Ragged rows: a prompt that is context and a completion that is learned, or all of it."
    g = torch.Generator().manual_seed(seed)
    def text(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (n,), generator=g).tolist())
    if kind == "text": return [{"text": text(2, 5 + 4 * i)} for i in range(n)]
    return [{"prompt": text(1, 12), "completion": " " + text(1, 4 + 4 * i)} for i in range(n)]


def adapted(model, **config):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(
        model,
        LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "up_proj"], **config}),
    )


def trainer_of(model, path, data=None, budget=None, func=None, **config):
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(**dict(output_dir=str(path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
                            per_device_train_batch_size=6, per_device_eval_batch_size=6) | config)
    args.max_tokens_per_pack = budget
    return SFTTrainer(
        model=model, args=args,
        train_dataset=Dataset.from_list(data or rows()),
        processing_class=tokenizer(), compute_loss_func=func,
    )


def batch_of(trainer): return trainer.data_collator(list(trainer.train_dataset))


def one(trainer, batch, scale=1.0, items=None):
    trainer.model.train().zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(
        trainer.model, {k: v.clone() if hasattr(v, "clone") else v for k, v in batch.items()}, num_items_in_batch=items
    )
    (loss * scale).backward()
    return loss.detach(), gradients(trainer.model), {k: list(v) for k, v in trainer._metrics["train"].items()}


def same(trainer, batch=None, **given):
    batch = batch_of(trainer) if batch is None else batch
    theirs = one(trainer, batch, **given)
    with PatchSet(sft.patches()): ours = one(trainer, batch, **given)
    uninstall(trainer.model)
    assert set(theirs[2]) == set(ours[2]) - {"packing/tokens"}
    assert_same(ours, theirs, lambda change: one(trainer, change(batch), **given), trainer.model, metric=(0, 1e-5))
    return ours[2]


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_same_loss_and_gradients(loss_type, lora, budget, tmp_path):
    model = adapted(tiny()) if lora else tiny()
    trainer = trainer_of(model, tmp_path, budget=budget, loss_type=loss_type)
    batch = batch_of(trainer)
    logged = same(trainer, batch, scale=3.0)
    assert logged["packing/tokens"][0] < batch["input_ids"].numel()
    same(trainer, batch, items=torch.tensor(91))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_families(family, loss_type, tmp_path):
    same(trainer_of(tiny(family), tmp_path, loss_type=loss_type, budget=60))


@pytest.mark.parametrize("config", [dict(completion_only_loss=False), dict(kind="text")])
def test_whole_rows(config, tmp_path):
    data = rows(kind=config.pop("kind", "completion"))
    logged = same(trainer_of(tiny(), tmp_path, data=data, loss_type="nll", **config))
    assert "packing/tokens" in logged


def test_a_mask_over_the_assistant(tmp_path):
    "Labels in several stretches, as assistant_only_loss=True makes them, and a row without any."
    trainer = trainer_of(tiny(), tmp_path, loss_type="nll", budget=50)
    batch = batch_of(trainer)
    batch["labels"] = torch.where(
        batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 5 > 1), batch["input_ids"], -100
    )
    batch["labels"][1] = -100
    assert "packing/tokens" in same(trainer, batch)


@pytest.mark.parametrize("change", ["label smoothing", "loss function", "head adapter", "position_ids", "hole", "other labels"])
def test_what_is_left_to_trl(change, tmp_path, capsys):
    config, model = {"loss_type": "nll"}, tiny()
    if change == "label smoothing": config["label_smoothing_factor"] = 0.3
    if change == "loss function":
        config["func"] = lambda outputs, labels, num_items_in_batch=None: outputs.logits.logsumexp(-1).mean()
    if change == "head adapter":
        if not OLD: pytest.skip("this TRL does not support an adapter on the head")
        model = adapted(model, target_modules=["q_proj", "lm_head"])
    trainer = trainer_of(model, tmp_path, **config)
    batch = batch_of(trainer)
    if change == "position_ids":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).contiguous()
    if change == "hole": batch["attention_mask"][0, 1] = 0
    if change == "other labels": batch["labels"][0][batch["labels"][0] != -100] = 7
    half = not OLD and change in ("label smoothing", "loss function") # the forward for the metrics is packed
    assert ("packing/tokens" in same(trainer, batch)) == half
    assert "TRL's own" in capsys.readouterr().out


def test_packing_is_left_alone(tmp_path, capsys):
    trainer = trainer_of(tiny(), tmp_path, padding_free=True, max_length=None, loss_type="nll")
    assert "packing/tokens" not in same(trainer)
    assert "padding_free" in capsys.readouterr().out


def test_models_without_a_tree(tmp_path):
    "Absolute positions: the same numbers, on TRL's own path."
    from transformers import AutoModelForCausalLM, GPT2Config
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0,
        eos_token_id=1, bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    assert "packing/tokens" not in same(trainer_of(AutoModelForCausalLM.from_config(config), tmp_path, loss_type="nll"))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_evaluation(loss_type, tmp_path):
    trainer = trainer_of(tiny(), tmp_path, loss_type=loss_type, budget=40)
    found = []
    for patched in (False, True):
        with PatchSet(sft.patches() if patched else ()): found.append(trainer.evaluate(trainer.train_dataset))
    assert "eval_packing/tokens" in found[1]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_training_is_the_same(loss_type, tmp_path):
    "Accumulation over ragged micro-batches, gradient checkpointing and several packs: the same curve."
    curves, names = [], ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    for patched in (False, True):
        trainer = trainer_of(
            tiny(), tmp_path, data=rows(18), budget=50, per_device_train_batch_size=3, max_steps=3, loss_type=loss_type,
            gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-3, gradient_checkpointing=True, save_strategy="no",
        )
        with PatchSet(sft.patches() if patched else ()): trainer.train()
        curves.append([[log[name] for name in names] for log in trainer.state.log_history if "grad_norm" in log])
    assert len(curves[0]) == 3
    assert torch.tensor(curves[1]).allclose(torch.tensor(curves[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_twenty_steps(loss_type, tmp_path):
    trainer = trainer_of(
        tiny("llama"), tmp_path, data=rows(12), max_steps=20, logging_steps=1, learning_rate=1e-2,
        loss_type=loss_type, per_device_train_batch_size=6, save_strategy="no", budget=120,
    )
    with PatchSet(sft.patches()): trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(losses) == 20
    if loss_type == "dft": # the loss -p log p is 0 at p = 0 and at p = 1: what falls is the cross-entropy
        accuracy = [log["mean_token_accuracy"] for log in trainer.state.log_history if "grad_norm" in log]
        assert sum(accuracy[-5:]) > sum(accuracy[:5]) + 0.5
    else: assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_patches():
    assert sft.patches("sft") is sft.patches("sft")
    with pytest.raises(ValueError, match="algorithm='dpo'"): sft.patches("dpo")
