"""What front ends need that cannot be run here: VS Code (ES modules, no requirejs, a picture beside the widget), marimo, none."""
import re
import time

import pytest

from grpo_nb.ui.charts.chart import CHARTS, is_own
from grpo_nb.ui.charts.charts import STATIC, LiveCharts
from grpo_nb.ui.completions.completions import CompletionBrowser
from grpo_nb.ui.parts.display import bundle_of
from grpo_nb.ui.parts.page import PATIENCE, Page

SCRIPTS = sorted(path for path in STATIC.glob("*.js") if not path.name.startswith("plotly"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_es_modules_that_ask_for_nothing(path):
    text = path.read_text("utf-8")
    assert re.search(r"^export default ", text, re.M) and not re.search(r"\b(require|requirejs|define)\s*\(", text)
    assert not re.search(r"^\s*import\s", text, re.M) and not re.search(r"https?://(?!www\.w3\.org)", text)
    assert not re.search(r"\b(Jupyter|IPython|JupyterLab)\.", text), "no front end is asked by its name"


def charts():
    "Charts of three steps."
    made = LiveCharts(mode="static")
    packing = {"packing/tokens": 10.0, "packing/efficiency": 1.0, "packing/packs": 1.0}
    for step in range(1, 4): made.append(step, {"reward": step / 4, **packing})
    return made


def test_a_picture_stands_beside_the_widget():
    bundle = bundle_of(charts())
    assert list(bundle) == ["text/html", "image/svg+xml", "text/plain"] and "<script" not in bundle["text/html"]
    assert bundle["image/svg+xml"].startswith("<svg") and "polyline" in bundle["text/html"]


class Studio(Page):
    "Stands for a page with buttons."
    in_code = "s.start()"
    def static_html(self): return "<b>a page</b>"
    def text(self): return "a page"


def test_marimo_is_given_an_anywidget_or_a_page_that_says_what_to_call():
    import anywidget
    assert isinstance(charts()._display_(), anywidget.AnyWidget)
    assert CompletionBrowser()._display_()._mime_()[0] == "text/html"
    kind, html = Studio()._display_()._mime_()
    assert kind == "text/html" and html.endswith("<b>a page</b>") and "In code: s.start()." in html


def test_charts_that_no_page_asks_for_say_what_is_missing():
    made = charts()
    assert made.notice() == ""
    made._widget, made._copy, made._shown = object(), object(), time.monotonic()
    assert made.notice() == "", "a page may still ask"
    before, made._shown = made._stamp(), made._shown - PATIENCE - 1
    assert "pip install jupyterlab_widgets" in made.static_html() and made._stamp() != before
    made._widget = None
    made.widget.owner()._asked({"kind": "ready"})
    assert made.notice() == "" and "jupyterlab_widgets" not in made.static_html()


def test_packing_is_not_among_the_main_charts():
    assert [c.title for c in charts().charts] == [CHARTS[n].title for n in ("reward", "kl", "length")]
    assert not is_own("packing/packs") and is_own("tests_passed")
    assert {"positions", "efficiency"} <= set(CHARTS)
