"""GRPORun: input checks, events, pause, resume, stop, checkpoints, failures; in a real kernel, under nbclient and in a script."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from grpo_nb.ground import events
from grpo_nb.engines.base import EngineError
from grpo_nb.tasks.guard import RewardError
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model

TASK = get("sort_digits", n_train=64, n_test=8)
SMALL = dict(steps=0, hidden_size=64, layers=1)


def share_of_digits(completions, **kwargs):
    texts = [c[-1]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in t) / max(len(t), 1) for t in texts]


def slow_reward(completions, **kwargs):
    time.sleep(0.05)
    return share_of_digits(completions)


def config(folder, **more):
    return {**dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
                   gradient_checkpointing=False, learning_rate=1e-2, save_strategy="no"), **more}


def make(folder, rewards=share_of_digits, dataset=TASK.train, run=None, **more):
    model, tokenizer = tiny_model(TASK, **SMALL)
    return GRPORun(model, tokenizer, rewards, dataset, config(folder, **more), **(run or {}))


def until(run, state, seconds=300):
    end = time.monotonic() + seconds
    while run.state != state:
        assert time.monotonic() < end, f"still {run.state}"
        time.sleep(0.01)


# ---- what is refused before anything is touched

@pytest.fixture(scope="module")
def parts(): return tiny_model(TASK, **SMALL)


@pytest.mark.parametrize("change, kind, words", [
    (dict(model="Qwen/Qwen2.5-3B"), TypeError, ["model='Qwen/Qwen2.5-3B'", "from_pretrained"]),
    (dict(tokenizer=None), TypeError, ["tokenizer=None"]),
    (dict(dataset=[]), TypeError, ["dataset=[]"]),
    (dict(dataset={"train": TASK.train}), TypeError, ["dataset['train']"]),
    (dict(dataset=TASK.train.rename_column("prompt", "question")), ValueError, ["'prompt'", "'question'", "'answer'"]),
    (dict(eval_dataset=Dataset.from_dict({"text": ["a"]})), ValueError, ["eval_dataset", "'text'"]),
    (dict(rewards=[]), ValueError, ["rewards is empty"]),
    (dict(rewards=3), TypeError, ["rewards=3"]),
    (dict(rewards=[share_of_digits, None]), TypeError, ["rewards: None"]),
    (dict(rewards={share_of_digits: "1"}), TypeError, ["share_of_digits", "'1'"]),
    (dict(rewards={share_of_digits: float("nan")}), TypeError, ["finite"]),
    (dict(rewards=lambda completions, solution: []), ValueError, ["'solution'", "'answer'"]),
    (dict(config={"learning_rat": 1}), TypeError, ["learning_rat", "Did you mean 'learning_rate'?"]),
    (dict(config="x.yaml"), TypeError, ["config='x.yaml'"]),
    (dict(config={"beta": 0.04}), ValueError, ["beta=0.04", "reference"]),
    (dict(eval_datasets=TASK.test), TypeError, ["eval_datasets"]),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_bad_input(parts, change, kind, words):
    given = dict(model=parts[0], tokenizer=parts[1], rewards=share_of_digits, dataset=TASK.train, config=None)
    class NeverMade:
        def __init__(self, model, peft_config=None): raise AssertionError("the trainer was made")
    with pytest.raises(kind) as caught: GRPORun(**{**given, **change}, trainer_class=NeverMade)
    for word in words: assert word in str(caught.value)


@pytest.mark.parametrize("token", ["eos", "pad"])
def test_tokenizer_without_eos_or_pad(tmp_path, token):
    model, tokenizer = tiny_model(TASK, **SMALL)
    setattr(tokenizer, f"{token}_token", None)
    with pytest.raises(ValueError, match=f"{token}_token is None"):
        GRPORun(model, tokenizer, share_of_digits, TASK.train, config(tmp_path))


def test_chat_prompts_need_a_template(tmp_path):
    model, tokenizer = tiny_model(TASK, **SMALL)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"): GRPORun(model, tokenizer, share_of_digits, TASK.train, config(tmp_path))


def test_frozen_model():
    model, tokenizer = tiny_model(TASK, **SMALL)
    with pytest.raises(ValueError, match="no parameter"):
        GRPORun(model.requires_grad_(False), tokenizer, share_of_digits, TASK.train)


def test_an_unknown_reward_name_gets_the_nearest(parts):
    pytest.importorskip("grpo_nb.tasks.rewards")
    with pytest.raises(ValueError, match="(?i)not known|unknown|no reward"): GRPORun(*parts, "no_such_reward_at_all", TASK.train)


def test_weights_reach_a_copy_of_the_config(tmp_path, parts):
    from trl import GRPOConfig
    mine = GRPOConfig(**config(tmp_path), bf16=False, use_cpu=True, report_to="none")
    run = GRPORun(*parts, {share_of_digits: 3}, TASK.train, mine)
    assert run.trainer.reward_weights.tolist() == [3.0] and mine.reward_weights is None
    mine.reward_weights = [1.0]
    with pytest.raises(ValueError, match="one of the two"): GRPORun(*parts, {share_of_digits: 3}, TASK.train, mine)


def test_a_list_of_rows_and_no_config(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events.said.clear()
    run = GRPORun(*parts, share_of_digits, list(TASK.train))
    args = run.trainer.args
    assert args.output_dir == "grpo_output" and args.logging_steps == 1
    assert any(m.startswith("training in") for m in events.said)
    if not torch.accelerator.is_available(): assert args.use_cpu and not args.bf16 and not args.fp16


# ---- a run

def test_events_and_history(tmp_path):
    run, seen = make(tmp_path), []
    run.events.subscribe(seen.append)
    for call in (run.wait, run.pause, run.resume, run.stop):
        with pytest.raises(RuntimeError, match="has not been started"): call()
    assert run.state == "ready" and run.history == [] and "ready" in repr(run)
    assert run.start(background=False) is run and run.wait() is run
    kinds = [type(e).__name__ for e in seen]
    assert kinds == ["RunStarted", *["StepLogged", "CompletionsLogged"] * 4, "RunFinished"]
    assert [e.step for e in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4] and seen[0].total_steps == 4
    logged = seen[2]
    assert len(logged.prompts) == len(logged.completions) == len(logged.advantages) == 8
    assert list(logged.rewards) == ["share_of_digits"] and len(logged.rewards["share_of_digits"]) == 8
    rewards = [r for r in run.history if r["name"] == "reward"]
    assert [r["step"] for r in rewards] == [1, 2, 3, 4] and rewards[0]["value"] == seen[1].metrics["reward"]
    assert all(set(r) == {"step", "name", "value"} and isinstance(r["value"], float) for r in run.history)
    assert run.result.global_step == 4 and "finished, step 4 of 4" in repr(run) and "<p>" in run._repr_html_()
    for call in (run.start, lambda: run.start(resume=True), run.pause, run.stop):
        with pytest.raises(RuntimeError, match="already finished"): call()


def test_rewards_that_do_not_apply_are_none(tmp_path):
    def only_some(completions, **kwargs): return [None] * 4 + [1.0] * (len(completions) - 4)
    run, seen = make(tmp_path, rewards=[share_of_digits, only_some], max_steps=1), []
    run.events.subscribe(seen.append, events.CompletionsLogged)
    run.start(background=False)
    assert seen[0].rewards["only_some"] == [None] * 4 + [1.0] * 4


def test_pause_resume_stop(tmp_path):
    run, seen = make(tmp_path, max_steps=500), []
    run.events.subscribe(lambda e: seen.append(type(e).__name__), events.RunPaused, events.RunResumed, events.RunStopped)
    run.start(background=True).pause()
    with pytest.raises(RuntimeError, match="already"): run.pause()
    with pytest.raises(RuntimeError, match="already (running|paused)"): run.start()
    until(run, "paused")
    step = run.step
    assert run.wait(0.3).state == "paused" and run.step == step
    assert max(r["step"] for r in run.history) == step # the step's own log comes before the pause
    run.resume()
    with pytest.raises(RuntimeError, match="not paused"): run.resume()
    while run.step < step + 2: time.sleep(0.01)
    run.pause()
    until(run, "paused")
    run.stop(save=False).wait(300)
    assert run.state == "stopped" and run.step < 500 and run.result.global_step == run.step
    assert seen == ["RunPaused", "RunResumed", "RunPaused", "RunStopped"]
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FileNotFoundError, match="no checkpoint"): run.start(resume=True)
    with pytest.raises(RuntimeError, match="been stopped"): run.start()


def test_a_pause_without_a_log_and_a_stop_in_the_last_step(tmp_path):
    run = make(tmp_path, max_steps=3, logging_steps=50)
    run.events.subscribe(lambda e: run.pause(), events.RunStarted) # before three steps can be over
    run.start(background=True)
    until(run, "paused")
    run.resume()
    assert run.wait(300).state == "finished"
    run = make(tmp_path, max_steps=2)
    run.events.subscribe(lambda e: run.stop() if e.step == 2 else None, events.StepLogged)
    assert run.start(background=False).state == "finished"


def weights(run): return {k: v.detach().clone() for k, v in run.trainer.model.state_dict().items()}


@pytest.mark.parametrize("how", ["same run", "new run"])
@pytest.mark.parametrize("adapter", [False, True])
def test_stop_then_resume_equals_an_uninterrupted_run(tmp_path, how, adapter):
    options = dict(max_steps=6, save_strategy="steps", save_steps=100, beta=0.05 * adapter)
    def make(folder, **more):
        model, tokenizer = tiny_model(TASK, **SMALL)
        if adapter:
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        return GRPORun(model, tokenizer, share_of_digits, TASK.train, config(folder, **more))
    whole = make(tmp_path / "whole", **options).start(background=False)
    run = make(tmp_path / "parts", **options)
    off = run.events.subscribe(lambda e: run.stop() if e.step == 3 else None, events.StepLogged)
    run.start(background=False)
    off()
    assert run.state == "stopped" and run.step == 3 and (tmp_path / "parts" / "checkpoint-3").is_dir()
    torch.manual_seed(999)
    if how == "new run": run = make(tmp_path / "parts", **options)
    run.start(resume=True, background=False)
    assert run.state == "finished" and run.step == 6
    assert [r["step"] for r in run.history if r["name"] == "reward"] == [1, 2, 3, 4, 5, 6]
    def rewards(r): return [h["value"] for h in r.history if h["name"] == "reward"]
    assert rewards(run) == pytest.approx(rewards(whole), abs=1e-6)
    for name, value in weights(whole).items(): torch.testing.assert_close(weights(run)[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_resume_after_a_failure_equals_an_uninterrupted_run(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    whole = make(tmp_path / "whole", **options).start(background=False)
    faults = [RuntimeError("the judge is away")]
    def sometimes(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 3 and faults: raise faults.pop()
        return share_of_digits(completions)
    run = make(tmp_path / "parts", rewards=sometimes, **options)
    with pytest.raises(RewardError): run.start(background=False)
    run.start(resume=True, background=False)
    for name, value in weights(whole).items(): torch.testing.assert_close(weights(run)[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_resume_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a checkpoint"): make(tmp_path).start(resume=str(tmp_path))


@pytest.mark.parametrize("background", [False, True])
def test_a_failing_reward_is_the_runs_failure(tmp_path, background, capsys):
    def wrong_length(completions, **kwargs): return [1.0]
    run, seen = make(tmp_path, rewards=wrong_length), []
    run.events.subscribe(seen.append, events.RunFailed)
    if not background:
        with pytest.raises(RewardError): run.start(background=False)
    else: run.start(background=True)
    lengths = []
    for _ in range(2):
        with pytest.raises(RewardError, match="wrong_length") as caught: run.wait()
        lengths.append(len(caught.traceback))
        assert "guard" in str(caught.traceback[-1].path) # the traceback is the error's own, down to where it was raised
    assert lengths[0] == lengths[1]
    assert run.state == "failed" and seen[0].error.startswith("RewardError") and "RewardError" in repr(run)
    if background: assert "run.wait() raises" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="already failed"): run.start()


def test_a_failing_subscriber_does_not_stop_the_run(tmp_path):
    run = make(tmp_path)
    def broken(event): raise OSError("disk full")
    run.events.subscribe(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.start(background=False)
    assert run.state == "finished" and run.events.failures == 10
    assert sum("disk full" in str(w.message) for w in caught) == 1


def test_adapters_and_a_second_run_on_the_same_model(tmp_path):
    model, tokenizer = tiny_model(TASK, **SMALL)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for _ in range(2):
        run = GRPORun(model, tokenizer, share_of_digits, TASK.train, config(tmp_path, max_steps=2, beta=0.1)).start(
            background=False
        )
        assert run.state == "finished" and any(r["name"] == "kl" for r in run.history)
    assert not [n for n, p in model.named_parameters() if ".ref." in n and p.requires_grad and p.grad is not None]


def test_progress_display_is_the_users_choice(tmp_path):
    from transformers.trainer_callback import ProgressCallback
    def has(run): return any(isinstance(c, ProgressCallback) for c in run.trainer.callback_handler.callbacks)
    assert not has(make(tmp_path)) and has(make(tmp_path, run=dict(progress=True), disable_tqdm=False))


# ---- where it runs

SETUP = """
import time
from grpo_nb.ground import events
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
task = get("sort_digits", n_train=64, n_test=8)
def reward(completions, **kwargs):
    time.sleep(0.05)
    return [float(len(c[-1]["content"])) for c in completions]
def make(steps):
    model, tokenizer = tiny_model(task, steps=0, hidden_size=64, layers=1)
    return GRPORun(model, tokenizer, reward, task.train, dict(output_dir={folder!r}, max_steps=steps, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=4, gradient_checkpointing=False, save_strategy="no"))
"""


class Kernel:
    "A real ipykernel, spoken to as a front end does."
    def __init__(self, folder):
        from jupyter_client.manager import start_new_kernel
        self.folder = folder
        for left in (2, 1, 0): # the ports are chosen before the kernel takes them; another process may have been faster
            try:
                self.manager, self.client = start_new_kernel(kernel_name="python3", startup_timeout=300)
                break
            except RuntimeError:
                if not left: raise
        self.run(SETUP.format(folder=str(folder)))

    def send(self, code):
        "Send a cell. Without `stop_on_error=False` the kernel drops what arrives within 0.1 s of a cell that failed."
        return self.client.execute(textwrap.dedent(code), allow_stdin=True, stop_on_error=False)

    def begin(self, code):
        "Send a cell, and wait until it runs."
        begun = self.folder / "begun"
        begun.unlink(missing_ok=True)
        sent, end = self.send(f"open({str(begun)!r}, 'w').close()\n{code}"), time.monotonic() + 300
        while not begun.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        return sent

    def reply(self, sent, timeout=300):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            message = self.client.get_shell_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == sent: return message["content"]
        raise TimeoutError

    def run(self, code, expression="None"):
        "Run a cell; the value of `expression` after it."
        content = self.reply(self.send(code))
        assert content["status"] == "ok", content
        sent = self.client.execute("", user_expressions={"value": f"repr({expression})"}, allow_stdin=True)
        return eval(eval(self.reply(sent)["user_expressions"]["value"]["data"]["text/plain"]))

    def until(self, state):
        for _ in range(3000):
            if self.run("", "run.state") == state: return
            time.sleep(0.1)
        raise AssertionError(self.run("", "repr(run)"))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    pytest.importorskip("ipykernel")
    k = Kernel(tmp_path_factory.mktemp("kernel"))
    yield k
    k.close()


def test_a_real_kernel_stays_free_while_it_trains(kernel):
    kernel.run("run = make(2000); at = time.time(); run.start(); took = time.time() - at")
    assert kernel.run("", "took") < 50 and kernel.run("", "run.state") == "running"
    kernel.run("run.pause()")
    kernel.until("paused")
    step = kernel.run("", "run.step")
    kernel.run("run.resume(); time.sleep(0.5)")
    assert kernel.run("run.stop(); run.wait(300)", "run.state") == "stopped" and kernel.run("", "run.step") >= step


def test_settings_change_from_another_cell(kernel):
    kernel.run(
        "run, told = make(2000), []\n"
        "run.events.subscribe(lambda e: told.append((e.name, e.new)), events.SettingChanged)\n"
        "run.start()"
    )
    kernel.run("run.change(learning_rate=1e-4, temperature=0.8).save()")
    kernel.run("while len(told) < 2 or run.checkpoint is None: time.sleep(0.05)")
    assert kernel.run("", "told") == [("learning_rate", 1e-4), ("temperature", 0.8)]
    assert kernel.run("", "run.settings['temperature']") == 0.8
    assert kernel.run("run.stop(save=False).wait(300)", "run.state") == "stopped"


def test_an_interrupt_of_an_idle_kernel_ends_the_run(kernel):
    for _ in range(2):  # twice: the second run finds the first one's handler gone
        kernel.run("run = make(2000).start()")
        time.sleep(0.5)
        kernel.manager.interrupt_kernel()
        kernel.until("stopped")
        assert kernel.run("", "1 + 1") == 2
    kernel.manager.interrupt_kernel()  # nothing runs: nothing happens
    assert kernel.run("", "run.state") == "stopped"


def test_an_interrupt_ends_a_run_that_another_thread_has_started(kernel):
    "A click on a button arrives in a subshell, a thread of its own."
    kernel.run("""
        import threading
        run = make(2000)
        thread = threading.Thread(target=run.start, kwargs=dict(background=True))
        thread.start()
        thread.join()""")
    time.sleep(0.5)
    kernel.manager.interrupt_kernel()
    kernel.until("stopped")
    kernel.manager.interrupt_kernel()
    assert kernel.run("", "run.state") == "stopped"


def test_an_interrupt_while_a_kernel_samples(kernel):
    kernel.run("""
        run = make(2000)
        run.trainer.generation_config.update(max_new_tokens=4000, eos_token_id=[2**31 - 1])
        run.start()""")
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    kernel.until("stopped")
    assert kernel.run("", "run.step") == 0
    assert kernel.run("run = make(1).start().wait(300)", "run.state") == "finished"


@pytest.mark.parametrize("cell, status", [("run.wait()", "ok"), ("while True: time.sleep(0.01)", "error")])
def test_an_interrupt_of_a_busy_kernel_ends_the_run(kernel, cell, status):
    kernel.run("run = make(2000).start()")
    sent = kernel.begin(cell)
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    assert kernel.reply(sent)["status"] == status
    kernel.until("stopped")


def test_a_failure_in_a_real_kernel_comes_out_of_wait(kernel):
    kernel.run("""
        def bad(completions, **kwargs): return ["x"] * len(completions)
        reward_before, reward = reward, bad
        run = make(3).start(); reward = reward_before""")
    kernel.until("failed")
    content = kernel.reply(kernel.send("run.wait()"))
    assert content["status"] == "error" and content["ename"] == "RewardError"


def test_nbclient_trains_in_the_main_thread(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = SETUP.format(folder=str(tmp_path)) + textwrap.dedent("""
        import threading
        run, seen = make(2), []
        run.events.subscribe(lambda e: seen.append(threading.current_thread() is threading.main_thread()))
        run.start()
        assert run.state == "finished" and seen and all(seen)
        print(run.state, all(seen))""")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    assert "finished True" in "".join(o.get("text", "") for o in book.cells[0].outputs)


SCRIPT = SETUP + """
import os, signal, threading
run = make(2000)
def act(event):
    if event.step == 2:
        for _ in range({times}): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.05)
run.events.subscribe(act, events.StepLogged)
try: run.start()
except KeyboardInterrupt: print("broken off")
assert threading.current_thread() is threading.main_thread()
print(run.state, run.step)
"""


@pytest.mark.parametrize("times, last", [pytest.param(1, "stopped 2", marks=pytest.mark.slow), (2, "stopped 2")])
def test_a_script_ends_cleanly_at_the_first_interrupt_and_breaks_off_at_the_second(tmp_path, times, last):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path), times=times)], capture_output=True, text=True, timeout=800
    )
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == last and ("broken off" in lines) == (times == 2), done.stdout + done.stderr


def test_a_configuration_made_during_a_run_does_not_end_it(tmp_path):
    import threading
    from trl import GRPOConfig
    run = make(tmp_path, max_steps=6)
    def other(e):
        return (
            t := threading.Thread(
                target=lambda: GRPOConfig(output_dir=str(tmp_path / "other"), report_to="none", use_cpu=True, bf16=False)
            ),
            t.start(),
            t.join(),
        )
    run.events.subscribe(other, events.StepLogged)
    run.start(background=True).wait(120)
    assert run.state == "finished" and run.step == 6


# ---- a stop while completions are sampled

@pytest.fixture(params=["trl", "hf", "inplace"])
def engine(request):
    "TRL as it comes, and patched with both engines."
    from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL
    if request.param != "trl": PatchFastRL("grpo")
    yield request.param
    UnpatchFastRL()


class Long:
    "A run whose sampling after step `at` takes 3,000 tokens; `act` is called in the middle of it, in the thread that samples."
    def __init__(self, folder, engine, act, at=2, adapter=False, eval_dataset=None, **more):
        model, tokenizer = tiny_model(TASK, **SMALL)
        if adapter:
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        if engine != "trl": more["engine"] = engine
        self.asked, self.act, self.at = [], act, at
        self.run = GRPORun(
            model, tokenizer, share_of_digits, TASK.train, config(folder, **{"max_steps": 4, **more}), eval_dataset=eval_dataset
        )
        self.ends, self.length = self.run.trainer.generation_config.eos_token_id, self.run.trainer.generation_config.max_new_tokens
        generate = self.run.trainer._generate
        def longer(*args):
            if self.run.step == self.at and self.act: self.set(3000, [2**31 - 1])
            return generate(*args)
        self.run.trainer._generate = longer

    def set(self, length, ends): self.run.trainer.generation_config.update(max_new_tokens=length, eos_token_id=ends)

    def leaves(self, real):
        "In the place of the run's own question."
        if self.act and self.run.trainer.generation_config.max_new_tokens == 3000:
            if len(self.asked) == 30: self.act(self.run)
            self.asked.append(real(self.run))
            return self.asked[-1]
        return real(self.run)

    def again(self):
        "Lengths as they were."
        self.act = None
        self.set(self.length, self.ends)


@pytest.fixture
def long(monkeypatch):
    "A function that makes a `Long`."
    real, made = GRPORun._leaves, {}
    monkeypatch.setattr(GRPORun, "_leaves", lambda run: made[id(run)].leaves(real) if id(run) in made else real(run))
    def make_long(*args, **more):
        one = Long(*args, **more)
        made[id(one.run)] = one
        return one
    return make_long


def stop(run): run.stop()
def pause_then_stop(run): run.pause().stop()
def interrupt(run): os.kill(os.getpid(), signal.SIGINT)


MORE = (
    dict(),
    dict(at=0),
    dict(adapter=True, beta=0.05),
    dict(gradient_accumulation_steps=2, steps_per_generation=1),
    dict(save_strategy="steps", save_steps=2),
)


@pytest.mark.parametrize(
    "engine, more", [("trl", {}), *((e, m) for e in ("hf", "inplace") for m in MORE)],
    indirect=["engine"], ids=lambda x: x if isinstance(x, str) else " ".join(x) or "plain",
)
def test_a_stop_while_sampling_then_resume_equals_an_uninterrupted_run(tmp_path, engine, long, more):
    at, more = more.get("at", 2), {k: v for k, v in more.items() if k != "at"}
    whole = long(tmp_path / "whole", engine, None, **more).run.start(background=False)
    one, told = long(tmp_path / "parts", engine, stop, at=at, **more), []
    run = one.run
    run.events.subscribe(lambda e: told.append(type(e).__name__), events.CheckpointSaved, events.RunStopped, events.RunFailed)
    run.start(background=False)
    # asked once more on the way out
    assert run.state == "stopped" and run.step == at == run.result.global_step and one.asked == [False] * 30 + [True] * 2
    assert told == ["CheckpointSaved", "RunStopped"] and run.checkpoint == str(tmp_path / "parts" / f"checkpoint-{at}")
    assert run.trainer.model.training and "generate" not in vars(run.trainer.model) and not run.trainer.is_in_train
    one.again()
    torch.manual_seed(999)
    run.start(resume=True, background=False)
    assert run.state == "finished" and run.step == 4
    for name, value in weights(whole).items(): torch.testing.assert_close(weights(run)[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "act, saves",
    [(interrupt, "no"), (interrupt, "steps"), (pause_then_stop, "no"), (lambda run: run.stop(save=False), "no")],
    ids=["interrupt", "interrupt saves", "pause", "stop"],
)
@pytest.mark.parametrize("engine", ["hf", "inplace"], indirect=True)
def test_what_is_left_when_sampling_is_left(tmp_path, engine, long, act, saves):
    "An interrupt, and a stop that does not ask for it, save what the config saves; the next run on the same model works."
    one = long(tmp_path, engine, act, save_strategy=saves, save_steps=1)
    run = one.run.start(background=False) # no KeyboardInterrupt comes out
    assert run.state == "stopped" and run.step == 2
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == (
        ["checkpoint-1", "checkpoint-2"] if saves == "steps" else ["checkpoint-2"] if act is pause_then_stop else []
    )
    assert "eval_loss" in evaluated(one) # outside the run nothing is left
    again = GRPORun(
        run.trainer.model, run.trainer.processing_class, share_of_digits, TASK.train, config(tmp_path / "again", max_steps=1)
    ).start(background=False)
    assert again.state == "finished"


def evaluated(one):
    one.again()
    one.run.trainer.eval_dataset = TASK.test
    return one.run.trainer.evaluate()


def test_a_stop_from_another_thread_and_a_pause_while_sampling(tmp_path, engine, long):
    under_way = threading.Event()
    one = long(tmp_path, engine, lambda run: under_way.set())
    one.run.start(background=True)
    assert under_way.wait(300)
    one.run.pause() # waits for the end of the step
    one.run.resume()
    one.run.stop().wait(300)
    assert one.run.state == "stopped" and one.run.step == 2 and (tmp_path / "checkpoint-2").is_dir()
    assert one.asked.count(True) == 2


@pytest.mark.parametrize("engine", ["hf", "inplace"], indirect=True)
def test_an_evaluation_that_is_left(tmp_path, engine, long):
    one = long(tmp_path, engine, stop, eval_strategy="steps", eval_steps=2, eval_dataset=TASK.test)
    one.run.start(background=False)
    assert one.run.state == "stopped" and one.run.step == 2 and one.run.checkpoint.endswith("checkpoint-2") and one.asked[-1]
    one.again()
    assert one.run.start(resume=True, background=False).state == "finished"


# ---- an engine that fails

FAULTS = {
    "dies": (lambda: EngineError("The engine died: its worker was killed. Start it with less."), "worker was killed"),
    "gpu": (
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        "no memory left.*max_completion_length.*20.00 GiB",
    ),
    "cpu": (
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        "no memory left",
    ),
    "other": (lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "mat1"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine", ["hf", "inplace"], indirect=True)
def test_an_engine_that_fails_in_the_middle(tmp_path, engine, fault, monkeypatch):
    from grpo_nb.engines.inplace.engine import InPlace
    options = dict(save_strategy="steps", save_steps=2, engine=engine)
    whole = make(tmp_path / "whole", **options).start(background=False)
    run, held, closed = make(tmp_path / "parts", **options), [], []
    error, words = FAULTS[fault]

    def broken(*args, **kwargs):
        if run.step < 3: return real(*args, **kwargs)
        cache = torch.zeros(9)
        held.append(weakref.ref(cache))
        raise error()

    where, name = (InPlace, "generate") if engine == "inplace" else (type(run.trainer.model), "generate")
    real = getattr(where, name)
    with monkeypatch.context() as m:
        m.setattr(where, name, broken)
        m.setattr(InPlace, "close", lambda self: closed.append(self))
        with pytest.raises(RuntimeError, match=f"(?s){words}") as caught: run.start(background=True).wait(300)
    lost = fault != "other"
    assert run.state == "failed" and isinstance(caught.value, EngineError)
    if not lost: assert f"The engine {'hf' if engine == 'hf' else 'inplace'!r} failed" in str(caught.value)
    else:
        assert held[0]() is None # although the run holds the error and its traceback
        assert len(closed) == (engine == "inplace") and run.trainer._grpo_nb.engine is None
    assert [p.name for p in sorted((tmp_path / "parts").glob("checkpoint-*"))] == ["checkpoint-2"]
    run.start(resume=True, background=False) # the next cell
    assert run.state == "finished"
    for key, value in weights(whole).items(): torch.testing.assert_close(weights(run)[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("engine", ["inplace"], indirect=True)
def test_a_cache_for_which_there_is_no_memory(tmp_path, engine, monkeypatch):
    from grpo_nb.engines.inplace import engine as inplace
    monkeypatch.setattr(inplace, "free_bytes", lambda device: 1000)
    run = make(tmp_path, engine="inplace")
    with pytest.raises(EngineError, match="max_completion_length"): run.start(background=False)
    monkeypatch.undo()
    assert make(tmp_path, engine="inplace").start(background=False).state == "finished"
