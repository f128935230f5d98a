"""The second way in place: a model's own layers on a cache of ours give `generate`'s tokens, for every family."""
import threading
from dataclasses import replace
from functools import cache

import families
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from grpo_nb.engines.base import EngineError, Refused, Sampling
from grpo_nb.engines.hf import HuggingFace
from grpo_nb.engines.inplace.caller import Caller, why_not_own
from grpo_nb.engines.inplace.engine import InPlace
from grpo_nb.engines.inplace.own import OwnLayers
from grpo_nb.engines.inplace.ways import in_place, still_fits, way_from, way_of
from grpo_nb.models.finite import NotFinite

PROMPTS, ENDS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14, 15]], (9, 30, 44)
RAGGED = Sampling(max_tokens=(12, 7, 1, 12, 9, 12), greedy=True)
KINDS = dict( # attention, experts, windows and sinks, latent attention; convolutions, linear attention, state spaces; ALiBi
    smollm3="ours", qwen3_moe="ours", gpt_oss="ours", gemma4_text="ours", deepseek_v3="ours", cohere2="ours", lfm2_moe="ours",
    qwen3_5_text="ours", bamba="ours", mamba="ours", bloom="theirs")


@cache
def made(kind): return families.small_model(kind).eval()


def same(ours, theirs):
    assert ours.completions == theirs.completions and ours.finished == theirs.finished
    for a, b in zip(ours.logps, theirs.logps): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_hugging_face(kind):
    "Ragged prompts, limits and ends; also with shapes that stay, as a record needs them."
    model = made(kind)
    free = HuggingFace(model).generate(PROMPTS, 1, Sampling(max_tokens=12, greedy=True)).completions
    how = replace(RAGGED, stop_token_ids=(free[0][5], free[2][7]))
    theirs = HuggingFace(model).generate(PROMPTS, 2, how)
    assert set(theirs.finished) == {"length", "eos"}
    for settings in (dict(pads=False), dict(static=True)):
        engine = OwnLayers(model, **settings)
        assert engine.caller.ours == (KINDS[kind] == "ours")
        assert engine.caller.pads == ("static" in settings and kind not in ("lfm2_moe", "qwen3_5_text", "bamba", "mamba"))
        same(engine.generate(PROMPTS, 2, how), theirs)


@pytest.mark.slow
def test_every_family():
    "The whole table: each type in its way, and none with other tokens than `generate`'s."
    found = {}
    for kind in families.kinds():
        try: model = families.small_model(kind).eval()
        except Exception: continue # noqa: BLE001 what cannot be built small
        found[kind] = families.engine_row(model)
    assert [k for k, r in found.items() if r.get("same") is False] == []
    assert sum(r.get("same") is True for r in found.values()) > 110


def test_a_window_and_a_long_completion():
    "Rows that run far past the window, whatever is kept of it; also where the columns that are read grow."
    from grpo_nb.engines.inplace import own
    model, how = made("gpt_oss"), Sampling(max_tokens=(40, 23), greedy=True)
    theirs = HuggingFace(model).generate([PROMPTS[2]], 2, how)
    same(OwnLayers(model).generate([PROMPTS[2]], 2, how), theirs)
    with pytest.MonkeyPatch().context() as m:
        m.setattr(own, "AHEAD", 8)
        same(OwnLayers(model, static=True).generate([PROMPTS[2]], 2, how), theirs)


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.7, top_p=0.8), dict(top_k=5, min_p=0.02), dict(repetition_penalty=1.4),
    dict(seed=None, seeds=[*range(6)])])
def test_it_draws_what_the_first_way_draws(settings):
    "The same seed is the same completion, in either way and in any company."
    model, how = made("qwen3"), Sampling(**{"max_tokens": 9, "stop_token_ids": ENDS, "seed": 3, **settings})
    first = InPlace(model).generate(PROMPTS, 2, how)
    for more in ({}, dict(slots=4)): same(OwnLayers(model, **more).generate(PROMPTS, 2, how), first)


def test_a_penalty_is_hugging_faces():
    how = Sampling(max_tokens=10, greedy=True, repetition_penalty=1.5)
    for prompt in PROMPTS: # without padding, which `generate` would count as seen
        same(OwnLayers(made("lfm2")).generate([prompt], 2, how), HuggingFace(made("lfm2")).generate([prompt], 2, how))


def test_without_a_seed_it_follows_torchs_generator():
    engine, found = OwnLayers(made("smollm3")), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(engine.generate(PROMPTS, 2, Sampling(max_tokens=8)).completions)
    assert found[0] == found[1] != found[2]


class Letters:
    "A tokenizer whose every third token has no text."
    def decode(self, ids, **options): return "".join("" if i % 3 == 0 else chr(97 + i % 26) for i in ids)


def test_stop_strings():
    "The same ends as in the first way, those of several tokens too."
    model, how = made("qwen3"), Sampling(max_tokens=12, seed=2)
    free = OwnLayers(model).generate(PROMPTS, 2, how).completions
    texts = [Letters().decode(row) for row in free]
    how = replace(how, stop=(texts[0][3:5], texts[4][2:4]), stop_token_ids=(free[2][6],))
    found = OwnLayers(model, Letters()).generate(PROMPTS, 2, how)
    same(found, InPlace(model, Letters()).generate(PROMPTS, 2, how))
    assert "stop" in found.finished and "eos" in found.finished
    with pytest.raises(ValueError, match="needs the tokenizer"): OwnLayers(model).generate(PROMPTS, 1, how)


def test_a_prompt_runs_once_and_rows_leave():
    "Without padding; and no forward has a row that has ended."
    model, seen = families.small_model("smollm3").eval(), []
    engine = OwnLayers(model, pads=False)
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    engine.generate([*PROMPTS, [8, 8, 8]], 2, Sampling(max_tokens=(1, 2, 3, 4, 5, 6, 7, 8), greedy=True))
    assert seen[:3] == [(1, 1), (2, 3), (1, 9)] and seen[3:] == [(n, 1) for n in range(7, 0, -1)]
    seen.clear()
    together, one = OwnLayers(model), ([*PROMPTS, [8, 8, 8]], 1, Sampling(max_tokens=1, greedy=True))
    found = together.generate(*one)
    assert seen[-1] == (4, 9) and found.completions == engine.generate(*one).completions


def test_what_fits():
    model = made("smollm3")
    theirs = OwnLayers(model).generate(PROMPTS, 2, RAGGED)
    same(OwnLayers(model, cache_tokens=45, prefill_tokens=4).generate(PROMPTS, 2, RAGGED), theirs)
    with pytest.raises(Refused, match="may hold 20 tokens.*one completion needs 21: a prompt of 9 and 12"):
        OwnLayers(model, cache_tokens=20).generate(PROMPTS, 2, RAGGED)
    with pytest.raises(ValueError, match="slots"): OwnLayers(model, slots=0)


def test_everything_is_as_it_was():
    "Modes, checkpointing, attention, hooks, an error on the way; and dropout and a hook's change count as they should."
    model = get_peft_model(families.small_model("qwen3_5_text"), LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5,
                                                                           init_lora_weights=False)).train()
    model.gradient_checkpointing_enable()
    model.base_model.model.model.layers[0].eval()
    modes, name = [m.training for m in model.modules()], model.config._attn_implementation
    engine = OwnLayers(model)
    found = engine.generate(PROMPTS, 2, RAGGED)
    model.base_model.model.lm_head.register_forward_hook(lambda m, a, out: out.roll(1, -1))
    assert engine.generate(PROMPTS, 2, RAGGED).completions != found.completions
    assert modes == [m.training for m in model.modules()] and model.config._attn_implementation == name
    assert model.is_gradient_checkpointing and all(p.grad is None for p in model.parameters())
    model.eval()
    same(engine.generate(PROMPTS, 2, RAGGED), HuggingFace(model).generate(PROMPTS, 2, RAGGED))


def test_logits_that_are_no_numbers():
    model = families.small_model("lfm2").eval()
    engine = OwnLayers(model)
    with torch.no_grad(): model.model.layers[1].feed_forward.w1.weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match="6 of 6 completions are not finite"): engine.generate(PROMPTS, 2, RAGGED)


def test_it_can_be_interrupted():
    engine = OwnLayers(made("mamba"))
    began, step = threading.Event(), Caller.newest
    with pytest.MonkeyPatch().context() as m:
        m.setattr(Caller, "newest", lambda *a, **k: (began.set(), step(*a, **k))[1])
        threading.Thread(target=lambda: (began.wait(60), engine.interrupt())).start()
        with pytest.raises(KeyboardInterrupt) as left: engine.generate(PROMPTS, 2, Sampling(max_tokens=100_000))
    assert all(len(ids) > 0 and not whole for ids, whole in left.value.so_far)
    assert engine.generate(PROMPTS, 1, Sampling(max_tokens=2)).tokens == 6


@pytest.mark.parametrize("kind, words", [
    ("bart", "logits with a cache differ"), ("recurrent_gemma", "another cache than the one it is given"),
    ("deepseek_v32", "a layer of another kind"), ("rwkv", "cache")])
def test_what_is_left_to_generate(kind, words):
    with pytest.raises(EngineError, match=f"cannot decode this model: .*{words}.*engine='hf'"): in_place(made(kind))


def test_which_way():
    assert isinstance(in_place(made("qwen3")), InPlace) and "itself" not in way_of(in_place(made("qwen3")))
    hooked = families.small_model("qwen3").eval()
    kept = in_place(hooked)
    assert still_fits(kept, hooked) and not still_fits(kept, made("qwen3")) and not still_fits(None, hooked)
    hooked.model.layers[1].mlp.register_forward_hook(lambda m, a, out: out * 2)
    assert not still_fits(kept, hooked)
    engine = in_place(hooked) # its own layers call the hook
    assert isinstance(engine, OwnLayers) and way_of(engine).endswith("by the layers of Qwen3ForCausalLM itself")
    same(engine.generate(PROMPTS, 2, RAGGED), HuggingFace(hooked).generate(PROMPTS, 2, RAGGED))
    assert way_from(made("qwen3").config) == "fused" and way_from(made("lfm2").config) == "own" == way_from(made("gemma3").config)
    learned = get_peft_model(families.small_model("qwen3"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert "prompt learning" in why_not_own(learned)


@pytest.mark.parametrize("kind", ["qwen3_moe", "lfm2"])
def test_half_precision(kind):
    "In bf16, and in fp32 weights under an autocast: log-probs are the model's own, as near as that type is to itself."
    for model, dtype in ((families.small_model(kind).bfloat16().eval(), None), (made(kind), torch.bfloat16)):
        found = OwnLayers(model, dtype=dtype).generate(PROMPTS, 2, Sampling(max_tokens=8, seed=1))
        errors = []
        for i, row, logps in zip(found.owner, found.completions, found.logps):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
                logits = model(torch.tensor([[*PROMPTS[i], *row]])).logits[0, len(PROMPTS[i]) - 1:-1].float()
            errors.append((logits.log_softmax(-1).gather(1, torch.tensor(row)[:, None])[:, 0] - torch.tensor(logps)).abs())
        assert torch.cat(errors).median() < 0.02
