"""What a failing, hanging or wrong reward does to a run and to TRL's own trainer: one clear error, and what comes after works."""
import asyncio
import functools
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_nb.ground.events import said
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks import evaluate
from grpo_nb.tasks.guard import RewardError
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers import patch
from grpo_nb.trainers.table import patch_table

TASK = get("sort_digits", n_train=64, n_test=8)
SMALL = dict(max_steps=2, per_device_train_batch_size=8, num_generations=4, max_completion_length=4, gradient_checkpointing=False,
             save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True, bf16=False, logging_steps=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def parts(): return tiny_model(TASK, steps=0, hidden_size=64, layers=1)


def lengths(completions, **columns): return [float(len(c[-1]["content"])) for c in completions]


def make(parts, folder, rewards, run=None, data=TASK.train, tokenizer=None, **more):
    return GRPORun(parts[0], tokenizer or parts[1], rewards, data, {**SMALL, "output_dir": str(folder), **more}, **(run or {}))


def ended(run, seconds=60):
    "The error that a run in the background ends with; None where it finishes."
    try: run.wait(seconds)
    except Exception as error: return error # noqa: BLE001 it is looked at
    assert run.state in ("finished", "stopped"), repr(run)
    return None


def reached(run, what, seconds=30):
    end = time.monotonic() + seconds
    while what not in run.waits_for:
        assert time.monotonic() < end, repr(run)
        time.sleep(0.02)


class Judge:
    def __call__(self, completions, **columns): return lengths(completions)


class AsyncJudge:
    async def __call__(self, completions, **columns): return lengths(completions)


async def judged(completions, **columns): return lengths(completions)


# ---- stop and pause

def sleeping(seconds, at=0, is_async=False):
    def sleeps(completions, trainer_state, **columns):
        if trainer_state.global_step == at: time.sleep(seconds)
        return lengths(completions)
    async def awaits(completions, trainer_state, **columns):
        if trainer_state.global_step == at: await asyncio.sleep(seconds)
        return lengths(completions)
    return awaits if is_async else sleeps


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_stop_says_what_it_waits_for_and_can_leave_it(parts, tmp_path, capsys, is_async):
    "The step is given up, the checkpoint is the last whole step's, and the run goes on from it."
    reward = sleeping(60, at=1, is_async=is_async)
    name = f"reward {reward.__name__!r}"
    run = make(parts, tmp_path, reward).start(background=True)
    while run.step < 1: time.sleep(0.01)
    reached(run, name)
    run.pause()
    assert f"the run waits for {name}, since 0 s, and pauses after this step." in capsys.readouterr().out
    assert f"about to pause, waits for {name}, since " in repr(run)
    run.stop()
    told = capsys.readouterr().out
    assert f"the run waits for {name}, since " in told and "stop(now=True) does not wait for it" in told
    assert f"about to stop, waits for {name}" in repr(run) and repr(run).startswith("GRPO run: running, step 1 of 2")
    words = r"about to stop. It waits for reward .*, since \d+ s. stop\(now=True\) does not wait"
    with pytest.raises(RuntimeError, match=words): run.stop()
    began = time.monotonic()
    run.stop(now=True).wait(20)
    assert run.state == "stopped" and run.step == 1 and run.checkpoint.endswith("checkpoint-1") and time.monotonic() - began < 15
    assert run.waits_for == run.waiting == "" and "waits" not in repr(run)
    again = make(parts, tmp_path, lengths).start(resume=run.checkpoint, background=False) # by its path: the reward is another one
    assert again.state == "finished" and again.step == 2


def test_a_stop_while_sampling_does_not_wait(parts, tmp_path, capsys):
    run = make(parts, tmp_path, lengths, max_completion_length=4)
    run.trainer.generation_config.update(max_new_tokens=4000, eos_token_id=[2**31 - 1])
    run.start(background=True)
    reached(run, "sampling")
    run.stop(save=False).wait(20)
    assert run.state == "stopped" and run.step == 0 and "waits for" not in capsys.readouterr().out


def test_a_stop_in_the_thread_that_trains_says_nothing(parts, tmp_path, capsys):
    def stops(completions, **columns):
        if not run._stop: run.stop(save=False)
        return lengths(completions)
    run = make(parts, tmp_path, stops)
    run.start(background=False)
    assert run.state == "stopped" and run.step == 1 and "waits for" not in capsys.readouterr().out


# ---- a chat template that loops

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def templated(parts):
    "The tokenizer with another template, for a test."
    before = parts[1].chat_template
    def change(text):
        parts[1].chat_template = text
        return parts[1]
    yield change
    parts[1].chat_template = before
    assert "apply_chat_template" not in vars(parts[1])


def test_a_chat_template_that_loops_is_told_before_the_run(parts, tmp_path, templated, monkeypatch):
    templated(LOOPS + "x")
    monkeypatch.setattr(evaluate, "TEMPLATE_SECONDS", 0.5)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="chat_template took longer than 0.5 s"): make(parts, tmp_path, lengths)
    time.sleep(0.5)
    assert threading.active_count() <= threads, "the thread that rendered has been ended"


@pytest.mark.parametrize("how", ["limit", "stop"])
def test_a_chat_template_that_loops_for_one_prompt(parts, tmp_path, templated, monkeypatch, how):
    templated("x")
    data = [{"prompt": [{"role": "user", "content": "loop" if i else "first"}]} for i in range(16)]
    run = make(parts, tmp_path, lengths, data=data) # it looks at the longest prompts; what loops later is not seen
    templated("{% if messages[0]['content'] == 'loop' %}" + LOOPS + "{% endif %}x")
    if how == "limit": monkeypatch.setattr(evaluate, "TEMPLATE_SECONDS", 0.5)
    run.start(background=True)
    if how == "limit": assert "chat_template took longer than 0.5 s" in str(ended(run)) and run.state == "failed"
    else:
        reached(run, "sampling")
        time.sleep(0.3)
        assert ended(run.stop(save=False), 15) is None and run.state == "stopped"


# ---- what TRL takes is taken, and what would overwrite is told apart

def values_of(parts, folder, rewards, **more):
    run = make(parts, folder, rewards, **more).start(background=False)
    return {row["name"]: row["value"] for row in run.history if row["step"] == 1}


def test_rewards_of_one_name_have_two_curves(parts, tmp_path, capsys):
    seen, ones = [], lambda completions, **k: [1.0] * len(completions)
    rewards = [ones, lambda completions, **k: [2.0] * len(completions), Judge(), Judge()]
    run = make(parts, tmp_path, rewards, max_steps=1)
    run.events.subscribe(lambda e: seen.append(getattr(e, "rewards", None)))
    run.start(background=False)
    logged = {row["name"]: row["value"] for row in run.history}
    assert logged["rewards/<lambda>/mean"] == 1.0 and logged["rewards/<lambda>_2/mean"] == 2.0
    assert logged["rewards/Judge/mean"] == logged["rewards/Judge_2/mean"]
    assert set(next(filter(None, seen))) == {"<lambda>", "<lambda>_2", "Judge", "Judge_2"}
    assert "two rewards have the same name" in capsys.readouterr().out or any("two rewards" in text for text in said)


def test_a_reward_model_by_its_path(parts, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    model, folder = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(parts[1]), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        pad_token_id=parts[1].pad_token_id)), tmp_path / "rm"
    model.save_pretrained(folder)
    parts[1].save_pretrained(folder)
    found = values_of(parts, tmp_path / "out", [str(folder), lengths], max_steps=1)
    assert {"rewards/rm/mean", "rewards/lengths/mean"} <= set(found) and math.isfinite(found["rewards/rm/mean"])
    with pytest.raises(ValueError, match="reward='rm' is not known"): make(parts, tmp_path, "rm")


@pytest.mark.parametrize("rewards, kind, words", [
    (Judge, TypeError, "Judge is a class; give an instance"), ([lengths, Judge], TypeError, "is a class"),
    (lambda completions: [], ValueError, "does not take 'prompts'"),
    (lambda completions, solution, **k: [], ValueError, "needs 'solution'"),
], ids=["class", "in a list", "no kwargs", "no column"])
def test_what_cannot_be_called_is_told_before_the_run(parts, tmp_path, rewards, kind, words):
    with pytest.raises(kind, match=words): make(parts, tmp_path, rewards)


def test_columns_with_the_names_of_arguments(parts, tmp_path):
    data = TASK.train.add_column("completions", ["x"] * len(TASK.train))
    words = "has a column 'completions', a name under which the trainer passes something"
    with pytest.raises(ValueError, match=words): make(parts, tmp_path, lengths, data=data)


# ---- TRL's own trainer, with the patch

@pytest.fixture(params=["grpo", "rloo"])
def plain(request, parts, tmp_path):
    "Train TRL's trainer for a step and return it."
    import trl
    patch.PatchFastRL(request.param)
    trainer, config = (getattr(trl, f"{request.param.upper()}{what}") for what in ("Trainer", "Config"))
    def train(rewards, data=TASK.train, **more):
        args = config(**{**SMALL, "output_dir": str(tmp_path), "max_steps": 1, "beta": 0.0, **more})
        made = trainer(model=parts[0], reward_funcs=rewards, args=args, train_dataset=data, processing_class=parts[1])
        made.train()
        return made
    yield train
    patch.UnpatchFastRL()


def given(values):
    def fixed(completions, **columns): return values(len(completions)) if callable(values) else values
    return fixed


async def exits(completions, **columns): raise SystemExit(4)


def halves(completions, **columns): return [1 / 0 for _ in completions]


PLAIN = {
    "scalar": (given(1.0), RewardError, "must return a list"),
    "text": (given(lambda n: ["a"] * n), RewardError, "at sample 0: returned 'a'"),
    "nan": (given(lambda n: [0.0] * (n - 1) + [math.nan]), RewardError, "at sample 7: returned NaN"),
    "infinite": (given(lambda n: np.full(n, np.inf)), RewardError, "infinite"),
    "large": (given(lambda n: [1e39] * n), RewardError, "infinite"),
    "short": (given([1.0]), RewardError, "returned 1 values for 8"),
    "shape": (given(lambda n: torch.zeros(n, 2)), RewardError, "shape"),
    "raises": (halves, RewardError, "'halves' at sample 0: raised ZeroDivisionError"),
    "exits": (exits, RewardError, "'exits': raised SystemExit"),
    "class": (Judge, TypeError, "Judge is a class"), "tuple": ((lengths,), TypeError, "is a tuple; give a list"),
    "number": (3, TypeError, "3 is neither"),
    "no kwargs": (lambda completions: [], RewardError, "does not take 'prompts'"),
    "no column": (lambda completions, x, **k: [], RewardError, "needs 'x'"),
}


def test_wrong_rewards_of_the_plain_trainer(plain):
    for name, (reward, kind, words) in PLAIN.items():
        with pytest.raises(kind) as caught: plain(reward)
        assert words in str(caught.value), name
    data = TASK.train.add_column("prompts", ["x"] * len(TASK.train))
    with pytest.raises(ValueError, match="its column 'prompts' has the name of an argument"): plain(lengths, data)


def test_good_rewards_of_the_plain_trainer(plain):
    "None is not scored, one-element tensors are numbers, one name has one metric, and the trainer is left as it was made."
    def some(completions, **columns): return [None if i % 2 else 3.0 for i in range(len(completions))]
    rewards = [some, given(lambda n: [torch.ones(1)] * n), judged, Judge(), Judge(), functools.partial(lengths)]
    made = plain(rewards)
    log = made.state.log_history[0]
    means = {k.split("/")[1]: v for k, v in log.items() if k.startswith("rewards/") and k.endswith("/mean")}
    assert list(means) == ["some", "fixed", "judged", "Judge", "Judge_2", "lengths"]
    assert means["some"] == 3.0 and means["fixed"] == 1.0
    assert means["judged"] == means["Judge"] == means["Judge_2"] == means["lengths"]
    assert made.reward_funcs == rewards and all(not hasattr(f, "_guards") for f in made.reward_funcs)


def test_the_guard_changes_no_number(parts, tmp_path):
    "Rewards, their order and the advantages are TRL's."
    import trl
    prompts, completions = [["p"]] * 8, [[{"content": str(i) * i}] for i in range(8)]
    def thirds(completions, **columns): return [len(c[-1]["content"]) / 3 for c in completions]
    async def late(completions, **columns): return np.float16([0.1] * len(completions))
    found = []
    for patched in (False, True):
        if patched: patch.PatchFastRL("grpo")
        rewards = [thirds, judged, late, given(lambda n: [None, 1] * (n // 2)), given(lambda n: torch.arange(n) / 7)]
        args = trl.GRPOConfig(**{**SMALL, "output_dir": str(tmp_path)})
        made = trl.GRPOTrainer(model=parts[0], reward_funcs=rewards, args=args, train_dataset=TASK.train, processing_class=parts[1])
        found.append(made._calculate_rewards([{"prompt": "p"}] * 8, prompts, completions, [[1]] * 8))
    patch.UnpatchFastRL()
    assert torch.equal(found[0].nan_to_num(-1), found[1].nan_to_num(-1))


def test_the_guard_is_a_row_of_the_table():
    for name in ("grpo", "rloo"):
        patch.PatchFastRL(name)
        on = {r.patch: r.state for r in patch_table(name)}
        patch.UnpatchFastRL(name)
        off = {r.patch: r.state for r in patch_table(name)}
        for row in ("reward names", "reward check", "reward guard"): assert (on[row], off[row]) == ("on", "off")


def test_the_doctor_and_the_lab_take_a_reward_model(parts):
    from grpo_nb.tasks.rewards import check_rewards
    from grpo_nb.ui.lab.lab import RewardLab
    assert check_rewards({"org/judge": 2, lengths: 1}) == (["org/judge", lengths], [2.0, 1.0])
    lab = RewardLab(["org/judge", lengths])
    assert list(lab.rewards) == ["judge", "lengths"]


# ---- the whole table, slow

def batch_then_hang(completions, **columns):
    if len(completions) > 1: raise ValueError("batch")
    time.sleep(3600)


def busy(completions, **columns):
    while True: pass


async def blocks(completions, **columns): time.sleep(30)


async def awaits(completions, **columns): await asyncio.sleep(3600)


async def interrupts(completions, **columns): raise KeyboardInterrupt


class OddBase(BaseException): pass


class Unwritable(Exception):
    def __str__(self): raise RuntimeError("no text")


def raises(error):
    def fails(completions, **columns): raise error
    return fails


def mid_run(completions, trainer_state, **columns): return [1 / (1 - trainer_state.global_step)] * len(completions)


def recursive(completions, **columns): return recursive(completions, **columns)


RAISES = {
    "value": raises(ValueError("bad")), "mid run": mid_run, "no text": raises(Unwritable()), "base": raises(OddBase("odd base")),
    "exit": raises(SystemExit(3)), "2 MB": raises(ValueError("x" * 2_000_000)), "stop iteration": raises(StopIteration()),
    "recursion": recursive, "escape": raises(ValueError("\x1b[2J\u202e")), "one of several": [lengths, raises(KeyError("k"))],
    "async exit": exits, "async interrupt": interrupts,
}
HANGS = {
    "sleeps": sleeping(3600), "busy": busy, "async sleep": awaits, "one of two": [lengths, sleeping(3600)], "async blocks": blocks,
    "raises, then hangs": batch_then_hang, "mid run": sleeping(3600, at=1), "async mid run": sleeping(3600, at=1, is_async=True),
    "two async": [AsyncJudge(), blocks], "object": functools.partial(sleeping(3600)),
}
WRONG = {
    "short": [1.0], "long": lambda n: [1.0] * (n + 1), "scalar": 1.0, "none": None, "dict": {"a": 1}, "string": "abcdefgh",
    "text": lambda n: ["1"] * n,
    "nan": lambda n: [math.nan] * n, "inf": lambda n: [math.inf] * n, "2-d": lambda n: torch.zeros(n, 2),
    "fp16": lambda n: np.float16([1e5] * n),
    "10**400": lambda n: [10**400] * n, "lists": lambda n: [[1.0]] * n, "complex": lambda n: [1j] * n,
    "objects": lambda n: [object()] * n,
    "coroutine": lambda n: AsyncJudge()([]), "1e39": lambda n: [1e39] * n,
}


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("kind", ["raises", "hangs", "wrong"])
def test_the_table_of_reward_faults(parts, tmp_path, kind, background):
    "Each ends in one error that names the reward, leaves a run that can be taken up, and the next run works."
    table = {"raises": RAISES, "hangs": HANGS, "wrong": {name: given(values) for name, values in WRONG.items()}}[kind]
    survived, clear = [], []
    for n, (name, reward) in enumerate(table.items()):
        run = make(parts, tmp_path / str(n), reward, run=dict(reward_timeout=2) if kind == "hangs" else None)
        began, error = time.monotonic(), None
        if background: error = ended(run.start(background=True), 60)
        else:
            try: run.start(background=False)
            except BaseException as caught: error = caught # noqa: BLE001 whatever comes is looked at
        after = make(parts, tmp_path / f"{n} after", lengths, max_steps=1).start(background=False)
        if run.state == "failed" and after.state == "finished" and time.monotonic() - began < 50: survived.append(name)
        if isinstance(error, RewardError) and "reward '" in str(error) and len(str(error)) < 3000: clear.append(name)
    assert survived == clear == list(table), SimpleNamespace(survived=survived, clear=clear)


def test_a_reward_may_ask_for_environments_that_the_first_batch_makes():
    from grpo_nb.trainers.grpo import check_call

    def won(environments, **columns): return [float(game.won) for game in environments]

    trainer = SimpleNamespace(reward_funcs=[won], reward_func_names=["won"], environments=None)
    trainer.environment_factories = {None: object}
    check_call(trainer, ["prompt", "secret"])
    trainer.environment_factories = None
    with pytest.raises(RewardError, match="environments"): check_call(trainer, ["prompt", "secret"])
