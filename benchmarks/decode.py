"""One decode step of the in-place engine, part by part, and the whole step with and without a record.

Of each operation: microseconds, the bytes that it must move beside them, and its error.

    python benchmarks/decode.py [--device cuda] [--slots 64] [--prompts 8] [--prompt 512] [--own 256] [--completion 512] [--plans]

One JSON line a result, as it comes. On a CPU the naive forms of a tiny model are timed, which says nothing but that this file runs.
"""
import argparse
import itertools
import json
import statistics
import time

import torch

from grpo_nb.app.bench import machine
from grpo_nb.engines.base import Sampling
from grpo_nb.engines.inplace.cache import Room, Table
from grpo_nb.engines.inplace.decode import first_tokens, prefill
from grpo_nb.engines.inplace.layers import Decoder
from grpo_nb.engines.inplace.static import NAIVE, Recorder
from grpo_nb.ops.decode import attention
from grpo_nb.ops.decode import sample as drawing
from grpo_nb.ops.decode import skinny
from grpo_nb.tasks.shapes import Shape, make_model

MEMORY = 4.3e12 # bytes a second, read and written, as a large copy moves them on an H200


def say(**line): print(json.dumps(line), flush=True)


def timed(run, device, repeats=20, rounds=5): # median seconds of one call
    "On a GPU, of calls replayed from a record, so that nothing waits for Python."
    if device == "cpu":
        found = []
        for _ in range(3):
            at = time.perf_counter()
            run()
            found.append(time.perf_counter() - at)
        return statistics.median(found)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2): run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats): run()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000 / repeats)
    return statistics.median(found)


def error(ours, theirs): # the largest difference over the largest entry
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def size(*tensors): return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def line(name, run, device, moved, **more):
    seconds = timed(run, device)
    say(
        operation=name, microseconds=round(seconds * 1e6, 2), must_move_mib=round(moved / 2**20, 3),
        floor_microseconds=round(moved / MEMORY * 1e6, 2), share_of_floor=round(moved / MEMORY / seconds, 3), **more,
    )
    return seconds


def filled(model, given): # a recorder whose slots are all in use, `own` tokens on
    decoder = Decoder(model)
    decoder.refresh()
    lanes, n = given.prompts, given.slots // given.prompts
    how = Sampling(max_tokens=given.completion)
    table = Table(Room(given.slots, lanes, given.prompt, given.completion), decoder, how)
    words = decoder.base.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(3, words, (lanes, given.prompt), generator=torch.Generator().manual_seed(0)).tolist()
    at = time.perf_counter()
    for i in range(0, lanes, 4): prefill(decoder, table, prompts[i:i + 4], list(range(i, min(i + 4, lanes))))
    table.admit(
        list(range(given.slots)), list(range(given.slots)),
        [s // n for s in range(given.slots)], [given.completion] * given.slots,
        torch.arange(given.slots),
    )
    first_tokens(decoder, table, list(range(given.slots)), how)
    if given.device == "cuda": torch.cuda.synchronize()
    say(operation="prompts and first tokens, first time", seconds=round(time.perf_counter() - at, 3))
    table.count.fill_(given.own)
    table.own_kv.normal_(0, 0.5)
    recorder = Recorder(decoder, table, how)
    recorder.place([s // n for s in range(given.slots)])
    return recorder


@torch.no_grad()
def operations(recorder, device):
    dec, t, a, f = recorder.decoder, recorder.table, recorder.slots, recorder.forms
    la, dtype, total = dec.layers[1], dec.dtype, 0.0
    hidden = dec.text.norm.weight.shape[0]
    x = torch.randn(a, hidden, device=dec.device, dtype=dtype)
    wide = torch.randn(a, la.down.parts[0][0].in_features, device=dec.device, dtype=dtype)
    for name, joined, given in (
        ("qkv", la.qkv, x), ("out", la.out, x), ("gate and up", la.gate_up, x), ("down", la.down, wide), ("head", dec.head, x),
    ):
        weights = [base.weight for base, *_ in joined.parts] + ([] if joined.a is None else [joined.a])
        ours, theirs = (form.skinny(given, weights).sum(0) for form in (f, NAIVE))
        moved = size(*weights, given) + a * (joined.width + joined.ranks) * 4
        def ours_alone(given=given, weights=weights): return f.skinny(given, weights)
        def cublas(given=given, weights=weights): return [torch.nn.functional.linear(given, w) for w in weights]
        plan = skinny.split_for(a, tuple(len(w) for w in weights), given.shape[1], given.element_size())
        seconds = line(
            f"product: {name}", ours_alone, device, moved, error=error(ours, theirs),
            cublas_microseconds=round(timed(cublas, device) * 1e6, 2), plan=str(plan),
        )
        total += seconds if name == "head" else seconds * len(dec.layers)
    cos, sin = t.rotary[la.rope]
    position, column = t.position(a), t.count[:a] - 1
    parts = la.qkv.sums(x, f)
    def store(form):
        return form.heads_store(
            parts, dec.heads, dec.kv, dec.head_dim, cos, sin, position,
            *t.own_kv[1, :, :a], column, bias=la.qkv.bias, adapter=la.qkv.adapter,
        )
    q = store(f)
    total += len(dec.layers) * line(
        "heads, rotary, cache", lambda: store(f), device, size(parts, q, *la.qkv.b.values()), error=error(q, store(NAIVE))
    )
    given = q, *t.prompt_kv[1], *t.own_kv[1, :, :a], t.lane[:a], t.length, t.count[:a]
    naive = attention.decode_attention_naive(*given, la.scale, la.window, dec.softcap)
    read = (int(t.length.sum()) + int(t.count[:a].sum())) * 2 * dec.kv * dec.head_dim * dtype.itemsize
    total += len(dec.layers) * line(
        "attention", lambda: recorder.attend(1, la, q), device, read + 2 * size(q),
        error=error(recorder.attend(1, la, q).view_as(naive), naive),
    )
    out = la.out.sums(x, f)
    def add(form):
        return form.add_norm(out, x, la.between.modules[0].weight, la.between.eps, bias=la.out.bias, adapter=la.out.adapter)
    moved = size(out, x, x, x, *la.out.b.values())
    both_norms = 2 * len(dec.layers)
    total += both_norms * line("residual and norm", lambda: add(f), device, moved, error=error(add(f)[1], add(NAIVE)[1]))
    both = la.gate_up.sums(x, f)
    def gate(form):
        return form.gate(both, la.gate_up.width // 2, la.activation, dtype=dtype, bias=la.gate_up.bias, adapter=la.gate_up.adapter)
    total += len(dec.layers) * line(
        "gate", lambda: gate(f), device, size(both, gate(f), *la.gate_up.b.values()), error=error(gate(f), gate(NAIVE))
    )
    logits = torch.randn(a, dec.head.width, device=dec.device) * 3
    u = torch.rand(a, device=dec.device, dtype=torch.float64)
    draw = drawing.sample if recorder.kernels else drawing.sample_naive
    same = float((draw(logits, u)[0] == drawing.sample_naive(logits, u)[0]).float().mean())
    total += line("draw", lambda: draw(logits, u), device, size(logits), same_tokens=same)
    say(operation="their sum, for all layers", microseconds=round(total * 1e6, 1))


@torch.no_grad()
def steps(recorder, device):
    "The step itself; each call draws a token more."
    weights = sum(p.numel() * p.element_size() for p in recorder.decoder.base.parameters())
    kept = recorder.table.count.clone()

    def some(k, run):
        recorder.table.count.copy_(kept)
        if device == "cuda": torch.cuda.synchronize()
        at = time.perf_counter()
        for _ in range(k): run()
        if device == "cuda": torch.cuda.synchronize()
        return (time.perf_counter() - at) / k

    for name, run in dict(eager=recorder.run, recorded=recorder.step).items():
        first = [round(some(1, run), 4) for _ in range(2)]
        seconds = statistics.median(some(20, run) for _ in range(5 if device == "cuda" else 1))
        say(
            step=name, milliseconds=round(seconds * 1e3, 3),
            tokens_per_second=round(recorder.slots / seconds), first_seconds=first[0],
            second_seconds=first[1], weights_gib=round(weights / 2**30, 2),
            floor_milliseconds=round(weights / MEMORY * 1e3, 3),
        )
    if device == "cuda":
        say(
            memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
            cache_gib=round(recorder.table.room.tokens * recorder.decoder.bytes_per_token() / 2**30, 2),
        )


@torch.no_grad()
def plans(recorder, device):
    "Every way to cut the four products and the head, measured: the best ones, and where the one that is chosen stands."
    dec, a = recorder.decoder, recorder.slots
    la = dec.layers[1]
    for name, joined in ("qkv", la.qkv), ("out", la.out), ("gate and up", la.gate_up), ("down", la.down), ("head", dec.head):
        weights = [base.weight for base, *_ in joined.parts] + ([] if joined.a is None else [joined.a])
        x, sizes = torch.randn(a, weights[0].shape[1], device=dec.device, dtype=dec.dtype), tuple(len(w) for w in weights)
        chosen, found = skinny.split_for(a, sizes, x.shape[1], x.element_size()), []
        for n, k, stages, warps, split in itertools.product((32, 64, 128, 256), (64, 128), (3, 4, 6), (4, 8), (1, 2, 3, 4, 6, 8)):
            too_large = (n + chosen.block_s) * k * x.element_size() * stages > skinny.SHARED
            if too_large or split * k > x.shape[1] or (name == "head" and split > 1): continue
            plan = skinny.Cut(chosen.block_s, n, k, split, warps, stages)
            def run(x=x, weights=weights, plan=plan): return skinny.skinny(x, weights, plan=plan)
            try: found.append((timed(run, device, rounds=3), plan))
            except Exception as problem: # noqa: BLE001  a cut that does not compile is one of the results
                say(plan=str(plan), problem=str(problem)[:200])
            if device == "cpu": break
        found.sort(key=lambda pair: pair[0])
        say(product=name, chosen=str(chosen), best=[dict(microseconds=round(s * 1e6, 2), plan=str(p)) for s, p in found[:4]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in dict(slots=64, prompts=8, prompt=512, own=256, completion=512).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lora", type=int, default=64)
    parser.add_argument("--plans", action="store_true", help="also measure every way to cut the products")
    given = parser.parse_args()
    say(**machine(given.device), **{k: v for k, v in vars(given).items() if k != "device"})
    shape = Shape(
        "qwen2.5-1.5b" if given.device == "cuda" else "qwen3-tiny", given.prompts, given.prompt,
        given.slots // given.prompts, given.completion, given.completion, lora=given.lora,
    )
    model = make_model(shape, given.device, torch.bfloat16 if given.device == "cuda" else torch.float32).eval()
    with torch.no_grad(): recorder = filled(model, given)
    steps(recorder, given.device)
    operations(recorder, given.device)
    if given.plans: plans(recorder, given.device)


if __name__ == "__main__": main()
