"""The charts in a real JupyterLab: they draw live, survive a reload, and leave a picture where there is no kernel."""
import json

import pytest
from browser import JupyterLab, available

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]

SHOW = """from grpo_nb.events import Bus, RunFinished, StepLogged
from grpo_nb.ui.charts import LiveCharts
bus = Bus()
charts = LiveCharts().attach(bus).show()"""
TRAIN = """import contextvars, threading, time
def metrics(step): return {"reward": 0.5 + step % 7 / 20, "reward_std": 0.2, "rewards/a/mean": 0.4, "rewards/b/mean": 0.1, "completion_length": 120.0 + step % 5,
                           "completions/max_length": 256.0, "completions/clipped_ratio": 0.1}
def train():
    for step in range(1, SILENT + 1): charts.append(step, metrics(step))
    for step in range(SILENT + 1, SILENT + 61):
        time.sleep(0.1); bus.emit(StepLogged(step=step, metrics=metrics(step)))
    bus.emit(RunFinished(step=SILENT + 60, metrics={}))
thread = threading.Thread(target=contextvars.copy_context().run, args=(train,)); thread.start()"""
POINTS = "els => els.map(e => (e.data ?? []).at(-1)?.x.length ?? 0)"


def step_shown(page): return int(page.inner_text(".grpo-nb-step").removeprefix("step ").replace(",", "") or 0)


@pytest.fixture
def frames(request):
    "Sizes of the updates on the wire, by attaching to a page's web sockets."
    sizes = []
    def heard(frame):
        text = frame if isinstance(frame, bytes) else frame.encode()
        if b'"comm_msg"' in text and b'"kind": "add"' in text or b'"kind":"add"' in text: sizes.append(len(text))
    return sizes, lambda page: page.on("websocket", lambda ws: ws.on("framereceived", heard))


@pytest.mark.parametrize("silent", [10, 1000, 10_000])
def test_charts_draw_live_reload_and_stay(tmp_path, frames, silent):
    sizes, listen = frames
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        listen(page)
        lab.write("live.ipynb", [SHOW, TRAIN.replace("SILENT", str(silent))])
        lab.open(page, "live.ipynb"); lab.run_all(page)
        page.wait_for_selector(".grpo-nb .main-svg", timeout=60_000)
        page.wait_for_timeout(1500)
        first = step_shown(page); page.wait_for_timeout(1500); second = step_shown(page)
        assert silent < first < second
        page.wait_for_function("n => document.querySelector('.grpo-nb-step').textContent.replace(',', '') === 'step ' + n", arg=silent + 60, timeout=20_000)
        cards = page.eval_on_selector_all(".grpo-nb-plot", POINTS)
        assert len(cards) == 3 and min(cards[0], cards[2]) >= min(silent, 900) and max(cards) <= 2100 and cards[1] == 0
        assert page.inner_text(".grpo-nb-card:nth-child(2) .grpo-nb-empty") == "not logged"
        assert not page.locator(".grpo-nb-static").is_visible(), "the picture is hidden while the widget is there"
        assert sizes and max(sizes) <= 1024, sizes
        print(json.dumps({"points": silent, "updates": len(sizes), "bytes_mean": sum(sizes) / len(sizes), "bytes_max": max(sizes)}))
        lab.save(page)
        page.reload()
        page.wait_for_selector(".grpo-nb .main-svg", timeout=60_000)
        page.wait_for_timeout(1000)
        assert step_shown(page) == silent + 60 and page.locator(".grpo-nb").count() == 1
        assert errors == []
    with JupyterLab(tmp_path) as lab, lab.browser(width=700) as page: # tomorrow: no kernel knows this notebook's charts
        lab.open(page, "live.ipynb")
        page.wait_for_timeout(3000)
        assert page.locator(".grpo-nb-static svg").count() == 3 and page.locator(".grpo-nb-static").is_visible()
        assert page.locator(".grpo-nb-static polyline").count() > 4
        assert not page.get_by_text("Error displaying widget").is_visible()
