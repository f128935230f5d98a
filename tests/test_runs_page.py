"""The page Runs, the report and their commands: what became of runs is told as it is, and hostile text stays text."""
import csv
import io
import json
import re
import time
from html import unescape

import pytest
from runs_made import HOSTILE, log_of, make_run

from grpo_nb.app import cli
from grpo_nb.record.files import append, write_json
from grpo_nb.record.runs import runs
from grpo_nb.ui.runs.beside import accuracies_html, differing, settings_html, verdict_of
from grpo_nb.ui.runs.page import RunsPage
from grpo_nb.ui.runs.report import metrics_png, report, report_html
from grpo_nb.ui.runs.table import Row, fits, in_order, row_of, table_html

TEXTS = ["The answer is 123", "123", "3 2 1", "I do not know"]
WEIGHTS = {"correctness": 1.0, "short": 0.2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "Runs that no test changes: two finished, one killed, one failed."
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "calm-river-heron", correct=(32, 62), settings=dict(beta=0.0, learning_rate=1e-5), completions=TEXTS,
             tags=["baseline"], weights=WEIGHTS, started=1.79e9)
    make_run(folder, "late-moon-owl", correct=(31, 91), settings=dict(beta=0.0, learning_rate=1e-4), completions=TEXTS, seed=1,
             weights=WEIGHTS, started=1.7901e9)
    make_run(folder, "new-oak-lynx", steps=12, total=40, state="running", started=1.7902e9, note="the battery")
    make_run(folder, "sad-red-crow", steps=7, total=40, state="failed", error="NameError: name 'answers' is not defined",
             started=1.7903e9)
    return folder


# ---- the list -------------------------------------------------------------------------------------------------------------

def test_a_row_says_what_became_of_a_run(kept):
    rows = {r.name: row_of(r) for r in runs(kept)}
    heron, lynx, crow = rows["calm-river-heron"], rows["new-oak-lynx"], rows["sad-red-crow"]
    assert (heron.state, heron.step, heron.total, heron.before["correct"], heron.after["correct"]) == ("finished", 40, 40, 32, 62)
    assert heron.tags == ("baseline",) and heron.seconds == 40 and 0.3 < heron.reward < 0.9
    assert (lynx.state, lynx.step, lynx.total, lynx.before, lynx.note) == ("killed", 12, 40, None, "the battery")
    assert crow.state == "failed" and "answers" in crow.error


def test_a_record_that_cannot_be_read_hides_no_other():
    class Broken:
        name = "gone"
        def __getattr__(self, name): raise OSError("the drive is gone")
    assert row_of(Broken()) == Row("gone")
    assert "gone" in table_html([row_of(Broken())])


@pytest.mark.parametrize("sort, down, names", [
    ("started", None, "crow lynx owl heron"), ("name", None, "heron owl lynx crow"), ("after", None, "owl heron crow lynx"),
    ("after", False, "heron owl crow lynx"), ("steps", False, "crow lynx owl heron"), ("tags", None, "heron crow lynx owl"),
])
def test_what_is_not_known_comes_last(kept, sort, down, names):
    rows = in_order([row_of(r) for r in runs(kept)], sort, down)
    assert [r.name.split("-")[-1] for r in rows] == names.split()


@pytest.mark.parametrize("find, n", [
    ("", 4), ("OWL", 1), ("finished baseline", 1), ("learning_rate=0.0001", 1), ("battery", 1), ("owl baseline", 0),
])
def test_a_search_is_words_that_all_occur(kept, find, n):
    assert sum(fits(row_of(r), find) for r in runs(kept)) == n


def test_only_settings_that_differ(kept):
    heron, owl = runs(kept)["calm-river-heron"], runs(kept)["late-moon-owl"]
    assert differing([heron, owl]) == {"learning_rate": [1e-5, 1e-4], "seed": [0, 1]}
    assert "no setting differs" in settings_html([heron, heron]) and settings_html([heron]) == ""
    assert "62 of 100" in accuracies_html([heron, owl]) and "Not measured" in accuracies_html([runs(kept)["sad-red-crow"]])


@pytest.mark.parametrize("name, words", [
    ("sad-red-crow", "The run failed: NameError: name 'answers' is not defined. Ended after"),
    ("new-oak-lynx", "The process was killed at step 12. Ended after"), ("late-moon-owl", "better beyond chance"),
])
def test_the_verdict_says_how_a_run_ended(kept, name, words): assert words in verdict_of(runs(kept)[name])


# ---- the page -------------------------------------------------------------------------------------------------------------

def test_the_page_draws_and_compares_what_is_ticked(kept):
    page = RunsPage(kept)
    assert "sad-red-crow" in page.text() and "<svg" not in page.static_html()
    page.widget
    page.list.ticked = [page._id("calm-river-heron"), page._id("late-moon-owl")] # as the page does
    assert [r.name for r in page.chosen] == ["calm-river-heron", "late-moon-owl"] and len(set(page.list.colours.values())) == 2
    assert len(page._form["charts"].children) == 1 and "better beyond chance" in page._form["said"].value
    assert "learning_rate" in page._form["beside"].value and page._form["edit"].layout.display == "none"
    page._form["whose"].value = page.ticked[1]
    assert page.browser.others.keys() == {"calm-river-heron"} and page._form["completions"].children
    shown = page.static_html()
    assert "<svg" in shown and "learning_rate" in shown and "<script" not in shown
    page.tick()
    assert page.chosen == [] and page._form["charts"].children == () and page.failures == 0
    with pytest.raises(KeyError, match="'late-moon-owl'"): page.tick("late-moon-ow")
    page.close()


def test_a_run_that_goes_on_is_followed_by_its_new_lines(tmp_path):
    path = make_run(tmp_path, "now", steps=30, total=60, state="running", alive=True)
    page = RunsPage(tmp_path, interval=0.05)
    page.widget
    page.tick("now")
    record = page.chosen[0]
    assert page.rows[page.ticked[0]].state == "running" and "goes on at step 30 of 60" in page._form["said"].value
    import random
    read = []
    lines = record._lines["metrics.jsonl"]
    taking = lines._take
    lines._take = lambda line: (read.append(line), taking(line))
    append(path / "metrics.jsonl", log_of(31, 0.6, random.Random(0), 1.79e9))
    make_run(tmp_path, "another", steps=3)
    for _ in range(600):
        if len(page.list.rows) == 2 and "goes on at step 31" in page._form["said"].value: break
        time.sleep(0.05)
    assert {r["cells"][2] for r in page.list.rows} == {"31 of 60", "3 of 3"}
    assert len(read) == 1 and page.chosen[0] is record, "a look reads what is new, and nothing twice"
    assert "goes on at step 31" in page._form["said"].value and page.failures == 0
    assert page._later._timer is not None
    page._seen -= 1000
    for _ in range(600):
        if page._later._timer is None: break
        time.sleep(0.05)
    assert page._later._timer is None, "nobody looks any more"
    page._sign()
    assert page._later._timer is not None
    page.close()


def test_the_timer_ends_with_the_page(tmp_path):
    make_run(tmp_path, "now", steps=3, total=60, state="running", alive=True)
    page = RunsPage(tmp_path, interval=0.05)
    page.widget
    page.close()
    for _ in range(200):
        if page._later._timer is None: break
        time.sleep(0.05)
    page._sign()
    assert page._later._timer is None


def test_tags_and_notes_are_kept(tmp_path):
    make_run(tmp_path, "a", tags=["old"])
    page = RunsPage(tmp_path)
    page.widget
    page.tick("a")
    assert page._form["tags"].value == "old"
    page._form["tags"].value = "best, to  repeat ,"
    page._form["note"].value = "with <b>warmup</b>"
    again = runs(tmp_path)["a"]
    assert again.tags == ["best", "to repeat"] and again.note == "with <b>warmup</b>"
    assert page.list.rows[0]["cells"][6:8] == ["best, to repeat", "with <b>warmup</b>"]
    page._form["tags"].value = "x" * 500
    assert "500 characters" in page._form["asked"].value and runs(tmp_path)["a"].tags == ["best", "to repeat"]
    page.close()


def test_deleting_asks_and_spares_what_goes_on_and_what_others_wrote(tmp_path):
    for name in ("a", "b"): make_run(tmp_path, name)
    make_run(tmp_path, "now", state="running", alive=True)
    (tmp_path / "a" / "checkpoint-40").mkdir()
    page = RunsPage(tmp_path)
    page.widget
    page.tick("a", "now")
    page._ask()
    assert "now goes on" in page._form["asked"].value and page._form["yes"].layout.display == "none"
    page.tick("a")
    page._ask()
    assert "Delete a?" in page._form["asked"].value and page._form["yes"].layout.display == ""
    page._answered(False)
    assert (tmp_path / "a" / "run.json").is_file()
    page._ask()
    page._answered(True)
    assert not (tmp_path / "a" / "run.json").exists() and (tmp_path / "a" / "checkpoint-40").is_dir()
    assert sorted(r["name"] for r in page.list.rows) == ["b", "now"] and page.ticked == []
    page.close()


def test_a_folder_that_goes_away_is_no_end(tmp_path):
    path = make_run(tmp_path / "runs", "a")
    page = RunsPage(tmp_path / "runs")
    page.widget
    page.tick("a")
    for file in sorted(path.rglob("*"), reverse=True): file.rmdir() if file.is_dir() else file.unlink()
    page.refresh()
    assert page.ticked == [] or page.chosen
    with pytest.raises(NotADirectoryError, match="does not exist"): RunsPage(tmp_path / "nope")
    with pytest.raises(ValueError, match="interval=0"): RunsPage(tmp_path, interval=0)
    with pytest.raises(ValueError, match="'reward'"): RunsPage(tmp_path, charts=["rewrd"])
    page.close()


# ---- the report -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    path = make_run(folder, "a", completions=HOSTILE, settings={"model": "</script><script>window.owned = 1</script>"},
                    correct=(1, 2), error="<img src=x onerror='window.owned=1'>", state="failed")
    write_json(path / "notes.json", dict(name="</title><script>window.owned = 1</script>", note="\x1b[31m\u202e", tags=["<i>"]))
    make_run(folder, "b", completions=HOSTILE, seed=1)
    return folder


@pytest.mark.parametrize("interactive", [False, True], ids=["static", "interactive"])
def test_hostile_text_stays_text(hostile, interactive):
    page = report_html(runs(hostile), interactive=interactive)
    outside = re.sub(r'srcdoc="[^"]*"', "", page)
    assert "<script" not in outside and "<img" not in outside and "\x1b" not in page and "\u202e" not in page
    assert "&lt;/script&gt;&lt;script&gt;window.owned" in outside and "U+202E" in outside
    assert len(outside) < 500_000, "a huge text has no room for all of it"
    frames = re.findall(r'srcdoc="([^"]*)"', page)
    assert len(frames) == interactive and "default-src 'none'" in page
    for frame in map(unescape, frames): assert "<script>window.owned" not in frame and "</title><script" not in frame
    if not interactive: assert "script-src 'none'" in page


def test_a_report_holds_what_is_asked_for(kept, tmp_path):
    both = [runs(kept)[n] for n in ("calm-river-heron", "late-moon-owl")]
    text = report(both, tmp_path / "r.html", "Two runs", interactive=False).read_text()
    for part in ("<h1>Two runs</h1>", "better beyond chance", "91 of 100", "learning_rate", "settings.yaml", "The answer is 123",
                 "<svg"):
        assert part in text, part
    assert "× 0.2" in text and ">1.2</b>" in text, "totals as they were made"
    picked = report_html(both, picked=[("late-moon-owl", 40, 1)], interactive=False)
    assert picked.count("gnb-card") == 4 + text[:text.index("<body>")].count("gnb-card") and "Sort 9 8 7" in picked
    with pytest.raises(ValueError, match="at least one"): report_html([])
    assert report_html([runs(kept)["sad-red-crow"]], interactive=False)


def test_a_table_of_all_metrics(kept):
    table = list(csv.DictReader(io.StringIO(runs(kept).to_csv())))
    assert len(table) == 40 + 40 + 12 + 7 and {row["run"] for row in table} == set(runs(kept).names)
    assert table[-1]["step"] == "40" and table[-1]["seconds"] == "40.0" and float(table[-1]["tokens"]) == 40 * 640


def test_a_picture_says_what_it_needs(kept, tmp_path):
    try: import resvg_py # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="resvg-py"): metrics_png(runs(kept), tmp_path / "a.png")
    else: assert metrics_png(runs(kept), tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


# ---- the commands ---------------------------------------------------------------------------------------------------------

def call(capsys, *argv):
    try: code = cli.main(list(map(str, argv)))
    except SystemExit as end: code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_in_a_terminal(kept, capsys):
    code, out, err = call(capsys, "runs", kept)
    assert code == 0 and err == "" and out.splitlines()[1].startswith("sad-red-crow") and len(out.splitlines()) == 5
    code, out, _ = call(capsys, "runs", kept, "--find", "finished", "--sort", "reward", "--json")
    rows = list(map(json.loads, out.splitlines()))
    assert {r["name"] for r in rows} == {"calm-river-heron", "late-moon-owl"} and {r["after"] for r in rows} == {0.62, 0.91}


def test_view_and_export(kept, capsys, tmp_path, monkeypatch):
    import webbrowser
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    code, out, _ = call(capsys, "view", "late-moon-owl", "--folder", kept, "--output", tmp_path / "v.html")
    assert code == 0 and opened == [(tmp_path / "v.html").as_uri()] and "late-moon-owl" in (tmp_path / "v.html").read_text()
    assert call(capsys, "view", kept / "late-moon-owl", "--no-open")[0] == 0 and len(opened) == 1
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "export", "late-moon-owl", "--folder", kept, "--csv", "--html", "x.html")
    assert code == 0 and out.split() == [str(tmp_path / "late-moon-owl.csv"), str(tmp_path / "x.html")]
    assert (tmp_path / "late-moon-owl.csv").read_text().count("\n") == 41


@pytest.mark.parametrize("argv, words", [
    (["runs", "nope"], ["'nope'", "does not exist"]), (["runs", "{}", "--sort", "rewrd"], ["'rewrd'", "'reward'"]),
    (["view", "late-moon-ow", "--folder", "{}"], ["Did you mean 'late-moon-owl'?"]),
    (["export", "late-moon-owl", "--folder", "{}"], ["--csv"]),
    (["export", "x", "--csv", "--folder", "{}"], ["'x'"]), (["view"], ["RUN"]),
], ids=lambda v: " ".join(v) if v[0] in ("runs", "view", "export") else "")
def test_wrong_names_are_one_line(kept, capsys, argv, words):
    code, out, err = call(capsys, *[a.format(kept) for a in argv])
    assert code == 2 and out == "" and err.count("\n") == 1, err
    for word in words: assert word in err


def test_commands_about_runs_load_no_model(kept, monkeypatch):
    "A list is there at once: it loads neither torch nor TRL, so a record knows the file of rewards by its name alone."
    import subprocess
    import sys
    code = ("import sys; from grpo_nb.app.cli import main\n"
            f"main(['runs', {str(kept)!r}])\nprint([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    from grpo_nb.recipe.trl import MODULE
    from grpo_nb.record.record import OWN
    assert f"{MODULE}.py" in OWN


def test_an_empty_page_says_so(tmp_path):
    page = RunsPage(tmp_path)
    assert "no runs" in page.static_html() and "no runs" in page.text()
    page.widget
    with pytest.raises(ValueError, match="tick at least one"): page.file_of("csv")
    page.close()
