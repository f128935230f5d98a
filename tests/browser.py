"""Drive a real JupyterLab or Notebook 7 in Chromium: start one on a free port, open a notebook, run all its cells, take a picture.

A helper of the tests marked `browser`, and of anybody who wants to look:

    with JupyterLab(tmp_path) as lab, lab.browser(width=1280) as page:
        lab.write("demo.ipynb", ["1 + 1"])
        lab.open(page, "demo.ipynb"); lab.run_all(page); lab.wait_idle(page)
        page.screenshot(path="demo.png")
"""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def chromium():
    "The path of an installed Chromium, or None."
    return next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def available():
    "Why no browser test can run here; an empty string where one can."
    if chromium() is None: return "no Chromium is installed (Debian: apt-get install chromium)"
    for name in ("jupyterlab", "playwright"):
        try: __import__(name)
        except ImportError: return f"{name} is not installed (pip install {name})"
    return ""


def free_port():
    "A port that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class JupyterLab:
    "A JupyterLab server over a folder of its own, with settings of its own; a context manager."
    module, page = "jupyterlab", "doc/tree" # what is started; where a notebook alone is shown
    own_errors = () # what a page of an empty notebook throws by itself
    def __init__(self, folder, # where notebooks lie; made if it is not there
                 dark=False): # the dark theme
        self.folder, self.dark, self.token = Path(folder), dark, uuid.uuid4().hex
        self.port, self.url, self.process = None, None, None

    def __enter__(self):
        home = self.folder / ".lab"
        settings = home / "settings" / "@jupyterlab"
        self._setting(
            settings / "apputils-extension/themes.jupyterlab-settings", theme="JupyterLab Dark" if self.dark else "JupyterLab Light"
        )
        self._setting(settings / "apputils-extension/notification.jupyterlab-settings", fetchNews="false", checkForUpdates=False)
        self._setting(settings / "notebook-extension/tracker.jupyterlab-settings", autoStartDefaultKernel=True)
        env = {
            **os.environ,
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "IPYTHONDIR": str(home / "ipython"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        for _ in range(3): # another process may take a free port before the server does
            self.port = free_port()
            self.url, self.log = f"http://127.0.0.1:{self.port}", open(self.folder / ".lab" / "server.log", "w")
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", self.module, "--no-browser", "--allow-root", f"--port={self.port}",
                    "--ServerApp.port_retries=0", "--ip=127.0.0.1", f"--IdentityProvider.token={self.token}",
                    f"--ServerApp.root_dir={self.folder}",
                ],
                env=env,
                stdout=self.log,
                stderr=subprocess.STDOUT,
            )
            if self._answers(): return self
            self.__exit__()
        raise RuntimeError(f"{self.module} did not start:\n" + (home / "server.log").read_text()[-2000:])

    def _answers(self):
        "Whether the server comes up: within three minutes, or not at all."
        for _ in range(720):
            with contextlib.suppress(OSError):
                return bool(urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=10).read())
            if self.process.poll() is not None: return False
            time.sleep(0.25)
        return False

    def __exit__(self, *_):
        self.process.terminate()
        try: self.process.wait(15)
        except subprocess.TimeoutExpired: self.process.kill()
        self.log.close()

    @staticmethod
    def _setting(path, **values):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def write(self, name, cells):
        "Write a notebook of code cells, given as text."
        def cell(i, source): return dict(cell_type="code", id=f"c{i}", metadata={}, source=source, outputs=[], execution_count=None)
        kernel = dict(
            kernelspec=dict(name="python3", display_name="Python 3", language="python"), language_info=dict(name="python")
        )
        path = self.folder / name
        path.write_text(
            json.dumps(dict(cells=[cell(i, s) for i, s in enumerate(cells)], metadata=kernel, nbformat=4, nbformat_minor=5))
        )
        return path

    @contextlib.contextmanager
    def browser(self, width=1280, height=900):
        "A page in a Chromium with a fresh profile."
        from playwright.sync_api import sync_playwright
        with tempfile.TemporaryDirectory() as profile, sync_playwright() as p:
            context = p.chromium.launch_persistent_context(profile, executable_path=chromium(), headless=True, args=FLAGS,
                                                           viewport=dict(width=width, height=height))
            context.set_default_timeout(120_000) # what waits for something fails late: a busy machine is eight times slower
            try: yield context.pages[0] if context.pages else context.new_page()
            finally: context.close()

    def errors(self, page):
        "A list that fills with what a page throws, without what the front end throws by itself."
        heard = []
        page.on("pageerror", lambda error: str(error) in self.own_errors or heard.append(str(error)))
        return heard

    def open(self, page, name):
        "Open a notebook alone (no side bars), with its kernel ready."
        page.goto(f"{self.url}/{self.page}/{name}?token={self.token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        for _ in range(720):
            accept = page.locator(".jp-Dialog .jp-mod-accept")
            if accept.count(): accept.first.click() # which kernel: the one proposed
            kernels = []
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/api/kernels?token={self.token}", timeout=10) as answer,
            ):
                kernels = json.load(answer) # a kernel that is just starting can make this an error 500
            if any(k["connections"] and k["execution_state"] == "idle" for k in kernels): break
            page.wait_for_timeout(250)
        page.wait_for_timeout(1000) # the front end has to hear of it too

    def run_all(self, page):
        "Run every cell; returns at once."
        self.menu(page, "Run", "Run All Cells")

    def save(self, page):
        "Save the notebook and wait until it is on disk."
        with page.expect_response(lambda r: "/api/contents/" in r.url and r.request.method == "PUT"):
            self.menu(page, "File", "Save Notebook")

    def menu(self, page, menu, item):
        "Choose an item of the menu bar by its label."
        page.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click()
        page.locator(".lm-Menu-item:not(.lm-mod-disabled)", has=page.get_by_text(item, exact=True)).first.click()

    def wait_idle(self, page, timeout_s=240):
        "Wait until the kernel has nothing to do and no cell waits."
        page.wait_for_timeout(400)
        page.wait_for_function("""() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'
            && ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))""",
            timeout=timeout_s * 1000)


class Notebook7(JupyterLab):
    "A server of Notebook 7, which is made of JupyterLab's parts and shows one notebook a page."
    module, page = "notebook", "notebooks"
    own_errors = ("Cannot read properties of undefined (reading 'schema')",)

    def wait_idle(self, page, timeout_s=240):
        page.wait_for_timeout(400)
        page.wait_for_function("[...document.querySelectorAll('.jp-InputPrompt')].every(p => !p.textContent.includes('*'))",
                               timeout=timeout_s * 1000)


def notebook_version():
    "The first number of the installed `notebook`; 0 where there is none."
    try: return int(version("notebook").split(".")[0])
    except PackageNotFoundError: return 0


def fronts():
    "The front ends as parameters of a test; Notebook 7 is skipped where it is not installed (`make test-front-ends` brings it)."
    lacking = pytest.mark.skipif(notebook_version() < 7, reason="there is no Notebook 7: run it with `make test-front-ends`")
    return [pytest.param(JupyterLab, id="lab"), pytest.param(Notebook7, id="notebook", marks=lacking)]
