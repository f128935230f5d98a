"""linear_logprob: tiles against the full logits, TRL's own, finite differences and float64; Triton under its interpreter."""
import os

import pytest
import torch
from compiling import WHICH, under_the_interpreter
from hypothesis import given, settings, strategies as st

from grpo_nb.ops.head.linear_logprob import has_triton, linear_logprob, linear_logprob_naive

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and has_triton(torch.device("cpu"))
TILED = [
    "chunked",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_under_the_interpreter")),
]
OPTIONS = {
    "plain": {}, "temperature": dict(temperature=0.7), "scale": dict(logit_scale=0.25), "softcap": dict(softcap=5.0),
    "everything": dict(temperature=1.3, logit_scale=0.5, softcap=4.0), "fp32_head": dict(fp32_head=True),
}


def make(n=17, h=24, v=301, dtype=torch.float32, scale=1.0, seed=0, bias=False):
    g = torch.Generator().manual_seed(seed)
    def draw(*shape): return torch.randn(*shape, generator=g)
    hidden, weight = draw(n, h).to(dtype).requires_grad_(), (draw(v, h) * scale).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    target[::5] = -100
    return hidden, weight, target, (draw(v).to(dtype) if bias else None), (draw(n), draw(n))


def evaluate(backend, hidden, weight, target, bias=None, grads=None, chunk=(16, 64), use=(True, True), **options):
    """Outputs and the gradients of everything that wants one, by `backend`."""
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    logprob, entropy = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend=backend, chunk_size=chunk, **options)
    loss = sum((x * g.to(x.dtype)).sum() for x, g, on in zip((logprob, entropy), grads, use) if on)
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


def distance(x, truth): return float((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def doubled(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("use", [(True, False), (True, True), (False, True)], ids=["logprob", "both", "entropy"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_the_truth_than_the_reference_of_the_same_type(dtype, options, bias, trained, use, backend):
    hidden, weight, target, bias, grads = make(dtype=dtype, bias=bias)
    for x in (weight, bias):
        if x is not None: x.requires_grad_(trained)
    wide = doubled(hidden, weight, bias)
    truth = evaluate("naive", wide[0], wide[1], target, wide[2], grads, use=use, **OPTIONS[options])
    naive = evaluate("naive", hidden, weight, target, bias, grads, use=use, **OPTIONS[options])
    ours = evaluate(backend, hidden, weight, target, bias, grads, use=use, **OPTIONS[options])
    slack = 1e-6 if dtype is torch.float32 else 1e-3
    # Triton's interpreter cuts float32 to bfloat16 off instead of rounding it
    if INTERPRETED and dtype is torch.bfloat16: slack = 6e-3
    for ours_, naive_, truth_ in zip(ours, naive, truth, strict=True):
        assert ours_.dtype == naive_.dtype and ours_.shape == truth_.shape
        assert distance(ours_, truth_) <= 1.5 * distance(naive_, truth_) + slack


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_entropy_grad_is_a_hint_that_never_changes_a_result(backend, entropy_grad):
    hidden, weight, target, _, grads = make()
    ours = evaluate(backend, hidden, weight, target, grads=grads, entropy_grad=entropy_grad)
    for a, b in zip(ours, evaluate("naive", hidden, weight, target, grads=grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options, trained):
    hidden, weight, target, bias, _ = make(n=5, h=4, v=11, bias=True)
    hidden, weight, bias = doubled(hidden, weight.requires_grad_(trained), bias.requires_grad_(trained))
    leaves = (hidden, weight, bias)
    def f(h, w, b):
        return linear_logprob(h, w, target, bias=b, entropy=True, backend="chunked", chunk_size=(2, 4), **OPTIONS[options])
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [k for k in OPTIONS if k != "fp32_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_trl(dtype, options, trained):
    trl = pytest.importorskip("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    hidden, weight, target, bias, grads = make(dtype=dtype, bias=True)
    target = target.clamp(min=0)
    for x in (weight, bias): x.requires_grad_(trained)
    o = OPTIONS[options]
    logprob, entropy, *_ = trl.apply(
        hidden, weight, bias, target, o.get("temperature", 1.0), 64, o.get("softcap"), o.get("logit_scale", 1.0), ("entropy",)
    )
    leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
    theirs = [logprob, entropy, *torch.autograd.grad((logprob * grads[0] + entropy * grads[1]).sum(), leaves)]
    ours = evaluate("chunked", hidden, weight, target, bias, grads, **o)
    wide = doubled(hidden, weight, bias)
    truth = evaluate("naive", wide[0], wide[1], target, wide[2], grads, **o)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        if dtype is torch.float32: assert distance(a, b.detach()) < 5e-6
        assert distance(a, c) <= 1.2 * distance(b.detach(), c) + 1e-6


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_autocast_multiplies_in_its_type_and_fp32_head_does_not(kind, trained):
    hidden, weight, target, _, grads = make()
    weight.requires_grad_(trained)
    with torch.autocast("cpu", kind):
        ours, naive = (evaluate(b, hidden, weight, target, grads=grads) for b in ("chunked", "naive"))
        wide = evaluate("chunked", hidden, weight, target, grads=grads, fp32_head=True)
    truth = evaluate("naive", *doubled(hidden, weight), target, grads=grads)
    for a, b, c, d in zip(ours, naive, truth, wide, strict=True):
        assert a.dtype is torch.float32 and distance(a, c) <= 1.5 * distance(b, c) + 1e-3 and distance(d, c) < 2e-6
    assert distance(ours[0], truth[0]) > 1e-5


@pytest.mark.parametrize("backend", ["naive", *TILED])
def test_shapes_at_the_edge(backend):
    for n, v in ((0, 7), (1, 1), (1, 7), (3, 64), (17, 65)):
        hidden, weight, target, _, grads = make(n=n, v=v)
        weight.requires_grad_()
        logprob, entropy, d_hidden, d_weight = evaluate(backend, hidden, weight, target, grads=grads)
        assert logprob.shape == entropy.shape == (n,) and d_hidden.shape == hidden.shape and d_weight.shape == weight.shape
        assert all(x.isfinite().all() for x in (logprob, entropy, d_hidden, d_weight))


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_masked_positions_are_never_read(backend, trained):
    hidden, weight, target, _, grads = make()
    weight.requires_grad_(trained)
    clean = evaluate(backend, hidden, weight, target, grads=grads)
    dirty = hidden.detach().clone()
    dirty[target < 0] = torch.tensor([torch.nan, torch.inf] * (hidden.shape[1] // 2))
    got = evaluate(backend, dirty.requires_grad_(), weight, target, grads=grads)
    by_mask = evaluate(backend, dirty, weight, target.clamp(min=0), grads=grads, mask=target >= 0)
    for a, b, c in zip(clean, got, by_mask, strict=True): assert torch.equal(a, b) and torch.equal(a, c)
    assert (got[0][target < 0] == 0).all() and (got[1][target < 0] == 0).all() and (got[2][target < 0] == 0).all()


@pytest.mark.parametrize("backend", ["naive", *TILED])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_fully_masked_batch_is_a_finite_zero(backend, trained):
    hidden, weight, target, _, grads = make()
    weight.requires_grad_(trained)
    for x in evaluate(backend, hidden, weight, torch.full_like(target, -100), grads=grads): assert (x == 0).all()


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("scale", [100.0, 1e4, 1e-4])
def test_huge_and_tiny_logits(backend, scale):
    hidden, weight, target, _, grads = make(scale=scale)
    wide = doubled(hidden, weight)
    ours = evaluate(backend, hidden, weight, target, grads=grads, use=(True, False))
    truth = evaluate("naive", *wide, target, grads=grads, use=(True, False))
    assert all(x.isfinite().all() for x in ours)
    assert distance(ours[0], truth[0]) < 1e-5 and distance(ours[2], truth[2]) < 1e-4


@pytest.mark.parametrize("backend", TILED)
def test_an_almost_certain_target_keeps_its_digits(backend):
    hidden, weight, target, _, grads = make()
    target = (hidden @ weight.T).argmax(-1)
    ours = evaluate(backend, hidden, weight, target, grads=grads, use=(True, False), temperature=0.2)
    truth = evaluate("naive", *doubled(hidden, weight), target, grads=grads, use=(True, False), temperature=0.2)
    for i in (0, 2): assert ((ours[i] - truth[i]).norm() / truth[i].norm()) < 1e-5
    sure = truth[0] > -1e-4
    assert sure.any()
    torch.testing.assert_close(ours[0][sure].double(), truth[0][sure], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("backend", TILED)
def test_a_bias_may_forbid_entries(backend):
    hidden, weight, target, bias, grads = make(bias=True)
    bias[:150] = -torch.inf
    target[target >= 0] = target[target >= 0].clamp(min=150)
    ours = evaluate(backend, hidden, weight, target, bias, grads)
    allowed = evaluate("naive", hidden, weight[150:], torch.where(target < 0, target, target - 150), bias[150:], grads)
    for a, b in zip(ours, allowed, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_inputs_need_not_be_contiguous(backend, trained):
    hidden, weight, target, _, grads = make()
    h, w = hidden.detach().t().contiguous().t().requires_grad_(), weight.t().contiguous().t().requires_grad_(trained)
    t = torch.stack([target, target], 1)[:, 0]
    assert not h.is_contiguous() and not t.is_contiguous()
    for a, b in zip(
        evaluate(backend, h, w, t, grads=grads),
        evaluate(backend, hidden, weight.requires_grad_(trained), target, grads=grads),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_tied_weights_add_up():
    _, weight, target, _, grads = make(v=301)
    weight.requires_grad_()
    ids = target.clamp(min=0)
    results = []
    for backend in ("naive", "chunked"):
        logprob, entropy = linear_logprob(weight[ids] * 2, weight, target, entropy=True, backend=backend, chunk_size=(8, 50))
        results.append(torch.autograd.grad((logprob * grads[0]).sum() + entropy.sum(), weight)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_twice_backward_and_double_use(trained):
    hidden, weight, target, _, grads = make()
    weight.requires_grad_(trained)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    logprob, entropy = linear_logprob(hidden, weight, target, entropy=True, chunk_size=(8, 50))
    first = torch.autograd.grad(logprob.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(3 * logprob.sum() + (logprob * entropy).sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(logprob.sum(), leaves)))
    l, e = linear_logprob_naive(hidden, weight, target, entropy=True)
    for a, b in zip(again, torch.autograd.grad(3 * l.sum() + (l * e).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_no_grad_keeps_nothing():
    hidden, weight, target, _, _ = make()
    linear_logprob(hidden, weight, target)[0].sum().backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad(): logprob, entropy = linear_logprob(hidden, weight, target)
    assert entropy is None and not logprob.requires_grad
    head_only = weight.clone().requires_grad_()
    linear_logprob(hidden.detach(), head_only, target)[0].sum().backward()
    assert head_only.grad.abs().sum() > 0


def test_bias_alone_may_be_trained():
    hidden, weight, target, bias, grads = make(bias=True)
    bias.requires_grad_()
    for a, b in zip(
        evaluate("chunked", hidden, weight, target, bias, grads),
        evaluate("naive", hidden, weight, target, bias, grads),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_value_does_not_depend_on_the_gradient_mode():
    hidden, weight, target, _, _ = make()
    with_grad = linear_logprob(hidden, weight, target, entropy=True)
    recomputed = linear_logprob(hidden, weight.clone().requires_grad_(), target, entropy=True)
    with torch.no_grad(): without = linear_logprob(hidden, weight, target, entropy=True)
    for a, b, c in zip(with_grad, recomputed, without): assert torch.equal(a, b) and torch.equal(a, c)


def test_all_kept_is_the_same():
    hidden, weight, target, _, _ = make()
    target = target.clamp(min=0)
    assert torch.equal(linear_logprob(hidden, weight, target, all_kept=True)[0], linear_logprob(hidden, weight, target)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 25), st.integers(1, 80), st.floats(0.2, 5.0), st.integers(0, 10**6))
def test_invariant_to_the_tiles_and_to_the_order_of_rows(n, v, tokens, entries, temperature, seed):
    hidden, weight, target, _, grads = make(n=n, v=v, seed=seed)
    options = dict(temperature=temperature, grads=grads)
    whole = evaluate("naive", hidden, weight, target, **options)
    tiled = evaluate("chunked", hidden, weight, target, chunk=(tokens, entries), **options)
    for a, b in zip(whole, tiled, strict=True): torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4)
    assert (tiled[0] <= 0).all() and (tiled[1] >= 0).all() and (tiled[1] <= torch.tensor(float(v)).log() + 1e-6).all()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = linear_logprob(hidden[order], weight, target[order], temperature=temperature, chunk_size=(tokens, entries))[0]
    torch.testing.assert_close(shuffled, tiled[0][order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad, word", [
    (dict(backend="tritn"), "triton"),
    (dict(temperature=0), "temperature"),
    (dict(softcap=-1.0), "softcap"),
    (dict(bias=torch.zeros(3)), "bias"),
    (dict(chunk_size=0), "chunk_size"),
    (dict(chunk_size=(1, 2, 3)), "chunk_size"),
    (dict(target=torch.zeros(4)), "target"),
    (dict(target=torch.full((17,), 301)), "301"),
    (dict(weight=torch.zeros(301, 23)), "weight"),
])
def test_bad_input_is_named(bad, word):
    hidden, weight, target, _, _ = make()
    given_ = dict(hidden=hidden, weight=weight, target=target) | bad
    with pytest.raises(ValueError, match=word): linear_logprob(**given_)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
def test_triton_is_refused_without_a_gpu():
    hidden, weight, target, _, _ = make()
    with pytest.raises(ValueError, match="needs Triton and a GPU"): linear_logprob(hidden, weight, target, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own run")
@WHICH
def test_triton_under_the_interpreter(which):
    pytest.importorskip("triton")
    some = "(both and ((everything and bfloat16) or (plain and float32)))"
    quick = " and not huge_and and not contiguous and not is_a_hint and not frozen" if which == "not slow" else ""
    under_the_interpreter(__file__, "not slow", f"triton and not test_triton and (not no_further or {some}){quick}")


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, options, trained):
    hidden, weight, target, bias, grads = make(n=700, h=96, v=40007, dtype=dtype, bias=True, scale=0.5)
    hidden, weight, bias = (x.detach().cuda() for x in (hidden, weight, bias))
    hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)
    target, grads = target.cuda(), [g.cuda() for g in grads]
    truth = evaluate("naive", *doubled(hidden, weight), target, doubled(bias)[0], grads, **OPTIONS[options])
    naive = evaluate("naive", hidden, weight, target, bias, grads, **OPTIONS[options])
    for backend in ("chunked", "triton"):
        ours = evaluate(backend, hidden, weight, target, bias, grads, chunk=(256, 8192), **OPTIONS[options])
        for a, b, c in zip(ours, naive, truth, strict=True):
            assert distance(a, c) <= 1.5 * distance(b, c) + (2e-6 if dtype is torch.float32 else 1e-3)
