"""A run's folder: written as the run goes on, read in any process, listed, compared, exported."""
import csv
import gc
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from grpo_nb.advice.compare import better
from grpo_nb.ground import events
from grpo_nb.ground.events import (
    Bus,
    CompletionsLogged,
    Finding,
    Measured,
    RunFailed,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunStopped,
    SettingChanged,
    StepLogged,
)
from grpo_nb.record.export import Tracked
from grpo_nb.record.files import Lines, append, check_name, claim, folder_name, gives_signs, this_process, three_words, write_json
from grpo_nb.record.foreign import Foreign
from grpo_nb.record.record import Record
from grpo_nb.record.runs import runs
from grpo_nb.record.writer import HELD_OUT, METRICS, RUN, Writer
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model


def make(top, name, steps=3, state="finished", held=(), settings=None, reward=lambda step: step / 10, **note):
    "A run's folder by hand."
    folder = Path(top, "runs", folder_name(name))
    folder.mkdir(parents=True)
    note |= dict(name=name, state=state, total_steps=steps, started=1e9 + len(name), settings=settings or {})
    write_json(folder / RUN, note)
    for step in range(1, steps + 1): append(folder / METRICS, dict(step=step, time=1e9 + step, metrics={"reward": reward(step)}))
    for step, right, questions in held:
        row = dict(step=step, name="held-out", correct=sum(right), n=len(right), right=right, questions=questions)
        append(folder / HELD_OUT, row)
    return Record(folder)


@pytest.fixture
def said():
    "What was said, heard anew."
    before = set(events.said)
    events.said.clear()
    heard = []
    stop = events.notices.subscribe(lambda e: heard.append(e.message))
    yield heard
    stop()
    events.said.update(before)


def written(tmp_path, *told, name="a-run", **open_with):
    "A writer that was told events."
    bus, writer = Bus(), Writer()
    writer.attach(bus)
    assert writer.open(tmp_path / "runs", name, dict(id="1"), **open_with) is not None
    for event in told: bus.emit(event)
    assert bus.drain(10)
    writer.close()
    return writer, bus


# the files


def test_names_are_three_words_and_folders_are_safe():
    names = {three_words() for _ in range(50)}
    assert len(names) > 40 and all(len(n.split("-")) == 3 for n in names)
    for name in ("../../etc/passwd", "a/b\\c", "..", "CON", "nul.txt", "日本 β", "x" * 120, "😀" * 60, ". .", "a:b*c?"):
        safe = folder_name(check_name(name))
        assert safe and not set(safe) & set('/\\:*?"<>|') and safe not in (".", "..") and len(safe.encode()) <= 160, safe


@pytest.mark.parametrize("name", ["", "  ", 3, None, "a\nb", "a\x1b[2Jb", "a\u202eb", "x" * 121, "\ud800"])
def test_a_name_that_cannot_be_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match="name="): check_name(name)


def test_two_who_claim_one_name_at_once_get_two_folders(tmp_path):
    got, gate = [], threading.Barrier(8)

    def ask():
        gate.wait()
        got.append(claim(tmp_path / "runs", "same"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({f for f, _ in got}) == 8 and sorted(n for _, n in got) == ["same", *(f"same-{n}" for n in range(2, 9))]


def test_a_torn_line_costs_itself_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, {"step": 1, "v": math.inf})
    with path.open("ab") as file: file.write(b'{"step": 2, "v"')
    lines = Lines(path)
    assert [r["step"] for r in lines.read()] == [1] and lines.torn == 0 # it may be on its way
    append(path, {"step": 3})
    with path.open("ab") as file: file.write(b"\x00\xff garbage\n[1]\n")
    append(path, {"step": 4})
    assert [r["step"] for r in lines.read()] == [1, 3, 4] and lines.torn == 3 and lines.rows[0]["v"] == math.inf
    path.write_text('{"step": 9}\n')
    assert [r["step"] for r in lines.read()] == [9], "a shorter file is another one"


def test_a_line_that_is_written_in_parts_is_read_once(tmp_path):
    path, lines = tmp_path / "x.jsonl", Lines(tmp_path / "x.jsonl")
    data = b"".join(b'{"step": %d}\n' % step for step in range(200))
    with path.open("ab", buffering=0) as file:
        for at in range(0, len(data), 7):
            file.write(data[at:at + 7])
            lines.read()
    assert [r["step"] for r in lines.rows] == list(range(200)) and lines.torn == 0


def test_signs_of_life():
    me = this_process()
    assert gives_signs(me) and not gives_signs(me | {"began": 1.0}) and not gives_signs({})
    there = dict(me, host="elsewhere", beat=1000.0)
    assert gives_signs(there, 1100.0) and not gives_signs(there, 1200.0)


# what is written


def test_a_writer_writes_what_it_is_told(tmp_path):
    told = [RunStarted(total_steps=4), StepLogged(step=1, metrics={"reward": 0.5, "num_tokens": 10.0}), RunPaused(step=1),
            RunResumed(step=1), SettingChanged(step=1, name="beta", old=0.1, new=0.2),
            Finding(step=1, rule="r", severity="warning", message="m", change={"beta": 0}),
            CompletionsLogged(step=1, prompts=["p"] * 2, completions=["a", "b"], rewards={"f": [1.0, 0.0]}, advantages=[1.0, -1.0]),
            Measured(step=1, correct=3, n=4, right=[True, True, True, False], questions="q"),
            StepLogged(step=2, metrics={"reward": float("nan")}), RunFinished(step=4, metrics={"train_loss": 0.1})]
    writer, _ = written(tmp_path, *told)
    record = runs(tmp_path)["a-run"]
    assert (record.state, record.step, record.total_steps, record.id) == ("finished", 4, 4, "1")
    assert [(log["step"], log["tokens"]) for log in record.logs] == [(1, 10.0), (2, 10.0)]
    assert math.isnan(record.logs[1]["metrics"]["reward"])
    assert [m["kind"] for m in record.marks] == ["start", "pause", "resume", "change", "finished"]
    assert record.findings[0]["change"] == {"beta": 0} and record.completions.steps == [1] and writer.failures == 0
    held = record.held_out[0]
    assert (held["correct"], held["n"]) == (3, 4) and 0.3 < held["low"] < 0.75 < held["high"] < 0.96
    assert "held-out 75.0%" in repr(record) and "a-run" in record._repr_html_()


@pytest.mark.parametrize("end,state", [
    (RunStopped(step=1, reason="stop"), "stopped"), (RunFailed(step=1, error="ValueError: no"), "failed"),
    (RunFinished(step=1, metrics={}), "finished"), (RunPaused(step=1), "paused"), (None, "running")])
def test_every_state(tmp_path, end, state):
    writer = written(tmp_path, RunStarted(total_steps=2), StepLogged(step=1, metrics={}), *filter(None, [end]))[0]
    assert runs(tmp_path)[0].state == state
    writer._stop.set()
    note = json.loads((writer.folder / RUN).read_text())
    del writer
    gc.collect()
    if state in ("paused", "running"): # as if this process had been killed
        for path in tmp_path.glob(f"runs/*/{RUN}"): write_json(path, note | {"began": 1.0})
        until = time.time() + 20
        while runs(tmp_path)[0].state != "killed" and time.time() < until: gc.collect() or time.sleep(0.05) # its threads end
        assert runs(tmp_path)[0].state == "killed"
    if state == "failed": assert runs(tmp_path)[0].error == "ValueError: no"


def test_what_a_run_does_again_takes_the_place_of_what_it_had_done(tmp_path):
    def logs(*steps): return [StepLogged(step=s, metrics={"v": float(s)}) for s in steps]

    def completed(step, text):
        return CompletionsLogged(step=step, prompts=["p"] * 2, completions=[text] * 2, rewards={}, advantages=[0, 0])

    writer, _ = written(tmp_path, RunStarted(total_steps=9), *logs(1, 2, 3, 4), completed(3, "old"), completed(4, "gone"))
    again, _ = written(tmp_path, RunStarted(step=2, total_steps=9), *logs(3), completed(3, "new"), folder=writer.folder)
    record = runs(tmp_path)["a-run"]
    assert len(runs(tmp_path)) == 1 and [log["step"] for log in record.logs] == [1, 2, 3] and record.step == 3
    assert [m["text"] for m in record.marks] == ["started", "goes on from step 2"]
    groups = record.completions.groups(3)
    assert record.completions.steps == [3] and [s.text for g in groups for s in g.samples] == ["new", "new"]


def test_what_was_told_before_there_was_a_folder_is_kept(tmp_path):
    bus, writer = Bus(), Writer()
    writer.attach(bus)
    bus.emit(Measured(correct=1, n=4))
    bus.drain(5)
    writer.open(tmp_path, "early", {})
    assert Record(writer.folder).held_out[0]["correct"] == 1
    writer.close()


def test_a_folder_that_cannot_be_written_costs_the_record_alone(tmp_path, said, monkeypatch):
    (tmp_path / "file").write_text("")
    assert Writer().open(tmp_path / "file" / "runs", "x", {}) is None
    assert len(said) == 1 and "cannot be recorded" in said[0] and "goes on" in said[0]
    writer, bus = written(tmp_path, RunStarted(total_steps=9))
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "write", full)
    for step in range(3): bus.emit(StepLogged(step=step, metrics={}))
    bus.drain(5)
    assert writer.failures == 3 and len(said) == 2 and "No space left" in said[1]


def test_a_folder_that_was_removed_under_a_run_is_not_made_again(tmp_path, said):
    import shutil
    writer, bus = written(tmp_path, RunStarted(total_steps=9))
    shutil.rmtree(writer.folder)
    bus.emit(StepLogged(step=1, metrics={}))
    bus.emit(RunFinished(step=1, metrics={}))
    assert bus.drain(5) and writer.failures >= 2 and len(said) == 1 and not writer.folder.exists()


KILLED = """
import os, signal, sys
from grpo_nb.ground.events import *
from grpo_nb.record.writer import Writer
bus, writer = Bus(), Writer()
writer.attach(bus)
writer.open(sys.argv[1], "theirs", {})
bus.emit(RunStarted(total_steps=9))
bus.emit(StepLogged(step=1, metrics={"reward": 1.0}))
bus.drain(20)
print("ready", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_of_another_process_is_running_and_then_killed(tmp_path):
    code = [sys.executable, "-c", KILLED, str(tmp_path / "runs")]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        while other.stdout.readline().strip() != "ready": assert other.poll() is None
        theirs = runs(tmp_path)["theirs"]
        assert theirs.state == "running"
        with pytest.raises(RuntimeError, match="'theirs' is running; stop it first"): theirs.delete(confirm=True)
        with pytest.raises(RuntimeError, match="'theirs' go on"): runs(tmp_path).delete(confirm=True)
        theirs.tag("seen").note = "while it goes on"
        other.stdin.write("\n")
        other.stdin.flush()
        other.wait(60)
    assert theirs.state == "killed" and theirs.step == 1 and theirs.tags == ["seen"]
    assert "killed at step 1" in str(theirs.verdict())
    assert theirs.delete(confirm=True) and not theirs.folder.exists()


# the list


def test_the_list_and_its_table(tmp_path):
    make(tmp_path / "out", "a", settings={"learning_rate": 1e-6, "beta": 0.0, "output_dir": "x"})
    settings = {"learning_rate": 5e-6, "beta": 0.0, "output_dir": "y"}
    make(tmp_path / "out", "bb", 5, settings=settings, held=[(0, [True] * 2 + [False] * 8, "q")])
    make(tmp_path / "more", "ccc", state="failed", settings={"beta": 0.0, "seed_of_data": 3})
    found = runs(tmp_path)
    assert found.names == ["ccc", "bb", "a"] and list(found.differing) == ["seed_of_data", "learning_rate"]
    assert found["bb"].name == found[1].name == "bb" and found[-1].name == "a" and found[:2].names == ["ccc", "bb"] and "a" in found
    assert found[["a", "ccc"]].names == ["a", "ccc"] and found.sort("reward").names == ["bb", "ccc", "a"]
    assert found.sort("name").names == ["a", "bb", "ccc"] and found.sort("learning_rate", reverse=False).names == ["a", "bb", "ccc"]
    assert found.filter(state="failed").names == ["ccc"] and found.filter(learning_rate=[1e-6, 5e-6]).names == ["bb", "a"]
    assert found.filter(lambda r: r.step > 3).names == ["bb"] and found.filter(name="?").names == ["a"]
    head, *rows = repr(found).splitlines()
    assert head.split()[:5] == ["run", "state", "steps", "reward", "held-out"] and "20.0%" in rows[1] and "note" not in head
    assert "<table>" in found._repr_html_() and "learning_rate" in found._repr_html_()
    frame = found.frame()
    assert list(frame["name"]) == found.names and frame["held_out_last"][1] == 0.2 and frame["learning_rate"][2] == 1e-6
    assert repr(runs(tmp_path / "out").filter(lambda r: False)).startswith("no runs in")


def test_what_cannot_be_found_is_said(tmp_path):
    make(tmp_path / "one", "calm-river-heron")
    make(tmp_path / "two", "calm-river-heron")
    make(tmp_path / "two", "other", settings={"beta": 0.0})
    (tmp_path / "file").write_text("")
    found = runs(tmp_path)
    with pytest.raises(NotADirectoryError, match="does not exist"): runs(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="is a file"): runs(tmp_path / "file")
    with pytest.raises(TypeError, match="folder=3"): runs(3)
    with pytest.raises(KeyError, match="Did you mean 'other'"): found["othre"]
    with pytest.raises(KeyError, match="2 runs are named 'calm-river-heron'"): found["calm-river-heron"]
    assert found["one/runs/calm-river-heron"].folder == tmp_path / "one/runs/calm-river-heron"
    with pytest.raises(TypeError, match="give a run's name"): found[None]
    with pytest.raises(TypeError, match="Did you mean 'beta'"): found.filter(bet=1)
    with pytest.raises(ValueError, match="Did you mean 'reward'"): found.sort("rewrad")
    assert len(runs([tmp_path / "one", tmp_path / "two"])) == 3 and len(runs(str(tmp_path / "two"))) == 2


def test_broken_folders_are_listed_and_never_raise(tmp_path):
    record = make(tmp_path, "fine")
    odd = '{"name": null, "settings": [], "state": 3, "started": "x", "versions": 3, "total_steps": "x", "beat": "x", "seed": {}}'
    for name, text in [("empty", ""), ("list", "[1]"), ("cut", '{"name": "cu'), ("odd", odd)]:
        (folder := tmp_path / "runs" / name).mkdir()
        (folder / RUN).write_text(text)
        (folder / METRICS).write_text('{"step": "three", "metrics": 3}\n{"metrics": {"reward": null}}\n')
        (folder / HELD_OUT).write_text('{"step": 1, "correct": 5, "n": 3}\n{"correct": "x"}\n')
    found = runs(tmp_path)
    assert len(found) == 5 and record.state == "finished" and found["cut"].state == "killed"
    for name in ("notes.json", "patches.json", "marks.jsonl", "findings.jsonl"):
        (tmp_path / "runs" / "odd" / name).write_text('{"tags": 3, "note": 4, "name": null, "step": {}, "time": "x"}\n')
    for run in found:
        repr(run), run.logs, run.held_out, run.marks, run.patches, run.verdict(), run.last(), run.updated, run.to_csv()
    repr(found), found._repr_html_(), found.frame(), found.sort("reward")


def test_tags_notes_and_names(tmp_path):
    one, two = make(tmp_path, "one"), make(tmp_path, "two")
    one.tag("good", "good", "lr").untag("lr").note = "the <b>first</b>"
    assert runs(tmp_path).filter(tag="good").names == ["one"] and "&lt;b&gt;" in runs(tmp_path)._repr_html_()
    assert one.rename("β = 0/1").name == runs(tmp_path)["β = 0/1"].name and one.folder.name == "one"
    for call, message in [(lambda: two.rename("β = 0/1"), "another run"), (lambda: two.untag("x"), "it has none"),
                          (lambda: two.tag(""), "tag="), (lambda: two.rename("a\nb"), "cannot be seen")]:
        with pytest.raises(ValueError, match=message): call()
    with pytest.raises(TypeError, match="note=3"): two.note = 3


def test_deleting_asks_and_takes_only_what_the_run_wrote(tmp_path, monkeypatch):
    written(tmp_path, RunStarted(total_steps=1), RunFinished(step=1, metrics={}), files=lambda: {"settings.yaml": "x: 1"})
    record = runs(tmp_path)[0].tag("x")
    (record.folder / "picture.png").write_bytes(b"mine")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(RuntimeError, match=r"delete\(confirm=True\) does it"): record.delete()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(RuntimeError, match="would remove"): record.delete()
    monkeypatch.setattr("grpo_nb.record.record._answer", lambda question: False)
    assert record.delete() is False and record.state == "finished"
    monkeypatch.setattr("grpo_nb.record.record._answer", lambda question: "in " + str(record.folder) in question)
    assert record.delete() and [p.name for p in record.folder.iterdir()] == ["picture.png"] and (tmp_path / "checkpoint-1").is_dir()
    assert len(runs(tmp_path)) == 0
    with pytest.raises(ValueError, match="confirm="): make(tmp_path, "x").delete(confirm="yes")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_can_be_read_and_says_that_it_cannot_be_written(tmp_path):
    record = make(tmp_path, "fixed")
    record.folder.chmod(0o500)
    try:
        assert runs(tmp_path)["fixed"].step == 3
        with pytest.raises(OSError, match="nothing can be written to"): record.tag("x")
    finally: record.folder.chmod(0o700)


# runs of others


def test_runs_of_trl_alone_open(tmp_path):
    import pandas as pd
    out = tmp_path / "theirs"
    for step in (2, 4):
        (place := out / f"checkpoint-{step}").mkdir(parents=True)
        history = [dict(step=s, reward=s / 4, num_tokens=9.0 * s, epoch=0.1) for s in range(1, step + 1)]
        history.append(dict(step=step, eval_reward=0.5))
        (place / "trainer_state.json").write_text(json.dumps(dict(global_step=step, max_steps=6, log_history=history)))
        os.utime(place / "trainer_state.json", (1e9 + step, 1e9 + step))
    (out / "completions").mkdir()
    table = pd.DataFrame(dict(step=[1] * 2, prompt=["p"] * 2, completion=["a", "b"], right=[1.0, 0.0], advantage=[1.0, -1.0]))
    table.to_parquet(out / "completions" / "completions_00001.parquet")
    (alone := tmp_path / "alone" / "completions").mkdir(parents=True)
    table.to_parquet(alone / "completions_00001.parquet")
    found = runs(tmp_path)
    assert sorted(found.names) == ["alone", "theirs"] and all(isinstance(r, Foreign) for r in found)
    theirs = found["theirs"]
    assert (theirs.state, theirs.step, theirs.last(), theirs.completions.steps) == ("stopped", 4, 1.0, [1])
    assert theirs.logs[-1]["metrics"] == {"eval_reward": 0.5} and theirs.logs[-1]["tokens"] == 36.0
    assert found["alone"].logs[0]["metrics"] == {"rewards/right/mean": 0.5, "reward": 0.5}
    assert theirs.tag("old").tags == ["old"] and runs(out).names == ["theirs"]
    with pytest.raises(RuntimeError, match="remove .* yourself"): theirs.delete(confirm=True)
    (out / "checkpoint-4" / "trainer_state.json").write_text("{cut")
    assert runs(tmp_path)["theirs"].step == 2, "a torn one is passed over for the one before"


def test_checkpoints_of_a_recorded_run_are_no_run_of_their_own(tmp_path):
    make(tmp_path, "ours", id="abc")
    for name, run in (("checkpoint-1", "abc"), ("checkpoint-2", "abc")):
        (place := tmp_path / name).mkdir()
        (place / "trainer_state.json").write_text(json.dumps(dict(global_step=1, log_history=[])))
        (place / "grpo_nb_run.json").write_text(json.dumps({"run": run}))
    (tmp_path / "trainer_state.json").write_text(json.dumps(dict(global_step=1, log_history=[])))
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "completions_00001.parquet").write_bytes(b"") # of log_completions=True
    assert runs(tmp_path).names == ["ours"]
    (place := tmp_path / "checkpoint-9").mkdir()
    (place / "trainer_state.json").write_text(json.dumps(dict(global_step=9, log_history=[])))
    assert len(runs(tmp_path)) == 2, "one that bears no run's id was made by TRL alone"


# is B better than A?


@pytest.mark.parametrize("b,questions,answer,by", [
    ([True] * 60 + [False] * 40, "q", "no", "the same questions"),
    ([True] * 75 + [False] * 25, "q", "yes", "the same questions"), # 15 won, none lost
    ([True] * 45 + [False] * 55, "q", "worse", "the same questions"),
    ([True] * 75 + [False] * 25, "other", "yes", "held-out accuracy"),
    ([True] * 66 + [False] * 34, "other", "no", "held-out accuracy"),
    ([True] * 30 + [False] * 70, "other", "worse", "held-out accuracy")])
def test_better_by_held_out_answers(tmp_path, b, questions, answer, by):
    make(tmp_path, "A", held=[(0, [True] * 10 + [False] * 90, "q"), (3, [True] * 60 + [False] * 40, "q")])
    make(tmp_path, "B", held=[(3, b, questions)], settings={"beta": 0.1})
    found = runs(tmp_path).compare("A", "B")
    assert (found.answer, found.by) == (answer, by) and found.settings == (("beta", None, 0.1),) and "another seed" in found.text
    assert (answer == "yes") == found.text.startswith("Yes") and "<table>" in found._repr_html_()
    back = runs(tmp_path).compare("B", "A")
    assert back.answer == {"yes": "worse", "worse": "yes", "no": "no"}[answer] and back.change == pytest.approx(-found.change)


def test_the_same_questions_see_what_shares_do_not(tmp_path):
    a, b = [True] * 100 + [False] * 100, [False] * 2 + [True] * 112 + [False] * 86
    make(tmp_path, "A", held=[(3, a, "q")])
    make(tmp_path, "B", held=[(3, b, "q")])
    make(tmp_path, "C", held=[(3, b, "other")])
    found = runs(tmp_path)
    assert found.compare("A", "B").answer == "yes" and found.compare("A", "B").p < 0.01 and found.compare("A", "C").answer == "no"


@pytest.mark.parametrize("shift,answer", [(0.0, "no"), (0.5, "yes"), (-0.5, "worse")])
def test_without_a_held_out_set_the_reward_is_a_weak_witness(tmp_path, shift, answer):
    make(tmp_path, "A", 60, reward=lambda s: 0.5 + 0.1 * (s * 7 % 5))
    make(tmp_path, "B", 60, reward=lambda s: 0.5 + shift + 0.1 * (s * 3 % 5))
    found = runs(tmp_path).compare("A", "B")
    assert found.answer == answer and found.by == "training reward" and "held-out set to know more" in found.text


def test_what_cannot_be_compared_is_said(tmp_path):
    make(tmp_path, "A", 60, settings={"reward.right": 1.0})
    make(tmp_path, "B", 60, settings={"reward.right": 2.0})
    make(tmp_path, "C", 3, settings={"reward.right": 1.0})
    found = runs(tmp_path)
    assert found.compare("A", "B").answer == "not known" and "rewards differ" in found.compare("A", "B").text
    assert "fewer than 10 logs" in found.compare("A", "C").text
    with pytest.raises(ValueError, match="name two"): found.compare()
    with pytest.raises(ValueError, match="is one run"): found.compare("A", "A")
    with pytest.raises(TypeError, match="is no run"): better(found["A"], 3)
    assert found[["B", "A"]].compare().a == "A", "of two, the older one is the first"


# export


def test_csv_has_every_metric_in_full(tmp_path):
    one = make(tmp_path, "one", reward=lambda s: s / 3)
    append(one.folder / METRICS, dict(step=3, time=None, metrics={"eval_reward": 0.25, 'odd, "name"': 1.0, "step": 9.0}))
    make(tmp_path, "two", 1)
    rows = list(csv.DictReader(io.StringIO(one.to_csv())))
    assert float(rows[0]["reward"]) == 1 / 3 and rows[3]["eval_reward"] == "0.25" and rows[3]['odd, "name"'] == "1.0"
    assert rows[3]["step"] == "3" and rows[3]["metric step"] == "9.0"
    assert float(rows[1]["seconds"]) == float(rows[1]["time"]) - one.started and rows[3]["seconds"] == ""
    path = runs(tmp_path).to_csv(tmp_path / "all.csv")
    assert sorted(r["run"] for r in csv.DictReader(path.open())) == ["one"] * 4 + ["two"]


class Trackio:
    "As much of trackio as is used, with the names of its version 0.43."
    def __init__(self, folder): self.TRACKIO_DIR, self.kept, self.SQLiteStorage, self.now = folder, {}, self, []

    class Run:
        def __init__(self, kept): self.kept = kept
        def log(self, metrics, step): self.kept["logs"].append(dict(metrics, step=step, timestamp="2026-11-27T20:00:00+00:00"))
        def finish(self): self.kept["finished"] = True

    def init(self, project, name, config, embed, auto_log_gpu, auto_log_cpu, private=None):
        return self.Run(self.kept.setdefault((project, name), dict(logs=[], config=config)))

    def Api(self): return self

    def runs(self, project):
        from types import SimpleNamespace
        if not any(p == project for p, _ in self.kept): raise ValueError(f"Project '{project}' does not exist")
        return [SimpleNamespace(name=n, id=n, config=kept["config"]) for (p, n), kept in self.kept.items() if p == project]

    def get_logs(self, project, run, run_id=None): return self.kept[project, run]["logs"]


def test_trackio_takes_a_run_and_gives_it_back(tmp_path, monkeypatch):
    trackio = Trackio(tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    one = make(tmp_path, "one", settings={"max_steps": 3, "beta": 0.1}, held=[(3, [True, True, False, False], "q")])
    assert one.to_trackio("p") == "one" and trackio.kept["p", "one"]["finished"]
    with pytest.raises(ValueError, match="has a run named 'one'"): one.to_trackio("p")
    live = [{"step": 0, "profiling/x": 1.0}, {"step": 5, "train/global_step": 2, "train/reward": 0.5},
            {"step": 6, "train/global_step": 2, "eval/reward": 0.25}]
    trackio.kept["p", "live"] = dict(config={}, logs=live)
    back = runs(trackio="p")
    assert all(isinstance(r, Tracked) for r in back) and back["one"].settings == {"max_steps": 3, "beta": 0.1}
    last = back["one"].logs[2]["metrics"]
    assert back["one"].state == "finished" and last == {"reward": 0.3, "minutes": 2 / 60, "held_out/accuracy": 0.5}
    assert [(log["step"], log["metrics"]) for log in back["live"].logs][1] == (2, {"reward": 0.5, "eval_reward": 0.25})
    assert "one" in repr(back) and back._repr_html_() and len(runs(tmp_path, trackio="p")) == 3
    with pytest.raises(ValueError, match="no project 'q'"): runs(trackio="q")
    with pytest.raises(RuntimeError, match="kept by trackio"): back[0].tag("x")
    with pytest.raises(ValueError, match="logged nothing"): make(tmp_path, "empty", 0).to_trackio("p")


def test_without_trackio_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="pip install trackio"): make(tmp_path, "one").to_trackio("p")
    with pytest.raises(ImportError, match="pip install trackio"): runs(trackio="p")


# a real run


@pytest.fixture(scope="module")
def parts():
    task = get("sort_digits", n_train=64, n_test=8)
    return task, *tiny_model(task, steps=0, hidden_size=64, layers=1)


def longest(completions, log_metric=None, **kwargs):
    "A reward that logs a metric of its own."
    lengths = [len(c[-1]["content"]) for c in completions]
    if log_metric: log_metric("mine/longest", max(lengths))
    return [n / 10 for n in lengths]


def run_of(parts, out, more=None, **kwargs):
    from grpo_nb import GRPORun
    task, model, tokenizer = parts
    config = dict(output_dir=str(out), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=3,
                  gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, report_to="none") | (more or {})
    return GRPORun(model, tokenizer, longest, task.train, config, **kwargs)


def test_a_run_writes_all_of_it(parts, tmp_path):
    task = parts[0]
    more = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4, learning_rate=3e-6, seed=7)
    run = run_of(parts, tmp_path, more, eval_dataset=task.test.select(range(4)), name="first, β=0")
    heard = []
    run.events.subscribe(lambda e: heard.extend(e.metrics), StepLogged)
    assert run.record is None
    run.start(background=False)
    record = runs(tmp_path)["first, β=0"]
    assert (record.state, record.step, record.seed, record.folder) == ("finished", 2, 7, run.record.folder)
    assert record.settings["learning_rate"] == 3e-6 and record.settings["reward.longest"] == 1.0 and "torch" in record.versions
    logged = {name for log in record.logs for name in log["metrics"]}
    assert {"reward", "mine/longest", "eval_reward", "eval_mine/longest"} <= logged <= set(heard)
    assert [(a["step"], a["metrics"]) for a in record.logs] == [(b["step"], b["metrics"]) for b in run.logs]
    assert [log["tokens"] for log in record.logs][0] > 0 and record.logs[0]["time"] < record.logs[-1]["time"]
    assert record.completions.steps[0] == 1 and "def longest" in record.text("grpo_rewards.py") and record.patches
    from grpo_nb.recipe.trl import read
    assert read(record.folder / "settings.yaml").config["learning_rate"] == 3e-6
    again = run_of(parts, tmp_path, name="first, β=0").start(background=False)
    assert again.name == "first, β=0-2" and sorted(runs(tmp_path).names) == ["first, β=0", "first, β=0-2"]


def test_a_run_goes_on_in_its_own_folder(parts, tmp_path, said):
    first = run_of(parts, tmp_path, dict(max_steps=3, save_strategy="steps", save_steps=2)).start(background=False)
    import shutil
    shutil.rmtree(tmp_path / "checkpoint-3") # as if it had been killed before its last one
    again = run_of(parts, tmp_path, dict(max_steps=4, save_strategy="steps", save_steps=2)).start(resume=True, background=False)
    (record,) = runs(tmp_path)
    assert again.name == first.name == record.name and any("goes on in the record" in s for s in said)
    assert [log["step"] for log in record.logs] == [1, 2, 3, 4] == [log["step"] for log in again.logs]
    assert [m["text"] for m in record.marks if m["kind"] == "start"] == ["started", "goes on from step 2"]
    assert len(record.completions.groups(3)) == 1


def test_a_run_that_was_stopped_goes_on_in_one_process(parts, tmp_path):
    run = run_of(parts, tmp_path, dict(max_steps=4, save_strategy="steps", save_steps=1), name="one")
    stopped = []
    run.events.subscribe(lambda e: stopped.append(run.stop()) if e.step == 2 and not stopped else None, StepLogged)
    run.start(background=False)
    assert run.record.state == "stopped" and run.record.step == 2
    run.start(resume=True, background=False)
    (record,) = runs(tmp_path)
    assert record.state == "finished" and [log["step"] for log in record.logs] == [1, 2, 3, 4] == record.completions.steps
    ends = [m["kind"] for m in record.marks if m["kind"] in ("start", "stopped", "finished")]
    assert ends == ["start", "stopped", "start", "finished"]


def test_a_run_is_kept_where_it_is_asked_to_be_or_nowhere(parts, tmp_path):
    run_of(parts, tmp_path / "out", dict(max_steps=1), record=tmp_path / "all", name="a").start(background=False)
    assert runs(tmp_path).names == ["a"] and (tmp_path / "all" / "a").is_dir()
    quiet = run_of(parts, tmp_path / "quiet", dict(max_steps=1), record=False).start(background=False)
    assert quiet.record is None and not (tmp_path / "quiet" / "runs").exists() and len(quiet.logs) == 1
    (tmp_path / "file").write_text("")
    blocked = run_of(parts, tmp_path / "b", dict(max_steps=1), record=tmp_path / "file").start(background=False)
    assert blocked.state == "finished" and blocked.record is None
    with pytest.raises(TypeError, match="record=3"): run_of(parts, tmp_path, record=3)
    with pytest.raises(ValueError, match="name="): run_of(parts, tmp_path, name="a\nb")


def test_a_failed_run_is_kept(parts, tmp_path):
    from grpo_nb import GRPORun
    task, model, tokenizer = parts
    def broken(completions, **kwargs): raise ZeroDivisionError("here")
    run = GRPORun(model, tokenizer, broken, task.train, run_of(parts, tmp_path).trainer.args, name="broken")
    with pytest.raises(RuntimeError): run.start(background=False)
    record = runs(tmp_path)["broken"]
    assert record.state == "failed" and "ZeroDivisionError" in record.error and record.verdict().answer == "failed"


def test_held_out_answers_are_kept_with_their_questions(parts, tmp_path):
    from grpo_nb.advice.live import watch
    run = run_of(parts, tmp_path, dict(max_steps=1), name="measured")
    watcher = watch(run, parts[0].test)
    run.start(background=False)
    watcher.measure()
    run.events.drain(5)
    first, last = run.record.held_out
    assert (first["step"], last["step"]) == (0, 1) and first["questions"] == last["questions"]
    assert len(last["right"]) == last["n"] == 8


def test_a_run_that_is_let_go_of_frees_what_it_held(tmp_path):
    task = get("sort_digits", n_train=64, n_test=8)
    def gone(end):
        run = run_of((task, *tiny_model(task, steps=0, hidden_size=64, layers=1)), tmp_path, dict(max_steps=1))
        if end != "ready": run.start(background=end == "background").wait()
        record = run.record
        if record: record.logs, record.completions
        trainer = run.trainer
        held = dict(run=run, trainer=trainer, model=trainer.model, optimizer=trainer.optimizer, writer=run._writer)
        return {name: weakref.ref(value) for name, value in held.items() if value is not None}
    for end in ("ready", "foreground", "background"):
        found = gone(end)
        until = time.time() + 20
        while time.time() < until and any(r() is not None for r in found.values()): gc.collect() or time.sleep(0.05)
        assert not [name for name, r in found.items() if r() is not None], end


def test_a_list_of_runs_needs_no_trainer():
    "Whoever looks at yesterday's runs does not wait for TRL."
    code = "import sys, grpo_nb; grpo_nb.runs; raise SystemExit(any(name in sys.modules for name in ('trl', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
