"""The charts in a real JupyterLab: they draw live with their marks, survive a reload, save files, leave a picture behind."""
import json

import pytest
from browser import JupyterLab, available

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]

SHOW = """from grpo_nb.ground.events import Bus, RunFinished, RunPaused, SettingChanged, StepLogged
from grpo_nb.ui.charts.charts import LiveCharts
bus = Bus()
charts = LiveCharts().attach(bus).show()"""
TRAIN = """import contextvars, threading, time
def metrics(step):
    return {"reward": 0.5 + step % 7 / 20, "reward_std": 0.2, "rewards/a/mean": 0.4, "rewards/b/mean": 0.1,
            "completion_length": 120.0 + step % 5, "completions/max_length": 256.0, "completions/clipped_ratio": 0.1}
def train():
    for step in range(1, SILENT + 1): charts.append(step, metrics(step))
    for step in range(SILENT + 1, SILENT + 61):
        time.sleep(0.1); bus.emit(StepLogged(step=step, metrics=metrics(step)))
        if step == SILENT + 20: bus.emit(SettingChanged(step=step, name="learning_rate", old=1e-5, new=5e-6))
        if step == SILENT + 30: bus.emit(RunPaused(step=step))
    bus.emit(RunFinished(step=SILENT + 60, metrics={}))
thread = threading.Thread(target=contextvars.copy_context().run, args=(train,)); thread.start()"""
POINTS = "els => els.map(e => (e.data ?? []).at(-1)?.x.length ?? 0)"


def step_shown(page): return int(page.inner_text(".grpo-nb-step").removeprefix("step ").replace(",", "") or 0)


def check_marks(page, step):
    "Every drawn chart has the change and the pause, and the pointer finds out what they are."
    page.wait_for_function("document.querySelectorAll('.grpo-nb-flag').length === 4", timeout=120_000) # two charts have lines
    assert page.eval_on_selector_all(".grpo-nb-plot", "els => els.map(e => (e.layout?.shapes ?? []).length)") == [2, 0, 2]
    tip = page.locator(".grpo-nb-flag[data-kind=change] .grpo-nb-tip").first
    assert not tip.is_visible()
    page.locator(".grpo-nb-flag[data-kind=change]").first.hover()
    assert tip.is_visible() and tip.inner_text() == f"step {step:,}: learning_rate 1e-5 → 5e-6"


def check_files(page, folder, steps):
    "The buttons save a picture, the numbers, and a page that draws by itself."
    for kind in ("png", "csv", "html"):
        with page.expect_download() as download: page.get_by_role("button", name=kind.upper(), exact=True).click()
        download.value.save_as(folder / f"saved.{kind}")
    assert (folder / "saved.png").read_bytes()[:4] == b"\x89PNG" and (folder / "saved.png").stat().st_size > 20_000
    lines = (folder / "saved.csv").read_text().splitlines()
    assert lines[0].startswith("step,reward") and len(lines) == steps + 1 and float(lines[1].split(",")[2]) == 0.2
    other = page.context.new_page()
    other.goto((folder / "saved.html").as_uri())
    other.wait_for_selector(".grpo-nb .main-svg", timeout=120_000)
    assert step_shown(other) == steps and other.get_by_role("button").all_inner_texts() == ["PNG", "CSV"]
    check_marks(other, steps - 40)
    other.close()


@pytest.fixture
def frames(request):
    "Sizes of the updates on the wire, by attaching to a page's web sockets."
    sizes = []
    def heard(frame):
        text = frame if isinstance(frame, bytes) else frame.encode()
        if b'"comm_msg"' in text and b'"kind": "add"' in text or b'"kind":"add"' in text: sizes.append(len(text))
    return sizes, lambda page: page.on("websocket", lambda ws: ws.on("framereceived", heard))


def a_picture_stays(folder):
    "Tomorrow, when no kernel knows this notebook's charts, the file still shows a picture of them."
    with JupyterLab(folder) as lab, lab.browser(width=700) as page:
        lab.open(page, "live.ipynb")
        page.wait_for_timeout(3000)
        assert page.locator(".grpo-nb-static svg").count() == 3 and page.locator(".grpo-nb-static").is_visible()
        assert page.locator(".grpo-nb-static polyline").count() > 4
        assert "learning_rate 1e-5 → 5e-6" in page.inner_text(".grpo-nb-static")
        assert page.locator(".grpo-nb-static title").count() == 4
        assert not page.get_by_text("Error displaying widget").is_visible()


@pytest.mark.parametrize("silent", [10, 10_000])
def test_charts_draw_live_reload_and_stay(tmp_path, frames, silent):
    sizes, listen = frames
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        listen(page)
        lab.write("live.ipynb", [SHOW, TRAIN.replace("SILENT", str(silent))])
        lab.open(page, "live.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".grpo-nb .main-svg", timeout=240_000)
        page.wait_for_timeout(1500)
        first = step_shown(page)
        page.wait_for_timeout(1500)
        second = step_shown(page)
        assert silent < first < second
        page.wait_for_function(
            "n => document.querySelector('.grpo-nb-step').textContent.replace(',', '') === 'step ' + n",
            arg=silent + 60,
            timeout=120_000,
        )
        cards = page.eval_on_selector_all(".grpo-nb-plot", POINTS)
        assert len(cards) == 3 and min(cards[0], cards[2]) >= min(silent, 900) and max(cards) <= 2100 and cards[1] == 0
        assert page.inner_text(".grpo-nb-card:nth-child(2) .grpo-nb-empty") == "not logged"
        assert not page.locator(".grpo-nb-static").is_visible(), "the picture is hidden while the widget is there"
        assert sizes and max(sizes) <= 1024, sizes
        check_marks(page, silent + 20)
        print(json.dumps({"points": silent, "updates": len(sizes), "bytes_mean": sum(sizes) / len(sizes), "bytes_max": max(sizes)}))
        lab.save(page)
        page.reload()
        page.wait_for_selector(".grpo-nb .main-svg", timeout=240_000)
        page.wait_for_timeout(1000)
        assert step_shown(page) == silent + 60 and page.locator(".grpo-nb").count() == 1
        check_marks(page, silent + 20)
        check_files(page, tmp_path, silent + 60)
        assert errors == []
    a_picture_stays(tmp_path)


def test_the_pointer_shows_the_same_step_in_all_charts_and_the_switches_switch(tmp_path):
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280) as page:
        fill = "for step in range(1, 51): charts.append(step, {'reward': step / 50, 'kl': 0.1 + step, 'completion_length': 9.0})"
        lab.write("hover.ipynb", [SHOW + "\n" + fill])
        lab.open(page, "hover.ipynb")
        lab.run_all(page)
        page.wait_for_function("document.querySelectorAll('.grpo-nb .main-svg').length >= 3", timeout=240_000)
        page.wait_for_timeout(1000)
        box = page.locator(".grpo-nb-plot").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_function(
            "document.querySelectorAll('.grpo-nb-plot .hoverlayer .spikeline, .grpo-nb-plot .hoverlayer .legend').length >= 3",
            timeout=120_000,
        )
        titles = page.eval_on_selector_all(
            ".grpo-nb-plot", "els => els.map(e => e.querySelector('.hoverlayer')?.textContent.match(/step \\d+/)?.[0])"
        )
        assert len(titles) == 3 and titles[0] and len(set(titles)) == 1
        kind = "els => els.map(e => e._fullLayout.yaxis.type)"
        traces = "els => els.map(e => e.data.length)"
        assert page.eval_on_selector_all(".grpo-nb-plot", kind) == ["linear"] * 3
        assert page.eval_on_selector_all(".grpo-nb-plot", traces) == [2, 2, 2]
        page.get_by_label("log scale").check()
        page.get_by_label("smooth").uncheck()
        page.wait_for_function(
            "[...document.querySelectorAll('.grpo-nb-plot')].every(e => e._fullLayout.yaxis.type === 'log' && e.data.length === 1)",
            timeout=120_000,
        )


def test_charts_that_have_no_row_yet_say_so(tmp_path):
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280) as page:
        lab.write("empty.ipynb", [SHOW])
        lab.open(page, "empty.ipynb")
        lab.run_all(page)
        page.wait_for_function("document.querySelectorAll('.grpo-nb-empty').length === 3", timeout=240_000)
        page.wait_for_timeout(1000)
        assert page.locator(".grpo-nb-empty").all_inner_texts() == ["waiting for the first step"] * 3
        assert not page.locator(".grpo-nb-static").is_visible()
