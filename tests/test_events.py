"""The event bus: delivery, failures, threads, late subscribers, and `say`."""
import ast
import dataclasses
import sys
import threading
import warnings
from pathlib import Path

import pytest

from grpo_nb.ground import events
from grpo_nb.ground.events import (Bus, CompletionsLogged, Event, Notice, RunFailed, RunFinished, RunPaused, RunResumed, RunStarted, RunStopped,
                            SettingChanged, StepLogged, notices, said, say)

EXAMPLES = [RunStarted(total_steps=10), StepLogged(step=1, metrics={"reward": 0.5}), RunPaused(step=1), RunResumed(step=1),
            CompletionsLogged(prompts=["p"], completions=["c"], rewards={"f": [None]}, advantages=[0.0]), RunStopped(reason="stop"),
            RunFinished(metrics={}), RunFailed(error="ValueError: x"), Notice(message="m"), SettingChanged(name="beta", old=0.0, new=0.1)]


def test_standard_library_only():
    tree = ast.parse(Path(events.__file__).read_text(encoding="utf-8"))
    found = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and not getattr(n, "level", 0)] # `check` is of the same floor
    roots = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0] for n in found}
    assert roots <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: type(e).__name__)
def test_events_are_frozen_keyword_only_and_timed(event):
    assert isinstance(event, Event) and event.time > 1e9 and event.step in (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError): event.step = 5
    with pytest.raises(TypeError): type(event)(1)


def test_types_select_and_order_is_that_of_subscription():
    bus, seen = Bus(), []
    bus.subscribe(lambda e: seen.append(("first", type(e))), StepLogged, RunFinished)
    bus.subscribe(lambda e: seen.append(("all", type(e))))
    bus.subscribe(lambda e: seen.append(("base", type(e))), Event)
    for event in (EXAMPLES[0], EXAMPLES[1]): bus.emit(event)
    assert seen == [("all", RunStarted), ("base", RunStarted), ("first", StepLogged), ("all", StepLogged), ("base", StepLogged)]


def test_a_failing_handler_is_reported_once_and_counted():
    bus, seen = Bus(), []
    def broken(event): raise KeyError("view")
    bus.subscribe(broken); bus.subscribe(seen.append)
    with pytest.warns(RuntimeWarning, match=r"broken failed on RunPaused with KeyError: 'view'") as caught:
        for _ in range(3): bus.emit(RunPaused())
    assert bus.failures == 3 and len(seen) == 3 and len(caught) == 1


def test_a_warning_filter_that_raises_does_not_break_the_run(capsys):
    bus, seen = Bus(), []
    bus.subscribe(lambda e: 1 / 0); bus.subscribe(seen.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bus.emit(RunPaused())
    assert len(seen) == 1 and "ZeroDivisionError" in capsys.readouterr().out


def test_an_interrupt_passes_through():
    bus = Bus()
    def interrupted(event): raise KeyboardInterrupt
    bus.subscribe(interrupted)
    with pytest.raises(KeyboardInterrupt): bus.emit(RunPaused())
    assert bus.failures == 0


def test_unsubscribe_twice_and_from_within_a_handler():
    bus, seen = Bus(), []
    def once(event): seen.append(event); off()
    off = bus.subscribe(once)
    bus.emit(RunPaused()); bus.emit(RunPaused()); off(); off()
    assert len(seen) == 1


def test_the_same_handler_twice_is_two_subscriptions():
    bus, seen = Bus(), []
    off = bus.subscribe(seen.append); bus.subscribe(seen.append)
    bus.emit(RunPaused()); off(); bus.emit(RunPaused())
    assert len(seen) == 3


def test_a_handler_may_emit_and_subscribe():
    bus, seen = Bus(), []
    def chain(event): bus.subscribe(seen.append, RunFinished); bus.emit(RunFinished(metrics={}))
    bus.subscribe(chain, RunPaused)
    bus.emit(RunPaused())
    assert [type(e) for e in seen] == [RunFinished]


def test_kept_events_are_bounded_and_replayed():
    bus, seen = Bus(keep=3), []
    for step in range(10): bus.emit(StepLogged(step=step, metrics={}))
    bus.subscribe(lambda e: seen.append(e.step), StepLogged, replay=True)
    bus.emit(StepLogged(step=10, metrics={}))
    assert seen == [7, 8, 9, 10] and len(bus.kept) == 3
    assert Bus().kept == []


@pytest.mark.parametrize("arguments, word", [((None,), "handler"), ((print, "StepLogged"), "types"), ((print, int), "types")])
def test_a_wrong_subscription_names_the_argument(arguments, word):
    with pytest.raises(TypeError, match=word): Bus().subscribe(*arguments)


def test_many_threads():
    bus, counts, lock = Bus(keep=5), [0], threading.Lock()
    def count(event):
        with lock: counts[0] += 1
    bus.subscribe(count, StepLogged)
    def work():
        for _ in range(300):
            off = bus.subscribe(lambda e: None)
            bus.emit(StepLogged(metrics={})); off()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    assert counts[0] == 1800 and bus.failures == 0 and len(bus._subscriptions) == 1


def test_say_prints_and_emits_once(capsys):
    message, heard = "a sentence of test_events", []
    said.discard(message)
    off = notices.subscribe(heard.append, Notice)
    say(message); say(message); off()
    assert capsys.readouterr().out == f"grpo_nb: {message}\n" and [e.message for e in heard] == [message]
    said.discard(message)
