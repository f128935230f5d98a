"""The draw of a token: the plain form against the engine's, the kernels under Triton's interpreter, what is compiled."""
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from compiling import WHICH, thinned, under_the_interpreter
from test_decode_attention import build, compiled, interpreted, resources

from grpo_nb.engines.base import Sampling, sampling_logits
from grpo_nb.engines.inplace.draw import draw, likeliest
from grpo_nb.ops.decode import sample as M
from grpo_nb.ops.decode.sample import argmax, argmax_naive, sample, sample_naive
from grpo_nb.ops.layer.rms_norm import runs_on

LARGEST = 1 - 2**-53 # u below 1
FORMS = [pytest.param((sample_naive, argmax_naive), id="plain"), pytest.param((sample, argmax), id="kernels", marks=interpreted)]
each_form = pytest.mark.parametrize("forms", FORMS)


def made(rows, vocabulary, seed=0, spread=3.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=g) * spread).to(dtype), torch.rand(rows, generator=g, dtype=torch.float64)


def scores(logits, temperature=1.0, softcap=None):
    z = logits.float()
    if softcap is not None: z = torch.tanh(z / softcap) * softcap
    return sampling_logits(z, Sampling(temperature=temperature))


def agree(logits, u, found, temperature=1.0, softcap=None, logp_error=3e-6):
    "The token of `draw`, or one whose edge is within 1e-6 of u; how many of the second there were."
    token, logp = found
    z = scores(logits, temperature, softcap)
    theirs, _ = draw(z, u)
    exact = z.double().softmax(-1).cumsum(-1)
    for row in (token != theirs).nonzero()[:, 0].tolist():
        low, high = sorted((int(token[row]), int(theirs[row])))
        assert float((exact[row, low:high] - u[row]).abs().max()) < 1e-6, f"row {row}: {low} and {high}"
    assert token.dtype == torch.int64 and logp.dtype == torch.float32
    assert (logp.double() - z.double().log_softmax(-1).gather(1, token[:, None])[:, 0]).abs().max() < logp_error
    return int((token != theirs).sum())


RULES = [{}, dict(temperature=0.7), dict(softcap=4.0), dict(temperature=1.3, softcap=30.0)]
SIZES = [(1, torch.float16), (17, torch.float32), (4_096, torch.float16), (4_097, torch.float32), (9_001, torch.bfloat16)]


@each_form
@pytest.mark.parametrize("vocabulary,dtype,rules", thinned([(*s, r) for s in SIZES for r in RULES], quick=range(0, 20, 5)), ids=str)
def test_the_token_of_draw(forms, vocabulary, rules, dtype):
    logits, u = made(6, vocabulary, dtype=dtype)
    assert agree(logits, u, forms[0](logits, u, **rules), **rules) <= 1
    token, logp = forms[1](logits, **rules)
    theirs, their_logp = likeliest(scores(logits, **rules))
    assert torch.equal(scores(logits, **rules).gather(1, token[:, None]), scores(logits, **rules).gather(1, theirs[:, None]))
    assert torch.allclose(logp, their_logp, atol=3e-6)


@each_form
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_real_vocabulary(forms, dtype):
    logits, u = made(6, 151_936, dtype=dtype)
    assert agree(logits, u, forms[0](logits, u), logp_error=5e-6) <= 1
    assert torch.equal(forms[1](logits)[0], logits.float().max(-1).indices)


@each_form
def test_every_token_and_both_sides_of_its_edges(forms):
    logits, _ = made(1, 37, spread=1.0)
    edges = logits.double().softmax(-1).cumsum(-1)[0]
    u = torch.cat([edges[:-1] + 1e-6, edges - 1e-6, torch.tensor([0.0, LARGEST], dtype=torch.float64)])
    token, _ = forms[0](logits.expand(len(u), -1), u)
    assert token.tolist() == [*range(1, 37), *range(37), 0, 36]


@each_form
def test_no_token_without_probability(forms):
    n = -torch.inf
    rows = [[n, n, 0.0, n, 1.0, n, n], [0.0, n, n, n, n, n, n], [n, n, n, n, n, n, 5.0], [-200.0, 0.0, -150.0, n, 0.5, n, -300.0]]
    logits = torch.tensor(rows).repeat_interleave(3, 0)
    u = torch.tensor([0, 0.5, LARGEST], dtype=torch.float64).repeat(4)
    token, logp = forms[0](logits, u)
    assert token.tolist() == [2, 4, 4, 0, 0, 0, 6, 6, 6, 1, 4, 4] and logp.isfinite().all()
    assert torch.equal(token, draw(logits, u)[0])


@each_form
def test_whole_chunks_without_probability(forms):
    logits = torch.full((5, 3 * M.CHUNK + 5), -torch.inf)
    alone = M.CHUNK + 77
    logits[:, alone], logits[2:, 3 * M.CHUNK + 4], logits[3, 5] = 1.0, 1.0, -150.0
    # beside the second the first has some probability, beside the row's largest it has none in float32
    logits[4, 3], logits[4, 9] = -120.0, -80.0
    u = torch.tensor([0, LARGEST, 0.75, 0, 0], dtype=torch.float64)
    assert forms[0](logits, u)[0].tolist() == [alone, alone, 3 * M.CHUNK + 4, alone, 9]
    assert forms[1](logits)[0].tolist() == [alone] * 5


@triton.jit
def _search(mass, t, out, N: tl.constexpr):
    place, left = M._find(tl.load(mass + tl.arange(0, N)), tl.load(t), N)
    tl.store(out, place)


@interpreted
@pytest.mark.parametrize("t,place", [(-1e-17, 2), (0.0, 2), (0.99, 2), (1.0, 4), (2.9, 4), (3.0, 4), (3.1, 4)])
def test_rounding_leads_to_no_empty_place_by_kernels(t, place):
    mass, out = torch.tensor([0, 0, 1, 0, 2, 0, 0, 0], dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    _search[(1,)](mass, torch.tensor([t], dtype=torch.float64), out, N=8)
    assert out.item() == place


@each_form
def test_equal_scores_and_the_lowest_of_them(forms):
    logits = torch.zeros(2, 2 * M.CHUNK)
    logits[1, [100, 99, M.CHUNK + 1]] = 2.0
    token, logp = forms[1](logits)
    assert token.tolist() == [0, 99] and torch.allclose(logp, logits.log_softmax(-1).amax(-1))
    u = (torch.arange(2, dtype=torch.float64) + 0.5) / (2 * M.CHUNK)
    assert forms[0](logits[:1].expand(2, -1), u)[0].tolist() == [0, 1]


@each_form
def test_a_peak_and_a_long_tail(forms):
    logits = torch.full((3, 20_000), -12.0)
    logits[:, 7_000] = 12.0
    u = torch.tensor([0, 0.5, LARGEST], dtype=torch.float64)
    token, logp = forms[0](logits, u)
    assert token.tolist() == [0, 7_000, 19_999]
    assert (logp - logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]).abs().max() < 3e-6


@each_form
def test_the_distribution(forms):
    "Chi-square of draws over 12 tokens: 11 degrees of freedom, 36.1 is passed once in 6,000."
    logits, _ = made(1, 12, spread=0.7)
    draws = 5_000 if forms[0] is sample_naive else 200 # a row takes long under the interpreter
    u = torch.rand(draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    token, logp = forms[0](logits.expand(draws, -1), u)
    expected = logits.double().softmax(-1)[0] * draws
    seen = torch.bincount(token, minlength=12)
    assert float(((seen - expected).square() / expected).sum()) < 36.1
    assert torch.allclose(logp, logits.log_softmax(-1)[0][token], atol=1e-6)


@each_form
def test_a_token_depends_on_its_row_alone(forms):
    logits, u = made(5, 5_000)
    wide = torch.full((7, 6_000), torch.nan)
    wide[1:6, :5_000] = logits
    view = wide[1:6, :5_000] # rows that do not lie one after the other
    token, logp = forms[0](view, u)
    for row in range(5):
        one, its = forms[0](logits[row:row + 1], u[row:row + 1])
        assert one == token[row] and its == logp[row]


def test_the_plain_form_reads_nothing_back():
    from torch._subclasses.fake_tensor import FakeTensorMode # raises where a value decides a shape or is read
    mode = FakeTensorMode()
    logits, u = (mode.from_tensor(x) for x in made(3, 100))
    with mode: assert sample_naive(logits, u, 0.5, 3.0)[0].shape == argmax_naive(logits)[0].shape == (3,)


@interpreted
def test_bad_input_is_named():
    logits, u = made(2, 8)
    for call, message in [
        (lambda: sample(logits.double(), u), "logits="),
        (lambda: sample(logits.t(), u), "logits="),
        (lambda: sample(logits, u.float()), "u="),
        (lambda: sample(logits, u[:1]), "u="),
        (lambda: sample(logits, u, 0), "temperature="),
        (lambda: argmax(logits, softcap=-1.0), "softcap="),
    ]:
        with pytest.raises(ValueError, match=message): call()
    assert sample(logits[:0], u[:0])[0].shape == (0,)


@compiled
@WHICH
def test_kernels_under_the_interpreter(which):
    assert not runs_on(torch.device("cpu"))
    under_the_interpreter(__file__, which, "kernels or bad_input")


@compiled
@pytest.mark.parametrize("kind,capability", [("bf16", 90), ("fp16", 75)])
def test_it_compiles(kind, capability, tmp_path):
    types = dict(
        logits="*" + kind, row_stride="i32+", tops="*fp32", sums="*fp64", places="*i32", u="*fp64",
        tokens="*i64", logps="*fp32", vocabulary="i32+", chunks="i32", inverse="fp32", cap="fp32",
    )
    for kernel, constants in [
        (M._fold, dict(HAS_CAP=True, GREEDY=True)),
        (M._pick, dict(HAS_CAP=True, CHUNKS=64)),
        (M._largest, dict(CHUNKS=64)),
    ]:
        built = build(kernel, {n: types[n] for n in kernel.arg_names if n in types}, constants, capability, 4, 3)
        assert resources(built, tmp_path)[1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", [{}, dict(temperature=0.7), dict(temperature=1.3, softcap=30.0)], ids=str)
def test_on_a_gpu(dtype, rules):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    logits, u = made(256, 151_936, dtype=dtype)
    found = [x.cpu() for x in sample(logits.cuda(), u.cuda(), **rules)]
    assert agree(logits, u, found, logp_error=1e-5, **rules) <= 2
    assert torch.equal(argmax(logits.cuda())[0].cpu(), logits.float().max(-1).indices)
