"""Runs that are killed or interrupted at random moments, half of them while they save, and taken up again in a new process.

    python tests/kills.py --kills 100 --interrupts 20 --jobs 16 --out kills.json --markdown kills.md

Each training is a small one on the CPU that saves after every step. A killed run is made anew with the same settings, as the cell
of a notebook is in a new kernel, and goes on with `start(resume=True)`; its weights and all its metrics have to equal, bit for bit,
those of a run that nobody disturbed. Each process imports the libraries once and forks for each training.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = {
    "whole model": dict(),
    "adapter, beta 0.05, two to keep": dict(adapter=True, beta=0.05, save_total_limit=2),
    "two micro-batches": dict(gradient_accumulation_steps=2, per_device_train_batch_size=4),
}
STEPS = 6
TIMED = ("time", "second", "memory", "flos", "train_loss") # metrics of the machine, and the mean over what one process trained


def make(case, folder):
    "The run of a case."
    import torch
    from peft import LoraConfig, get_peft_model

    from grpo_nb import GRPORun, PatchFastRL
    from grpo_nb.tasks.library import get
    from grpo_nb.tasks.tiny import tiny_model

    torch.set_num_threads(1)
    PatchFastRL("grpo")
    task, more = get("sort_digits", n_train=32, n_test=8), dict(CASES[case])
    model, tokenizer = tiny_model(task, steps=0, hidden_size=64, layers=1)
    if more.pop("adapter", False):
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    settings = dict(output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, num_generations=4, use_cpu=True,
                    max_completion_length=4, gradient_checkpointing=False, learning_rate=1e-2, lr_scheduler_type="constant",
                    save_strategy="steps", save_steps=1, bf16=False)
    return GRPORun(model, tokenizer, digits, task.train, settings | more)


def digits(completions, **kwargs): return [float(sum(ch.isdigit() for ch in c[-1]["content"])) for c in completions]


def outcome(run):
    "What is compared: the weights, and every metric of every step but times."
    weights = hashlib.sha256()
    for name, value in sorted(run.trainer.model.state_dict().items()):
        weights.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    metrics = {f"{h['step']} {h['name']}": h["value"] for h in run.history if not any(t in h["name"] for t in TIMED)}
    return dict(weights=weights.hexdigest(), metrics=metrics)


# ---- what a forked process does

def disturb(plan, folder, run):
    "Arrange the kill or the interrupts of a training; `plan` says when."
    import grpo_nb.run.saving as module
    def strike():
        (folder / "struck").write_text(f"{run.step} {'saving' if saving else ''}")
        os.kill(os.getpid(), signal.SIGKILL if plan["how"] == "kill" else signal.SIGINT)
        if plan.get("twice"): threading.Timer(plan["twice"], os.kill, (os.getpid(), signal.SIGINT)).start()
    saving, events, write = [], [0], module.write
    def counted(event, args): # every file that is opened, renamed or removed while a checkpoint is written
        if not saving or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"): return
        events[0] += 1
        if events[0] != plan["event"]: return
        saving.clear()
        saving.append("struck")
        strike()
    def watched(trainer, *args, **kwargs):
        if plan["where"] == "saving" and trainer.state.global_step == plan["step"]:
            saving.append("yes")
            if "after" in plan: threading.Timer(plan["after"], strike).start()
        try: return write(trainer, *args, **kwargs)
        finally: saving.clear()
    module.write = watched
    if "event" in plan: sys.addaudithook(counted)
    if plan["where"] == "anywhere":
        thread = threading.Timer(plan["after"], strike)
        thread.daemon = True
        thread.start()


def train(case, folder, plan=None, resume=False):
    "One training; what came of it goes into the folder."
    from grpo_nb.ground import events
    run = make(case, folder / "out")
    done = {}
    def announced(event):
        with (folder / "announced").open("a") as f: f.write(f"{event.step}\n")
    run.events.subscribe(announced, events.CheckpointSaved)
    run.events.subscribe(lambda e: done.update(began=e.step), events.RunStarted)
    if plan: disturb(plan, folder, run)
    start = time.perf_counter()
    try: run.start(resume=resume, background=False)
    except FileNotFoundError as error:
        done["refused"] = str(error)
        run.start(background=False)
    done |= dict(state=run.state, seconds=time.perf_counter() - start, **outcome(run))
    (folder / ("resumed.json" if resume else "first.json")).write_text(json.dumps(done))


def forked(folder, name, *args, **kwargs):
    "`train` in a process of its own -> its exit status, negative for a signal."
    pid = os.fork()
    if pid == 0:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            train(*args, **kwargs)
            status = 0
        except BaseException: # noqa: BLE001 it stands in the log
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- one kill, and all of them

def plan_of(number, how, seed, seconds):
    "When the run of a number is struck: even ones while they save, the others at any time."
    draw = random.Random(f"{seed} {how} {number}")
    plan = dict(how=how, where="saving" if number % 2 == 0 else "anywhere")
    if plan["where"] == "anywhere": plan["after"] = draw.uniform(0, seconds)
    else:
        plan["step"] = draw.randint(1, STEPS)
        if draw.random() < 0.5: plan["after"] = draw.uniform(0, 0.06)
        else: plan["event"] = draw.randint(1, 40)
    if how == "interrupt" and draw.random() < 0.6: plan["twice"] = draw.uniform(0.001, 0.05)
    return plan


def one(number, how, seed, folder, wholes):
    "Strike one run, take it up again and compare -> a row of the table."
    case = list(CASES)[number % len(CASES)]
    whole = wholes[case]
    plan = plan_of(number, how, seed, whole["seconds"])
    folder = folder / f"{how}{number}"
    folder.mkdir()
    status = forked(folder, "first", case, folder, plan)
    struck = (folder / "struck").read_text() if (folder / "struck").exists() else None
    said = [int(x) for x in (folder / "announced").read_text().split()] if (folder / "announced").exists() else []
    row = dict(number=number, how=how, case=case, plan=plan, status=status, struck=struck, announced=max(said, default=0))
    again = forked(folder, "resumed", case, folder, resume=True)
    if again: return {**row, "result": "blocked", "log": (folder / "resumed.log").read_text()[-2000:]}
    found, first = json.loads((folder / "resumed.json").read_text()), folder / "first.json"
    row["began"], row["refused"] = found.get("began"), found.get("refused")
    equal = all(found[name] == whole[name] for name in ("weights", "metrics"))
    row["differ"] = [k for k in whole["metrics"] | found["metrics"] if whole["metrics"].get(k) != found["metrics"].get(k)][:9]
    if row["refused"] and row["announced"]: result = "blocked" # there was a checkpoint to go on from
    elif not equal: result = "wrong"
    elif not row["refused"] and row["began"] < row["announced"]: result = "lost a checkpoint"
    elif row["refused"]: result = "equal, begun anew (none saved yet)"
    elif struck is None or first.exists() and json.loads(first.read_text())["state"] == "finished":
        result = "equal, struck at the end"
    else: result = "equal, resumed"
    shutil.rmtree(folder)
    return {**row, "result": result}


def worker(items, seed, out):
    "Do some strikes, one after the other; a row a line."
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    import grpo_nb.run.run, peft, trl.trainer.grpo_trainer # noqa: E401, F401 once, before the forks
    wholes = {}
    for case in CASES:
        place = folder / case.split(",")[0].replace(" ", "_")
        place.mkdir()
        assert forked(place, "first", case, place) == 0, (place / "first.log").read_text()[-3000:]
        wholes[case] = json.loads((place / "first.json").read_text())
    with open(out, "a") as file:
        for number, how in items:
            file.write(json.dumps(one(number, how, seed, folder, wholes)) + "\n")
            file.flush()
        file.write(json.dumps(dict(whole={case: w["weights"] for case, w in wholes.items()})) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def table(rows):
    "Results by what was done, as markdown."
    results = sorted({r["result"] for r in rows})
    kinds = [(f"{how}, {where}", [r for r in rows if r["how"] == how and r["plan"]["where"] == where])
             for how in ("kill", "interrupt") for where in ("saving", "anywhere")]
    lines = [f"| | {' | '.join(results)} | sum |", f"|---|{'---|' * (len(results) + 1)}"]
    for name, found in [*((n, f) for n, f in kinds if f), ("all", rows)]:
        counts = [sum(r["result"] == x for r in found) for x in results]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {len(found)} |")
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--interrupts", type=int, default=0)
    p.add_argument("--jobs", type=int, default=1, help="processes at once")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="a JSON file for every strike")
    p.add_argument("--markdown", help="a file for the table")
    p.add_argument("--work", help=argparse.SUPPRESS)
    given = p.parse_args(argv)
    if given.work: return worker([tuple(x) for x in json.loads(given.work)], given.seed, given.out)
    start, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="kills"))
    items = [(n, "kill") for n in range(given.kills)] + [(n, "interrupt") for n in range(given.interrupts)]
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    parts = [items[i::given.jobs] for i in range(given.jobs)]
    running = []
    for i, part in enumerate(parts):
        command = [sys.executable, __file__, "--work", json.dumps(part), "--seed", str(given.seed), "--out", str(folder / str(i))]
        if part: running.append(subprocess.Popen(command, env=env, cwd=folder))
    failed = [p for p in running if p.wait()]
    lines = [json.loads(line) for f in sorted(folder.iterdir()) if f.is_file() for line in f.read_text().splitlines()]
    rows, wholes = [x for x in lines if "result" in x], [x["whole"] for x in lines if "whole" in x]
    text = table(rows) if rows else "nothing was done"
    print(f"{text}\n\n{time.perf_counter() - start:.0f} s in {given.jobs} processes")
    if given.out: Path(given.out).write_text(json.dumps(rows, indent=1))
    if given.markdown: Path(given.markdown).write_text(text + "\n")
    for row in rows:
        if not row["result"].startswith("equal"): print(json.dumps(row, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    same = all(w == wholes[0] for w in wholes)
    if not same: print("undisturbed runs of different processes differ")
    return 0 if same and not failed and len(rows) == len(items) and all(r["result"].startswith("equal") for r in rows) else 1


if __name__ == "__main__": sys.exit(main())
