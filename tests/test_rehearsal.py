"""What looks at prompts, completions and rewards beside a trainer sees what the trainer sees."""
import copy
import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import trl
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo_nb import PatchFastRL, UnpatchFastRL, tasks
from grpo_nb.advice.doctor import doctor
from grpo_nb.tasks.evaluate import accuracy, greedy, prompt_ids, rendering_of
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers.rehearsal import columns_kept, prompt_ids_of, rehearsal
from grpo_nb.ui.panels.panels import HyperparameterPanel

torch.set_num_threads(1)
CPU = torch.device("cpu")
BASE = dict(max_completion_length=6, per_device_train_batch_size=4, num_generations=4, max_steps=2, learning_rate=1e-3,
            logging_steps=1)
QWEN = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")


def chat(*turns): return [[{"role": role, "content": text} for role, text in turns]]


def weather(city: str) -> str:
    """
    What the sky looks like.

    Args:
        city: where
    """
    return city


CASES = {
    "plain": dict(prompts=["1 2 3", "4 5"]),
    "chat": dict(prompts=chat(("user", "sort 3 1")) + chat(("system", "be short"), ("user", "sort 2 1"))),
    "kwargs": dict(prompts=chat(("user", "3 1")), template=QWEN, config={"chat_template_kwargs": {"enable_thinking": False}}),
    "kwargs as JSON": dict(prompts=chat(("user", "3 1")), template=QWEN,
                           config={"chat_template_kwargs": '{"enable_thinking": false}'}),
    "tools": dict(prompts=chat(("user", "3 1"), ("assistant", "hm"), ("user", "2 1")), template=QWEN, tools=[weather]),
    "prefill": dict(prompts=chat(("user", "3 1"), ("assistant", "It is"))),
    "its own": dict(prompts=chat(("user", "3 1")), template="{% for m in messages %}7 8 9 {{ m.content }}{% endfor %}"),
}


@pytest.fixture(scope="module")
def world():
    task = tasks.get("sort_digits", n_train=16, n_test=4)
    model, tokenizer = tiny_model(task, steps=20, measure=False, hidden_size=64, layers=2)
    return SimpleNamespace(task=task, model=model, tokenizer=tokenizer)


@pytest.fixture(params=[False, True], ids=["plain TRL", "patched"], scope="module")
def patched(request):
    if request.param: PatchFastRL("grpo")
    yield request.param
    if request.param: UnpatchFastRL("grpo")


def trainer_of(world, tokenizer, config, data, tools=None, reward=lambda completions, **_: [0.0] * len(completions)):
    args = GRPOConfig(**{**BASE, **config}, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True)
    return GRPOTrainer(model=copy.deepcopy(world.model), reward_funcs=reward, args=args, train_dataset=data,
                       processing_class=tokenizer, tools=tools)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_as_long_as_the_trainer_makes_them(world, name):
    "The doctor, the estimate, evaluation and the panel measure what is trained on, token for token."
    case = {"template": None, "config": {}, "tools": None, **CASES[name]}
    tokenizer, prompts = copy.deepcopy(world.tokenizer), case["prompts"]
    if case["template"]: tokenizer.chat_template = case["template"]
    data, before = Dataset.from_dict({"prompt": prompts}), vars(tokenizer).copy()
    config = {**BASE, **case["config"]}
    report = doctor(world.model, tokenizer, "correctness", data, config, prompts=0, tools=case["tools"])
    assert vars(tokenizer) == before
    trainer = trainer_of(world, tokenizer, case["config"], data, case["tools"])
    wanted = [list(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
    lengths = list(map(len, wanted))
    assert prompt_ids_of(rehearsal(world.model, tokenizer, trainer.args, CPU, case["tools"]), prompts) == wanted
    assert prompt_ids(tokenizer, prompts, **rendering_of(trainer)) == wanted
    seen = report["prompt_length"].evidence
    assert (seen["shortest"], seen["longest"]) == (min(lengths), max(lengths))
    assert report.estimate.load.prompt == round(sum(lengths) / len(lengths))
    read, generate = [], world.model.generate
    def watched(attention_mask, **more):
        read.extend(attention_mask.sum(1).tolist())
        return generate(attention_mask=attention_mask, **more)
    world.model.generate = watched
    try: greedy(world.model, tokenizer, prompts, 1, **rendering_of(trainer))
    finally: del world.model.generate
    assert read == lengths
    if case["tools"]: return # a panel knows of none
    panel = HyperparameterPanel(world.model, config, rewards=["correctness"], dataset=data, tokenizer=tokenizer)
    assert panel.prompt_length() == max(lengths)


def spread(completions, **_): return [float(len(c[-1]["content"]) % 3) for c in completions]


def test_a_run_is_the_same_with_a_doctor_before_it(world, patched):
    def run(examined):
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)
        if examined: assert doctor(world.model, world.tokenizer, spread, world.task.train, BASE, prompts=2).samples
        drawn = torch.rand(2).tolist(), random.random(), numpy.random.rand()
        trainer = trainer_of(world, world.tokenizer, {}, world.task.train, reward=spread)
        trainer.train()
        logs = [(log["reward"], log["grad_norm"], log["loss"]) for log in trainer.state.log_history if "reward" in log]
        return drawn, logs, [p.sum().item() for p in trainer.model.parameters()]
    assert run(True) == run(False)


def test_stop_strings_are_what_the_session_makes_of_them(world, patched):
    "In a patched session they work, and the doctor says so; TRL's own path refuses them, and the doctor repeats its words."
    config = {**BASE, "generation_kwargs": {"stop_strings": ["1", "2", "3", "4", "5"]}}
    report = doctor(world.model, world.tokenizer, spread, world.task.train, config, prompts=1)
    if not patched: assert "stop strings" in report["sampling"].message
    else: assert len(report.samples) == 1 and not any(report.samples[0]["cut_off"])


def test_rewards_are_called_with_what_the_trainer_passes(world):
    seen = []
    def reward(**given):
        seen.append({name: type(value) for name, value in given.items()})
        return [float(i) for i in range(len(given["completions"]))]
    doctor(world.model, world.tokenizer, reward, world.task.train, BASE, prompts=1)
    trainer_of(world, world.tokenizer, {"max_steps": 1}, world.task.train, reward=reward).train()
    accuracy(world.model, world.tokenizer, world.task.test, reward, 2)
    here, there, measured = ({k: t for k, t in names.items() if not k.startswith("log_")} for names in seen)
    assert here == there and set(seen[0]) == set(seen[1])
    assert set(seen[1]) - set(seen[2]) <= {"completion_ids"} and measured["trainer_state"] is there["trainer_state"]


def test_columns_that_the_trainer_drops(world):
    called = []
    def needs(completions, answer, **_):
        called.append(1)
        return [1.0] * len(completions)
    config = {**BASE, "remove_unused_columns": True}
    report = doctor(world.model, world.tokenizer, [needs, spread], world.task.train, config, prompts=1)
    assert "remove_unused_columns" in report["reward_columns"].message and not called
    assert report["reward_columns"].change == {"remove_unused_columns": False} and "reward_error" not in [f.rule for f in report]
    trainer = trainer_of(world, world.tokenizer, {"remove_unused_columns": True, "max_steps": 1}, world.task.train)
    left = trainer._remove_unused_columns(world.task.train).column_names
    assert columns_kept(trainer, world.task.train.column_names) == left == ["prompt"]


def test_not_scored_is_not_zero(world):
    def nothing(completions, **_): return [None] * len(completions)
    report = doctor(world.model, world.tokenizer, nothing, world.task.train, {**BASE, "max_completion_length": 1}, prompts=2)
    said = [f.rule for f in report]
    assert "reward:nothing" in said and not {"zero_spread", "zero_because_cut_off"} & set(said)
    with pytest.raises(ValueError, match="None for every"): accuracy(world.model, world.tokenizer, world.task.test, nothing, 2)


class Odd(GRPOTrainer):
    def _generate(self, prompts): return self.mine(prompts)


class Broken(GRPOTrainer):
    def _generate(self, prompts): raise KeyError("broken")


def test_it_says_what_it_could_not_look_at(world):
    def look(trainer_class): return doctor(world.model, world.tokenizer, spread, world.task.train, BASE, prompts=1,
                                           trainer_class=trainer_class)
    odd, broken = look(Odd), look(Broken)
    assert odd.ok and any("Odd" in u and "mine" in u for u in odd.unreached) and "memory" in [f.rule for f in odd]
    assert "KeyError: 'broken'" in broken["sampling"].message and "memory" in [f.rule for f in broken]


def test_a_prompt_that_cannot_be_read_is_shown(world):
    data = Dataset.from_dict({"prompt": ["1 2", None, "3"]})
    report = doctor(world.model, world.tokenizer, spread, data, BASE)
    assert "None" in report["prompt"].message and any("prompt must be right" in u for u in report.unreached)


def test_the_doctors_own_clock_is_no_fault_of_a_reward(world, monkeypatch):
    import time
    from grpo_nb.advice import doctor as module
    def slow(completions, **_):
        time.sleep(1.4)
        return [1.0] * len(completions)
    report = doctor(world.model, world.tokenizer, slow, world.task.train, BASE, prompts=1, seconds=1.2)
    assert "reward_error" not in [f.rule for f in report]
    if report.samples: assert report.samples[0]["rewards"] and "zero_spread" in [f.rule for f in report] # what is sampled is scored
    monkeypatch.setattr(module, "GRACE", 0)
    report = doctor(world.model, world.tokenizer, slow, world.task.train, BASE, prompts=1, seconds=1.2)
    assert "reward_error" not in [f.rule for f in report] and "the time was up" in str(report)


def test_a_reward_that_fails_keeps_no_other_from_being_scored(world):
    def first(completions, **_): raise OSError("gone")
    def second(completions, **_): return [float(i) for i in range(len(completions))]
    report = doctor(world.model, world.tokenizer, [first, second], world.task.train, BASE, prompts=2)
    assert "gone" in report["reward_error"].message and report["reward:second"].severity == "good"
    assert "zero_spread" not in [f.rule for f in report]


def test_a_small_data_set_is_looked_at_as_a_whole(world):
    report = doctor(world.model, world.tokenizer, spread, world.task.train, BASE, prompts=0)
    assert report["prompt_length"].evidence["n"] == len(world.task.train) == 16
