"""ui.scoring, ui.probes and ui.lab: calls as TRL makes them, errors in place, correlations, verdicts, redefinition, sources."""
import asyncio
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grpo_nb import rewards as library
from grpo_nb.ground.events import Bus, CompletionsLogged
from grpo_nb.tasks.tiny import make_tokenizer
from grpo_nb.ui.completions.completions import CompletionBrowser
from grpo_nb.ui.lab.lab import RewardLab, is_reachable, newest
from grpo_nb.ui.lab.probes import make_probes, pick_rows, probe
from grpo_nb.ui.lab.scoring import correlation, facts, histogram, ranks, score
from test_completions import HOSTILE, Parser

ROWS = [{"prompt": f"Sort: {n}", "answer": "".join(sorted(str(n)))} for n in (421, 243, 538, 911)]
CHAT = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in ROWS]
svg = {"svg", "rect", "line", "table", "tr", "td", "th", "h4"}


def page_of(result):
    "The page's text; fails for tags and attributes that we never write."
    class Page(Parser):
        def handle_starttag(self, tag, attributes):
            if tag in svg: self.open.append(tag)
            else: super().handle_starttag(tag, attributes)
    return "".join(Page(result.to_html()).text)


def right(completions, answer, **columns): return [float(library.text_of(c) == a) for c, a in zip(completions, answer)]
def brittle(completions, **columns): return [1 / len(library.text_of(c)) for c in completions]
async def judged(completions, **columns):
    await asyncio.sleep(0)
    return [len(library.text_of(c)) / 10 for c in completions]


# ---- scoring --------------------------------------------------------------------------------------------------------------

def test_rewards_are_called_as_trl_calls_them():
    seen = {}
    def spy(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, **more):
        seen.update(locals())
        log_metric("mine", 1.0)
        log_extra("notes", ["a", "b"])
        return [0.0, 1.0]
    found = score({"spy": spy}, ["x", "y"], ["p", "q"], {"answer": ["1", "2"]}, completion_ids=[[1], [2]])
    assert seen["prompts"] == ["p", "q"] and seen["answer"] == ["1", "2"]
    assert seen["completion_ids"] == [[1], [2]] and seen["trainer_state"].global_step == 0
    assert found.values == {"spy": [0.0, 1.0]}
    assert found.logged == {"mine": 1.0, "notes": ["a", "b"]}
    assert found.errors == {"spy": {}}


def test_errors_stand_where_they_happen():
    def narrow(completions): return [0.0] * len(completions)
    def short(completions, **columns): return [0.0]
    def odd(completions, **columns): return [float("nan") if c == "b" else "1" if c == "" else None for c in completions]
    found = score(
        dict(right=right, brittle=brittle, narrow=narrow, short=short, odd=odd, judged=judged),
        ["a", "", "b"], None, {"answer": ["a"] * 3},
    )
    assert found.values["right"] == [1.0, 0.0, 0.0] and found.values["judged"] == [0.1, 0.0, 0.1]
    assert found.values["brittle"] == [1.0, None, 1.0] and "ZeroDivisionError" in found.errors["brittle"][1]
    assert "add **kwargs" in found.errors["narrow"][2] and len(found.errors["narrow"]) == 3
    assert found.values["short"] == [0.0] * 3 and "1 values for 3 completions" in found.failed["short"], "alone it works"
    assert "NaN" in found.errors["odd"][2] and "not a number" in found.errors["odd"][1] and found.values["odd"] == [None] * 3
    assert "ZeroDivisionError" in page_of(found) and "errors, the first" in found.text()
    assert list(found.to_frame().columns)[:2] == ["prompt", "completion"] and "brittle/error" in found.to_frame()


def test_a_reward_that_hangs_is_given_up():
    import threading
    gate = threading.Event()
    def hangs(completions, **columns):
        gate.wait(60)
        return [0.0] * len(completions)
    async def hangs_too(completions, **columns): await asyncio.sleep(60)
    found = score(dict(hangs=hangs, hangs_too=hangs_too, right=right), ["a", "b"], None, {"answer": ["a", "a"]}, timeout=2)
    gate.set()
    assert all("took longer than 2 s" in e for n in ("hangs", "hangs_too") for e in found.errors[n].values())
    assert found.values["right"] == [1.0, 0.0]


def test_a_reward_that_hangs_alone_is_not_asked_again():
    import threading
    gate, asked = threading.Event(), []
    def alone(completions, **columns):
        if len(completions) > 1: raise ValueError("one at a time")
        asked.append(completions[0])
        if completions[0] == "b": gate.wait(60)
        return [1.0]
    found = score(dict(alone=alone), ["a", "b", "c"], timeout=2)
    gate.set()
    assert asked[-2:] == ["a", "b"], "and before them, by the guard, which looks for the one at fault"
    assert found.values["alone"] == [1.0, None, None]
    assert "took longer than" in found.errors["alone"][1] and "one at a time" in found.errors["alone"][2]


def test_async_rewards_are_scored_where_a_loop_runs_already():
    async def notebook(): return score({"judged": judged}, ["four"])
    assert asyncio.run(notebook()).values["judged"] == [0.4]


def test_reward_models_and_bad_arguments_are_named():
    import torch
    found = score({"model": torch.nn.Linear(1, 1)}, ["a"])
    assert "reward model" in found.errors["model"][0]
    with pytest.raises(TypeError, match="is text"): score({"right": right}, "a")
    with pytest.raises(ValueError, match="answer has 1 values for 2"): score({"right": right}, ["a", "b"], None, {"answer": ["a"]})
    assert score({"right": right}, []).totals == []


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(*[st.one_of(st.none(), st.floats(-1e6, 1e6, allow_nan=False), st.integers(-2, 2))] * 2), max_size=30))
def test_correlations_agree_with_numpy(pairs):
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    for rank in (False, True):
        found = correlation(x, y, rank)
        assert math.isnan(found) or -1 <= found <= 1
        assert math.isnan(found) == math.isnan(correlation(y, x, rank))
        if len(both) < 3:
            assert math.isnan(found)
            continue
        a, b = (np.array(ranks(list(v)) if rank else v, dtype=float) for v in zip(*both))
        if not math.isnan(found) and a.std() > 1e-3 * np.abs(a).max() and b.std() > 1e-3 * np.abs(b).max():
            assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


def test_ranks_share_ties(): assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_facts_and_histograms():
    texts = ["x" * (i + 1) for i in range(8)]
    same = dict(
        length=lambda completions, **c: [len(t) for t in completions],
        double=lambda completions, **c: [100.0 * len(t) for t in completions],
        flat=lambda completions, **c: [1.0] * len(completions),
        less=lambda completions, **c: [-len(t) for t in completions],
    )
    said = " ".join(facts(score(same, texts)))
    for words in (
        "flat gives 1 to all 8", "length and double put", "length and less pull against", "double decides the total alone",
    ):
        assert words in said
    assert histogram([]) == histogram([None]) == "" and histogram([1.0] * 3).count("<rect") == 1
    assert histogram([-1e308, 1e308]).count("<rect") >= 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_completions_and_errors_are_text(text):
    def raises(completions, **columns): raise ValueError(completions[0])
    page_of(score({text or "r": raises}, [text, text], [text] * 2))
    found = probe({text or "r": raises}, [{"prompt": text, "answer": text}])
    page_of(found)
    found.text().encode("utf-8", "replace")


# ---- probes ---------------------------------------------------------------------------------------------------------------

def verdict(report, reward, name): return next(v for v in report.verdicts if v.reward == reward and v.probe == name)


def test_every_probe_is_there():
    names = [p.name for p in make_probes(CHAT, "answer", "=> {answer}")]
    wanted = {
        "empty", "white space", "very long", "keywords stuffed", "prompt echoed", "many answers", "gold, bare",
        "gold, your format", "other's, tags", "answer as a number", "columns None", "content None",
    }
    assert wanted <= set(names)
    golds = {
        p.name: p.texts
        for p in make_probes([{"prompt": "a", "answer": "They add up.\n#### 7"}, {"prompt": "b", "answer": "#### 8"}], "answer")
    }
    assert golds["gold, bare"] == ["7", "8"] and golds["other's, bare"] == ["8", "7"]


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["strings", "messages"])
def test_verdicts(rows):
    generous = probe({"generous": lambda completions, **c: [1.0] * len(completions)}, rows)
    assert not generous.ok
    assert verdict(generous, "generous", "empty").message == "pays 1 for an empty completion: every model will find this"
    assert "nothing can be learnt" in verdict(generous, "generous", "gold").message
    never = verdict(probe({"never": lambda completions, **c: [0.0] * len(completions)}, rows), "never", "gold")
    assert never.severity == "error" and "gives 0" in never.message and "nothing can be learnt" in never.message
    blind = probe({"blind": library.format_tags}, rows)
    assert "nothing ties the reward to the prompt" in verdict(blind, "blind", "other's, tags").message
    upside = probe(
        {"upside": lambda completions, answer, **c: [float(a not in library.text_of(t)) for t, a in zip(completions, answer)]}, rows
    )
    assert "gives 0 for the right answer" in verdict(upside, "upside", "gold").message and not upside.ok
    empty = verdict(probe({"brittle": brittle}, rows), "brittle", "empty")
    assert empty.severity == "error" and "which ends a run" in empty.message
    silent = probe({"silent": lambda completions, **c: [None] * len(completions)}, rows)
    assert "does not score the right answer" in verdict(silent, "silent", "gold").message


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["strings", "messages"])
def test_the_librarys_rewards_have_no_gap(rows):
    for parts in (
        {"correctness": library.correctness},
        {"numeric": library.numeric_answer},
        {"correctness": library.correctness, "format": library.format_tags},
    ):
        report = probe(parts, rows)
        assert report.ok, report
        assert "pays" in verdict(report, list(parts)[0], "gold").message
    total = verdict(report, "total", "gold")
    assert total.value == 2.0 and "(tags)" in total.message
    assert "does not look at the answer" in verdict(report, "format", "other's, tags").message


def test_weights_decide_what_is_outweighed():
    def brevity(completions, **c): return [1.0 if len(library.text_of(t)) < 3 else 0.5 for t in completions]
    light = probe({"correctness": library.correctness, "brevity": brevity}, ROWS, weights={"brevity": 0.1})
    assert light.ok and "outweigh" in verdict(light, "brevity", "empty").message
    heavy = probe({"correctness": library.correctness, "brevity": brevity}, ROWS, weights={"brevity": 5.0})
    assert not heavy.ok and "every model will find this" in verdict(heavy, "total", "empty").message


def test_part_of_the_rows_and_no_answers():
    some = probe(
        {"some": lambda completions, answer, **c: [float(t == a and a != "119") for t, a in zip(completions, answer)]}, ROWS
    )
    assert "less on 1 of 4 prompts" in verdict(some, "some", "gold").message
    blind = probe({"r": lambda completions, **c: [0.0] * len(completions)}, [{"prompt": "a"}])
    assert "answer=" in blind.notes[0] and not any(v.probe.startswith("gold") for v in blind.verdicts)
    with pytest.raises(ValueError, match="Did you mean 'answer'"): probe({"r": right}, ROWS, "anwser")
    with pytest.raises(ValueError, match="'prompt'"): probe({"r": right}, [])
    assert [r["answer"] for r in pick_rows(ROWS * 3, 2, "answer")] == ["124", "234"]


# ---- the lab --------------------------------------------------------------------------------------------------------------

def test_a_new_definition_is_picked_up_and_said():
    space = {"__name__": "__main__"}
    exec("def r(completions, **c): return [0.0] * len(completions)", space)
    lab = RewardLab(space["r"])
    assert lab.score(["a"]).values == {"r": [0.0]}
    exec("def r(completions, **c): return [1.0] * len(completions)", space)
    again = lab.score()
    assert again.values == {"r": [1.0]} and "defined anew" in again.notes[0] and lab.score().notes == []
    exec("r = 5", space)
    assert lab.score().values == {"r": [1.0]}, "the name stands for something else now"
    kept = RewardLab(lambda completions, **c: [2.0] * len(completions))
    assert kept.score(["a"]).values == {"<lambda>": [2.0]}


def test_a_function_that_was_put_in_by_hand_stays():
    space = {"__name__": "__main__"}
    exec("def r(completions, **c): return [0.0] * len(completions)", space)
    old = space["r"]
    exec("def r(completions, **c): return [1.0] * len(completions)", space)
    lab = RewardLab(space["r"])
    lab.rewards["r"] = old # on purpose, though the name stands for another
    assert lab.score(["a"]).values == {"r": [0.0]} and not is_reachable(old) and newest(old) is space["r"]
    def r(completions, **c): return [3.0] * len(completions)
    assert lab.replace(r).score().values == {"r": [3.0]}
    with pytest.raises(ValueError, match="Did you mean 'right'"): RewardLab(right).replace(lambda_named("rigth"))
    lab.rewards["broken"] = 5
    with pytest.raises(TypeError, match="broken"): lab.score()


def lambda_named(name):
    def f(completions, **c): return []
    f.__name__ = name
    return f


def test_columns_come_from_a_row_or_by_the_prompt():
    lab = RewardLab({right: 1.0, library.format_tags: 0.5}, ROWS)
    assert lab.score("124", row=0).values["right"] == [1.0]
    assert lab.score(["124", "234"], ["Sort: 421", "Sort: 243"]).totals == [1.0, 1.0]
    assert lab.score(["x"], answer=["x"]).values["right"] == [1.0], "columns may be given"
    unknown = lab.score(["124"], ["nobody knows"])
    assert unknown.values["right"] == [0.0] and "1 of 1 prompts are not in the data set" in unknown.notes[0]
    with pytest.raises(ValueError, match="row=9"): lab.score("a", row=9)
    with pytest.raises(ValueError, match="prompts has 1 entries for 2"): lab.score(["a", "b"], ["p"])
    chat = RewardLab(right, CHAT)
    assert chat.score(["124"], row=0).values["right"] == [1.0]
    assert chat.score([{"role": "assistant", "content": "124"}], row=0).values["right"] == [1.0]


def test_no_completions_are_no_error():
    assert RewardLab(right, ROWS).score([]).totals == []


def test_sources(tmp_path):
    lab = RewardLab(right, ROWS)
    with pytest.raises(ValueError, match="nothing to score yet"): lab.score()
    bus = Bus()
    browser = CompletionBrowser(bus)
    lab.attach(browser)
    with pytest.raises(ValueError, match="has logged none"): lab.score()
    event = CompletionsLogged(
        step=4, prompts=["Sort: 421"] * 2, completions=["124", "421"],
        rewards={"right": [1.0, 0.0]}, advantages=[1.0, -1.0], ids=[[1], [2, 3]],
    )
    bus.emit(event)
    assert lab.score().values["right"] == [1.0, 0.0] and "step 4" in lab.scores.notes[0]
    with pytest.raises(ValueError, match="Kept are 4"): lab.score(step=9)
    browser.store.to_jsonl(tmp_path / "a.jsonl")
    assert lab.score(tmp_path / "a.jsonl").values["right"] == lab.score(str(tmp_path / "a.jsonl")).values["right"] == [1.0, 0.0]
    counted = RewardLab(library.length_target(target=2), source=browser)
    assert counted.score().values["length_target"] == [0.5, 1.0], "the run's own token ids"
    other = RewardLab(right, ROWS).attach(SimpleNamespace(events=bus))
    bus.emit(event)
    assert other.score().values["right"] == [1.0, 0.0]


def test_a_tokenizer_gives_completion_ids():
    tokenizer = make_tokenizer(["a"])
    lab = RewardLab(library.length_target(target=3), ROWS, tokenizer)
    assert lab.score(["124"], row=0).values["length_target"] == [1.0] and lab.probe(2).verdicts
    errors = RewardLab(library.soft_overlong(max_length=4, cache=2)).score(["a"]).errors
    assert "needs the column 'completion_ids'" in errors["soft_overlong"][0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="two of them are named 'right'"): RewardLab([right, right])
    with pytest.raises(ValueError, match="no column 'prompt'"): RewardLab(right, [{"question": "a"}])
    with pytest.raises(ValueError, match="no column.*answer"): RewardLab(right, ROWS, answer="anwer")
    with pytest.raises(ValueError, match="format_tags"): RewardLab("format_tag")


def test_the_form(tmp_path):
    lab = RewardLab({right: 1.0, brittle: 0.5}, ROWS)
    lab.widget
    form = lab._form
    form["typed"].value = "124\n---\n<script>x</script>\n---\n"
    form["score"].click()
    body = form["body"].value
    assert "&lt;script&gt;" in body and "<script" not in body and "ZeroDivisionError" in body and len(lab.scores) == 3
    form["source"].value = "gold"
    form["score"].click()
    assert lab.scores.values["right"] == [1.0] * 4
    form["probe"].click()
    assert "which ends a run" in form["body"].value and not form["probe"].disabled
    form["source"].value = "source"
    form["score"].click()
    assert "nothing to score yet" in form["body"].value
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Sort: 421", "completion": "124"}))
    form["path"].value = str(tmp_path / "a.jsonl")
    form["score"].click()
    assert lab.scores.values["right"] == [1.0]
    form["path"].value = "/nowhere.jsonl"
    form["score"].click()
    assert "does not exist" in form["body"].value
    assert "RewardLab: right, brittle" in str(lab) and "<script" not in lab.static_html() and lab.failures == 0
