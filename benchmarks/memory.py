"""Estimated against measured: peak memory and time of real GRPO runs on the CPU, each in a process of its own.

    python benchmarks/memory.py            all cases, as a table
    python benchmarks/memory.py --json     one line of JSON a case
"""
import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

MODELS = {
    "5M": dict(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32,
    ),
    "38M": dict(
        vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    ),
}
BASE = dict(
    model="5M", rows=16, group=8, prompt=64, completion=64, lora=0,
    budget=2048, checkpointing=False, beta=0.0, step="packed", micro=1,
)
CASES = [
    BASE,
    {**BASE, "lora": 16},
    {**BASE, "completion": 192, "rows": 8, "budget": 512},
    {**BASE, "rows": 32, "completion": 96},
    {**BASE, "rows": 32, "completion": 96, "checkpointing": True},
    {**BASE, "step": "trl"},
    {**BASE, "prompt": 256, "lora": 16},
    {**BASE, "model": "38M"},
    {**BASE, "model": "38M", "lora": 16, "rows": 32},
    {**BASE, "model": "38M", "budget": 512, "micro": 2},
    {**BASE, "model": "38M", "lora": 16, "beta": 0.04, "checkpointing": True},
]


def status(key) -> int: # bytes
    "A line of this process's status."
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)).split()[1]) * 1024


def make(case):
    "Model, tokenizer and data of a case."
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    shape = MODELS[case["model"]]
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, shape["vocab_size"])}}, unk_token="w2")
    )
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="w2")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **shape, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=4096
        )
    )
    if case["lora"]: model = get_peft_model(model, LoraConfig(r=case["lora"], target_modules="all-linear"))
    data = Dataset.from_list([{"prompt": " ".join(f"w{2 + (7 * i + j) % 4000}" for j in range(case["prompt"]))} for i in range(64)])
    return model, tokenizer, data


def config_of(case, folder=None) -> dict:
    "The fields of a case's config."
    return dict(
        output_dir=folder or "out", max_steps=2, per_device_train_batch_size=case["rows"], num_generations=case["group"],
        learning_rate=1e-5, max_completion_length=case["completion"], max_tokens_per_pack=case["budget"],
        gradient_checkpointing=case["checkpointing"], beta=case["beta"], step=case["step"],
        gradient_accumulation_steps=case["micro"], bf16=False, use_cpu=True, save_strategy="no", report_to="none",
        logging_steps=1,
    )


def work(case) -> tuple: # seconds of each step, and of its sampling
    "Train two steps."
    from grpo_nb.run.run import GRPORun
    model, tokenizer, data = make(case)
    if case["beta"] and not case["lora"]: raise ValueError("a reference model has no path to be loaded from: use lora")
    def score(completions, **_): return [float(len(set(c.split()))) for c in completions]
    with tempfile.TemporaryDirectory() as folder:
        run = GRPORun(model, tokenizer, score, data, config_of(case, folder))
        sampling, inner, step, last = [], run.trainer._generate_and_score_completions, [], [0.0]
        def timed(*args, **kwargs):
            last[0] = last[0] or time.perf_counter()
            started = time.perf_counter()
            try: return inner(*args, **kwargs)
            finally: sampling.append(time.perf_counter() - started)
        run.trainer._generate_and_score_completions = timed
        from grpo_nb.ground.events import StepLogged
        def logged(event):
            step.append(time.perf_counter() - last[0])
            last[0] = time.perf_counter()
        run.events.subscribe(logged, StepLogged)
        run.start(background=False)
    return step, sampling


def child(case) -> dict:
    "One case, measured in this process."
    import torch
    from grpo_nb.models.load import FastLanguageModel
    from grpo_nb.trainers.patch import PatchFastRL
    from grpo_nb.models.specs import this_device
    torch.set_num_threads(1)
    PatchFastRL("grpo", FastLanguageModel)
    this_device("cpu")
    MODELS["warm"] = dict(MODELS["5M"], hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    # libraries, threads and caches of the first run
    work({**BASE, **case, "model": "warm", "completion": 8, "rows": case["group"], "prompt": 8})
    gc.collect()
    with suppress(OSError, AttributeError): ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5") # the peak counts from here
    before = status("VmRSS")
    step, sampling = work(case)
    return {"before": before, "peak": status("VmHWM") - before, "step": sorted(step[1:])[0], "sampling": sorted(sampling[1:])[0]}


def estimated(case):
    "What `memory` says of a case."
    from grpo_nb.advice.memory import estimate
    from transformers import Qwen3Config
    return estimate(
        Qwen3Config(**MODELS[case["model"]], tie_word_embeddings=True), config_of(case), device="cpu",
        prompt_length=case["prompt"], peft=dict(r=case["lora"]) if case["lora"] else None,
    )


def measure(case) -> dict:
    "Estimate and measurement, the latter in a process of its own."
    import torch
    torch.set_num_threads(1)
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    found, e = json.loads(done.stdout.strip().splitlines()[-1]), estimated(case)
    mine = e.peak - e.parts["overhead"]
    moment = max(e.moments, key=e.moments.get)
    return {**case, "estimated": mine, "measured": found["peak"], "error": mine / found["peak"] - 1, "moment": moment,
            "estimated_step": e.step_seconds, "measured_step": found["step"], "estimated_sampling": e.seconds["sampling"],
            "measured_sampling": found["sampling"], "before": found["before"]}


def main() -> None:
    "The table."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON a case")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(child(json.loads(given.case))))
        return
    if not given.json:
        print(
            f"{'model rows prompt+completion lora budget':44} {'estimate':>9} {'measured':>9} {'error':>6}  {'moment':9} "
            f"{'step s':>13} {'sampling s':>13}"
        )
    for case in CASES:
        r = measure(case)
        if given.json:
            print(json.dumps(r), flush=True)
            continue
        extras = {
            "checkpointing": r["checkpointing"], "beta": r["beta"], "trl": r["step"] == "trl", "2 micro": r["micro"] > 1,
        }
        trained = f"r={r['lora']}" if r["lora"] else "full"
        name = f"{r['model']:>3} {r['rows']:>2} {r['prompt']}+{r['completion']} {trained} {r['budget']}"
        name += "".join(f" {extra}" for extra, on in extras.items() if on)
        print(
            f"{name:44} {r['estimated'] / 2**20:5.0f} MiB {r['measured'] / 2**20:5.0f} MiB {r['error']:+6.0%}  {r['moment']:9} "
            f"{r['estimated_step']:6.2f} {r['measured_step']:6.2f} {r['estimated_sampling']:6.2f} {r['measured_sampling']:6.2f}",
            flush=True,
        )


if __name__ == "__main__": main()
