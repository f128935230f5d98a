"""Trainers whose loss is TRL's: several micro-batches of one optimiser step in one forward, against stock TRL's own loop."""
import pytest
import test_preference
import test_reward
import test_sft
import torch
from parity import gradients, relative, tiny
from transformers import TrainerCallback

from grpo_nb.ground import events
from grpo_nb.patch.core import PatchSet
from grpo_nb.trainers import joint, preference, reward, sft
from grpo_nb.trainers.joint import Joint
from grpo_nb.trainers.state import state_of

pytestmark = [pytest.mark.usefixtures("unpatched"), pytest.mark.filterwarnings("ignore")]
head = test_preference.head # under TRL 1.15, its head as a line of PyTorch
TOLERANCE = 1e-5
LOOP = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2, max_grad_norm=0.0, learning_rate=1e-2,
            optim="sgd", logging_steps=1, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True)


class Watch(TrainerCallback):
    "Keeps the gradients of each optimiser step."
    def __init__(self): self.steps = []
    def on_pre_optimizer_step(self, args, state, control, model=None, **_): self.steps.append(gradients(model))


@pytest.fixture
def sizes(monkeypatch):
    "How many micro-batches each joint forward had."
    found, init = [], Joint.__init__

    def counted(self, step, packs, read, jobs, first):
        found.append(len(jobs))
        return init(self, step, packs, read, jobs, first)
    monkeypatch.setattr(Joint, "__init__", counted)
    monkeypatch.setattr(events, "said", set())
    return found


def make(algorithm, path, budget=None, **config):
    given = {**LOOP, **config}
    if algorithm == "sft": trainer = test_sft.trainer_of(tiny(), path, test_sft.rows(16), **given)
    elif algorithm in ("reward", "prm"):
        data = test_reward.pairs(16) if algorithm == "reward" else test_reward.steps(16)
        trainer = test_reward.trainer_of(algorithm, test_reward.classifier(algorithm), path, data, **given)
    else: trainer = test_preference.make(algorithm, path, **given)
    trainer.args.max_tokens_per_pack = budget
    if "self_check" not in config: trainer.args.self_check = False # tests/test_drift.py has it on
    return trainer


def patches(algorithm):
    home = sft if algorithm == "sft" else reward if algorithm in ("reward", "prm") else preference
    return PatchSet(home.patches(algorithm))


def trained(trainer):
    "Gradients of every optimiser step, and what was logged."
    watch = Watch()
    trainer.add_callback(watch)
    torch.manual_seed(0)
    trainer.train()
    untimed = [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in trainer.state.log_history]
    return watch.steps, untimed


def compare(algorithm, path, budget=None, **config):
    "The same run, stock and patched."
    theirs, wanted = trained(make(algorithm, path, budget, **config))
    with patches(algorithm): ours, found = trained(make(algorithm, path, budget, **config))
    assert len(ours) == len(theirs) == 2
    for g, h in zip(ours, theirs): assert relative(g, h) < TOLERANCE
    for line, right in zip(found, wanted):
        for name, value in right.items():
            # TRL's logits are of padding too
            if "logits/" not in name: assert line[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name
    return found


def some(algorithm):
    if algorithm in ("reward", "sft"): return
    if algorithm == "prm": pytest.importorskip("trl.experimental.prm")
    else: test_preference.have(algorithm)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "cpo", "orpo", "bco", "reward", "prm"])
def test_a_run_is_stock_trls(algorithm, tmp_path, sizes):
    "All four micro-batches fit one pack: one forward a step (two with a reference)."
    some(algorithm)
    compare(algorithm, tmp_path, budget=2000)
    assert set(sizes) == {4} and len(sizes) == (4 if algorithm in ("dpo", "kto", "bco") else 2)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "reward"])
def test_as_many_as_fit_one_pack(algorithm, tmp_path, sizes):
    compare(algorithm, tmp_path, budget={"sft": 70, "dpo": 120, "reward": 260}[algorithm])
    assert sizes and max(sizes) < 4


@pytest.mark.parametrize("lora", ["new", "old"])
def test_an_adapter_and_its_reference_are_told_apart(lora, tmp_path, sizes):
    "One model answers twice: with the adapter that is trained, and as the reference."
    compare("dpo", tmp_path, budget=2000, lora=lora)
    assert len(sizes) == 4


def test_the_default_budget_joins_too(tmp_path, sizes):
    compare("dpo", tmp_path)
    assert set(sizes) == {4}


def test_other_settings(tmp_path, sizes):
    compare("dpo", tmp_path, budget=2000, loss_type=["sigmoid", "sft"])
    compare("dpo", tmp_path, budget=2000, use_weighting=True)
    compare("sft", tmp_path, budget=2000, gradient_checkpointing=True)
    assert set(sizes) == {4}


def test_an_odd_last_step(tmp_path, sizes):
    "Eight rows a step and six rows left: the last optimiser step has three micro-batches."
    def made():
        trainer = make("sft", tmp_path, 2000, max_steps=-1, num_train_epochs=1)
        trainer.train_dataset = trainer.train_dataset.select(range(14))
        return trainer
    theirs, _ = trained(made())
    with patches("sft"): ours, _ = trained(made())
    for g, h in zip(ours, theirs, strict=True): assert relative(g, h) < TOLERANCE
    assert sizes == [4, 3]


def test_a_number_of_chunks_is_each_micro_batchs(tmp_path, sizes):
    trainer = make("sft", tmp_path)
    trainer.args.unsloth_num_chunks = 2
    with patches("sft"): trained(trainer)
    assert not sizes


class Watching(TrainerCallback):
    def on_substep_end(self, args, state, control, **_): pass


@pytest.mark.parametrize("who", ["callback", "subclass", "hook"])
def test_whoever_looks_between_micro_batches_keeps_them_apart(who, tmp_path, sizes, capsys):
    trainer = make("sft", tmp_path, 2000)
    if who == "callback": trainer.add_callback(Watching())
    if who == "hook": next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g)
    if who == "subclass":
        class Mine(type(trainer)):
            def compute_loss(self, *args, **kwargs): return 2 * super().compute_loss(*args, **kwargs)
        trainer.__class__ = Mine
    with patches("sft"): trained(trainer)
    assert not sizes and "each micro-batch is packed by itself" in capsys.readouterr().out


def test_a_changed_micro_batch_is_not_trained_on_silently(tmp_path, sizes):
    trainer = make("sft", tmp_path, 2000)
    original = joint.Joint.take

    def spoiled(self, micro, job):
        if micro == 2: job = (job[0].clone().fill_(5), *job[1:])
        return original(self, micro, job)
    with patches("sft"), pytest.MonkeyPatch.context() as m:
        m.setattr(joint.Joint, "take", spoiled)
        with pytest.raises(RuntimeError, match="Micro-batch 3 of the optimiser step was changed"): trained(trainer)


def test_a_loss_that_is_dropped_adds_nothing(tmp_path, sizes):
    "Two of four micro-batches have a factor of 0: the gradient is that of the others."
    def dropped(trainer):
        from accelerate import Accelerator
        count = [0]
        backward = Accelerator.backward

        def sometimes(self, loss, **given):
            count[0] += 1
            return None if count[0] % 4 in (1, 2) else backward(self, loss, **given)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Accelerator, "backward", sometimes) # for `why_not_together` it is the Accelerator's own
            return trained(trainer)[0]
    theirs = dropped(make("dpo", tmp_path, 2000))
    with patches("dpo"): ours = dropped(make("dpo", tmp_path, 2000))
    for g, h in zip(ours, theirs, strict=True): assert relative(g, h) < TOLERANCE
    assert set(sizes) == {4}


def test_nothing_is_kept_after_a_step(tmp_path, sizes):
    trainer = make("dpo", tmp_path, 2000)
    with patches("dpo"): trained(trainer)
    state = state_of(trainer)
    assert not state.joint and state.coming is None and state.micro == 0
