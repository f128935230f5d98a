"""PatchFastRL and its way back."""
import pytest
import torch
from parity import tiny

from grpo_nb.models import FastLanguageModel
from grpo_nb.patch.core import PatchError
from grpo_nb.rl import grpo, patch
from grpo_nb.rl.forward import causal_lm, install, installed, uninstall


@pytest.fixture
def classes():
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    patch.UnpatchFastRL()
    found = (GRPOTrainer, GRPOConfig, RLOOTrainer, RLOOConfig)
    before = [dict(vars(c)) for c in found]
    fields = [dict(c.__dataclass_fields__) for c in found[1::2]]
    yield found
    patch.UnpatchFastRL()
    for c, b in zip(found, before): assert vars(c).keys() == b.keys() and all(vars(c)[k] is v for k, v in b.items())
    for c, f in zip(found[1::2], fields): assert c.__dataclass_fields__ == f


@pytest.mark.parametrize("calls", [[("grpo", None), ("grpo", FastLanguageModel)], [("grpo", FastLanguageModel), ("grpo", None)], [(None, None)],
                                   [(None, FastLanguageModel), ("GRPO", FastLanguageModel)], [("rloo", None), ("grpo", FastLanguageModel), (None, None)]])
def test_everything_comes_back(classes, calls):
    "In whatever order it was asked for, once or twice; the fixture compares every attribute by identity."
    for algorithm, model in calls: patch.PatchFastRL(algorithm, model)
    sampling = any(model is not None for _, model in calls)
    assert ("for_inference" in str(classes[0]._generate_single_turn.__code__.co_names)) == sampling


def test_half_a_patch_never_stays(classes, monkeypatch):
    "RLOO does not fit: GRPO is not patched either."
    monkeypatch.setattr(patch, "TRAINERS", {**patch.TRAINERS, "rloo": ("trl.trainer.rloo_config:RLOOConfig", "trl.trainer.rloo_trainer:Gone", grpo.compute_rloo_loss)})
    patch.patches_of.cache_clear()
    with pytest.raises(PatchError, match="Gone"): patch.PatchFastRL()
    patch.patches_of.cache_clear()
    assert not patch.applied and not hasattr(classes[1], "max_tokens_per_pack")


@pytest.mark.parametrize("name,words", [("grop", "Did you mean 'grpo'"), ("dpo", "not patched by this version"), (3, "is not a name")])
def test_unknown_algorithm(classes, name, words):
    with pytest.raises(ValueError, match=words): patch.PatchFastRL(name)


def test_fields_are_real(classes):
    from dataclasses import fields
    from transformers import HfArgumentParser

    patch.PatchFastRL("grpo")
    config, = HfArgumentParser(classes[1]).parse_args_into_dataclasses(["--output_dir", "o", "--max_tokens_per_pack", "512", "--step", "padded", "--use_cpu"])
    assert (config.max_tokens_per_pack, config.step, config.unsloth_num_chunks) == (512, "padded", -1)
    assert {"max_tokens_per_pack", "step", "unsloth_num_chunks", "skip_zero_advantage"} <= {f.name for f in fields(config)}
    assert config.to_dict()["max_tokens_per_pack"] == 512 and "max_tokens_per_pack=512" in repr(config)


@pytest.mark.parametrize("bad", [dict(step="pack"), dict(unsloth_num_chunks=0), dict(max_tokens_per_pack=0), dict(generation_batch_size=12)])
def test_bad_fields(classes, bad):
    patch.PatchFastRL("grpo")
    with pytest.raises(ValueError, match=next(iter(bad))): classes[1]("o", use_cpu=True, **bad)
    with pytest.raises(TypeError, match="max_tokens_per_pack"): classes[1]("o", max_token_per_pack=1)


def test_the_constructor_keeps_every_argument():
    "Positional arguments behind the tokenizer's place reach TRL."
    seen = {}

    class Trainer:
        def __init__(self, model, reward_funcs=None, args=None, processing_class=None, callbacks=None): seen.update(locals())

    model, args = tiny(), type("Args", (), {"fp16": False})()
    made = Trainer.__new__(Trainer)
    made.model, made.args = model, args
    tokenizer = object()
    original, grpo_tokenizer = Trainer.__init__, grpo.tokenizer_of
    try:
        grpo.tokenizer_of = lambda model: tokenizer
        grpo.init(original)(made, model, ["r"], args, None, ["callback"])
    finally: grpo.tokenizer_of = grpo_tokenizer
    assert seen["processing_class"] is tokenizer and seen["callbacks"] == ["callback"] and seen["reward_funcs"] == ["r"]


@pytest.mark.parametrize("had", [False, True])
def test_a_model_is_left_as_it_was(had):
    model = tiny()
    if had: model.forward = model.forward
    before = dict(model.__dict__)
    install(model)
    assert causal_lm(model) in installed and model.forward is not before.get("forward")
    install(model)
    uninstall(model)
    assert model.__dict__.keys() == before.keys() and model.__dict__.get("forward") is before.get("forward") and model not in installed
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()
