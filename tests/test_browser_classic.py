"""Charts and completions in the classic notebook with ipywidgets 7, which JupyterLab 4 cannot show.

It is the nearest to Colab that can be run here."""
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, version

import pytest
from browser import FLAGS, available, chromium, free_port


def why_not():
    "Why the test cannot run here; empty where it can."
    try: found = int(version("notebook").split(".")[0])
    except PackageNotFoundError: found = 0
    return available() or ("" if 0 < found < 7 else "there is no classic notebook: run it with `make test-oldest-notebook`")


pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(why_not()), reason=why_not() or "a classic notebook is there")]

CELLS = [
    """from grpo_nb.ground.events import Bus, CompletionsLogged, RunFinished, SettingChanged, StepLogged
from grpo_nb.ui.charts.charts import LiveCharts
from grpo_nb.ui.completions.completions import CompletionBrowser
bus = Bus()
charts = LiveCharts().attach(bus).show()""",
    "browser = CompletionBrowser().attach(bus)\nbrowser",
    """import contextvars, threading, time
def train():
    for step in range(1, 31):
        time.sleep(0.2)
        metrics = {"reward": 0.5 + step % 7 / 20, "reward_std": 0.2, "completion_length": 120.0 + step % 5}
        bus.emit(StepLogged(step=step, metrics=metrics))
        answers = [f"answer {step} <b>bold</b> {i}" for i in range(4)]
        bus.emit(CompletionsLogged(step=step, prompts=["What is 2+2?"] * 4, completions=answers,
                                   rewards={"a": [0.1 * i for i in range(4)]}, advantages=[i - 1.5 for i in range(4)]))
        if step == 20: bus.emit(SettingChanged(step=step, name="learning_rate", old=1e-5, new=5e-6))
    bus.emit(RunFinished(step=30, metrics={}))
threading.Thread(target=contextvars.copy_context().run, args=(train,)).start()""",
]


@contextlib.contextmanager
def classic_notebook(folder):
    "The address of a server of classic notebooks over a folder."
    port, home = free_port(), folder / ".lab"
    home.mkdir()
    env = {
        **os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1",
    }
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "notebook", "--no-browser", "--allow-root", f"--port={port}",
                "--port-retries=0", "--ip=127.0.0.1", "--NotebookApp.token=secret", f"--notebook-dir={folder}",
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            for _ in range(240):
                assert server.poll() is None, (home / "server.log").read_text()[-2000:]
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=secret", timeout=2).read()
                    break
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/notebooks/{{}}?token=secret"
        finally:
            server.terminate()
            try: server.wait(15)
            except subprocess.TimeoutExpired: server.kill()


def test_charts_and_completions(tmp_path, request):
    from playwright.sync_api import sync_playwright
    cells = [dict(cell_type="code", metadata={}, source=s, outputs=[], execution_count=None) for s in CELLS]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    (tmp_path / "live.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=4)))
    with classic_notebook(tmp_path) as address, tempfile.TemporaryDirectory() as profile, sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            profile, executable_path=chromium(), headless=True, args=FLAGS, viewport=dict(width=1280, height=1400)
        )
        page, errors = context.pages[0], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address.format("live.ipynb"))
        page.wait_for_function("window.Jupyter?.notebook?.kernel?.is_connected()", timeout=240_000)
        page.wait_for_timeout(2000)
        page.evaluate("Jupyter.notebook.execute_all_cells()")
        page.wait_for_selector(".grpo-nb .main-svg", timeout=240_000)
        step = "document.querySelector('.grpo-nb-step').textContent"
        page.wait_for_function(f"{step} && {step} !== 'step 30'", timeout=120_000) # live, not only at the end
        page.wait_for_function(f"{step} === 'step 30'", timeout=240_000)
        page.wait_for_function("document.querySelectorAll('.grpo-nb-flag[data-kind=change]').length === 2", timeout=120_000)
        page.wait_for_function(
            "[...document.querySelectorAll('.gnb-view .gnb-text')].some(e => e.textContent.includes('answer 30 <b>bold</b>'))",
            timeout=120_000,
        )
        assert page.locator(".gnb-view .gnb-card").count() == 4 and page.locator(".gnb-view .gnb-text b").count() == 0
        copies = page.locator(".gnb-copy") # of the charts and of the completions
        assert copies.count() == 2 and not any(copy.is_visible() for copy in copies.all()), "hidden while the widget is there"
        page.locator(".gnb-view select").nth(1).select_option(label="best")
        page.wait_for_function("document.querySelector('.gnb-view .gnb-card').textContent.includes('#4')", timeout=120_000)
        if shots := request.config.getoption("--shots"): page.screenshot(path=os.path.join(shots, "classic-notebook.png"))
        context.close()
        assert not errors
