"""Steering a run: settings that change between two steps, checkpoints on request, what a step cost, listeners that hang."""
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from grpo_nb.run import control
from grpo_nb.ground import events
from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model

TASK = get("sort_digits", n_train=64, n_test=8)


def digits(completions, **kwargs):
    return [float(sum(ch.isdigit() for ch in c[-1]["content"])) for c in completions]


def text(completion): return completion if isinstance(completion, str) else completion[-1]["content"] # TRL 1.12 logs texts


def constant(completions, **kwargs): return [1.0] * len(completions)


def make(folder, rewards=digits, adapter=False, run=None, **more):
    model, tokenizer = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    if adapter:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    config = dict(output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
                  gradient_checkpointing=False, learning_rate=1e-2, save_strategy="no")
    return GRPORun(model, tokenizer, rewards, TASK.train, {**config, **more}, **(run or {}))


def until(test, seconds=300):
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end
        time.sleep(0.01)


def after(run, step, act):
    "Call `act` when that step is logged, in the training thread."
    run.events.subscribe(lambda e: act() if e.step == step else None, events.StepLogged)


@pytest.fixture(params=["stock", "patched"])
def trl(request):
    if request.param == "patched": PatchFastRL("grpo")
    yield request.param
    if request.param == "patched": UnpatchFastRL("grpo")


# ---- the learning rate

class Rates(TrainerCallback):
    "The rate that each step is made with."
    def __init__(self): self.seen = []
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs): self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind, more", [
    ("linear", {}),
    ("cosine", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("polynomial", {}),
    ("inverse_sqrt", {}),
    ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
])
def test_the_learning_rate_holds_from_the_next_step_on(tmp_path, kind, more):
    seen = []
    for change in (False, True):
        rates = Rates()
        run = make(tmp_path, max_steps=6, lr_scheduler_type=kind, warmup_steps=2, run=dict(callbacks=[rates]), **more)
        if change: after(run, 3, lambda run=run: run.change(learning_rate=5e-3))
        run.start(background=False)
        seen.append(rates.seen)
    whole, changed = seen
    assert changed[:3] == whole[:3] and changed[3:] == pytest.approx([r / 2 for r in whole[3:]], rel=1e-4, abs=1e-9)
    assert run.settings["learning_rate"] == 5e-3 and run.changes == [dict(step=3, name="learning_rate", old=1e-2, new=5e-3)]


def optimizer_of(groups): return torch.optim.AdamW([dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in groups])


def test_groups_keep_their_proportions_and_a_rate_of_zero_can_rise():
    optimizer = optimizer_of([1e-3, 1e-4])
    trainer = SimpleNamespace(optimizer=optimizer, lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10))
    control.set_learning_rate(trainer, 2e-3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 2e-4])
    optimizer.step()
    trainer.lr_scheduler.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"] / 10)
    assert trainer.lr_scheduler.base_lrs == pytest.approx([2e-3, 2e-4])
    optimizer = optimizer_of([0.0])
    trainer = SimpleNamespace(optimizer=optimizer, lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5))
    control.set_learning_rate(trainer, 1e-3)
    assert optimizer.param_groups[0]["lr"] == 5e-4 and control.learning_rate(trainer) == 1e-3


@pytest.mark.parametrize("kind", ["sequence", "plateau", "wrapped"])
def test_schedulers_of_schedulers(kind):
    optimizer, lr = optimizer_of([1e-2]), torch.optim.lr_scheduler
    if kind == "sequence":
        scheduler = lr.SequentialLR(optimizer, [lr.ConstantLR(optimizer, 1.0), lr.LinearLR(optimizer, 1.0, 0.5, 4)], [2])
    elif kind == "plateau": scheduler = lr.ReduceLROnPlateau(optimizer)
    else: scheduler = SimpleNamespace(scheduler=lr.StepLR(optimizer, 2, 0.5))
    trainer = SimpleNamespace(optimizer=optimizer, lr_scheduler=scheduler)
    control.set_learning_rate(trainer, 1e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3) and control.learning_rate(trainer) == pytest.approx(1e-3)


# ---- sampling and scoring

def logps_by_hand(trainer, batch, temperature):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad(): logits = trainer.model(input_ids=ids, attention_mask=mask).logits.float()
    n = batch["completion_ids"].shape[1]
    return torch.log_softmax(logits[:, -n - 1:-1] / temperature, -1).gather(2, batch["completion_ids"][..., None])[..., 0]


@pytest.mark.parametrize("adapter", [False, True])
def test_temperature_is_the_samplers_and_the_losses(tmp_path, trl, adapter):
    run = make(tmp_path, adapter=adapter, max_steps=3, **({"engine": "hf"} if trl == "patched" else {}))
    after(run, 1, lambda: run.change(temperature=0.25))
    seen, original = [], run.trainer.model.generate
    def generate(*args, **kwargs):
        seen.append(kwargs["generation_config"].temperature)
        return original(*args, **kwargs)
    run.trainer.model.generate = generate
    run.start(background=False)
    assert seen == [1.0, 0.25, 0.25] and run.settings["temperature"] == 0.25
    trainer = run.trainer
    trainer.model.eval()
    batch = trainer._buffered_inputs[0]
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])[0]
    keep = batch["completion_mask"].bool()
    torch.testing.assert_close(found[keep], logps_by_hand(trainer, batch, 0.25)[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trls_own_head_is_found_behind_accelerates_wrappers(precision):
    head = pytest.importorskip("trl.trainer.utils")
    if not hasattr(head, "add_fused_lm_head"): pytest.skip("this TRL has no such head")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True) # the precision of an earlier test
    model, _ = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    head.add_fused_lm_head(model, temperature=0.7)
    prepared = Accelerator(mixed_precision=precision, cpu=True).prepare_model(model)
    for m in (prepared, get_peft_model(prepared, LoraConfig(r=2, target_modules="all-linear"))):
        assert [c.cell_contents for c in control.fused_heads(m)] == [0.7]
    AcceleratorState._reset_state(True)


def test_the_length_of_completions(tmp_path, trl):
    run, longest = make(tmp_path), []
    after(run, 2, lambda: run.change(max_completion_length=2))
    run.events.subscribe(lambda e: longest.append(max(e.lengths)), events.CompletionsLogged)
    run.start(background=False)
    assert longest[:2] == [6, 6] and longest[2:] == [2, 2]


def test_a_vllm_sampler_hears_of_it():
    engine = SimpleNamespace(temperature=1.0, max_completion_length=8, generation_kwargs={"max_tokens": 8})
    trainer = SimpleNamespace(temperature=1.0, max_completion_length=8, vllm_generation=engine, model=None)
    control.set_temperature(trainer, 0.5)
    control.set_max_completion_length(trainer, 4)
    assert (engine.temperature, engine.max_completion_length, engine.generation_kwargs) == (0.5, 4, {"max_tokens": 4})


def test_what_was_sampled_for_several_steps_is_used_up_first(tmp_path, trl):
    run, told, longest = make(tmp_path, max_steps=6, num_iterations=3), [], []
    run.events.subscribe(lambda e: told.append((e.step, e.name)), events.SettingChanged)
    run.events.subscribe(lambda e: longest.append(max(e.lengths)), events.CompletionsLogged)
    after(run, 1, lambda: run.change(temperature=0.5, max_completion_length=3, learning_rate=1e-3, reward_weights=[2.0]))
    run.start(background=False)
    assert told == [(1, "learning_rate"), (3, "temperature"), (3, "max_completion_length"), (3, "reward_weights")]
    assert longest == [6, 3] and run.requested == {} # one event each time that completions are sampled


def test_weights_count_from_the_next_step(tmp_path, trl):
    run, rewards = make(tmp_path, rewards=[digits, constant]), []
    run.events.subscribe(lambda e: rewards.append((e.metrics["reward"], e.metrics["rewards/digits/mean"])), events.StepLogged)
    after(run, 2, lambda: run.change(reward_weights={"constant": 10}))
    run.start(background=False)
    assert [r - d for r, d in rewards] == pytest.approx([1, 1, 10, 10])
    assert run.settings["reward_weights"] == {"digits": 1.0, "constant": 10.0}


def test_beta_falls_to_zero_and_rises_again(tmp_path, trl):
    run, kls = make(tmp_path, adapter=True, beta=0.1, max_steps=8, num_iterations=2), []
    run.events.subscribe(lambda e: kls.append("kl" in e.metrics), events.StepLogged)
    after(run, 2, lambda: run.change(beta=0))
    after(run, 5, lambda: run.change(beta=0.2)) # the completions of step 6 have no reference log-probs
    run.start(background=False)
    assert kls == [True, True, False, False, False, False, True, True]
    assert [(c["step"], c["new"]) for c in run.changes] == [(2, 0.0), (6, 0.2)]


def test_settings_are_the_runs_own_also_while_it_samples(tmp_path, trl):
    seen = []
    def looking(completions, **kwargs):
        seen.append(run.settings["beta"])
        return digits(completions)
    run = make(tmp_path, looking, adapter=True, beta=0.1, max_steps=2)
    run.start(background=False)
    assert seen == [0.1, 0.1]


# ---- asking

@pytest.mark.parametrize("given, kind, words", [
    ({}, ValueError, ["without a setting"]),
    (dict(learning_rat=1), TypeError, ["Did you mean 'learning_rate'"]),
    (dict(learning_rate=0), ValueError, ["learning_rate=0", "above 0"]),
    (dict(learning_rate="1e-5"), ValueError, ["'1e-5'"]),
    (dict(learning_rate=float("nan")), ValueError, ["nan"]),
    (dict(beta=0.1), ValueError, ["beta=0.1", "built with beta=0"]),
    (dict(beta=-1), ValueError, ["beta=-1"]),
    (dict(temperature=0), ValueError, ["temperature=0"]),
    (dict(max_completion_length=1.5), ValueError, ["1.5", "whole number"]),
    (dict(max_completion_length=0), ValueError, ["at least 1"]),
    (dict(max_completion_length=10**6), ValueError, ["1000000", "tokens"]),
    (dict(reward_weights=[1.0]), ValueError, ["list of 2", "digits", "constant"]),
    (dict(reward_weights={"digit": 1.0}), ValueError, ["Did you mean 'digits'"]),
    (dict(reward_weights={"digits": "x"}), ValueError, ["'digits'", "finite"]),
    (dict(temperature=0.5, reward_weights=3), ValueError, ["reward_weights=3"]),
], ids=lambda v: next(iter(v), "none") if isinstance(v, dict) else None)
def test_bad_values_change_nothing(asked, given, kind, words):
    with pytest.raises(kind) as caught: asked.change(**given)
    for word in words: assert word in str(caught.value)
    assert asked.requested == {}


@pytest.fixture(scope="module")
def asked(tmp_path_factory): return make(tmp_path_factory.mktemp("asked"), rewards=[digits, constant])


def test_changes_before_the_start_while_paused_and_after_the_end(tmp_path):
    run, told = make(tmp_path, rewards=[digits, constant]), []
    run.events.subscribe(lambda e: told.append((e.step, e.name, e.new)), events.SettingChanged)
    run.change(temperature=0.7).change(reward_weights={"digits": 3}).change(reward_weights={"constant": 2})
    assert run.settings["temperature"] == 1.0 and run.requested["reward_weights"] == {"digits": 3.0, "constant": 2.0}
    after(run, 2, run.pause)
    run.start(background=True)
    until(lambda: run.state == "paused")
    run.change(learning_rate=1e-3)
    until(lambda: run.settings["learning_rate"] == 1e-3)
    assert run.state == "paused" and run.step == 2
    run.resume().wait(300)
    assert told == [(0, "temperature", 0.7), (0, "reward_weights", {"digits": 3.0, "constant": 2.0}), (2, "learning_rate", 1e-3)]
    with pytest.raises(RuntimeError, match="already finished"): run.change(temperature=1)


def test_a_change_that_fails_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def broken(trainer, value): raise RuntimeError("no such place")
    monkeypatch.setitem(control.SETTINGS, "temperature", (control.SETTINGS["temperature"][0], broken))
    run = make(tmp_path, max_steps=2).change(temperature=0.5)
    assert run.start(background=False).state == "finished" and run.settings["temperature"] == 1.0 and run.changes == []
    assert "temperature could not be changed to 0.5 (RuntimeError: no such place)" in capsys.readouterr().out


# ---- checkpoints

def weights(run): return {k: v.detach().clone() for k, v in run.trainer.model.state_dict().items()}


@pytest.mark.parametrize("when", ["running", "paused"])
def test_a_checkpoint_on_request_resumes_to_the_same_weights(tmp_path, when):
    run, paths = make(tmp_path, max_steps=5), []
    run.events.subscribe(lambda e: paths.append((e.step, e.path)), events.CheckpointSaved)
    def act():
        run.change(learning_rate=3e-3, temperature=0.9, reward_weights=[0.5])
        if when == "running": run.save()
        else: run.pause()
    after(run, 2, act)
    run.start(background=True)
    if when == "paused":
        until(lambda: run.state == "paused")
        until(lambda: not run.requested)
        run.save()
        until(lambda: run.checkpoint)
        assert run.state == "paused"
        run.resume()
    run.wait(300)
    assert paths == [(2, str(tmp_path / "checkpoint-2"))] and Path(run.checkpoint, "trainer_state.json").is_file()
    assert json.loads(Path(run.checkpoint, control.FILE).read_text())["changed"] == {
        "learning_rate": 3e-3, "temperature": 0.9, "reward_weights": {"digits": 0.5},
    }
    events.said.clear()
    again = make(tmp_path, max_steps=5)
    again.start(resume=True, background=False)
    assert again.settings == run.settings and again.changes == run.changes
    assert any("goes on with them: learning_rate 0.003, temperature 0.9" in m for m in events.said)
    for name, value in weights(again).items(): torch.testing.assert_close(value, weights(run)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_in_the_same_process_what_was_changed_stays_changed(tmp_path):
    run = make(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    after(run, 3, lambda: run.change(learning_rate=1e-3, temperature=0.5))
    faults = [OSError("gone")]
    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and faults: raise faults.pop()
    run.trainer.add_callback(Fault())
    with pytest.raises(OSError, match="gone"): run.start(background=False)
    run.start(resume=True, background=False) # from step 2, before the change
    assert run.state == "finished" and run.settings["learning_rate"] == 1e-3 and run.settings["temperature"] == 0.5
    assert [c["step"] for c in run.changes] == [3, 3]


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    run = make(tmp_path, max_steps=3)
    def full(model, trial):
        Path(tmp_path, f"checkpoint-{run.step}").mkdir()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(run.trainer, "_save_checkpoint", full)
    after(run, 1, run.save)
    assert run.start(background=False).state == "finished" and run.checkpoint is None
    assert "could not be written, for the disk is full" in capsys.readouterr().out and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["stop", "the trainer's own"])
def test_every_checkpoint_is_an_event(tmp_path, how):
    run, saved = make(tmp_path, **({} if how == "stop" else dict(save_strategy="steps", save_steps=2))), []
    run.events.subscribe(lambda e: saved.append((e.step, e.path)), events.CheckpointSaved)
    if how == "stop": after(run, 2, run.stop)
    else: after(run, 2, run.save) # the trainer saves then anyway: one checkpoint, one event
    run.start(background=False)
    steps = [2] if how == "stop" else [2, 4]
    assert saved == [(n, str(tmp_path / f"checkpoint-{n}")) for n in steps]
    if how == "stop": assert make(tmp_path).start(resume=True, background=False).step == 4
    with pytest.raises(RuntimeError, match="save"): make(tmp_path).save()


def test_pause_and_stop_in_the_middle_of_sampling_hold_after_that_step(tmp_path):
    inside, go = threading.Event(), threading.Event()
    def slow(completions, **kwargs):
        inside.set()
        assert go.wait(300)
        return digits(completions)
    run = make(tmp_path, rewards=slow, max_steps=50)
    run.start(background=True)
    assert inside.wait(300)
    run.pause()
    go.set()
    until(lambda: run.state == "paused")
    assert run.step == 1
    inside.clear()
    go.clear()
    run.resume()
    assert inside.wait(300)
    run.stop(save=False)
    go.set()
    run.wait(300)
    assert run.state == "stopped" and run.step == 2


# ---- what a step was

@pytest.mark.parametrize(
    "more",
    [{}, dict(mask_truncated_completions=True), dict(logging_steps=2), dict(gradient_accumulation_steps=2), dict(num_iterations=2)],
    ids=["plain", "masked", "every second", "accumulated", "twice"],
)
def test_completions_come_with_ids_lengths_and_cuts(tmp_path, trl, more):
    run, seen, shares = make(tmp_path, **more), [], []
    run.events.subscribe(seen.append, events.CompletionsLogged)
    run.events.subscribe(lambda e: shares.append((e.metrics["completions/clipped_ratio"], e.metrics["completions/mean_length"]))
                         if "reward" in e.metrics else None, events.StepLogged)
    run.start(background=False)
    decode = run.trainer.processing_class.decode
    for event, (share, mean) in zip(seen, shares, strict=True):
        assert [decode(i, skip_special_tokens=True) for i in event.ids] == [text(c) for c in event.completions]
        assert event.lengths == [len(i) for i in event.ids] and max(event.lengths) <= 6
        if "logging_steps" not in more:
            assert sum(event.cut_off) / len(event.cut_off) == pytest.approx(share)
            assert sum(event.lengths) / len(event.lengths) == pytest.approx(mean)
        if "num_iterations" in more:
            assert [len(x) for x in event.logps] == event.lengths and all(v <= 0 for row in event.logps for v in row)


def test_evaluation_keeps_the_records_in_step(tmp_path):
    run = make(tmp_path, run=dict(eval_dataset=TASK.test), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    seen = []
    run.events.subscribe(seen.append, events.CompletionsLogged)
    run.start(background=False)
    decode = run.trainer.processing_class.decode
    assert seen and all([decode(i, skip_special_tokens=True) for i in e.ids] == [text(c) for c in e.completions] for e in seen)


def test_seconds_and_memory_are_logged(tmp_path, trl):
    def slow(completions, **kwargs):
        time.sleep(0.02)
        return digits(completions)
    run = make(tmp_path, rewards=slow, max_steps=2).start(background=False)
    logs = [log for log in run.trainer.state.log_history if "reward" in log]
    for log in logs:
        assert log["time/rewards"] >= 0.02 and log["time/sampling"] > 0
        assert log["time/training"] > 0
        assert log["memory/peak_gib"] >= log["memory/held_gib"] > 0


def test_a_patch_that_comes_after_the_run_was_made_counts(tmp_path):
    run = make(tmp_path, max_steps=1)
    PatchFastRL("grpo")
    try: run.start(background=False)
    finally: UnpatchFastRL("grpo")
    assert any(r["name"] == "step/tokens_per_second" for r in run.history)
    assert any(r["name"] == "time/sampling" for r in run.history)


# ---- listeners that are slow, hang or fail

def test_a_listener_that_hangs_does_not_hold_up_the_run(tmp_path):
    run, gate, got = make(tmp_path, max_steps=6), threading.Event(), []
    def hangs(event):
        gate.wait()
        got.append(event)
    run.events.subscribe(hangs, queue=2)
    assert run.start(background=False).state == "finished" # while the listener still has the first event in its hands
    assert got == [] and run.events.dropped == 14 - 3
    gate.set()
    assert run.events.drain(120) and isinstance(got[-1], events.RunFinished) and len(got) == 3


def test_ten_thousand_events_leave_a_bounded_queue():
    bus, gate, held = events.Bus(keep=10), threading.Event(), threading.Event()
    def hangs(event):
        held.set()
        gate.wait()
    off = bus.subscribe(hangs, queue=100)
    bus.emit(events.RunPaused())
    assert held.wait(300) # it has one in its hands, and takes no other
    for step in range(10_000): bus.emit(events.StepLogged(step=step, metrics={"reward": 1.0}))
    queue = bus._subscriptions[0].queue
    assert len(queue.waiting) == 100 and bus.dropped == 10_000 - 100 and len(bus.kept) == 10
    off()
    gate.set()
    assert bus.dropped >= 10_000 - 100 and not queue.waiting


def test_a_failing_listener_in_a_queue_is_counted():
    bus = events.Bus()
    def broken(event): raise OSError("disk full")
    bus.subscribe(broken, queue=10)
    with pytest.warns(RuntimeWarning, match="disk full"):
        for _ in range(3):
            bus.emit(events.RunPaused())
            assert bus.drain(60)
    assert bus.failures == 3 and bus.dropped == 0
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="queue="): bus.subscribe(print, queue=wrong)


@pytest.mark.parametrize("patched", [False, True])
def test_tokens_are_scored_on_request(tmp_path, patched):
    from grpo_nb import PatchFastRL, UnpatchFastRL
    from grpo_nb.ground.events import CompletionsLogged
    if patched: PatchFastRL("grpo")
    try:
        run, seen = make(tmp_path, max_steps=4), []
        run.events.subscribe(seen.append, CompletionsLogged)
        run.events.subscribe(lambda e: setattr(run, "token_values", e.step == 2), CompletionsLogged)
        run.start(background=False)
    finally:
        if patched: UnpatchFastRL("grpo")
    assert [e.logps is not None for e in seen] == [e.entropies is not None for e in seen] == [False, False, True, False]
    event = seen[2]
    assert [len(x) for x in event.logps] == [len(x) for x in event.entropies] == event.lengths
    assert all(v <= 0 for row in event.logps for v in row) and all(v >= 0 for row in event.entropies for v in row)
