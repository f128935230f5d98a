"""Completions and the reward lab in a real JupyterLab: hostile text stays text, sliders and filters work, a copy stays."""
import os

import pytest
from browser import JupyterLab, available

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]

HOSTILE = r"""HOSTILE = [
    "<script>window.owned = 1</script>", "<img src=x onerror='window.owned = 1'>",
    "</pre></div></article><style>body{display:none}</style>", "</script><script>window.owned = 1</script>",
    "<svg onload='window.owned=1'><foreignObject><iframe srcdoc='<script>parent.owned=1</script>'>",
    "\x1b[31mred\x1b[0m \x00\x07\b", "\u202egnp.exe \u2066isolated \u200bzero",
    "# heading\n**bold** $x^2$ \\(y\\) [link](javascript:window.owned=1)",
    "W" * 100_000, "&lt;script&gt; &#60;b&#62; {{7*7}} ${window.owned=1} `x`", "<details open ontoggle='window.owned=1'>", ""]"""
STORE = """from grpo_nb.ground.events import Bus, CompletionsLogged
from grpo_nb.ui.completions.completions import CompletionBrowser
bus = Bus()
browser = CompletionBrowser(bus, interval=0.3)
def log(step):
    n = len(HOSTILE)
    bus.emit(CompletionsLogged(
        step=step, prompts=["<b>prompt</b> A"] * n + ["prompt B"] * 4,
        completions=HOSTILE + ["same", "same", f"word{step} end", "other"],
        rewards={"<i>correct</i>": [float(i % 3 == 0) for i in range(n)] + [1.0] * 4, "format": [-0.5] * n + [0.0] * 4},
        advantages=[0.5] * n + [0.0] * 4,
        lengths=[10 * i + 1 for i in range(n)] + [5] * 4, cut_off=[i == 8 for i in range(n)] + [False] * 4))
for step in range(1, 6): log(step)"""
CARDS = "els => els.length"


def choose(page, name, value):
    "Choose an entry of one of the browser's drop-downs, by its name and the entry's label."
    page.locator(".gnb-view").get_by_label(name, exact=True).select_option(label=value)
    page.wait_for_timeout(500)


def nothing_is_run(page):
    "Hostile text stands in the cards as text: no tag, no formula, no link, and nothing wider than the view."
    assert page.evaluate("window.owned") is None and page.locator(".jp-Notebook").is_visible()
    texts = page.locator(".gnb-view pre.gnb-text").all_inner_texts()
    assert any("<script>window.owned = 1</script>" in t for t in texts) and any("onerror=" in t for t in texts)
    for tag in ("script", "img", "iframe", "svg", "a"):
        assert page.locator(f".gnb-view .gnb-card {tag}").count() == 0, tag
    assert page.locator(".gnb-view .gnb-card b").count() == page.locator(".gnb-view .gnb-head b").count()
    assert page.locator(".gnb-view mjx-container, .gnb-view .MathJax").count() == 0
    assert page.evaluate("document.querySelector('.gnb-view').scrollWidth <= document.querySelector('.gnb-view').clientWidth + 1")


def a_long_text_opens(page):
    "A long completion is folded until it is asked for."
    long = page.locator(".gnb-view .gnb-card", has_text="WWWW").first
    assert long.bounding_box()["height"] < 600
    long.locator("summary").click()
    assert long.bounding_box()["height"] > 2000


def prompts_and_filters_choose(page):
    "One prompt, another step beside it, and each filter."
    choose(page, "prompt", "2 · prompt B")
    assert page.locator(".gnb-view .gnb-card").count() == 4
    choose(page, "beside", "step 2")
    assert page.locator(".gnb-view ins").all_inner_texts() == ["word6"]
    assert page.locator(".gnb-view del").all_inner_texts() == ["word2"]
    choose(page, "beside", "no comparison")
    choose(page, "prompt", "all prompts")
    for show, cards in {"zero spread": 4, "cut off": 1, "duplicates": 2}.items():
        choose(page, "show", show)
        assert page.locator(".gnb-view .gnb-card").count() == cards, show
    choose(page, "show", "best")
    assert page.locator(".gnb-view .gnb-card .gnb-head b").first.inner_text() == "1"


def search_and_steps_work(page):
    "A search marks what it finds; a button goes to an earlier step; what is not known is said; a click saves."
    search = page.locator(".gnb-view input[type=text]")
    search.fill("ISOLATED")
    search.press("Enter")
    page.wait_for_timeout(500)
    assert page.locator(".gnb-view .gnb-card").count() == 1 and page.locator(".gnb-view mark").first.inner_text() == "isolated"
    search.fill("")
    search.press("Enter")
    choose(page, "show", "whole groups")
    for _ in range(3):
        page.get_by_role("button", name="‹").click()
        page.wait_for_timeout(400)
    assert page.locator(".gnb-view .gnb-title .gnb-muted").first.inner_text() == "step 3"
    choose(page, "as", "token log-probs")
    notes = page.locator(".gnb-view .gnb-note")
    assert "not known" in notes.nth(1).inner_text() + notes.nth(2).inner_text()
    with page.expect_download() as saved: page.get_by_role("button", name="Save CSV").click()
    assert "word3 end" in open(saved.value.path(), encoding="utf-8").read()


def a_copy_stays(folder):
    "Tomorrow, when no kernel knows the widget, the file still shows cards, and still runs nothing."
    assert os.path.getsize(folder / "a.ipynb") < 400_000
    with JupyterLab(folder) as lab, lab.browser(width=700) as page:
        lab.open(page, "a.ipynb")
        page.wait_for_selector(".gnb-copy .gnb-card", timeout=120_000)
        assert page.locator(".gnb-copy").is_visible() and page.evaluate("window.owned") is None
        assert not page.get_by_text("Error displaying widget").is_visible()
        assert page.locator(".gnb-copy mjx-container").count() == 0


def test_hostile_completions_are_only_text(tmp_path):
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280, height=1000) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        lab.write("a.ipynb", [HOSTILE + "\n" + STORE, "browser", "log(6)"])
        lab.open(page, "a.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".gnb-view .gnb-card", timeout=240_000)
        lab.wait_idle(page)
        # it follows the run
        page.wait_for_function("() => document.querySelector('.gnb-view .gnb-muted').textContent === 'step 6'", timeout=120_000)
        nothing_is_run(page)
        a_long_text_opens(page)
        assert not page.locator(".gnb-copy").first.is_visible(), "the copy is hidden while the widget is there"
        prompts_and_filters_choose(page)
        search_and_steps_work(page)
        lab.save(page)
        assert errors == [] and page.evaluate("window.owned") is None
    a_copy_stays(tmp_path)


LAB = """from grpo_nb import rewards
from grpo_nb.ui.lab.lab import RewardLab
dataset = [{"prompt": f"Sort the digits: {n}", "answer": "".join(sorted(str(n)))} for n in (3141, 2718, 1618, 5772)]
def contains_answer(completions, answer, **columns): return [float(a in c) for a, c in zip(answer, completions)]
def brevity(completions, **columns): return [max(0.0, 1 - len(c) / 200) for c in completions]
def brittle(completions, **columns): return [1.0 / len(c.split()) for c in completions]
lab = RewardLab({contains_answer: 1.0, rewards.format_tags: 0.5, brevity: 0.2, brittle: 0.1}, dataset)"""
TYPED = """<think>
The digits are 3, 1, 4 and 1.
</think>
<answer>1134</answer>
---
The answer is 1134.
---
4311
---
I do not know, <img src=x onerror='window.owned = 1'> sorry. It may be 1134 or 4311.
---
<script>window.owned = 1</script>
---
"""


def test_the_reward_lab(tmp_path):
    with JupyterLab(tmp_path) as lab, lab.browser(width=1280, height=1000) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        lab.write(
            "lab.ipynb",
            [LAB, "lab", "def brittle(completions, **columns): return [1.0 / max(1, len(c.split())) for c in completions]"],
        )
        lab.open(page, "lab.ipynb")
        for _ in range(2): page.keyboard.press("Shift+Enter")
        page.wait_for_selector(".gnb-view textarea", timeout=240_000)
        lab.wait_idle(page)
        page.locator(".gnb-view textarea").fill(TYPED)
        page.locator(".gnb-view").get_by_text("Score", exact=True).click()
        page.wait_for_selector(".gnb-view .gnb-even", timeout=120_000)
        assert "ZeroDivisionError" in page.inner_text(".gnb-view")
        assert "<script>window.owned = 1</script>" in page.inner_text(".gnb-view")
        assert page.evaluate("window.owned") is None and page.locator(".gnb-view img, .gnb-view script").count() == 0
        page.keyboard.press("Escape")
        lab.run_all(page) # the last cell defines `brittle` anew
        page.wait_for_selector(".gnb-view textarea", timeout=120_000)
        lab.wait_idle(page)
        page.locator(".gnb-view textarea").fill(TYPED)
        page.locator(".gnb-view").get_by_text("Score", exact=True).click()
        page.wait_for_function(
            "() => document.querySelector('.gnb-view').innerText.includes('brittle was defined anew')", timeout=120_000
        )
        assert "ZeroDivisionError" not in page.inner_text(".gnb-view")
        page.locator(".gnb-view").get_by_text("Probe", exact=True).click()
        page.wait_for_selector(".gnb-view .gnb-dot", timeout=120_000)
        assert "every model will find this" in page.inner_text(".gnb-view") or "outweigh" in page.inner_text(".gnb-view")
        assert errors == []
