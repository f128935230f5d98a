"""The in-place engine on a CUDA device: recorded steps, kernels at real sizes, weights changed under them, memory given back."""
import gc
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engines import ENDS, FAMILIES, adapted, fresh, greedy, prompts_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_nb.engines.inplace import static
from grpo_nb.engines.base import Sampling
from grpo_nb.engines.hf import HuggingFace
from grpo_nb.engines.inplace.engine import InPlace
from grpo_nb.ops.decode import attention
from grpo_nb.ops.decode import epilogues
from grpo_nb.ops.decode import sample
from grpo_nb.ops.decode import skinny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HALVES = (
    [torch.bfloat16, torch.float16]
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else [torch.float16]
)


@pytest.fixture(autouse=True, scope="module")
def exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(model, dtype=torch.float32): return model.to("cuda", dtype)


def near(ours, reference, truth, slack=1.5): # each a tensor; as near to the truth as the reference of the same type, plus a little
    ours, reference, truth = (t.double() for t in (ours, reference, truth))
    assert ours.isfinite().all()
    scale = truth.abs().max()
    assert (ours - truth).abs().max() <= slack * (reference - truth).abs().max() + 1e-6 * scale


# The same tokens

@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_hugging_face(family):
    model, prompts = on_gpu(fresh(family)), prompts_of(5, 9, 3, 9)
    expected = HuggingFace(model).generate(prompts, 1, greedy(40)).completions
    for room in ({}, dict(slots=3), dict(cache_tokens=300)):
        engine = InPlace(model, **room)
        for _ in range(2):
            found = engine.generate(prompts, 3, greedy(40))
            same = sum(a == expected[i] for a, i in zip(found.completions, found.owner))
            # padding moves Hugging Face's own last bits
            assert same == 12 or family.startswith("gemma") and same >= 9, (family, room)
        if not room: assert engine.kept[2].records, "nothing was recorded"


def test_recorded_steps_are_the_plain_ones(monkeypatch):
    "The same seeds, step by step and from records, on few slots, with every kind of sampling."
    model, prompts = on_gpu(fresh("qwen3")), prompts_of(5, 9, 3)
    for settings in (
        dict(), dict(temperature=0.7), dict(top_k=5, top_p=0.9, min_p=0.02), dict(repetition_penalty=1.2), dict(greedy=True),
    ):
        how = Sampling(max_tokens=30, stop_token_ids=ENDS, seeds=range(12), **settings)
        found = []
        for eager in True, False:
            with monkeypatch.context() as patch:
                if eager: patch.setattr(static.Recorder, "step", static.Recorder.run)
                found.append(InPlace(model, slots=7).generate(prompts, 4, how))
        assert found[0].completions == found[1].completions and found[0].finished == found[1].finished


def test_a_weight_that_changes_is_in_the_next_token_of_a_record():
    model, prompts = on_gpu(adapted("qwen2")), prompts_of(5, 9)
    engine = InPlace(model)
    engine.generate(prompts, 2, greedy(20))
    recorder = engine.kept[2]
    for name, p in [*model.named_parameters()][::3]:
        with torch.no_grad(): p.add_(torch.randn_like(p) * 0.3 * p.std() if p.numel() > 1 else 0.1)
        found = engine.generate(prompts, 2, greedy(20))
        assert found.completions == InPlace(model).generate(prompts, 2, greedy(20)).completions, name
    assert engine.kept[2] is recorder
    assert engine.generate(prompts, 1, greedy(20)).completions == HuggingFace(model).generate(prompts, 1, greedy(20)).completions
    with model.disable_adapter():
        theirs = HuggingFace(model).generate(prompts, 1, greedy(20))
        assert engine.generate(prompts, 1, greedy(20)).completions == theirs.completions


@pytest.mark.parametrize("four_bit", [False, True])
def test_training_between_two_samplings(four_bit, tmp_path):
    "Optimiser steps change the weights in place; the engine's greedy tokens follow those of `generate`."
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    fresh("qwen3").save_pretrained(tmp_path)
    quantised = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4") if four_bit else None
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32, device_map={"": 0})
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    engine, prompts = InPlace(model), prompts_of(5, 9)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(4):
        ids = torch.tensor(prompts_of(12, 12), device="cuda")
        model.train()(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found = engine.generate(prompts, 2, greedy(15))
        assert found.completions == HuggingFace(model.eval()).generate(prompts, 2, greedy(15)).completions


# The kernels at the sizes of a 1.5B model

@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("slots,columns,inner", [
    (64, (1536, 256, 256, 192), 1536),
    (64, (8960, 8960, 128), 1536),
    (64, (1536, 64), 8960),
    (5, (1000, 24), 520),
    (130, (1536, 64), 1536),
    (64, (151936,), 1536),
])
def test_products(dtype, slots, columns, inner):
    torch.manual_seed(0)
    x = torch.randn(slots, inner, device="cuda", dtype=dtype)
    weights = [torch.randn(n, inner, device="cuda", dtype=dtype) * inner**-0.5 for n in columns]
    ours = skinny.skinny(x, weights).sum(0)
    truth = x.double() @ torch.cat(weights).double().T
    near(ours, skinny.skinny_naive(x, weights)[0], truth, 4) # both sum in float32, in another order


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("width", [896, 1536, 4096])
def test_epilogues(dtype, width):
    torch.manual_seed(0)
    def make(*shape, scale=1.0): return torch.randn(*shape, device="cuda") * scale
    def half(*shape, scale=1.0): return make(*shape, scale=scale).to(dtype)
    slots, rank = 37, 16
    parts, bias, adapter = make(3, slots, width + rank), half(width), epilogues.Adapter((half(rank, width, scale=0.1),), width)
    residual, weight, after = half(slots, width), half(width), half(width)
    def wide(t): return None if t is None else t.double()
    for more in dict(), dict(offset=True), dict(offset=True, after=after):
        reference = epilogues.add_norm_naive(parts, residual, weight, 1e-6, bias=bias, adapter=adapter, **more)
        truth = epilogues.add_norm_naive(
            wide(parts), wide(residual), wide(weight), 1e-6, bias=wide(bias),
            adapter=epilogues.Adapter((wide(adapter.b[0]),), width),
            **{k: wide(v) if isinstance(v, torch.Tensor) else v for k, v in more.items()},
        )
        for ours, theirs, right in zip(
            epilogues.add_norm(parts, residual, weight, 1e-6, bias=bias, adapter=adapter, **more), reference, truth
        ):
            near(ours, theirs, right, 2)
    both = epilogues.Adapter((half(rank, width, scale=0.1), None), 2 * width)
    parts = make(2, slots, 2 * width + rank)
    for activation in "silu", "gelu_tanh":
        given = dict(dtype=dtype, adapter=both)
        near(
            epilogues.gate(parts, width, activation, **given),
            epilogues.gate_naive(parts, width, activation, **given),
            epilogues.gate_naive(
                wide(parts), width, activation, dtype=torch.float64, adapter=epilogues.Adapter((wide(both.b[0]), None), 2 * width)
            ),
            2,
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("heads,kv,d,turned", [(12, 2, 128, 128), (14, 2, 64, 64), (32, 8, 96, 48), (8, 4, 256, 256)])
def test_heads_and_attention(dtype, heads, kv, d, turned):
    torch.manual_seed(0)
    slots, lanes, p, c, columns = 29, 5, 200, 96, (heads + 2 * kv) * d
    def half(*shape): return torch.randn(*shape, device="cuda").to(dtype)
    parts, at = torch.randn(2, slots, columns, device="cuda"), torch.randint(0, 290, (slots,), device="cuda")
    cos, sin = (f(torch.randn(300, turned, device="cuda")).to(dtype) for f in (torch.cos, torch.sin))
    count = torch.randint(0, c + 1, (slots,), device="cuda")
    caches = half(2, 2, slots, kv, c, d)
    for norm in None, (half(d), half(d)):
        mine, theirs = (epi(parts, heads, kv, d, cos, sin, at, *cache, count - 1, norm=norm)
                        for epi, cache in ((epilogues.heads_store, caches[0]), (epilogues.heads_store_naive, caches[1])))
        torch.testing.assert_close(
            mine, theirs, rtol=2e-2 if dtype is not torch.float32 else 1e-4, atol=2e-2 if dtype is not torch.float32 else 1e-4
        )
    prompts, lengths = half(2, lanes, kv, p, d), torch.tensor([200, 1, 77, 128, 199], device="cuda")
    lane, own = torch.arange(slots, device="cuda") % lanes, half(2, slots, kv, c, d)
    per_tile = attention.slots_per_tile(heads // kv)
    rows = attention.decode_tiles(
        [int(x) if n else -1 for x, n in zip(lane, count)], per_tile, attention.tile_count(slots, lanes, per_tile)
    )
    tiles, q = torch.tensor(rows, dtype=torch.int32, device="cuda"), half(slots, heads, d)
    for window, cap in (None, None), (50, None), (None, 5.0):
        given = lane, lengths, count
        ours = attention.decode_attention(q, *prompts, *own, *given, tiles, d**-0.5, window, cap)
        naive = attention.decode_attention_naive(q, *prompts, *own, *given, d**-0.5, window, cap)
        near(
            ours, naive,
            attention.decode_attention_naive(q.double(), *prompts.double(), *own.double(), *given, d**-0.5, window, cap),
            2,
        )


def test_draws():
    torch.manual_seed(0)
    logits, u = torch.randn(256, 151_936, device="cuda") * 4, torch.rand(256, device="cuda", dtype=torch.float64)
    for temperature in 1.0, 0.7:
        (token, logp), (theirs, expected) = (
            sample.sample(logits, u, temperature),
            sample.sample_naive(logits.double(), u, temperature),
        )
        assert (token == theirs).float().mean() > 0.98 # the rest: u on an edge
        same = token == theirs
        torch.testing.assert_close(logp[same], expected[same].float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(sample.argmax(logits)[0], logits.argmax(-1))


# Memory, time and interrupts

def middling():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).to("cuda", HALVES[0]).eval()


def test_memory_is_given_back_and_the_engine_works_on():
    model = middling()
    prompts = [torch.randint(3, 31_000, (100,)).tolist() for _ in range(8)]
    engine = InPlace(model, keep_bytes=0)
    engine.generate(prompts, 8, Sampling(max_tokens=64))
    gc.collect()
    torch.cuda.synchronize()
    held = []
    for _ in range(4):
        engine.generate(prompts, 8, Sampling(max_tokens=64))
        engine.sleep()
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert engine.kept is None and max(held) - min(held) < 1 << 20, held
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held[-1] < weights * 1.1 + (64 << 20)


def test_log_probs_are_the_models_own():
    model = middling()
    prompts = [torch.randint(3, 31_000, (n,)).tolist() for n in (100, 37)]
    found = InPlace(model).generate(prompts, 4, Sampling(max_tokens=40))
    with torch.no_grad():
        for i, ids, logps in zip(found.owner, found.completions, found.logps):
            row = model(torch.tensor([prompts[i] + ids], device="cuda")).logits[0, len(prompts[i]) - 1:-1].float().log_softmax(-1)
            theirs = row.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]
            assert (theirs - torch.tensor(logps, device="cuda")).abs().max() < 0.1


def test_interrupt_within_a_second():
    model, done = middling(), []
    engine = InPlace(model)
    prompts = [torch.randint(3, 31_000, (50,)).tolist() for _ in range(4)]
    expected = engine.generate(prompts, 2, Sampling(max_tokens=10, greedy=True)).completions

    def long():
        try: engine.generate(prompts, 8, Sampling(max_tokens=20_000))
        except KeyboardInterrupt: done.append(time.perf_counter())

    thread = threading.Thread(target=long)
    thread.start()
    time.sleep(2)
    at = time.perf_counter()
    engine.interrupt()
    thread.join(20)
    assert done and done[0] - at < 1
    assert engine.generate(prompts, 2, Sampling(max_tokens=10, greedy=True)).completions == expected
