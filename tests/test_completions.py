"""Records, archive, cards and browser of completions: bounds, TRL's files, escaping, filters, failures that do not reach a run."""
import csv
import html
import io
import json
import re
import threading
import time
from array import array
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from grpo_nb.ground.events import Bus, CompletionsLogged, RunFinished, said
from grpo_nb.tasks.tiny import make_tokenizer
from grpo_nb.record.archive import Spill, groups_of_rows, read, rows
from grpo_nb.ui.parts.cards import card, difference, folded, group_html, pieces, tokens_html, visible
from grpo_nb.ui.completions.completions import FILTERS, CompletionBrowser, select
from grpo_nb.record.store import Group, Sample, Store, as_text, make_groups

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre></div><style>*{display:none}</style>",
    "\x1b[31mred\x1b[0m\x00\x07", "\u202eexe\u2066 \u200b", "**bold** $x$", "W" * 100_000,
    "\"' onmouseover=alert(1) x='", "&lt;b&gt;", "", "\ud800 lone", "a\u2028b", "\U000e0041tag", "</details></summary>",
]
ALLOWED = {"div", "span", "pre", "details", "summary", "b", "i", "mark", "ins", "del", "style"}
ATTRIBUTES = {"class", "title", "style", "dir"}


class Parser(HTMLParser):
    "What a browser would make of a page: tags, attributes and text; fails for what we never write."
    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.text, self.open = [], []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert tag in ALLOWED, tag
        assert {k for k, _ in attributes} <= ATTRIBUTES, attributes
        self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): raise AssertionError(data)
    def unknown_decl(self, data): raise AssertionError(data)


def event(step, prompts=("a", "b"), size=4, **more):
    n = len(prompts) * size
    return CompletionsLogged(
        step=step,
        prompts=[p for p in prompts for _ in range(size)],
        completions=[f"step {step} text {i}" for i in range(n)],
        rewards={"right": [float(i % 2) for i in range(n)], "short": [None if i == 0 else -0.5 for i in range(n)]},
        advantages=[0.5 - i % 2 for i in range(n)],
        **more,
    )


# ---- the store ------------------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4), st.integers(0, 3000)), max_size=120),
    st.integers(1, 12), st.integers(0, 12), st.integers(2_000, 60_000),
)
def test_the_store_stays_within_its_bounds(logs, latest, more, max_bytes):
    store = Store(steps=latest + more, latest=latest, max_bytes=max_bytes)
    for step, n, length in logs:
        store.add(make_groups(step, ["p"] * n, ["x" * length] * n, {"r": [1.0] * n}, ids=[[1] * 50] * n))
        assert len(store) <= latest + more and store.bytes == sum(store._sizes.values())
        assert store.bytes <= max_bytes or len(store) == 1
        if max(n for _, n, _ in logs) * 1500 < max_bytes: assert store.bytes <= max_bytes
    if logs: assert store.steps == sorted(set(store.steps)) and store.seen == sum(n for _, n, _ in logs)


def test_ten_thousand_steps_keep_the_latest_and_an_even_selection():
    store = Store(steps=100, latest=30, max_bytes=10_000_000)
    for step in range(1, 10_001): store.add(make_groups(step, ["p"], ["x"], {"r": [1.0]}))
    assert store.steps[0] == 1 and store.steps[-30:] == list(range(9971, 10_001)) and len(store) == 100
    old = store.steps[:-30]
    gaps = [b - a for a, b in zip(old, old[1:])]
    assert max(gaps) <= 4 * 9970 / len(old), gaps
    assert "100 of 10,000 steps" in store.notice()


def test_large_steps_lose_token_data_then_text_and_say_so():
    store = Store(steps=10, latest=5, max_bytes=500_000)
    for step in range(4):
        store.add(make_groups(step, ["p"] * 8, ["x" * 8000] * 8, {}, ids=[list(range(2000))] * 8, logps=[[-1.0] * 2000] * 8))
    assert store.bytes <= 500_000 and len(store) == 4 and store.groups(0)[0].samples[0].ids is None
    assert store.groups(3)[0].samples[0].ids is not None
    store.add(make_groups(9, ["p"] * 8, ["y" * 90_000] * 8, {}))
    assert store.bytes <= 500_000 and store.steps == [9] and "characters left out" in store.groups(9)[0].samples[0].text
    assert "lack their middle" in store.notice() and "token data" in store.notice()


def test_a_step_that_comes_again_replaces_the_first():
    store = Store()
    store.add(make_groups(1, ["a"], ["old"], {}))
    store.add(make_groups(1, ["a"], ["new"], {}))
    assert store.groups(1)[0].samples[0].text == "new" and len(store) == 1 and store.seen_steps == 1


def test_bad_limits_are_named():
    with pytest.raises(ValueError, match="steps=0"): Store(steps=0)
    with pytest.raises(ValueError, match="latest=50 is more than steps=10"): Store(steps=10)
    with pytest.raises(TypeError, match="run=3"): Store().attach(3)
    with pytest.raises(ValueError, match="show='bset'.*'best'"): CompletionBrowser(Store()).page(show="bset")


def test_groups_totals_and_odd_values():
    groups = make_groups(
        1, ["a"] * 4 + ["b"] * 2, list("123456"),
        {"r": [1, float("nan"), None, True, "x", 2]}, [1.0], weights={"r": 2.0},
        size=2, lengths=[3],
    )
    assert [len(g.samples) for g in groups] == [2, 2, 2]
    assert [s.total for g in groups for s in g.samples] == [2.0, None, None, None, None, 4.0]
    assert groups[0].samples[0].advantage == 1.0 and groups[0].samples[1].advantage is None and groups[0].samples[0].length == 3


def test_messages_as_text():
    assert as_text([{"role": "assistant", "content": "x", "thinking": "hm"}]) == "<think>\nhm\n</think>\nx"
    tools = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "7"}]
    assert "[assistant]" in as_text(tools) and '[calls] {"name": "f"}' in as_text(tools) and "[tool]\n7" in as_text(tools)
    assert as_text(None) == "" and as_text(5) == "5" and as_text([]) == ""


# ---- files ----------------------------------------------------------------------------------------------------------------

def test_reads_what_trl_writes(tmp_path, monkeypatch):
    transformers, grpo = pytest.importorskip("transformers"), pytest.importorskip("trl.trainer.grpo_trainer")
    monkeypatch.setattr(transformers.Trainer, "log", lambda self, logs, start_time=None: None)
    monkeypatch.setattr(grpo, "is_rich_available", lambda: False)
    (tmp_path / "completions").mkdir()
    trainer = grpo.GRPOTrainer.__new__(grpo.GRPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True),
        _metrics={"train": {}},
        accelerator=SimpleNamespace(is_main_process=True),
        log_completions=True,
        state=SimpleNamespace(global_step=3),
        num_completions_to_print=0,
        log_unique_prompts=False,
        args=SimpleNamespace(output_dir=str(tmp_path), report_to=[]),
        _logs={
            "prompt": [[{"role": "user", "content": "Sort: 42"}]] * 2,
            "completion": [[{"role": "assistant", "content": "24"}]] * 2,
            "rewards": {"right": [1.0, float("nan")], "short": [0.5, 0.25]}, "extra": {"note": ["a", "b"]},
            "advantages": [0.7, -0.7], "images": [],
        },
    )
    trainer.log({})
    store = read(tmp_path, weights={"short": 2.0})
    (group,) = store.groups(3)
    assert group.key == "Sort: 42"
    assert [s.rewards for s in group.samples] == [{"right": 1.0, "short": 0.5}, {"right": None, "short": 0.25}]
    assert [s.total for s in group.samples] == [2.0, 0.5]
    assert [s.advantage for s in group.samples] == [0.7, -0.7]
    assert group.samples[0].text == "24"
    assert group.samples[0].completion[0]["role"] == "assistant", "a reward that scores it again sees messages"


def test_a_folder_of_many_files_is_thinned_before_it_is_read(tmp_path):
    for step in range(1, 61):
        pd.DataFrame({"step": [step], "prompt": ["p"], "completion": [f"c{step}"], "r": [1.0], "advantage": [0.0]}).to_parquet(
            tmp_path / f"completions_{step:05d}.parquet"
        )
    store = read(tmp_path, steps=10, latest=4)
    assert len(store) == 10 and store.steps[0] == 1 and store.steps[-4:] == [57, 58, 59, 60] and "10 of 60 steps" in store.notice()
    (tmp_path / "completions_00061.parquet").write_bytes(b"torn")
    said.clear()
    assert len(read(tmp_path, steps=100)) == 60
    browser = CompletionBrowser(tmp_path, steps=100)
    pd.DataFrame({"step": [62], "prompt": ["p"], "completion": ["new"], "r": [1.0], "advantage": [0.0]}).to_parquet(
        tmp_path / "completions_00062.parquet"
    )
    assert browser.refresh().store.steps[-1] == 62


def test_jsonl_of_others_and_our_own(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "p", "response": "x", "score": 1}\n{"prompt": "p", "response": "y", "score": 0, "note": "n"}\n{"torn\n'
    )
    assert [s.rewards for s in read(tmp_path / "a.jsonl").groups(0)[0].samples] == [{"score": 1.0}, {"score": 0.0}]
    store = Store()
    store.add_event(event(5, ids=[[1, 2]] * 8, logps=[[-1.0, -2.0]] * 8, lengths=[2] * 8, cut_off=[True] * 8))
    back = read(store.to_jsonl(tmp_path / "b.jsonl"))
    assert rows(back.all_groups(), tokens=True) == rows(store.all_groups(), tokens=True)
    assert list(store.to_frame().columns) == [
        "step", "group", "sample", "prompt", "completion", "total",
        "advantage", "length", "cut_off", "rewards/right", "rewards/short",
    ]


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="log_completions=True"): read(tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"\.parquet, \.jsonl or \.json"): read(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="it has 'a'"): groups_of_rows([{"a": 1}])
    with pytest.raises(ValueError, match="Did you mean 'right'"):
        groups_of_rows([{"completion": "x", "right": 1.0}], rewards=["rihgt"])
    with pytest.raises(ValueError, match=r"\.jsonl"): Spill(tmp_path / "x.parquet")


def test_a_slow_or_full_disk_never_reaches_the_run(tmp_path, capsys):
    said.clear()
    gate = threading.Event()
    def stuck(*args):
        gate.wait(60)
        raise OSError(28, "No space left on device")
    store = Store(steps=300, latest=300)
    store.spill = spill = Spill(tmp_path / "c.jsonl", open=stuck)
    bus = Bus()
    store.attach(bus)
    for step in range(200): bus.emit(event(step))
    assert len(store) == 200 and bus.failures == 0 and spill.dropped >= 200 - 66
    gate.set()
    spill.close()
    assert spill.failures + spill.dropped == 200 and capsys.readouterr().out.count("No space left") == 1


def test_a_line_that_was_torn_does_not_tear_the_next(tmp_path):
    class Torn:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def write(self, data):
            self.f.write(data[:len(data) // 2])
            self.f.flush()
            raise OSError(28, "No space left on device")
    fails = iter([False, True, False])
    spill = Spill(tmp_path / "c.jsonl", open=lambda *a: Torn(open(*a)) if next(fails) else open(*a))
    for step in (1, 2, 3):
        spill.put(make_groups(step, ["p"], ["x"], {}))
        spill._queue.join()
    spill.close()
    assert read(tmp_path / "c.jsonl").steps == [1, 3] and spill.failures == 1


# ---- text as text ---------------------------------------------------------------------------------------------------------

def shown(page): return "".join(Parser(page).text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_everywhere(text):
    group = Group(
        1, 0, text, [Sample(text, {text or "r": 1.0}, total=1.0, cut_off=True), Sample(text[::-1], {text or "r": 0.0}, total=0.0)]
    )
    page = group_html(
        group, [card(group, i, scale={text or "r": 1.0}, copies=2, prompt=True, find="a") for i in range(2)], of=1, find="s"
    )
    Parser(page)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    Parser(difference(text, text[::-1]))
    page.encode("utf-8")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&\"'/=\x1b\u202e\u200d \n")), max_size=300))
def test_any_text_survives(text):
    page = visible(text)
    Parser(page)
    if all(c.isprintable() or c in "\n\t" for c in text): assert html.unescape(page) == text
    Parser(folded(text * 8, head=40, room=200, find=text[:2]))
    Parser(difference(text, text[1:] + "x"))


def test_long_text_is_folded_and_counted():
    page = folded("ab" * 50_000, head=600, room=10_000)
    assert len(page) < 12_000 and "90,000 characters that this page has no room for" in page
    assert shown(folded("line\n" * 1000)).count("line") == 1000


def test_a_page_stays_small_whatever_is_in_it():
    store = Store()
    store.add(make_groups(1, ["p" * 100_000] * 24, ["<&>" * 60_000] * 24, {"r": [1.0] * 24}))
    browser = CompletionBrowser(store)
    assert len(browser.page()) < 4_000_000 and len(browser.static_html()) < 700_000 and len(str(browser)) < 3000


# ---- tokens and differences -----------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60).filter(lambda t: "\ufffd" not in t and t.isprintable()))
def test_pieces_spell_the_text(text):
    tokenizer = make_tokenizer(["Sort the digits: 4 2"])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    made = pieces(ids, tokenizer)
    assert "".join(p for p, *_ in made) == tokenizer.decode(ids) and sum(n for *_, n in made) == len(ids)


def test_token_colours_and_why_there_are_none():
    tokenizer = make_tokenizer(["a"])
    ids = tokenizer("<b>").input_ids
    sample = Sample("<b>", {}, ids=array("q", ids), logps=array("f", [0.0] * (len(ids) - 1) + [-9.0]))
    page = tokens_html(sample, tokenizer)
    assert shown(page) == "<b>" and "log p -9.00" in page and "0.75)" in page
    assert "not known" in tokens_html(sample, tokenizer, "entropy") and "tokenizer" in tokens_html(sample, None)
    store = Store()
    store.add_event(event(1))
    assert "token log-probs are not known" in CompletionBrowser(store).page(colour="log-prob")


def test_differences_across_steps():
    bus = Bus()
    browser = CompletionBrowser(bus)
    for step in (1, 2, 3): bus.emit(event(step, prompts=("a", "b") if step != 2 else ("c",)))
    page = browser.page(step=3, prompt=0, compare=1)
    assert "<del>1</del><ins>3</ins>" in page and browser.steps_of("a") == [1, 3]
    assert "step 2 does not have this prompt; it is in steps 1, 3" in browser.page(step=3, prompt=0, compare=2)


# ---- filters and the view -------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(["x", "y", "zz"]), st.one_of(st.none(), st.integers(-2, 2)), st.booleans()),
            min_size=1,
            max_size=5,
        ),
        max_size=5,
    ),
    st.sampled_from(list(FILTERS)),
)
def test_filters(groups, show):
    groups = [Group(1, i, "p", [Sample(t, {}, total=r, cut_off=c) for t, r, c in g]) for i, g in enumerate(groups)]
    found = [(g, g.samples[i]) for g, kept in select(groups, show) for i in kept]
    totals = [s.total for _, s in found]
    if show == "best": assert totals == sorted(totals, reverse=True)
    if show == "worst": assert totals == sorted(totals)
    if show == "cut off": assert all(s.cut_off for _, s in found)
    if show == "zero spread": assert all(len(set(g.totals)) == 1 for g, _ in found)
    if show == "duplicates": assert all(sum(o.text == s.text for o in g.samples) > 1 for g, s in found)
    if show in ("all", "longest"): assert len(found) == sum(len(g.samples) for g in groups)


def test_the_slider_follows_the_latest_step_unless_another_is_looked_at():
    bus = Bus()
    browser = CompletionBrowser(bus, interval=0.01)
    browser.widget
    form = browser._form
    bus.emit(event(1))
    browser.flush()
    bus.emit(event(2))
    browser.flush()
    assert form["step"].value == 2 and "step 2<" in form["body"].value
    form["step"].value = 1
    bus.emit(event(3))
    browser.flush()
    assert form["step"].value == 1 and form["step"].options[-1][1] == 3
    form["step"].value = 3
    form["prompt"].value = 1
    assert form["body"].value.count('class="gnb-card"') == 4 and [v for _, v in form["compare"].options] == [-1, 2, 1]
    form["compare"].value = 1
    assert "<ins>3</ins>" in form["body"].value
    form["text"].value = "nothing like this"
    assert "nothing fits" in form["body"].value and browser.failures == 0


def test_a_timer_shows_new_steps_and_a_failing_view_is_counted(capsys):
    said.clear()
    bus = Bus()
    browser = CompletionBrowser(bus, interval=0.01)
    browser.widget
    bus.emit(event(1))
    for _ in range(6000):
        if "step 1<" in browser._form["body"].value: break
        time.sleep(0.01)
    assert "step 1<" in browser._form["body"].value
    def broken(**given): raise RuntimeError("the view broke")
    browser.page = broken
    for step in range(2, 60):
        bus.emit(event(step))
        browser._update()
    assert browser.failures >= 10 and len(browser) == 59
    assert bus.failures == 0
    assert capsys.readouterr().out.count("the view broke") == 1
    browser._soon.now() # drops what is still planned
    browser._heard(event(60))
    assert browser._soon._timer is None, "it gave up"


def test_an_event_that_is_wrong_is_counted_not_raised(capsys):
    said.clear()
    bus = Bus()
    browser = CompletionBrowser(bus)
    bus.emit(CompletionsLogged(step=1, prompts=None, completions=5, rewards=None, advantages=None))
    bus.emit(event(2))
    assert browser.store.failures == 1 and len(browser) == 1
    assert bus.failures == 0
    assert "could not be stored" in capsys.readouterr().out


def test_weights_and_group_size_come_from_the_run(tmp_path):
    trainer = SimpleNamespace(
        reward_func_names=["right", "short"], reward_weights=[1.0, 0.1],
        processing_class="tok",
        args=SimpleNamespace(num_generations=2, log_completions=False),
    )
    run = SimpleNamespace(events=Bus(), trainer=trainer, state="ready")
    browser = CompletionBrowser(run)
    run.events.emit(event(1, prompts=("a",)))
    assert [len(g.samples) for g in browser.store.groups(1)] == [2, 2] and browser.store.groups(1)[0].samples[1].total == 1.0 - 0.05
    trainer.reward_weights = [2.0, 0.0]
    run.events.emit(event(2))
    run.events.emit(RunFinished(step=2, metrics={}))
    assert browser.store.groups(2)[0].samples[1].total == 2.0
    assert browser.tokenizer == "tok" and "not known" not in browser._status()
    page = browser.to_html(tmp_path / "p.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    browser.close()
    run.events.emit(event(3))
    assert len(browser) == 2


def test_empty_and_text_forms(capsys):
    browser = CompletionBrowser()
    assert "no completions yet" in str(browser) and "no completions yet" in browser.page() and browser.to_frame().empty
    store = Store()
    store.add(make_groups(1, ["\x1b[31mp"], ["\x1b]0;title\x07\u202etext\n"], {"r": [1.0]}))
    CompletionBrowser(store)._ipython_display_()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "total 1" in out


def test_json_of_the_widget_is_valid():
    store = Store()
    store.add(make_groups(1, HOSTILE, HOSTILE, {"r": [1.0] * len(HOSTILE)}))
    browser = CompletionBrowser(store)
    browser.widget
    json.dumps(browser._form["body"].value).encode("utf-8")
    json.dumps([o for o, _ in browser._form["prompt"].options], ensure_ascii=False).encode("utf-8")


# ---- weights, spread, other runs, files -----------------------------------------------------------------------------------

def flat(advantage, total=1.2): return Group(1, 0, "p", [Sample(t, {"a": 1.0, "b": 1.0}, advantage, total) for t in "xy"])


@pytest.mark.parametrize("weights, shown", [
    ({"a": 1.0, "b": 0.2}, "× 0.2"), ({"a": 1.0, "b": 0.3}, None), ({}, None), (None, None), ({"b": 0.2}, "× 0.2"),
])
def test_a_card_shows_the_weights_that_make_its_total(weights, shown):
    html_ = card(flat(0.0), 0, weights=weights)
    assert (shown in html_) if shown else ("×" not in html_)


@pytest.mark.parametrize("advantage, total, shown, chip", [
    (0.00119, 1.2, "A 0<", True), (-0.00119, 1.2, "A 0<", True), (0.0076, 100.0, "A 0<", True), (0.7, 1.2, "A +0.7<", False),
])
def test_a_group_without_spread_has_no_advantage_but_rounding(advantage, total, shown, chip):
    page = group_html(flat(advantage, total), [card(flat(advantage, total), 0)])
    assert shown in page and ("zero spread" in page) == chip


def test_totals_that_were_written_down_hold(tmp_path):
    store = Store()
    store.add(make_groups(1, ["p"] * 2, ["x", "y"], {"a": [1.0, 0.0], "b": [1.0, 0.0]}, weights={"b": 0.2}))
    again = read(store.to_jsonl(tmp_path / "c.jsonl"))
    assert [s.total for s in again.groups(1)[0].samples] == [1.2, 0.0]
    asked = read(tmp_path / "c.jsonl", weights={"b": 0.5})
    assert asked.groups(1)[0].samples[0].total == 1.5


def test_another_run_and_other_steps_are_beside_without_a_prompt_being_chosen(tmp_path):
    browser, other = CompletionBrowser(Bus()), CompletionBrowser(Bus())
    for step in (1, 2): browser.store.add_event(event(step))
    for step in (2, 7): other.store.add_event(event(step, prompts=("b", "c")))
    browser.beside("a <b>run</b>", other)
    browser.widget
    form = browser._form
    assert [v for _, v in form["compare"].options] == [-1, 1, ("a <b>run</b>", 2), ("a <b>run</b>", 7)]
    form["compare"].value = ("a <b>run</b>", 7)
    body = form["body"].value
    assert "compared with step 7 of a &lt;b&gt;run&lt;/b&gt;" in body and "does not have this prompt" in body
    assert "<ins>2</ins>" in body
    form["later"].click()
    form["earlier"].click()
    assert form["step"].value == 1 and form["earlier"].disabled and not form["later"].disabled and browser.failures == 0
    with pytest.raises(ValueError, match="compare='nope'"): browser.page(compare=("nope", 1))
    with pytest.raises(FileNotFoundError): browser.beside("x", tmp_path / "nope")


def test_what_a_click_saves():
    from grpo_nb.ui.parts.save import answer_to
    browser = CompletionBrowser(Bus())
    assert answer_to(browser, "csv") == (dict(said="there are no completions yet"), None)
    n = len(HOSTILE)
    browser.store.add(make_groups(1, ["p"] * (n + 2), [*HOSTILE, "=1+1", "-5"], {"r": [1.0] * (n + 2)}))
    said_, data = answer_to(browser, "csv")
    rows_ = list(csv.reader(io.StringIO(data.decode())))
    assert said_["file"] == "completions.csv" and len(rows_) == n + 3 and [r[4] for r in rows_[-2:]] == ["'=1+1", "-5"]
    assert "=1+1" in browser.to_csv() and "'=1+1" not in browser.to_csv()
    said_, data = answer_to(browser, "jsonl")
    assert said_["type"] == "application/octet-stream" and data.count(b"\n") == n + 2
    assert answer_to(None, "csv")[1] is None
