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

from grpo_nb.ground.events import (Bus, CheckpointSaved, RunFailed, RunFinished, RunPaused, RunStarted, RunStopped, SettingChanged,
                                   StepLogged, said)
from grpo_nb.ui.parts import svg
from grpo_nb.ui.charts.chart import CHARTS, COLOURS, MAIN, THIN, Chart, is_own, look, series, soft
from grpo_nb.ui.charts.charts import LiveCharts
from grpo_nb.ui.charts.rows import Rows
from grpo_nb.ui.parts.display import bundle_of

VALUES = {"reward": 0.5, "reward_std": 0.2, "rewards/a/mean": 0.4, "rewards/b/mean": 0.1, "kl": 0.01, "completion_length": 120.0,
          "completions/max_length": 256.0, "completions/clipped_ratio": 0.1}


class FrontEnd:
    "What charts.js does with messages, in Python: keeps each run's rows, refuses what does not fit."
    def __init__(self): self.meta, self.at, self.all, self.said, self.marks = None, [], [], None, []

    def receive(self, message, buffers):
        if message["kind"] == "say": self.said = message["said"]
        elif message["kind"] == "mark": self.marks.append((message["r"], message["mark"]))
        elif message["kind"] == "all":
            self.meta, self.at, self.said = message["meta"], list(message["at"]), message["meta"]["said"]
            self.all = [self.read(data) for data in buffers]
        elif message["v"] != self.meta["version"] or message["at"] != self.at[message["r"]]: return False
        else:
            self.at[message["r"]] += message["n"]
            self.all[message["r"]] += self.read(buffers[0])
        return True

    def read(self, data): # rows: step, minutes, tokens, and the columns
        width, flat = len(self.meta["columns"]) + 3, array("f", data)
        return [list(flat[i:i + width]) for i in range(0, len(flat), width)]

    def take(self, updates): return all([self.receive(*update) for update in updates])

    def value(self, i, name, run=0): return self.all[run][i][self.meta["columns"].index(name) + 3]

    @property
    def rows(self): return self.all[0]


class Widget:
    "Takes what would go to a notebook; fails if told to."
    def __init__(self, fail=False): self.sent, self.fail = [], fail
    def send(self, content, buffers):
        if self.fail: raise OSError("the front end is gone")
        self.sent.append((content, buffers))


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
        if step % 3 == 0: assert front.take(charts._updates())
    assert front.take(charts._updates())
    assert charts._updates() == []
    assert [r[0] for r in front.rows] == list(range(1, 101))
    assert front.value(-1, "reward") == 1.0


def test_a_lost_message_is_noticed_and_everything_comes_again():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, VALUES)
    front.take(charts._updates())
    charts.append(2, VALUES)
    charts._updates() # lost on the way
    charts.append(3, VALUES)
    assert not front.take(charts._updates())
    charts._asked({"kind": "sync"})
    assert front.take(charts._updates()) and len(front.rows) == 3


def test_a_metric_that_comes_later_is_a_new_version_and_nan_before():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, {"reward": 1.0})
    front.take(charts._updates())
    charts.append(2, {"reward": 1.0, "kl": 0.5})
    updates = charts._updates()
    assert [m["kind"] for m, _ in updates] == ["all"] and front.take(updates)
    assert math.isnan(front.value(0, "kl")) and front.value(1, "kl") == 0.5


@pytest.mark.parametrize("length", [10, 1000, 10_000])
def test_an_update_stays_under_a_kilobyte_at_any_length(length):
    charts = LiveCharts()
    for step in range(length): charts.append(step, VALUES)
    charts._updates()
    for burst in (1, 5, 500): # rows that came in the third of a second
        for step in range(burst): charts.append(length + step, VALUES)
        ((message, (data,)),) = charts._updates()
        assert message["kind"] == "add" and message["n"] == burst
        assert len(json.dumps(message)) + len(data) < 500
        length += burst
    assert len(charts.history) == length


def test_a_burst_is_made_up_for_but_not_over_and_over(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    charts, front, whole = LiveCharts(), FrontEnd(), 0
    charts.append(0, VALUES)
    front.take(charts._updates())
    for step in range(1, 60_001): # 100 rows a second for ten minutes
        charts.append(step, VALUES)
        clock[0] += 0.01
        if step % 34 == 0:
            updates = charts._updates()
            whole += updates[0][0]["kind"] == "all"
            assert front.take(updates)
    assert 3 <= whole <= 9, "the wait doubles each time"
    assert len(front.rows) < 60_001
    front.take(charts._updates(final=True))
    assert len(front.rows) == 60_001 and charts._updates(final=True) == []


def test_at_most_ten_updates_a_second_and_append_does_not_wait():
    charts = live(LiveCharts())
    start = time.monotonic()
    for step in range(300):
        charts.append(step, VALUES)
        time.sleep(0.004)
    def arrived():
        front = FrontEnd()
        assert all(front.receive(*update) for update in list(charts._widget.sent))
        return sum(front.at)
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
    assert all(front.receive(*update) for update in charts._widget.sent) and front.at == [1200]


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
    assert lines[0].startswith("step,time,seconds,tokens,reward") and len(lines) == 30


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
    assert state["_snapshot"]["at"] == [1] and len(state["_snapshot"]["rows"][0]) == 4 * 11
    shown.clear()
    LiveCharts(mode="static").show()
    (picture,) = shown
    assert "waiting for the first step" in picture["text/html"] and "gnb-copy" not in picture["text/html"]


def test_charts_without_a_row_are_charts():
    "They have a length of 0, and were once taken for charts that are gone."
    charts = LiveCharts(mode="widget")
    snapshot = charts.widget.get_state()["_snapshot"]
    assert snapshot["at"] == [0] and [c["title"] for c in snapshot["meta"]["charts"]] == [c.title for c in charts.charts]
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
    assert svg.smooth([values[0]] * 9) == [values[0]] * 9 if values and math.isfinite(values[0]) else True


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
    assert all(len(json.dumps(m)) < 600 for m in sent) and charts._updates() == []
    assert charts._everything()["meta"]["runs"][0]["marks"] == [m["mark"] for m in sent]
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
    assert picture.count("<title>step 4: beta 0 → 0.04") == 3 and "Changed after step 4: beta 0 → 0.04" in charts.static_html()
    ET.fromstring(picture)
    bus.emit(RunStarted(step=5, total_steps=10)) # back to a checkpoint: those steps come again
    assert [r["step"] for r in charts.history] == [1, 2, 3, 4, 5] and [m.step for m in charts.marks] == [4]
    front = FrontEnd()
    assert front.take(charts._updates()) and len(front.rows) == 5


def test_charts_that_come_late_take_what_there_is():
    history = [dict(step=s, name=n, value=float(s)) for s in (1, 2, 3) for n in ("reward", "kl")]
    run = SimpleNamespace(
        events=Bus(), history=history, total_steps=9, changes=[dict(step=2, name="temperature", old=1.0, new=0.7)]
    )
    charts = LiveCharts().attach(run)
    run.events.emit(StepLogged(step=4, metrics={"reward": 4.0}))
    assert [(r["step"], r["reward"]) for r in charts.history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert charts.marks[0].text == "temperature 1 → 0.7" and charts.runs[0].total == 9


def test_all_charts_and_many_rewards_stay_under_a_kilobyte():
    charts = LiveCharts("all")
    row = {
        **VALUES,
        **{f"rewards/{i}/mean": 1.0 for i in range(200)},
        **{n: 1.0 for c in CHARTS.values() for n in (*c.main[:1], *(l[0] for l in c.lines))},
    }
    for step in range(3): charts.append(step, row)
    charts._updates()
    for step in range(3, 10): charts.append(step, row)
    ((message, (data,)),) = charts._updates()
    assert len(charts._columns) < 40 and len(json.dumps(message)) + len(data) < 500 and len(charts.history[0]) > 200


def test_a_png_names_the_package_that_it_needs(tmp_path, monkeypatch):
    charts = LiveCharts()
    charts.append(1, VALUES)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ImportError, match="pip install resvg-py"): charts.to_png(tmp_path / "a.png")
    monkeypatch.undo()
    pytest.importorskip("resvg_py")
    for scale, wide in ((2, 720), (1.5, 540), (0.01, 4)): # one panel and its margins are 360 wide
        data = LiveCharts("kl").to_png(tmp_path / "a.png", theme="dark", scale=scale).read_bytes()
        assert data[:4] == b"\x89PNG" and int.from_bytes(data[16:20], "big") == wide


# ---- a constant is drawn as a constant, and nothing is drawn that cannot be

@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("value", [5.0, 0.01, 1.0, 1e-6, -0.3, 123456.7, 0.1 + 0.2])
def test_smoothing_leaves_equal_values_equal(value, weight):
    assert svg.smooth([value] * 300, weight) == [value] * 300
    assert svg.smooth([value, math.nan, value], weight)[2] == value


def test_smoothing_is_the_corrected_average():
    chance, values, total = random.Random(0), [], 0.0
    for n in range(1, 50):
        values.append(chance.random())
        total = 0.9 * total + 0.1 * values[-1]
        assert svg.smooth(values)[-1] == pytest.approx(total / (1 - 0.9 ** n), rel=1e-12)


@pytest.mark.parametrize(
    "values, least, most, expected",
    [
        ([5.0] * 9, None, None, (4.5, 5.5)),
        ([5.0, 5.0000004, 4.9999998], None, None, (4.5, 5.5)), # float32 averages of equal lengths
        ([0.0], None, None, (0.0, 0.5)),
        ([0.0, 0.0], 0, 1, (0, 1)),
        ([1.0], 0, 1, (0, 1)),
        ([-2.0], None, None, (-2.2, -1.8)),
        ([0.0, 1.0], 0, 1, (0, 1)),
        ([0.5, 1.0], 0, None, (0.47, 1.03)),
    ],
)
def test_an_axis_has_a_range_that_is_possible(values, least, most, expected):
    assert svg.span(values, least, most) == pytest.approx(expected)


@pytest.mark.parametrize("value", [5.0, 0.01, 1.0, 0.0, 2e-6, 12345.0])
def test_a_constant_metric_is_a_straight_line_with_ticks_that_differ(value):
    charts = LiveCharts(("reward", "length", "clip", "learning_rate"))
    row = {"reward": value, "completion_length": value, "clip_ratio": min(value, 1), "learning_rate": value}
    for i in range(1, 200): charts.append(i, row)
    for shown in charts.panels():
        text = svg.panel(shown)
        for line in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}polyline"):
            assert len({point.split(",")[1] for point in line.get("points").split()}) == 1
        ticks = [t.text for t in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text") if t.get("text-anchor") == "end"]
        numbers_ = [t for t in ticks if t != "step"][1:] # the first is the value beside the title
        assert len(set(numbers_)) == len(numbers_) >= 2 and all(len(t) <= 7 for t in numbers_), ticks


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_shares_stay_between_0_and_1(values):
    low, high = svg.span(values, 0, 1)
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("low, high", [(2.4, 2.8), (-6, -3), (0, 1), (-1.3, 2.2), (2.69, 2.71), (-9, 9)])
def test_a_log_axis_has_ticks(low, high):
    found = svg.log_ticks(low, high)
    texts = svg.tick_texts([10.0 ** t for t in found])
    assert 2 <= len(found) <= 9 and len(set(texts)) == len(texts)
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_the_band_of_a_reward_stays_in_what_is_possible():
    charts = LiveCharts(("reward",))
    for i in range(1, 30): charts.append(i, {"reward": 0.9, "reward_std": 0.3, "rewards/correct/mean": 0.9})
    (shown,) = charts.panels()
    assert (shown.least, shown.most) == (0, 1) and svg._edges(shown, 0.9, 0.3) == (pytest.approx(0.6), 1)
    front = FrontEnd()
    front.take(charts._updates())
    assert front.said["possible"] == [0, 1]


@pytest.mark.parametrize(
    "rows, weights, expected",
    [
        ([{"reward": 0.9, "reward_std": 0.3, "rewards/a/mean": 0.9}], None, (0, 1)),
        ([{"reward": 1.0, "reward_std": 0.3, "rewards/a/mean": 0.9, "rewards/b/mean": 0.1}], None, (0, 2)),
        ([{"reward": 0.92, "rewards/a/mean": 0.9, "rewards/b/mean": 0.1}], [1.0, 0.2], (0, 1.2)),
        ([{"reward": 0.92, "rewards/a/mean": 0.9, "rewards/b/mean": 0.1}], None, (None, None)), # weights that nobody told
        ([{"reward": 0.2, "reward_std": 0.98, "rewards/a/mean": 0.2}], None, (None, None)), # of -1 and 1
        ([{"reward": -0.2, "rewards/a/mean": -0.2}], None, (None, None)),
        ([{"reward": 3.0, "reward_std": 0.5, "rewards/a/mean": 3.0}], None, (0, None)),
        ([{"reward": 0.5}], None, (None, None)),
    ],
)
def test_what_a_reward_can_be_is_read_from_the_logs(rows, weights, expected):
    run = Rows()
    run.weights = weights
    for i, row in enumerate(rows): run.add(i, row)
    assert run.possible() == expected


# ---- waiting, failing

@pytest.mark.parametrize(
    "event, text",
    [
        (None, "waiting for the first step"),
        (RunStarted(total_steps=9), "waiting for the first step"),
        (RunFailed(error="x"), "the run failed before its first log"),
        (RunStopped(reason="stop"), "stopped before the first log"),
        (RunFinished(metrics={}), "the run ended without a log"),
    ],
)
def test_a_run_waits_only_while_it_waits(event, text):
    bus, front = Bus(), FrontEnd()
    charts = LiveCharts().attach(bus)
    front.take(charts._updates(final=True) or [charts._whole()])
    if event: bus.emit(event)
    front.take(charts._updates())
    assert front.said["waiting"] == text and {p.empty for p in charts.panels()} == {text}
    late = LiveCharts().attach(SimpleNamespace(events=Bus(), state=charts.runs[0].state))
    assert {p.empty for p in late.panels()} == {text}


# ---- several runs

def record(name, n=3, state="finished", height=1.0, **more):
    logs = [dict(step=i, time=1000.0 + 60 * i, tokens=100 * i, metrics={"reward": height * i, "kl": 0.1}) for i in range(1, n + 1)]
    return SimpleNamespace(name=name, logs=logs, state=state, total_steps=n, started=1000.0, marks=[], **more)


def test_several_runs_are_drawn_in_one_set_of_charts():
    live = SimpleNamespace(name="live", events=Bus(), state="running")
    charts, front = LiveCharts(), FrontEnd()
    charts.attach(live, record("a"), record("b", height=2.0))
    charts.attach(live) # the same again is nothing
    live.events.emit(StepLogged(step=1, metrics={"reward": 0.5, "completions/mean_length": 9.0}))
    assert front.take(charts._updates())
    assert [r["name"] for r in front.meta["runs"]] == ["live", "a", "b"] and front.at == [1, 3, 3]
    reward = front.meta["charts"][0]["series"]
    assert [(s["run"], s["label"], s["colour"]) for s in reward] == [(i, n, COLOURS[i]) for i, n in enumerate(["live", "a", "b"])]
    assert front.value(2, "reward", run=2) == 6.0 and front.all[1][2][:3] == [3.0, 3.0, 300.0]
    live.events.emit(StepLogged(step=2, metrics={"reward": 0.75}))
    ((message, _),) = charts._updates()
    assert (message["r"], message["at"], message["n"]) == (0, 1, 1)
    assert charts.text().count("step") == 3 and charts.history[-1] == {"run": "b", "step": 3, "reward": 6.0, "kl": 0.1}
    head, *_, last = charts.to_csv().splitlines()
    assert head == "run,step,time,seconds,tokens,reward,completions/mean_length,kl"
    assert last.startswith("b,3,") and last.endswith("6.0,,0.1")
    shown = charts.panels()[0]
    assert [l.label for l in shown.lines] == ["live", "a", "b"] and shown.says.startswith("Reward: b 6 at step 3")


def test_runs_of_one_name_are_told_apart_and_many_runs_get_dashes():
    charts = LiveCharts().attach(*[record("same") for _ in range(6)])
    assert [r.name for r in charts.runs] == ["same", *(f"same ({k})" for k in range(2, 7))]
    lines = charts.panels()[0].lines
    assert len({(l.colour, l.dash) for l in lines}) == 6 and lines[4].dash == "dash"
    assert len({look(i) for i in range(16)}) == 16


@pytest.mark.parametrize(
    "x, expected, word", [("steps", [1, 2, 3], "step"), ("tokens", [100, 200, 300], "tokens"), ("minutes", [1, 2, 3], "minutes")]
)
def test_the_horizontal_axis_is_steps_tokens_or_minutes(x, expected, word):
    charts = LiveCharts(x=x).attach(record("a"), record("b"))
    shown = charts.panels()[0]
    assert list(shown.lines[0].x) == expected and shown.along == word and f">{word}<" in svg.panel(shown)
    with pytest.raises(ValueError, match="x='hours'"): LiveCharts(x="hours")
    with pytest.raises(ValueError, match="smoothing=1"): LiveCharts(smoothing=1)


def test_a_run_of_another_process_is_read_on():
    run = record("far", state="running")
    charts = LiveCharts().attach(run)
    run.logs.append(dict(step=4, time=None, tokens=None, metrics={"reward": 4.0}))
    charts._look.now()
    assert len(charts) == 4 and charts.runs[0].state == "running"
    run.logs[2:] = [dict(step=3, metrics={"reward": 9.0})] # back to a checkpoint
    run.state = "finished"
    charts._look.now()
    assert [r["reward"] for r in charts.history] == [1.0, 2.0, 9.0] and charts._records == []
    charts.close()


def test_what_is_not_there_is_said_and_not_drawn():
    charts = LiveCharts(x="tokens")
    charts.append(1, {"reward": 0.5})
    assert charts.panels()[0].empty == "no tokens were logged" and "no tokens were logged" in charts.static_html()
    charts.attach(record("a")) # rows by hand are no part of it
    assert [len(r) for r in charts.runs] == [1, 3] and [r.name for r in charts.runs] == ["run 1", "a"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e300, -1e300, 1e-300, 0.0, True])
def test_no_value_breaks_a_chart(value):
    charts, front = LiveCharts("all"), FrontEnd()
    row = {name: value for c in CHARTS.values() for name in (*c.main, c.band or "mine")}
    for log in (False, True):
        charts.options["log"] = log
        for step in (3, 1, 2): charts.append(step, row)
        text = charts.static_html()
        assert "nan" not in text and "inf" not in text
    assert front.take(charts._updates()) and charts.failures == 0 and charts.text()


def test_three_runs_stay_under_a_kilobyte():
    buses = [Bus() for _ in range(3)]
    charts = LiveCharts().attach(*[SimpleNamespace(name=f"a run with a longer name {i}", events=b) for i, b in enumerate(buses)])
    for bus in buses: bus.emit(StepLogged(step=1, metrics=VALUES))
    charts._updates()
    for bus in buses:
        for step in range(2, 10): bus.emit(StepLogged(step=step, metrics=VALUES))
    updates = charts._updates()
    assert [m["r"] for m, _ in updates] == [0, 1, 2] and all(len(json.dumps(m)) + len(b[0]) < 500 for m, b in updates)


# ---- any metric, and panels that are kept

def test_evaluation_stands_beside_training_and_own_metrics_get_charts():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, {"reward": 0.5, "epoch": 0.1, "num_tokens": 5.0, "step_time": 0.2, "rewards/a/std": 0.1, "loss": 0.0,
                      "completions/min_length": 1.0, "tests_passed": 3.0})
    charts.append(1, {"eval_reward": 0.4, "eval_runtime": 2.0, "eval_tests_passed": 2.0, "eval_completions/mean_length": 5.0})
    front.take(charts._updates())
    shown = {c["title"]: [(s["role"], s["metric"]) for s in c["series"]] for c in front.meta["charts"]}
    assert shown == {
        "Reward": [("eval", "eval_reward"), ("main", "reward")],
        "KL to the reference": [],
        "Completion length": [("eval", "eval_completions/mean_length")],
        "tests_passed": [("eval", "eval_tests_passed"), ("main", "tests_passed")],
    }
    both = ["reward", "rewards/a/mean", "rewards/b/mean", "eval_rewards/a/mean", "eval_rewards/b/mean"]
    assert [s["label"] for s in series(CHARTS["reward"], both)] == ["a", "b", "a, evaluation", "b, evaluation", "mean"]
    assert not is_own("eval_loss") and is_own("logps/chosen") and len(charts.panels()[0].lines) >= 2


def test_own_charts_are_bounded():
    charts = LiveCharts()
    charts.append(1, {f"mine_{i}": 1.0 for i in range(300)})
    assert len(charts.charts) == 15 and len(charts._names()) <= 120


def test_panels_are_added_removed_and_kept_in_the_runs_folder(tmp_path):
    run = record("a", folder=tmp_path)
    charts, front = LiveCharts().attach(run), FrontEnd()
    charts.append(4, {"tests_passed": 1.0, "epoch": 0.5})
    charts.add("entropy").add("epoch").add(Chart("Mine", ("mine",), lines=(("mine/*", "*"),)))
    charts.remove("length").remove("tests_passed")
    front.take(charts._updates())
    titles = ["Reward", "KL to the reference", "Entropy", "epoch", "Mine"]
    assert [c["title"] for c in front.meta["charts"]] == titles and "length" in front.said["others"]
    again = LiveCharts().attach(record("a", folder=tmp_path))
    again.append(4, {"tests_passed": 1.0})
    assert [c.title for c in again.charts] == titles and again.charts[-1].lines == (("mine/*", "*"),)
    again.choose("all")
    assert "Completion length" not in [c.title for c in again.charts] and "Loss" in [c.title for c in again.charts]
    with pytest.raises(ValueError, match="metric='entrop'.*entropy"): charts.add("entrop")
    with pytest.raises(ValueError, match="panel='Rewrd'.*Reward"): charts.remove("Rewrd")
    (tmp_path / "panels.json").write_text("{broken")
    assert LiveCharts().attach(record("a", folder=tmp_path)).failures == 1


def test_another_set_of_charts_keeps_rows_and_marks():
    charts, front = LiveCharts(), FrontEnd()
    charts.append(1, {**VALUES, "loss": 0.5, "tests_passed": 1.0})
    charts.mark(1, "beta 0 → 0.04")
    charts.note("kl", "no KL: beta is 0")
    front.take(charts._updates())
    charts.choose("all")
    assert front.take(charts._updates()) and len(front.rows) == 1 and front.value(0, "loss") == 0.5
    assert front.meta["runs"][0]["marks"] == [[1, "beta 0 → 0.04", "change"]]
    assert [c["title"] for c in front.meta["charts"]] == [*(c.title for c in CHARTS.values()), "tests_passed"]
    assert front.meta["charts"][1]["empty"] == "no KL: beta is 0"


def test_what_the_page_chose_is_kept_and_drawn():
    charts = LiveCharts(mode="widget")
    charts.append(1, {"reward": 0.5})
    charts.widget._options = {"smooth": 0.5, "log": True, "x": "minutes", "raw": False}
    assert charts.options["smooth"] == 0.5 and charts.panels()[0].log and charts.panels()[0].along == "minutes"
    charts.widget.heard(charts.widget, {"kind": "add", "name": "loss"}, [])
    charts.widget.heard(charts.widget, {"kind": "remove", "name": "Reward"}, [])
    charts.widget.heard(charts.widget, {"kind": "remove", "name": "never shown"}, [])
    assert [c.title for c in charts.charts] == ["KL to the reference", "Completion length", "Loss"] and charts.failures == 1


# ---- pictures and words for those who do not see them

def test_a_saved_notebook_has_a_picture_that_code_hosts_show():
    charts = LiveCharts()
    charts.append(1, VALUES)
    charts.runs[0].name, charts.runs[0].total = "swift otter", 20
    charts.mark(1, "beta 0 → 0.04")
    bundle = bundle_of(charts)
    assert list(bundle) == ["text/html", "image/svg+xml", "text/plain"]
    picture = ET.fromstring(bundle["image/svg+xml"])
    words = " ".join(t.text for t in picture.iter("{http://www.w3.org/2000/svg}text"))
    assert "swift otter: step 1 of 20" in words and "a dashed upright line: a setting was changed" in words
    assert "My title" in charts.to_svg(title="My title")


def test_a_chart_says_its_latest_values():
    charts = LiveCharts()
    charts.append(7, VALUES)
    said_ = [p.says for p in charts.panels()]
    assert said_[0].startswith("Reward: mean 0.5 at step 7") and "mean 120 tokens at step 7" in said_[2]
    assert 'aria-label="Reward: mean 0.5' in charts.static_html()


def linear(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]


def light(colour): return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(colour)))


SEEN = { # what three kinds of colour blindness make of linear RGB (Machado and others, 2009, severity 1)
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, matrix):
    r, g, b = [min(max(sum(m * v for m, v in zip(row, linear(colour))), 0), 1) for row in matrix]
    x, y, z = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047, 0.2126 * r + 0.7152 * g + 0.0722 * b, (
        0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883
    x, y, z = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("kind", SEEN)
def test_lines_can_be_told_apart_by_everyone(kind):
    pairs = [(a, b) for i, a in enumerate(COLOURS) for b in COLOURS[:i]]
    assert min(math.dist(lab(a, SEEN[kind]), lab(b, SEEN[kind])) for a, b in pairs) >= 16.9
    assert len(set(THIN)) == len(THIN), "where the colour is the same, the dashes differ"


@pytest.mark.parametrize("ground", ["#ffffff", "#111111", "#16191d", "#1e1e1e"])
def test_every_stroke_can_be_seen_on_light_and_dark_pages(ground):
    for colour in (*COLOURS, *map(soft, COLOURS), svg.CHANGE):
        low, high = sorted((light(colour), light(ground)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour
