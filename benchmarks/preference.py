"""One training step of stock TRL and of patched TRL on the same model and batch: loss, gradients, positions, peak memory, time.

    python benchmarks/preference.py --algorithm dpo kto --json
    PYTHONPATH=path/to/another/trl python benchmarks/preference.py

Random weights and random tokens of one seed. Positions are counted at the embedding, of the policy and of the reference. Peak
memory on a CPU is what a step adds to the process, measured in a fork of it (one thread); seconds are the median of the
measured steps, stock and patched in turns, on a CPU the process's own, which other work on the machine changes little.

DPO, CPO and ORPO get pairs; KTO and BCO, whose data are judged one by one and shuffled, get a prompt a row, so that nothing is
shared but what is saved by padding and logits. RLOO has the pairs as two groups of two, with log-probs of the sampling that are not
the step's own, as in a second step on one batch. `CASES` holds what is measured: an algorithm is one entry.
"""
import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

os.environ.setdefault("OMP_NUM_THREADS", "1") # before torch: a fork has no threads, and its memory is what is measured
warnings.filterwarnings("ignore")

import torch
from datasets import Dataset, disable_progress_bars

from grpo_nb.app.bench import machine, peak_on_cpu
from grpo_nb.patch.core import PatchSet
from grpo_nb.trainers import grpo, preference, seams
from grpo_nb.step.forward import causal_lm
from grpo_nb.tasks.shapes import MODELS, Shape, lengths, make_model

disable_progress_bars()
SHAPE = Shape("qwen3-tiny", prompts=2, prompt=512, completions=2, mean=128, longest=256) # pairs: two completions a prompt
PAIR = {"prompt": "<unk> ", "chosen": "<unk>", "rejected": "<unk>"}
JUDGED = [{"prompt": "<unk> ", "completion": "<unk>", "label": label} for label in (True, False)]


def rows(shape:Shape, vocabulary:int, paired=True, seed=0) -> tuple: # ids, mask, completion mask: each (2n, T) long
    "Answers of different lengths, chosen ones first: a pair to one prompt, or each to a prompt of its own; padded on the right."
    g = torch.Generator().manual_seed(seed)
    own = 1 if paired else 2 # prompts for each pair of rows
    prompts = torch.randint(3, vocabulary, (shape.prompts * own, shape.prompt), generator=g).repeat(2 // own, 1)
    sizes = lengths(len(prompts), shape.mean, shape.longest, seed)[:, None]
    ids = torch.cat([prompts, torch.randint(3, vocabulary, (len(prompts), shape.longest), generator=g)], 1)
    at = torch.arange(ids.shape[1])
    mask = (at < shape.prompt + sizes).long()
    return ids * mask, mask, mask * (at >= shape.prompt)


def dpo_batch(ids, mask, answer): return dict(input_ids=ids, attention_mask=mask, completion_mask=answer)


def kto_batch(ids, mask, answer):
    other = torch.roll(torch.arange(len(ids)), 1) # the prompts, each with the next row's completion
    moved = torch.where(answer[other] != 0, ids[other], ids) * torch.maximum(mask - answer, answer[other])
    return dict(dpo_batch(ids, mask, answer), label=torch.arange(len(ids)) < len(ids) // 2, KL_input_ids=moved,
                KL_attention_mask=torch.maximum(mask - answer, answer[other]), KL_completion_mask=answer[other])


def pair_batch(ids, mask, answer):
    labels = torch.where(answer != 0, ids, -100)
    parts = zip(("chosen", "rejected"), *(x.chunk(2) for x in (ids, mask, labels)))
    return {
        f"{side}_{name}": value for side, *values in parts for name, value in zip(("input_ids", "attention_mask", "labels"), values)
    }


def bco_batch(ids, mask, answer):
    return dict(completion_input_ids=ids, completion_attention_mask=mask, completion_labels=torch.where(answer != 0, ids, -100),
                label=[i < len(ids) // 2 for i in range(len(ids))])


def rloo_batch(ids, mask, answer):
    p = SHAPE.prompt
    return dict(prompt_ids=ids[:, :p], prompt_mask=mask[:, :p], completion_ids=ids[:, p:], completion_mask=mask[:, p:],
                advantages=torch.tensor([1.0, -0.5] * (len(ids) // 2)).roll(1) * torch.linspace(0.5, 1.5, len(ids)))


def with_old_logps(trainer, batch):
    """The batch with log-probs of the sampling: the model's own and a little.

    The little comes in steps of 1/64, which sums of thousands hold exactly in fp32."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])[0]
    little = (torch.linspace(-0.1, 0.1, len(ids), device=ids.device) * 64).round() / 64
    return {**batch, "old_logps": (logps * batch["completion_mask"]).sum(1) + little}


def rewarded(shape, device, dtype):
    return {"model": make_model(shape, device, dtype), "reward_funcs": lambda completions, **_: [0.0] * len(completions)}


@dataclass(frozen=True)
class Case:
    "One algorithm: how its trainer is made, what a batch of it looks like, what is patched."
    trainer: str # "package.module:Class"
    config: str # likewise
    data: list # a tiny data set that the trainer accepts; no step is made on it
    batch: Callable # ids, mask, completion mask -> what the trainer's `compute_loss` takes
    patches: Callable # -> of Patch
    reference: bool = False # takes a `ref_model`
    paired: bool = True # two answers to a prompt; False: each row has a prompt of its own
    more: dict|None = None # for the configuration
    build: Callable|None = None # shape, device, dtype -> the trainer's models, where they are not one causal language model
    loss: Callable|None = None # trainer, model, batch -> loss, where the trainer's is not `compute_loss`
    prepare: Callable|None = None # trainer, batch -> batch, once


def preference_case(algorithm, data, batch, reference=False):
    path = seams.HOMES[algorithm].trainer
    config = path.replace("_trainer:", "_config:").replace("Trainer", "Config")
    return Case(path, config, data, batch, lambda: preference.patches(algorithm), reference, paired=data[0] is PAIR)


CASES = {
    "dpo": preference_case("dpo", [PAIR] * 2, dpo_batch, reference=True),
    "kto": preference_case("kto", JUDGED, kto_batch, reference=True),
    "cpo": preference_case("cpo", [PAIR] * 2, pair_batch),
    "orpo": preference_case("orpo", [PAIR] * 2, pair_batch),
    "bco": preference_case("bco", JUDGED, bco_batch, reference=True),
    "rloo": Case(
        "trl.trainer.rloo_trainer:RLOOTrainer", "trl.trainer.rloo_config:RLOOConfig", [{"prompt": "<unk>"}] * 2, rloo_batch,
        lambda: grpo.patches("rloo"), more=dict(num_generations=2, beta=0.0), build=rewarded, prepare=with_old_logps,
    ),
}


def load(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make(case:Case, shape:Shape, folder, device):
    "The trainer, on the policy (and on a reference of other weights)."
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    args = load(case.config)(
        output_dir=folder, per_device_train_batch_size=2, bf16=device == "cuda", use_cpu=device == "cpu", report_to=[],
        gradient_checkpointing=shape.checkpointing, remove_unused_columns=False, **case.more or {},
    )
    reference = {}
    if case.reference and not shape.lora:
        reference["ref_model"] = make_model(shape, device, dtype)
        with torch.no_grad():
            for p in reference["ref_model"].parameters(): p.mul_(0.98)
    models = case.build(shape, device, dtype) if case.build else {"model": make_model(shape, device, dtype)}
    trainer = load(case.trainer)(
        **models, args=args, train_dataset=Dataset.from_list(case.data), processing_class=words(), **reference
    )
    if case.loss: trainer.compute_loss = partial(case.loss, trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@contextmanager
def counted(trainer): # yields a list of the positions that each forward computes
    "Count what passes the embeddings."
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    seen, handles = [], []
    for model in models:
        handles.append(
            causal_lm(model).get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
        )
    try: yield seen
    finally:
        for handle in handles: handle.remove()


def step(trainer, batch) -> float: # the loss
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    loss.backward()
    return loss.item()


def measure(name, shape=SHAPE, device="cpu", repeats=3, max_tokens_per_pack=None) -> dict:
    "Stock and patched, in turns."
    case, clock = CASES[name], time.process_time if device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(case, shape, folder, device)
        trainer.args.max_tokens_per_pack = max_tokens_per_pack
        ids = rows(shape, MODELS[shape.model][1], case.paired)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.batch(*ids).items()}
        kinds = {"trl": nullcontext, "grpo_nb": lambda: PatchSet(case.patches())}
        found, grads, batches = {kind: {"seconds": []} for kind in kinds}, {}, dict.fromkeys(kinds, batch)
        for kind, on in kinds.items() if case.prepare else ():
            with on(): batches[kind] = case.prepare(trainer, batch) # in 16 bits, a sum of log-probs has the rounding of who made it
        for kind, on in kinds.items():
            if hasattr(trainer, "running"): trainer.running = type(trainer.running)(trainer.accelerator) # BCO's mean starts anew
            with on(), counted(trainer) as positions: found[kind]["loss"] = step(trainer, batches[kind])
            grads[kind] = {k: p.grad.clone() for k, p in trainer.model.named_parameters() if p.grad is not None}
            found[kind]["positions"] = sum(positions)
        scale = max(g.abs().max() for g in grads["trl"].values())
        error = max((grads["grpo_nb"][k] - g).abs().max() for k, g in grads["trl"].items()) / scale
        grads.clear()
        for kind, on in kinds.items():
            trainer.model.zero_grad(set_to_none=True)
            gc.collect()
            with on():
                if device == "cpu": found[kind]["peak_bytes"] = peak_on_cpu(partial(step, trainer, batches[kind]))
                else: found[kind]["peak_bytes"] = _peak_on_gpu(trainer, batches[kind])
        for _ in range(repeats):
            for kind, on in kinds.items():
                with on():
                    if device == "cuda": torch.cuda.synchronize()
                    start = clock()
                    step(trainer, batches[kind])
                    if device == "cuda": torch.cuda.synchronize()
                    found[kind]["seconds"].append(clock() - start)
    for kind in kinds: found[kind]["seconds"] = statistics.median(found[kind]["seconds"]) if repeats else None
    return {"algorithm": name, "version": version("trl"), "grad_rel_err": error.item(), **found}


def _peak_on_gpu(trainer, batch):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(trainer, batch)
    return torch.cuda.max_memory_allocated() - before


def table(results) -> str:
    head = (
        f"{'':6} {'TRL':7} {'loss':>10} {'ours':>10} {'gradient':>9} {'positions':>9} {'ours':>6} "
        f"{'peak MiB':>9} {'ours':>6} {'less':>5} {'s':>6} {'ours':>6} {'ratio':>5}"
    )
    def mib(n): return "-" if n is None else f"{n / 2**20:.0f}"
    lines = [head]
    for r in results:
        a, b = r["trl"], r["grpo_nb"]
        less = f"{a['peak_bytes'] / b['peak_bytes']:.1f}x" if a["peak_bytes"] and b["peak_bytes"] else "-"
        seconds = f"{'-':>6} {'-':>6} {'-':>5}"
        if a["seconds"]: seconds = f"{a['seconds']:6.2f} {b['seconds']:6.2f} {a['seconds'] / b['seconds']:5.2f}"
        lines.append(
            f"{r['algorithm']:6} {r['version']:7} {a['loss']:10.6f} {b['loss']:10.6f} {r['grad_rel_err']:9.1e} "
            f"{a['positions']:9,} {b['positions']:6,} {mib(a['peak_bytes']):>9} {mib(b['peak_bytes']):>6} {less:>5} {seconds}"
        )
    return "\n".join(lines)


def main(given=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--algorithm", nargs="+", choices=list(CASES), help="which; all that the installed TRL has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each; 0: no times")
    parser.add_argument("--max-tokens-per-pack", type=int)
    parser.add_argument("--model", choices=list(MODELS), default=SHAPE.model, help="whose shape, with random weights")
    parser.add_argument("--prompts", type=int, default=SHAPE.prompts, help="how many, with two answers each")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: all weights are trained")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args(given)
    if a.device == "cpu": torch.set_num_threads(1)
    shape = replace(SHAPE, model=a.model, prompts=a.prompts, lora=a.lora)
    results = []
    for name in a.algorithm or CASES:
        try: load(CASES[name].trainer)
        except ImportError:
            if a.algorithm: raise SystemExit(f"--algorithm {name}: TRL {version('trl')} does not have it") from None
            continue
        with redirect_stdout(sys.stderr): # what the patches say is no result
            results.append(measure(name, shape, a.device, a.repeats, a.max_tokens_per_pack))
        if a.json: print(json.dumps(results[-1]), flush=True)
    if not a.json: print(json.dumps(machine(a.device)), table(results), sep="\n")
    return 0


if __name__ == "__main__": sys.exit(main())
