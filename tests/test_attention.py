"""A model computes in a pack what it computes in rows; every form of the mask is the definition."""
import functools

import pytest
import torch
import transformers as t
from hypothesis import given, settings, strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from grpo_nb.packs.attention import (block_mask, dense_mask, intervals, masks_for, Obstacle, probe, why_not_tree, tree_attention,
                                   tree_mask_reference, use_tree_attention)
from grpo_nb.packs.plan import filler, plan
from test_packing import batches, truth

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
quick = settings(max_examples=40, deadline=None)
few = settings(max_examples=10, deadline=None)
BASE = dict(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, pad_token_id=0)
GEMMA = BASE | dict(head_dim=8, sliding_window=3, query_pre_attn_scalar=4)
FAMILIES = dict(
    llama=t.LlamaConfig(**BASE),
    qwen2=t.Qwen2Config(**BASE),
    qwen3=t.Qwen3Config(**BASE, head_dim=8),
    qwen2_window=t.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    qwen3_window=t.Qwen3Config(**BASE, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    mistral=t.MistralConfig(**BASE, sliding_window=3),
    gemma2=t.Gemma2Config(**GEMMA, attn_logit_softcapping=1.0),
    gemma3=t.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    mixtral=t.MixtralConfig(**BASE, sliding_window=4, num_local_experts=4),
    qwen3_moe=t.Qwen3MoeConfig(**BASE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    phi3=t.Phi3Config(**BASE, sliding_window=4),
    phi3_full=t.Phi3Config(**BASE),
    gpt_oss=t.GptOssConfig(
        **BASE, head_dim=8, sliding_window=3, num_local_experts=4,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)


@functools.cache
def tiny(name, implementation="eager"):
    "A random model, scaled up so that attention is far from uniform."
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation=implementation).eval()
    for key, value in model.named_parameters():
        if "proj" in key: value.data.mul_(8)
        if "sinks" in key: value.data.normal_()
    return model


@torch.no_grad()
def differences(model, batch, made, kind):
    "The largest difference of logits between packs and rows, over the largest logit."
    wanted = {row: model(torch.tensor([p + c])).logits[0, len(p) - 1:-1] for row, (p, c) in truth(batch).items()}
    worst, biggest = 0., max([float(w.abs().max()) for w in wanted.values()], default=1.)
    for pack in made.packs():
        with use_tree_attention(model):
            logits = model(
                pack.input_ids, attention_mask=masks_for(model.config, pack, kind), position_ids=pack.position_ids, use_cache=False
            ).logits[0]
        assert torch.isfinite(logits).all()
        assert logits.shape[0] == len(pack)
        theirs = torch.cat([wanted[row] for row in pack.rows.tolist()])
        worst = max(worst, float((logits[pack.predict] - theirs).abs().max()))
    return worst / max(biggest, .01) # the padding id has an embedding of zeros, and so zero logits


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(batch=batches(), budget=st.integers(1, 60), share=st.booleans(), kind=st.sampled_from(["dense", "flex"]))
def test_a_model_computes_in_packs_what_it_computes_in_rows(name, batch, budget, share, kind):
    made = plan(batch, budget, share_prompts=share, multiple_of=8)
    assert differences(tiny(name), batch, made, kind) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gemma3"])
@pytest.mark.filterwarnings("ignore")
@few
@given(batch=batches(), kind=st.sampled_from(["dense", "flex"]))
def test_under_sdpa_too(name, batch, kind):
    assert differences(tiny(name, "sdpa"), batch, plan(batch, 60, multiple_of=8), kind) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_rows(name): # FlexAttention has no backward on a CPU
    model = tiny(name)
    batch = _batch()
    weights = torch.rand(batch.completion_ids.shape, generator=torch.Generator().manual_seed(1))
    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    loss = 0
    for row, (p, c) in truth(batch).items():
        logps = model(torch.tensor([p + c])).logits[0, len(p) - 1:-1].log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0]
        loss = loss + (logps * weights[row][batch.completion_mask[row].bool()]).sum()
    wanted = gradients(loss)
    loss = 0
    with use_tree_attention(model):
        for pack in plan(batch, 30).packs():
            logits = model(
                pack.input_ids, attention_mask=masks_for(model.config, pack), position_ids=pack.position_ids, use_cache=False
            ).logits[0]
            logps = logits[pack.predict].log_softmax(-1).gather(1, pack.target[:, None])[:, 0]
            loss = loss + (logps * pack.gather(weights)).sum()
        ours = gradients(loss)
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        assert (ours[key] - value).norm() <= 2e-5 * value.norm() + 1e-9, key


def _batch():
    from test_packing import padded
    return padded(
        [[3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [8, 9], [3, 4, 5, 6, 7]],
        [[1, 0, 2, 4], [5], [6, 7, 8, 9, 10, 11, 12], [], [0, 0, 3]],
    )


@quick
@given(batches(), st.integers(1, 60), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 8]))
def test_every_form_of_the_mask_is_the_definition(batch, budget, window, multiple_of):
    for pack in plan(batch, budget, multiple_of=multiple_of).packs():
        mask = tree_mask_reference(pack, window)
        assert mask.any(1).all()
        assert torch.equal(dense_mask(pack, window=window)[0, 0], mask)
        additive = dense_mask(pack, torch.float32, window)[0, 0]
        assert torch.equal(additive == 0, mask) and (additive[~mask] == torch.finfo(torch.float32).min).all()


@quick
@given(batches(), st.integers(1, 60), st.sampled_from([None, 1, 2, 5]), st.sampled_from([1, 4, 16]), st.sampled_from([1, 8]))
def test_tiles_are_those_of_create_block_mask(batch, budget, window, size, multiple_of):
    for pack in plan(batch, budget, multiple_of=multiple_of).packs():
        ours = block_mask(pack, window, size)
        theirs = create_block_mask(ours.mask_mod, 1, 1, len(pack), len(pack), device="cpu", BLOCK_SIZE=size)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        for part in ("kv", "full_kv", "q", "full_q"):
            assert torch.equal(tiles(ours, part), tiles(theirs, part))


def tiles(mask, part):
    "The listed tiles, as a dense tensor of booleans."
    count, index = getattr(mask, f"{part}_num_blocks"), getattr(mask, f"{part}_indices")
    listed = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), listed)


def test_padding_alone():
    pack = filler(16)
    assert torch.equal(dense_mask(pack)[0, 0], torch.eye(16, dtype=torch.bool))
    assert torch.equal(intervals(pack)[0], torch.arange(16, dtype=torch.int32))
    for kind in ("dense", "flex"):
        with torch.no_grad(), use_tree_attention(tiny("llama")):
            out = tiny("llama")(
                pack.input_ids, attention_mask=masks_for(FAMILIES["llama"], pack, kind), position_ids=pack.position_ids
            ).logits
        assert torch.isfinite(out).all()


def test_the_switch_is_undone_exactly():
    model = tiny("llama", "sdpa")
    with pytest.raises(RuntimeError), use_tree_attention(model):
        assert model.config._attn_implementation == "grpo_nb_tree"
        with use_tree_attention(model): pass
        assert model.config._attn_implementation == "grpo_nb_tree"
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert "_attn_implementation" not in model.config.to_dict()


@pytest.mark.filterwarnings("ignore")
def test_a_model_generates_under_the_switch():
    model, ids = tiny("llama", "sdpa"), torch.tensor([[1, 2, 3]])
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    with use_tree_attention(model): assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)


def test_dropout_is_refused_with_a_block_mask():
    pack, q = filler(8), torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="dropout=0.5"): tree_attention(None, q, q, q, block_mask(pack), dropout=.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_known_families_are_supported_and_pass_the_probe(name):
    assert why_not_tree(tiny(name)) is None
    assert probe(tiny(name)) < 1e-5 and not tiny(name).training


SMALL = dict(vocab_size=16, hidden_size=32, num_hidden_layers=2)
REFUSED = dict(
    gpt2=(t.GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=4), "no rotary"),
    opt=(t.OPTConfig(**SMALL, ffn_dim=32, num_attention_heads=4, word_embed_proj_dim=32), "no rotary"),
    bloom=(t.BloomConfig(vocab_size=16, hidden_size=32, n_layer=1, n_head=4), "no rotary"),
    mamba=(t.MambaConfig(**SMALL, state_size=4), "linear_attention|state"),
    jamba=(
        t.JambaConfig(
            **SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            use_mamba_kernels=False, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1,
        ),
        "state|layers of type",
    ),
    qwen3_next=(
        t.Qwen3NextConfig(
            **BASE, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
            shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
        ),
        "linear_attention",
    ),
    lfm2=(t.Lfm2Config(**BASE, layer_types=["conv", "full_attention"]), "conv|state"),
    bidirectional=(t.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True), "later tokens"),
    dynamic=(t.LlamaConfig(**BASE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), "dynamic"),
)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_take_the_tree_says_why(name):
    config, why = REFUSED[name]
    reason = str(why_not_tree(t.AutoModelForCausalLM.from_config(config).eval()))
    assert any(part in reason for part in why.split("|")), reason


def test_an_encoder_decoder_is_refused():
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert why_not_tree(model.eval()).kind is Obstacle.ENCODER_DECODER


def test_dropout_counts_in_training_only():
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**BASE, attention_dropout=.1))
    assert why_not_tree(model.eval()) is None
    reason = why_not_tree(model.train())
    assert reason.kind is Obstacle.DROPOUT and "self_attn (0.1)" in reason.words
    model = t.AutoModelForCausalLM.from_config(t.Phi3Config(**BASE, resid_pdrop=.1)).train()
    assert "dropout is on in" in why_not_tree(model).words


def test_adapters():
    import peft
    def base(): return t.AutoModelForCausalLM.from_config(FAMILIES["llama"])
    lora = peft.get_peft_model(
        base(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    assert why_not_tree(lora.train()) is None and probe(lora) < 1e-5
    dropped = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=.1, task_type="CAUSAL_LM"))
    assert "lora_dropout" in why_not_tree(dropped.train()).words and why_not_tree(dropped.eval()) is None
    prefix = peft.get_peft_model(base(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert why_not_tree(prefix).kind is Obstacle.PROMPT_LEARNING


def test_longrope_below_and_above_its_length():
    config = t.Phi3Config(
        **BASE | dict(max_position_embeddings=64, original_max_position_embeddings=32),
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4, "original_max_position_embeddings": 32,
        },
    )
    model = t.AutoModelForCausalLM.from_config(config).eval()
    assert why_not_tree(model, 32) is None and why_not_tree(model, 33).kind is Obstacle.ROTARY_LENGTH


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind='flax'.*'flex'"): masks_for(FAMILIES["llama"], filler(8), "flax")
    with pytest.raises(ValueError, match="window=0"): dense_mask(filler(8), window=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_compiled_flex_attention_on_a_gpu(name):
    "One compiled kernel for packs of several lengths; values and gradients of the dense form."
    from grpo_nb.packs.batch import RolloutBatch
    torch.manual_seed(0)
    config = type(FAMILIES[name])(
        **FAMILIES[name].to_dict() | dict(hidden_size=256, head_dim=64, sliding_window=150, max_position_embeddings=2048)
    )
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda().eval()
    for longest in (60, 200, 300, 500):
        real = torch.randint(1, longest + 1, (8, 1))
        batch = RolloutBatch(
            torch.randint(1, 16, (2, 100)).repeat_interleave(4, 0), torch.ones(8, 100),
            torch.randint(1, 16, (8, longest)), torch.arange(longest) < real,
        )
        (pack,) = plan(batch, 100_000).packs("cuda")
        results = {}
        for kind in ("dense", "flex"):
            model.zero_grad()
            with use_tree_attention(model):
                logits = model(
                    pack.input_ids, attention_mask=masks_for(config, pack, kind), position_ids=pack.position_ids, use_cache=False
                ).logits[0]
                logits[pack.predict].log_softmax(-1).gather(1, pack.target[:, None]).sum().backward()
            results[kind] = logits[pack.predict], model.model.embed_tokens.weight.grad.clone()
        for a, b in zip(results["dense"], results["flex"]):
            assert (a - b).norm() <= 5e-3 * a.norm() # tf32 inside the kernels
