"""A run in processes of its own: what goes along, what is said of an end, and whole runs whose processes are killed (slow)."""
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs_made import make_run, write_completions

from grpo_nb.ground import events
from grpo_nb.launch import channel, launcher, parcel, ranks
from grpo_nb.launch.channel import place
from grpo_nb.launch.watched import RunLost, how_many
from grpo_nb.record.files import append, lives, read_json, this_process, write_json
from grpo_nb.record.runs import runs
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model

TASK = get("sort_digits", n_train=64, n_test=8)
slow = pytest.mark.slow
PATIENCE = 500 # seconds; a busy machine needs two minutes to start the processes


def digits(completions, **kwargs): return [sum(ch.isdigit() for ch in c[-1]["content"]) / 10 for c in completions]


def divides(completions, **kwargs):
    return [1 / len(kwargs["answer"][0][:0]) for _ in completions]


def napping(completions, **kwargs):
    time.sleep(0.15)
    return digits(completions)


@pytest.fixture(scope="module")
def parts(): return tiny_model(TASK, steps=0, hidden_size=64, layers=1)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    "A test that fails leaves no processes."
    yield
    for plan in tmp_path.glob("**/launch/plan.json"):
        note = read_json(plan).get("launcher", {})
        ours = lives(note) and "grpo_nb.launch.launcher" in psutil.Process(note["pid"]).cmdline()
        if ours: os.kill(note["pid"], signal.SIGTERM)


def make(parts, folder, rewards=digits, processes=2, run=None, **more):
    config = dict(output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
                  use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    return GRPORun(*parts, rewards, TASK.train, config | more, processes=processes, **(run or {}))


def until(true, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


# ---- what is refused before anything is started

@pytest.mark.parametrize("change, kind, words", [
    (dict(processes="all"), ValueError, ["processes='all'", "'auto'"]),
    (dict(processes=0), ValueError, ["processes"]),
    (dict(processes=1.5), ValueError, ["processes=1.5"]),
    (dict(run=dict(record=False)), ValueError, ["record=False", "folder"]),
    (dict(run=dict(nam="x")), TypeError, ["'name'"]),
    (dict(learning_rat=1), TypeError, ["learning_rat", "learning_rate"]),
    (dict(rewards=lambda completions, solution: []), ValueError, ["'solution'", "'answer'"]),
])
def test_refused(parts, tmp_path, change, kind, words):
    with pytest.raises(kind) as found: make(parts, tmp_path, **change)
    assert all(word in str(found.value) for word in words), str(found.value)
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert how_many("auto") == how_many(2) == 2 and how_many(1) == 1
    with pytest.raises(ValueError, match="processes=3: this machine has 2 GPUs"): how_many(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    server = dict(use_vllm=True, vllm_mode="server")
    assert how_many("auto", server) == 1 and how_many(2, {**server, "vllm_server_base_url": "http://10.0.0.7:8000"}) == 2
    with pytest.raises(ValueError, match="this machine has 2 GPUs, and vLLM's server at 0.0.0.0 needs one"): how_many(2, server)


def test_what_cannot_go_along_is_named(parts, tmp_path):
    numbers = (n / 10 for n in range(100))
    def drawn(completions, **kwargs): return [next(numbers) for _ in completions]
    run = make(parts, tmp_path, drawn)
    with pytest.raises(TypeError, match="rewards cannot go along.*generator"): run.start(background=True)
    assert run.state == "ready" and not list(tmp_path.glob("runs/*"))


# ---- what goes along

@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_comes_back_as_it_went(tmp_path, adapter):
    model, tokenizer = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    if adapter:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model.to(torch.bfloat16), lora)
    parcel.pack(tmp_path, dict(model=model, tokenizer=tokenizer, rewards=[digits], dataset=TASK.train, config=None))
    found = parcel.unpack(tmp_path)["model"]
    there, here = dict(found.named_parameters()), dict(model.named_parameters())
    assert list(there) == list(here)
    for name, p in here.items():
        q = there[name]
        assert torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad == q.requires_grad, name


def test_a_configuration_object_gives_what_it_changes(tmp_path):
    from trl import GRPOConfig
    own = dict(learning_rate=3e-4, per_device_train_batch_size=8, num_generations=4, bf16=False, use_cpu=True)
    given = GRPOConfig(output_dir=str(tmp_path), **own)
    kind, fields = parcel.config_given(given)
    assert kind is GRPOConfig and fields["learning_rate"] == 3e-4 and "generation_batch_size" not in fields
    assert parcel.config_made((kind, fields)).generation_batch_size == given.generation_batch_size


# ---- what is said

def sign(rank, step=3, doing="step 4", seconds=60.0, beat=100.0, **more):
    return {**this_process(), **dict(rank=rank, step=step, doing=doing, seconds=seconds, beat=beat), **more}


@pytest.mark.parametrize("other, words", [
    ([], "never came"), ([sign(1, beat=60.0)], "no sign for 41 s"), ([sign(1, step=2)], "at step 4"),
    ([sign(1, doing="reward 'judge'")], "reward 'judge', since 60 s"), ([sign(1, pid=2 ** 22 + 1)], "gone"), ([sign(1)], ""),
])
def test_who_is_missing(other, words):
    found = ranks.missing([sign(0), *other], 2, now=101)
    assert words in found and bool(words) == found.startswith("process 1 of 2")


@pytest.mark.parametrize("codes, notes, rank, words", [
    ({0: 1, 1: -9}, {0: "RuntimeError: [gloo] Connection closed by peer"}, 1, "process 1 of 2 was killed by SIGKILL"),
    ({0: 1}, {0: "RuntimeError: [gloo] Connection closed by peer"}, 0, "process 1 of 2 is missing"),
    ({0: -15, 1: 1}, {1: "in step 3: RewardError: reward 'f' raised"}, 1, "reward 'f'"),
    ({0: -6}, {}, 0, "NCCL"), ({1: 3}, {}, 1, "status 3"),
])
def test_what_ended_it(tmp_path, codes, notes, rank, words):
    place(tmp_path).mkdir()
    write_json(place(tmp_path, "plan.json"), dict(output_dir=str(tmp_path), processes=2, first=0))
    for one, text in notes.items():
        note = dict(rank=one, text=text, time=1.0, missing="process 1 of 2 is missing: it is gone")
        write_json(place(tmp_path, f"failed-{one}.json"), note)
    end = launcher.told(tmp_path, codes, 2)
    assert end["rank"] == rank and words in end["error"], end
    (tmp_path / "checkpoint-4").mkdir()
    assert words == "reward 'f'" or "checkpoint-4" in launcher.told(tmp_path, codes, 2)["error"]


@pytest.mark.parametrize("text, is_one", [
    ("RuntimeError: Application timeout caused pair closure", True),
    ("RuntimeError: [gloo/transport] Connection closed by peer", True),
    ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", True), ("RewardError: reward 'f' raised TimeoutError", False),
    ("OutOfMemoryError: CUDA out of memory", False),
])
def test_errors_of_collectives(text, is_one): assert ranks.of_a_collective(text) is is_one


def test_processes_that_disagree():
    assert ranks.differ([dict(a=1, b=[2])] * 3) == ""
    assert ranks.differ([dict(a=1), dict(a=1), dict(a=2)]) == "a is 1 in process 0 and 2 in process 2"


def test_one_card_of_two(monkeypatch, tmp_path):
    "A kernel on a machine with two GPUs: the run trains on one, and says so, where TRL refuses."
    from trl import GRPOConfig
    from grpo_nb.run.inputs import make_config
    monkeypatch.setattr(GRPOConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 2)))
    given = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    given._n_gpu = 2
    assert make_config(given).n_gpu == 1
    assert any('processes="auto"' in e.message for e in events.notices.kept)


def test_each_process_has_the_gpu_of_its_rank(monkeypatch):
    "Where a model is loaded before the trainer is made, as a script under torchrun does."
    from grpo_nb.models.device import target_device
    for name, value in dict(is_available=True, current_device=0, device_count=2).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert str(target_device()) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(target_device()) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert str(target_device()) == "cuda:1" # as somebody has said


# ---- the view, of a folder that a run might have written

@pytest.fixture
def watched(tmp_path):
    "A run of two processes that another kernel has started, in its third step, and its folder."
    folder = make_run(tmp_path / "runs", "calm-river-heron", steps=3, total=9, state="running", alive=True, completions=("a", "bc"))
    place(folder).mkdir()
    note = read_json(folder / "run.json")
    launcher = {name: note[name] for name in ("pid", "began", "host")}
    write_json(place(folder, "plan.json"), dict(processes=2, output_dir=str(tmp_path), since=0.0, first=0.0, launcher=launcher))
    write_json(place(folder, "status.json"), dict(state="running", step=3, total_steps=9, settings=dict(beta=0.0)))
    return runs(tmp_path)["calm-river-heron"].watch(), folder


def test_a_run_that_is_found_is_watched(watched):
    "Charts and completions take it for a run; its end is told last."
    from grpo_nb.ui.charts.charts import LiveCharts
    from grpo_nb.ui.completions.completions import CompletionBrowser
    (run, folder), told = watched, []
    run.events.subscribe(lambda e: told.append((type(e).__name__, e.step)))
    charts, browser = LiveCharts(("reward", "kl"), mode="static").attach(run), CompletionBrowser().attach(run)
    assert (run.state, run.step, run.total_steps, len(run.logs), run.settings) == ("running", 3, 9, 3, {"beta": 0.0})
    append(folder / "metrics.jsonl", dict(step=4, time=5.0, metrics=dict(reward=0.75)))
    write_completions(folder, 4, ("x", "yz"), {"correctness": 1.0})
    changed = events.SettingChanged(step=4, name="beta", old=0.0, new=0.1)
    append(place(folder, "events.jsonl"), channel.as_row(changed))
    until(lambda: browser.store.steps == [4] and ("SettingChanged", 4) in told, 20)
    assert run.step == 4 and run.history[-1] == dict(step=4, name="reward", value=0.75)
    assert [s.rewards for s in browser.store.groups(4)[0].samples] == [{"correctness": 0.0}, {"correctness": 1.0}]
    assert len(charts) == 4, len(charts)
    run.events.emit(events.Finding(step=4, rule="flat", severity="info", message="nothing moves")) # of a watcher in this kernel
    assert runs(folder.parent)[0].findings[-1]["rule"] == "flat"
    append(folder / "metrics.jsonl", dict(step=5, time=6.0, metrics=dict(reward=0.8)))
    end = events.RunFailed(step=5, error="process 1 of 2 was killed by SIGKILL")
    write_json(place(folder, "ended.json"), {**channel.as_row(end), "rank": 1})
    with pytest.raises(RunLost, match="process 1 of 2 was killed"): run.wait(20)
    assert told[-2:] == [("StepLogged", 5), ("RunFailed", 5)] and run.state == "failed"
    with pytest.raises(RuntimeError, match="already failed"): run.pause()


def test_wishes_are_answered(watched):
    run, folder = watched
    wishes, seen, over = channel.Wishes(folder), [], threading.Event()

    def worker():
        while not over.wait(0.02):
            for wish in wishes.new():
                seen.append((wish["do"], wish["given"]))
                error = ValueError("beta=-1.0 must be 0 or more.") if wish["given"].get("beta") == -1.0 else None
                channel.answer(folder, wish["id"], error)

    threading.Thread(target=worker, daemon=True).start()
    try:
        assert run.pause() is run and run.change(reward_weights={digits: 2.0}) is run
        with pytest.raises(ValueError, match="beta=-1.0 must be"): run.change(beta=-1.0)
    finally: over.set()
    assert seen == [("pause", {}), ("change", {"reward_weights": {"digits": 2.0}}), ("change", {"beta": -1.0})]


def test_a_run_of_a_kernel_is_no_run_to_steer(tmp_path):
    make_run(tmp_path, "calm", steps=3)
    with pytest.raises(RuntimeError, match="no processes of its own"): runs(tmp_path)[0].watch()


def test_what_it_wrote_is_deleted(watched):
    run, folder = watched
    write_json(place(folder, "ended.json"), channel.as_row(events.RunFinished(step=3, metrics={})))
    run.wait(20)
    note = read_json(folder / "run.json")
    write_json(folder / "run.json", {**note, "state": "finished"})
    assert runs(folder.parent)[0].delete(confirm=True) and not folder.exists()


# ---- whole runs

@slow
def test_a_run_in_two_processes(parts, tmp_path):
    "Watched, paused, changed, saved, found again, stopped and taken up; then the weights come back."
    run, seen = make(parts, tmp_path, napping, max_steps=400), []
    run.events.subscribe(lambda e: seen.append((type(e).__name__, e.step)))
    run.start(background=True)
    until(lambda: run.step >= 2)
    with pytest.raises(TypeError, match="Did you mean 'learning_rate'"): run.change(learning_rat=1)
    with pytest.raises(ValueError, match="learning_rate"): run.change(learning_rate=-1)
    assert run.change(learning_rate=1e-3, reward_weights={napping: 2.0}) is run
    run.pause()
    until(lambda: run.state == "paused")
    assert run.settings["learning_rate"] == 1e-3 and run.settings["reward_weights"] == {"napping": 2.0}
    [record] = runs(tmp_path)
    assert record.state == "paused" and record.name == run.name
    other = record.watch() # as another kernel finds it
    assert other.state == "paused" and other.step == run.step and other.logs == run.logs
    other.resume()
    until(lambda: run.state == "running")
    until(lambda: other.logs[-1]["step"] > record.step - 1)
    other.stop()
    run.wait(PATIENCE)
    assert run.state == "stopped" and Path(run.checkpoint).name == f"checkpoint-{run.step}"
    until(lambda: other.state == "stopped")
    kinds = [kind for kind, _ in seen]
    assert kinds.count("SettingChanged") == 2
    assert {"RunStarted", "RunPaused", "RunResumed", "RunStopped", "CompletionsLogged"} <= set(kinds)
    assert [step for kind, step in seen if kind == "StepLogged"] == list(range(1, run.step + 1))
    assert len(run.record.completions.groups(run.step)) == 2 # a prompt a process
    at = run.step
    with pytest.raises(RuntimeError, match="already been stopped"): run.start()
    with pytest.raises(RuntimeError, match="already been stopped"): run.pause()
    run.start(resume=True, background=True)
    until(lambda: run.step > at)
    run.kill()
    with pytest.raises(RunLost, match="ended from outside.*SIGTERM.*checkpoint-"): run.wait(PATIENCE)
    assert [log["step"] for log in run.logs] == list(range(1, run.logs[-1]["step"] + 1))


@slow
def test_one_process_trains_as_the_kernel_does(tmp_path):
    "The same numbers, and the trained weights come back."
    def model(): return tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    away = make(model(), tmp_path / "away", processes=1)
    away.start(background=False)
    own = model()
    here = make(own, tmp_path / "here", processes=None)
    here.start(background=False)
    skip = "time", "second", "memory", "flos", "train_loss"
    def table(run): return {(h["step"], h["name"]): h["value"] for h in run.history if not any(s in h["name"] for s in skip)}
    assert table(away) == table(here)
    back = model()
    away.load_into(back[0])
    for (n, p), q in zip(own[0].named_parameters(), back[0].parameters()): assert torch.equal(p, q), n


@slow
def test_an_error_in_a_reward_comes_back(parts, tmp_path):
    run = make(parts, tmp_path, divides)
    with pytest.raises(Exception, match="divides") as found: run.start(background=False)
    assert type(found.value).__name__ == "RewardError" and isinstance(found.value.__cause__, ZeroDivisionError)
    assert "test_launch.py:" in str(found.value) and "in divides" in str(found.value)
    assert "1 / len(kwargs" in "".join(found.value.__notes__)
    assert run.state == "failed" and run.record.state == "failed" and "divides" in run.record.error


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(parts, tmp_path, rank):
    run = make(parts, tmp_path, napping, max_steps=400)
    run.start(background=True)
    until(lambda: run.step >= 3)
    os.kill(read_json(place(run.folder, "ranks", f"{rank}.json"))["pid"], signal.SIGKILL)
    with pytest.raises(RunLost, match=f"process {rank} of 2 was killed by SIGKILL"): run.wait(PATIENCE)
    assert run.state == run.record.state == "failed" and Path(run.checkpoint).name in str(run.error)
    from grpo_nb.run.checkpoints import why_not_whole
    assert why_not_whole(run.checkpoint) is None
    assert not [s for s in ranks.signs_in(run.folder) if not ranks.is_gone(s)]


@slow
def test_a_process_that_hangs_is_named(parts, tmp_path):
    "The time-out of a collective says who was waited for."
    run = make(parts, tmp_path, napping, max_steps=400, ddp_timeout=20)
    run.start(background=True)
    until(lambda: run.step >= 2)
    os.kill(read_json(place(run.folder, "ranks", "1.json"))["pid"], signal.SIGSTOP)
    with pytest.raises(Exception, match="process 1 of 2 is missing: it has given no sign"): run.wait(PATIENCE)
    assert run.state == "failed" and "Process 0 waited for it" in str(run.record.error)
    assert not [s for s in ranks.signs_in(run.folder) if not ranks.is_gone(s)]


@slow
def test_it_goes_on_in_another_number_of_processes(parts, tmp_path):
    "Two processes, then one, then two again: the same prompts in the same order, and it is said what begins anew."
    def prompts(run):
        found = run.record.completions
        return {step: sorted({json.dumps(g.prompt) for g in found.groups(step)}) for step in found.steps}
    whole = make(parts, tmp_path / "whole", max_steps=6).start(background=False)
    for steps, processes, rows in ((2, 2, 4), (4, 1, 8), (6, 2, 4)):
        run = make(parts, tmp_path / "parts", max_steps=steps, processes=processes, per_device_train_batch_size=rows,
                   lr_scheduler_type="constant")
        said = []
        run.events.subscribe(lambda e: said.append(e.message), events.Notice)
        run.start(resume=steps > 2, background=False)
        assert run.state == "finished" and run.step == steps
        for step in (steps - 1, steps): assert prompts(run)[step] == prompts(whole)[step], step
        assert any("random numbers of sampling begin anew" in message for message in said) == (steps > 2), said


@slow
def test_groups_that_do_not_fit_the_processes(parts, tmp_path):
    "Six rows of four generations, unpatched: TRL's own sentence, before the first step and in both processes."
    from grpo_nb.trainers.patch import applied
    assert not applied
    run = make(parts, tmp_path, per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="num_generations"): run.start(background=False)
    assert run.state == "failed" and not list(tmp_path.glob("checkpoint-*"))


@slow
@pytest.mark.timeout(3600)
def test_twenty_kills():
    from launch_kills import main
    assert main(["--kills", "20", "--jobs", str(max(os.cpu_count() // 4, 1))]) == 0
