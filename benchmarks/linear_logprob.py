"""Head log-probabilities: naive, chunked, Triton and TRL's own, checked against float64 and timed.

    python benchmarks/linear_logprob.py --device cpu
    python benchmarks/linear_logprob.py --device cuda [--sweep]

One JSON line a case, a short table last. `error_*` are relative, ||x - truth|| / ||truth||, over the last rows in float64.
"""
import argparse
import ctypes
import gc
import json
import statistics
import time
from pathlib import Path

import torch

from grpo_nb.ops.head.linear_logprob import add_product, has_triton, linear_logprob, tile_shape

try: from trl.trainer.utils import _ChunkedLogProbFunction as TRL
except ImportError: TRL = None

SHAPES = {"cuda": [(16384, 2048, 151936), (16384, 1536, 151936), (8192, 4096, 151936)], "cpu": [(2048, 512, 32000)]}


def inputs(n, hidden, vocab, device, dtype, trained):
    "Random hidden states and head, logits of standard deviation 3."
    g = torch.Generator(device).manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g, device=device)
    weight = torch.empty(vocab, hidden, dtype=dtype, device=device)
    for a in range(0, vocab, 16384): weight[a:a + 16384] = draw(len(weight[a:a + 16384]), hidden) * (3 / hidden**0.5)
    return (draw(n, hidden).to(dtype).requires_grad_(), weight.requires_grad_(trained),
            torch.randint(0, vocab, (n,), generator=g, device=device), draw(n))


def call(how, hidden, weight, target, entropy):
    "One implementation, by name."
    if how["backend"] == "trl":
        return TRL.apply(
            hidden, weight, None, target, 1.0, how.get("vocabulary", 32768), None, 1.0, ("entropy",) if entropy else ()
        )[:2]
    chunk = (how.get("tokens"), how.get("vocabulary"))
    return linear_logprob(hidden, weight, target, entropy=entropy, backend=how["backend"], chunk_size=chunk)


def run(how, mode, hidden, weight, target, grad):
    "Forward, and backward where the mode has one; returns logprob, entropy, and the gradients."
    hidden.grad = weight.grad = None
    if mode == "no_grad":
        with torch.no_grad(): return (*call(how, hidden, weight, target, True), None, None)
    logprob, entropy = call(how, hidden, weight, target, True)
    logprob.backward(grad)
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def relative(x, truth):
    "||x - truth|| / ||truth|| in float64."
    return float((x.double() - truth).norm() / truth.norm()) if x is not None and truth is not None else None


def truth_of(mode, hidden, weight, target, grad):
    "Float64 results of the naive form."
    h, w = (x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight))
    return run({"backend": "naive"}, mode, h, w, target, grad.double())


def high_water():
    "The process's peak resident bytes (Linux; 0 elsewhere)."
    path = Path("/proc/self/status")
    if not path.exists(): return 0
    return next((int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith("VmHWM")), 0)


def trim():
    "Give freed memory back to the system, so that the next peak counts it again (glibc)."
    try: ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError): pass


def timed(f, device, repeats, clear=()):
    "Median milliseconds, spread, and peak bytes above what stood before."
    cuda = device == "cuda"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter   # one thread: other processes do not count
    f()
    for x in clear: x.grad = None
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        gc.collect()
        trim()
        reset = Path("/proc/self/clear_refs")
        if reset.exists(): reset.write_text("5")                          # the process's peak starts again from here
        before = high_water()
    times = []
    for _ in range(repeats):
        if cuda:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            f()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b))
        else:
            a = clock()
            f()
            times.append((clock() - a) * 1e3)
    peak = torch.cuda.max_memory_allocated() if cuda else high_water()
    return statistics.median(times), max(times) - min(times), peak - before


def parts(shape, tile, dtype, repeats):
    "CUDA: the three launches of a frozen walk apart, in milliseconds a whole walk, and what they would be at the chip's rates."
    from grpo_nb.ops.head import logit_stats
    from grpo_nb.ops.head.linear_logprob import Head
    (n, h, v), (tokens, entries) = shape, tile
    tokens, entries = min(tokens, n), min(entries, v)
    hidden, weight, target, _ = inputs(tokens, h, entries, "cuda", dtype, False)
    hidden = hidden.detach()
    buffer, acc = torch.empty(tokens, entries, dtype=dtype, device="cuda"), torch.zeros(tokens, h, device="cuda")
    state, head, walks = torch.zeros(4, tokens, device="cuda"), Head(entropy=True, dtype=dtype), n * v / (tokens * entries)
    def logits(): return torch.mm(hidden, weight.t(), out=buffer)
    def many(f): return lambda: [f() for _ in range(10)]
    def fold(acc_, launch=logit_stats.LAUNCH): return lambda: logit_stats.fold(buffer, None, target, state, acc_, 0, head, launch)
    logits()
    jobs = {"mm": logits, "fold_read": fold(None), "fold_write": fold(acc), "add_product": lambda: add_product(acc, buffer, weight)}
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)):
        launch = logit_stats.Launch(block, warps)
        jobs |= {f"fold_read_{block}_{warps}": fold(None, launch), f"fold_write_{block}_{warps}": fold(acc, launch)}
    ms = {name: timed(many(f), "cuda", repeats)[0] / 10 for name, f in jobs.items()}
    out = {f"{name}_ms": round(t * walks, 2) for name, t in ms.items()}
    out |= {
        "mm_tflops": round(2e-9 * tokens * h * entries / ms["mm"]),
        "add_tflops": round(2e-9 * tokens * h * entries / ms["add_product"]),
        "fold_write_tb_s": round(4e-9 * tokens * entries / ms["fold_write"], 2),
        "fold_read_tb_s": round(2e-9 * tokens * entries / ms["fold_read"], 2),
    }
    return {"kind": "parts", "shape": shape, "tile": tile, **out}


def variants(device, sweep, shape):
    "The implementations of one table."
    rows = [{"backend": "naive"}, {"backend": "chunked"}]
    if TRL: rows.append({"backend": "trl"})
    if device == "cuda": rows.append({"backend": "triton"})
    large = [
        (2048, 8192), (4096, 8192), (8192, 8192), (16384, 8192), (2048, 16384), (2816, 16384),
        (4096, 16384), (5632, 16384), (8192, 16384), (2048, 32768), (4096, 32768), (16384, 4096),
    ]
    small = [
        (64, 1024), (128, 2048), (256, 1024), (256, 4096), (512, 2048),
        (512, 8192), (1024, 4096), (64, 32768), (256, 32768), (2048, 1024),
    ]
    grid = {"cuda": ("triton", large), "cpu": ("chunked", small)}
    if sweep: rows += [{"backend": grid[device][0], "tokens": t, "vocabulary": v} for t, v in grid[device][1] if t <= shape[0]]
    return rows


def measure(how, mode, shape, tensors, truth, few, a):
    "One case: errors over the last rows, median time, peak memory."
    last = slice(-a.check_rows, None)
    case = {"kind": "case", "shape": shape, "mode": mode, "dtype": str(tensors[0].dtype)[6:], **how}
    try:
        got = run(how, mode, *tensors)
        case |= {f"error_{name}": relative(x[last] if x is not None else None, t)
                 for name, x, t in zip(("logprob", "entropy", "hidden"), got, truth)}
        del got
        if mode == "trained" and "tokens" not in how: case["error_weight"] = relative(run(how, mode, *few)[3], truth[3])
        few[0].grad = few[1].grad = None
        case["ms"], case["spread"], case["peak_bytes"] = timed(lambda: run(how, mode, *tensors), a.device, a.repeats, tensors[:2])
    except RuntimeError as error: case["failed"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(case), flush=True)
    return case


def one_mode(mode, shape, dtype, a):
    "Every implementation on the same inputs."
    tensors = inputs(*shape, a.device, dtype, mode == "trained")
    last = slice(-a.check_rows, None)
    few = [tensors[0].detach()[last].clone().requires_grad_(), tensors[1], tensors[2][last], tensors[3][last]]
    truth = truth_of(mode, *few)
    chosen = [
        how
        for how in variants(a.device, a.sweep and mode != "no_grad", shape)
        if not a.backends or how["backend"] in a.backends.split(",")
    ]
    return [measure(how, mode, shape, tensors, truth, few, a) for how in chosen]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--shape", action="append", help="tokens,hidden,vocabulary")
    p.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    p.add_argument("--modes", default="frozen,trained,no_grad")
    p.add_argument("--backends", default=None, help="leave out the others")
    p.add_argument("--sweep", action="store_true", help="several tile shapes")
    p.add_argument("--repeats", type=int, default=None)
    p.add_argument("--check-rows", type=int, default=128)
    a = p.parse_args()
    dtype = getattr(torch, a.dtype or ("bfloat16" if a.device == "cuda" else "float32"))
    a.repeats, table = a.repeats or (7 if a.device == "cuda" else 3), []
    machine = torch.cuda.get_device_name() if a.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    known = {"device": machine, "torch": torch.__version__, "triton": has_triton(torch.device(a.device)), "trl": bool(TRL)}
    print(json.dumps({"kind": "machine", **known}))
    for shape in [tuple(map(int, s.split(","))) for s in a.shape] if a.shape else SHAPES[a.device]:
        for mode in a.modes.split(","): table += one_mode(mode, shape, dtype, a)
        if a.device == "cuda":
            others = [(4096, 32768), (8192, 8192), (2048, 8192)] if a.sweep else []
            for tile in [tile_shape(torch.empty(0, device="cuda"), shape[2]), *others]:
                print(json.dumps(parts(shape, tile, dtype, a.repeats)), flush=True)
    print(f"\n{'shape':>20} {'mode':>8} {'backend':>8} {'tile':>12} {'ms':>8} {'spread':>7} {'MiB':>7}  "
          "logprob entropy  hidden  weight")
    for c in table:
        tile = f"{c['tokens']}x{c['vocabulary']}" if "tokens" in c else ""
        errors = " ".join(
            f"{c[k]:.1e}" if c.get(k) is not None else "      -"
            for k in ("error_logprob", "error_entropy", "error_hidden", "error_weight")
        )
        tail = c.get("failed") or f"{c['ms']:8.2f} {c['spread']:7.2f} {c['peak_bytes'] / 2**20:7.0f}  {errors}"
        print(f"{'x'.join(map(str, c['shape'])):>20} {c['mode']:>8} {c['backend']:>8} {tile:>12} {tail}")


if __name__ == "__main__": main()
