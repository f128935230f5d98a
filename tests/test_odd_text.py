"""Text that may hold anything: every output takes it, is well formed, and shows it as text."""
import contextlib
import csv
import io
import json
import re
import tempfile
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from grpo_nb.advice.finding import Report
from grpo_nb.advice.live import Learning
from grpo_nb.ground.text import ODD, encodable, joins, plain, written
from grpo_nb.ground.events import CompletionsLogged, Finding, said, say
from grpo_nb.tasks.guard import RewardError
from grpo_nb.ui.charts.charts import LiveCharts
from grpo_nb.ui.completions.completions import CompletionBrowser
from grpo_nb.record.store import Store
from grpo_nb.ui.lab.lab import RewardLab
from grpo_nb.ui.panels.panels import HyperparameterPanel
from grpo_nb.ui.studio.examination import Examination

NASTY = ["\x1b[31mred\x1b[0m", "a\0b", "a\uffffb", "\u202egnp.exe", "\ud800", "a\udfffb", "<script>alert(1)</script>", "]]>",
         "&amp;", "=1+1", "@sum", "-2+3", "\r\n", "\x85", "\ufeff", "'\"", "{0}", "%s", "👩\u200d👩", "\u2028"]
letters = st.characters(codec=None) | st.sampled_from("\0\x1b\uffff\u202e\ud800<>&\"'=+-@\r\n")
texts = st.text(letters, max_size=12) | st.sampled_from(NASTY)


def charts(text):
    made = LiveCharts()
    made.append(1, {"reward": 0.5, f"rewards/{text}/mean": 1.0, text: 2.0})
    made.append(2, {"reward": 0.6, f"rewards/{text}/mean": 2.0, text: 3.0})
    made.mark(1, text)
    made.note("kl", text)
    return made


def browser(text):
    store = Store()
    store.add_event(CompletionsLogged(step=1, prompts=[text] * 2, completions=[text, "x" + text], rewards={text: [0.0, 1.0]},
                                      advantages=[-1.0, 1.0]))
    return CompletionBrowser(store)


def lab(text):
    def reward(completions, **columns): raise ValueError(text)
    reward.__name__ = "r" + text
    made = RewardLab([reward])
    made.score([text, "x"], prompts=[text, "y"])
    return made


def finding(text): return Finding(text, "error", text, text, {text: text})


def report(text): return Report([finding(text)], unreached=[text])


def examination(text):
    made = Examination(lambda: None, lambda change: None)
    made.report, made.problem = report(text), text
    return made


def panel(text):
    return HyperparameterPanel("m" + text, {"run_name": text}, rewards=["correctness"])


def file(write):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out")
        write(path)
        return path.read_text("utf-8")


def printed(do):
    with contextlib.redirect_stdout(io.StringIO()) as out: do()
    return out.getvalue()


def told(text):
    said.discard(written(text))
    return printed(lambda: say(text))


HTML = {
    "charts": lambda t: charts(t).static_html(),
    "charts' page": lambda t: file(lambda path: charts(t).to_html(path, title=t)),
    "browser": lambda t: browser(t).static_html(),
    "browser's page": lambda t: file(browser(t).to_html),
    "lab": lambda t: lab(t).static_html(),
    "scores": lambda t: lab(t).scores.to_html(),
    "report": lambda t: report(t).html,
    "learning": lambda t: Learning("no", t, None, ())._repr_html_(),
    "examination": lambda t: examination(t).static_html(),
    "panel": lambda t: panel(t).static_html(),
}
TEXT = {
    "charts": lambda t: charts(t).text(),
    "browser": lambda t: browser(t).text(),
    "lab": lambda t: lab(t).text(),
    "report": lambda t: str(report(t)),
    "examination": lambda t: examination(t).text(),
    "panel": lambda t: panel(t).text(),
    "reward's error": lambda t: str(RewardError(t, 0, t, t)),
    "said": told,
    "plain": plain,
}


class Tags(HTMLParser):
    "The names of the tags and attributes of a page."
    def __init__(self):
        super().__init__()
        self.found = set()
    def handle_starttag(self, tag, attributes): self.found |= {tag, *(name for name, _ in attributes if name.startswith("on"))}


LIVE = ("script", "img", "a", "iframe", "object", "style")


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


def odd(text): return [m[0] for m in ODD.finditer(text) if not joins(m)]


def nasty(test):
    "A property that holds for any text: for all of these at once, for those that stand alone, and for a few that are drawn."
    for text in ("".join(NASTY), "\ud800", "=1+1", ""): test = example(text)(test)
    return settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))(given(texts)(test))


@pytest.mark.parametrize("name", HTML)
def test_a_page_shows_it_as_text(name):
    known = tags(HTML[name]("x"))
    @nasty
    def check(text):
        page = HTML[name](text)
        page.encode("utf-8")
        assert not odd(page)
        assert not {tag for tag in tags(page) - known if tag[:2] == "on" or tag in LIVE}
    check()


@pytest.mark.parametrize("name", TEXT)
def test_a_terminal_gets_it_written(name):
    @nasty
    def check(text):
        shown = TEXT[name](text)
        shown.encode("utf-8")
        assert not odd(shown)
    check()


@nasty
def test_a_picture_is_always_well_formed(text):
    assert ET.fromstring(charts(text).to_svg()).tag.endswith("svg")
    assert ET.fromstring(file(charts(text).to_svg)).tag.endswith("svg")


@nasty
def test_tables_and_files(text):
    made = charts(text)
    rows = list(csv.reader(io.StringIO(made.to_csv())))
    assert rows[0] == ["step", "time", "seconds", "tokens", *map(encodable, made._seen)] or "\r" in text
    safe = next(csv.reader(io.StringIO(made.to_csv(formulas=False))))
    assert not any(re.match(r"\s*[=+\-@]", name) for name in safe)
    file(made.to_csv)
    for frame in (browser(text).to_frame(), lab(text).scores.to_frame()): frame.to_csv().encode("utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = browser(text).store.to_jsonl(Path(folder, "rows.jsonl"))
        assert [json.loads(line)["completion"] for line in path.read_text("utf-8").split("\n")[:-1]] == [text, "x" + text]
