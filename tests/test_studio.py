"""The studio in every state, without a browser: starts, copies, failures, words, memory."""
import gc
import types
import weakref

import pytest
import torch

from grpo_nb import GRPORun, studio, tasks
from grpo_nb.advice.doctor import doctor
from grpo_nb.advice.live import Watcher
from grpo_nb.ground.events import Bus, Finding, RunFailed, RunStarted, RunStopped, StepLogged
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.ui.panels.panels import HyperparameterPanel
from grpo_nb.ui.parts import page
from grpo_nb.ui.parts.display import bundle_of
from grpo_nb.ui.studio.controls import RunControls, failure_html
from grpo_nb.ui.studio.first import First, free_folder, trained

torch.set_num_threads(1)
TASK = tasks.get("sort_digits", n_train=16, n_test=2)
CONFIG = dict(max_completion_length=4, per_device_train_batch_size=8, num_generations=4, max_steps=2, save_strategy="no",
              learning_rate=1e-2, gradient_checkpointing=False)


def length(completions, **kwargs): return [float(len(c[0]["content"])) for c in completions]


@pytest.fixture(scope="module")
def made(): return tiny_model(TASK, steps=0, measure=False, hidden_size=64, layers=1)


@pytest.fixture
def fresh(made, tmp_path):
    "A studio over the model as it was made."
    first = First(made[0])
    yield studio(*made, TASK.train, length, {**CONFIG, "output_dir": str(tmp_path / "run")})
    first.put_back(made[0])


def logged(run):
    return [(row["step"], row["name"], row["value"]) for row in run.history if row["name"] in ("reward", "loss", "grad_norm")]


# ---- start and go on

def test_each_start_begins_from_the_weights_that_were_given(fresh, tmp_path):
    given = {name: p.detach().clone() for name, p in trained(fresh.model).items()}
    fresh.start(background=False)
    one = fresh.run
    changed = {name: p.detach().clone() for name, p in trained(fresh.model).items()}
    assert any(not torch.equal(given[n], changed[n]) for n in given)
    fresh.start(background=False)
    assert logged(fresh.run) == logged(one), "the same seed, data and weights: the same run"
    assert [one.trainer.args.output_dir, fresh.run.trainer.args.output_dir] == [str(tmp_path / n) for n in ("run", "run-2")]
    assert (tmp_path / "run" / "trained-2").is_dir(), "what the first run has trained is kept, for no checkpoint has it"
    said = " ".join(said for _, _, said in fresh.controls.notes)
    assert "begins from the weights that were given" in said and "trained-2" in said and "run-2" in said
    before = {name: p.detach().clone() for name, p in trained(fresh.model).items()}
    fresh.controls._go_on = lambda: fresh.start(background=False, anew=False)
    fresh.controls.press("go on")
    assert fresh.run.trainer.args.output_dir.endswith("run-3") and logged(fresh.run) != logged(one)
    assert any(not torch.equal(before[n], p) for n, p in trained(fresh.model).items())


def test_weights_that_do_not_fit_are_refused_in_words(made, monkeypatch):
    import grpo_nb.ui.studio.first as module
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    first = First(made[0])
    assert not first.kept and "Go on from the weights as they are" in first.why_not
    with pytest.raises(RuntimeError, match="no way back"): first.put_back(made[0])


@pytest.mark.parametrize("there, free", [((), "run"), (("run/notes.txt",), "run"), (("run/checkpoint-3/x",), "run-2"),
                                        (("run/run.json", "run-2/trained-4/x"), "run-3"), (("run/.grpo_nb.lock",), "run-2")])
def test_folders(tmp_path, there, free):
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert free_folder(tmp_path / "run").name == free


def test_a_mended_reward_is_taken(made, tmp_path):
    space = types.ModuleType("cell")
    exec("def judge(completions, **kwargs): return [answers[0] for _ in completions]", space.__dict__)
    s = studio(*made, TASK.train, space.judge, {**CONFIG, "output_dir": str(tmp_path)})
    with pytest.raises(RuntimeError, match="answers"): s.start(background=False)
    assert "NameError" in s.controls.failure and str(s.verdict).startswith("The run failed in step 1")
    assert s.controls.actions == ("start",), "it has left nothing to go on from"
    exec("def judge(completions, **kwargs): return [float(i) for i, _ in enumerate(completions)]", space.__dict__)
    s.start(background=False)
    assert s.run.state == "finished" and any("judge was defined anew" in said for _, _, said in s.controls.notes)
    assert not s.controls.failure


def test_what_was_set_by_hand_survives_a_cell_that_is_run_again():
    given = dict(learning_rate=1e-4, beta=0.1, max_steps=5)
    before = HyperparameterPanel("m", given, rewards=[length]).set(learning_rate=1e-3, temperature=0.7, max_steps=9)
    before.rewards.set(before.rewards.choices()[0].name, weight=0.5)
    after = HyperparameterPanel("m", {**given, "max_steps": 6}, rewards=[length])
    assert set(after.take_from(before)) == {"learning_rate", "temperature"}, "the cell itself has changed max_steps"
    assert after.rewards.take_from(before.rewards) == ["length"] and after.rewards.state["length"]["weight"] == 0.5
    assert [after.get(n) for n in ("learning_rate", "beta", "temperature", "max_steps")] == [1e-3, 0.1, 0.7, 6]


def test_the_studio_of_a_cell_takes_over(made, tmp_path, monkeypatch):
    import grpo_nb.ui.studio.made as module
    monkeypatch.setattr(module, "_cell", lambda model: "cell 7")
    config = {**CONFIG, "output_dir": str(tmp_path / "run")}
    one = studio(*made, TASK.train, length, config)
    one.settings.set(max_steps=1)
    one.start(background=False)
    run, first = one.run, one._first
    two = studio(*made, TASK.train, length, config)
    assert two.run is run and one.run is None and two._first is first and two.settings.get("max_steps") == 1
    assert len(two.charts) == 1 and len(two.completions) == 1
    assert two.reset().settings.get("max_steps") == 2
    module._studios.clear()
    first.put_back(made[0])


# ---- the copy in the saved notebook

class Handle:
    "Stands for the display handle of a copy."
    def __init__(self): self.sent = []
    def update(self, bundle, raw): self.sent.append(bundle)


def test_the_copy_is_renewed_without_a_cell(fresh):
    fresh._copy = handle = Handle()
    fresh.start(background=False)
    fresh.run.events.drain(5)
    for _ in range(100):
        if any("finished" in b["text/html"] for b in handle.sent): break
        page.time.sleep(0.05)
    last = handle.sent[-1]
    assert "finished" in last["text/html"] and "<svg" in last["text/html"] and "step 2 of 2" in last["text/html"]
    assert "finished" in last["text/plain"] and "no run yet" not in last["text/html"]


def test_pauses_between_renewals_grow(fresh):
    assert [fresh._next_wait() for _ in range(10)] == [2.0, 3.0, 4.5, 6.75, 10.125, 15.1875, 22.78125, 30.0, 30.0, 30.0]
    fresh.renew_now()
    assert fresh._next_wait() == 2.0


def test_a_picture_stands_beside_the_html():
    class WithPicture(page.Page):
        def static_html(self): return "<b>x</b>"
        def text(self): return "x"
        def pictures(self): return {"image/png": "aGk="}
    assert bundle_of(WithPicture()) == {"text/html": "<b>x</b>", "text/plain": "x", "image/png": "aGk="}


# ---- what the browser hears

def test_a_page_that_no_browser_shows_says_what_to_do(fresh):
    fresh.mode, fresh._copy = "widget", Handle()
    assert "There are no buttons here" in fresh.notice(), "no widget at all: a program, or anywidget is missing"
    fresh._keep()
    assert fresh.widget.children[0] is fresh._keeper.widget and "pip install jupyterlab_widgets" in fresh.notice()
    assert "s.start()" in fresh.notice() and "jupyterlab_widgets" in fresh.static_html()
    sent = []
    fresh._keeper.widget.send = lambda content, buffers=None: sent.append(content)
    fresh._keeper.widget.heard(None, {"kind": "hello"}, [])
    assert sent == [{"kind": "beat"}] and fresh.notice() == "" and "jupyterlab_widgets" not in fresh.static_html()


@pytest.mark.parametrize("close", [True, False])
def test_a_dropped_studio_is_gone_with_its_model(tmp_path, close):
    "All pages were made, a run has ended, and ipywidgets still keeps every widget."
    model, tokenizer = tiny_model(TASK, steps=0, measure=False, hidden_size=64, layers=1)
    s = studio(model, tokenizer, TASK.train, length, {**CONFIG, "max_steps": 1, "output_dir": str(tmp_path)})
    s.mode = "widget"
    s._keep()
    for name in ("Rewards", "Settings", "Doctor", "Run", "Completions", "Lab"): s.open(name)
    s.start(background=False)
    s.run.events.drain(5)
    there = [weakref.ref(x) for x in (model, s.run, s.run.trainer, s.run.trainer.optimizer, s)]
    if close:
        s.close()
        there.pop() # the studio itself stays, and shows what it showed
    else: del s
    del model
    for _ in range(40):
        gc.collect()
        if not any(x() for x in there): break
        page.time.sleep(0.1) # what was planned for the page ends
    assert [x() is None for x in there] == [True] * len(there)


# ---- words

def test_a_failed_run_says_failed_and_no_rule_is_named():
    bus = Bus()
    watcher = Watcher(bus)
    for step in range(30):
        metrics = {"reward": 0.0, "reward_std": 0.0, "completions/clipped_ratio": 1.0, "completions/mean_length": 9.0}
        bus.emit(StepLogged(step=step, metrics=metrics))
    held = watcher.verdict()
    assert watcher.active and not any(name in held.text for name in watcher.active if "_" in name)
    bus.emit(RunFailed(step=30, error="ValueError: no\n  completion: 'x\\ny'"))
    assert watcher.verdict().answer == "failed" and watcher.verdict().text.startswith("The run failed in step 31: ValueError: no.")
    bus.emit(RunStarted(step=30, total_steps=40))
    assert watcher.verdict().answer != "failed"


def test_a_failed_reward_shows_where_and_what(made, tmp_path):
    def judge(completions, **kwargs): return [float(c[0]["content"] + "four\n") for c in completions]
    run = GRPORun(*made, judge, TASK.train, {**CONFIG, "output_dir": str(tmp_path)})
    controls = RunControls(start=lambda: None).attach(run)
    with pytest.raises(RuntimeError): run.start(background=False)
    run.events.drain(5)
    html = controls.failure
    assert all(part in html for part in ("judge", "test_studio.py", "def judge(completions", "<details><summary>traceback"))
    assert "the completion that judge was given" in html and "\\n  completion" not in html
    assert failure_html(None, "Error: alone") and "failed" in controls.status_html()
    assert isinstance(run.error, RuntimeError) and run.left is None and run.elapsed > 0 and "gone" in repr(run)


def test_a_copy_says_when_its_run_was_running(fresh):
    controls = fresh.controls
    for state, said in (("running", True), ("paused", True), ("finished", False), ("stopped", False)):
        controls.run = types.SimpleNamespace(state=state, step=3, total_steps=9, waiting="")
        assert ("when this copy was made" in controls.status_html(copy=True)) == said
        assert "copy" not in controls.status_html()


def test_an_end_stands_in_the_status_at_once(fresh):
    fresh._soon = lambda: None # what comes later comes never where the kernel is restarted
    fresh.widget
    fresh.start(background=False)
    fresh._status.value = "running"
    fresh._heard(RunStopped(step=2, reason="stop"))
    assert "finished" in fresh._status.value and "step 2 of 2" in fresh._status.value


def test_a_run_tells_its_times(fresh):
    fresh.start(background=False)
    status = fresh.controls.status_html()
    assert "<progress" in fresh.run._repr_html_() and "step 2 of 2" in status and "gone" in status
    stand = types.SimpleNamespace(step=177, total_steps=1344, elapsed=130.0, left=845.0, state="running", waiting="", settings={})
    fresh.controls.run = stand
    html = fresh.controls.status_html()
    assert 'value="177"' in html and "2:10 gone, about 14:05 left" in html and "step 177 of 1,344" in html


# ---- the doctor

def contained(completions, answer, **kwargs): return [1.0 if expected in c else 0.0 for c, expected in zip(completions, answer)]
def broken(completions, **kwargs): return [float(missing) for c in completions]  # noqa: F821


def test_a_reward_that_takes_messages_for_text_is_told_so(made):
    report = doctor(*made, contained, TASK.train, CONFIG, prompts=2)
    found = report["reward:contained"]
    assert found.severity == "error" and "text_of" in found.fix and "chat messages" in found.message
    assert not any(f.rule == "zero_spread" for f in report), "the cause is said, not easier prompts"
    texts = [{"prompt": "sort 21:", "answer": "12"}] * 4
    assert "messages" not in str(doctor(*made, contained, texts, CONFIG, prompts=1))


def test_the_doctor_goes_on_after_its_first_error(made):
    report = doctor(*made, broken, TASK.train, {**CONFIG, "max_completion_length": 5000}, prompts=1)
    assert {"context", "reward_error"} <= {f.rule for f in report.errors}
    assert any("max_completion_length=5000" in what for what in report.unreached)
    error = report["reward_error"]
    assert "float(missing)" in error.evidence["source"] and "NameError" in error.evidence["trace"]
    assert "test_studio.py" in error.message
    assert "reward_error" not in report.html.replace('title="reward_error"', "")


# ---- small things that were seen

def test_settings_open_on_what_can_be_changed_and_trackers_are_offered(made):
    panel = HyperparameterPanel(made[0], CONFIG, rewards=[length])
    panel.widget
    assert panel._tabs.value == "Sampling" and HyperparameterPanel("m", rewards=[length]).widget is not None
    assert panel.set(report_to="trackio").get("report_to") == "trackio"


def test_before_a_run_there_is_a_plan_and_trl_that_is_not_patched_is_said(fresh):
    from grpo_nb import FastLanguageModel, UnpatchFastRL  # noqa: F401
    fresh.open("Run")
    assert "Ready to train" in fresh._plan.value and "4 for each prompt" in fresh._plan.value and "length" in fresh._plan.value
    assert fresh._unpatched.layout.display == "" and "not patched" in fresh._step_said.value
    try:
        fresh._patching.click()
        fresh._sync_run()
        assert fresh._unpatched.layout.display == "none"
    finally: UnpatchFastRL("grpo")
    fresh.start(background=False)
    fresh._refresh()
    assert fresh._plan.layout.display == "none" and fresh._charts_at.layout.display == ""


def test_notes_have_signs_and_no_rule():
    controls = RunControls(start=lambda: None)
    controls._heard(Finding("all_cut_off", "warning", "all completions are cut off.", step=3))
    assert "gnb-warning" in controls.notes_html() and "all_cut_off" not in controls.notes_html()
