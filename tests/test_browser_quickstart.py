"""The quickstart in a real JupyterLab: charts move while it trains, other cells stay free, and it ends with what it promised."""
import json
from pathlib import Path

import pytest
from browser import JupyterLab, available

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1800),
              pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]
notebook = Path(__file__).resolve().parent.parent / "nbs/tutorials/quickstart.ipynb"


def step_shown(page): return int(page.inner_text(".grpo-nb-step").removeprefix("step ").replace(",", "") or 0)


def test_quickstart_draws_live(tmp_path, request):
    shots = Path(request.config.getoption("--shots") or tmp_path)
    cells = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280, height=1000) as page:
        lab.write("quickstart.ipynb", cells)
        lab.open(page, "quickstart.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".grpo-nb .main-svg", timeout=1_200_000)
        page.locator(".grpo-nb").scroll_into_view_if_needed()
        page.wait_for_function(
            "() => (document.querySelectorAll('.grpo-nb-plot')[0]?.data ?? []).at(-1)?.x.length > 20", timeout=600_000
        )
        first = step_shown(page)
        page.screenshot(path=shots / "quickstart_running.png")
        page.locator(".grpo-nb").screenshot(path=shots / "charts_running.png")
        page.wait_for_timeout(3000)
        assert 0 < first < step_shown(page) <= 100
        page.wait_for_function("() => document.querySelector('.grpo-nb-step')?.textContent === 'step 100'", timeout=240_000)
        page.wait_for_selector("text=/held-out accuracy: 0\\.\\d+ before, (0\\.9\\d+|1\\.0+) after 100 steps/", timeout=60_000)
        page.locator(".grpo-nb").scroll_into_view_if_needed()
        page.screenshot(path=shots / "quickstart_done.png")
