"""vLLM on one copy of the weights, checked and timed on a GPU: start, memory, fold and swap, sleep and wake, against TRL's merge.

    python benchmarks/vllm_gpu.py [--model qwen2.5-1.5b] [--prompts 8] [--prompt 512] [--completions 8] [--tokens 512]
                                  [--rank 64] [--only fold,swap,...] [--seconds 280]

Random weights, no tokenizer, nothing downloaded. One JSON line as each thing is known, so that a run that is killed keeps what it
found; a phase that fails prints its error and the next one begins; none begins after `--seconds`. `ok` says whether what must hold
did.
"""
import argparse
import gc
import json
import os
import statistics
import time
import traceback

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0") # FlashInfer would compile its sampler, which needs nvcc

import torch

from grpo_nb.app.bench import machine
from grpo_nb.app.bench_rollout import merge_and_copy
from grpo_nb.engines.base import Sampling
from grpo_nb.engines.vllm.engine import VLLMEngine
from grpo_nb.models.installed import vllm_version
from grpo_nb.models.unwrap import causal_lm
from grpo_nb.tasks.shapes import Shape, make_model

STARTED = time.perf_counter()


def tell(phase, **found): print(json.dumps(dict(phase=phase, at=round(time.perf_counter() - STARTED, 1), **found)), flush=True)


def taken() -> int:
    "Bytes of the GPU that are in use, by whatever."
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    return whole - free


def clocked(call, repeats=3) -> float:
    "Seconds of a call, the shortest of a few."
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        at = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - at)
    return min(found)


class Case:
    "A model with an adapter that does something, prompts, and how many completions."
    def __init__(self, given):
        self.given = g = given
        self.shape = Shape(g.model, g.prompts, g.prompt, g.completions, g.tokens, g.tokens, lora=g.rank)
        self.model = make_model(self.shape, "cuda", torch.bfloat16).eval()
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                if "lora_B" in n: p.normal_(0, 0.02)
        self.frozen = {n: p for n, p in self.model.named_parameters() if "lora_" not in n}
        # on the GPU; the benchmark's own, taken off the figures below
        self.before = {n: p.detach().clone() for n, p in self.frozen.items()}
        vocabulary = causal_lm(self.model).get_input_embeddings().weight.shape[0]
        self.prompts = torch.randint(3, vocabulary, (g.prompts, g.prompt), generator=torch.Generator().manual_seed(0)).tolist()

    def whole(self) -> bool: return all(torch.equal(self.before[n], p) for n, p in self.frozen.items())

    def start(self, **more):
        held = taken()
        at = time.perf_counter()
        engine = VLLMEngine(
            self.model, max_model_len=self.given.prompt + self.given.tokens,
            max_num_seqs=self.given.prompts * self.given.completions, gpu_memory_utilization=0.3,
            **more,
        )
        return engine, dict(
            way=engine.way, start_seconds=round(time.perf_counter() - at, 1), gpu_bytes=taken() - held,
            shared_bytes=engine.shared_bytes, copied_bytes=engine.copied_bytes,
            weight_bytes=sum(p.nbytes for p in self.frozen.values()),
        )

    def rate(self, engine) -> dict:
        """Tokens per second of the whole batch after a training step, medians of five after one that is not counted.

        A step is `sync`, which also forgets the prompts' keys, then `generate`."""
        found = []
        for _ in range(6):
            torch.cuda.synchronize()
            at = time.perf_counter()
            engine.sync()
            synced = time.perf_counter()
            out = engine.generate(self.prompts, self.given.completions, Sampling(max_tokens=self.given.tokens))
            found.append((time.perf_counter() - synced, synced - at))
        seconds, sync = (statistics.median(x) for x in zip(*found[1:]))
        return dict(
            tokens=out.tokens, seconds=round(seconds, 3), sync_seconds=round(sync, 4),
            tokens_per_second=round(out.tokens / seconds), each=[round(s, 3) for s, _ in found],
        )

    def greedy(self, engine):
        return engine.generate(self.prompts[:2], 1, Sampling(greedy=True, max_tokens=min(32, self.given.tokens)))

    @torch.no_grad()
    def apart(self, out) -> float:
        "The mean difference between the engine's log-probs and the training model's."
        rows = []
        for p, ids, logps in zip(out.prompts, out.completions, out.logps):
            logits = self.model(torch.tensor([p + ids], device="cuda")).logits[0, len(p) - 1:-1].float()
            theirs = logits.log_softmax(-1).gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
            rows.append((theirs - torch.tensor(logps, device="cuda")).abs().mean())
        return float(torch.stack(rows).mean())


def fold(case):
    "The adapter folded into the shared weights, and out again."
    engine, found = case.start(adapter="fold")
    tell("fold: start", ok=bool(engine.shared) and case.whole(), **found)
    try:
        engine.fold.close() # so that the first copy to the host is timed too
        keep = clocked(engine.fold.keep, 1)
        kept = clocked(engine.fold.keep)

        into, out = [], []
        for _ in range(3):
            into.append(clocked(engine.fold.fold, 1))
            folded = not case.whole()
            out.append(clocked(engine.fold.restore, 1))
        tell(
            "fold: in and out", ok=case.whole() and folded, host_copy_seconds=round(keep, 4),
            check_seconds=round(kept, 4), fold_seconds=round(min(into), 4), restore_seconds=round(min(out), 4),
            sync_seconds=round(clocked(engine.sync), 5), host_locked=engine.fold.locked, host_bytes=engine.fold.nbytes,
        )
        first = case.greedy(engine)
        with torch.no_grad(): [p.normal_(0, 0.02) for n, p in case.model.named_parameters() if "lora_B" in n]
        second, near = case.greedy(engine), None
        near = case.apart(second)
        tell(
            "fold: the adapter of now",
            ok=first.completions != second.completions and near < 0.05 and case.whole(),
            changed=first.completions != second.completions,
            logp_difference=near,
        )
        tell("fold: sampling", **case.rate(engine), ok=case.whole())
        awake = taken()
        sleep = clocked(engine.sleep, 1)
        asleep = taken()
        wake = clocked(engine.wake, 1)
        again = case.greedy(engine)
        tell(
            "fold: sleep and wake", ok=asleep < awake and again.completions == second.completions and case.whole(),
            sleep_seconds=round(sleep, 3), wake_seconds=round(wake, 3), freed_bytes=awake - asleep,
        )
    finally:
        held = taken()
        engine.close()
        tell("fold: close", ok=case.whole(), freed_bytes=held - taken())


def swap(case):
    "The adapter in vLLM's own slot, the base shared."
    engine, found = case.start(adapter="swap")
    tell("swap: start", ok=bool(engine.shared) and case.whole(), **found)
    try:
        tell("swap: sync", seconds=round(clocked(engine.sync), 4))
        near = case.apart(case.greedy(engine))
        tell("swap: the adapter of now", ok=near < 0.05, logp_difference=near)
        tell("swap: sampling", **case.rate(engine))
    finally: engine.close()


def trl(case):
    "TRL's way with the same model: merge, copy every weight, unmerge; what is not bit for bit as it was afterwards is counted."
    once, size = merge_and_copy(case.model)
    with torch.no_grad():
        seconds = clocked(once, 5)
        changed = sum(int((case.before[n] != p).sum()) for n, p in case.frozen.items())
        for n, p in case.frozen.items(): p.data.copy_(case.before[n])
    tell(
        "trl: merge, copy, unmerge", seconds=round(seconds, 4), copied_bytes=size,
        numbers_changed=changed, of=sum(p.numel() for p in case.frozen.values()),
    )


def copied(case):
    "vLLM with a copy of its own, as elsewhere."
    engine, found = case.start(adapter="fold", share=False)
    tell("copied: start", ok=case.whole(), **found)
    try:
        tell("copied: sync", seconds=round(clocked(engine.sync), 4), ok=case.whole())
        tell("copied: sampling", **case.rate(engine))
    finally: engine.close()


def full(case):
    "Full fine-tuning: a weight that the optimiser changes is read at the next token."
    base = case.model = case.model.unload()
    case.frozen = dict(base.named_parameters())
    engine, found = case.start()
    tell("full: start", ok=bool(engine.shared), **found)
    try:
        first = case.greedy(engine)
        with torch.no_grad():
            for n, p in base.named_parameters():
                if "layers" in n and p.dim() > 1: p.add_(torch.randn_like(p) * 0.01)
        second = case.greedy(engine)
        near = case.apart(second)
        tell(
            "full: the weights of now", ok=first.completions != second.completions and near < 0.05,
            changed=first.completions != second.completions, logp_difference=near,
            sync_seconds=round(clocked(engine.sync), 5),
        )
        tell("full: sampling", **case.rate(engine))
    finally: engine.close()


PHASES = dict(trl=trl, fold=fold, swap=swap, copied=copied, full=full)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(prompts=8, prompt=512, completions=8, tokens=512, rank=64, seconds=280).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--only", default=",".join(PHASES), help="phases: " + ", ".join(PHASES))
    given = parser.parse_args()
    wanted = [n.strip() for n in given.only.split(",")]
    if unknown := [n for n in wanted if n not in PHASES]: parser.error(f"--only {unknown[0]}: the phases are {', '.join(PHASES)}")
    if not torch.cuda.is_available(): parser.error("this machine has no CUDA device")
    tell("machine", vllm=vllm_version(), **{k: v for k, v in vars(given).items()}, machine=machine("cuda"))
    case = Case(given)
    tell("model", gpu_bytes=taken())
    for name in wanted:
        if time.perf_counter() - STARTED > given.seconds:
            tell(name, skipped="out of time")
            continue
        try: PHASES[name](case)
        except Exception as error: # noqa: BLE001 the next phase begins all the same
            traceback.print_exc()
            tell(name, ok=False, error=f"{type(error).__name__}: {error}"[:2000])
        gc.collect()
        torch.cuda.empty_cache()
    tell("end")


if __name__ == "__main__": main()
