"""Model families: what padding and chance change is found by asking the model, and every type's gradient is stock TRL's."""
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import families
import parity
import pytest
import torch
from transformers import AutoConfig

from grpo_nb.models.padding import padding_of
from grpo_nb.step.layout import Layout, choose

STORED = Path(__file__).resolve().parent.parent / "nbs/explanations/families.json"
KNOWN = {
    "qwen3": ("shared", ""), "deepseek_v2": ("shared", ""), "mamba": ("padded", "Mamba"),
    "hunyuan_v1_dense": ("trl", "padding before a row"), "recurrent_gemma": ("trl", "padding before a row"),
    "deepseek_v32": ("trl", "padding before a row"), "moshi": ("padded", "a sliding window that the model does not use"),
    "mistral": ("shared", ""),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_type_is_stock_trls_under_its_layout(kind, tmp_path):
    "Positions that matter, a recurrence that runs through padding, an index over padded rows: found without a name."
    if kind not in families.kinds(): pytest.skip(f"this transformers has no {kind}")
    row = families.step_row(families.small_model(kind), tmp_path)
    assert row["layout"] == KNOWN[kind][0] and KNOWN[kind][1] in row["why"] and not families.is_wrong(row)


@pytest.mark.parametrize("how", ["autocast", "accelerate"])
def test_mixed_precision_is_no_effect_of_padding(how):
    "Weights in fp32 that compute in bf16 round as bf16 does."
    model = parity.tiny()
    if how == "accelerate": # as `Accelerator.prepare_model` leaves it
        model._original_forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext(): found = padding_of(model)
    assert 0 < found.before < found.bound and found.behind < found.bound


def test_lora_on_all_layers_of_gemma_3n(tmp_path):
    "It multiplies into what its projections give."
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(families.small_model("gemma3n_text"), LoraConfig(r=2, target_modules="all-linear"))
    assert not families.is_wrong(families.step_row(model, tmp_path))


def test_asking_leaves_no_trace():
    "Random numbers, modes, gradients, buffers; and it is asked once."
    model, seen = families.small_model("llama").train(), []
    model.gradient_checkpointing_enable()
    model.model.layers[0].eval()
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    for _ in range(3): assert padding_of(model).before < 1e-5
    assert len(seen) == 4 and not any(seen) and torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()] and model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters()) and not padding_of(model).draws


class Chance(torch.nn.Module):
    "A router that draws at random in training, with no attribute that says so."
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return self.inner(x) * (1 + 0.1 * torch.rand(())) if self.training else self.inner(x)


def test_a_model_that_draws_takes_rows_that_share_nothing(monkeypatch):
    monkeypatch.setattr("grpo_nb.models.foreign.KNOWN", ("torch", "transformers", "grpo_nb", "test_families"))
    model = families.small_model("llama").train()
    model.model.layers[0].mlp = Chance(model.model.layers[0].mlp)
    chosen = choose(model)
    assert chosen.layout is Layout.ROWS and "draws at random in training" in chosen.why.words
    assert choose(model.eval()).layout is Layout.SHARED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_rounding_is_not_taken_for_padding(kind, dtype):
    found = padding_of(families.small_model(kind).to(dtype))
    assert found.before < found.bound / 2


def test_what_is_not_the_first_path_is_said(tmp_path, capsys, unpatched):
    from parity import grpo_trainer, micro_batch

    from grpo_nb.trainers import grpo
    trainer = grpo_trainer(families.small_model("llama"), tmp_path)
    compute = grpo.compute_loss(type(trainer)._compute_loss)
    for name, value, words in (("top_entropy_quantile", 0.5, "ranks the"), ("use_adaptive_entropy", True, "adaptive entropy")):
        with pytest.MonkeyPatch().context() as m:
            m.setattr(trainer, name, value)
            assert not grpo.one_pass(trainer) and not grpo.one_pass(trainer)
        assert capsys.readouterr().out.count(words) == 1
    empty = micro_batch(seed=3)
    empty["completion_mask"] = torch.zeros_like(empty["completion_mask"])
    for _ in range(2): compute(trainer, trainer.model, dict(empty))
    assert capsys.readouterr().out.count("no completion of a batch has a token") == 1


def test_the_stored_table_shows_no_fault():
    if not STORED.exists(): pytest.skip("python tests/families.py --out nbs/explanations/families.json writes it")
    found = json.loads(STORED.read_text())
    assert [r["type"] for r in found["rows"] if families.is_wrong(r)] == [] and "| llama | shared |" in families.table(found)


def test_a_hang_and_a_crash_are_rows(monkeypatch):
    def one(kind):
        if kind == "hang": time.sleep(60)
        os._exit(3)
    monkeypatch.setattr(families, "row_of", one)
    assert "no answer within 1 s" in families.in_own_process("hang", 1)["note"]
    assert "ended with 3" in families.in_own_process("crash", 30)["note"]


def test_shrinking_keeps_a_layer_of_each_kind():
    small = families.small_config("gemma3_text")
    assert set(small.layer_types) == set(AutoConfig.for_model("gemma3_text").layer_types) and small.hidden_size == 32


@pytest.mark.slow
def test_every_type():
    rows = families.all_rows(families.kinds(), jobs=os.cpu_count())
    assert [r for r in rows if families.is_wrong(r)] == [] and sum("error" in r for r in rows) > len(rows) * 0.9
