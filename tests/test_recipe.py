"""Settings as a value: Python, YAML and scripts, there and back; TRL's own parser reads the YAML; the script does the same."""
import ast
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_nb import rewards, tasks
from grpo_nb.recipe.code import Unreadable, from_code, to_code
from grpo_nb.recipe.script import Sources, definitions, to_script
from grpo_nb.recipe.trl import MODULE, alone, from_yaml, read, to_module, to_yaml, write
from grpo_nb.recipe.value import GRPO_RUN, USUAL, Choice, Recipe, changes_of, recipe_of, statements

SCALE = 3
OWN = {
    "brief": "def brief(completions, **kwargs):\n    # short is good: 'quotes', \"quotes\" and \\ stay\n"
    "    return [1.0 / (1 + len(str(c))) for c in completions]",
    "odd": "import math\nLIMIT = 3\n\n\n@staticmethod\ndef odd(completions, n=[LIMIT], **kwargs):\n"
    "    return [math.pi for _ in completions]",
}


def brief(completions, **kwargs):
    return [1.0 / (SCALE + len(str(c))) for c in completions]


# ---- round trips

number = st.floats(0, 100, allow_nan=False).map(lambda x: float(f"{x:.6g}"))
above_zero = st.floats(1e-3, 1000).map(lambda x: float(f"{x:.6g}"))
name = st.text("abcABC019_-./ äé\"'\\#:%{}\n", min_size=1, max_size=20).filter(lambda t: t.strip())
field = {
    "learning_rate": number, "beta": number, "num_generations": st.integers(2, 16),
    "per_device_train_batch_size": st.integers(1, 64), "gradient_accumulation_steps": st.integers(1, 8), "temperature": above_zero,
    "loss_type": st.sampled_from(["grpo", "dapo", "dr_grpo", "bnpo", "cispo"]),
    "scale_rewards": st.sampled_from(["group", "batch", "none"]), "max_completion_length": st.integers(1, 9999),
    "bf16": st.booleans(), "use_cpu": st.booleans(), "output_dir": name, "run_name": name, "epsilon_high": number,
    "generation_kwargs": st.dictionaries(name, number | name, max_size=2), "step": st.sampled_from(["packed", "padded", "trl"]),
    "max_tokens_per_pack": st.integers(1, 9999), "skip_zero_advantage": st.booleans(), "unsloth_num_chunks": st.integers(1, 9),
    "report_to": st.sampled_from(["none", "trackio"]), "steps_per_generation": st.integers(1, 8),
}
model = st.fixed_dictionaries(
    {"model_name": name},
    optional={
        "max_seq_length": st.integers(1, 9999), "load_in_4bit": st.booleans(),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]), "revision": name,
        "trust_remote_code": st.booleans(), "attn_implementation": st.sampled_from(["sdpa", "eager"]),
        "max_lora_rank": st.integers(1, 256),
    },
)
lora = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 256),
        "lora_alpha": st.integers(1, 256) | number.filter(bool),
        "lora_dropout": st.floats(0, 0.9).map(lambda x: round(x, 3)),
        "target_modules": st.lists(st.sampled_from([*USUAL, "c_attn"]), min_size=1, unique=True) | st.just("all-linear"),
        "use_rslora": st.booleans(),
        "bias": st.sampled_from(["none", "all"]),
        "random_state": st.integers(0, 99),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "embed_tokens"]), min_size=1, unique=True),
    },
)
weight = st.floats(-10, 10).map(lambda x: round(x, 4))
option = st.one_of(
    st.just(("correctness", {})),
    st.booleans().map(lambda b: ("correctness", {"ignore_case": b})),
    name.map(lambda t: ("correctness", {"column": t})),
    st.lists(st.from_regex("[a-z]{1,5}", fullmatch=True), min_size=1).map(lambda t: ("format_tags", {"tags": t})),
    st.builds(
        lambda n, p: ("repetition_penalty", {"n": n, "penalty": p, "unit": "words"}),
        st.integers(1, 5),
        st.floats(-9, 0).map(lambda x: round(x, 3)),
    ),
    name.map(lambda t: ("regex", {"pattern": "[a-z]+" + t.replace("\\", "").translate(str.maketrans("", "", "{}"))})),
)
library_choice = st.builds(lambda o, w: Choice(o[0], w, o[1]), option, weight)
own_choice = st.builds(lambda n, w: Choice(n, w, own=True), st.sampled_from(sorted(OWN)), weight)
data = st.one_of(
    st.none(),
    st.fixed_dictionaries({"task": st.sampled_from(["sort_digits", "countdown"])}, optional={"seed": st.integers(0, 9)}),
    st.builds(lambda p, s: {"path": p, "split": s}, name.map(lambda t: t + ".jsonl"), st.sampled_from(["train", "test"])),
    st.just({"path": "openai/gsm8k", "name": "main"}),
)


@st.composite
def recipes(draw):
    choices = tuple(draw(st.lists(library_choice | own_choice, min_size=1, max_size=4)))
    source = "\n".join(OWN[n] for n in sorted({c.name for c in choices if c.own}))
    config = draw(st.fixed_dictionaries({}, optional=field))
    return Recipe(draw(model), draw(st.none() | lora), choices, config, draw(data), source)


quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(recipes())
def test_code_there_and_back(recipe):
    text = to_code(recipe)
    ast.parse(text)
    assert from_code(text) == recipe
    assert to_code(from_code(text)) == text


@quick
@given(recipes())
def test_yaml_there_and_back(recipe):
    text, module, trusted = to_yaml(recipe), to_module(recipe), dict(trust_remote_code=True)
    assert from_yaml(text, module, **trusted) == recipe
    assert from_yaml(to_yaml(from_yaml(text, module, **trusted)), module, **trusted) == recipe


@quick
@given(recipes())
def test_definitions_are_canonical(recipe): assert statements(recipe.definitions) == recipe.definitions


# ---- TRL reads what we write

def parsed(path):
    "What TRL's command would make of a file."
    from trl import TrlParser
    from trl.scripts.grpo import make_parser
    parser = make_parser()
    assert isinstance(parser, TrlParser)
    return parser.parse_args_and_config(["--config", str(path)])


EXAMPLE = Recipe(
    {"model_name": "Qwen/Qwen3-0.6B", "max_seq_length": 1024, "load_in_4bit": False, "dtype": "float32"},
    {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj"]},
    (Choice("correctness", 1.0, {"ignore_case": True}), Choice("brief", 0.5, own=True), Choice("tag_count", 2.0)),
    {
        "learning_rate": 5e-6, "beta": 0.04, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        "num_generations": 8, "max_completion_length": 64, "loss_type": "dr_grpo", "scale_rewards": "none", "output_dir": "out",
        "max_steps": 7, "max_tokens_per_pack": 512, "report_to": "none", "generation_kwargs": {"top_k": 4},
    },
    {"task": "sort_digits", "n_train": 16, "n_test": 2},
    OWN["brief"],
)


def test_trl_parser_reads_our_yaml(tmp_path):
    from trl import GRPOConfig
    folder = tmp_path / "run"
    files = write(EXAMPLE, folder)
    assert [f.name for f in files] == ["grpo.yaml", f"{MODULE}.py", "train.jsonl"]
    script, config, loading, mixture = parsed(folder / "grpo.yaml")
    fields, chosen = alone(EXAMPLE)
    wanted = GRPOConfig(**fields)
    def told(c): return {k: v for k, v in c.to_dict().items() if k not in ("logging_dir",)}
    assert told(config) == told(wanted) and config.per_device_train_batch_size == 2 and config.reward_weights == [1.0, 0.5, 2.0]
    assert chosen["per_device_train_batch_size"] == [2, 1] and config.generation_kwargs == {"top_k": 4}
    assert (loading.model_name_or_path, loading.dtype, loading.load_in_4bit) == ("Qwen/Qwen3-0.6B", "float32", False)
    assert (loading.use_peft, loading.lora_r, loading.lora_alpha, loading.lora_dropout) == (True, 8, 32, 0.0)
    assert script.reward_funcs == [f"{MODULE}.correctness", f"{MODULE}.brief", "grpo_nb.tasks.rewards.tag_count"]
    assert mixture.datasets[0].data_files == "train.jsonl"
    assert read(folder / "grpo.yaml") == EXAMPLE


def test_one_target_layer_means_that_layer_to_peft(tmp_path):
    "TRL makes a string of a list of one, and PEFT reads a string as a pattern over whole names."
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import get_peft_config
    write(EXAMPLE, tmp_path)
    lora = get_peft_config(parsed(tmp_path / "grpo.yaml")[2])
    tiny = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=16
        )
    )
    adapted = [n for n, _ in get_peft_model(tiny, lora).named_modules() if n.endswith("_proj.lora_A")]
    assert len(adapted) == 1 and "q_proj" in adapted[0]


def test_the_rewards_file_gives_the_rewards(tmp_path, monkeypatch):
    write(EXAMPLE, tmp_path)
    space = {}
    exec((tmp_path / f"{MODULE}.py").read_text(), space)
    assert space["correctness"].options == {"ignore_case": True} and space["brief"](["ab"]) == [1 / 3]


@pytest.mark.parametrize("text, words", [
    ("model_name_or_path: m\nreward_funcs: [nothing]", "nothing"),
    ("model_name_or_path: m\nlora_task_type: SEQ_CLS", "lora_task_type"),
    ("model_name_or_path: m\nreward_model_name_or_path: r", "reward_model_name_or_path"),
    ("- 1", "mapping"),
    ("model_name_or_path: m\nreward_funcs: [grpo_rewards.x]", "grpo_rewards"),
    ("beta: 1", "model_name"),
    ("model_name_or_path: m\ndatasets: [{path: a}, {path: b}]", "one data set"),
])
def test_what_a_recipe_cannot_hold_is_named(text, words):
    with pytest.raises(ValueError, match=words): from_yaml(text)


def test_code_is_read_and_never_run(tmp_path):
    mark = tmp_path / "ran"
    evil = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('x')\n"
    recipe = from_code(evil + to_code(EXAMPLE))
    assert not mark.exists() and "write_text" in recipe.definitions and recipe.config == EXAMPLE.config
    with pytest.raises(Unreadable, match="line .*max_steps"): from_code(to_code(EXAMPLE).replace("max_steps=7", "max_steps=int(7)"))
    with pytest.raises(SyntaxError): from_code("model = (")
    with pytest.raises(Unreadable, match="no GRPOTrainer"): from_code("x = 1")


def test_seed_program_is_read():
    recipe = from_code('''
from grpo_nb import FastLanguageModel, PatchFastRL
from trl import GRPOTrainer, GRPOConfig
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="Qwen/Qwen2.5-3B-Instruct", max_seq_length=4096, load_in_4bit=True,
    fast_inference=True, gpu_memory_utilization=0.6, max_lora_rank=64)
model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64)
PatchFastRL("grpo", FastLanguageModel)

def correctness_reward(prompts, completions, answer, **kwargs):
    return [1.0 if expected in completion else 0.0 for completion, expected in zip(completions, answer)]

config = GRPOConfig(output_dir="./grpo_output", num_generations=8, max_completion_length=512, beta=0.04,
    per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=5e-6, num_train_epochs=1)
trainer = GRPOTrainer(model=model, reward_funcs=[correctness_reward], args=config, train_dataset=dataset)
trainer.train()
''')
    assert recipe.model["max_seq_length"] == 4096 and recipe.lora == {"r": 64, "lora_alpha": 64} and recipe.dataset is None
    assert recipe.rewards == (Choice("correctness_reward", own=True),) and recipe.definitions.startswith("def correctness_reward(")
    assert recipe.config["per_device_train_batch_size"] == 1 and "num_generations" not in recipe.config # 8 is TRL's default
    assert from_code(to_code(recipe)) == recipe


# ---- what a run is given

def test_config_objects_and_dicts_agree():
    from trl import GRPOConfig
    given = dict(
        output_dir="o", learning_rate=1e-5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_generations=4, bf16=False, use_cpu=True, lr_scheduler_type="cosine", beta=0.1, reward_weights=[0.5],
    )
    found = changes_of(GRPOConfig(**given))
    assert Recipe({"model_name": "m"}, None, (Choice("tag_count"),), found) == Recipe(
        {"model_name": "m"}, None, (Choice("tag_count"),), {**given, "fp16": False}
    )
    assert GRPOConfig(**found).to_dict() == GRPOConfig(**given).to_dict()


def test_grpo_runs_defaults_are_those_of_inputs():
    from grpo_nb.run.inputs import make_config
    made = make_config({"bf16": False, "use_cpu": True})
    assert {k: (v if k != "report_to" else "none") for k, v in GRPO_RUN.items()} == {
        k: (getattr(made, k) if k != "report_to" else "none") for k in GRPO_RUN
    }


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(TypeError, match="learning_rate"): Recipe({"model_name": "m"}, config={"learning_rat": 1})
    with pytest.raises(TypeError, match="max_seq_length"): Recipe({"model_name": "m", "max_seq_len": 1})
    with pytest.raises(TypeError, match="ignore_case"): Choice("correctness", options={"ignorecase": True})
    with pytest.raises(ValueError, match="correctness"): Choice("corectness")
    with pytest.raises(TypeError, match="token"): Recipe({"model_name": "m", "token": "hf_secret"}) # never written down


# ---- sources and scripts

@pytest.mark.parametrize(
    "name, options",
    [(n, {}) for n in ("correctness", "numeric_answer", "format_tags", "tag_count")]
    + [
        ("regex", {"pattern": "a+b"}),
        ("length_target", {"target": 3, "unit": "words"}),
        ("repetition_penalty", {"unit": "words", "n": 1}),
        ("soft_overlong", {"max_length": 4, "cache": 2}),
        ("numeric_answer", {"tolerance": 0.5, "column": "gold"}),
    ],
)
def test_library_rewards_as_source_give_the_same(name, options):
    from grpo_nb.recipe.script import library_reward
    found, space = Sources(), {}
    library_reward(Choice(name, options=options), name, found)
    text = statements(found.text)
    assert "grpo_nb" not in text
    exec(text, space)
    texts = ["<think>x</think>\n<answer>7</answer>", "aab the the 7.4", "", "\\boxed{7}", "no"]
    for completions in (texts, [[{"role": "assistant", "content": t}] for t in texts]):
        given = dict(
            completions=completions, answer=["7", "7", "7", "x", "no"],
            gold=["7", "7", "7", "7", "no"], completion_ids=[[1] * i for i in range(5)],
        )
        assert space[name](**given) == (getattr(rewards, name)(**options) if options else getattr(rewards, name))(
            prompts=[""] * 5, **given
        )


def test_rewards_of_tasks_as_source():
    for task in ("sort_digits", "countdown"):
        made = tasks.get(task, n_train=4, n_test=2)
        found, space = Sources(), {}
        found.add(made.reward)
        exec(statements(found.text), space)
        assert "import grpo_nb" not in found.text and "from grpo_nb" not in found.text
        rows = {c: made.train[c] for c in made.train.column_names}
        given = {
            **{k: v for k, v in rows.items() if k != "prompt"},
            "completions": [[{"role": "assistant", "content": a}] for a in rows["answer"]],
        }
        assert space[made.reward.__name__](**given) == made.reward(**given)


def test_own_functions_need_a_source():
    with pytest.raises(ValueError, match="lambda"): Sources().add(lambda completions, **kwargs: [0.0])
    assert "SCALE = 3" in definitions([brief]) and "def brief" in definitions([brief])
    with pytest.raises(ValueError, match="'mine' is your own"):
        to_script(Recipe({"model_name": "m", "load_in_4bit": False}, {}, (Choice("mine", own=True),)))
    with pytest.raises(ValueError, match="'mine' is your own"):
        to_module(Recipe({"model_name": "m"}, {}, (Choice("mine", own=True),)))


def run_script(folder, text):
    "Run a script where no grpo_nb can be imported."
    (folder / "script.py").write_text(
        "import sys\nsys.modules['grpo_nb'] = None\n" + text + "print('LOG', [log for log in trainer.state.log_history])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("LOG"))[4:].replace("nan", "None"))


def test_the_printed_script_runs_and_does_the_same(tmp_path):
    "Two steps of the script, and of GRPORun with TRL's own step: the same losses and rewards."
    import torch
    from grpo_nb import FastLanguageModel, GRPORun
    task = tasks.get("sort_digits", n_train=8, n_test=2)
    tasks.tiny_model(task, steps=0, hidden_size=64, layers=1, path=tmp_path / "tiny")
    given = dict(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=4, learning_rate=1e-2, beta=0.05, save_strategy="no",
        gradient_checkpointing=False, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
    )
    recipe = recipe_of(
        {"model_name": str(tmp_path / "tiny"), "load_in_4bit": False, "max_seq_length": 64},
        {brief: 0.5, rewards.repetition_penalty(unit="characters", n=1): 1.0, task.reward: 1.0},
        given,
        {"task": "sort_digits", "n_train": 8, "n_test": 2},
        lora={"r": 4},
        definitions=definitions([brief, task.reward]),
    )
    write(recipe, tmp_path)
    script = run_script(tmp_path, to_script(recipe))

    model, tokenizer = FastLanguageModel.from_pretrained(**recipe.model)
    model = FastLanguageModel.get_peft_model(model, **recipe.lora)
    run = GRPORun(
        model, tokenizer,
        {brief: 0.5, rewards.repetition_penalty(unit="characters", n=1): 1.0, task.reward: 1.0},
        task.train, dict(given),
    )
    run.start(background=False)
    ours = run.trainer.state.log_history
    torch.set_grad_enabled(True)
    for name in ("loss", "grad_norm", "reward", "reward_std", "kl", "rewards/brief/mean", "rewards/repetition_penalty/mean"):
        a, b = [log[name] for log in script if name in log], [log[name] for log in ours if name in log]
        assert len(a) == 2 and a == pytest.approx(b, rel=1e-4, abs=1e-7), name


@pytest.mark.slow # half a minute
def test_trl_command_trains_from_our_files(tmp_path):
    "`trl grpo --config` itself, on a tiny model."
    task = tasks.get("sort_digits", n_train=8, n_test=2)
    tasks.tiny_model(task, steps=0, hidden_size=64, layers=1, path=tmp_path / "tiny")
    recipe = EXAMPLE.changed(
        model={"model_name": "tiny", "load_in_4bit": False},
        dataset={"task": "sort_digits", "n_train": 8, "n_test": 2},
        rewards=EXAMPLE.rewards[:2],
        config={
            **EXAMPLE.config, "max_steps": 1, "save_strategy": "no", "max_completion_length": 4,
            "gradient_checkpointing": False, "generation_kwargs": None, "logging_steps": 1,
        },
    )
    write(recipe, tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "trl.scripts.grpo", "--config", "grpo.yaml"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rewards/brief/mean" in done.stdout


def test_looking_at_settings_does_not_touch_a_run():
    "A configuration object resets accelerate's state; advice is asked for while a run trains, so it makes none."
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from trl import GRPOConfig
    from grpo_nb.advice.settings import advise
    config = GRPOConfig(output_dir="o", use_cpu=True, bf16=False)
    Accelerator(cpu=True)
    before = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    assert before[0] and before[1]
    advise(Recipe({"model_name": "m"}, {}, (Choice("tag_count"),), {"learning_rate": 2e-6}))
    changes_of(config)
    assert (AcceleratorState._shared_state, PartialState._shared_state) == before
