"""The doctor before a run, and the watcher during one."""
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_nb import tasks
from grpo_nb.advice.doctor import DoctorError, Report, doctor, main, watch
from grpo_nb.ground.events import Bus, CompletionsLogged, Finding, StepLogged
from grpo_nb.advice import finding, settings as advice_settings
from grpo_nb.advice.finding import RULES, rules_about
from grpo_nb.models.load import FastLanguageModel
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.advice.course import Thinned, trend
from grpo_nb.advice.live import wilson

torch.set_num_threads(1)
GOOD = dict(
    max_completion_length=6, per_device_train_batch_size=8, num_generations=8,
    learning_rate=1e-4, max_steps=10, gradient_checkpointing=False,
)


@pytest.fixture(scope="module")
def world():
    task = tasks.get("sort_digits", n_train=48, n_test=8)
    model, tokenizer = tiny_model(task, steps=20, measure=False, hidden_size=64, layers=2)
    return SimpleNamespace(task=task, tokenizer=tokenizer, model=FastLanguageModel.get_peft_model(model, r=4))


def examine(world, reward=None, config=None, **kwargs):
    # a busy machine is not late
    return doctor(
        world.model, world.tokenizer, reward or world.task.reward, world.task.train,
        {**GOOD, **(config or {})}, **{"prompts": 2, "clock": lambda: 0.0, **kwargs},
    )


def rules(report, *severities): return {d.rule for d in report.findings if not severities or d.severity in severities}


def chance_reward(completions, **columns): return [float(i % 3) for i, _ in enumerate(completions)]


def test_a_run_that_is_well(world):
    report = examine(world, chance_reward, {"max_completion_length": 12})
    assert not rules(report, "error"), report
    assert {"tokenizer", "prompt_length", "memory", "zero_spread"} <= rules(report, "good")
    assert report.raise_for_errors() is report and len(report.samples) == 2 and len(report.samples[0]["completions"]) == 8


@pytest.mark.parametrize("change,rule,fixed", [
    ({"per_device_train_batch_size": 6}, "batch", {"per_device_train_batch_size": 8}),
    ({"generation_batch_size": 12}, "batch", {"generation_batch_size": 16}),
    ({"num_generations": 1}, "num_generations", {"num_generations": 8}),
    ({"learning_rate": 1.0}, "learning_rate", {"learning_rate": 8e-4}),
    ({"learning_rate": 0.0}, "learning_rate", {"learning_rate": 8e-4}),
    ({"learning_rate": 1e-9}, "learning_rate", {"learning_rate": 8e-4}),
    ({"beta": 5.0}, "beta", {"beta": 0.04}),
    ({"fp16": True}, "dtype", {"fp16": False, "bf16": False}),
])
def test_settings(world, change, rule, fixed):
    report = examine(world, config=change, prompts=0)
    assert rule in rules(report, "error", "warning") and report[rule].change == fixed
    given = {**GOOD, **change}
    applied = report.apply(given, rule)
    assert {k: applied[k] for k in fixed} == fixed and {k: given.get(k) for k in change} == change
    assert rule not in rules(examine(world, config=applied, prompts=0), "error", "warning")


def test_every_rule_has_a_name_of_its_own():
    "A name is taken once, and every sentence belongs to a rule or to the doctor itself."
    assert len(RULES) == len({r.look for r in RULES.values()}) and {r.about for r in RULES.values()} == set(finding.ABOUT)
    assert all(r.look.__name__.strip("_") == name for name, r in RULES.items())
    def batch(setup): yield from ()
    batch.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="'batch'"): finding.rule("live")(batch)
    of_the_doctor = {"config", "dataset", "rewards", "prompt", "sampling", "reward_error", "trl", "kind"}
    assert {name.partition(".")[0] for name in finding.WORDS} == set(RULES) | of_the_doctor
    with pytest.raises(ValueError, match="something else"): finding.words("batch\n    other words")


@pytest.mark.parametrize("change,rule", [
    ({"num_generations": 1}, "num_generations"), ({"num_generations": 2}, "num_generations"),
    ({"per_device_train_batch_size": 6}, "batch"), ({"generation_batch_size": 12}, "batch"),
    ({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": 1.0}, "learning_rate"),
    ({"learning_rate": 1e-9}, "learning_rate"),
    ({"beta": 5.0}, "beta"), ({"max_completion_length": 5000}, "context"), ({"fp16": True}, "dtype"),
])
def test_panel_and_doctor_say_the_same(world, change, rule):
    "What used to be two rules with two sets of bounds: one finding, in one set of words."
    from grpo_nb.recipe.value import Recipe, model_settings
    from grpo_nb.ui.panels.panels import HyperparameterPanel
    report = examine(world, config=change, prompts=0)
    recipe = Recipe(*model_settings(world.model), (), {**GOOD, **change}, draft=True)
    longest = report["prompt_length"].evidence["longest"] if "prompt_length" in rules(report) else 0
    longest = max(longest, *(f.evidence.get("prompt", 0) for f in report))
    panel = HyperparameterPanel(world.model, {**GOOD, **change}, rewards=["correctness"], dataset=world.task.train,
                                tokenizer=world.tokenizer)
    said = [advice_settings.advise(recipe, world.model, longest), panel.check()]
    for findings in said:
        one = next(f for f in findings if f.rule == rule)
        assert vars(one) | {"time": 0} == vars(report[rule]) | {"time": 0}


def test_prompts_longer_than_the_context(world):
    report = examine(world, config={"max_completion_length": 1020}, prompts=0)
    longest = report["context"].change["max_completion_length"]
    assert report["context"].severity == "error" and 900 < longest < 1020


def test_the_classic(world):
    report = examine(world, lambda completions, **_: [0.0] * len(completions), {"max_completion_length": 1})
    assert report["zero_because_cut_off"].severity == "error"
    assert report["zero_because_cut_off"].change == {"max_completion_length": 4}
    consequences = {"eos_never", "zero_spread", "cut_off", "duplicates_in_group", "empty"}
    assert not consequences & rules(report, "error", "warning") and not {r for r in rules(report) if r.startswith("reward:")}
    with pytest.raises(DoctorError, match="zero_because_cut_off"): report.raise_for_errors()


def test_zero_spread(world):
    for reward, severity in ((0.0, "error"), (1.0, "warning")):
        found = examine(world, lambda completions, **_: [reward] * len(completions), {"max_completion_length": 24})
        assert found["zero_spread"].severity == severity


def case_of(texts, totals, row=None, rewards=None, ids=None, **more):
    "Completions as if they had been sampled."
    from grpo_nb.advice.data import Case, Sampled
    text = SimpleNamespace(eos_token="</s>", pad_token_id=0, all_special_ids=[0, 1, 7], get_added_vocab=dict,
                           convert_ids_to_tokens=lambda i: f"<{i}>")
    trainer = SimpleNamespace(eos_token_ids=[1], state=None, args=SimpleNamespace(remove_unused_columns=False))
    groups = [Sampled("q", t, [len(t)] * len(t), more.get("ended") or [True] * len(t), {"exact": s}, s, ids or [[5, 1]] * len(t),
                      row or {}, t) for t, s in zip(texts, totals)]
    config = SimpleNamespace(max_completion_length=more.get("limit", 16), temperature=more.get("temperature", 1.0))
    return Case(None, text, rewards or [], None, None, config, groups=groups, trainer=trainer)


def told(case):
    "What the rules on completions say that is not good: rule and the beginning of the message."
    return {f.rule: f for one in rules_about("completions") for f in one(case) if f.severity in ("error", "warning")}


def exact(completions, answer, **_): return [float(c.strip() == a) for c, a in zip(completions, answer)]


def boxed(completions, answer, **_): return [float(f"boxed{{{a}}}" in c) for c, a in zip(completions, answer)]


EIGHT = ["3", "7"] * 4
PLANTED = { # what is planted: the case, and the one finding that it has to have, with words of it
    "short answers that repeat": (lambda: case_of([EIGHT] * 4, [[0.0, 1.0] * 4] * 4), None, ""),
    "one answer for all, half of the groups right": (lambda: case_of([["3"] * 8, ["7"] * 8], [[1.0] * 8, [0.0] * 8]), "zero_spread",
                                                     "1 with the lowest reward for all, 1 with the highest"),
    "a cold sampler": (lambda: case_of([["3"] * 8] * 4, [[0.0] * 8] * 4, temperature=0.1), "zero_spread", "temperature=0.1"),
    "never right": (lambda: case_of([EIGHT] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [exact]), "zero_spread", "never right: all 32"),
    "always right": (lambda: case_of([["9"] * 8] * 4, [[1.0] * 8] * 4, {"answer": "9"}, [exact]), "zero_spread", "always right"),
    "a reward that knows no answer": (lambda: case_of([EIGHT] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [boxed]), "zero_spread",
                                      "so does the right answer ('9')"),
    "nothing known": (lambda: case_of([EIGHT] * 4, [[0.0] * 8] * 4), "zero_spread", "no group has a spread"),
    "cut off": (lambda: case_of([EIGHT] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [exact], ended=[False] * 8, limit=2),
                "zero_because_cut_off", "never reached"),
    "another end": (lambda: case_of([EIGHT] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [exact], [[5, 7, 5]] * 8,
                                    ended=[False] * 8, limit=3),
                    "eos_never", "'<7>'"),
    "empty": (lambda: case_of([[""] * 8] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [exact]), "empty", "32 of 32"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_one_cause_is_one_finding(planted):
    make, rule, words = PLANTED[planted]
    found = told(make())
    assert list(found) == ([rule] if rule else []), found
    if rule: assert words in found[rule].message


def test_never_in_n_draws_has_a_bound():
    found = told(case_of([EIGHT] * 4, [[0.0] * 8] * 4, {"answer": "9"}, [exact]))["zero_spread"]
    assert found.evidence["bound"] == pytest.approx(300 / 32) and found.evidence["right"] == 1.0 and found.severity == "error"


@pytest.mark.parametrize("adapter,size,usual", [
    (True, 1.2e6, 4e-4), (True, 135e6, 1e-4), (True, 3e9, 4e-5), (True, 8e9, 3e-5), (True, 70e9, 2e-5),
    (False, 135e6, 3e-6), (False, 3e9, 1e-6), (False, 8e9, 1e-6)])
def test_learning_rates_fit_what_is_trained(adapter, size, usual):
    rates = advice_settings.rates_for(adapter, size)
    assert rates.usual == usual and rates.low < usual / 10 and rates.high > usual * 3
    unknown = advice_settings.rates_for(adapter)
    assert unknown.low <= 1e-6 and unknown.high >= 1e-4


def test_learning_rates_that_were_measured():
    "What learnt lies inside, what taught nothing or destroyed lies outside."
    tiny, small, three = (advice_settings.rates_for(True, n) for n in (1.2e6, 135e6, 3e9))
    assert all(tiny.low <= rate <= tiny.high for rate in (5e-5, 1e-3))
    assert not any(tiny.low <= rate <= tiny.high for rate in (1e-5, 1e-2))
    assert all(small.low <= rate <= small.high for rate in (1.5e-4, 2e-4, 4e-4)) and three.low <= 5e-6 <= three.high
    assert advice_settings.size_of(None, "Qwen/Qwen2.5-0.5B-Instruct") == 5e8
    assert advice_settings.size_of(None, "SmolLM2-135M") == 135e6
    assert advice_settings.size_of(None, "./my-model") is None


def test_a_trainer_is_examined_as_it_is(world, tmp_path):
    "TRL's own, without a patch."
    from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(output_dir=str(tmp_path), **GOOD, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
                      reward_weights=[2.0, 1.0])
    trainer = GRPOTrainer(model=world.model, reward_funcs=[chance_reward, world.task.reward], args=args,
                          train_dataset=world.task.train, processing_class=world.tokenizer)
    report = doctor(trainer, prompts=2, clock=lambda: 0.0)
    assert len(report.samples) == 2 and set(report.samples[0]["rewards"]) == {"chance_reward", world.task.reward.__name__}
    assert args.reward_weights == [2.0, 1.0] and report.ok, report
    with pytest.raises(TypeError, match="leave them out"): doctor(trainer, world.tokenizer)
    with pytest.raises(TypeError, match="GRPOTrainer"): doctor(SimpleNamespace(trainer=None))


def test_what_is_sampled_is_scored_when_the_time_is_up(world, monkeypatch):
    "The clock runs out in the middle of all prompts' completions: those that have come to their end are kept."
    from grpo_nb.engines.inplace.engine import InPlace
    looks, ask = [0], InPlace._check_interrupt
    def check(engine):
        looks[0] += 1
        return ask(engine)
    monkeypatch.setattr(InPlace, "_check_interrupt", check)
    now = [0.0]
    def clock():
        now[0] = 0.0 if looks[0] < 8 else 95.0 # after the eighth token or so
        return now[0]
    report = examine(world, chance_reward, {"max_completion_length": 40}, prompts=4, seconds=100, clock=clock)
    assert report.samples and all(sample["rewards"] for sample in report.samples), report
    assert any("the time was up" in said for said in report.unreached)


def test_doctor_and_panel_have_one_estimate(world):
    "The same configuration costs the same in both, and what the doctor has learnt of the completions counts in both."
    from grpo_nb.ui.panels.panels import HyperparameterPanel
    config = {**GOOD, "max_completion_length": 33, "per_device_train_batch_size": 16}
    panel = HyperparameterPanel(world.model, config, rewards=["correctness"], dataset=world.task.train, tokenizer=world.tokenizer)
    def both(prompts): return panel.estimate(), examine(world, config=config, prompts=prompts).estimate
    (shown, said), (_, later) = both(0), both(2)
    assert shown.parts == said.parts and shown.seconds == said.seconds and shown.steps == said.steps
    assert later.load.mean < 33 and panel.estimate().parts == later.parts and panel.estimate().seconds == later.seconds


def test_all_prompts_are_sampled_in_one_call(world, monkeypatch):
    from grpo_nb.engines.inplace.engine import InPlace
    calls, generate = [], InPlace.generate
    def counted(self, prompts, n, *rest):
        calls.append(n)
        return generate(self, prompts, n, *rest)
    monkeypatch.setattr(InPlace, "generate", counted)
    report = examine(world, chance_reward, {"engine": "hf", "max_completion_length": 8}, prompts=8)
    assert [sum(n) for n in calls] == [64] and len(report.samples) == 8


@pytest.mark.parametrize("value,word", [(float("nan"), "NaN"), ("high", "not a number"), (1 / 1e-320, "infinite")])
def test_a_reward_that_returns_no_number(world, value, word):
    report = examine(world, lambda completions, **_: [0.0] * (len(completions) - 1) + [value])
    assert word in report["reward_error"].message and "sample 7" in report["reward_error"].message


def test_a_reward_that_raises(world):
    def careless(completions, **_): return [1 / 0 for _ in completions]
    assert "careless" in examine(world, careless)["reward_error"].message


def test_rewards_of_other_kinds(world):
    async def later(completions, **_): return [float(i) for i in range(len(completions))]
    def none(completions, **_): return [None] * len(completions)
    report = examine(world, {later: 2.0, none: 1.0})
    assert report["reward:later"].severity == "good" and report["reward:none"].severity == "warning"


def test_scales(world):
    def big(completions, **_): return [5000.0 * (i % 2) for i in range(len(completions))]
    assert "reward_scales" in rules(examine(world, [big, chance_reward]), "warning")


def test_a_missing_column(world):
    def scored(completions, solution): return [0.0] * len(completions)
    assert "solution" in examine(world, scored, prompts=0)["reward_columns"].message


def test_bad_inputs_are_findings(world):
    report = doctor("a name", world.tokenizer, "no_such_reward", [{"question": 1}], dict(learning_rat=1))
    assert {"config", "dataset", "rewards", "model"} <= rules(report, "error") and not report.samples
    assert "learning_rate" in report["config"].message


def test_arguments(world):
    with pytest.raises(ValueError, match="prompts=-1"): examine(world, prompts=-1)
    with pytest.raises(ValueError, match="seconds"): examine(world, seconds="long")


def test_tokenizer(world):
    import copy
    broken = copy.deepcopy(world.tokenizer)
    broken.chat_template = "{{ raise_exception('no') }}"
    report = doctor(world.model, broken, chance_reward, world.task.train, GOOD)
    assert report["chat_template"].severity == "error" and any("the chat template" in u for u in report.unreached)
    broken.eos_token = None
    assert doctor(world.model, broken, chance_reward, world.task.train, GOOD)["tokenizer"].severity == "error"


def test_nothing_changes(world):
    model, tokenizer = world.model, world.tokenizer
    model.train()
    model.generation_config.temperature = 0.3
    rows = world.task.train.to_list()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generation = model.generation_config.to_dict()
    config = model.config.to_dict()
    attributes = set(model.get_base_model().__dict__)
    tokenizer.padding_side = "right"
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    def rolls(completions, **_):
        random.random()
        torch.rand(1)
        return [random.random() for _ in completions]
    examine(world, rolls)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert modes == [m.training for m in model.modules()]
    assert generation == model.generation_config.to_dict()
    assert config == model.config.to_dict()
    assert tokenizer.padding_side == "right" and rows == world.task.train.to_list()
    assert attributes == set(model.get_base_model().__dict__)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    tokenizer.padding_side = "left"
    model.generation_config.temperature = None


def test_the_time_is_kept(world):
    now = [0.0]
    def clock():
        now[0] += 7.0
        return now[0] # each look at the clock takes seven seconds
    report = examine(world, chance_reward, {"max_completion_length": 24}, prompts=8, seconds=100, clock=clock)
    assert now[0] < 140 and report.unreached and "the time was up" in str(report)
    assert rules(report, "good") # what needs no sampling was done all the same


def test_report():
    report = Report(
        [
            Finding("a", "info", "<b>&"),
            Finding("b", "error", "bad", "fix", {"beta": 0.0, "epsilon": 0.1}),
            Finding("c", "warning", "w", "f", {"beta": 0.5}),
        ]
    )
    assert [d.rule for d in report.findings] == ["b", "c", "a"]
    assert "<b>&" not in report.html and "&lt;b&gt;&amp;" in report.html and "doctor: 1 error" in str(report)
    assert report.apply({"beta": 1.0}) == {"beta": 0.0, "epsilon": 0.1} # the worse finding decides
    object_config = SimpleNamespace(beta=1.0)
    assert report.apply(object_config, "c").beta == 0.5 and object_config.beta == 1.0
    with pytest.raises(ValueError, match="no change"): report.apply({}, "a")
    with pytest.raises(KeyError, match="'z'"): report.apply({}, "z")
    with pytest.raises(ValueError, match="severity"): Finding("a", "fatal", "")


def test_main(world, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    def write(**fields): return path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in fields.items()))
    def run(): return main(SimpleNamespace(config=path, prompts=1, seconds=60))
    assert run() == 2 and "cannot be read" in capsys.readouterr().err
    write(model_name_or_path="m", dataset_name="d", num_generation=4)
    assert run() == 2 and "num_generations" in capsys.readouterr().err
    write(model_name_or_path="m", dataset_name="d", reward_funcs=["corectness"])
    assert run() == 2 and "correctness" in capsys.readouterr().err
    world.model.get_base_model().save_pretrained(tmp_path / "model")
    world.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text("\n".join(json.dumps({"prompt": f"{i} + 1 =", "answer": "2"}) for i in range(4)))
    fields = dict(
        model_name_or_path=str(tmp_path / "model"), dataset_name=str(tmp_path / "data.json"), reward_funcs=["correctness"],
        use_peft=True, num_generations=4, per_device_train_batch_size=4, max_completion_length=2, max_steps=2,
    )
    write(**fields)
    assert run() == 1 and "zero_because_cut_off" in capsys.readouterr().out


# ---------------------------------------------------------------- during a run


def stream(*logs, completions=()):
    "A watcher that has heard these logs, and the findings on its bus."
    bus, heard = Bus(), []
    bus.subscribe(heard.append, Finding)
    watcher = watch(bus)
    for step, metrics in enumerate(logs, 1): bus.emit(StepLogged(step=step, metrics=metrics))
    for step, rewards in enumerate(completions, 1):
        bus.emit(CompletionsLogged(step=step, prompts=[], completions=[], rewards=rewards, advantages=[]))
    assert not bus.failures
    return watcher, heard


def of(name, values, **more): return [{name: v, **more} for v in values]


BAD = {
    "not_finite": of("loss", [0.1, float("nan")]),
    "reward_flat": of("reward", [0.1 + 0.02 * math.sin(7 * i) for i in range(80)]),
    "length_collapse": of("completions/mean_length", [200.0] * 15 + [9.0] * 15),
    "all_cut_off": of("completions/clipped_ratio", [1.0] * 12),
    "kl_explosion": of("kl", [0.01] * 12 + [3.0] * 8),
    "entropy_collapse": of("entropy", [1.5] * 12 + [0.02] * 12),
    "gradient_spikes": of("grad_norm", [0.5] * 25 + [90.0]),
    "flat_groups": of("frac_reward_zero_std", [0.95] * 12, reward=0.4),
}


@pytest.mark.parametrize("rule", BAD)
def test_a_rule_fires_once(rule):
    _, heard = stream(*BAD[rule], *BAD[rule][-1:] * 3)
    assert [f.rule for f in heard].count(rule) == 1
    finding = next(f for f in heard if f.rule == rule)
    assert finding.message and finding.fix and finding.severity in ("error", "warning")


def test_rewards_that_disagree():
    opposite = {"brevity": [float(-i) for i in range(32)], "detail": [float(i) for i in range(32)]}
    assert [f.rule for f in stream(completions=[opposite] * 4)[1]] == ["rewards_disagree"]
    same = {"a": [float(i) for i in range(32)], "b": [float(i) for i in range(32)], "c": [None] * 32}
    assert not stream(completions=[same] * 4)[1]
    elsewhere = {"rewards_disagree", "no_gradient", "reward_overflow"} # the last two in test_faults
    learning = {"reward_lost", "one_prompt"} # in test_learning
    assert set(BAD) | elsewhere | learning == {r.name for r in rules_about("live")}


def test_it_comes_back_only_after_it_had_gone():
    good, bad = of("completions/clipped_ratio", [0.0] * 20), of("completions/clipped_ratio", [1.0] * 15)
    assert len(stream(*bad, *bad)[1]) == 1
    assert len(stream(*bad, *good, *bad)[1]) == 2


def recorded():
    path = Path(__file__).parent / "data/good_run.jsonl"
    return [json.loads(line)["metrics"] for line in path.read_text().splitlines()]


def test_silent_on_a_good_run():
    logs = recorded()
    watcher, heard = stream(*logs)
    assert len(logs) == 100 and not [f for f in heard if f.severity in ("error", "warning")], heard
    verdict = watcher.verdict()
    assert verdict.answer == "yes" and verdict.trend.after > verdict.trend.before


def test_verdicts():
    chance = random.Random(1)
    noise = [0.4 + chance.gauss(0, 0.05) for _ in range(100)]
    assert stream(*of("reward", noise[:8]))[0].verdict().answer == "too early"
    assert stream(*of("reward", noise[:30]))[0].verdict().answer == "too early"
    assert stream(*of("reward", noise))[0].verdict().answer == "no"
    assert stream(*of("reward", [v - 0.004 * i for i, v in enumerate(noise)]))[0].verdict().answer == "worse"
    assert stream(*of("reward", [v + 0.004 * i for i, v in enumerate(noise)]))[0].verdict().answer == "yes"


def test_what_a_short_run_leaves_open_is_said_with_what_would_settle_it():
    from grpo_nb.advice.live import Accuracy, questions_needed
    from grpo_nb.ground.events import RunFinished, RunStarted
    chance = random.Random(1)
    for n, said in ((25, "Ended after 25 steps, too few to say by the reward alone: the mean"), (3, "3 logs of the reward")):
        watcher, _ = stream(*of("reward", [0.4 + chance.gauss(0, 0.05) for _ in range(n)]))
        assert watcher.verdict().answer == "too early" and "Too early" in watcher.verdict().text
        watcher.events.emit(RunFinished(step=n, metrics={}))
        watcher.events.drain(5)
        found = watcher.verdict()
        assert found.answer == "too short" and said in found.text and "oo early" not in found.text and "max_steps" in found.text
        watcher.accuracy += [Accuracy(0, 30, 100), Accuracy(n, 36, 100)]
        assert "about 940 questions" in watcher.verdict().text and "max_steps" not in watcher.verdict().text
        watcher.events.emit(RunStarted(step=n, total_steps=100))
        watcher.events.drain(5)
        assert watcher.verdict().answer == "too early", "it goes on"
    assert questions_needed(Accuracy(0, 30, 100), Accuracy(1, 30, 100)) is None
    assert questions_needed(Accuracy(0, 0, 100), Accuracy(1, 90, 100)) is None


def test_held_out(world):
    from grpo_nb.advice.live import Accuracy, Watcher
    watcher = Watcher(Bus())
    for v in of("reward", [0.01 * i for i in range(40)]): watcher.events.emit(StepLogged(step=1, metrics=v))
    watcher.accuracy += [Accuracy(0, 30, 100), Accuracy(40, 80, 100)]
    verdict = watcher.verdict()
    assert verdict.answer == "yes" and "30.0% (22% to 40%" in verdict.text and "beyond chance" in verdict.text
    watcher.accuracy[-1] = Accuracy(40, 31, 100)
    assert "gamed" in watcher.verdict().text
    watcher.accuracy[-1] = Accuracy(40, 5, 100)
    assert watcher.verdict().answer == "worse"
    with pytest.raises(ValueError, match="held_out=None"): watcher.measure()
    with pytest.raises(TypeError, match="neither"): watch("run")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
        model=world.model,
        processing_class=world.tokenizer,
        args=SimpleNamespace(max_completion_length=6),
        state=SimpleNamespace(log_history=[{"step": 3, "reward": 0.2}, {"train_runtime": 1.0}]),
    )
    run = SimpleNamespace(events=Bus(), trainer=trainer, state="ready", step=0)
    watcher = watch(run, held_out=world.task.test)
    assert watcher.accuracy[0].n == 8 and watcher.step == 3
    run.state = "running"
    with pytest.raises(RuntimeError, match="pause"): watcher.measure()


def test_wilson():
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3) # Brown, Cai and DasGupta 2001's form


def test_bounded():
    watcher, _ = stream(*({"reward": i % 7 / 7, "kl": 0.01, f"x{i}": 1.0} for i in range(5000)))
    assert len(watcher.rewards.values) <= 1024 and len(watcher._series) <= 200 and len(watcher.series("reward").last) <= 60


number = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                [
                    "reward", "kl", "entropy", "loss", "grad_norm", "reward_std", "frac_reward_zero_std",
                    "completions/mean_length", "completions/clipped_ratio", "eval_reward",
                ]
            ),
            number,
            max_size=6,
        ),
        max_size=90,
    )
)
def test_any_numbers(logs):
    watcher, _ = stream(*logs)
    assert watcher.verdict().text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), number), min_size=40, max_size=40), min_size=2, max_size=4))
def test_any_rewards(values):
    stream(completions=[{f"r{i}": v for i, v in enumerate(values)}] * 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), max_size=120))
def test_trend_takes_any_numbers(values):
    t = trend(values)
    assert (t is None) == (len(values) < 8)
    history = Thinned(most=16)
    for v in values: history.add(v)
    assert len(history.values) <= 16
