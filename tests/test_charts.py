"""ui.charts and ui.svg: rows, messages, pictures, failures, modes."""
import json
import math
import random
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from array import array
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from grpo_nb.ground.events import Bus, CheckpointSaved, RunFinished, RunPaused, RunStarted, SettingChanged, StepLogged, said
from grpo_nb.ui.parts import svg
from grpo_nb.ui.charts.chart import CHARTS, MAIN, Chart, series
from grpo_nb.ui.charts.charts import LiveCharts

VALUES = {"reward": 0.5, "reward_std": 0.2, "rewards/a/mean": 0.4, "rewards/b/mean": 0.1, "kl": 0.01, "completion_length": 120.0,
          "completions/max_length": 256.0, "completions/clipped_ratio": 0.1}


class FrontEnd:
    "What charts.js does with messages, in Python: keeps rows, refuses what does not fit."
    def __init__(self): self.meta, self.at, self.rows = None, -1, []

    def receive(self, message, data):
        if message["kind"] == "all": self.meta, self.at, self.rows = message["meta"], message["at"], []
        elif message["v"] != self.meta["version"] or message["at"] != self.at: return False
        else: self.at += message["n"]
        width = len(self.meta["columns"]) + 1
        flat = array("f", data)
        self.rows += [list(flat[i:i + width]) for i in range(0, len(flat), width)]
        return True


class Widget:
    "Takes what would go to a notebook; fails if told to."
    def __init__(self, fail=False): self.sent, self.fail = [], fail
    def send(self, content, buffers):
        if self.fail: raise OSError("the front end is gone")
        self.sent.append((content, buffers[0] if buffers else b""))


class Handle:
    def __init__(self): self.updates = []
    def update(self, bundle, raw=True): self.updates.append(bundle)


def live(charts, fail=False):
    charts.mode, charts._widget, charts._copy = "widget", Widget(fail), Handle()
    return charts


def test_rows_arrive_whole_and_in_order():
    charts, front = LiveCharts(), FrontEnd()
    for step in range(1, 101):
        charts.append(step, {**VALUES, "reward": step / 100})
        if step % 3 == 0: assert front.receive(*charts._update())
    assert front.receive(*charts._update())
    assert charts._update() is None
    assert [r[0] for r in front.rows] == list(range(1, 101))
    column = front.meta["columns"].index("reward") + 1
    assert front.rows[-1][column] == 1.0


def test_a_lost_message_is_noticed_and_everything_comes_again():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, VALUES)
    front.receive(*charts._update())
    charts.append(2, VALUES)
    charts._update() # lost on the way
    charts.append(3, VALUES)
    assert not front.receive(*charts._update())
    charts._asked({"kind": "sync"})
    assert front.receive(*charts._update()) and len(front.rows) == 3


def test_a_metric_that_comes_later_is_a_new_version_and_nan_before():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, {"reward": 1.0})
    front.receive(*charts._update())
    charts.append(2, {"reward": 1.0, "kl": 0.5})
    message, data = charts._update()
    assert message["kind"] == "all" and front.receive(message, data)
    assert math.isnan(front.rows[0][2]) and front.rows[1][2] == 0.5


@pytest.mark.parametrize("length", [10, 1000, 10_000])
def test_an_update_stays_under_a_kilobyte_at_any_length(length):
    charts = LiveCharts()
    for step in range(length): charts.append(step, VALUES)
    charts._update()
    for burst in (1, 5, 500): # rows that came in the third of a second
        for step in range(burst): charts.append(length + step, VALUES)
        message, data = charts._update()
        assert message["kind"] == "add" and message["n"] == burst
        assert len(json.dumps(message)) + len(data) < 500
        length += burst
    assert len(charts.history) == length


def test_a_burst_is_made_up_for_but_not_over_and_over(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    charts, front, whole = LiveCharts(), FrontEnd(), 0
    charts.append(0, VALUES)
    front.receive(*charts._update())
    for step in range(1, 60_001): # 100 rows a second for ten minutes
        charts.append(step, VALUES)
        clock[0] += 0.01
        if step % 34 == 0:
            update = charts._update()
            whole += update[0]["kind"] == "all"
            assert front.receive(*update)
    assert 3 <= whole <= 9, "the wait doubles each time"
    assert len(front.rows) < 60_001
    front.receive(*charts._update(final=True))
    assert len(front.rows) == 60_001 and charts._update(final=True) is None


def test_at_most_ten_updates_a_second_and_append_does_not_wait():
    charts = live(LiveCharts())
    start = time.monotonic()
    for step in range(300):
        charts.append(step, VALUES)
        time.sleep(0.004)
    def arrived():
        front = FrontEnd()
        assert all(front.receive(*update) for update in list(charts._widget.sent))
        return front.at
    while arrived() < 300 and time.monotonic() < start + 300: time.sleep(0.01)
    assert arrived() == 300 and 2 <= len(charts._widget.sent) <= 10 * (time.monotonic() - start) + 1


def test_append_from_many_threads_loses_nothing():
    charts = live(LiveCharts(interval=0.01))
    def work(k):
        for i in range(200): charts.append(k * 1000 + i, {"reward": float(i), f"rewards/{k}/mean": 1.0})
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(charts.history) == 1200 and charts.failures == 0
    charts.flush()
    front = FrontEnd()
    assert all(front.receive(*update) for update in charts._widget.sent) and front.at == 1200


def test_a_failing_view_never_reaches_the_run(capsys):
    said.clear()
    charts = live(LiveCharts(interval=0.001), fail=True)
    for step in range(30):
        charts.append(step, VALUES)
        charts._send()
    charts.append(30, object())
    charts.append(31, {"reward": "high", "kl": None})
    assert len(charts.history) == 31 and charts.failures >= 10
    assert capsys.readouterr().out.count("could not reach the notebook") == 1


def test_a_broken_print_never_reaches_the_run():
    def broken(line): raise BrokenPipeError
    charts = LiveCharts(mode="text", print=broken)
    charts.append(1, VALUES)
    assert charts.failures == 1 and len(charts) == 1


def test_listens_to_a_bus_and_says_why_there_is_no_kl():
    lines, run = [], SimpleNamespace(events=Bus(), config=SimpleNamespace(beta=0.0))
    charts = LiveCharts(mode="text", print=lines.append).attach(run).show()
    run.events.emit(RunStarted(total_steps=20))
    run.events.emit(StepLogged(step=1, metrics={"reward": 0.25, "completion_length": 12.0}))
    run.events.emit(RunFinished(step=1, metrics={}))
    assert lines == ["step 1/20  reward 0.25  completion_length 12"]
    assert charts.panels()[1].empty == "no KL: beta is 0"
    charts.close()
    run.events.emit(StepLogged(step=2, metrics={"reward": 1.0}))
    assert len(charts) == 1 and run.events.failures == 0


def test_empty_states():
    charts = LiveCharts()
    assert {p.empty for p in charts.panels()} == {"waiting for the first step"}
    charts.append(1, {"reward": 1.0})
    reward, kl, length = charts.panels()
    assert reward.lines and not kl.lines and kl.empty == length.empty == "not logged"
    assert "<line" not in svg.panel(kl) and "not logged" in svg.panel(kl)


def test_which_lines_a_chart_has():
    lines = series(CHARTS["reward"], ["reward", "reward_std", "rewards/a/b/mean", "rewards/c/std", "rewards/d/mean"])
    assert [(s["role"], s["label"]) for s in lines] == [("thin", "a/b"), ("thin", "d"), ("main", "mean")]
    assert lines[-1]["band"] == "reward_std" and lines[-1]["colour"] == MAIN
    assert [s["metric"] for s in series(CHARTS["length"], ["completions/mean_length", "completion_length"])] == [
        "completion_length"
    ]
    assert len(series(CHARTS["reward"], [f"rewards/{i}/mean" for i in range(50)])) == 8


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Did you mean 'entropy'"): LiveCharts(charts=("reward", "entrop"))
    with pytest.raises(ValueError, match="mode='statc'"): LiveCharts(mode="statc")
    with pytest.raises(TypeError, match="run=3"): LiveCharts().attach(3)


def test_files(tmp_path):
    charts = LiveCharts(charts=("reward", Chart("Mine </script><b>", ("mine",))))
    for step in range(1, 30):
        charts.append(step, {"reward": 0.5, "rewards/</script><script>x()</script>/mean": 1.0, "rewards/b/mean": 0.0, "mine": step})
    charts.to_svg(tmp_path / "a.svg")
    ET.parse(tmp_path / "a.svg")
    page = charts.to_html(tmp_path / "a.html", title="a & <b>").read_text()
    assert page.count("</script>") == 3 and "<script>x()" not in page
    charts.to_csv(tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0].startswith("step,reward") and len(lines) == 30


def test_a_long_run_leaves_a_bounded_picture():
    charts = LiveCharts()
    chance = random.Random(0)
    for step in range(20_000): charts.append(step, {k: v + chance.random() for k, v in VALUES.items()})
    assert len(charts.static_html()) < 100_000


def test_a_notebook_gets_the_widget_and_a_picture(monkeypatch):
    shown, charts = [], LiveCharts(mode="widget")
    monkeypatch.setattr("IPython.display.display", lambda bundle, **how: shown.append(bundle) or Handle())
    charts.append(1, VALUES)
    charts.show()
    live, copy = shown
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"] == charts.widget.model_id
    assert "<svg" in copy["text/html"] and f"for-{charts._mark}" in copy["text/html"] and "reward 0.5" in copy["text/plain"]
    state = charts.widget.get_state()
    assert {"gnb-view", charts._mark} <= set(state["_dom_classes"])
    assert state["_snapshot"]["at"] == 1 and len(state["_snapshot"]["rows"]) == 4 * 9
    shown.clear()
    LiveCharts(mode="static").show()
    (picture,) = shown
    assert "waiting for the first step" in picture["text/html"] and "gnb-copy" not in picture["text/html"]


def test_charts_without_a_row_are_charts():
    "They have a length of 0, and were once taken for charts that are gone."
    charts = LiveCharts(mode="widget")
    snapshot = charts.widget.get_state()["_snapshot"]
    assert snapshot["at"] == 0 and [c["title"] for c in snapshot["meta"]["charts"]] == [c.title for c in charts.charts]
    charts.widget.heard(charts.widget, {"kind": "ready"}, [])
    assert charts._live


def test_the_picture_alone_is_renewed_while_the_run_goes_on():
    charts = LiveCharts(mode="static")
    charts._copy, charts._picture_due = Handle(), 0.0
    charts.append(1, VALUES)
    charts._tick()
    assert len(charts._copy.updates) == 1 and "<svg" in charts._copy.updates[0]["text/html"]
    charts._tick()
    assert len(charts._copy.updates) == 1, "it is not yet time"
    charts.append(2, VALUES)
    charts.flush()
    charts.flush()
    assert len(charts._copy.updates) == 2, "the second time nothing is new"


def test_a_script_gets_text_and_needs_no_widget_library(tmp_path):
    code = (
        "import sys; from grpo_nb.ui.charts.charts import LiveCharts\n"
        "c = LiveCharts().show(); c.append(1, {'reward': 0.5, 'loss': 1})\n"
        "assert c.mode == 'text' and not {'ipywidgets', 'anywidget', 'torch', 'IPython'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "step 1  reward 0.5\n"


NOTEBOOK = [
    "from grpo_nb.ui.charts.charts import LiveCharts\ncharts = LiveCharts()\ncharts",
    "import threading, contextvars\n"
    "def train():\n    for step in range(1, 31): charts.append(step, {'reward': step / 30, 'kl': 0.1, 'completion_length': 9.0})\n"
    "t = threading.Thread(target=contextvars.copy_context().run, args=(train,)); t.start(); t.join()",
]


def test_nbconvert_leaves_the_final_charts():
    nbformat, nbclient, nbconvert = (pytest.importorskip(m) for m in ("nbformat", "nbclient", "nbconvert"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in NOTEBOOK])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
    outputs = [o for c in notebook.cells for o in c.outputs]
    assert len(outputs) == 1, "one picture, not two"
    assert "widgets" not in notebook.metadata and outputs[0].data["text/html"].count("<polyline") == 6
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    assert html.count("<polyline") == 6 and "step 30" in html


numbers = st.floats(-1e30, 1e30)


@given(st.lists(st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60), st.booleans())
def test_any_values_make_a_well_formed_picture(values, log):
    line = svg.Line(list(range(len(values))), values, "x", band=[abs(v) for v in values])
    text = svg.panel(svg.Panel("t", (line,), log=log))
    ET.fromstring(text)
    assert "nan" not in text and "inf" not in text


@given(st.lists(numbers, min_size=1, max_size=3000), st.integers(4, 500))
def test_outline_keeps_the_ends_and_the_extremes(values, limit):
    kept = svg.outline(values, limit)
    assert len(kept) <= max(limit, 4) and kept == sorted(set(kept)) and {0, len(values) - 1} <= set(kept)
    assert min(values) == min(values[i] for i in kept) and max(values) == max(values[i] for i in kept)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside(low, width):
    found = svg.ticks(low, low + width)
    assert 1 <= len(found) <= 8 and all(low - width * 1e-3 <= t <= low + width * 1.001 for t in found)


# ---- marks, and a run that was there before the charts

def test_marks_arrive_one_by_one_and_come_again_with_everything():
    charts = live(LiveCharts())
    charts.append(1, VALUES)
    charts._send()
    charts.mark(1, "learning_rate 1e-5 → 5e-6")
    charts.mark(1, "paused", "pause")
    charts._send()
    sent = [m for m, _ in charts._widget.sent if m["kind"] == "mark"]
    assert [(m["i"], m["mark"]) for m in sent] == [(0, [1, "learning_rate 1e-5 → 5e-6", "change"]), (1, [1, "paused", "pause"])]
    assert all(len(json.dumps(m)) < 600 for m in sent) and charts._new_marks() == []
    assert charts._everything()["meta"]["marks"] == [m["mark"] for m in sent]
    with pytest.raises(ValueError, match="kind='paus'"): charts.mark(1, "x", "paus")


def test_marks_are_bounded():
    charts = LiveCharts()
    charts.append(1, VALUES)
    for step in range(10_000): charts.mark(step, "checkpoint" * 100, "saved")
    assert len(charts.marks) == 100 and max(len(m.text) for m in charts.marks) == 200


def test_what_a_run_does_is_marked():
    bus, charts = Bus(), LiveCharts()
    charts.attach(bus)
    for step in range(1, 11): bus.emit(StepLogged(step=step, metrics=VALUES))
    bus.emit(SettingChanged(step=4, name="beta", old=0.0, new=0.04))
    bus.emit(RunPaused(step=6))
    bus.emit(CheckpointSaved(step=8, path="a/b/checkpoint-8"))
    assert [(m.step, m.text, m.kind) for m in charts.marks] == [
        (4, "beta 0 → 0.04", "change"),
        (6, "paused", "pause"),
        (8, "checkpoint-8 saved", "saved"),
    ]
    picture = charts.to_svg()
    assert picture.count("step 4: beta 0 → 0.04") == 3 and "Changed after step 4: beta 0 → 0.04" in charts.static_html()
    ET.fromstring(picture)
    bus.emit(RunStarted(step=5, total_steps=10)) # back to a checkpoint: those steps come again
    assert [r["step"] for r in charts.history] == [1, 2, 3, 4, 5] and [m.step for m in charts.marks] == [4]
    front = FrontEnd()
    assert front.receive(*charts._update()) and len(front.rows) == 5


def test_charts_that_come_late_take_what_there_is():
    history = [dict(step=s, name=n, value=float(s)) for s in (1, 2, 3) for n in ("reward", "kl")]
    run = SimpleNamespace(
        events=Bus(), history=history, total_steps=9, changes=[dict(step=2, name="temperature", old=1.0, new=0.7)]
    )
    charts = LiveCharts().attach(run)
    run.events.emit(StepLogged(step=4, metrics={"reward": 4.0}))
    assert [(r["step"], r["reward"]) for r in charts.history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert charts.marks[0].text == "temperature 1 → 0.7" and charts._total == 9


def test_all_charts_and_many_rewards_stay_under_a_kilobyte():
    charts = LiveCharts("all")
    row = {
        **VALUES,
        **{f"rewards/{i}/mean": 1.0 for i in range(200)},
        **{n: 1.0 for c in CHARTS.values() for n in (*c.main[:1], *(l[0] for l in c.lines))},
    }
    for step in range(3): charts.append(step, row)
    charts._update()
    for step in range(3, 10): charts.append(step, row)
    message, data = charts._update()
    assert len(charts._columns) < 40 and len(json.dumps(message)) + len(data) < 500 and len(charts.history[0]) > 200


def test_a_png_names_the_package_that_it_needs(tmp_path, monkeypatch):
    charts = LiveCharts()
    charts.append(1, VALUES)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="pip install resvg-py"): charts.to_png(tmp_path / "a.png")
    monkeypatch.undo()
    pytest.importorskip("resvg_py")
    assert charts.to_png(tmp_path / "a.png", theme="dark").read_bytes()[:4] == b"\x89PNG"
