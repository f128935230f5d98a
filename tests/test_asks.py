"""Held-out questions in the middle of a run: pass@k and its intervals, what is recorded, and that the training does not notice."""
import random
from itertools import combinations

import pytest
import torch
from datasets import Dataset

from grpo_nb import PatchFastRL
from grpo_nb.advice.live import watch
from grpo_nb.ground.chance import wilson
from grpo_nb.ground.events import Measured
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.passes import HeldOut, pass_at_k
from grpo_nb.tasks.tiny import tiny_model

TASK = get("sort_digits", n_train=48, n_test=8)


@pytest.fixture(autouse=True, scope="module")
def patched(): PatchFastRL("grpo")


def small_digit(completions, **kwargs): return [float(c[-1]["content"][:1] in set("012345")) for c in completions]


def run_of(folder, held_out=None, config=None, **more):
    model, tokenizer = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    given = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
                 gradient_checkpointing=False, learning_rate=1e-2, save_strategy="no", self_check=False)
    return GRPORun(model, tokenizer, small_digit, TASK.train, {**given, **(config or {})}, held_out=held_out, **more)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c in range(n + 1):
        answers = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_has_no_bias_and_its_interval_covers():
    chance, hits, total = random.Random(0), 0, 0.0
    rates = [chance.betavariate(0.6, 1.2) for _ in range(40)]
    true = sum(1 - (1 - p) ** 2 for p in rates) / 40
    for _ in range(400):
        k = sum(pass_at_k(4, sum(chance.random() < p for _ in range(4)), 2) for p in rates)
        low, high = wilson(k, 40)
        hits, total = hits + (low <= true <= high), total + k / 40
    assert total / 400 == pytest.approx(true, abs=0.01) and hits >= 380


@pytest.mark.parametrize("engine", ["inplace", "hf"])
def test_a_run_that_is_asked_equals_one_that_is_not(engine, tmp_path):
    held_out = HeldOut(TASK.test, every=2, samples=4, reward=small_digit)
    asked, plain = run_of(tmp_path / "a", held_out, dict(engine=engine)), run_of(tmp_path / "b", None, dict(engine=engine))
    seen = []
    asked.events.subscribe(seen.append, Measured)
    watcher = watch(asked)
    asked.start()
    plain.start()
    for (name, a), b in zip(asked.trainer.model.named_parameters(), plain.trainer.model.parameters()):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)
    assert [(e.step, e.name) for e in seen if e.name == "held-out"] == [(0, "held-out"), (2, "held-out"), (4, "held-out")]
    assert [e.name for e in seen if e.step == 2] == ["held-out", "pass@1", "pass@2", "pass@4"]
    rows = asked.record.held_out
    assert [(r["step"], r["correct"], r["n"]) for r in rows] == [(e.step, e.correct, e.n) for e in seen if e.name == "held-out"]
    assert all(0 <= r["low"] <= r["correct"] / r["n"] <= r["high"] <= 1 for r in asked.record.measured)
    assert len(asked.record.passes) == 9 and {r["name"] for r in asked.record.passes} == {"pass@1", "pass@2", "pass@4"}
    logs = [log["metrics"] for log in asked.logs if "held_out/greedy" in log["metrics"]]
    assert len(logs) == 3 and all(log["held_out/seconds"] > 0 and "reward" not in log for log in logs)
    rest = [log["metrics"] for log in asked.logs if "reward" in log["metrics"]]
    assert [log["reward"] for log in rest] == [log["metrics"]["reward"] for log in plain.logs] # TRL's own logs are whole
    assert [a.step for a in watcher.accuracy] == [0, 2, 4] and "Held-out accuracy went" in str(watcher.verdict())


def test_greedy_answers_are_those_of_accuracy(tmp_path):
    from grpo_nb.tasks.evaluate import graded
    run = run_of(tmp_path, HeldOut(TASK.test, every=9, samples=0, reward=small_digit))
    run.start()
    right, _ = graded(run.trainer.model, run.trainer.processing_class, TASK.test, small_digit, max_new_tokens=4)
    last = run.record.held_out[-1]
    assert last["step"] == 4 and last["right"] == right and not run.record.passes


def test_a_run_that_goes_on_does_not_begin_with_questions(tmp_path):
    def run(steps): return run_of(tmp_path, HeldOut(TASK.test, every=2, samples=0, reward=small_digit),
                                  dict(max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"))
    first = run(4)
    first.events.subscribe(lambda e: first.stop() if e.step == 3 and first._stop is None else None)
    first.start()
    again = run(4).start(resume=True)
    assert [r["step"] for r in again.record.held_out] == [0, 2, 4]


def test_questions_that_fail_end_no_run(tmp_path):
    def broken(completions, **kwargs): raise ZeroDivisionError("no number")
    run = run_of(tmp_path, HeldOut(TASK.test, reward=broken)).start()
    assert run.state == "finished" and not run.record.measured
    assert any("could not be asked at step 0" in mark["text"] and "ZeroDivisionError" in mark["text"] for mark in run.record.marks)


def test_a_stop_does_not_wait_for_the_answers(tmp_path):
    run = run_of(tmp_path, HeldOut(TASK.test, every=2, samples=4, max_new_tokens=900, reward=small_digit), dict(engine="hf"))
    answers = run._answers
    def leave():
        if run.step: run.stop()
        return answers()
    run._answers = leave
    run.start()
    assert run.state == "stopped" and run.step == 2 and [r["step"] for r in run.record.held_out] == [0]


@pytest.mark.parametrize("make, kind, words", [
    (lambda: HeldOut(TASK.test, every=0), ValueError, "every=0"),
    (lambda: HeldOut(TASK.test, samples=-1), ValueError, "samples=-1"),
    (lambda: HeldOut(TASK.test, samples=1.5), ValueError, "samples=1.5"),
    (lambda: HeldOut(TASK.test, temperature=0), ValueError, "temperature=0"),
    (lambda: HeldOut(TASK.test, questions=0), ValueError, "questions=0"),
    (lambda: HeldOut(TASK.test, reward="right"), TypeError, "reward='right'"),
    (lambda: HeldOut([1, 2]), TypeError, "datasets.Dataset"), (lambda: HeldOut(Dataset.from_dict({"promt": ["a"]})), ValueError,
                                                               "'prompt'"),
    (lambda: HeldOut(TASK.test.select([])), ValueError, "empty"), (lambda: pass_at_k(4, 2, 5), ValueError, "k=5"),
    (lambda: pass_at_k(4, 5, 2), ValueError, "c=5")])
def test_what_cannot_be_is_one_sentence(make, kind, words):
    with pytest.raises(kind) as error: make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_checks_its_questions_before_anything_is_made(tmp_path):
    with pytest.raises(TypeError, match="held_out"): run_of(tmp_path, 7)
    with pytest.raises(ValueError, match="held_out"): run_of(tmp_path, [dict(question="a")])
