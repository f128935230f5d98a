"""Run by torchrun in two processes: a GRPORun logs the completions of both, and what is asked of one process holds for both."""
import sys
import threading

import torch.distributed as dist

from grpo_nb.ground import events
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model

folder = sys.argv[1]
task = get("sort_digits", n_train=64, n_test=8)


def digits(completions, **kwargs): return [sum(ch.isdigit() for ch in c[-1]["content"]) / 10 for c in completions]


def make(name, steps):
    model, tokenizer = tiny_model(task, steps=0, hidden_size=64, layers=1)
    return tokenizer, GRPORun(model, tokenizer, digits, task.train, dict(
        output_dir=f"{folder}/{name}", max_steps=steps, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        gradient_checkpointing=False, save_strategy="no", learning_rate=1e-2, ddp_find_unused_parameters=False))


def everywhere(value):
    found = [None, None]
    dist.all_gather_object(found, value)
    return found


def at(run, step, action): run.events.subscribe(lambda e: action() if e.step == step else None, events.StepLogged)


tokenizer, run = make("a", 6)
rank, logged, told = run.trainer.accelerator.process_index, [], []
assert run.trainer.accelerator.num_processes == 2
run.events.subscribe(logged.append, events.CompletionsLogged)
run.events.subscribe(lambda e: told.append((e.step, e.name, e.new)), events.SettingChanged)
at(run, 1, lambda: run.change(temperature=0.8)) # by every process
at(run, 3, lambda: rank == 0 and run.change(learning_rate=1e-3)) # by the first
at(run, 4, lambda: rank == 1 and run.change(max_completion_length=3)) # by the other
run.start(background=False)
assert run.state == "finished"

# every process logs the completions of both, with their tokens
for e in logged:
    assert len(e.prompts) == len(e.completions) == len(e.ids) == len(e.lengths) == len(e.cut_off) == len(e.rewards["digits"]) == 8
    texts = [tokenizer.decode(i, skip_special_tokens=True) for i in e.ids]
    assert texts == [c[-1]["content"] if isinstance(c, list) else c for c in e.completions], (texts, e.completions)
    assert e.lengths == [len(i) for i in e.ids]
    assert e.prompts[0] != e.prompts[4], "each process has a prompt of its own"
assert [e.step for e in logged] == [1, 2, 3, 4, 5, 6] and max(logged[-1].lengths) <= 3
first, second = everywhere([e.ids for e in logged])
assert first == second

# what was asked of all, of the first and of the other process holds for both, after the same step
first, second = everywhere((told, run.settings, run.requested))
wanted = (
    [(1, "temperature", 0.8), (3, "learning_rate", 1e-3), (4, "max_completion_length", 3)],
    {**run.settings, "temperature": 0.8, "learning_rate": 1e-3, "max_completion_length": 3},
    {},
)
assert first == second == wanted, (first, second)

# a checkpoint and a pause asked of the first process, and a stop asked of the other one
_, run = make("b", 500)
at(run, 2, lambda: rank == 0 and run.save().pause())
if rank == 0:
    run.events.subscribe(lambda e: threading.Timer(0.5, run.resume).start(), events.RunPaused)
at(run, 4, lambda: rank == 1 and run.stop())
kinds = []
run.events.subscribe(
    lambda e: kinds.append((type(e).__name__, e.step)), events.RunPaused,
    events.RunResumed, events.CheckpointSaved, events.RunStopped,
)
run.start(background=False)
first, second = everywhere((run.state, run.step, kinds))
wanted = [("CheckpointSaved", 2), ("RunPaused", 2), ("RunResumed", 2), ("CheckpointSaved", 4), ("RunStopped", 4)]
assert first == second == ("stopped", 4, wanted), (first, second)
if rank == 0: print("the processes agree", flush=True)
