"""RewardPanel and HyperparameterPanel without a browser: program, widgets, code, YAML, advice, estimate, static form."""
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from grpo_nb import rewards, tasks
from grpo_nb.recipe.value import Choice
from grpo_nb.ui.parts.fields import GROUPS, read_value, setting_of, write_value
from grpo_nb.ui.parts.fields import settings as rows
from grpo_nb.ui.panels.panels import HyperparameterPanel, RewardPanel
from grpo_nb.ui.parts.view import Later


def brief(completions, **kwargs):
    return [float(len(str(c)) < 20) for c in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=512,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from grpo_nb import FastLanguageModel
    path = tmp_path_factory.mktemp("tiny") / "model"
    task = tasks.get("sort_digits", n_train=8, n_test=2)
    tasks.tiny_model(task, steps=0, hidden_size=64, layers=1, path=path)
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), max_seq_length=64, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer, task


# ---- there and back

values = {
    "learning_rate": st.floats(1e-9, 1, allow_nan=False),
    "beta": st.floats(0, 1),
    "num_generations": st.integers(2, 16),
    "temperature": st.floats(0.1, 2),
    "loss_type": st.sampled_from(setting_of("loss_type").choices),
    "scale_rewards": st.sampled_from(["group", "batch", "none"]),
    "bf16": st.sampled_from([None, True, False]),
    "r": st.integers(1, 64),
    "lora_alpha": st.floats(1, 99),
    "use_rslora": st.booleans(),
    "max_seq_length": st.integers(8, 9999),
    "load_in_4bit": st.sampled_from([None, True, False]),
    "dtype": st.sampled_from([None, "float32"]),
    "epsilon_high": st.none() | st.floats(0.1, 1),
    "max_tokens_per_pack": st.none() | st.integers(1, 9999),
    "step": st.sampled_from(["packed", "trl"]),
    "min_p": st.none() | st.floats(0, 1),
    "target_modules": st.sampled_from([None, ["q_proj"], "all-linear"]),
}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries({}, optional=values),
    st.lists(st.sampled_from(["correctness", "tag_count", "brief"]), min_size=1, unique=True),
    st.floats(-5, 5),
)
def test_panel_code_yaml_panel(chosen, names, weight):
    own = [brief if n == "brief" else n for n in names]
    panel = HyperparameterPanel("some/model", rewards=own).set(**chosen)
    panel.rewards.set(names[0], weight=weight)
    assert all(panel.get(k) == v for k, v in chosen.items() if v is not None)
    other = HyperparameterPanel(rewards=[brief])
    assert other.load(panel.code()).recipe == panel.recipe
    assert HyperparameterPanel(rewards=[brief]).load(panel.yaml(), panel.module()).recipe == panel.recipe
    assert other.values == panel.values


def test_boxes_read_what_they_write():
    for s in rows().values():
        for v in (s.default, *s.choices):
            if not s.choices: assert read_value(s.name, write_value(v), s.default) == v, s.name
    assert read_value("x", "1e3", 5) == 1000 and type(read_value("x", "1e3", 5)) is int
    assert read_value("x", "1.5", 5) == 1.5 and read_value("x", "", 0.3) == 0.3 and read_value("x", "none", None) is None
    assert read_value("generation_kwargs", "{'top_k': 4}") == {"top_k": 4}
    assert read_value("x", "__import__('os')") == "__import__('os')"


# ---- in a program

def test_set_refuses_what_cannot_be(loaded):
    panel = HyperparameterPanel("some/model")
    before = panel.recipe
    for given_, kind, words in [
        (dict(learning_rat=1), TypeError, "learning_rate"),
        (dict(learning_rate="fast"), ValueError, "number"),
        (dict(output_dir=object()), TypeError, "output_dir"),
        (dict(skip_zero_advantage=1), ValueError, "True or False"),
        (dict(model_name=None), ValueError, "model_name"),
    ]:
        with pytest.raises(kind, match=words): panel.set(**given_)
    assert panel.recipe == before
    fixed = HyperparameterPanel(loaded[0], rewards=["correctness"])
    with pytest.raises(ValueError, match="the model is loaded"): fixed.set(r=8)
    with pytest.raises(ValueError, match="the model is loaded"): fixed.set(max_seq_length=8)
    assert fixed.set(r=4, beta=0.1).get("beta") == 0.1
    with pytest.raises(ValueError, match="is loaded"): fixed.load(panel.code())


def test_rewards_have_the_configurations_weights():
    panel = HyperparameterPanel("m", dict(reward_weights=[0.5, 2.0]), rewards=["correctness", brief])
    assert [c.weight for c in panel.recipe.rewards] == [0.5, 2.0] and list(panel.rewards.rewards.values()) == [0.5, 2.0]
    with pytest.raises(ValueError, match="reward_weights"):
        HyperparameterPanel("m", dict(reward_weights=[1.0]), rewards=["correctness", brief])


def test_config_is_what_the_run_takes():
    from trl import GRPOConfig
    panel = HyperparameterPanel("m", dict(max_steps=3, learning_rate=1e-4), rewards=["correctness"])
    made = panel.config()
    assert isinstance(made, GRPOConfig) and (made.max_steps, made.learning_rate, made.logging_steps) == (3, 1e-4, 1)
    assert HyperparameterPanel("m", GRPOConfig(output_dir="o", use_cpu=True, bf16=False, beta=0.2)).get("beta") == 0.2


# ---- advice and estimate

@pytest.mark.parametrize("given_, field, change", [
    (dict(num_generations=6), "per_device_train_batch_size", 12),
    (dict(num_generations=1), "num_generations", 8),
    (dict(top_p=2.0), "top_p", 1.0),
    (dict(temperature=0.0), "temperature", 1.0),
    (dict(fp16=True), "fp16", False),
    (dict(bf16=True, use_cpu=True), "bf16", False),
    (dict(max_completion_length=3000), "max_completion_length", 1024),
    (dict(loss_type="dr_grpo"), "scale_rewards", "none"),
    (dict(loss_type="luspo"), "importance_sampling_level", "sequence"),
    (dict(loss_type="cispo"), "epsilon_high", 5.0),
    (dict(sync_ref_model=True), "sync_ref_model", False),
    (dict(generation_batch_size=12), "generation_batch_size", 16),
    (dict(r=128), "max_lora_rank", 128),
    (dict(r=0), "r", 16),
    (dict(lora_dropout=1.0), "lora_dropout", 0.0),
    (dict(learning_rate=0), "learning_rate", 5e-5),
    (dict(warmup_steps=9, max_steps=9), "warmup_steps", 0),
    (dict(top_k=5), "top_k", 0),
    (dict(max_tokens_per_pack=10), "max_tokens_per_pack", None),
    (dict(importance_sampling_level="sequence"), "epsilon", 3e-4),
    (dict(delta=1.1), "delta", 2.2),
])
def test_advice_says_what_would_work(given_, field, change):
    panel = HyperparameterPanel("m", rewards=["correctness"]).set(**given_)
    found = [a for a in panel.check() if field in a.fields and (field in a.change or change is None)]
    assert found, panel.check()
    for a in panel.check():
        if not a.change: continue
        panel.set(**a.change)
        if change is not None and field in a.change: assert a.change[field] == change
    assert not [a for a in panel.check() if a.severity == "error"], "the value that is said to work does work"


def test_a_reference_that_is_not_there():
    from transformers import LlamaForCausalLM
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=16
        )
    )
    panel = HyperparameterPanel(model, dict(beta=0.1), rewards=["correctness"])
    assert [(a.fields[0], a.change) for a in panel.check() if a.severity == "error"] == [("beta", {"beta": 0.0})]


def test_trl_has_the_last_word():
    found = HyperparameterPanel("m", dict(lr_scheduler_type="cosin"), rewards=["correctness"]).check()
    assert found[0].severity == "error" and "cosin" in found[0].message


def test_estimate(folder, loaded):
    small, large = (
        HyperparameterPanel(folder, dict(max_completion_length=n), rewards=["correctness"]).estimate() for n in (16, 400)
    )
    assert 0 < small.peak < large.peak and set(small.seconds) == {"sampling", "training", "rest"}
    unknown = HyperparameterPanel("nobody/has-this", rewards=["correctness"])
    assert unknown.estimate() is None and "not on this machine" in unknown.cost_note
    panel = HyperparameterPanel(loaded[0], rewards=["correctness"], dataset=loaded[2].train, tokenizer=loaded[1])
    assert panel.estimate().peak > 0 and 10 < panel.prompt_length() < 64


def test_the_estimate_says_for_which_lengths_it_holds(folder):
    panel = HyperparameterPanel(folder, dict(max_completion_length=400), rewards=["correctness"])
    panel.cost = panel.estimate()
    assert panel.cost.load.mean == 400 and "if every completion reaches 400 tokens" in panel.cost_html()


# ---- rewards


def test_rewards_are_what_the_run_takes(loaded):
    from grpo_nb.tasks.rewards import check_rewards
    panel = RewardPanel({brief: 0.5, rewards.correctness(ignore_case=True): 2.0}, loaded[2].train)
    functions, weights = check_rewards(panel.rewards)
    assert functions[0] is brief and weights == [0.5, 2.0] and functions[1].options == {"ignore_case": True}
    assert panel.choices() == (Choice("brief", 0.5, own=True), Choice("correctness", 2.0, {"ignore_case": True}))
    panel.set("length_target", unit="words")
    assert "target" in panel.problems()["length_target"]
    panel.set("length_target", target=5).set("correctness", column="gold").set("brief", on=False)
    assert list(panel.problems()) == ["correctness"] and "gold" in panel.problems()["correctness"]
    with pytest.raises(ValueError, match="correctness"): panel.set("corectness")
    with pytest.raises(TypeError, match="ignore_case"): panel.set("correctness", ignore_cse=True)
    with pytest.raises(ValueError, match="weight"): panel.set("correctness", weight=float("nan"))


def test_answer_column_turns_correctness_on(loaded):
    assert [f.__name__ for f in RewardPanel(dataset=loaded[2].train).rewards] == ["correctness"]
    assert RewardPanel().rewards == {} and "at least one" in RewardPanel().problems()[""]


def test_reward_text_is_escaped():
    def evil(completions, **kwargs):
        "<script>alert(1)</script>"
    panel = RewardPanel([evil])
    assert "<script>alert" not in panel.static_html()
    panel.widget
    assert "<script>alert" not in panel._rows["evil"]["note"].value


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        RewardPanel([brief, lambda completions: [0.0], type(brief)(brief.__code__, {}, "brief")])


# ---- widgets, without a front end

def test_clicks_and_typing(folder):
    panel = HyperparameterPanel(folder, dict(num_generations=6), rewards=["correctness"])
    panel.widget
    for group in (*GROUPS, "As text"): panel._tabs.value = group
    panel._look()
    row, said, button = panel._advice[0]
    assert row.layout.display == "" and "whole groups" in said.value and "per_device_train_batch_size=12" in button.description
    button.click()
    panel._look()
    assert panel.get("per_device_train_batch_size") == 12
    assert panel._advice[0][0].layout.display == "none"
    assert "peak memory" in panel._cost.value
    panel._boxes["temperature"][0].value = "hot"
    assert "not a number" in panel._boxes["temperature"][1].value and panel.get("temperature") == 1.0
    panel._boxes["temperature"][0].value = "0.7"
    assert panel.get("temperature") == 0.7 and "gnb-set" in panel._boxes["temperature"][2]._dom_classes
    panel._adapter.value = False
    assert panel.recipe.lora is None and panel._boxes["r"][0].disabled
    panel._adapter.value = True
    panel._kind.value = "YAML for trl grpo"
    text = panel._text.value
    panel._text.value = text.replace("temperature: 0.7", "temperature: 0.8")
    panel._read.click()
    assert panel.get("temperature") == 0.8 and panel._boxes["temperature"][0].value == "0.8"
    panel._text.value = "model_name_or_path: x\nnonsense: 1"
    panel._read.click()
    assert "nonsense" in panel._said.value and panel.get("temperature") == 0.8


def test_fixed_rows_are_disabled(loaded):
    panel = HyperparameterPanel(loaded[0], rewards=["correctness"])
    panel.widget
    panel._tabs.value = "LoRA"
    assert panel._boxes["r"][0].disabled and panel._boxes["r"][0].value == "4" and "Fixed" in panel._boxes["r"][1].value


def test_later_runs_once_and_reports():
    runs, failures = [], []
    later = Later(lambda: runs.append(1) or 1 / 0, 0.5, failures.append) # long enough for twenty calls
    for _ in range(20): later()
    end = time.monotonic() + 60
    while not failures and time.monotonic() < end: time.sleep(0.01)
    assert len(runs) == len(failures) == 1
    later.now()
    assert len(runs) == 2


def test_static_form_names_every_row(folder):
    panel = HyperparameterPanel(folder, dict(beta=0.04), rewards=["correctness"])
    html = panel.static_html()
    assert all(name in html for name in rows()) and "<script" not in html and "Estimated peak memory" in html
    assert "beta" in panel.text() and "0.04" in panel.text()


def test_methods_stand_under_their_class():
    "No function that a chapter makes public is a method in disguise."
    import inspect
    from importlib import import_module
    from grpo_nb.ui.studio.studio import Studio
    chapters = dict(panels=("boxes", "rewards", "panels"), lab=("scoring", "probes", "lab"),
                    studio=("controls", "examination", "studio"))
    for name in (f"{folder}.{chapter}" for folder, names in chapters.items() for chapter in names):
        module = import_module(f"grpo_nb.ui.{name}")
        public = {n: getattr(module, n) for n in module.__all__}
        assert not [n for n, f in public.items() if inspect.isfunction(f) and "self" in inspect.signature(f).parameters], name
    assert HyperparameterPanel.set.__qualname__ == "HyperparameterPanel.set" and Studio.pause.__doc__


# ---- the studio, without a front end

def waiting_for(s):
    "A function that waits until a condition holds, and fails with what the studio shows."
    def until(condition):
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end, (s.run.state, s.controls.problem)
            time.sleep(0.02)
    return until


def test_studio_with_clicks_and_no_browser(tmp_path, loaded):
    "Every page is made, a run is started, paused, changed, resumed and stopped by its buttons."
    from grpo_nb import studio
    model, tokenizer, task = loaded
    settings = dict(
        output_dir=str(tmp_path), max_steps=500, num_generations=4, per_device_train_batch_size=8,
        max_completion_length=4, gradient_checkpointing=False, save_strategy="no", learning_rate=1e-3,
    )
    s = studio(model, tokenizer, task.train, {task.reward: 1.0, brief: 0.5}, settings)
    until = waiting_for(s)
    for page in ("Settings", "Doctor", "Completions", "Lab", "Run"): s.open(page)
    s.settings.set(temperature=0)
    s.controls.press("start")
    assert s.run is None and "temperature" in s.controls.problem
    s.settings.set(temperature=1)
    s.controls._start = lambda: s.start(background=True)
    s.controls.press("start")
    until(lambda: s.run.step >= 2)
    s.controls.press("pause")
    until(lambda: s.run.state == "paused")
    s.controls._typed(("learning_rate", None), "5e-4")
    s.controls._typed(("reward_weights", "brief"), "2")
    until(lambda: s.run.settings["learning_rate"] == 5e-4 and s.run.settings["reward_weights"]["brief"] == 2)
    s.controls._typed(("temperature", None), "-1")
    assert "above 0" in s.controls.problem
    s.controls.press("resume")
    at = s.run.step
    until(lambda: s.run.step > at + 1)
    s.controls.press("stop")
    s.wait(60)
    assert s.run.state == "stopped" and s.run.checkpoint and len(s.completions)
    assert any("learning_rate" in said for _, _, said in s.controls.notes)
    assert s.run.events.failures == 0
    html = s.static_html()
    assert "<script" not in html and "<svg" in html and "stopped" in html
    with pytest.raises(ValueError, match="no reward is on"):
        for name in list(s.rewards.state): s.rewards.set(name, on=False)
        s._lab = s._lab_made = None
        s.lab.probe()


def test_a_failing_view_does_not_stop_training(tmp_path, loaded):
    from grpo_nb import studio
    model, tokenizer, task = loaded
    s = studio(
        model,
        tokenizer,
        task.train,
        task.reward,
        dict(
            output_dir=str(tmp_path), max_steps=3, num_generations=4, per_device_train_batch_size=8,
            max_completion_length=4, gradient_checkpointing=False, save_strategy="no",
        ),
    )
    def broken(*_): raise OSError("the browser is gone")
    s.controls._heard = broken
    s._status_html = broken
    s.start(background=True).wait(120)
    assert s.run.state == "finished" and s.run.step == 3
