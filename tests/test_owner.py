"""A model, a folder and the random numbers belong to a run; a checkpoint is whole, says whose it is, and a run takes its own."""
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from grpo_nb import FastLanguageModel
from grpo_nb.ground import events
from grpo_nb.ground.holders import held
from grpo_nb.run.checkpoints import BESIDE, NOTE, kept_in, why_not_whole
from grpo_nb.run.control import FILE
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.guard import RewardError
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL

TASK = get("sort_digits", n_train=64, n_test=8)


def digits(completions, **kwargs): return [float(sum(ch.isdigit() for ch in c[-1]["content"])) for c in completions]


def config(folder, **more):
    return dict(output_dir=str(folder), max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
                gradient_checkpointing=False, learning_rate=1e-2, save_strategy="no", lr_scheduler_type="constant") | more


def adapted(seed=0):
    model, tokenizer = tiny_model(TASK, steps=0, hidden_size=64, layers=1, seed=seed)
    return FastLanguageModel.get_peft_model(model, r=4), tokenizer


def make(folder, rewards=digits, parts=None, seed=0, **more):
    model, tokenizer = parts or tiny_model(TASK, steps=0, hidden_size=64, layers=1, seed=seed)
    return GRPORun(model, tokenizer, rewards, TASK.train, config(folder, **more))


def weights(run): return {k: v.detach().clone() for k, v in run.trainer.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Gate:
    "A reward that waits, so that a run is in the middle of a step for as long as a test wants."
    __name__ = "gate"
    def __init__(self): self.inside, self.go = threading.Event(), threading.Event()
    def __call__(self, completions, **kwargs):
        self.inside.set()
        assert self.go.wait(60)
        return digits(completions)


# ---- a model belongs to a run

def test_whoever_would_change_a_model_that_trains_is_refused(tmp_path, unpatched):
    PatchFastRL("grpo", FastLanguageModel)
    (model, tokenizer), gate = adapted(), Gate()
    base = model.get_base_model()
    plain = GRPOConfig(**config(tmp_path / "b"), use_cpu=True, bf16=False, report_to="none")
    other = make(tmp_path / "c", parts=(model, tokenizer)) # made before, and not started
    run = make(tmp_path / "a", gate, (model, tokenizer), beta=0.1)
    run.start(background=True)
    assert gate.inside.wait(100), run
    calls = {
        "GRPORun()": lambda: make(tmp_path / "b", parts=(model, tokenizer), beta=0.1),
        "GRPORun() ": lambda: make(tmp_path / "b", parts=(base, tokenizer)),
        "start()": other.start,
        "get_peft_model()": lambda: FastLanguageModel.get_peft_model(tiny_model(TASK, steps=0, hidden_size=64, layers=1)[0]) and
                                    FastLanguageModel.get_peft_model(base),
        "for_inference()": lambda: FastLanguageModel.for_inference(model),
        "for_training()": lambda: FastLanguageModel.for_training(base),
        "merge": model.merge_and_unload, "delete_adapter()": lambda: model.delete_adapter("ref"),
        "inject_adapter()": lambda: model.add_adapter("new", LoraConfig(r=2, target_modules="all-linear")),
        "GRPOTrainer.train()": lambda: GRPOTrainer(model=base, reward_funcs=digits, args=plain, train_dataset=TASK.train,
                                                   processing_class=tokenizer).train(),
        "UnpatchFastRL()": UnpatchFastRL,
    }
    for name, call in calls.items():
        with pytest.raises((RuntimeError, ValueError)) as caught: call()
        if name == "get_peft_model()" and "adapter already" in str(caught.value): continue # refused for another reason
        for word in (name.strip(), str(tmp_path / "a"), "step 0 of 3", "run.stop()" if "for_" not in name else "run.pause()"):
            assert word in str(caught.value), (name, str(caught.value))
    PatchFastRL("grpo", FastLanguageModel) # it is on
    PatchFastRL("dpo") # no trainer of this run's
    gate.go.set()
    assert run.wait(300).state == "finished" and "ref" in model.peft_config and not held()
    kl = [h["value"] for h in run.history if h["name"] == "kl"]
    assert kl[0] == 0 and min(kl[1:]) > 1e-3, kl # with its reference taken away, it would be 0 again
    assert other.start(background=False).state == "finished"


def test_a_paused_run_can_be_tried_and_goes_on_as_if_it_had_not_been(tmp_path):
    def run_in(name): return make(tmp_path / name, seed=1, max_steps=4, learning_rate=1e-3)
    undisturbed = run_in("a").start(background=False)
    run, paused = run_in("b"), threading.Event()
    run.events.subscribe(lambda e: run.pause() if e.step == 2 else None, events.StepLogged)
    run.events.subscribe(lambda e: paused.set(), events.RunPaused)
    run.start(background=True)
    assert paused.wait(300)
    torch.manual_seed(999)
    FastLanguageModel.for_inference(run.trainer.model)
    torch.rand(10)
    with pytest.raises(RuntimeError, match="paused, at step 2 of 4"):
        make(tmp_path / "c", parts=(run.trainer.model, run.trainer.processing_class))
    run.resume().wait(300)
    assert same(weights(run), weights(undisturbed))


def test_a_run_that_ends_or_is_dropped_lets_go(tmp_path):
    def fails(completions, **kwargs): raise ValueError("no")
    parts = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    run = make(tmp_path, fails, parts)
    with pytest.raises(RewardError): run.start(background=False)
    assert not held()
    run = make(tmp_path, parts=parts, max_steps=1) # the same folder too
    run.events.subscribe(lambda e: make(tmp_path / "next", parts=parts), events.RunFinished) # whoever hears of the end
    assert run.start(background=False).state == "finished" and run.events.failures == 0


def test_a_folder_belongs_to_a_run(tmp_path):
    gate = Gate()
    run, second = make(tmp_path, gate).start(background=True), make(tmp_path / ".." / tmp_path.name)
    assert gate.inside.wait(300)
    with pytest.raises(RuntimeError, match=r"(?s)output_dir=.*is in use by the run in .*output_dir of its own"): second.start()
    assert second.state == "ready"
    gate.go.set()
    run.wait(300)
    assert second.start(background=False).state == "finished"


def test_two_runs_side_by_side_each_equal_their_run_alone(tmp_path):
    models = {seed: [tiny_model(TASK, steps=0, hidden_size=64, layers=1, seed=seed) for _ in range(2)] for seed in (1, 2)}
    def run(name, seed): return make(tmp_path / name, parts=models[seed].pop(), max_steps=4, learning_rate=1e-3)
    alone = [weights(run(f"alone{seed}", seed).start(background=False)) for seed in (1, 2)]
    first = run("a", 1)
    begun = threading.Event()
    first.events.subscribe(lambda e: begun.set(), events.StepLogged)
    first.start(background=True)
    assert begun.wait(300)
    second = run("b", 2).start(background=True) # making it seeds the process
    assert first.wait(300).state == second.wait(300).state == "finished"
    assert same(weights(first), alone[0]) and same(weights(second), alone[1])


# ---- a run takes its own checkpoint

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run's folder with three checkpoints."
    folder = tmp_path_factory.mktemp("trained")
    make(folder, save_strategy="steps", save_steps=1).start(background=False)
    return folder


def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])
def gone(path): path.unlink()
def garbage(path): path.write_text("{]")


@pytest.mark.parametrize("name, harm", [
    ("trainer_state.json", cut), ("trainer_state.json", gone), ("optimizer.pt", cut), ("optimizer.pt", gone),
    ("scheduler.pt", gone), ("rng_state.pth", gone), ("rng_state.pth", cut), ("model.safetensors", cut), (FILE, garbage),
    (NOTE, garbage), (NOTE, gone),
], ids=lambda x: getattr(x, "__name__", x))
def test_what_is_not_whole_is_passed_over_and_named(trained, tmp_path, name, harm):
    folder = shutil.copytree(trained, tmp_path / "x")
    harm(folder / "checkpoint-3" / name)
    events.said.clear()
    assert make(folder)._checkpoint(True) == str(folder / "checkpoint-2")
    assert any("checkpoint-3" in s and name in s for s in events.said), events.said
    for n in (1, 2): shutil.rmtree(folder / f"checkpoint-{n}")
    with pytest.raises(FileNotFoundError, match=f"checkpoint-3.*{name}"): make(folder)._checkpoint(True)
    by_path = str(folder / "checkpoint-3")
    if harm is gone and "model" not in name and "state.json" not in name:
        assert make(folder)._checkpoint(by_path) == by_path
        assert name == NOTE or any("lacks" in s and name in s for s in events.said)
    else:
        with pytest.raises((FileNotFoundError, ValueError), match=name): make(folder)._checkpoint(by_path)


def test_another_runs_checkpoint_is_not_taken(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "x")
    for change, word in [(dict(learning_rate=1e-3), "learning_rate=0.01 there, 0.001 here"), (dict(seed=7), "another model|seed")]:
        with pytest.raises(FileNotFoundError, match=f"no checkpoint of this run.*(?:{word}).*takes one by its path"):
            make(folder, **change)._checkpoint(True) if "seed" not in change else GRPORun(
                *tiny_model(TASK, steps=0, hidden_size=128, layers=1), digits, TASK.train, config(folder))._checkpoint(True)
    run = make(folder, max_steps=9, save_strategy="steps", logging_steps=2) # longer, and saved at other times: the same run
    assert run._checkpoint(True) == str(folder / "checkpoint-3")
    large = GRPORun(*tiny_model(TASK, steps=0, hidden_size=128, layers=1), digits, TASK.train, config(folder))
    with pytest.raises(ValueError) as caught: large._checkpoint(folder / "checkpoint-2")
    said = str(caught.value)
    assert str(folder / "checkpoint-2") in said and "another model" in said and "\n" not in said
    with pytest.raises(TypeError, match="resume=3"): run._checkpoint(3)


def test_a_run_in_the_folder_of_another_keeps_to_its_own(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "x")
    (folder / "checkpoint-3").rename(folder / "checkpoint-8")
    events.said.clear()
    run = make(folder, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    saved = []
    run.events.subscribe(lambda e: saved.append(Path(e.path).is_dir()), events.CheckpointSaved)
    run.events.subscribe(lambda e: run.stop() if e.step == 1 else None, events.StepLogged)
    run.start(background=False)
    assert saved == [True] and any("checkpoints of an earlier run" in s for s in events.said)
    assert run._checkpoint(True) == str(folder / "checkpoint-1")
    run.start(resume=True, background=False)
    assert run.state == "finished" and saved == [True, True] and [k.step for k in kept_in(folder)] == [2, 8]
    fresh = make(folder, save_strategy="steps", save_steps=50)
    fresh.events.subscribe(lambda e: fresh.stop(save=False), events.RunStarted)
    fresh.trainer.args.save_strategy = "no"
    fresh.start(background=False)
    with pytest.raises(FileNotFoundError, match="an earlier run's"): fresh.start(resume=True) # it has begun, and has none


def test_resuming_from_the_last_step_trains_no_more(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "x")
    run = make(folder, save_strategy="steps", save_steps=1).start(resume=True, background=False)
    before = weights(run)
    assert run.state == "finished" and run.step == 3 and max(h["step"] for h in run.history) == 3
    from safetensors.torch import load_file
    held = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(held[k], before[k]) for k in held)


@pytest.mark.parametrize("files", [
    ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"],
    ["global_step3/mp_rank_00_model_states.pt", "latest", "rng_state_0.pth", "model.safetensors"],
    ["adapter_model.safetensors", "ref/adapter_model.safetensors", "optimizer.bin", "scheduler.pt", "rng_state.pth"],
], ids=["fsdp", "deepspeed", "adapter"])
def test_sharded_checkpoints_are_whole(tmp_path, trained, files):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        like = "rng_state.pth" if name.endswith(("pt", "pth")) else "model.safetensors"
        shutil.copy(trained / "checkpoint-3" / like, folder / name)
    shutil.copy(trained / "checkpoint-3" / "trainer_state.json", folder)
    assert why_not_whole(folder) is None and kept_in(tmp_path)[0].problem is None


# ---- no room

def no_room(path, *args, **kwargs): raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3520 vs 3412")


def test_no_room_for_a_checkpoint_ends_no_run(tmp_path, monkeypatch, capsys):
    import collections
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("grpo_nb.run.checkpoints.shutil.disk_usage", lambda path: usage(1 << 20, 1 << 20, 4096))
    run = make(tmp_path, save_strategy="steps", save_steps=1)
    save = type(run.trainer)._save_optimizer_and_scheduler
    def full(folder):
        if run.step != 1: no_room(folder)
        save(run.trainer, folder)
    run.trainer._save_optimizer_and_scheduler = full
    off = run.events.subscribe(lambda e: run.stop() if e.step == 2 else None, events.StepLogged)
    assert run.start(background=False).state == "stopped" and run.step == 2
    off()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] and run.checkpoint.endswith("checkpoint-1")
    assert not list((tmp_path / BESIDE).glob("*"))
    said = capsys.readouterr().out
    assert "checkpoint-2 could not be written, for the disk is full: 4.0 KiB are free" in said and "it takes about" in said
    run.trainer._save_optimizer_and_scheduler = lambda folder: save(run.trainer, folder) # somebody has made room
    assert run.start(resume=True, background=False).state == "finished" and run.step == 3


def test_no_room_for_the_table_of_completions_ends_no_run(tmp_path, monkeypatch, capsys):
    import pandas
    def full(self, path, *args, **kwargs):
        Path(path).write_text("half")
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    monkeypatch.setattr(pandas.DataFrame, "to_parquet", full)
    run = make(tmp_path, max_steps=2, log_completions=True).start(background=False)
    assert run.state == "finished" and not list((tmp_path / "completions").glob("*"))
    assert "the completions of step 1 could not be written to" in capsys.readouterr().out


def test_an_interrupt_while_saving_leaves_nothing_half(tmp_path):
    run = make(tmp_path, save_strategy="steps", save_steps=1)
    save = type(run.trainer)._save_optimizer_and_scheduler
    def broken_off(folder):
        if run.step == 2: raise KeyboardInterrupt
        save(run.trainer, folder)
    run.trainer._save_optimizer_and_scheduler = broken_off
    with pytest.raises(KeyboardInterrupt): run.start(background=False)
    assert run.state == "stopped" and run._checkpoint(True) == str(tmp_path / "checkpoint-1")
    assert json.loads(Path(run.checkpoint, NOTE).read_text())["run"] == run.id


def test_a_configuration_made_between_making_and_starting_a_run(tmp_path):
    "It resets Accelerate's state, which the run's trainer has."
    run = make(tmp_path, max_steps=1)
    GRPOConfig(**config(tmp_path / "b"), use_cpu=True, bf16=False, report_to="none")
    assert run.start(background=False).state == "finished"
