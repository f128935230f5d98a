"""PatchFastRL and its way back."""
import dataclasses
import inspect

import pytest
import torch
from parity import tiny

from grpo_nb.ground.events import said
from grpo_nb.models.load import FastLanguageModel
from grpo_nb.patch.core import PatchError, look_up
from grpo_nb.trainers import grpo, patch, seams
from grpo_nb.step.forward import install, is_installed, uninstall


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


@pytest.mark.parametrize("calls", [
    [("grpo", None), ("grpo", FastLanguageModel)],
    [("grpo", FastLanguageModel), ("grpo", None)],
    [(None, None)],
    [(None, FastLanguageModel), ("GRPO", FastLanguageModel)],
    [("rloo", None), ("grpo", FastLanguageModel), (None, None)],
])
def test_everything_comes_back(classes, calls):
    "In whatever order it was asked for, once or twice; the fixture compares every attribute by identity."
    for algorithm, model in calls: patch.PatchFastRL(algorithm, model)
    sampling = any(model is not None for _, model in calls)
    assert ("for_inference" in str(classes[0]._generate_single_turn.__code__.co_names)) == sampling


def test_half_a_patch_never_stays(classes, monkeypatch):
    "RLOO does not fit: GRPO is not patched either."
    monkeypatch.delattr(classes[2], "_compute_loss")
    with pytest.raises(PatchError, match="RLOOTrainer has no '_compute_loss'"): patch.PatchFastRL()
    assert not patch.applied and not hasattr(classes[1], "max_tokens_per_pack")


@pytest.mark.parametrize("name,words", [("grop", "Did you mean 'grpo'"), (3, "is not a name")])
def test_unknown_algorithm(classes, name, words):
    with pytest.raises(ValueError, match=words): patch.PatchFastRL(name)


@pytest.fixture
def config_of():
    "A configuration class, patched for its algorithm."
    patch.UnpatchFastRL()

    def get(algorithm):
        if not seams.has(algorithm): pytest.skip(f"{seams.known_in(algorithm)}; this is {seams.trl_version()}")
        patch.PatchFastRL(algorithm)
        return look_up(seams.HOMES[algorithm].config)
    yield get
    patch.UnpatchFastRL()


@pytest.mark.parametrize("algorithm", seams.HOMES)
def test_fields_are_real(config_of, algorithm, tmp_path):
    "Visible to the parsers of arguments and YAML, to `fields`, `to_dict`, `repr` and the signature."
    from transformers import HfArgumentParser
    from trl import TrlParser

    cls = config_of(algorithm)
    names = ["unsloth_num_chunks", "max_tokens_per_pack", "step"] + (
        ["skip_zero_advantage", "engine"] if algorithm in patch.GROUPS else []
    )
    given = ["--output_dir", str(tmp_path), "--max_tokens_per_pack", "512", "--step", "padded", "--use_cpu"]
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"output_dir: {tmp_path}\nmax_tokens_per_pack: 512\nstep: padded\nuse_cpu: true\n")
    made = [
        HfArgumentParser(cls).parse_args_into_dataclasses(given)[0],
        TrlParser(cls).parse_args_and_config(["--config", str(yaml)])[0],
        cls(str(tmp_path), use_cpu=True, max_tokens_per_pack=512, step="padded"),
    ]
    for config in made:
        assert (config.max_tokens_per_pack, config.step, config.unsloth_num_chunks) == (512, "padded", -1)
        assert config.to_dict()["max_tokens_per_pack"] == 512 and config.bf16 is False
        for name in names: assert f"{name}={getattr(config, name)!r}" in repr(config)
    assert set(names) <= {f.name for f in dataclasses.fields(cls)} and set(names) <= set(inspect.signature(cls).parameters)
    assert ("skip_zero_advantage" in repr(config)) == ("skip_zero_advantage" in names)
    # TRL sets it beside generation_batch_size and takes one of the two
    more = {"steps_per_generation": None} if algorithm in patch.GROUPS else {}
    again = dataclasses.replace(config, unsloth_num_chunks=3, **more)
    assert (again.unsloth_num_chunks, again.max_tokens_per_pack, again.step) == (3, 512, "padded")


def test_a_subclass_has_the_fields(config_of, tmp_path):
    "A configuration class that is derived from a patched one takes and checks them."
    cls = config_of("dpo")

    @dataclasses.dataclass
    class Mine(cls): more: int = 1

    assert Mine(str(tmp_path), use_cpu=True, max_tokens_per_pack=7).max_tokens_per_pack == 7
    with pytest.raises(ValueError, match="step"): Mine(str(tmp_path), use_cpu=True, step="pack")


def test_each_configuration_is_told(config_of, tmp_path, capsys):
    "The reason once, the change every time."
    cls = config_of("grpo")
    said.clear()
    for _ in range(3):
        cls(
            str(tmp_path), num_generations=8, per_device_train_batch_size=1, gradient_accumulation_steps=4, use_cpu=True, bf16=False
        )
    lines = [line for line in capsys.readouterr().out.splitlines() if "is read as 2" in line]
    assert len(lines) == 3 and "whole groups" in lines[0] and lines[1] == lines[2] and len(lines[1]) < 80
    cls(str(tmp_path), num_generations=8, per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True, bf16=False)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "bad", [dict(step="pack"), dict(unsloth_num_chunks=0), dict(max_tokens_per_pack=0), dict(generation_batch_size=12)]
)
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
    assert is_installed(model) and model.forward is not before.get("forward")
    install(model)
    uninstall(model)
    assert model.__dict__.keys() == before.keys()
    assert model.__dict__.get("forward") is before.get("forward")
    assert not is_installed(model)
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()
