"""Verifiable tasks: seeded, disjoint, checkable rows, and one clear error for bad input."""
import dataclasses
import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from grpo_nb.tasks import library as tasks

MADE = ["sort_digits", "reverse_string", "add_numbers", "count_letters", "countdown"]


def questions(dataset): return [p[-1]["content"] for p in dataset["prompt"]]


def columns(dataset): return {c: list(dataset[c]) for c in dataset.column_names if c != "prompt"}


# --- the tasks made here


def test_available(): assert tasks.available() == [*MADE, "larger", "largest", "sort_three", "sums"]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("seed", [0, 7])
def test_rows(name, seed):
    task = tasks.get(name, n_train=150, n_test=50, seed=seed)
    assert (len(task.train), len(task.test)) == (150, 50)
    assert {"prompt", "answer"} <= set(task.train.column_names) and task.train.column_names == task.test.column_names
    assert all(p[0]["role"] == "user" for p in task.train["prompt"]) and all(isinstance(a, str) for a in task.train["answer"])
    every = questions(task.train) + questions(task.test)
    assert len(set(every)) == 200
    for part in (task.train, task.test):
        rows = columns(part)
        assert task.reward(prompts=part["prompt"], completions=list(part["answer"]), **rows) == [1.0] * len(part)
        chat = [[{"role": "assistant", "content": f" {a}\n"}] for a in part["answer"]]
        assert task.reward(prompts=part["prompt"], completions=chat, **rows) == [1.0] * len(part)
        assert task.reward(prompts=part["prompt"], completions=["nothing"] * len(part), **rows) == [0.0] * len(part)


@pytest.mark.parametrize("name", MADE)
def test_seeded(name):
    a, b, other = (tasks.get(name, n_train=60, n_test=20, seed=s) for s in (3, 3, 4))
    assert a.train.to_list() == b.train.to_list() and a.test.to_list() == b.test.to_list()
    assert a.train.to_list() != other.train.to_list()


def test_more_training_rows_keep_the_rest():
    small, large = (tasks.get("sort_digits", n_train=n, n_test=20) for n in (30, 90))
    assert small.test.to_list() == large.test.to_list()
    assert small.train.to_list() == large.train.to_list()[:30]


@pytest.mark.parametrize("name, check", [
    ("sort_digits", lambda q, a: sorted(q.split(": ")[1]) == list(a)),
    ("reverse_string", lambda q, a: q.split('"')[1][::-1] == a),
    ("add_numbers", lambda q, a: sum(map(int, q[8:-1].split("+"))) == int(a)),
    ("count_letters", lambda q, a: q.split('"')[3].count(q.split('"')[1]) == int(a)),
])
def test_answers_follow_from_questions(name, check):
    task = tasks.get(name, n_train=100, n_test=20)
    assert all(check(q, a) for q, a in zip(questions(task.train), task.train["answer"]))


@pytest.mark.parametrize("name", MADE[:4])
def test_mistakes_are_wrong_and_a_third_is_easy(name):
    draw, chance = tasks.get(name, n_train=10, n_test=10).warm_start.draw, Random(0)
    drawn = [draw(chance) for _ in range(3000)]
    assert sum(e.mistake == e.answer for e in drawn) < 60
    assert 0.3 < sum(e.easy for e in drawn) / 3000 < 0.37


def test_task_is_frozen_and_short_to_print():
    task = tasks.get("sort_digits", n_train=5, n_test=5)
    with pytest.raises(dataclasses.FrozenInstanceError): task.name = "x"
    assert len(repr(task)) < 200


@pytest.mark.parametrize("parameters", [dict(digits=5), dict(digits=2, n_train=60, n_test=10)])
def test_parameters(parameters):
    task = tasks.get("sort_digits", **{"n_train": 20, "n_test": 5, **parameters})
    assert all(len(a) == parameters["digits"] for a in task.train["answer"])


@pytest.mark.parametrize("call, error, words", [
    (lambda: tasks.get("sort_digit"), ValueError, ["name='sort_digit'", "Did you mean 'sort_digits'?", "countdown"]),
    (lambda: tasks.get("sort_digits", digit=5), TypeError, ["'digit'", "Did you mean 'digits'?"]),
    (lambda: tasks.get("sort_digits", ntrain=5), TypeError, ["Did you mean 'n_train'?"]),
    (lambda: tasks.get("sort_digits", digits=1), ValueError, ["digits=1", "at least 2 and at most 12"]),
    (lambda: tasks.get("sort_digits", digits=4.0), ValueError, ["digits=4.0"]),
    (lambda: tasks.get("sort_digits", n_test=0), ValueError, ["n_test=0", "at least 1"]),
    (lambda: tasks.get("reverse_string", alphabet="aab"), ValueError, ["alphabet='aab'"]),
    (lambda: tasks.get("add_numbers", digits=1, n_train=300), ValueError, ["n_train=300", "only 100", "add_numbers"]),
    (lambda: tasks.get("countdown", count=7), ValueError, ["count=7"]),
])
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught: call()
    assert all(w in str(caught.value) for w in words), str(caught.value)


# --- countdown


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_countdown_is_solvable(seed, count):
    e = tasks.countdown(count).draw(Random(seed))
    value, used = tasks.evaluate_expression(e.answer)
    assert value == e.columns["target"] and not Counter(used) - Counter(e.columns["numbers"])
    assert e.columns["target"] not in e.columns["numbers"] and 1 <= value <= 100


@pytest.mark.parametrize("text, score", [
    ("(3+5)*7", 1), ("7*(3+5) = 56", 1), ("First 3+5=8.\n8 times 7:\n(3 + 5) × 7", 1), ("<answer>7*(5+3)</answer>", 1),
    ("<think>7*8</think>(3+5)*7", 1), ("-(3+5)*-7", 1), ("(3+5)*(7/7)*7", 0), ("7*8", 0), ("56", 0), ("3*5+7", 0), ("", 0),
    ("((3+5)*7", 0), ("3+5*7", 0), ("2**9**9**9", 0), ("(3+5)//7", 0), ("1/0", 0), ("(" * 190 + ")" * 3, 0),
    ("1+" * 5000 + "1", 0), ("__import__('os').system('true')", 0), ("03+5", 0), ("(3+5)*7 or", 0), ("3 5", 0), ("3(5)", 0),
    ("9" * 199, 0), ("(3+5)*7.", 0),
])
def test_countdown_reward(text, score):
    assert tasks.countdown_reward([text], numbers=[[3, 5, 7]], target=[56]) == [float(score)]


def test_countdown_uses_fractions(): assert tasks.countdown_reward(["8/(3-8/3)"], [[3, 3, 8, 8]], [24]) == [1.0]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/() \nx=<>answer", max_size=60))
def test_countdown_reward_never_fails(text):
    assert tasks.countdown_reward([text], [[3, 5, 7]], [56])[0] in (0.0, 1.0)


# --- reasoning-gym


def test_reasoning_gym_missing(monkeypatch):
    def missing(name): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(tasks, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "grpo_nb\[tasks\]"'): tasks.reasoning_gym("leg_counting")


@pytest.mark.parametrize("name", ["leg_counting", "basic_arithmetic", "spell_backward", "countdown", "number_sorting", "gcd"])
def test_reasoning_gym(name):
    pytest.importorskip("reasoning_gym")
    task = tasks.reasoning_gym(name, n_train=12, n_test=5, seed=1)
    again = tasks.reasoning_gym(name, n_train=12, n_test=5, seed=1)
    assert task.train.to_list() == again.train.to_list() and (len(task.train), len(task.test)) == (12, 5)
    assert not set(questions(task.train)) & set(questions(task.test))
    assert task.reward(completions=list(task.train["answer"]), **columns(task.train)) == [1.0] * 12
    tagged = [[{"role": "assistant", "content": f"So <answer>{a}</answer>"}] for a in task.test["answer"]]
    assert task.reward(completions=tagged, **columns(task.test)) == [1.0] * 5
    assert all(s < 1 for s in task.reward(completions=["no idea"] * 5, **columns(task.test)))
    assert task.reward.__name__ == f"{name}_score"


def test_reasoning_gym_settings():
    pytest.importorskip("reasoning_gym")
    task = tasks.reasoning_gym("leg_counting", n_train=3, n_test=2, instruction="", min_animals=2, max_animals=2)
    assert all(q.count(",") <= 5 and "<answer>" not in q for q in questions(task.train))
    with pytest.raises(TypeError, match="Did you mean 'max_animals'"): tasks.reasoning_gym("leg_counting", max_animal=2)
    with pytest.raises(ValueError, match="Did you mean 'leg_counting'"): tasks.reasoning_gym("leg_count")
    with pytest.raises(ValueError, match="n_train=0"): tasks.reasoning_gym("leg_counting", n_train=0)


# --- GSM8K


def gsm(n, offset=0):
    return [json.dumps({"question": f"What is {i} * 1000?", "answer": f"{i} * 1000 = <<{i}*1000={i}000>>{i}000\n#### {i},000"})
            for i in range(1 + offset, n + 1 + offset)]


def test_gsm8k_file(tmp_path):
    file = tmp_path / "sample.jsonl"
    file.write_text("\n".join(gsm(20)) + "\n\n")
    task = tasks.gsm8k(file, n_test=5)
    assert (len(task.train), len(task.test)) == (15, 5) and not set(questions(task.train)) & set(questions(task.test))
    assert all(a.endswith("000") and "," not in a for a in task.train["answer"])
    assert all("####" in s for s in task.train["solution"])
    assert task.train.to_list() == tasks.gsm8k(str(file), n_test=5).train.to_list()
    assert task.train.to_list() != tasks.gsm8k(file, n_test=5, seed=1).train.to_list()
    assert task.reward(completions=list(task.train["solution"]), **columns(task.train)) == [1.0] * 15
    wrong = list(task.train["solution"][1:]) + [task.train["solution"][0]]
    assert task.reward(completions=wrong, **columns(task.train)) == [0.0] * 15
    assert questions(task.train)[0].endswith("the number.") and questions(tasks.gsm8k(file, instruction="").train)[0].endswith("?")


def test_gsm8k_folder_leaves_held_out_questions_out_of_training(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(gsm(10)))
    (tmp_path / "test.jsonl").write_text("\n".join(gsm(4, offset=8)))
    task = tasks.gsm8k(tmp_path)
    assert len(task.test) == 4 and len(task.train) == 8
    assert len(tasks.gsm8k(tmp_path, n_train=3, n_test=2).train) == 3


@pytest.mark.parametrize("line, words", [
    ("{", ["line 2", "not JSON"]), ('{"question": "x"}', ["line 2", "'answer'", "'question'"]), ("[1]", ["line 2", "list"]),
    ('{"question": "x", "answer": "5"}', ["line 2", "####"]),
])
def test_gsm8k_bad_lines(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*gsm(1), line]))
    with pytest.raises(ValueError) as caught: tasks.gsm8k(file)
    assert all(w in str(caught.value) for w in ["bad.jsonl", *words])


@pytest.mark.parametrize(
    "given", ["sampel.jsonl", "./nowhere/x", "/nowhere/gsm8k", "~/nowhere-at-all/x", "data/sampel.jsonl", "a/b/c", "nowhere"]
)
def test_gsm8k_missing_path_downloads_nothing(tmp_path, monkeypatch, given):
    import datasets

    def refuse(*args, **kwargs): raise AssertionError("tried to download")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="path_or_hub_id="): tasks.gsm8k(given)


def test_gsm8k_names_the_nearest_file(tmp_path):
    (tmp_path / "sample.jsonl").write_text("\n".join(gsm(3)))
    with pytest.raises(FileNotFoundError, match="Did you mean 'sample.jsonl'"): tasks.gsm8k(str(tmp_path / "sampel.jsonl"))
    with pytest.raises(FileNotFoundError, match="train.jsonl"): tasks.gsm8k(tmp_path)
    with pytest.raises(ValueError, match="n_train=50"): tasks.gsm8k(tmp_path / "sample.jsonl", n_train=50)


def test_gsm8k_hub_id(monkeypatch):
    import datasets
    rows = [json.loads(line) for line in gsm(6)]
    part = {k: [r[k] for r in rows] for k in ("question", "answer")}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a: {"train": {k: v[:4] for k, v in part.items()}, "test": {k: v[4:] for k, v in part.items()}},
    )
    task = tasks.gsm8k()
    assert (len(task.train), len(task.test)) == (4, 2)


@pytest.mark.parametrize("name", MADE)
def test_defaults(name):
    task = tasks.get(name)
    assert (len(task.train), len(task.test)) == (2000, 200)
