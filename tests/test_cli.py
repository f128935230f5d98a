"""The command line: its errors, its output, its speed of start; and the demo's own checks."""
import json
import re
import subprocess
import sys

import pytest

from grpo_nb import UnpatchFastRL, tasks
from grpo_nb.app import cli
from grpo_nb.app import demo

RESULT = dict(
    model="tiny", task="sort_digits", accuracy_before=0.3, accuracy_after=0.95, steps=100, seconds=20.1, reward_first10=0.4,
    reward_last10=0.9, by_place={"before": {}, "after": {}},
    examples=[dict(question="Sort the digits: 4913", right="1349", before="9431", after="1349")],
)


def call(capsys, *argv):
    try: code = cli.main(list(argv))
    except SystemExit as end: code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("argv, words", [
    (["demo", "--task", "sort_digit"], ["task='sort_digit'", "Did you mean 'sort_digits'?"]),
    (["demo", "--task", "countdown"], ["task='countdown'", "no tiny model", "'reverse_string'"]),
    (["demo", "--model", "smal"], ["model='smal'", "Did you mean 'small'?"]),
    (["demo", "--model", "small", "--task", "countdown"], ["task='countdown'", "'larger'"]),
    (["demo", "--model", "tiny", "--task", "larger"], ["task='larger'", "no tiny model"]),
    (["demo", "--steps", "0"], ["steps=0", "at least 1"]),
    (["demo", "--steps", "many"], ["--steps", "'many'"]),
    (["demo", "--seed", "-1"], ["seed=-1"]),
    (["demo", "--step", "5"], ["'--step'", "Did you mean '--steps'?"]),
    (["demo", "--sed=3"], ["'--sed=3'", "Did you mean '--seed'?"]),
    (["dmo"], ["'dmo'", "Did you mean 'demo'?"]),
    (["pathces"], ["Did you mean 'patches'?"]),
    (["train"], ["'train'", "There are: demo"]),
    (["bench", "stp"], ["Did you mean 'step'?"]),
    (["--verison"], ["Did you mean '--version'?"]),
    (["export", "a", "--cvs"], ["Did you mean '--csv'?"]),
], ids=" ".join)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, monkeypatch, argv, words):
    monkeypatch.setattr(demo, "demo", lambda *a, **k: pytest.fail("it began"))
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("grpo-nb"), err
    for word in words: assert word in err


def test_output_dir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "x").write_text("")
    code, _, err = call(capsys, "demo", "--output-dir", str(tmp_path / "x"))
    assert code == 2 and "is a file" in err and err.count("\n") == 1


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0 and re.fullmatch(r"grpo-nb \S+\n", out)


def test_json_and_summary(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "demo", lambda *a, **k: seen.append((a, k)) or dict(RESULT))
    code, out, err = call(capsys, "demo", "--json", "--seed", "3", "--steps", "7", "--output-dir", "there")
    assert code == 0 and json.loads(out.splitlines()[-1]) == RESULT and err == ""
    (args, more), = seen
    assert args == (None, 3, 7, "there") and isinstance(more["progress"], cli._Lines) # no bar: this is no terminal
    assert more["model"] is None
    code, out, _ = call(capsys, "demo")
    assert "0.300 before, 0.950 after 100 steps" in out and "Sort the digits: 4913  1349   9431    1349" in out
    assert 3 < len(out.splitlines()) < 9


def test_an_interrupt_is_exit_code_130(capsys, monkeypatch):
    def interrupted(*a, **k): raise KeyboardInterrupt("stopped after step 3")
    monkeypatch.setattr(demo, "demo", interrupted)
    assert call(capsys, "demo") == (130, "", "grpo-nb demo: interrupted, stopped after step 3\n")


def test_bars_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    def work(*a, progress, **more):
        for i in range(3): progress("warm start", i + 1, 3, 0.5)
        for i in range(2): progress("training", i + 1, 2, None if i else 0.25)
        return dict(RESULT)
    monkeypatch.setattr(demo, "demo", work)
    code, out, err = call(capsys, "demo", "--json")
    assert code == 0 and json.loads(out) == RESULT
    assert "warm start: 100%" in err and "training: 100%" in err and "loss 0.500" in err


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    "One at the start of a phase, one at its end, and between them one in ten seconds, with the time that is left."
    now = iter([*range(1, 41), *range(100, 103)])
    def work(*a, progress, **more):
        progress.clock = lambda: next(now)
        for i in range(40): progress("warm start", i + 1, 40, 0.5)
        for i in range(3): progress("training", i + 1, 3, None)
        return dict(RESULT)
    monkeypatch.setattr(demo, "demo", work)
    code, out, err = call(capsys, "demo", "--json")
    assert code == 0 and json.loads(out) == RESULT
    assert err.splitlines() == [
        "warm start: 1 of 40, loss 0.500", "warm start: 11 of 40, 0:10 so far, about 0:29 left, loss 0.500",
        "warm start: 21 of 40, 0:20 so far, about 0:19 left, loss 0.500",
        "warm start: 31 of 40, 0:30 so far, about 0:09 left, loss 0.500", "warm start: 40 of 40, 0:39 so far, loss 0.500",
        "training: 1 of 3", "training: 3 of 3, 0:02 so far",
    ]


@pytest.mark.parametrize("argv", [[], ["bench"]], ids=["grpo-nb", "grpo-nb bench"])
def test_no_command_is_a_question_for_help(capsys, argv):
    code, out, err = call(capsys, *argv)
    assert code == 0 and err == "" and out.startswith("usage: grpo-nb")
    there = ["step", "rollout"] if argv else ["demo", "bench", "doctor", "patches", "runs", "view", "export"]
    assert all(name in out for name in there)


def test_a_short_run_has_no_two_ends(capsys, monkeypatch):
    monkeypatch.setattr(demo, "demo", lambda *a, **k: {**RESULT, "steps": 7})
    assert "in the last 7 steps" in call(capsys, "demo")[1]


WRONG = """model_name_or_path: ./no/such/model
dataset_name: nowhere.jsonl
learning_rate: fast
num_generation: 4
beta: -1
num_train_epoch: 3
use_peft: maybe
reward_funcs: [corectness, os.system]
num_generations: 7
vllm_guided_decoding_regex: x
"""


def test_doctor_tells_everything_at_once_and_loads_nothing(capsys, monkeypatch, tmp_path):
    from grpo_nb.advice import doctor
    for name in ("load_data", "load_model"): monkeypatch.setattr(doctor, name, lambda *a: pytest.fail("it loads"))
    path = tmp_path / "run.yaml"
    path.write_text(WRONG)
    code, out, err = call(capsys, "doctor", str(path), "--prompts", "-1")
    assert code == 2 and out == "", err
    for part in ("model_name='./no/such/model'", "nowhere.jsonl", "learning_rate='fast'", "Did you mean 'num_generations'?",
                 "beta=-1", "'num_train_epochs'", "use_peft='maybe'", "Did you mean 'correctness'?", "--allow-imports", "TRL 0.28",
                 "prompts=-1"):
        assert err.count(part) == 1, (part, err)
    assert "11 things" in err.splitlines()[0]


def test_help_and_version_import_nothing_heavy():
    code = ("import sys; from grpo_nb.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_settings_are_fields_of_trls_config(tmp_path):
    from trl import GRPOConfig
    fields = demo.quickstart_config(tasks.get("sort_digits"), tmp_path, steps=1)
    config = GRPOConfig(**fields, bf16=False, use_cpu=True)
    assert config.warmup_steps == 0 and config.max_completion_length == 8
    assert config.generation_batch_size == 64 and config.num_generations == 8 # 8 prompts x 8 completions


def test_a_short_demo(tmp_path, monkeypatch):
    from grpo_nb.tasks import tiny
    whole, seen = tiny.tiny_model, []
    monkeypatch.setattr(tiny, "tiny_model", lambda task, **k: whole(task, **{**k, "steps": 2, "hidden_size": 64, "layers": 1}))
    try: found = demo.demo(steps=2, output_dir=tmp_path / "out", progress=lambda *a: seen.append(a), model="tiny")
    finally: UnpatchFastRL("grpo")
    assert set(found) == set(RESULT) and found["steps"] == 2 and 0 <= found["accuracy_after"] <= 1
    assert [s[:3] for s in seen] == [("warm start", 1, 2), ("warm start", 2, 2), ("training", 1, 2), ("training", 2, 2)]
    assert (tmp_path / "out" / "adapter_config.json").is_file() and json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_learns(seed):
    done = subprocess.run(
        [sys.executable, "-c", "from grpo_nb.app.cli import main; raise SystemExit(main())", "demo", "--model", "tiny", "--json",
         "--seed", str(seed)],
        capture_output=True, text=True, check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(RESULT) and found["accuracy_before"] <= 0.5 and found["accuracy_after"] >= 0.9


@pytest.mark.parametrize("argv, words", [
    (["patches", "dop"], ["'dop'", "Did you mean 'dpo'?"]),
    (["doctor", "no_such.yaml"], ["no_such.yaml"]),
    (["bench", "rollout", "--engine", "vlm"], ["'vlm'", "inplace"]),
], ids=" ".join)
def test_commands_that_look_name_what_is_wrong(capsys, argv, words):
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("grpo-nb"), err
    for word in words: assert word in err


def test_patches_as_json(capsys):
    code, out, _ = call(capsys, "patches", "grpo", "--json")
    found = json.loads(out)
    assert code == 0 and found["trl"] and {row["algorithm"] for row in found["patches"]} == {"grpo"}
    assert {row["state"] for row in found["patches"]} == {"off"}
