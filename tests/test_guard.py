"""What a guarded reward lets through, and what each failure names."""
import asyncio
import functools
import inspect
import math
import pickle
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo_nb.tasks.guard import RewardError, guard, is_async, name_of

CHAT = [[{"role": "assistant", "content": text}] for text in ("one", "two", "three")]
TEXT = ["one", "two", "three"]


def returning(values):
    def fixed(prompts, completions, **columns): return values
    return fixed


def returning_async(values):
    async def fixed(prompts, completions, **columns): return values
    return fixed


def call(function, completions=TEXT, timeout=None, **columns):
    guarded = guard(function, timeout)
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
    [Fraction(1, 2), Decimal("0.5"), 0], range(3), [None] * 3, [3.4e38, -3.4e38, 0],
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_good_values(values, make, timeout):
    checked = call(make(values), timeout=timeout)
    assert all(v is None or type(v) is float for v in checked)
    assert checked == [None if v is None else float(v) for v in (values.detach() if torch.is_tensor(values) else values)]


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
    "shape 1": ([torch.zeros(1)] * 3, 0, "shape (1,)"),
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
    torch.tensor(1.0), np.float64(1), torch.zeros(3, 1), np.zeros((1, 3)), b"abc",
], ids=str)
def test_not_a_list_is_never_broadcast(values, make):
    e = error(make(values))
    assert e.sample is None and ("must return a list" in str(e) or "one dimension" in str(e))


def failing(prompts, completions, answer, log_metric=None, **columns):
    if log_metric: log_metric("seen", len(completions))
    return [1 / (len(c) - a) for c, a in zip(completions, answer)]


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
    assert error(function, answer=[3, 3, 0]).sample == 0 and "next sample raises it too" in str(error(function, answer=[3, 3, 0]))


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


def test_keyboard_interrupt_and_exit_are_not_wrapped(timeout):
    for kind in (KeyboardInterrupt, SystemExit):
        def stops(prompts, completions, **columns): raise kind
        with pytest.raises(kind): call(stops, timeout=timeout)


def test_timeout_from_any_thread():
    release = threading.Event()
    def waits(prompts, completions, **columns):
        for completion in completions:
            if completion == "two": release.wait(30)
        return [0] * len(completions)
    def waits_chat(prompts, completions, **columns):
        for completion in completions:
            text = completion[0]["content"]
            if text == "two": release.wait(30)
        return [0] * len(completions)
    out = []
    def work():
        out.append(error(waits, timeout=0.5))
        out.append(error(waits_chat, CHAT, timeout=0.5))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    out.append(error(waits, timeout=0.5))
    release.set()
    assert [e.sample for e in out] == [1, 1, 1] and all("took longer than 0.5 s" in str(e) and "two" in str(e) for e in out)


def test_timeout_of_an_unknown_sample():
    release = threading.Event()
    def blind(**columns):
        del columns
        release.wait(30)
    e = error(blind, timeout=0.5)
    release.set()
    assert e.sample is None and "not known" in str(e) and "'one'" in str(e)


def test_async_timeout_cancels():
    cancelled = []
    async def slow(prompts, completions, **columns):
        for completion in completions:
            try: await asyncio.sleep(0 if completion != "three" else 30)
            except asyncio.CancelledError:
                cancelled.append(completion)
                raise
        return [0] * len(completions)
    e = error(slow, timeout=0.5)
    assert e.sample == 2 and cancelled == ["three"]


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
