"""Folders of runs as a run writes them, made in no time: for tests of what reads them, and for trying pages.

    make_run(tmp_path, "calm-river-heron", steps=400, correct=(32, 97), settings=dict(beta=0.04))
"""
import json
import math
import os
import random
import socket
from pathlib import Path

import psutil

from grpo_nb.record.files import append, write_json

HOSTILE = [
    "</script><script>window.owned = 1</script>", "<img src=x onerror='window.owned = 1'>", "\x1b[31mred\x1b[0m \x00\x07",
    "\u202egnp.exe \u2066isolated \u200bzero", "W" * 100_000, "&lt;b&gt; ${window.owned=1} {{7*7}}", "=HYPERLINK(\"http://x\")", "",
]


def make_run(folder, name, *, steps=40, total=None, state="finished", seed=0, correct=None, n=100, settings=None, rise=0.6,
             started=1.79e9, completions=(), tags=(), note="", error=None, weights=None, metrics=None, alive=False):
    "A run's folder; returns its path. `alive`: its writer, another process, lives."
    path, rng = Path(folder, name), random.Random(seed)
    path.mkdir(parents=True)
    parent = psutil.Process(os.getppid())
    living = dict(pid=parent.pid, began=parent.create_time(), host=socket.gethostname())
    process = living if alive else dict(pid=1, began=0.0, host="-")
    rewards = {f"reward.{k}": v for k, v in (weights or {"correctness": 1.0}).items()}
    ended = None if state in ("running", "paused") else started + steps
    write_json(path / "run.json", dict(
        name=name, id=f"{name}-{seed}", state=state, total_steps=total or steps, seed=seed,
        started=started, beat=started + steps, ended=ended, versions={"python": "3.11", "trl": "1.16.0"}, error=error,
        settings={"model": "tiny", **rewards, "output_dir": str(folder), **(settings or {})}, weights=weights, **process,
    ))
    for step in range(1, steps + 1):
        append(path / "metrics.jsonl", log_of(step, rise, rng, started, metrics))
    append(path / "marks.jsonl", dict(step=0, time=started, kind="start", text="started"))
    for step, right in zip((0, steps), correct or ()):
        append(path / "held_out.jsonl", dict(step=step, time=started + step, name="held out", correct=right, n=n,
                                             right=[i < right for i in range(n)], questions="abc"))
    for step in sorted({max(1, steps // 2), steps}) if completions else ():
        write_completions(path, step, completions, weights or {"correctness": 1.0})
    if tags or note: write_json(path / "notes.json", dict(tags=list(tags), note=note))
    (path / "settings.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in (settings or {}).items()))
    return path


def log_of(step, rise, rng, started, metrics=None):
    "A line of metrics.jsonl."
    reward = 0.3 + rise * (1 - math.exp(-step / 60)) + rng.gauss(0, 0.03)
    found = dict(reward=reward, reward_std=0.2, kl=0.001 * step, completion_length=20 + rng.random(), num_tokens=step * 640,
                 loss=rng.random())
    return dict(step=step, time=started + step, metrics={**found, **(metrics or {})})


def write_completions(path, step, texts, weights):
    "One step of completions: two prompts with all texts each."
    (path / "completions").mkdir(exist_ok=True)
    with open(path / "completions" / "completions.jsonl", "a", encoding="utf-8") as f:
        for group, prompt in enumerate(("<b>Sort</b> 3 1 2", "Sort 9 8 7")):
            for i, text in enumerate(texts):
                rewards = {name: float(i % 2) for name in weights}
                row = dict(step=step, group=group, sample=i, prompt=prompt, completion=text, rewards=rewards,
                           total=sum(weights[k] * v for k, v in rewards.items()), advantage=i % 2 - 0.5, length=len(text) // 4)
                f.write(json.dumps(row) + "\n")
