"""Weights in NF4: bitsandbytes' values to the bit; products, training and sampling with them; what is left to bitsandbytes."""
import os

import pytest
import torch
from compiling import WHICH, compiled_kernel, resources, thinned, under_the_interpreter

pytest.importorskip("triton")
bnb = pytest.importorskip("bitsandbytes")
import grpo_nb.ops.decode.skinny_nf4 as S
import grpo_nb.ops.layer.nf4 as L
from grpo_nb.ops.decode.skinny_nf4 import nf4_split_for, skinny_nf4, skinny_nf4_naive
from grpo_nb.ops.layer.nf4 import Desk, Nf4, Sheet, expand, expand_naive, nf4_of, why_not_nf4
from grpo_nb.ops.layer.rms_norm import runs_on

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
once = pytest.mark.skipif(INTERPRETED, reason="has no kernel in it")
SHAPES = [(8, 192), (67, 64), (300, 64)]


def layer(n, k, dtype=torch.float32, device="cpu", **how):
    made = bnb.nn.Linear4bit(k, n, bias=False, **{"quant_type": "nf4", "compute_dtype": dtype, **how})
    made.weight.data = (torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.02).to(dtype)
    made.support_avx512bf16_for_cpu = False
    return made.to(device)


def theirs(it): return bnb.functional.dequantize_4bit(it.weight.data, it.weight.quant_state)


def four_bit_model(bias=False, **how):
    "A Qwen3 (or with biases a Qwen2) of two layers in 4 bits with an adapter that is not zero."
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
    config, cls = (Qwen2Config, Qwen2ForCausalLM) if bias else (Qwen3Config, Qwen3ForCausalLM)
    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    model = cls(config(**shape, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1))
    for name, it in list(model.named_modules()):
        if type(it) is not torch.nn.Linear or name == "lm_head": continue
        held = bnb.nn.Linear4bit(it.in_features, it.out_features, bias=it.bias is not None,
                                 **{"quant_type": "nf4", "compute_dtype": torch.float32, **how})
        held.load_state_dict({k: torch.randn_like(v) * (0.3 if k == "weight" else 1) for k, v in it.state_dict().items()})
        held.support_avx512bf16_for_cpu = False
        model.set_submodule(name, held.to("cpu"))
    model.is_loaded_in_4bit = True
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    for name, p in peft.named_parameters():
        if "lora_B" in name: p.data.normal_(0, .1)
    return peft


# --- the values

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False])
def test_the_values_are_those_of_bitsandbytes_to_the_bit(dtype, double):
    layers = [layer(n, k, dtype, compress_statistics=double) for n, k in SHAPES]
    sheet = Sheet([nf4_of(it) for it in layers], Desk())
    for place, it in enumerate(layers):
        w = sheet.matrices[place]
        assert w.nested == double and torch.equal(expand_naive(w, dtype), theirs(it))
        if INTERPRETED: assert torch.equal(sheet.dense(place, dtype), theirs(it)) and torch.equal(expand(w, dtype), theirs(it))


@interpreted
def test_a_desk_holds_one_sheet_and_says_which(monkeypatch):
    filled, fill = [], L._fill
    monkeypatch.setattr(L, "_fill", lambda sheet, out: filled.append(sheet) or fill(sheet, out))
    desk, (a, b) = Desk(), [[layer(n, 64) for n in sizes] for sizes in ((8, 24), (40,))]
    one, two = (Sheet([nf4_of(it) for it in its], desk) for its in (a, b))
    for place in (0, 1, 0): assert torch.equal(one.dense(place, torch.float32), theirs(a[place]))
    assert torch.equal(two.dense(0, torch.float32), theirs(b[0])) and torch.equal(one.dense(1, torch.float32), theirs(a[1]))
    assert filled == [one, two, one]
    assert torch.equal(one.dense(0, torch.float16), theirs(a[0]).half()) and len(desk.buffer) == 32 * 64
    desk.clear()
    assert torch.equal(one.dense(0, torch.float32), theirs(a[0])) and len(filled) == 5


@once
@pytest.mark.parametrize("made,said", [
    (lambda: torch.nn.Linear(64, 8), "Linear is no 4-bit layer"),
    (lambda: layer(8, 64, quant_type="fp4"), "fp4, not nf4"),
    (lambda: layer(8, 96), "does not end in a multiple of 64"),
    (lambda: bnb.nn.Linear4bit(64, 8, quant_type="nf4"), "not quantised yet"),
    (lambda: bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False), "no 4-bit layer"),
])
def test_what_is_not_nf4_says_why(made, said): assert said in why_not_nf4(made())


@once
def test_other_blocks_are_left_alone():
    it = layer(8, 128)
    it.weight.quant_state.blocksize = 128
    assert "blocks are of 128 entries" in why_not_nf4(it)


# --- products

@interpreted
@pytest.mark.parametrize("rows,k,widths,rank,split,dtype", thinned([
    (*case, dtype) for case in [(1, 64, (64,), 0, None), (5, 192, (33, 7, 70), 9, 3), (40, 128, (20, 8), 4, None)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
], quick=(0, 4, 8)))
def test_the_kernels_product(rows, k, widths, rank, split, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(rows, k, generator=g).to(dtype), torch.full((rows, 3), torch.nan, dtype=dtype)], 1)[:, :k]
    weights, thin = [nf4_of(layer(n, k)) for n in widths], torch.randn(rank, k, generator=g).to(dtype) if rank else None
    found, plain = skinny_nf4(x, weights, thin, split), skinny_nf4_naive(x, weights, thin)
    dense = [expand_naive(w, dtype) for w in weights] + ([thin] if rank else [])
    truth = x.double() @ torch.cat(dense).double().T
    assert found.shape[1:] == (rows, sum(widths) + rank) and found.dtype == torch.float32
    slack = 1e-2 if dtype is torch.bfloat16 else 2e-6 # the interpreter cuts to bfloat16 where a GPU rounds
    assert float((found.sum(0) - truth).abs().max() / truth.abs().max()) < slack
    assert torch.allclose(plain[0].double(), truth, atol=1e-4)


@once
def test_products_are_cut_into_parts_none_of_which_is_empty():
    for rows in (1, 8, 32, 64, 128, 300):
        for widths, k in (((2048, 256, 256, 192), 2048), ((2048, 64), 11008), ((11008, 11008, 128), 2048), ((8,), 64)):
            plan = nf4_split_for(rows, widths, k, 2)
            steps = k // plan.block_k
            assert k % plan.block_k == 0 and (plan.split - 1) * -(-steps // plan.split) < steps


@pytest.mark.parametrize("change,said", [
    (dict(weights=[]), "weights=0"),
    (dict(x=torch.ones(3, 64).double()), "float64"),
    (dict(x=torch.ones(64, 3).T), "x="),
    (dict(x=torch.ones(3, 128)), r"weights\[0\]"),
    (dict(thin=torch.ones(4, 32)), "thin="),
])
def test_a_product_that_cannot_be(change, said):
    with pytest.raises(ValueError, match=said):
        skinny_nf4(**{"x": torch.ones(3, 64), "weights": [nf4_of(layer(8, 64))], "thin": None, **change})


# --- sampling

@interpreted
def test_a_recorded_step_reads_4_bits(monkeypatch):
    "In the plain forms of its operations; the kernel of the product is compared with its own above."
    from grpo_nb.engines.base import Sampling
    from grpo_nb.engines.inplace.cache import Room, Table
    from grpo_nb.engines.inplace import decode, static
    from grpo_nb.engines.inplace.layers import Decoder
    for module in (decode, static): monkeypatch.setattr(module, "runs_on", lambda device: False)
    peft, prompts = four_bit_model(bias=True).eval(), [[5, 6, 7, 8], [9, 10]]
    decoder, how = Decoder(peft), Sampling(greedy=True, max_tokens=4)
    def no(*args): raise AssertionError("a 4-bit layer was called")
    with torch.no_grad():
        rules = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        want = [peft.generate(torch.tensor([p]), **rules)[0, len(p):].tolist() for p in prompts]
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", no)
        decoder.refresh()
        assert all(joined.sheet is not None and not joined.foreign() for la in decoder.layers for joined in la.linears)
        table = Table(Room(2, 2, 4, 4), decoder, how)
        decode.prefill(decoder, table, prompts, [0, 1])
        table.admit([0, 1], [0, 1], [0, 1], [4] * 2, torch.arange(2))
        decode.first_tokens(decoder, table, [0, 1], how)
        step = static.Recorder(decoder, table, how).arrange()
        for _ in range(3): step()
        places = decoder.addresses()
        decoder.refresh()
        assert decoder.addresses() == places, "a record stays good"
    assert table.out[:, :4].tolist() == want


@once
def test_on_a_cpu_a_4_bit_layer_is_called():
    from grpo_nb.engines.inplace.layers import Decoder
    decoder = Decoder(four_bit_model())
    decoder.refresh()
    assert all(joined.sheet is None and joined.foreign() for la in decoder.layers for joined in la.linears)


@once
def test_adapters_of_another_type_beside_layers_that_are_called(monkeypatch):
    "Float32 adapters on a 4-bit model in bfloat16 ended a step of the engine on a GPU: `adapter.b[0]` must be of bfloat16."
    from grpo_nb.engines.inplace.layers import Decoder
    peft = four_bit_model()
    for name, p in peft.named_parameters():
        if "lora" not in name and p.is_floating_point(): p.data = p.data.bfloat16()
    decoder = Decoder(peft)
    decoder.refresh()
    assert {joined.a.dtype for la in decoder.layers for joined in la.linears} == {torch.bfloat16} == {decoder.dtype}


@compiled
@WHICH
def test_kernels_under_the_interpreter(which):
    assert not runs_on(torch.device("cpu"))
    under_the_interpreter(__file__, which)


# --- what the compiler makes of the very launches

class Launches:
    "Stands for a kernel and keeps what it is called with."
    def __init__(self): self.calls = []

    def __getitem__(self, grid): return lambda *given, **named: self.calls.append((given, named))


KINDS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8"}


def build(monkeypatch, module, name, capability, call):
    "A launch's kernel as machine code."
    kernel, launches = getattr(module, name), Launches()
    monkeypatch.setattr(module, name, launches)
    monkeypatch.setattr(module, "shuffles", lambda device: True)
    call()
    [(given, named)] = launches.calls
    options = {k: v for k, v in named.items() if k.startswith("num_") or k == "enable_fp_fusion"}
    constants = {k: False if k == "WIDE" else v for k, v in named.items() if k not in options}
    def kind(x): return KINDS[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
    names = kernel.arg_names
    aligned = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0)]
    signature = {n: "constexpr" for n in names} | {n: kind(x) for n, x in zip(names, given)}
    return compiled_kernel(kernel, signature, constants, aligned, capability, options)


def empty(n, k, nested=True):
    e, blocks = torch.empty, n * k // 64
    absmax = e(blocks, dtype=torch.uint8 if nested else torch.float32)
    return Nf4(e(n * k // 2, dtype=torch.uint8), absmax, e(blocks // 256 + 1), e(()), e(256), e(16), (n, k))


@compiled
@pytest.mark.parametrize("dtype,capability", [(torch.bfloat16, 90), (torch.float16, 75)])
def test_the_expansion_compiles(dtype, capability, monkeypatch, tmp_path):
    sheet = Sheet([empty(2048, 2048), empty(256, 2048)], Desk())
    built = build(monkeypatch, L, "_expand", capability, lambda: L._fill(sheet, torch.empty(2304 * 2048, dtype=dtype)))
    assert resources(built, tmp_path)[1] == 0 and built.metadata.shared <= 64 * 1024
    ptx = built.asm["ptx"]
    assert "fma." not in ptx, "a product and a sum that are rounded once would give other bits"
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx and "shfl.sync" in ptx, "16 bytes at a time, and levels in registers"


@compiled
@pytest.mark.parametrize("dtype,capability", [(torch.bfloat16, 90), (torch.float16, 90), (torch.bfloat16, 80)])
def test_the_product_compiles(dtype, capability, monkeypatch, tmp_path):
    chips = {90: (132, 227 * 1024, True), 80: (108, 163 * 1024, True)}
    monkeypatch.setattr(S, "_chip", lambda device: chips[capability])
    weights, x, thin = [empty(n, 2048) for n in (2048, 256, 256)], *(torch.empty(n, 2048, dtype=dtype) for n in (32, 192))
    built = build(monkeypatch, S, "_product_nf4", capability, lambda: skinny_nf4(x, weights, thin))
    assert resources(built, tmp_path)[1] == 0 and built.metadata.shared <= chips[capability][1]
    ptx = built.asm["ptx"]
    assert "fma." not in ptx and "shfl.sync" in ptx and "cp.async.cg" in ptx
    assert "wgmma" in ptx if capability == 90 else "mma.sync" in ptx


# --- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
def test_values_on_a_gpu(dtype, double):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    sizes = [*SHAPES, (2048, 2048), (11008, 2048), (2048, 11008)]
    layers = [layer(n, k, dtype, "cuda", compress_statistics=double) for n, k in sizes]
    sheet = Sheet([nf4_of(it) for it in layers], Desk())
    assert all(torch.equal(sheet.dense(place, dtype), theirs(it)) for place, it in enumerate(layers))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 32, 128, 200])
def test_products_on_a_gpu(rows, dtype):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    for k, widths, rank in ((2048, (2048, 256, 256), 192), (11008, (2048,), 64), (192, (67, 33), 0)):
        layers = [layer(n, k, dtype, "cuda") for n in widths]
        x, thin = (torch.randn(n, k, device="cuda").to(dtype) for n in (rows, rank))
        truth = x.double() @ torch.cat([*(theirs(it).double() for it in layers), thin.double()]).T
        found = skinny_nf4(x, [nf4_of(it) for it in layers], thin if rank else None).sum(0)
        assert float((found - truth).norm() / truth.norm()) < 3e-6
