"""Engines: the same tokens as Hugging Face, the same distribution, the weights of this moment, everything as it was afterwards."""
import threading
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from grpo_nb.packs.batch import RolloutBatch
from grpo_nb.engines.inplace import engine as inplace
from grpo_nb.engines.base import EngineError, Sampling, sampling_logits
from grpo_nb.engines.inplace.draw import draw, seeds_of, uniforms
from grpo_nb.engines.hf import HuggingFace, read_config
from grpo_nb.engines.inplace.engine import InPlace
from grpo_nb.engines.inplace.layers import why_not_inplace
from grpo_nb.packs.plan import plan
from grpo_nb.step.forward import install, run_pack, uninstall
from grpo_nb.step.read import HeadSettings, LogProbs
from grpo_nb.tasks.tiny import make_tokenizer

VOCABULARY, ENDS = 96, (1, 5, 7)
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64, rope_theta=1e4
)
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "qwen3 wide": ("Qwen3", dict(head_dim=8, vocab_size=320)), # for a real tokenizer
    "llama": ("Llama", dict(rope_parameters=LLAMA3, num_key_value_heads=4)),
    "mistral": ("Mistral", dict(sliding_window=6, head_dim=16)),
    "gemma2": ("Gemma2", dict(head_dim=8, sliding_window=6)),
    "gemma2 capped": (
        "Gemma2",
        dict(head_dim=8, sliding_window=6, attn="eager", attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ),
    "phi3": ("Phi3", dict(sliding_window=None)),
    "phi3 partial": ("Phi3", dict(partial_rotary_factor=0.5, sliding_window=7)),
}


@cache
def made(family):
    kind, more = FAMILIES[family]
    more = {**SHAPE, **more}
    attention = more.pop("attn", "sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**more), attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return model


def fresh(family="qwen3"):
    made.cache_clear()
    model = made(family)
    made.cache_clear()
    return model


def adapted(family="qwen3", **options):
    model = get_peft_model(fresh(family), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, 0.2)
    return model


def prompts_of(*lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(8, VOCABULARY, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def alone(model, prompt, tokens, **more): # Hugging Face's greedy completion of one prompt, without padding
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=list(ENDS), pad_token_id=0, **more)
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt):].tolist()


def greedy(tokens, **more): return Sampling(greedy=True, max_tokens=tokens, stop_token_ids=ENDS, **more)


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer(["1 2"], 320)


# The same tokens

@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_hugging_face(family):
    "Ragged prompts, groups, ends of sequence; all at once, with three slots for twelve rows, and with a cache for few."
    model, prompts = made(family), prompts_of(5, 9, 3, 9)
    expected = [alone(model, p, 20) for p in prompts]
    for room in ({}, dict(slots=3), dict(cache_tokens=80), dict(slots=5, prefill_tokens=4)):
        found = InPlace(model, **room).generate(prompts, 3, greedy(20))
        assert found.completions == [expected[i] for i in found.owner], (family, room)
        assert all(
            (c[-1] in ENDS) == (why == "eos") and (why == "eos" or len(c) == 20)
            for c, why in zip(found.completions, found.finished)
        )


def test_groups_of_any_size_and_limits_of_each_row():
    model, prompts, counts, limits = made("qwen3"), prompts_of(4, 7, 2), [1, 4, 2], (3, 1, 8, 20, 2, 9, 1)
    found = InPlace(model, slots=4).generate(prompts, counts, greedy(limits))
    assert found.completions == [alone(model, prompts[i], n) for i, n in zip(found.owner, limits)]


def test_hugging_face_engine_is_the_same():
    model, prompts = made("llama"), prompts_of(5, 9, 3)
    theirs, ours = (e.generate(prompts, 2, greedy(12)) for e in (HuggingFace(model), InPlace(model)))
    assert theirs.completions == ours.completions and theirs.finished == ours.finished
    for a, b in zip(theirs.logps, ours.logps): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)


def test_repetition_penalty_without_padding_is_hugging_face():
    model, prompts = made("qwen2"), prompts_of(6, 6)
    found = InPlace(model, slots=3).generate(prompts, 2, greedy(15, repetition_penalty=1.5))
    assert found.completions == [alone(model, prompts[i], 15, repetition_penalty=1.5) for i in found.owner]


def test_stop_strings(tokenizer):
    model, prompts = made("qwen3 wide"), prompts_of(5, 8)
    free = InPlace(model, tokenizer).generate(prompts, 1, Sampling(greedy=True, max_tokens=12)).completions
    stop = [next(text for i in range(at, 12) if (text := tokenizer.decode(row[i:i + 2]).strip())) for row, at in zip(free, (3, 1))]
    for engine in (InPlace(model, tokenizer), HuggingFace(model, tokenizer)):
        found = engine.generate(prompts, 1, Sampling(greedy=True, max_tokens=12, stop=stop))
        for row, whole in zip(found.completions, free):
            first = next((i for i in range(1, 13) if any(s in tokenizer.decode(whole[:i]) for s in stop)), 12)
            assert row == whole[:first]
        assert "stop" in found.finished
    with pytest.raises(ValueError, match="needs the tokenizer"): InPlace(model).generate(prompts, 1, Sampling(stop="x"))


# The distribution

@pytest.mark.parametrize("settings", [
    dict(),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.6),
    dict(min_p=0.2),
    dict(repetition_penalty=1.3),
    dict(temperature=1.4, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
    dict(top_p=1e-9),
    dict(top_k=10_000),
])
def test_sampling_logits_are_those_of_the_processors(settings):
    model, g = made("qwen3"), torch.Generator().manual_seed(3)
    logits, ids = torch.randn(6, VOCABULARY, generator=g) * 3, torch.randint(0, VOCABULARY, (6, 10), generator=g)
    seen = torch.zeros(6, VOCABULARY, dtype=torch.bool).scatter_(1, ids, True)
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    processors = model._get_logits_processor(model._prepare_generation_config(config)[0], input_ids_seq_length=10)
    theirs, ours = processors(ids, logits.clone()), sampling_logits(logits, Sampling(**settings), seen)
    assert torch.equal(theirs.isfinite(), ours.isfinite()) and torch.allclose(theirs.softmax(-1), ours.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.6, top_p=0.9), dict(top_k=8, min_p=0.02)])
def test_chi_square(settings):
    "The second token given the first, against the exact distribution."
    model, prompt = made("qwen3"), prompts_of(6)[0]
    found = InPlace(model).generate([prompt], 4000, Sampling(max_tokens=2, seed=5, **settings))
    heads = torch.tensor([c[0] for c in found.completions])
    with torch.no_grad():
        exact = [sampling_logits(model(torch.tensor([prompt])).logits[:, -1], Sampling(**settings)).softmax(-1)[0]]
        common = int(heads.mode().values)
        exact.append(sampling_logits(model(torch.tensor([[*prompt, common]])).logits[:, -1], Sampling(**settings)).softmax(-1)[0])
    seconds = torch.tensor([c[1] for c in found.completions])[heads == common]
    for tokens, p in zip((heads, seconds), exact):
        counts, expected = torch.bincount(tokens, minlength=VOCABULARY).double(), p.double() * len(tokens)
        assert not counts[p == 0].any()
        few = expected < 5
        counts, expected = (torch.cat([x[~few], x[few].sum()[None]]) for x in (counts, expected))
        counts, expected = counts[expected > 0], expected[expected > 0]
        statistic = float(((counts - expected)**2 / expected).sum())
        p_value = torch.special.gammaincc(torch.tensor(max(1, len(counts) - 1) / 2), torch.tensor(statistic / 2))
        assert p_value > 1e-4, (settings, statistic, len(counts))


def test_a_seed_is_a_completion_whatever_the_batch():
    model, prompts = made("qwen3"), prompts_of(5, 9, 3)
    whole = InPlace(model).generate(prompts, 2, Sampling(max_tokens=12, seeds=[1, 2, 3, 4, 5, 6]))
    six = Sampling(max_tokens=12, seeds=[1, 2, 3, 4, 5, 6])
    assert InPlace(model, slots=2).generate(prompts, 2, six).completions == whole.completions
    assert InPlace(model).generate([prompts[1]], 1, Sampling(max_tokens=12, seeds=[4])).completions == [whole.completions[3]]
    assert InPlace(model).generate([prompts[1]], 1, Sampling(max_tokens=5, seeds=[4])).completions == [whole.completions[3][:5]]
    assert whole.completions[0] != whole.completions[1]


def test_without_a_seed_it_follows_torchs_generator():
    model, prompts, found = made("qwen3"), prompts_of(5), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(InPlace(model).generate(prompts, 3, Sampling(max_tokens=10)).completions)
    assert found[0] == found[1] != found[2]


def test_never_a_token_of_probability_zero():
    logits = torch.full((2000, 200), -torch.inf)
    logits[:, [3, 63, 64, 199]] = torch.tensor([0.0, -30.0, 0.0, 1.0])
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(10)
    tokens, logps = draw(logits.clone(), torch.cat([uniforms(seeds_of(0, 1980), 1)[:, 0], edge]))
    assert set(tokens.tolist()) <= {3, 63, 64, 199} and logps.isfinite().all() and (logps <= 0).all()


# The training step's log-probs, and its weights

@pytest.mark.parametrize("family", ["qwen3", "gemma2 capped", "gemma3", "mistral"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_training_steps(family, temperature):
    model, prompts = adapted(family), prompts_of(5, 9, 3)
    found = InPlace(model, slots=4).generate(
        prompts, 3, Sampling(temperature=temperature, max_tokens=10, stop_token_ids=ENDS, seed=1)
    )
    batch = found.batch(0)
    assert isinstance(batch, RolloutBatch)
    install(model)
    try:
        for pack in plan(batch).packs():
            with torch.no_grad(): out = run_pack(model, pack, HeadSettings.of(model, temperature), LogProbs(False), "dense")
            ours = found.padded_logps()[pack.row, pack.column]
            assert torch.allclose(out.log_probs, ours, atol=2e-5)
    finally: uninstall(model)


@pytest.mark.parametrize("what", ["adapter", "weight", "head", "norm", "embedding", "replaced"])
def test_a_change_of_weights_is_in_the_next_token(what):
    model, prompts = adapted(), prompts_of(5, 9)
    engine = InPlace(model)
    before = engine.generate(prompts, 1, greedy(12)).completions
    name = dict(
        adapter="layers.1.mlp.down_proj.lora_B.default.weight",
        weight="layers.0.self_attn.q_proj.base_layer.weight", head="lm_head",
        norm="layers.1.input_layernorm.weight", embedding="embed_tokens.weight",
        replaced="layers.2.self_attn.o_proj.base_layer.weight",
    )[what]
    changed = [p for n, p in model.named_parameters() if name in n]
    assert changed
    with torch.no_grad():
        for p in changed:
            new = p + torch.randn_like(p)
            if what == "replaced": p.data = new
            else: p.copy_(new)
    after = engine.generate(prompts, 1, greedy(12)).completions
    assert after != before and after == [alone(model, p, 12) for p in prompts]


def test_adapters_come_and_go():
    model, prompts = fresh(), prompts_of(5, 9)
    engine = InPlace(model)
    plain = engine.generate(prompts, 1, greedy(10)).completions
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n: p.normal_()
    other = engine.generate(prompts, 1, greedy(10)).completions
    assert other == [alone(wrapped, p, 10) for p in prompts] != plain
    with wrapped.disable_adapter(): assert engine.generate(prompts, 1, greedy(10)).completions == plain
    wrapped.merge_adapter()
    assert engine.generate(prompts, 1, greedy(10)).completions == other
    wrapped.unmerge_adapter()
    wrapped.unload()
    assert engine.generate(prompts, 1, greedy(10)).completions == plain


@pytest.mark.parametrize(
    "options",
    [dict(use_dora=True), dict(lora_dropout=0.5), dict(modules_to_save=["lm_head"]), dict(bias="all"), dict(use_rslora=True)],
)
def test_adapters_of_other_kinds(options):
    "In training mode: dropout stays out of sampling."
    model, prompts = adapted("qwen2", **options).train(), prompts_of(5, 9)
    found = InPlace(model).generate(prompts, 1, greedy(10)).completions
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    assert found == [alone(model, p, 10) for p in prompts]


def test_two_adapters_at_once():
    model, prompts = adapted(), prompts_of(5, 9)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert InPlace(model).generate(prompts, 1, greedy(10)).completions == [alone(model, p, 10) for p in prompts]


def test_four_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from grpo_nb.models.device import keep_gradients

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**{**SHAPE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits, dtype=torch.float32).eval()
    keep_gradients(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    prompts = prompts_of(5, 9, 3)
    found = InPlace(model).generate(prompts, 2, greedy(8))
    assert found.completions == [alone(model, prompts[i], 8) for i in found.owner]


def test_bfloat16_runs_and_is_near():
    model = fresh("llama").to(torch.bfloat16)
    engine = InPlace(model)
    found = engine.generate(prompts_of(5, 9), 2, Sampling(max_tokens=8, seed=0))
    assert len(found) == 4 and engine.deviation() < 0.05
    assert InPlace(fresh("llama"), dtype=torch.bfloat16).generate(prompts_of(5), 2, Sampling(max_tokens=4)).tokens == 8


# What stays as it was

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [InPlace, HuggingFace])
def test_modes_are_restored(training, make):
    model = adapted().train(training)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    base, config = model.get_base_model(), model.config
    config.use_cache = False
    base.model.layers[1].training = not training # one module is otherwise
    def state():
        return (
            [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()], config.use_cache,
            base.generation_config.to_dict(), config._attn_implementation, [set(vars(m)) for m in model.modules()],
            [p.requires_grad for p in model.parameters()], torch.is_grad_enabled(),
        )
    before = state()
    make(model).generate(prompts_of(5, 4), 2, Sampling(max_tokens=4))
    assert state() == before
    assert model(torch.tensor(prompts_of(5))).logits.requires_grad


@contextmanager
def interrupts(engine):
    "Another thread interrupts again and again: an interrupt between two calls is forgotten by the next."
    over = threading.Event()
    def work():
        while not over.wait(0.05): engine.interrupt()
    thread = threading.Thread(target=work)
    thread.start()
    try: yield
    finally:
        over.set()
        thread.join()


def test_interrupt_and_again():
    model, prompts = made("qwen3"), prompts_of(5, 9)
    engine = InPlace(model)
    expected = engine.generate(prompts, 2, greedy(6)).completions
    with interrupts(engine), pytest.raises(KeyboardInterrupt):
        for _ in range(10_000): engine.generate(prompts, 2, Sampling(max_tokens=50))
    assert engine.generate(prompts, 2, greedy(6)).completions == expected


def test_interrupt_between_two_tokens(monkeypatch):
    "One step after the flag is set nothing runs any more; Ctrl-C inside a step leaves the engine as good as new."
    model, prompts, steps = made("qwen3"), prompts_of(5, 9), []
    engine, real = InPlace(model), inplace.step

    def step(*args):
        real(*args)
        steps.append(1)
        if len(steps) == 3: engine.interrupt()
        if len(steps) == 6: raise KeyboardInterrupt

    monkeypatch.setattr(inplace, "step", step)
    for n in 3, 6:
        with pytest.raises(KeyboardInterrupt): engine.generate(prompts, 2, Sampling(max_tokens=50))
        assert len(steps) == n
    assert engine.generate(prompts, 1, greedy(6)).completions == [alone(model, p, 6) for p in prompts]


def test_interrupt_of_hugging_face():
    engine = HuggingFace(made("qwen3"))
    with interrupts(engine), pytest.raises(KeyboardInterrupt):
        for _ in range(1000): engine.generate(prompts_of(5), 1, Sampling(max_tokens=40))
    assert engine.generate(prompts_of(5), 1, Sampling(max_tokens=4)).tokens <= 4


# What is refused

def test_a_cache_too_small_says_so_before_anything_runs(monkeypatch):
    engine = InPlace(made("qwen3"), cache_tokens=20)
    monkeypatch.setattr(inplace, "prefill", lambda *a: pytest.fail("something ran"))
    with pytest.raises(EngineError, match=r"20 tokens.*needs 25: a prompt of 9 and 16.*cache_tokens=25"):
        engine.generate(prompts_of(5, 9), 4, Sampling(max_tokens=16))


@pytest.mark.parametrize("wrong,words", [
    (dict(temperature=0), "temperature=0 must be"),
    (dict(top_p=0), "top_p=0"),
    (dict(top_k=-1), "top_k=-1"),
    (dict(min_p=2), "min_p=2"),
    (dict(max_tokens=0), "max_tokens=0"),
    (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(stop=[""]), "stop=''"),
    (dict(seeds=[1.5]), "seed=1.5"),
])
def test_wrong_sampling(wrong, words):
    with pytest.raises(ValueError, match=words): Sampling(**wrong)


@pytest.mark.parametrize("prompts,n,sampling,words", [
    ([], 1, Sampling(), "prompts is empty"),
    ([[]], 1, Sampling(), r"prompts\[0\] is empty"),
    ([[3]], 0, Sampling(), "n=0"),
    ([[3]], [1, 2], Sampling(), "n has 2 entries"),
    ([[3]], 2, Sampling(max_tokens=[3]), "max_tokens has 1"),
    ([[3]], 2, Sampling(seeds=[1]), "seeds has 1"),
])
def test_wrong_requests(prompts, n, sampling, words):
    for engine in (InPlace(made("qwen3")), HuggingFace(made("qwen3"))):
        with pytest.raises(ValueError, match=words): engine.generate(prompts, n, sampling)


def test_what_is_not_known():
    other = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(EngineError, match="GPTNeoXForCausalLM is none of the shapes.*engine='hf'"): InPlace(other)
    hooked = fresh()
    hooked.model.layers[1].mlp.register_forward_hook(lambda m, i, o: o * 2)
    assert "hook" in why_not_inplace(hooked)
    dynamic = fresh("llama")
    dynamic.config.rope_parameters = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    assert not why_not_inplace(dynamic, 100) and "dynamic rotary" in why_not_inplace(dynamic, 200)


def test_a_model_that_computes_otherwise_is_found_out():
    model = fresh()

    class Twice(type(model.model.layers[0].mlp)):
        def forward(self, x): return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Twice
    with pytest.raises(EngineError, match="logits differ"): InPlace(model)


def test_generation_configs():
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=None, max_new_tokens=7, eos_token_id=[1, 2])
    assert read_config(config)[0].stop_token_ids == (1, 2)
    for name, value in dict(num_beams=2, suppress_tokens=[3], no_repeat_ngram_size=2, min_new_tokens=2, typical_p=0.5).items():
        assert read_config(GenerationConfig(**{name: value}))[1] == name
    assert read_config(GenerationConfig(do_sample=True), GenerationConfig(no_repeat_ngram_size=3))[1] == "no_repeat_ngram_size"


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    cpu = torch.device("cpu")
    alone, before = inplace.neighbours(), inplace.free_bytes(cpu)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert alone == 1 and inplace.neighbours() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4") # of two machines
    assert inplace.neighbours() == 4 and before / 8 < inplace.free_bytes(cpu) < before / 2
