"""The products of a decode step and what follows them: plain forms, kernels under Triton's interpreter, what is compiled."""
import os

import pytest
import torch
from compiling import WHICH, compiled_kernel, resources, thinned, under_the_interpreter
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from grpo_nb.engines.inplace.layers import turn
from grpo_nb.ops.decode import epilogues as E
from grpo_nb.ops.decode import skinny as M
from grpo_nb.ops.decode.epilogues import (
    Adapter, add_norm, add_norm_naive, finish_naive, gate, gate_naive, heads_store, heads_store_naive,
)
from grpo_nb.ops.layer.rms_norm import rms_norm_naive, runs_on
from grpo_nb.ops.decode.skinny import SHARED, skinny, skinny_naive, split_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
once = pytest.mark.skipif(INTERPRETED, reason="has no kernel in it")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Made:
    "Random inputs; what must not be read is NaN."
    def __init__(self, dtype=torch.float32, seed=0): self.g, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape, dtype=None): return torch.randn(shape, generator=self.g).to(dtype or self.dtype)

    def parts(self, split, rows, width):
        buffer = torch.full((split + 1, rows + 2, width + 19), torch.nan)
        buffer[:split, :rows, :width] = self(split, rows, width, dtype=torch.float32)
        return buffer[:split, :rows, :width]

    def adapter(self, widths, ranks, column, apart=None): # apart: parts of a buffer of its own
        b = tuple(self(r, n) if r else None for r, n in zip(ranks, widths if len(ranks) > 1 else [sum(widths)]))
        return Adapter(b, column) if apart is None else Adapter(b, 3, apart)


def wide(x): # the same in float64
    if isinstance(x, torch.Tensor): return x.double() if x.is_floating_point() else x
    if isinstance(x, Adapter): return Adapter(tuple(wide(b) for b in x.b), x.column, wide(x.xa))
    return tuple(map(wide, x)) if isinstance(x, tuple) else x


def close(ours, theirs, truth, dtype):
    "The kernel is no further from float64 than the plain form in the same type."
    # the interpreter cuts to bfloat16 where a GPU rounds
    slack = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[dtype]
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and bool(a.isfinite().all())
        error = [float((x.double() - t).norm() / t.norm().clamp(min=1e-30)) for x in (a, b)]
        assert error[0] <= 1.2 * error[1] + slack, error


# --- products

PRODUCTS = [(1, 64, (64,)), (5, 70, (33, 7, 1, 9)), (64, 128, (96, 32, 24)), (100, 96, (130, 5)), (130, 40, (20,))]


@once
@pytest.mark.parametrize("rows,k,widths", PRODUCTS)
@pytest.mark.parametrize("split", [1, 2, 5])
def test_the_plain_product(rows, k, widths, split):
    make = Made()
    x, weights = make(rows, k), [make(n, k) for n in widths]
    found = skinny_naive(x, weights, split)
    assert found.shape == (split, rows, sum(widths)) and torch.allclose(found.sum(0), x @ torch.cat(weights).T, atol=1e-4)


@interpreted
@pytest.mark.parametrize(
    "rows,k,widths,split,dtype",
    thinned([(*p, s, d) for p in PRODUCTS for s in (None, 1, 3) for d in DTYPES], quick=range(0, 45, 7)),
)
def test_the_kernels_product(rows, k, widths, split, dtype):
    make = Made(dtype)
    x, weights = torch.cat([make(rows, k), torch.full((rows, 3), torch.nan, dtype=dtype)], 1)[:, :k], [make(n, k) for n in widths]
    found = skinny(x, weights, split)
    assert found.dtype == torch.float32 and found.stride(1) % 16 == 0 and len(found) == (split or len(found))
    truth = wide(x) @ wide(torch.cat(weights)).T
    assert float((found.sum(0) - truth).abs().max() / truth.abs().max()) < 2e-6 # products of halves are exact in float32


@interpreted
def test_a_buffer_and_another_type_of_result():
    make = Made(torch.float16)
    x, weights = make(3, 96), [make(40, 96), make(5, 96)]
    buffer = torch.full((3, 3, 50), torch.nan)
    found = skinny(x, weights, out=buffer[..., :45])
    assert found.data_ptr() == buffer.data_ptr() and bool(found.isfinite().all()) and bool(buffer[..., 45:].isnan().all())
    assert torch.allclose(found.sum(0), skinny_naive(x, weights)[0], atol=1e-5)
    half = skinny(x, weights, out=torch.float16)
    assert half.shape == (1, 3, 45) and torch.equal(half, skinny(x, weights, 1).half())
    assert torch.equal(skinny(x, weights), skinny(x, weights)), "the same bits each time"
    assert torch.equal(skinny(x, weights, 32).sum(0), skinny(x, weights, 2).sum(0)), "parts beyond the end are zero"
    assert skinny(x[:0], weights).shape[1] == 0


@pytest.mark.parametrize("change,said", [
    (dict(weights=[]), "weights=0"),
    (dict(weights=[torch.ones(2, 8)] * 5), "weights=5"),
    (dict(weights=[torch.ones(8, 2).T]), r"weights\[0\]"),
    (dict(weights=[torch.ones(2, 8), torch.ones(2, 8).half()]), r"weights\[1\].*float16"),
    (dict(weights=[torch.ones(2, 7)]), "rows of 8"),
    (dict(x=torch.ones(8, 3).T), "x="),
    (dict(x=torch.ones(3, 8).double()), "float64"),
    (dict(out=torch.empty(1, 3, 3)), "out="),
    (dict(out=torch.empty(2, 3, 2).half()), "out=.*float32"),
    (dict(out=torch.float16, split=2), "out="),
])
def test_a_product_that_cannot_be(change, said):
    with pytest.raises(ValueError, match=said): skinny(**{"x": torch.ones(3, 8), "weights": [torch.ones(2, 8)], **change})


@once
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.lists(st.integers(1, 30000), min_size=1, max_size=4), st.integers(1, 20000),
    st.sampled_from([2, 4]), st.sampled_from([20, 132]), st.sampled_from([99, 227]),
)
def test_how_a_product_is_cut(rows, widths, k, itemsize, processors, room):
    plan = split_for(rows, tuple(widths), k, itemsize, processors, room * 1024)
    steps = -(-k // plan.block_k)
    size = -(-steps // plan.split)
    assert (plan.split - 1) * size < steps, "no part is empty"
    assert (plan.block_s + plan.block_n) * plan.block_k * itemsize * plan.stages <= room * 1024 and plan.block_s >= min(16, rows)
    assert split_for(rows, tuple(widths), k, itemsize, processors, room * 1024, split=3).split == 3


def test_weights_of_a_wider_type_are_rounded_to_xs():
    make = Made()
    x, weights = make(5, 40, dtype=torch.float16), [make(30, 40), make(7, 40)]
    assert torch.equal(skinny_naive(x, weights), skinny_naive(x, [w.half() for w in weights]))
    if runs_on(x.device): assert torch.equal(skinny(x, weights), skinny(x, [w.half() for w in weights]))


@once
def test_the_steps_of_a_small_model_fill_the_chip():
    for rows in (1, 8, 16, 64, 128):
        for widths, k in (
            ((1536, 256, 256, 192), 1536), ((1536, 64), 1536), ((8960, 8960, 128), 1536), ((1536, 64), 8960), ((151936,), 1536),
        ):
            plan = split_for(rows, widths, k, 2)
            assert sum(-(-n // plan.block_n) for n in widths) * plan.split >= (50 if rows <= 64 else 40)
            assert plan.stages * (plan.block_s + plan.block_n) * plan.block_k * 2 <= SHARED


# --- what follows

class Add:
    naive, kernel = staticmethod(add_norm_naive), staticmethod(add_norm)
    CASES = [
        dict(rows=1, width=64),
        dict(rows=5, width=70, split=3, ranks=(8,), bias=True),
        dict(rows=64, width=96, split=2, ranks=(16,), offset=True),
        dict(rows=3, width=300, ranks=(64,), after=True, bias=True),
        dict(rows=3, width=130, ranks=(20,), apart=2, after=True, offset=True),
        dict(rows=2, width=33, ranks=(1,), split=5),
    ]

    def __init__(self, make, rows, width, split=1, ranks=(), bias=False, offset=False, after=False, apart=None):
        parts = make.parts(split, rows, width + (0 if apart else sum(ranks)))
        own = make.parts(apart, rows, 3 + sum(ranks)) if apart else None
        self.given = parts, make(rows, width + 5)[:, :width], make(width), 1e-5
        self.more = dict(
            bias=make(width) if bias else None,
            adapter=make.adapter([width], ranks, width, own) if ranks else None, offset=offset,
            after=make(width) if after else None,
        )

    def __call__(self, f): return f(*self.given, **self.more)


class Gate:
    naive, kernel = staticmethod(gate_naive), staticmethod(gate)
    CASES = [
        dict(rows=1, width=64),
        dict(rows=5, width=70, split=3, ranks=(8, 3), bias=True),
        dict(rows=64, width=130, ranks=(64, 16)),
        dict(rows=100, width=33, split=2, ranks=(16,), bias=True),
        dict(rows=7, width=96, ranks=(0, 20), activation="gelu_tanh", apart=2),
        dict(rows=2, width=40, activation="gelu_tanh", ranks=(80, 8)),
    ]

    def __init__(self, make, rows, width, split=1, ranks=(), bias=False, activation="silu", apart=None):
        parts = make.parts(split, rows, 2 * width + (0 if apart else sum(ranks)))
        own = make.parts(apart, rows, 3 + sum(ranks)) if apart else None
        self.given = parts, width, activation
        self.more = dict(
            bias=make(2 * width) if bias else None, adapter=make.adapter([width, width], ranks, 2 * width, own) if ranks else None
        )

    def __call__(self, f): return f(*self.given, **self.more),


class Heads:
    naive, kernel = staticmethod(heads_store_naive), staticmethod(heads_store)
    CASES = [
        dict(rows=1, heads=2, kv=1, D=64),
        dict(rows=5, heads=4, kv=2, D=96, r=24, split=2, ranks=(8, 0, 3), bias=True),
        dict(rows=33, heads=3, kv=1, D=128, ranks=(16,), norm=True),
        dict(rows=64, heads=1, kv=1, D=64, ranks=(8, 16, 64), norm=True, offset=True),
        dict(rows=3, heads=2, kv=1, D=80, r=80, ranks=(4, 4, 4), apart=2, bias=True),
        dict(rows=100, heads=1, kv=1, D=32, r=16, norm=True),
    ]

    def __init__(self, make, rows, heads, kv, D, r=None, split=1, ranks=(), bias=False, norm=False, offset=False, apart=None):
        widths, r, room = (heads * D, kv * D, kv * D), r or D, 7
        parts = make.parts(split, rows, sum(widths) + (0 if apart else sum(ranks)))
        own = make.parts(apart, rows, 3 + sum(ranks)) if apart else None
        position, column = (torch.randint(lo, hi, (rows,), generator=make.g) for lo, hi in ((-1, 50), (-1, room)))
        self.given, self.column = (parts, heads, kv, D, make(50, 1, r), make(50, 1, r), position), column
        self.cache = make(2, 2, rows + 1, kv, room, D) # (layers, keys and values, slots, kv, C, D)
        self.more = dict(
            bias=make(sum(widths)) if bias else None,
            adapter=make.adapter(widths, ranks, sum(widths), own) if ranks else None,
            norm=(make(D), make(D)) if norm else None, eps=1e-5, offset=offset,
        )

    def __call__(self, f):
        cache, rows = self.cache.clone(), len(self.column)
        q = f(*self.given, cache[1, 0, :rows], cache[1, 1, :rows], self.column, **self.more)
        before = self.cache.clone()
        for i, c in enumerate(self.column.tolist()):
            if c >= 0: before[1, :, i, :, c] = cache[1, :, i, :, c]
        assert torch.equal(before, cache), "only the places of the columns change"
        return q, cache


KINDS = {"add_norm": Add, "gate": Gate, "heads_store": Heads}
EPILOGUES = [(kind, case) for kind, cls in KINDS.items() for case in range(len(cls.CASES))]


def made(kind, case, dtype=torch.float32):
    it = KINDS[kind](Made(dtype), **KINDS[kind].CASES[case])
    if kind == "gate": it.more["dtype"] = dtype
    return it


def in_float64(kind, case, dtype):
    it = made(kind, case, dtype)
    it.given, it.more = wide(it.given), {k: torch.float64 if k == "dtype" else wide(v) for k, v in it.more.items()}
    if kind == "heads_store": it.cache = it.cache.double()
    return it(it.naive)


@interpreted
@pytest.mark.parametrize("kind,case,dtype", thinned([(*e, d) for e in EPILOGUES for d in DTYPES], quick=range(0, 54, 5)))
def test_the_kernels(kind, case, dtype):
    it = made(kind, case, dtype)
    theirs, truth = it(it.naive), in_float64(kind, case, dtype)
    close(it(it.kernel), theirs, truth, dtype)


@once
@pytest.mark.parametrize("kind,case", EPILOGUES)
def test_the_plain_forms_are_static(kind, case):
    it = made(kind, case)
    real = it(it.naive)
    assert all(bool(x.isfinite().all()) for x in real)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode: # a number that must be known on the host raises here
        given = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in it.given]
        if kind != "heads_store": found = it.naive(*given, **it.more)
        else: found = it.naive(*given, *mode.from_tensor(it.cache[1, :, :-1]), mode.from_tensor(it.column), **it.more)
    first = found[0] if isinstance(found, tuple) else found
    assert first.shape == real[0].shape


def by_hand(x, layers): # (S, K), [(W, bias, A, B, scale)] -> (S, N), one operation after the other
    return torch.cat([x @ w.T + bias + (x @ a.T) @ b.T * scale for w, bias, a, b, scale in layers], 1)


def joined(x, *layers): # what the engine hands over
    parts = skinny_naive(x, [*(w for w, *_ in layers), torch.cat([a for _, _, a, _, _ in layers])], 2)
    return parts, dict(
        bias=torch.cat([b for _, b, *_ in layers]),
        adapter=Adapter(tuple(b.T.contiguous() * s for *_, b, s in layers), sum(len(w) for w, *_ in layers)),
    )


@once
def test_a_layer_in_four_products_is_the_layer_one_by_one():
    make, rows, d, heads, kv, D, m, r = Made(torch.float64), 5, 48, 4, 2, 16, 40, 3
    def linear(n, k, rank): return (make(n, k), make(n), make(rank, k), make(n, rank), 0.5)
    q, k, v, o, g, u, down = (
        linear(*s) for s in ((heads * D, d, 3), (kv * D, d, 2), (kv * D, d, 5), (d, heads * D, 3), (m, d, 4), (m, d, 1), (d, m, 2))
    )
    norms, head_norms = [make(d) for _ in range(2)], (make(D), make(D))
    cos, sin = make(20, r * 2), make(20, r * 2)
    position, column = torch.tensor([3, 0, 19, 7, 7]), torch.tensor([0, 1, 2, 0, -1])
    x, h = make(rows, d), make(rows, d)

    own = torch.zeros(2, rows, kv, 3, D, dtype=torch.float64)
    parts, more = joined(h, q, k, v)
    found_q = heads_store_naive(parts, heads, kv, D, cos, sin, position, *own, column, norm=head_norms, **more)
    parts, more = joined(found_q.flatten(1), o)
    found_x, normed = add_norm_naive(parts, x, norms[0], 1e-6, **more)
    parts, more = joined(normed, g, u)
    middle = gate_naive(parts, m, "silu", dtype=torch.float64, **more)
    parts, more = joined(middle, down)
    found = add_norm_naive(parts, found_x, norms[1], 1e-6, **more)

    y = by_hand(h, [q, k, v]).view(rows, -1, D)
    y[:, :heads] = rms_norm_naive(y[:, :heads], head_norms[0], 1e-6)
    y[:, heads:heads + kv] = rms_norm_naive(y[:, heads:heads + kv], head_norms[1], 1e-6)
    turn(y[:, :heads + kv], cos[position][:, None], sin[position][:, None])
    want = x + by_hand(y[:, :heads].flatten(1), [o])
    inner = rms_norm_naive(want, norms[0], 1e-6)
    want = want + by_hand(torch.nn.functional.silu(by_hand(inner, [g])) * by_hand(inner, [u]), [down])
    assert torch.allclose(found_q, y[:, :heads]) and torch.allclose(found[0], want)
    assert torch.allclose(found[1], rms_norm_naive(want, norms[1], 1e-6))
    for i, c in enumerate(column.tolist()):
        if c >= 0:
            assert torch.allclose(own[0, i, :, c], y[i, heads:heads + kv]) and torch.allclose(own[1, i, :, c], y[i, heads + kv:])
    assert own[:, 4].abs().max() == 0


@once
def test_no_adapter_says_nothing():
    make = Made()
    parts = make(2, 3, 10)
    assert torch.equal(finish_naive(parts, (6, 4), torch.float32), parts.sum(0))
    for b in ((None, None), (None,)):
        assert torch.equal(finish_naive(parts, (6, 4), torch.float32, adapter=Adapter(b, 10)), parts.sum(0))


@once
@pytest.mark.parametrize("change,said", [
    (dict(parts=torch.ones(1, 2, 7)), "parts="),
    (dict(bias=torch.ones(7)), "bias="),
    (dict(adapter=Adapter((torch.ones(2, 4),) * 3, 0)), "3 matrices: 1 or 2"),
    (dict(adapter=Adapter((torch.ones(2, 5), None), 0)), r"adapter.b\[0\]"),
    (dict(adapter=Adapter((None, torch.ones(2, 4).half()), 0)), r"adapter.b\[1\].*float16"),
    (dict(adapter=Adapter((torch.ones(2, 4), None), 8)), "xa="),
    (dict(activation="relu"), "activation"),
])
def test_what_does_not_fit_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        gate(**{"parts": torch.ones(1, 2, 8), "width": 4, "activation": "silu", "dtype": torch.float32, **change})


@pytest.mark.parametrize("name,value", [
    ("own_v", torch.ones(2, 1, 4, 8).half()),
    ("own_k", torch.ones(3, 1, 4, 8)),
    ("cos", torch.ones(5, 7)),
    ("position", torch.ones(2)),
    ("column", torch.ones(3, dtype=torch.long)),
])
def test_heads_that_do_not_fit_are_refused(name, value):
    cache = torch.ones(2, 1, 4, 8)
    whole = dict(
        parts=torch.ones(1, 2, 24), heads=1, kv=1, D=8, cos=torch.ones(5, 8), sin=torch.ones(5, 8),
        position=torch.zeros(2, dtype=torch.long), own_k=cache, own_v=cache, column=torch.zeros(2, dtype=torch.long),
    )
    with pytest.raises(ValueError, match=name): heads_store(**whole | {name: value})


@compiled
@WHICH
def test_kernels_under_the_interpreter(which):
    assert not runs_on(torch.device("cpu"))
    under_the_interpreter(__file__, which, "kernels" if which == "slow" else "")


# --- what the compiler makes of the very launches

class Launches:
    "Stands for a kernel and keeps what it is called with."
    def __init__(self): self.calls = []

    def __getitem__(self, grid): return lambda *given, **named: self.calls.append((given, named))


def build(kernel, arguments, named, capability):
    "A launch's kernel as machine code."
    options = {k: v for k, v in named.items() if k.startswith("num_")}
    constants = {k: False if k == "WIDE" else v for k, v in named.items() if k not in options}
    kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    def kind(x): return kinds[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
    names = kernel.arg_names
    aligned = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0)]
    signature = {n: "constexpr" for n in names} | {n: kind(x) for n, x in zip(names, arguments)}
    return compiled_kernel(kernel, signature, constants, aligned, capability, options)


CHIPS = {90: (132, SHARED, True), 89: (58, 99 * 1024, True), 75: (40, 64 * 1024, False)}


def compiled_launch(monkeypatch, tmp_path, name, capability, call):
    module = M if name == "_product" else E
    kernel, launches = getattr(module, name), Launches()
    monkeypatch.setattr(module, name, launches)
    for m in (M, E): monkeypatch.setattr(m, "_chip", lambda device: CHIPS[capability])
    call()
    [(given, named)] = launches.calls
    built = build(kernel, given, named, capability)
    registers, stack = resources(built, tmp_path)
    assert built.metadata.shared <= CHIPS[capability][1] and stack <= 64, (registers, stack, built.metadata.shared)
    return built


def calls(dtype, rows, split, rank, d=1536, m=8960, heads=12, kv=2, D=128):
    "The launches of a layer of a 1.5B model."
    def e(*shape, dtype=dtype): return torch.empty(shape, dtype=dtype)
    sums, n = lambda width: e(split, rows, width, dtype=torch.float32), (heads + 2 * kv) * D
    tables, at, own = e(64, 1, D), torch.zeros(rows, dtype=torch.long), e(rows, kv, 32, D)
    three = Adapter(tuple(e(rank, w) for w in (heads * D, kv * D, kv * D)), n)
    return {
        "_product": lambda: skinny(e(rows, d), [e(m, d), e(m, d), e(2 * rank, d)]),
        "_add_norm": lambda: add_norm(sums(d + rank), e(rows, d), e(d), 1e-6, adapter=Adapter((e(rank, d),), d)),
        "_gate_parts": lambda: gate(
            sums(2 * m + 2 * rank), m, "silu", dtype=dtype, adapter=Adapter((e(rank, m), e(rank, m)), 2 * m)
        ),
        "_heads_store": lambda: heads_store(
            sums(n + 3 * rank), heads, kv, D, tables, tables, at, own, own, at, bias=e(n), adapter=three, norm=(e(D), e(D))
        ),
    }


@compiled
@pytest.mark.parametrize("name", ["_product", "_add_norm", "_gate_parts", "_heads_store"])
@pytest.mark.parametrize("dtype,capability", [(torch.bfloat16, 90), (torch.float16, 75)])
def test_it_compiles(name, dtype, capability, monkeypatch, tmp_path):
    built = compiled_launch(monkeypatch, tmp_path, name, capability, calls(dtype, 64, 2, 64)[name])
    if name == "_product" and capability == 90:
        assert "wgmma" in built.asm["ptx"] and "cp.async.cg" in built.asm["ptx"], "tensor cores, and loads that run ahead"


@compiled
@pytest.mark.parametrize("b", [(True, False), (False, True)])
def test_a_part_without_adapter_beside_one_with_it_compiles(b, monkeypatch, tmp_path):
    m, e = 96, lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)
    adapter = Adapter(tuple(e(16, m) if there else None for there in b), 2 * m)
    compiled_launch(
        monkeypatch, tmp_path, "_gate_parts", 90,
        lambda: gate(e(2, 5, 2 * m + 16, dtype=torch.float32), m, "silu", dtype=torch.bfloat16, adapter=adapter),
    )


@compiled
def test_weights_of_a_wider_type_compile(monkeypatch, tmp_path):
    built = compiled_launch(
        monkeypatch, tmp_path, "_product", 90,
        lambda: skinny(torch.empty(64, 1536, dtype=torch.bfloat16), [torch.empty(1536, 1536)]),
    )
    assert "wgmma" in built.asm["ptx"]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", ["_product", "_add_norm", "_gate_parts", "_heads_store"])
@pytest.mark.parametrize("dtype,capability", [
    (torch.bfloat16, 90), (torch.float16, 90), (torch.float32, 90),
    (torch.bfloat16, 89), (torch.float16, 75), (torch.float32, 75),
])
@pytest.mark.parametrize("rows,split,rank,sizes", [
    (1, 1, 8, {}), (16, 4, 16, {}), (32, 3, 64, {}), (128, 5, 64, {}),
    (64, 11, 128, dict(d=4096, D=96)), (64, 2, 64, dict(d=2304, D=256)),
    (64, 2, 64, dict(d=8192, D=64)),
], ids=str)
def test_it_compiles_in_every_size(name, dtype, capability, rows, split, rank, sizes, monkeypatch, tmp_path):
    compiled_launch(monkeypatch, tmp_path, name, capability, calls(dtype, rows, split, rank, **sizes)[name])


# --- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,k,widths", [*PRODUCTS, (64, 1536, (8960, 8960, 128)), (16, 8960, (1536, 64)), (64, 1536, (1536, 256, 256, 192))]
)
def test_products_on_a_gpu(rows, k, widths, dtype):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    make = Made(dtype)
    x, weights = make(rows, k).cuda(), [make(n, k).cuda() for n in widths]
    found, truth = skinny(x, weights).sum(0), wide(x) @ wide(torch.cat(weights)).T
    assert float((found - truth).norm() / truth.norm()) < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind,case", EPILOGUES)
def test_epilogues_on_a_gpu(kind, case, dtype):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    def to(x):
        return (
            x.cuda()
            if isinstance(x, torch.Tensor)
            else Adapter(tuple(map(to, x.b)), x.column, to(x.xa))
            if isinstance(x, Adapter)
            else tuple(map(to, x))
            if isinstance(x, tuple)
            else x
        )
    it, truth = made(kind, case, dtype), in_float64(kind, case, dtype)
    theirs = it(it.naive)
    it.given, it.more = to(it.given), {k: to(v) for k, v in it.more.items()}
    if kind == "heads_store": it.cache, it.column = it.cache.cuda(), it.column.cuda()
    close([x.cpu() for x in it(it.kernel)], theirs, truth, dtype)


@pytest.mark.gpu
def test_in_a_graph():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    make = Made(torch.bfloat16)
    x, weights, b, residual, norm = (
        t.cuda() for t in (make(64, 1536), make(1536, 1536), make(64, 1536), make(64, 1536), make(1536))
    )
    thin = make(64, 1536).cuda()
    def call(): return add_norm(skinny(x, [weights, thin]), residual, norm, 1e-6, adapter=Adapter((b,), 1536))
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = call()
    weights.mul_(2) # weights change in place
    graph.replay()
    assert all(torch.equal(a, c) for a, c in zip(out, call()))
