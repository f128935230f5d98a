"""Fused forms against PEFT's and Transformers' own modules: values, gradients, the modules untouched while the switch is off."""
import copy
import io
import os
from itertools import product

import pytest
import torch
from compiling import WHICH, thinned, under_the_interpreter
from parity import FAMILIES, tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from grpo_nb.ops.layer import fuse as F
from grpo_nb.ops.layer.fuse import fuse, fused, unfuse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_under_the_interpreter")
# Launches in the interpreter are slow: what another case shows of the kernels already is left to the slow run there
def later(test): return pytest.mark.slow(test) if INTERPRETED else test
def but(first, others): # `first` are enough in the interpreter
    return [*first, *(pytest.param(x, marks=[pytest.mark.slow] if INTERPRETED else []) for x in others if x not in first)]


def peft_of(model, seed=0, std=0.1, **config):
    "The model under LoRA whose B is not 0."
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}))
    redraw(peft, seed, std)
    return peft


def redraw(peft, seed=0, std=0.1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name or "lora_bias" in name: p.copy_(torch.randn(p.shape, generator=g) * std)


def run(model, autocast=False, ids=None):
    "Logits and every gradient."
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(torch.arange(3, 33).view(2, 15) if ids is None else ids, use_cache=False).logits
    logits.float().square().mean().backward()
    return {"logits": logits.detach().float(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def worst(a, b):
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)) for n in a)


def untouched(a, b): # to the bit where there are no kernels for the other modules
    return torch.allclose(a, b, atol=1e-5) if INTERPRETED else torch.equal(a, b)


def same(a, b): return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


CASES = {
    "plain": {},
    "scale 1": dict(lora_alpha=4),
    "rank-stabilised": dict(use_rslora=True),
    "some layers": dict(target_modules=["q_proj", "down_proj"]),
    "trained base": dict(bias="all"),
    "rank pattern": dict(rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 3}),
}


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("case", but(["plain"], CASES))
def test_lora_is_pefts_to_rounding(case, family):
    peft = peft_of(tiny(family), **CASES[case])
    base = peft.get_base_model()
    theirs = run(peft)
    counts = fuse(base)
    assert counts["lora"] > 0 and same(theirs, run(peft)), "off, nothing changes"
    with fused(base): assert worst(theirs, run(peft)) < 1e-5


@later
def test_a_trained_base_gets_its_gradient_and_a_frozen_one_none():
    peft = peft_of(tiny("qwen2"))
    base = peft.get_base_model()
    base.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    theirs = run(peft)
    fuse(base)
    with fused(base): ours = run(peft)
    assert worst(theirs, ours) < 1e-5 and sum("base_layer.weight" in n for n in ours) == 1


def test_under_autocast_no_further_from_the_truth_than_peft_and_gradients_in_the_adapters_type():
    """Squared errors over four draws, for one draw says little (0.82 to 1.11 times PEFT's on a CPU, 0.95 together).

    Triton's interpreter cuts fp32 to bf16 where a GPU rounds to nearest: a mean square of 1/3 of the last place in place of 1/12,
    so what its kernels round may be off by four times as much there.
    """
    ours, theirs = 0.0, 0.0
    for seed in range(1 if INTERPRETED else 4):
        peft, ids = peft_of(tiny("qwen3"), seed), torch.randint(3, 60, (2, 15), generator=torch.Generator().manual_seed(seed))
        for name, p in peft.named_parameters():
            if "lora" not in name: p.data = p.data.bfloat16()
        truth = run(copy.deepcopy(peft).float(), ids=ids)
        def error(found, truth=truth):
            return float(
                sum((found[n] - t).square().sum() for n, t in truth.items()) / sum(t.square().sum() for t in truth.values())
            )
        theirs += error(run(peft, autocast=True, ids=ids))
        fuse(peft.get_base_model())
        with fused(peft.get_base_model()): found = run(peft, autocast=True, ids=ids)
        assert all(g.dtype is torch.float32 for g in found.values())
        ours += error(found)
    assert ours <= (4 if INTERPRETED else 1) * 1.1 * theirs, (ours, theirs)


@pytest.mark.parametrize("checkpointing", but([False], [True]))
def test_an_optimisers_step_is_never_missed(checkpointing):
    models = [peft_of(tiny("qwen3")) for _ in range(2)]
    for m in models:
        if checkpointing:
            m.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            m.enable_input_require_grads()
        m.train()
    fuse(models[1].get_base_model())
    found = []
    for m in models:
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            with fused(m.get_base_model()): last = run(m)
            optimizer.step()
        found.append(last)
    assert worst(*found) < 1e-4


@later
def test_adapters_that_are_disabled_switched_or_merged():
    peft = peft_of(tiny("qwen3"))
    peft.add_adapter("ref", LoraConfig(r=2, target_modules="all-linear"))
    redraw(peft, 1)
    base = peft.get_base_model()
    plain = copy.deepcopy(peft)
    fuse(base)
    with fused(base):
        with peft.disable_adapter(), plain.disable_adapter(): assert untouched(run_logits(peft), run_logits(plain))
        assert torch.allclose(run_logits(peft), run_logits(plain), atol=1e-5)
    for m in (peft, plain): m.set_adapter("ref")
    with fused(base): assert worst(run(plain), run(peft)) < 1e-5
    for m in (peft, plain): m.base_model.set_adapter(["default", "ref"])
    with fused(base): assert untouched(run_logits(peft), run_logits(plain)), "two active adapters are PEFT's own business"
    for m in (peft, plain): m.merge_adapter()
    with fused(base): assert untouched(run_logits(peft), run_logits(plain))
    for m in (peft, plain):
        m.unmerge_adapter()
        m.set_adapter("default")
    with fused(base): assert worst(run(plain), run(peft)) < 1e-4


def run_logits(m):
    with torch.no_grad(): return m(torch.arange(3, 33).view(2, 15), use_cache=False).logits


@pytest.mark.parametrize("config", but([dict(lora_bias=True)], [dict(use_dora=True), dict(lora_dropout=0.5)]), ids=str)
def test_what_is_left_to_peft(config):
    peft = peft_of(tiny("qwen3"), **config)
    peft.train()
    torch.manual_seed(0)
    theirs = run(peft)
    fuse(peft.get_base_model())
    torch.manual_seed(0)
    with fused(peft.get_base_model()): ours = run(peft)
    assert same(theirs, ours) if not INTERPRETED else worst(theirs, ours) < 1e-5
    if "lora_dropout" in config:
        peft.eval()
        theirs = run(peft)
        with fused(peft.get_base_model()): assert worst(theirs, run(peft)) < 1e-5


def test_a_hook_on_a_part_is_still_called():
    peft, calls = peft_of(tiny("qwen3")), []
    layer = peft.get_base_model().model.layers[0].self_attn.q_proj
    fuse(peft.get_base_model())
    layer.lora_A["default"].register_forward_hook(lambda *a: calls.append("A"))
    layer.register_forward_hook(lambda *a: calls.append("layer"))
    with fused(peft.get_base_model()): run_logits(peft)
    assert calls == ["A", "layer"]


def test_a_base_layer_that_multiplies_in_its_own_way():
    bnb = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    layer = Linear4bit(base.to("cpu"), "default", config=LoraConfig(r=4, lora_alpha=6), r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    holder, x = nn.Sequential(layer), torch.randn(3, 5, 64, requires_grad=True)

    def grads():
        holder.zero_grad()
        x.grad = None
        y = holder(x)
        y.square().sum().backward()
        return {
            "y": y.detach(), "x": x.grad.clone(),
            "A": layer.lora_A["default"].weight.grad.clone(),
            "B": layer.lora_B["default"].weight.grad.clone(),
        }
    theirs = grads()
    assert fuse(holder)["lora"] == 1
    with fused(holder): assert worst(theirs, grads()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_and_taken_away_leaves_nothing(family):
    model = peft_of(tiny(family)) if family != "mixtral" else tiny(family)
    base = model.get_base_model() if family != "mixtral" else model
    before = {n: set(m.__dict__) for n, m in base.named_modules()}
    keys, logits = list(model.state_dict()), run_logits(model)
    fuse(base), fuse(base)
    with fused(base), fused(base): assert torch.allclose(run_logits(model), logits, atol=1e-4)
    assert list(model.state_dict()) == keys and torch.equal(run_logits(model), logits)
    unfuse(base), unfuse(base)
    assert before == {n: set(m.__dict__) for n, m in base.named_modules()}
    with fused(base): assert torch.equal(run_logits(model), logits)


def test_copies_and_pickles():
    peft = peft_of(tiny("qwen3"))
    base = peft.get_base_model()
    fuse(base)
    twin = copy.deepcopy(base)
    assert twin.__dict__[F.NAME] is not base.__dict__[F.NAME]
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in m.__dict__)
    with fused(base): assert twin.__dict__[F.NAME].depth == 0 and torch.allclose(run_logits(twin), run_logits(base), atol=1e-5)
    file = io.BytesIO()
    torch.save(base, file)
    file.seek(0)
    assert torch.equal(run_logits(torch.load(file, weights_only=False)), run_logits(base))


def test_an_error_inside_turns_the_switch_off():
    base = tiny("qwen3")
    fuse(base)
    with pytest.raises(ZeroDivisionError), fused(base): 1 / 0
    assert base.__dict__[F.NAME].depth == 0


class AnotherRMSNorm(nn.Module): # rounds in another place
    def __init__(self, dim):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(.5, 2, dim)), 1e-6

    def forward(self, x):
        return (self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


class AnotherMLP(nn.Module):
    def __init__(self, act, minus=0.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn, self.minus = (
            nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), act, minus,
        )

    def forward(self, x): return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) - self.minus)


@interpreted
def test_what_is_not_known_is_left_alone():
    model = nn.ModuleDict(
        dict(norm=AnotherRMSNorm(16), relu=AnotherMLP(nn.ReLU()), exact=AnotherMLP(nn.GELU()), odd=AnotherMLP(nn.SiLU(), 1.0))
    )
    assert sum(fuse(model).values()) == 0
    assert fuse(nn.ModuleDict(dict(good=AnotherMLP(nn.SiLU()))))["mlp"] == 1


@interpreted
@pytest.mark.parametrize("family", but(["qwen3", "gemma2", "gemma3"], [f for f in FAMILIES if f not in ("mixtral", "phi3")]))
def test_every_kind_in_every_family(family):
    model = tiny(family)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1: p.add_(torch.linspace(-.3, .3, len(p)))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    theirs = run(model)
    counts = fuse(model)
    assert counts["norm"] > 4 and counts["mlp"] >= 2 and counts["rotary"] >= 2
    with fused(model): ours = run(model)
    assert worst(theirs, ours) < 1e-4 and same(theirs, run(model))


@interpreted
@pytest.mark.parametrize("offset,shape,weight,dtype", thinned(list(product(
    [False, True], [(1, 3), (5, 7), (2, 3, 65), (3, 2, 4, 128), (130, 33)], [torch.float32, None], # None: the same type as x
    [torch.float32, torch.bfloat16, torch.float16],
)), quick=range(0, 60, 13)), ids=str)
def test_rms_norm(offset, shape, weight, dtype):
    from grpo_nb.ops.layer.rms_norm import rms_norm, rms_norm_naive
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    w = torch.randn(shape[-1:], generator=g).to(weight or dtype)
    d = torch.randn(shape, generator=g)
    close(lambda f, x, w: f(x, w, 1e-6, offset), rms_norm_naive, rms_norm, (x, w), d)


@interpreted
def test_rms_norm_with_several_blocks_of_rows_a_program(monkeypatch):
    from grpo_nb.ops.layer import rms_norm as M
    monkeypatch.setattr(M, "PROGRAMS", 2)
    x, w, d = (torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((11, 3000), (3000,), (11, 3000)))
    close(lambda f, x, w: f(x, w, 1e-6, True), M.rms_norm_naive, M.rms_norm, (x, w), d)


@interpreted
@pytest.mark.parametrize("activation,shape,dtype", thinned(list(product(
    ["silu", "gelu_tanh"], [(1,), (3, 683), (2, 5, 1024)], [torch.float32, torch.bfloat16, torch.float16],
)), quick=(0, 4, 11)), ids=str)
def test_gated(activation, shape, dtype):
    from grpo_nb.ops.layer.gated_mlp import gated, gated_naive
    g = torch.Generator().manual_seed(0)
    gate, up, d = (torch.randn(shape, generator=g) for _ in range(3))
    close(lambda f, a, b: f(a, b, activation), gated_naive, gated, ((3 * gate).to(dtype), up.to(dtype)), d)


def outputs_of(kind): # of every function of ours that stands in a layer, in two and in three dimensions
    g = torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(*shape, generator=g).requires_grad_()
    for x, y in ((randn(6, 8), randn(6, 5)), (randn(2, 3, 8), randn(2, 3, 5))):
        A, B, weight, bias = randn(4, 8), randn(5, 4), randn(5, 8), randn(5)
        if kind == "lora":
            from grpo_nb.ops.layer.lora import lora_add, lora_group, lora_linear
            frozen = weight.detach()
            yield from (lora_linear(x, weight, bias, A, B, 2.0), lora_add(y, x, A, B, 2.0))
            yield from lora_group(x, [frozen] * 2, [None] * 2, [A, A], [B, B], [1.0, 2.0])
        else:
            from grpo_nb.ops.layer.gated_mlp import gated
            from grpo_nb.ops.layer.rms_norm import rms_norm
            from grpo_nb.ops.layer.rotary import rotary
            angles = torch.rand(1, 3, 4, generator=g)
            yield from (rms_norm(x, randn(8), 1e-6), gated(x, randn(*x.shape)))
            yield from rotary(randn(2, 4, 3, 4), randn(2, 2, 3, 4), angles, angles)
    from grpo_nb.ops.head.linear_logprob import linear_logprob
    for keep in (torch.ones(6, dtype=torch.bool), torch.arange(6) % 2 == 0):
        yield from linear_logprob(randn(6, 8), randn(9, 8), torch.arange(6), mask=keep, entropy=True, backend="chunked")


@pytest.mark.parametrize("kind", ["lora", pytest.param("kernels", marks=interpreted)])
def test_what_a_function_gives_back_can_be_changed_in_place(kind):
    "As Gemma 3n does with what its projections give; a view made inside a custom function forbids it."
    for out in outputs_of(kind):
        assert not out._is_view()
        out.mul_(2).sum().backward(retain_graph=True) # several come of one call


@interpreted
@pytest.mark.parametrize("rows,sizes,dtype", thinned(list(product(
    ["each", "one"], [(1, 1, 1, 1, 2), (2, 3, 1, 5, 6), (2, 12, 2, 9, 128)], [torch.float32, torch.bfloat16],
)), quick=(3, 8)), ids=str)
def test_rotary(rows, sizes, dtype):
    from grpo_nb.ops.layer.rotary import fits, rotary, rotary_naive
    (b, h, k, n, d), g = sizes, torch.Generator().manual_seed(0)
    q, key = (torch.randn(b, n, x, d, generator=g).to(dtype).transpose(1, 2) for x in (h, k))
    cos, sin = (torch.randn(b if rows == "each" else 1, n, d, generator=g).to(dtype) for _ in range(2))
    assert fits(q, key, cos, sin)
    def joined(f, q, k, c, s): return torch.cat([x.flatten() for x in f(q, k, c, s)])
    close(
        lambda f, q, k: joined(f, q, k, cos.to(q.dtype), sin.to(q.dtype)), rotary_naive,
        rotary, (q, key), torch.randn(b * n * (h + k) * d, generator=g),
    )


def close(call, naive, kernel, inputs, grad):
    "A kernel is no further from float64 than the same operations one by one in the same type."
    def found(f, dtype=None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = call(f, *leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
    # the interpreter cuts to bfloat16 where a GPU rounds
    slack = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[inputs[0].dtype]
    for t, a, b in zip(found(naive, torch.float64), found(naive), found(kernel), strict=True):
        theirs, ours = (float((x.double() - t).norm() / t.norm().clamp(min=1e-30)) for x in (a, b))
        assert a.dtype == b.dtype and a.shape == b.shape and ours <= 1.5 * theirs + slack


@pytest.mark.skipif(INTERPRETED, reason="is inside it")
@WHICH
def test_triton_under_the_interpreter(which):
    pytest.importorskip("triton")
    kernels = "rms_norm or gated or rotary or under_autocast or given_back or changed_in_place or (pefts_to_rounding and qwen2)"
    if which == "slow": under_the_interpreter(__file__, "slow or not slow")
    else: under_the_interpreter(__file__, which, kernels)


def test_a_copy_of_an_installed_model_runs_its_own_weights():
    from grpo_nb.step.forward import install, uninstall
    model = tiny("llama")
    install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
        assert twin(input_ids=torch.tensor([[1, 2, 3]])).logits.abs().max() == 0
    uninstall(model)
