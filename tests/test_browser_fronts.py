"""The studio in Voila, started by a click, and charts that draw live in marimo: `make test-front-ends` brings both."""
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from importlib.util import find_spec

import pytest
from browser import FLAGS, available, chromium, free_port
from test_browser_studio import POINTS, SETUP, STUDIO, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900),
              pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]


def needs(name):
    "A mark that skips a test where a package is not installed."
    return pytest.mark.skipif(find_spec(name) is None, reason=f"there is no {name}: run it with `make test-front-ends`")


@contextlib.contextmanager
def served(folder, *command):
    "A page of a server over a folder, once it answers."
    from playwright.sync_api import sync_playwright
    port = free_port()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "XDG_CONFIG_HOME", "IPYTHONDIR")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(folder / name.lower()) for name in names}}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], env=env, cwd=folder, stdout=log, stderr=log)
        try:
            for _ in range(480):
                assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/static/none", timeout=5)
                except urllib.error.HTTPError: break # it answers
                except OSError: time.sleep(0.25)
                else: break
            with tempfile.TemporaryDirectory() as profile, sync_playwright() as p:
                context = p.chromium.launch_persistent_context(
                    profile, executable_path=chromium(), headless=True, args=FLAGS, viewport=dict(width=1280, height=1000)
                )
                context.set_default_timeout(240_000)
                context.pages[0].goto(f"http://127.0.0.1:{port}/")
                yield context.pages[0]
                context.close()
        finally:
            server.terminate()
            try: server.wait(15)
            except subprocess.TimeoutExpired: server.kill()


@needs("voila")
def test_a_run_in_voila(tmp_path):
    cells = [SETUP.replace("steps=120", "steps=20"), STUDIO.replace("max_steps=2000", "max_steps=200")]
    common = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    made = [dict(common, id=f"c{i}", source=source) for i, source in enumerate(cells)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (tmp_path / "a.ipynb").write_text(json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5)))
    with served(tmp_path, "voila", "a.ipynb", "--no-browser", "--Voila.ip=127.0.0.1") as page:
        u = Page(page, tmp_path)
        page.wait_for_selector(".gnb-studio .gnb-state")
        assert u.state() == "no run yet"
        u.go("Run")
        u.press("Start")
        u.wait_step(6)
        page.wait_for_function(POINTS + " > 4")
        u.press("Pause")
        u.wait_state("paused")
        u.press("Stop")
        u.wait_state("stopped")


MARIMO = [
    ("", """from grpo_nb.ground.events import Bus, RunFinished, StepLogged
from grpo_nb.ui.charts.charts import LiveCharts
from grpo_nb.ui.completions.completions import CompletionBrowser
bus = Bus()
charts = LiveCharts().attach(bus)""", "Bus, CompletionBrowser, RunFinished, StepLogged, bus, charts"),
    ("charts", "charts", ""), ("CompletionBrowser, bus", "browser = CompletionBrowser().attach(bus)\nbrowser", "browser"),
    ("RunFinished, StepLogged, bus", """import contextvars, threading, time
def train():
    for step in range(1, 41):
        time.sleep(0.5)
        bus.emit(StepLogged(step=step, metrics={"reward": 0.5 + step % 7 / 20, "reward_std": 0.2}))
    bus.emit(RunFinished(step=40, metrics={}))
threading.Thread(target=contextvars.copy_context().run, args=(train,)).start()""", ""),
]


@needs("marimo")
def test_charts_draw_live_in_marimo(tmp_path):
    cells = "".join(f"@app.cell\ndef _({takes}):\n{textwrap.indent(code, '    ')}\n    return ({gives}{',' * bool(gives)})\n"
                    for takes, code, gives in MARIMO)
    (tmp_path / "a.py").write_text(f"import marimo\napp = marimo.App()\n{cells}")
    with served(tmp_path, "marimo", "run", "a.py", "--headless", "--no-token", "--host=127.0.0.1") as page:
        page.locator(".grpo-nb .main-svg").first.wait_for() # in a shadow root, into which a selector looks and a script does not
        def step(): return int(page.locator(".grpo-nb-step").inner_text().removeprefix("step "))
        first = step()
        page.wait_for_timeout(3000)
        assert first < step() < 40
        page.locator(".grpo-nb-state", has_text="finished").wait_for()
        assert step() == 40 and page.get_by_text("no completions yet").count() == 1
