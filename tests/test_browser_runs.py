"""The page Runs in JupyterLab and Notebook 7: found, sorted and ticked, drawn over each other, saved, and kept in the file."""
import pytest
from browser import available, fronts
from runs_made import HOSTILE, append, log_of, make_run

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(available()), reason=available() or "a browser is there")]

WEIGHTS = {"correctness": 1.0, "short": 0.2}


@pytest.fixture
def folder(tmp_path):
    "Two finished runs, one that goes on in another process, and one that failed."
    made = tmp_path / "made"
    wrote = dict(completions=["1 2 3", *HOSTILE], weights=WEIGHTS)
    make_run(made, "calm-river-heron", correct=(32, 62), settings=dict(beta=0.0), **wrote)
    make_run(made, "late-moon-owl", correct=(31, 91), settings=dict(beta=0.04), seed=1, started=1.7901e9, **wrote)
    make_run(made, "goes-on", steps=5, total=400, state="running", alive=True, started=1.7902e9)
    make_run(made, "sad-red-crow", steps=7, state="failed", error="</script><script>window.owned = 1</script>", started=1.7903e9)
    return made


def ticked_in_the_page(page):
    "Search, sort and tick; every box and button has a name."
    page.get_by_label("find runs").fill("beta=0.04 owl")
    page.wait_for_function("() => document.querySelector('.gnb-runs-top [role=status]').textContent === '1 of 4 runs'")
    page.get_by_label("find runs").fill("")
    page.get_by_role("button", name="after").click()
    first = "document.querySelector('.gnb-runs tr:nth-child(2) td:nth-child(2)').textContent"
    page.wait_for_function(f"() => {first} === 'late-moon-owl'")
    assert page.locator(".gnb-runs th[aria-sort=descending]").inner_text().startswith("after")
    for name in ("calm-river-heron", "late-moon-owl"):
        page.get_by_label(f"draw {name}").check()
        page.wait_for_timeout(500)
    page.wait_for_function("() => document.querySelector('.gnb-view').innerText.includes('91.0% of 100 held-out questions')")


def a_theme_changes_behind(page):
    "Charts that are hidden while the theme changes have its ink when they are seen again."
    page.locator(".gnb-view .grpo-nb-plot .xtick text").first.wait_for()
    page.evaluate("""() => {
        document.querySelector('.gnb-view').style.display = 'none'
        document.querySelector('.gnb-view .grpo-nb').style.color = 'rgb(1, 2, 3)'
        document.body.dataset.jpThemeName = 'another'
    }""")
    page.wait_for_timeout(800)
    page.evaluate("document.querySelector('.gnb-view').style.display = ''")
    page.wait_for_function("""() => [...document.querySelectorAll('.gnb-view .grpo-nb-plot .xtick text')]
        .every(e => getComputedStyle(e).fill.replace('rgba', 'rgb').startsWith('rgb(1, 2, 3'))""", timeout=20_000)


def saved_files(page):
    "Report, metrics and completions are saved where the reader sits."
    with page.expect_download() as download: page.get_by_role("button", name="Report").click()
    assert download.value.suggested_filename == "calm-river-heron-late-moon-owl.html"
    page.get_by_label("completions of").select_option(label="late-moon-owl")
    with page.expect_download() as jsonl: page.get_by_role("button", name="Save JSONL").click()
    assert open(jsonl.value.path(), encoding="utf-8").read().count("\n") == 2 * 2 * (1 + len(HOSTILE))
    assert page.locator(".gnb-view .gnb-card").count() and page.evaluate("window.owned") is None
    return download.value.path()


def a_report_alone(page, path):
    "The report opens from a file, its charts can be hovered over, and nothing that a model wrote is run."
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"file://{path}")
    frame = page.frame_locator("iframe.gnb-frame")
    frame.locator(".main-svg").first.wait_for()
    assert page.evaluate("window.owned") is None and errors == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("front", fronts())
def test_runs_of_yesterday_and_of_another_process(tmp_path, folder, front):
    with front(tmp_path) as lab, lab.browser(width=1280, height=1000) as page:
        errors = lab.errors(page)
        lab.write("a.ipynb", ["import grpo_nb", "page = grpo_nb.runs('made').page()\npage"])
        lab.open(page, "a.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".gnb-runs-list td", timeout=240_000)
        lab.wait_idle(page)
        import random
        append(folder / "goes-on" / "metrics.jsonl", log_of(6, 0.6, random.Random(0), 1.7902e9))
        page.wait_for_function("() => document.querySelector('.gnb-runs').innerText.includes('6 of 400')", timeout=120_000)
        ticked_in_the_page(page)
        a_theme_changes_behind(page)
        report = (tmp_path / "report.html")
        report.write_bytes(open(saved_files(page), "rb").read())
        assert page.evaluate("(v => v.scrollWidth <= v.clientWidth + 1)(document.querySelector('.gnb-view'))")
        lab.save(page)
        assert errors == [] and page.evaluate("window.owned") is None
        a_report_alone(page, report)
    text = (tmp_path / "a.ipynb").read_text()
    assert "late-moon-owl" in text and "<script>window.owned" not in text
