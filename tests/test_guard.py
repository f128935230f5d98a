"""What a guarded reward lets through, and what each failure names."""
import asyncio
import functools
import inspect
import math
import pickle
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo_nb.ground.limit import Left
from grpo_nb.tasks.guard import RewardError, guard, is_async, name_of, names_of, why_not_called

CHAT = [[{"role": "assistant", "content": text}] for text in ("one", "two", "three")]
TEXT = ["one", "two", "three"]


def returning(values):
    def fixed(prompts, completions, **columns): return values
    return fixed


def returning_async(values):
    async def fixed(prompts, completions, **columns): return values
    return fixed


def call(function, completions=TEXT, timeout=None, **columns):
    guarded = function if hasattr(function, "_guards") else guard(function, timeout)
    out = guarded(prompts=["?"] * len(completions), completions=completions, **columns)
    return asyncio.run(out) if inspect.iscoroutine(out) else out


def error(function, *a, **k):
    with pytest.raises(RewardError) as caught: call(function, *a, **k)
    return caught.value


@pytest.fixture(params=[returning, returning_async], ids=["sync", "async"])
def make(request): return request.param


@pytest.fixture(params=[None, 30], ids=["no limit", "limit"])
def timeout(request): return request.param


GOOD = [
    [1, 2.5, None], (1, 2.5, None), [True, False, None], [np.float32(1), np.int64(2), np.bool_(True)],
    np.array([1, 2, 3]), np.array([True, False, True]), torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
    torch.tensor([1, 2, 3], dtype=torch.bfloat16), [torch.tensor(1.0), torch.tensor(2, dtype=torch.int8), 3],
    [Fraction(1, 2), Decimal("0.5"), 0], range(3), [None] * 3, [1.8e19, -1.8e19, 0],
    [torch.ones(1), np.ones(1), torch.ones(1, 1)], torch.ones(3, 1), np.ones((3, 1)), {"a": 1, "b": 2, "c": 3}.values(),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_good_values(values, make, timeout):
    checked = call(make(values), timeout=timeout)
    assert all(v is None or type(v) is float for v in checked)
    listed = [v.item() if getattr(v, "shape", ()) else v for v in (values.detach() if torch.is_tensor(values) else values)]
    assert checked == [None if v is None else float(v) for v in listed]


class OddText:
    def __repr__(self): raise SystemExit("no text")


class Endless:
    def __iter__(self):
        while True: yield 1.0


BAD = {
    "string": (["0", 1, 2], 0, "'0' (str), which is not a number"),
    "nan": ([0, math.nan, 0], 1, "NaN"),
    "inf": ([0, 0, -math.inf], 2, "infinite"),
    "large": ([0, 10**400, 0], 1, "infinite"),
    "float32": ([0, 0, 1e39], 2, "infinite in float32"),
    "complex": ([1j, 0, 0], 0, "not a number"),
    "list": ([[1], [2], [3]], 0, "(list), which is not a number"),
    "numpy nan": (np.array([0, np.nan, 0]), 1, "NaN"),
    "tensor inf": (torch.tensor([0, 0, math.inf]), 2, "infinite"),
    "numpy text": (np.array(["a", "b", "c"]), 0, "not a number"),
    "shape 2": ([torch.zeros(2)] * 3, 0, "shape (2,)"),
    "complex number": ([np.complex64(1j), 0, 0], 0, "not a number"),
    "complex tensor": (torch.tensor([1j, 0, 0]), 0, "not a number"),
    "date": ([0, np.datetime64("2026-01-01"), 0], 1, "not a number"),
    "signaling nan": ([0, Decimal("sNaN"), 0], 1, "not a number"),
    "odd repr": ([OddText(), 0, 0], 0, "repr() raises"),
    "endless": (Endless(), 3, "more values than 3 completions"),
    "object": ([object(), 0, 0], 0, "(object)"),
    "short": ([1, 2], 2, "2 values for 3 completions"),
    "empty": ([], 0, "0 values for 3"),
    "long": ([1] * 4, 3, "4 values for 3"),
    "short tensor": (torch.zeros(2), 2, "2 values for 3"),
    "one tensor": (torch.zeros(1), 1, "1 values for 3"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("completions", [TEXT, CHAT], ids=["text", "chat"])
def test_bad_values(case, make, timeout, completions):
    values, sample, reason = BAD[case]
    e = error(make(values), completions, timeout)
    assert e.function == "fixed" and e.sample == sample and reason in str(e) and f"reward 'fixed' at sample {sample}" in str(e)
    if sample < 3: assert e.completion is completions[sample] and TEXT[sample] in str(e)
    else: assert e.completion is None


@pytest.mark.parametrize("values", [
    1.0, 0, True, None, "abc", {"a": 1, "b": 2, "c": 3}, {1, 2, 3},
    torch.tensor(1.0), np.float64(1), torch.zeros(3, 2), np.zeros((1, 3)), b"abc",
], ids=str)
def test_not_a_list_is_never_broadcast(values, make):
    e = error(make(values))
    assert e.sample is None and ("must return a list" in str(e) or "one dimension" in str(e))


def failing(prompts, completions, answer, log_metric=None, **columns):
    if log_metric: log_metric("seen", len(completions))
    found = []
    for c, a in zip(completions, answer): # in a comprehension Python 3.12 and later keep no variable for those who come to look
        found.append(1 / (len(c) - a))
    return found


async def failing_async(prompts, completions, answer, log_metric=None, **columns):
    return failing(prompts, completions, answer, log_metric)


@pytest.mark.parametrize("function", [failing, failing_async])
def test_exception_names_its_sample(function, timeout):
    logged = []
    e = error(function, timeout=timeout, answer=[0, 0, 5], log_metric=lambda *a: logged.append(a), trainer_state=object())
    assert e.function == function.__name__ and e.sample == 2
    assert e.completion == "three" and "ZeroDivisionError" in str(e)
    assert isinstance(e.__cause__, ZeroDivisionError)
    assert logged == [("seen", 3)], "the search for the sample logs nothing"
    assert error(function, answer=[3, 3, 0]).sample == 0
    assert f"{__file__}:" in str(e) and " in failing" in str(e)


def test_generators(timeout):
    def yields(prompts, completions, **columns):
        for completion in completions: yield {"one": 1, "two": 2}[completion]
    assert call(yields, ["one", "two"], timeout) == [1.0, 2.0]
    e = error(yields, timeout=timeout)
    assert e.sample == 2 and isinstance(e.__cause__, KeyError)


def test_exception_of_no_sample():
    def only_pairs(prompts, completions, **columns):
        if len(completions) > 1: raise KeyError("batch")
        return [0]
    e = error(only_pairs)
    assert e.sample is None and "no sample raises it alone" in str(e) and isinstance(e.__cause__, KeyError) and "'one'" in str(e)


def raising(error, slow=0.0):
    "A reward that raises, and what it was called with."
    calls = []
    def judge(prompts, completions, **columns):
        calls.append(len(completions))
        time.sleep(slow)
        raise error
    return judge, calls


class OddBase(BaseException): pass


class Unwritable(Exception):
    def __str__(self): raise SystemExit("no text")


def test_a_keyboard_interrupt_is_the_users(timeout):
    with pytest.raises(KeyboardInterrupt): call(raising(KeyboardInterrupt())[0], timeout=timeout)


@pytest.mark.parametrize("kind, words", [
    (SystemExit(3), "SystemExit: 3"), (OddBase("odd base"), "OddBase: odd base"), (StopIteration(), "StopIteration"),
    (Unwritable(), "whose str() raises SystemExit"), (ValueError("x" * 2_000_000), "2,000,000 characters"),
    (ValueError("red \x1b[31m and \u202e"), "red [U+001B][31m and [U+202E]"), (RecursionError("deep"), "deep"),
], ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "")
def test_whatever_is_raised_names_reward_file_and_line(kind, words, timeout):
    e = error(raising(kind)[0], timeout=timeout)
    assert words in str(e) and "reward 'judge'" in str(e) and f"{__file__}:" in str(e) and " in judge" in str(e)
    assert len(str(e)) < 2000 and e.__cause__ is kind


@pytest.mark.parametrize("kind", [SystemExit(3), KeyboardInterrupt(), OddBase("odd"), Unwritable(), asyncio.CancelledError()],
                         ids=lambda e: type(e).__name__)
def test_an_async_reward_cannot_end_the_loop(kind, timeout):
    "TRL keeps one loop in a thread of its own: it goes on, and so does the one with a limit."
    async def judge(completions, **columns): raise kind
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    for _ in range(2):
        with pytest.raises(RewardError, match="'judge'"):
            asyncio.run_coroutine_threadsafe(guard(judge, timeout)(completions=TEXT), loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


# ---- a reward that failed is asked again at most by halves, and not where that may cost

class Answer(Exception):
    status_code = 429


@pytest.mark.parametrize("kind, slow, most", [
    (ValueError("all of them"), 0, 5), (ConnectionError("away"), 0, 1), (Answer("too many requests"), 0, 1),
    (ValueError("slow"), 0.15, 1), (SystemExit(), 0, 1),
], ids=["quick", "no network", "a service", "slow", "exit"])
def test_how_often_a_failing_reward_is_called(kind, slow, most):
    judge, calls = raising(kind, slow)
    error(judge, [f"{n}" for n in range(8)])
    assert len(calls) <= most


def test_a_sample_is_found_by_halves():
    def parse(completions, **columns):
        seen.append(len(completions))
        return [1.0] * len(completions) if "x" not in "".join(completions) else 1 / 0
    for n in (1, 2, 3, 8, 13):
        for at in range(n):
            seen, texts = [], ["ok"] * n
            texts[at] = "x"
            assert error(parse, texts).sample == at and len(seen) <= 2 + math.ceil(math.log2(n))


def test_a_variable_left_over_from_a_loop_is_not_blamed():
    def late(completions, **columns):
        for c in completions: c.strip()
        if len(completions) > 1: raise ValueError("after the loop")
        return [0.0]
    assert error(late).sample is None


def test_the_search_has_a_limit():
    "Raises on the batch, and hangs when it is asked again."
    release = threading.Event()
    def hangs(completions, **columns):
        if len(completions) == 3: raise ValueError("batch")
        release.wait(600)
        return [0.0] * len(completions)
    for timeout in (None, 0.3):
        began = time.monotonic()
        e = error(hangs, timeout=timeout)
        assert time.monotonic() - began < 300 and e.sample is None and "ValueError: batch" in str(e) and "not known" in str(e)
    release.set()


def test_timeout_from_any_thread():
    release = threading.Event()
    def waits(prompts, completions, **columns):
        for completion in completions:
            if completion == "two": release.wait(600)
        return [0] * len(completions)
    def waits_chat(prompts, completions, **columns):
        for completion in completions:
            text = completion[0]["content"]
            if text == "two": release.wait(600)
        return [0] * len(completions)
    out = []
    def work():
        out.append(error(waits, timeout=1))
        out.append(error(waits_chat, CHAT, timeout=1))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(300)
    out.append(error(waits, timeout=1))
    release.set()
    assert [e.sample for e in out] == [1, 1, 1] and all("took longer than 1 s" in str(e) and "two" in str(e) for e in out)


def test_timeout_of_an_unknown_sample():
    release = threading.Event()
    def blind(**columns):
        del columns
        release.wait(600)
    e = error(blind, timeout=1)
    release.set()
    assert e.sample is None and "not known" in str(e) and "'one'" in str(e)


def test_async_timeout_cancels():
    cancelled = []
    async def slow(prompts, completions, **columns):
        for completion in completions:
            try: await asyncio.sleep(0 if completion != "three" else 600)
            except asyncio.CancelledError:
                cancelled.append(completion)
                raise
        return [0] * len(completions)
    e = error(slow, timeout=1)
    assert e.sample == 2 and cancelled == ["three"]


def test_an_async_reward_that_blocks_is_timed_out():
    "Its loop cannot be woken: the clock is another one, the next batch gets another loop, and one that only waits shares it."
    async def blocks(prompts, completions, **columns):
        for completion in completions:
            if completion == "two": time.sleep(600)
        return [1.0] * len(completions)
    for _ in range(2):
        began = time.monotonic()
        e = error(blocks, timeout=0.3)
        assert time.monotonic() - began < 300 and e.sample == 1 and "took longer than 0.3 s" in str(e) and "in blocks" in str(e)
    assert call(returning_async([1, 2, 3]), timeout=30) == [1, 2, 3]


def test_a_time_limit_ends_a_loop_without_an_end():
    "What nobody waits for is ended at its next line, and the same thread takes calls while none hangs."
    threads = []
    def counts(prompts, completions, **columns):
        threads.append(threading.current_thread())
        while completions[0] == "endless": pass
        return [0.0] * len(completions)
    guarded = guard(counts, timeout=1)
    guarded(prompts=["?"], completions=["a"]), guarded(prompts=["?"], completions=["b"])
    with pytest.raises(RewardError, match="took longer"): guarded(prompts=["?"], completions=["endless"])
    guarded(prompts=["?"], completions=["c"])
    assert threads[0] is threads[1] is threads[2] and threads[3] is not threads[2]
    threads[2].join(120)
    assert not threads[2].is_alive() and all(t.daemon for t in threads)


def test_a_hanging_reward_does_not_keep_the_interpreter():
    "Neither a thread that hangs, nor a pool or an executor that it had opened, nor a blocked loop."
    code = """
import asyncio, time
from concurrent.futures import ThreadPoolExecutor
from grpo_nb.tasks.guard import RewardError, guard
def sleeps(completions, **columns): time.sleep(3600)
def pools(completions, **columns):
    with ThreadPoolExecutor(2) as pool: return list(pool.map(time.sleep, [3600, 3600]))
async def blocks(completions, **columns): time.sleep(3600)
async def threads(completions, **columns): await asyncio.to_thread(time.sleep, 3600)
for f in (sleeps, pools, blocks, threads):
    try:
        out = guard(f, timeout=0.3)(completions=["a", "b"])
        if asyncio.iscoroutine(out): asyncio.run(out)
    except RewardError as error: print(error.reason.partition(" for ")[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800)
    assert done.stdout.split("\n")[:4] == ["took longer than 0.3 s"] * 4, done.stderr


def test_a_question_ends_the_wait():
    "In a thread that is not the main one, and for an async reward anywhere."
    asked = threading.Event()
    def sleeps(completions, **columns): time.sleep(600)
    async def awaits(completions, **columns): await asyncio.sleep(600)
    out = []
    def work(call):
        try: call()
        except Left as left: out.append(left)
    for function in (sleeps, awaits):
        guarded = guard(function, asked=asked.is_set)
        def call(guarded=guarded):
            made = guarded(completions=TEXT)
            return asyncio.run(made) if inspect.iscoroutine(made) else made
        thread = threading.Thread(target=work, args=(call,))
        thread.start()
        while guarded.since is None and thread.is_alive(): time.sleep(0.01)
        assert guarded.since is not None and thread.is_alive()
        asked.set()
        thread.join(300)
        asked.clear()
        assert guarded.since is None
    assert len(out) == 2


def test_slow_but_in_time():
    def slow(prompts, completions, **columns):
        time.sleep(0.05)
        return [1] * len(completions)
    assert call(slow, timeout=30) == [1.0] * 3


def test_context_and_columns_reach_the_reward(timeout):
    from contextvars import ContextVar
    var = ContextVar("var", default=0)
    var.set(5)
    def reads(prompts, completions, answer, **columns): return [var.get() + a for a in answer]
    assert call(reads, timeout=timeout, answer=[1, 2, 3]) == [6, 7, 8]


class Judge:
    async def __call__(self, prompts, completions, **columns): return [0.5] * len(completions)


class Plain:
    def __call__(self, prompts, completions, **columns): return [0.5] * len(completions)


def scaled(prompts, completions, scale=1, **columns): return [scale] * len(completions)


@pytest.mark.parametrize("function, name, kind", [
    (Judge(), "Judge", True),
    (Plain(), "Plain", False),
    (functools.partial(scaled, scale=0.5), "scaled", False),
    (functools.partial(returning_async([0.5] * 3)), "fixed", True),
    (lambda completions, **k: [0.5] * 3, "<lambda>", False),
])
def test_every_kind_of_callable(function, name, kind):
    guarded = guard(function)
    assert guarded.__name__ == name == name_of(function) and inspect.iscoroutinefunction(guarded) == kind == is_async(function)
    assert call(function) == [0.5] * 3


def test_signature_and_repeats():
    assert inspect.signature(guard(failing)) == inspect.signature(failing)
    twice = guard(guard(failing, timeout=1), timeout=2)
    assert twice._guards is failing
    assert guard(failing)(["?"], ["abc"], answer=[1]) == [0.5]
    with pytest.raises(TypeError, match="no completions"): guard(failing)(["?"])


def test_models_pass():
    model = torch.nn.Linear(1, 1)
    assert guard(model) is model and guard("some/model") == "some/model"
    assert name_of("some/model") == name_of("/a/model/") == "model"


def test_rewards_of_one_name_are_told_apart():
    partials = functools.partial(scaled), functools.partial(scaled, scale=2)
    names = names_of([lambda: 1, Judge(), lambda: 2, Judge(), *partials, "a/rm", "b/rm"])
    assert names == ["<lambda>", "Judge", "<lambda>_2", "Judge_2", "scaled", "scaled_2", "rm", "rm_2"]
    def judge_2(): pass
    def judge(): pass
    assert names_of([judge, judge_2, judge]) == ["judge", "judge_2", "judge_3"]
    assert guard(scaled, name="other").__name__ == "other" and "'other'" in str(error(guard(returning([1]), name="other")))


@pytest.mark.parametrize("function, words", [
    (lambda completions, answer, **kwargs: [], ""), (lambda prompts, **kwargs: [], ""), (lambda **kwargs: [], ""),
    (len, "takes 'obj' by position"), (Judge(), ""), ("a/rm", ""), (functools.partial(scaled, scale=2), ""),
    (lambda prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric: [], ""),
    (lambda completions, solution, **kwargs: [], "needs 'solution', and the dataset has no such column"),
    (lambda completions, answers, **kwargs: [], "Did you mean 'answer'?"), (lambda completions: [], "does not take 'prompts'"),
    (Judge, "is a class; give an instance of it, such as Judge()"), (lambda completions, /, **kwargs: [], "by position"),
    (torch.nn.Linear(1, 1), ""), (torch.nn.Linear, "is a class"),
])
def test_whether_a_call_fits(function, words):
    why = why_not_called(function, ["prompt", "answer"])
    assert words in why and bool(why) == bool(words)


@pytest.mark.parametrize("bad", [0, -1, "5", True, float("nan")])
def test_timeout_is_seconds(bad):
    with pytest.raises(ValueError, match="timeout="): guard(failing, timeout=bad)


def test_not_a_reward():
    for bad in (3, None, ["f"]):
        with pytest.raises(TypeError, match="it must be a function"): guard(bad)


def test_a_sync_function_that_gives_a_coroutine():
    async def inner(): return [1]
    with pytest.raises(RewardError, match="async def"): guard(lambda completions, **k: inner())(completions=TEXT)


def test_the_error_itself():
    long = "start " + "x" * 5000 + " end"
    e = RewardError("f", 3, long, "failed")
    assert len(str(e)) < 400 and "start" in str(e) and "end" in str(e) and "5012 characters" in str(e)
    again = pickle.loads(pickle.dumps(e))
    assert str(again) == str(e) and again.sample == 3


def test_an_infinite_timeout_is_none():
    def fine(completions, **_): return [1.0] * len(completions)
    assert guard(fine, timeout=float("inf"))(completions=["a", "b"]) == [1.0, 1.0]
