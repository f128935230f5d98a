"""What others break: weights that become NaN, memory that runs out, errors that cannot be printed, a front end that is gone."""
import io
import sys
import warnings
import weakref
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from transformers import TrainerCallback

from grpo_nb.advice.memory import of_trainer
from grpo_nb.engines.base import EngineError
from grpo_nb.ground import events
from grpo_nb.ground.text import text_of
from grpo_nb.models.finite import NotFinite
from grpo_nb.models.room import ESTIMATES
from grpo_nb.run.run import GRPORun, RunError
from grpo_nb.tasks.guard import RewardError
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers.patch import PatchFastRL
from grpo_nb.trainers.room import NoMemory

TASK = get("sort_digits", n_train=64, n_test=8)
SMALL = dict(steps=0, hidden_size=64, layers=1)
GROUND = [False, True] # in the background


def share_of_digits(completions, **kwargs):
    texts = [c[-1]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in t) / max(len(t), 1) for t in texts]


def config(folder, **more):
    return {**dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
                   gradient_checkpointing=False, learning_rate=1e-3, save_strategy="steps", save_steps=1), **more}


@pytest.fixture
def patched(unpatched):
    PatchFastRL("grpo")


def make(folder, rewards=share_of_digits, callbacks=(), parts=None, **more):
    model, tokenizer = parts or tiny_model(TASK, **SMALL)
    return GRPORun(model, tokenizer, rewards, TASK.train, config(folder, **more), callbacks=callbacks)


def ended(run, background, seconds=120):
    "Start a run, and the error that comes out of it, or None."
    try:
        run.start(background=background)
        run.wait(seconds)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt): raise
        return error


def saved(folder): return sorted(p.name for p in folder.glob("checkpoint-*"))


class After(TrainerCallback):
    "Calls something at the end of a step."
    def __init__(self, step, call): self.step, self.call = step, call
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step: self.call(model)


def spoil(model, value=torch.nan):
    with torch.no_grad(): model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = value


def spoil_gradient(run, step, value=torch.nan):
    "One gradient is multiplied in one step."
    p = run.trainer.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    p.register_hook(lambda g: g * value if run.step == step else g)


# ---- weights that are lost

@pytest.mark.parametrize("background", GROUND)
@pytest.mark.parametrize("engine", ["auto", "hf", "unpatched"])
def test_a_weight_that_becomes_nan(tmp_path, engine, background, unpatched):
    "It is named, with the step and the checkpoint that is whole; that of its own step is not written."
    if engine != "unpatched": PatchFastRL("grpo")
    more = {} if engine == "unpatched" else dict(engine=engine)
    run, seen = make(tmp_path, callbacks=[After(2, spoil)], **more), []
    run.events.subscribe(seen.append, events.RunFailed)
    error = ended(run, background)
    assert isinstance(error, NotFinite) and run.state == "failed" and saved(tmp_path) == ["checkpoint-1"]
    for words in ("since step 2", "'model.layers.0.mlp.up_proj.weight'", "checkpoint-1' is whole", "learning_rate (now 0.001)"):
        assert words in str(error), str(error)
    assert "up_proj" in seen[0].error


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("patch", [False, True])
def test_a_gradient_that_becomes_nan(tmp_path, unpatched, patch, value, capsys):
    "The step is not made: the weights are those of the step before, and the tensor is named although clipping spreads the NaN."
    if patch: PatchFastRL("grpo")
    run = make(tmp_path)
    spoil_gradient(run, 2, value)
    error = ended(run, True)
    assert isinstance(error, NotFinite) and run.state == "failed" and saved(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert "gradient of 'model.layers.0.mlp.up_proj.weight' is NaN or infinite in step 3. " in str(error)
    assert "as step 2 left them" in str(error) and "checkpoint-2' is whole" in str(error)
    assert all(p.isfinite().all() and p.grad is None for p in run.trainer.model.parameters())
    assert "in step 3: NotFinite: The gradient of" in capsys.readouterr().out
    for p in run.trainer.model.parameters(): p._backward_hooks = None
    assert run.start(resume=True, background=False).state == "finished"


class TooFast(TrainerCallback):
    "A learning rate that no check has seen."
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups: group["lr"] = 1e36


def test_a_rate_that_is_far_too_high(tmp_path, patched):
    run = make(tmp_path, callbacks=[TooFast()], optim="sgd", lr_scheduler_type="constant")
    error = ended(run, False)
    assert isinstance(error, NotFinite) and not [p for p in saved(tmp_path) if not whole(tmp_path / p)]


def whole(folder):
    from safetensors.torch import load_file
    return all(t.isfinite().all() for f in folder.glob("*.safetensors") for t in load_file(f).values())


@pytest.mark.parametrize("spoilt", ["model.layers.0.mlp.up_proj.weight"])
def test_a_plain_trainer_whose_weight_becomes_nan(tmp_path, patched, spoilt):
    from trl import GRPOConfig, GRPOTrainer
    model, tokenizer = tiny_model(TASK, **SMALL)
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[share_of_digits], train_dataset=TASK.train,
                          args=GRPOConfig(**config(tmp_path), report_to="none"), callbacks=[After(2, spoil)])
    with pytest.raises(NotFinite, match=f"since step 2: '{spoilt}'"): trainer.train()
    assert saved(tmp_path) == ["checkpoint-1"]


def test_a_model_that_was_nan_when_it_was_given(tmp_path):
    run = make(tmp_path)
    spoil(run.trainer.model)
    error = ended(run, False)
    assert isinstance(error, NotFinite) and "since step 0" in str(error) and "No checkpoint" in str(error)


def test_logits_that_are_nan_although_the_weights_are_not(tmp_path, patched):
    "An activation that leaves its type's range, after the engine has compared itself with the model."
    def enlarge(model):
        with torch.no_grad(): model.model.norm.weight.fill_(3e38)
    error = ended(make(tmp_path, callbacks=[After(1, enlarge)]), True)
    assert isinstance(error, NotFinite) and "All weights are finite (float32), at step 1" in str(error)


# ---- memory that runs out

NONE_LEFT = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "MemoryError": MemoryError,
    "RuntimeError": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
}
PLACES = {"forward": "forward", "backward": "backward", "optimiser": "optimiser's step", "save": "saving of a checkpoint"}


def fail_at(run, place, error, step=2):
    "Let a place of the training fail once, with a large tensor in the failing frame; its weak reference comes in the list."
    held, trainer = [], run.trainer

    def fail(*args):
        if trainer.state.global_step != step or held: return
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise error()

    def hook(module, args, kwargs):
        if torch.is_grad_enabled(): fail()
    if place == "forward": trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    if place == "backward": trainer.model.get_parameter("model.norm.weight").register_hook(lambda g: fail())
    if place == "optimiser":
        make_optimizer = trainer.create_optimizer
        def create(*args, **kwargs):
            optimizer = make_optimizer(*args, **kwargs)
            getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(fail)
            return optimizer
        trainer.create_optimizer = create
    if place == "save":
        save = trainer.save_model
        def saving(*args, **kwargs):
            fail()
            return save(*args, **kwargs)
        trainer.save_model = saving
    return held


@pytest.mark.parametrize("place, kind, background", [(place, "OutOfMemoryError", True) for place in PLACES]
                         + [("forward", "MemoryError", False), ("backward", "RuntimeError", False)])
def test_no_memory_left(tmp_path, patched, place, kind, background, capsys):
    "What to lower, with its value; and nothing of the failed step is kept by the failed run."
    assert of_trainer in ESTIMATES # as `from grpo_nb import GRPORun` leaves it
    run = make(tmp_path, save_steps=3 if place == "save" else 2)
    held = fail_at(run, place, NONE_LEFT[kind], step=3 if place == "save" else 2)
    error = ended(run, background)
    assert isinstance(error, NoMemory) and run.state == "failed" and len(held) == 1
    for words in (PLACES[place], "max_tokens_per_pack (now 2048", "gradient_checkpointing=True", "The estimate for this run is",
                  "weights", f"The error was {kind}"):
        assert words in str(error)
    assert held[0]() is None, "the failed run holds the frames of its failure"
    assert all(p.grad is None for p in run.trainer.model.parameters()) and run.trainer._buffered_inputs is None
    if background: assert "max_tokens_per_pack" in capsys.readouterr().out
    if place != "save": assert run.start(resume=True, background=False).state == "finished"


def test_a_plain_trainer_without_memory(tmp_path, patched):
    from trl import GRPOConfig, GRPOTrainer
    model, tokenizer = tiny_model(TASK, **SMALL)
    trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[share_of_digits], train_dataset=TASK.train,
                          args=GRPOConfig(**config(tmp_path, max_tokens_per_pack=300), report_to="none"))
    fail_at(type("run", (), {"trainer": trainer}), "backward", NONE_LEFT["OutOfMemoryError"])
    with pytest.raises(torch.OutOfMemoryError, match=r"backward of step 3.*max_tokens_per_pack \(now 300, 150"): trainer.train()


# ---- nobody's error hides another's

class Odd(Exception):
    "Cannot be written."
    def __str__(self): raise ValueError("str() raises")
    __repr__ = __str__


class Base(BaseException): "Is no Exception."


class Raises(TrainerCallback):
    "Raises at the end of the second step."
    def __init__(self, error): self.error = error
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2: raise self.error


@pytest.mark.parametrize("background", GROUND)
@pytest.mark.parametrize("error, kind, words", [
    (Odd(), RunError, "Odd whose str() raises ValueError"), (Base("odd base"), RunError, "Base: odd base"),
    (SystemExit(3), RunError, "SystemExit: 3"), (RuntimeError("CUDA error: an illegal access"), RuntimeError, "CUDA error"),
    (ValueError("x" * 2_000_000), ValueError, "xxx"), (StopIteration("no more"), StopIteration, "no more"),
])
def test_a_callback_that_raises(tmp_path, error, kind, words, background, capsys):
    "The state is final, and what is said has the callback, its file and its line; it is short."
    run, seen = make(tmp_path, callbacks=[Raises(error)], save_strategy="no"), []
    run.events.subscribe(seen.append, events.RunFailed)
    out = ended(run, background)
    told = seen[0].error
    assert run.state == "failed" and isinstance(out, kind) and words in told and len(told) < 3000
    assert "test_faults.py:" in told and "in Raises.on_step_end" in told
    if kind is RunError: assert "in Raises.on_step_end" in str(out) and out.__cause__ is error
    if background: assert words in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"no checkpoint to go on from \(save_strategy='no'\)"): run.start()
    assert make(tmp_path, save_strategy="no", max_steps=1).start(background=False).state == "finished"


@pytest.mark.parametrize("error", [Odd(), Base("odd"), SystemExit(1), ValueError("\x1b[2J\u202e")])
def test_a_subscriber_that_raises(tmp_path, error):
    "The run goes on; the handler is named with file and line, once."
    def broken(event): raise error
    run = make(tmp_path, save_strategy="no", max_steps=2)
    run.events.subscribe(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.start(background=False)
    told = [str(w.message) for w in caught if "event handler" in str(w.message)]
    assert run.state == "finished" and len(told) == 1 and "broken failed on RunStarted" in told[0] and "test_faults.py:" in told[0]
    assert "\x1b" not in told[0] and "\u202e" not in told[0]


class Gone(io.StringIO):
    "A terminal that is no more."
    def write(self, text): raise BrokenPipeError("front end is gone")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {"raising": Gone, "closed": closed, "cp1252": lambda: io.TextIOWrapper(io.BytesIO(), encoding="cp1252"),
           "none": lambda: None}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_front_end_that_is_gone(tmp_path, patched, stream):
    "What is said cannot be printed; the run goes on to its end, and a failure is still a failure."
    run = make(tmp_path, save_strategy="no", max_steps=2)
    bad = make(tmp_path, save_strategy="no", callbacks=[Raises(ValueError("→ failed"))])
    events.said.clear()
    with redirect_stdout(STREAMS[stream]()), redirect_stderr(STREAMS[stream]()):
        assert ended(run, True) is None
        assert isinstance(ended(bad, True), ValueError)
    assert (run.state, bad.state) == ("finished", "failed")


def test_a_checkpoint_beside_a_broken_stream(tmp_path, patched):
    "It is written, and no lock of a progress bar stays behind, on which the next run's thread would wait."
    for background in GROUND:
        folder = tmp_path / str(background)
        run = make(folder, max_steps=1)
        with redirect_stdout(Gone()), redirect_stderr(Gone()): assert ended(run, background) is None
        assert run.state == "finished" and saved(folder) == ["checkpoint-1"]


@pytest.mark.parametrize("engine, error, words", [
    ("inplace", RuntimeError("CUDA error: device-side assert triggered"), ["restart the kernel", "engine='hf'"]),
    ("inplace", IndexError("slot 9"), ["IndexError: slot 9", "engine='hf'"]),
    ("inplace", Odd(), ["Odd whose str() raises"]),
    ("hf", RuntimeError("EngineCore encountered an issue"), ["EngineCore", "engine='inplace'"]),
])
@pytest.mark.parametrize("background", GROUND)
def test_an_engine_that_dies(tmp_path, patched, monkeypatch, engine, error, words, background):
    "Which engine, at which step, where, and which other engine there is."
    from grpo_nb.engines.inplace.engine import InPlace
    run = make(tmp_path, save_strategy="no", engine=engine)
    where, name = (InPlace, "generate") if engine == "inplace" else (type(run.trainer.model), "generate")
    real = getattr(where, name)
    def dying(self, *args, **kwargs):
        if run.step == 1: raise error
        return real(self, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(where, name, dying)
        out = ended(run, background)
    assert isinstance(out, EngineError) and run.state == "failed" and out.__cause__ is error
    for w in (f"The engine {engine!r} failed", "at step 1", "test_faults.py:", *words): assert w in str(out), str(out)
    assert make(tmp_path, save_strategy="no", max_steps=1).start(background=False).state == "finished"


# ---- rewards that leave float32

@pytest.mark.parametrize("value, weight, words", [
    (1e20, 1.0, "1e+20"), (-3.4e38, 1.0, "square is infinite"), (1e19, 1.0, ""), (1e15, 1e30, "with a weight of 1e+30"),
    (1.8e19, 1e3, "weight of 1000"),
])
def test_rewards_that_are_too_large(tmp_path, value, weight, words):
    "Their spread would be infinite and the gradient 0, without a word; a large one that fits trains."
    def large(completions, **kwargs): return [value if i % 2 else 0.0 for i in range(len(completions))]
    run = make(tmp_path, rewards={large: weight}, max_steps=1, save_strategy="no", logging_steps=1)
    error = ended(run, False)
    if words: assert isinstance(error, RewardError) and words in str(error) and "'large'" in str(error), error
    else: assert error is None and run.trainer.state.log_history[0]["grad_norm"] > 0


def test_findings_of_a_reward_that_overflows_and_of_a_gradient_of_nothing():
    from grpo_nb.advice.live import Watcher
    bus = events.Bus(keep=100)
    watcher = Watcher(bus)
    for step in range(10): bus.emit(events.StepLogged(step=step, metrics=dict(loss=0.0, reward=1.0, reward_std=0.5, grad_norm=0.0)))
    assert watcher.active == ["no_gradient"]
    bus.emit(events.StepLogged(step=11, metrics=dict(reward=1.0, reward_std=float("inf"), grad_norm=0.0)))
    assert "reward_overflow" in watcher.active and "not_finite" not in watcher.active


# ---- the matrix: fault x variant x where it trains; a table of what survived and what was clear

def raises(error):
    def raising(*args, **kwargs): raise error
    return raising


def with_weight(value, engine="auto", name="model.layers.0.mlp.up_proj.weight", step=2):
    def build(folder, m):
        def ruin(model):
            with torch.no_grad(): model.get_parameter(name).view(-1)[0] = value
        return make(folder, callbacks=[After(step, ruin)], engine=engine), ("NaN or infinite", "learning_rate")
    return build


def with_gradient(value, **more):
    def build(folder, m):
        run = make(folder, **more)
        spoil_gradient(run, 2, value)
        return run, ("NaN or infinite", "up_proj", "learning_rate")
    return build


def without_memory(place, kind):
    def build(folder, m):
        run = make(folder, save_steps=3 if place == "save" else 2)
        fail_at(run, place, NONE_LEFT[kind], step=3 if place == "save" else 2)
        return run, ("max_tokens_per_pack", "no memory left")
    return build


def sampling_fails(engine, error, *words):
    def build(folder, m):
        from grpo_nb.engines.inplace.engine import InPlace
        run = make(folder, engine=engine)
        where, name = (InPlace, "generate") if engine == "inplace" else (type(run.trainer.model), "generate")
        real = getattr(where, name)
        def dying(self, *args, **kwargs):
            if run.trainer is not None and run.step == 1 and run.state == "running": raise error()
            return real(self, *args, **kwargs)
        m.setattr(where, name, dying)
        return run, words or (f"The engine {engine!r} failed", "at step 1", "samples without it")
    return build


def with_callback(error, *words):
    def build(folder, m): return make(folder, callbacks=[Raises(error())]), ("Raises.on_step_end", "test_faults.py:", *words)
    return build


def with_subscriber(error, **how):
    def build(folder, m):
        run = make(folder, max_steps=2)
        run.events.subscribe(raises(error()), **how)
        return run, None # goes on to its end
    return build


def with_stream(name):
    def build(folder, m):
        m.setattr(sys, "stdout", STREAMS[name]())
        m.setattr(sys, "stderr", STREAMS[name]())
        return make(folder, max_steps=2), None
    return build


ENGINE_ERRORS = {
    "CUDA": lambda: RuntimeError("CUDA error: device-side assert triggered"), "index": lambda: IndexError("slot 9"),
    "core": lambda: RuntimeError("EngineCore encountered an issue"), "odd": Odd, "assert": AssertionError,
    "type": lambda: TypeError("x"), "2 MB": lambda: RuntimeError("y" * 2_000_000), "time": lambda: TimeoutError("no answer"),
}
MATRIX = {
    "NaN": {"weight NaN, auto": with_weight(torch.nan), "weight inf, auto": with_weight(torch.inf),
            "weight NaN, hf": with_weight(torch.nan, "hf"),
            "norm -inf": with_weight(-torch.inf, name="model.norm.weight"), "after step 1": with_weight(torch.nan, step=1),
            "gradient NaN": with_gradient(torch.nan), "gradient inf": with_gradient(torch.inf),
            "gradient NaN, no clipping": with_gradient(torch.nan, max_grad_norm=0.0)},
    "memory": {**{f"{place}, {kind}": without_memory(place, kind) for place in PLACES for kind in NONE_LEFT},
               **{f"sampling, {kind}": sampling_fails("inplace", NONE_LEFT[kind], "no memory left", "max_completion_length")
                  for kind in NONE_LEFT}},
    "front end": {**{f"subscriber, {e.__name__}": with_subscriber(e) for e in (Odd, Base, SystemExit, RecursionError, OSError)},
                  **{f"queued, {e.__name__}": with_subscriber(e, queue=2) for e in (Odd, KeyboardInterrupt)},
                  **{f"streams {name}": with_stream(name) for name in STREAMS},
                  **{f"callback, {e.__name__}": with_callback(e) for e in (Odd, Base, SystemExit, ValueError)}},
    "engine": {f"{engine}, {name}": sampling_fails(engine, error)
               for engine in ("inplace", "hf") for name, error in ENGINE_ERRORS.items()},
}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", MATRIX)
def test_the_matrix(tmp_path, fault, unpatched, monkeypatch):
    "Survived: a final state, the process goes on, a second run works. Clear: the sentence says what happened and what to change."
    PatchFastRL("grpo")
    table, model = [], tiny_model(TASK, **SMALL)
    for name, build in MATRIX[fault].items():
        for background in GROUND:
            folder = tmp_path / f"{len(table)}"
            with monkeypatch.context() as m, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run, words = build(folder, m)
                error = ended(run, background)
            expected = "finished" if words is None else "failed"
            survived = run.state == expected and make(folder / "b", parts=model, max_steps=1, save_strategy="no").start(
                background=False).state == "finished"
            said = "" if error is None else text_of(error) + run._failed
            clear = error is None if words is None else all(w in said for w in words) and len(text_of(error)) < 2_100_000
            table.append((name, "background" if background else "foreground", survived, clear, said[:100]))
    print(f"\n{fault}: {len(table)} injected, {sum(r[2] for r in table)} survived, {sum(r[3] for r in table)} clear")
    for row in table: print("  {:28} {:11} survived {!s:5} clear {!s:5} {}".format(*row))
    assert all(r[2] and r[3] for r in table), [r for r in table if not (r[2] and r[3])]
