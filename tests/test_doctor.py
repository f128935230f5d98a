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
    ({"learning_rate": 1.0}, "learning_rate", {"learning_rate": 1e-5}),
    ({"learning_rate": 0.0}, "learning_rate", {"learning_rate": 1e-5}),
    ({"learning_rate": 1e-9}, "learning_rate", {"learning_rate": 1e-5}),
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
    assert report["zero_because_cut_off"].change == {"max_completion_length": 2}
    assert "eos_never" in rules(report)
    with pytest.raises(DoctorError, match="zero_because_cut_off"): report.raise_for_errors()


def test_zero_spread(world):
    for reward, severity in ((0.0, "error"), (1.0, "warning")):
        found = examine(world, lambda completions, **_: [reward] * len(completions), {"max_completion_length": 24})
        assert found["zero_spread"].severity == severity


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
    assert now[0] < 130 and report.unreached and "the time was up" in str(report)
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
