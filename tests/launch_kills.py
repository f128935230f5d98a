"""Workers of runs in processes of their own, killed at random moments: the kernel lives, checkpoints are whole, the run goes on.

    python tests/launch_kills.py --kills 20 --jobs 5 --out kills.json

Each kill has a run of two processes (gloo, a tiny model, a checkpoint after every step). One of the processes, or both, is killed
with SIGKILL at a moment that is drawn. Then: what the kernel says, whether all checkpoints are whole, whether the run goes on from
the newest one.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 600


def digits(completions, **kwargs): return [sum(ch.isdigit() for ch in c[-1]["content"]) / 10 for c in completions]


def make(folder, steps):
    from grpo_nb.run.run import GRPORun
    from grpo_nb.tasks.library import get
    from grpo_nb.tasks.tiny import tiny_model

    task = get("sort_digits", n_train=64, n_test=8)
    model, tokenizer = tiny_model(task, steps=0, hidden_size=64, layers=1)
    return GRPORun(model, tokenizer, digits, task.train, dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="steps", save_steps=1, save_total_limit=3,
        learning_rate=1e-3), processes=2)


def until(true, what):
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        if time.monotonic() > end: raise TimeoutError(what)
        time.sleep(0.02)
    return found


def one(number, seed, folder):
    "One kill -> a row."
    from grpo_nb.launch.channel import place
    from grpo_nb.launch.ranks import is_gone, signs_in
    from grpo_nb.record.files import read_json
    from grpo_nb.record.runs import runs
    from grpo_nb.run.checkpoints import why_not_whole

    draw = random.Random(f"{seed} {number}")
    run, whom = make(folder, 100_000), draw.choice([[0], [1], [0, 1]])
    run.start(background=True)
    until(lambda: run.step >= 1 or run.state == "failed", "the first step")
    time.sleep(draw.uniform(0, 3))
    for rank in whom: os.kill(read_json(place(run.folder, "ranks", f"{rank}.json"))["pid"], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: run.state == "failed", "the end")
    row = dict(number=number, killed=whom, said=str(run.error), seconds=round(time.monotonic() - began, 1), step=run.step)
    row["kernel"] = "alive" # it is this process
    row["named"] = any(f"process {rank} of 2 was killed by SIGKILL" in row["said"] for rank in whom)
    kept = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    row["broken"] = {p.name: why for p in kept if (why := why_not_whole(p))}
    row["checkpoint"] = kept[-1].name if kept else None
    row["left"] = [s["pid"] for s in signs_in(run.folder) if not is_gone(s)]
    row["listed"] = [r.state for r in runs(folder)]
    if kept:
        run.start(resume=True, background=True)
        until(lambda: run.step > int(kept[-1].name[11:]) or run.state == "failed", "a step after it")
        if run.state != "failed": run.stop()
        run._ended.wait(PATIENCE)
        row["resumed"] = f"{run.state} at {run.step}"
    row["good"] = bool(row["named"] and not row["broken"] and not row["left"] and row["listed"] == ["failed"]
                       and (not kept or run.state == "stopped"))
    return row


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--jobs", type=int, default=1, help="kernels at once, each with two processes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="a JSON file for every kill")
    p.add_argument("--work", help=argparse.SUPPRESS)
    given = p.parse_args(argv)
    if given.work:
        for number in json.loads(given.work):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                try: row = one(number, given.seed, Path(folder))
                except Exception as error: # noqa: BLE001 a row too
                    row = dict(number=number, good=False, said=f"{type(error).__name__}: {error}")
                print("ROW " + json.dumps(row), flush=True)
        return 0
    start, root = time.perf_counter(), str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    parts = [part for i in range(given.jobs) if (part := list(range(given.kills))[i::given.jobs])]
    running = [subprocess.Popen([sys.executable, __file__, "--work", json.dumps(part), "--seed", str(given.seed)], env=env,
                                text=True, stdout=subprocess.PIPE) for part in parts]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    rows = sorted((json.loads(line[4:]) for line in lines if line.startswith("ROW ")), key=lambda row: row["number"])
    for row in rows: print(json.dumps(row))
    good = sum(row["good"] for row in rows)
    print(f"{good} of {given.kills} good; kernels alive: {sum(row.get('kernel') == 'alive' for row in rows)}; "
          f"all checkpoints whole: {sum(row.get('broken') == {} for row in rows)}; "
          f"gone on from one: {sum('resumed' in row for row in rows)}; {time.perf_counter() - start:.0f} s")
    if given.out: Path(given.out).write_text(json.dumps(rows, indent=1))
    return 0 if good == given.kills else 1


if __name__ == "__main__": sys.exit(main())
