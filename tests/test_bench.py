"""The benchmark of a training step: how it cuts a batch, what it runs, and what it says of wrong input."""
import json
from dataclasses import replace

import pytest
import torch
from trl import GRPOTrainer

from grpo_nb.app import bench
from grpo_nb.app import cli
from grpo_nb.tasks import shapes

torch.set_num_threads(1)
SMALL = shapes.Shape("qwen3-tiny", 4, 24, 8, 8, 12)
TINY = ("Qwen3", 64, 16, 32, 1, 2, 1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch): monkeypatch.setitem(shapes.MODELS, "qwen3-tiny", TINY)


def trainer_of(shape, folder, dtype=torch.float32):
    trainer = bench.make_trainer(shapes.make_model(shape, "cpu", dtype), shape, str(folder), "cpu")
    bench.hand_out(trainer, shapes.make_batch(shape, 64, "cpu"))
    return trainer


@pytest.mark.parametrize("shape, given, n", [
    (SMALL, None, 4),
    (SMALL, 2, 2),
    (replace(SMALL, micro_batches=1), None, 1),
    (replace(SMALL, micro_batches=1), 8, 8),
    (replace(SMALL, prompts=1, completions=6), None, 1),
])
def test_four_micro_batches_where_nothing_else_is_said(shape, given, n):
    assert shapes.in_micro_batches(shape, given).micro_batches == n


def test_the_shapes_and_their_defaults():
    for name, shape in shapes.SHAPES.items():
        cut = shapes.in_micro_batches(shape)
        assert cut.micro_batches == (1 if name.endswith("-in-1") else 4) and shape.model in shapes.MODELS
    assert {name for names in bench.DEFAULTS.values() for name in names} <= set(shapes.SHAPES)
    for name in ("qwen2.5-3b-4x256+8x512", "qwen2.5-3b-4x2048+8x310"):
        shape = shapes.SHAPES[name]
        assert (shape.beta, shape.lora, shape.checkpointing) == (0.04, 64, True) and name in bench.DEFAULTS["cuda"]


def test_trl_cuts_and_shuffles(tmp_path):
    "Each row is in one micro-batch, beside rows of other prompts; both sides and all steps get the same ones."
    trainer = trainer_of(replace(SMALL, micro_batches=4, beta=0.1), tmp_path)
    seen = []
    for on in bench.SIDES.values():
        with on(): bench.optimiser_step(trainer)
        seen.append(trainer._buffered_inputs)
        assert len(seen[-1]) == 4
        assert all(micro["ref_per_token_logps"].shape == micro["completion_ids"].shape == (8, 12) for micro in seen[-1])
    for theirs, ours in zip(*seen): assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    rows = torch.cat([micro["completion_ids"] for micro in seen[0]])
    assert len(rows.unique(dim=0)) == 32 and min(len(micro["prompt_ids"].unique(dim=0)) for micro in seen[0]) > 1


def test_a_step_is_the_trainers_own_on_each_micro_batch(tmp_path, monkeypatch):
    calls, own = [], GRPOTrainer.training_step

    def counted(self, model, inputs, num_items_in_batch):
        calls.append((self._step, self.accelerator.sync_gradients, self.current_gradient_accumulation_steps))
        return own(self, model, inputs, num_items_in_batch)
    monkeypatch.setattr(GRPOTrainer, "training_step", counted)
    trainer = trainer_of(replace(SMALL, micro_batches=4), tmp_path)
    bench.begin(trainer)
    before = [p.clone() for p in trainer.model.parameters()]
    for _ in range(2): bench.optimiser_step(trainer)
    assert calls == 2 * [(0, False, 4), (1, False, 4), (2, False, 4), (3, True, 4)]
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("n", [1, 4, 32])
def test_both_sides_agree_however_cut(n, loss_type):
    loss, grad = bench.agreement(replace(SMALL, micro_batches=n, lora=4, beta=0.04, loss_type=loss_type), "cpu")
    assert loss < 1e-6 and grad < 1e-5
    assert getattr(GRPOTrainer._compute_loss, "__wrapped__", None) is None


def test_a_difference_is_found(monkeypatch):
    "The agreement is of the whole step: one micro-batch with a wrong loss is seen."
    from grpo_nb.trainers.grpo import PolicyLoss
    part = PolicyLoss.part
    def wrong(self, i, k, *given): return part(self, i, k, *given) * (1.01 if k == 2 else 1)
    monkeypatch.setattr(PolicyLoss, "part", wrong)
    assert bench.agreement(replace(SMALL, micro_batches=4), "cpu")[1] > 1e-4


def test_figures_and_their_table():
    results = bench.bench_step("mine", repeats=1, shape=SMALL)
    assert [r["impl"] for r in results] == ["trl", "grpo_nb"] and [(r["micro_batches"], r["rows"]) for r in results] == [(4, 8)] * 2
    theirs, ours = results
    assert theirs["positions"] == 32 * (24 + 12) > ours["positions"] > 0 and min(r["cpu_seconds"] for r in results) > 0
    assert ours["speedup"] == pytest.approx(theirs["cpu_seconds"] / ours["cpu_seconds"], rel=0.05)
    head, *lines, last = bench.report(results).splitlines()
    assert {len(line) for line in lines} == {len(head)}
    assert all("4 x 8 rows" in line for line in lines) and "cut" in head
    assert "CPU s" in head
    assert json.loads(last) == ours and len(bench.report(results, True).splitlines()) == 2


@pytest.mark.parametrize("given, words", [
    (dict(micro_batches=3), ["micro_batches=3", "32 rows", "4 prompts x 8 completions", "1, 2, 4, 8, 16 or 32"]),
    (dict(micro_batches=0), ["micro_batches=0", "whole number of at least 1"]),
    (dict(micro_batches=-4), ["micro_batches=-4", "at least 1"]),
    (dict(micro_batches=2.5), ["micro_batches=2.5", "whole number"]),
    (dict(micro_batches=True), ["micro_batches=True"]),
    (dict(repeats=0), ["repeats=0"]),
    (dict(max_tokens_per_pack=0), ["max_tokens_per_pack=0"]),
], ids=str)
def test_wrong_input_is_named_before_anything_is_built(given, words, monkeypatch):
    monkeypatch.setattr(bench, "make_model", lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(ValueError) as error: bench.bench_step("mine", shape=SMALL, **given)
    for word in words: assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv, words", [
    (["--micro-batches", "3"], ["micro_batches=3", "'qwen3-cpu'", "8 rows", "1, 2, 4 or 8"]),
    (["--micro-batches", "16"], ["micro_batches=16", "'qwen3-cpu'"]),
    (["--shape", "qwen3-cpu-4x256+8x64", "--micro-batches", "0"], ["micro_batches=0"]),
    (["--micro-batches", "few"], ["--micro-batches", "'few'"]),
], ids=" ".join)
def test_on_the_command_line(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench_step", lambda *a, **k: pytest.fail("it began"))
    try: code = cli.main(["bench", "step", *argv])
    except SystemExit as end: code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, err
    for word in words: assert word in err


def test_the_number_reaches_the_measurement(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "bench_step", lambda *a, **k: seen.append((a, k)) or [])
    assert cli.main(["bench", "step", "--shape", "qwen3-cpu", "--micro-batches", "2", "--repeats", "1", "--json"]) == 0
    assert seen == [(("qwen3-cpu", "cpu", 1, None), dict(micro_batches=2))]
    assert "torch" in json.loads(capsys.readouterr().out.splitlines()[0])
