"""Decode attention: the plain form against attention slot by slot, tiles, kernels under Triton's interpreter, what is compiled."""
import os
import re

import pytest
import torch
from compiling import WHICH, compiled_kernel, resources, thinned, under_the_interpreter
from hypothesis import given, settings, strategies as st
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton")
from grpo_nb.ops.decode import attention as M
from grpo_nb.ops.decode.attention import (
    Launch, decode_attention, decode_attention_naive, decode_tiles, scratch_for, slots_per_tile, tile_count,
)
from grpo_nb.ops.layer.rms_norm import runs_on

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")


class Case:
    "Keys and values as slices of larger tensors; what must not be read is NaN."
    def __init__(
        self, lanes, prompts, owns, heads=4, kv=2, width=16, room=(None, None), dtype=torch.float32, seed=0, extra_lanes=0
    ):
        g = torch.Generator().manual_seed(seed)
        def make(*shape): return torch.randn(shape, generator=g).to(dtype)
        p, c = room[0] or max(prompts), room[1] or max(max(owns), 1)
        s, n = len(lanes), len(prompts)
        self.q = make(s, heads + 2, width)[:, 1:-1]
        prompt, own = (
            torch.full((2, 2, a, kv, b, width), torch.nan, dtype=dtype) for a, b in ((n + extra_lanes, p + 3), (s + 2, c + 5))
        )
        for i, length in enumerate(prompts): prompt[1, :, i, :, :length] = make(2, kv, length, width)
        for i, length in enumerate(owns): own[1, :, i, :, :length] = make(2, kv, length, width)
        self.prompt, self.own = prompt[1, :, :, :, :p], own[1, :, :s, :, :c]
        self.lane = torch.tensor([max(lane, 0) for lane in lanes])
        self.prompt_length, self.own_length = torch.tensor(prompts + [0] * extra_lanes), torch.tensor(owns)
        self.lanes, self.scale, self.rep = lanes, width**-0.5, heads // kv

    @property
    def given(self): return self.q, *self.prompt, *self.own, self.lane, self.prompt_length, self.own_length

    def tiles(self, per_tile=None):
        per_tile = per_tile or slots_per_tile(self.rep)
        return torch.tensor(
            decode_tiles(self.lanes, per_tile, tile_count(len(self.lanes), len(self.prompt_length), per_tile)), dtype=torch.int32
        )

    def naive(self, dtype=None, **k):
        wide = [x.to(dtype) if dtype and x.is_floating_point() else x for x in self.given]
        return decode_attention_naive(*wide, self.scale, **k)

    def kernel(self, per_tile=None, scratch=None, launch=None, **k):
        return decode_attention(*self.given, self.tiles(per_tile), self.scale, scratch=scratch, launch=launch, **k)


def one_by_one(case, window=None, softcap=None):
    "Attention slot by slot."
    out = torch.zeros_like(case.q)
    for s, (lane, m) in enumerate(zip(case.lane.tolist(), case.own_length.tolist())):
        if not m: continue
        n = int(case.prompt_length[lane])
        keys, values = (
            torch.cat([a[lane, :, :n], b[s, :, :m]], 1).repeat_interleave(case.rep, 0) for a, b in zip(case.prompt, case.own)
        )
        if window is not None: keys, values = keys[:, -window:], values[:, -window:]
        if softcap is None: out[s] = scaled_dot_product_attention(case.q[s, :, None], keys, values, scale=case.scale)[:, 0]
        else:
            out[s] = (
                (torch.tanh(case.q[s, :, None] @ keys.transpose(1, 2) * case.scale / softcap) * softcap).softmax(-1) @ values
            )[:, 0]
    return out


# lane 1 has no slot, slot 4 is free
GROUPS = dict(lanes=[0, 0, 2, 0, -1, 2, 0, 3], prompts=[9, 4, 70, 1], owns=[3, 40, 1, 33, 0, 7, 100, 64])
RULES = [{}, dict(window=5), dict(window=48), dict(softcap=0.5), dict(window=37, softcap=2.0)]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_plain_form_is_attention_slot_by_slot(rules):
    case = Case(**GROUPS)
    assert torch.allclose(case.naive(**rules), one_by_one(case, **rules), atol=2e-6)
    assert not case.naive(**rules)[4].any()


def test_it_reads_nothing_back():
    from torch._subclasses.fake_tensor import FakeTensorMode # raises where a value decides a shape or is read
    mode, given = FakeTensorMode(), Case(**GROUPS).given
    fakes = [mode.from_tensor(x) for x in given]
    with mode: assert decode_attention_naive(*fakes, 1.0, window=5, softcap=2.0).shape == given[0].shape


def test_no_slot_in_use_and_no_room():
    case = Case([-1, -1], [3], [0, 0])
    assert not case.naive().any() and case.naive().isfinite().all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 6), max_size=40), st.integers(1, 12))
def test_tiles(lanes, per_tile):
    count = tile_count(len(lanes), 7, per_tile)
    rows = decode_tiles(lanes, per_tile, count)
    assert len(rows) == count and all(len(r) == per_tile for r in rows)
    filled = [[s for s in r if s >= 0] for r in rows]
    assert all(r[:len(f)] == f for r, f in zip(rows, filled)), "what is left over stands at the end"
    assert sorted(s for f in filled for s in f) == [s for s, lane in enumerate(lanes) if lane >= 0]
    assert all(len({lanes[s] for s in f}) <= 1 for f in filled)
    if fewest := sum(map(bool, filled)):
        with pytest.raises(ValueError, match=f"tiles={fewest - 1} is too few"): decode_tiles(lanes, per_tile, fewest - 1)


def test_slots_of_a_tile():
    assert [slots_per_tile(rep) for rep in (1, 2, 6, 8, 71)] == [64, 32, 10, 8, 1]


SHAPES = {
    "each head its own keys": dict(heads=3, kv=3, width=64), "two": dict(heads=4, kv=2, width=80),
    "six": dict(heads=12, kv=2, width=64), "eight": dict(heads=8, kv=1, width=128), "narrow": dict(heads=6, kv=1, width=6),
    "wide": dict(heads=2, kv=1, width=256),
}
SLACK = {torch.float32: 3e-6, torch.float16: 1e-3}


def close(case, ours, **rules):
    "No further from float64 than the same operations one by one in the same type."
    truth, theirs = case.naive(torch.float64, **rules), case.naive(**rules)
    def error(x): return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))
    assert ours.dtype == case.q.dtype and ours.isfinite().all() and error(ours) <= error(theirs) + SLACK[ours.dtype]
    assert not ours[case.own_length == 0].any()


@interpreted
@pytest.mark.parametrize("shape,dtype", thinned(
    [(s, d) for s in SHAPES for d in (torch.float32, torch.float16)], quick=(2, 7, 8), # two in fp32, eight in fp16, narrow in fp32
))
def test_shapes(shape, dtype):
    case = Case(**GROUPS, **SHAPES[shape], dtype=dtype)
    close(case, case.kernel(launch=Launch(64, 64) if dtype is torch.float16 else None))


@interpreted
@pytest.mark.parametrize("rules,launch", thinned([
    *((rules, Launch(64, 64)) for rules in RULES),
    (RULES[4], Launch(64, 128, rows=32, block=64)),
    (RULES[4], Launch(128, 64, rows=16, block=16)),
], quick=(0, 4, 6)), ids=str)
def test_windows_and_caps(rules, launch):
    case = Case(**GROUPS, heads=6, kv=1)
    close(case, case.kernel(launch=launch, **rules), **rules)


@interpreted
@pytest.mark.parametrize("rules", [pytest.param({}, marks=pytest.mark.slow), dict(window=100)], ids=str)
def test_many_parts_and_slots(rules):
    g = torch.Generator().manual_seed(1)
    owns = torch.randint(0, 131, (9,), generator=g).tolist()
    lanes = [i % 2 * 3 if own else -1 for i, own in enumerate(owns)]
    case = Case(lanes, [200, 64, 65, 1_100], owns, room=(1_200, 150), extra_lanes=1)
    close(case, case.kernel(per_tile=3, launch=Launch(64, 64), **rules), **rules)


@interpreted
@pytest.mark.parametrize("lanes", thinned(
    [([0],), ([0, 1, 2],), ([1, 1, 1, 1, 1],), ([-1, 0, -1],), ([-1, -1],)], quick=(3, 4)), ids=str,
)
def test_few_slots(lanes):
    case = Case(lanes, [64, 128, 1], [0 if lane < 0 else 64 * (i + 1) for i, lane in enumerate(lanes)])
    for launch in (None, Launch(64, 64)): close(case, case.kernel(launch=launch))


@interpreted
def test_a_scratch_serves_many_steps_and_smaller_shapes():
    scratch = tuple(x.fill_(torch.nan) for x in scratch_for(8, 6, 64, 130, 130, "cpu"))
    long, short = Case(**GROUPS, heads=6, width=64, room=(130, 130)), Case([0, 1], [3, 5], [2, 1], heads=4, width=16)
    for case, rules in ((long, {}), (short, {}), (long, dict(window=3))):
        close(case, case.kernel(scratch=scratch, **rules), **rules)
    with pytest.raises(ValueError, match=re.escape("make it by scratch_for(8, 6, 64, 130, 130)")):
        long.kernel(scratch=scratch_for(2, 4, 16, 64, 64, "cpu"))


@interpreted
def test_a_slot_that_ended_after_the_tiles_were_made():
    case = Case(**GROUPS)
    tiles = case.tiles()
    case.own_length[torch.tensor([0, 7])] = 0 # the first of its tile, and a whole tile
    for rules in ({}, dict(window=8)):
        close(case, decode_attention(*case.given, tiles, case.scale, launch=Launch(64, 64), **rules), **rules)


@interpreted
def test_large_scores():
    case = Case(**GROUPS)
    case.q = case.q * 300
    close(case, case.kernel())
    close(case, case.kernel(softcap=5.0), softcap=5.0)


@interpreted
def test_bad_input_is_named():
    case, tiles = Case(**GROUPS), Case(**GROUPS).tiles()
    def call(tiles=tiles, scale=1.0, **change):
        return decode_attention(*{**dict(zip("q pk pv ok ov lane pl ol".split(), case.given)), **change}.values(), tiles, scale)
    for change, message in [
        (dict(pv=case.prompt[1][..., :8]), "prompt_v="),
        (dict(q=case.q[:, :3]), "3 heads"),
        (dict(q=case.q.half()), "prompt_k is torch.float32"),
        (dict(ol=case.own_length[:3]), "own_length="),
        (dict(tiles=tiles[0]), "tiles="),
        (dict(lane=case.lane.repeat(2)[::2]), "lane must be contiguous"),
        (dict(ok=case.own[0].transpose(2, 3).contiguous().transpose(2, 3)), "own_k must have its last dimension contiguous"),
    ]:
        with pytest.raises(ValueError, match=message): call(**change)
    for rules in (dict(window=0), dict(softcap=0.0)):
        with pytest.raises(ValueError, match=f"{next(iter(rules))}="): case.kernel(**rules)


@compiled
@WHICH
def test_kernels_under_the_interpreter(which):
    assert not runs_on(torch.device("cpu"))
    under_the_interpreter(__file__, which)


def build(kernel, types, constants, capability, warps, stages):
    "The kernel as machine code; integers are taken as multiples of 16 where `types` says `i32+`."
    names = kernel.arg_names
    aligned = [i for i, n in enumerate(names) if n in types and types[n][0] == "*" or types.get(n) == "i32+"]
    signature = {n: types[n].rstrip("+") if n in types else "constexpr" for n in names}
    return compiled_kernel(kernel, signature, constants, aligned, capability, dict(num_warps=warps, num_stages=stages))


MACHINES = [("bf16", 90, 128, False), ("fp16", 75, 64, True)]
MORE = [
    (kind, capability, width, rules)
    for kind, capability in (("bf16", 90), ("fp16", 90), ("fp32", 90), ("bf16", 89), ("fp16", 75), ("fp32", 75))
    for width in (64, 80, 128, 256)
    for rules in (False, True)
]


def compile_split(kind, capability, width, rules, tmp_path):
    fast = kind != "fp32" and capability >= 80
    cut = (
        Launch(128, 128, warps=8, stages=2)
        if fast and width > 128
        else Launch(128, 128)
        if fast
        else Launch(128, 128, rows=16, block=16)
    )
    types = {
        n: "i32+" if re.search("_(slot|lane|head|step)$|^width$|_chunk$", n) else "i32"
        for n in M._split.arg_names
        if not n.isupper()
    }
    types |= {n: "*" + kind for n in ("q", "prompt_k", "prompt_v", "own_k", "own_v")} | {
        n: "*i64" for n in ("lane", "prompt_length", "own_length")
    }
    types |= {n: "*fp32" for n in ("tops", "totals", "accs")} | {"tiles": "*i32", "scale": "fp32", "cap": "fp32"}
    constants = dict(
        HAS_WINDOW=rules, HAS_CAP=rules, BLOCKS=-(-60 // cut.rows), TILE_M=cut.rows,
        OWN_M=16, BLOCK=cut.block, WIDTH=1 << (width - 1).bit_length(),
    )
    built = build(M._split, types, constants, capability, cut.warps, cut.stages)
    room = {75: 64, 89: 99, 90: 227}[capability]
    registers, stack = resources(built, tmp_path)
    assert built.metadata.shared <= room * 1024 and stack <= 32, (registers, stack, built.metadata.shared)
    if fast: assert "mma" in built.asm["ptx"] and "cp.async" in built.asm["ptx"]


@compiled
@pytest.mark.parametrize("kind,capability,width,rules", MACHINES)
def test_it_compiles(kind, capability, width, rules, tmp_path): compile_split(kind, capability, width, rules, tmp_path)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("kind,capability,width,rules", MORE)
def test_it_compiles_in_every_type(kind, capability, width, rules, tmp_path):
    compile_split(kind, capability, width, rules, tmp_path)


@compiled
@pytest.mark.parametrize("capability", [75, 90])
def test_the_merge_compiles(capability, tmp_path):
    types = dict(out="*fp16", tops="*fp32", totals="*fp32", accs="*fp32", own_length="*i64", heads="i32", parts="i32", width="i32+")
    assert resources(build(M._merge, types, dict(GROUP=8, WIDTH=128), capability, 4, 3), tmp_path)[1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", [{}, dict(window=37, softcap=2.0)], ids=str)
def test_on_a_gpu(shape, dtype, rules):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    case = Case(**GROUPS, **SHAPES[shape], dtype=dtype)
    given = [x.cuda() for x in case.given]
    ours = decode_attention(*given, case.tiles().cuda(), case.scale, **rules)
    truth = case.naive(torch.float64, **rules)
    theirs = decode_attention_naive(*given, case.scale, **rules)
    def error(x): return float((x.cpu().double() - truth).norm() / truth.norm())
    assert error(ours) <= 1.1 * error(theirs) + {torch.float32: 3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.gpu
def test_in_a_graph():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    case = Case(**GROUPS, width=64, dtype=torch.float16)
    given, tiles = [x.cuda() for x in case.given], case.tiles().cuda()
    scratch = scratch_for(8, 4, 64, 128, 128, "cuda")
    def call(): return decode_attention(*given, tiles, case.scale, scratch=scratch)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = call()
    given[-1][6] = 50 # a length changes on the device
    graph.replay()
    assert torch.equal(out, call())
