"""vLLM in this process: Hugging Face's tokens, the training step's log-probs, the weights of this moment; and what is refused.

`pytest -m vllm` in an environment that has vLLM (`make test-vllm` makes one with its CPU build); the tests of what is refused
run everywhere.
"""
import gc
import io
import logging
import os
import random
import signal
import sys
import threading
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from torchrun import in_two_processes

from grpo_nb import tasks
from grpo_nb.engines.vllm import engine as module
from grpo_nb.engines.vllm import start as vllm_start
from grpo_nb.engines.base import EngineError, Sampling, sampling_logits
from grpo_nb.engines.hf import HuggingFace
from grpo_nb.engines.vllm.engine import VLLMEngine
from grpo_nb.models import installed
from grpo_nb.engines.vllm.start import check_version, request_options
from grpo_nb.engines.vllm.weights import adapter_of, why_not_swap, weights_of
from grpo_nb.tasks.tiny import make_tokenizer
from grpo_nb.trainers.state import vllm_engines

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` makes an environment with its CPU build"
    ),
]
SHAPE = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)
ENDS = tuple(range(60, 70))


@pytest.fixture(scope="module")
def tokenizer(): return make_tokenizer(["1 2"], 320)


def model_of(family="Qwen3", tied=True):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(model, 0.15)
    return model


def adapted(model, adapter="default", **options):
    model = get_peft_model(
        model, LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules="all-linear"), **options}), adapter_name=adapter
    )
    shake(model, 0.1, "lora_B")
    return model


def shake(model, std, only=""):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name and p.dim() > 1: p.add_(torch.randn_like(p) * std)


def prompts_of(*lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(8, 300, (n,), generator=g).tolist() for n in lengths]


PROMPTS = prompts_of(5, 9, 3, 17)


def greedy(n=16, **more): return Sampling(greedy=True, max_tokens=n, stop_token_ids=ENDS, **more)


def same(engine, model, sampling=None, counts=2):
    "Whether the engine and Hugging Face give the same tokens; the log-probs always agree."
    sampling = sampling or greedy()
    ours, theirs = (e.generate(PROMPTS, counts, sampling) for e in (engine, HuggingFace(model, engine.tokenizer)))
    if ours.completions != theirs.completions: return False
    assert ours.finished == theirs.finished
    for a, b in zip(ours.logps, theirs.logps): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)
    return True


@pytest.fixture(scope="module")
def running():
    "Engines by what they were made for; one lives at a time, and the last one asked for is kept."
    kept = {}

    def get(key, make):
        if key not in kept or kept[key].llm is None:
            for e in kept.values(): e.close()
            kept.clear()
            kept[key] = make()
        return kept[key]
    yield get
    for e in kept.values(): e.close()


SETTINGS = dict(
    per_device_train_batch_size=8, num_generations=4, max_completion_length=10, bf16=False, use_cpu=True, report_to=[],
    gradient_checkpointing=False, max_steps=3, save_strategy="no", learning_rate=1e-2, logging_steps=1, beta=0.0,
)
DATA = [{"prompt": f"{i} 3"} for i in range(8)]


def reward_of(completion_ids, **_): return [float(len(set(c))) for c in completion_ids]


@pytest.fixture
def patched(monkeypatch):
    "TRL with our patches, and a function that makes a trainer."
    from datasets import Dataset

    from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    PatchFastRL("grpo")
    PatchFastRL("rloo")

    def make(algorithm, model, folder, **more):
        import trl
        kinds = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[algorithm]
        return kinds[1](
            model=model, args=kinds[0](**{**SETTINGS, "output_dir": str(folder), **more}),
            processing_class=make_tokenizer(["1 2"], 320), train_dataset=Dataset.from_list(DATA),
            reward_funcs=reward_of,
        )
    yield make
    UnpatchFastRL()


# What is refused, before vLLM is imported

def test_the_extra_asks_for_the_versions_that_work():
    line = next(
        x
        for x in (Path(__file__).resolve().parent.parent / "settings.ini").read_text().splitlines()
        if x.strip().startswith("vllm>")
    )
    asked = Requirement(line.strip()).specifier
    assert installed.OLDEST in asked and installed.NEWEST in asked and "0.21.0" not in asked and "0.34.0" not in asked


def test_versions(tmp_path, monkeypatch):
    for good in ("0.22.0", "0.24.0+cu129", "0.31.0", "0.33.0"): assert check_version(good) == good
    for bad in ("0.21.3", "0.34.0", "1.0", "dev"):
        with pytest.raises(EngineError, match="0.22.0 to 0.33.0"): check_version(bad)
    assert check_version("0.40.0", any_version=True) == "0.40.0"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/request.py").write_text("class LoRARequests: pass")
    assert {"lora/request.py: LoRARequest", "v1/worker/gpu_worker.py: wake_up"} <= set(installed.lacking(tmp_path))
    monkeypatch.setattr(installed, "lacking", lambda: ["sampling_params.py: min_p"])
    with pytest.raises(EngineError, match="0.40.0 lacks what is used of it: sampling_params.py: min_p. 0.22.0 to 0.33.0 have it"):
        check_version("0.40.0", any_version=True)
    with pytest.raises(EngineError, match="pip install vllm"): check_version("")


@pytest.mark.parametrize("options,words", [
    (dict(adapter="swop"), "Did you mean 'swap'"),
    (dict(adapter="swap"), "no adapter"),
    (dict(max_num_seqs=0), "max_num_seqs=0"),
    (dict(max_model_len=2.5), "max_model_len=2.5"),
    (dict(gpu_memory_utilization=1.5), "gpu_memory_utilization=1.5"),
    (dict(log_level="loud"), "log_level='loud'"),
])
def test_arguments(options, words, monkeypatch):
    monkeypatch.setattr(installed, "vllm_version", lambda: "0.32.0")
    with pytest.raises(ValueError, match=words): VLLMEngine(model_of(), **options)


def test_another_version_starts_nothing(monkeypatch):
    monkeypatch.setattr(installed, "vllm_version", lambda: "0.21.0")
    monkeypatch.setattr(VLLMEngine, "_start", lambda self: pytest.fail("started"))
    with pytest.raises(EngineError, match="vLLM 0.21.0 is not known to work"): VLLMEngine(model_of())


def test_fast_inference(monkeypatch):
    for found, name, words in (
        ("", "inplace", "not installed, so the patched trainers sample in place"),
        ("0.9.0", "inplace", "vLLM 0.9.0 is not known"),
        ("0.24.0", "vllm", "vLLM 0.24.0 is installed, and the patched trainers sample with it"),
    ):
        monkeypatch.setattr(installed, "vllm_version", lambda: found)
        assert installed.fast_engine()[0] == name and words in installed.fast_engine()[1]


def test_standard_output_without_a_descriptor(monkeypatch):
    "As in some notebooks: vLLM before 0.32 asks for one while it starts."
    page = io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    with vllm_start.untouched():
        os.dup2(os.dup(sys.stdout.fileno()), sys.stdout.fileno())
        print("seen")
    assert page.getvalue() == "seen\n" and sys.stdout is page


def test_fast_inference_under_sharding(monkeypatch, capsys):
    from types import SimpleNamespace

    from grpo_nb.ground.events import said
    from grpo_nb.models.load import Settings
    from grpo_nb.trainers.colocate import choose

    said.clear()
    monkeypatch.setattr(installed, "vllm_version", lambda: "0.24.0")
    model, args = model_of(), SimpleNamespace(use_vllm=False, engine="auto", fsdp=["full_shard"], deepspeed=None)
    model._grpo_nb = Settings("digits", 128, torch.float32, False, True, 0.6, 16)
    assert not choose(args, model, 2) and not args.use_vllm and "without vLLM" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args.fsdp = []
    assert not choose(args, model, 2)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert choose(args, model, 2) and args.use_vllm


def test_request_options():
    s = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, stop=("a",), stop_token_ids=(4,))
    found = request_options(s, 7, -1)
    assert found["seed"] == 2**63 - 1 and found["max_tokens"] == 7
    assert found["top_k"] == 3 and found["detokenize"] and found["ignore_eos"]
    assert request_options(greedy(), 7, None)["temperature"] == 0 and not request_options(greedy(), 7, None)["detokenize"]


# What the training model hands over

@pytest.mark.parametrize("options", [
    {}, dict(use_rslora=True), dict(use_dora=True), dict(modules_to_save=["lm_head"]),
    dict(target_modules=["q_proj", "embed_tokens"]), dict(rank_pattern={"q_proj": 2}),
], ids=str)
def test_folded_weights_are_the_merged_models(options):
    model = adapted(model_of(tied=False), **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    given = dict(weights_of(model))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    merged = dict(model.merge_and_unload().named_parameters())
    assert set(given) == set(merged) and all(torch.allclose(given[n], p, atol=1e-6) for n, p in merged.items())


def test_a_disabled_adapter_is_left_out():
    model = adapted(model_of())
    plain = dict(model_of().named_parameters())
    with model.disable_adapter(): assert all(torch.equal(w, plain[n]) for n, w in weights_of(model))


def test_a_tied_head_with_an_adapter_is_refused():
    model = adapted(model_of(), target_modules=["lm_head", "q_proj"])
    with pytest.raises(EngineError, match="shares its weight"): list(weights_of(model))


def test_what_can_be_swapped():
    assert not why_not_swap(adapted(model_of()), 4)
    for options, words in (
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(rank_pattern={"q_proj": 2}), "different ranks"),
        (dict(bias="lora_only"), "biases"),
        (dict(r=8), "max_lora_rank=4"),
    ):
        assert words in why_not_swap(adapted(model_of(tied=False), **options), 4)
    model = adapted(model_of(), use_rslora=True)
    rank, tensors = adapter_of(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    a, b = (tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    assert rank == 4 and torch.allclose(b @ a, layer.get_delta_weight("default"), atol=1e-6)


# Inside vLLM

class TestVLLM:
    pytestmark = needs_vllm

    def test_what_is_used_of_it_is_there(self): assert not installed.lacking()

    @pytest.mark.parametrize("family", ["Llama", "Qwen3"])
    @pytest.mark.parametrize("way", ["swap", "fold"])
    def test_greedy_is_hugging_face_and_a_change_shows_at_once(self, family, way, tokenizer):
        model = adapted(model_of(family, tied=family == "Qwen3"))
        with VLLMEngine(model, tokenizer, adapter=way) as engine:
            assert engine.way == way and same(engine, model)
            for _ in range(2):
                shake(model, 0.1, "lora_")
                assert not same(engine, model)
                engine.sync()
                assert same(engine, model)

    @pytest.mark.parametrize("tied", [True, False])
    def test_full_weights(self, tied, tokenizer):
        model = model_of(tied=tied)
        with VLLMEngine(model, tokenizer) as engine:
            assert engine.way == "full" and same(engine, model)
            for _ in range(2):
                shake(model, 0.1)
                assert not same(engine, model)
                engine.sync(model)
                assert same(engine, model)

    @pytest.mark.parametrize("family,tied", [("Llama", False), ("Qwen2", True), ("Qwen3", True), ("Qwen3", False)])
    def test_one_copy_of_trained_weights(self, family, tied, tokenizer):
        "What changes in the training model shows in the very next sampling, without a sync, though a prompt's pages are cached."
        model = model_of(family, tied)
        objects, before = list(model.parameters()), {n: p.clone() for n, p in model.state_dict().items()}
        with VLLMEngine(model, tokenizer, share=True) as engine:
            inner = engine.llm.model_executor.driver_worker.worker.model_runner.get_model()
            theirs = {p.data_ptr() for p in inner.parameters()}
            assert engine.way == "full" and engine.copied_bytes == 0
            assert engine.shared_bytes == sum(p.nbytes for p in model.parameters())
            attention = model.model.layers[1].self_attn
            assert {
                attention.q_proj.weight.data_ptr(), attention.o_proj.weight.data_ptr(),
                model.model.norm.weight.data_ptr(), model.lm_head.weight.data_ptr(),
            } <= theirs
            assert all(a is b for a, b in zip(objects, model.parameters()))
            assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())
            assert same(engine, model)
            for part in "k_proj", "up_proj", "norm", "embed_tokens":
                with torch.no_grad(): [p.add_(torch.randn_like(p) * 0.2) for n, p in model.named_parameters() if part in n]
                assert same(engine, model)
            long = prompts_of(200)
            for _ in range(2):
                shake(model, 0.1)
                wanted = HuggingFace(model, tokenizer).generate(long, 2, greedy())
                assert engine.generate(long, 2, greedy()).completions == wanted.completions
            model.float().to("cpu")
            attention.k_proj.weight.data = attention.k_proj.weight.data * -1 # moved
            assert same(engine, model)
            assert attention.k_proj.weight.data_ptr() == attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
            engine.sync(model)
            with pytest.raises(EngineError, match="another"): engine.sync(model_of(family, tied))
        assert inner.lm_head.weight.data_ptr() in theirs # closing freed nothing of ours
        model(torch.tensor(PROMPTS[:1]))

    @pytest.mark.parametrize("way", ["fold", "swap"])
    def test_one_copy_of_a_frozen_base(self, way, tokenizer):
        "The adapter comes in and goes out again, and the base stays bit for bit."
        model = adapted(model_of())
        with VLLMEngine(model, tokenizer, adapter=way, share=True) as engine:
            base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
            assert engine.way == way and engine.copied_bytes == 0 and engine.shared_bytes == sum(p.nbytes for p in base.values())
            for _ in range(3):
                if way == "swap": engine.sync()
                assert same(engine, model)
                assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if "lora_" not in n)
                shake(model, 0.1, "lora_")
            # changed by someone: kept
            with torch.no_grad(): model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight.mul_(1.5)
            changed = model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight.clone()
            if way == "swap": engine.sync()
            assert same(engine, model)
            assert torch.equal(changed, model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight)

    @pytest.mark.parametrize("options", [
        dict(modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj", "embed_tokens", "down_proj"], use_rslora=True),
        dict(rank_pattern={"v_proj": 2}),
    ], ids=str)
    def test_other_adapters_on_one_copy(self, options, tokenizer):
        model = adapted(model_of("Qwen2", tied=False), **options)
        with VLLMEngine(model, tokenizer, share=True) as engine:
            assert engine.way == "fold" and engine.copied_bytes == 0
            for _ in range(2):
                shake(model, 0.1, "lora_" if "modules_to_save" not in options else "modules_to_save")
                assert same(engine, model)
        with pytest.raises(ValueError, match="share=True: .* variant of LoRA"):
            VLLMEngine(adapted(model_of(), use_dora=True), tokenizer, share=True)

    def test_never_left_folded(self, tokenizer, monkeypatch):
        model = adapted(model_of())
        engine = VLLMEngine(model, tokenizer, share=True)
        base = {n: p.clone() for n, p in model.named_parameters()}
        def whole():
            return all(torch.equal(base[n], p) for n, p in model.named_parameters()) and not any(
                getattr(m, "merged", False) for m in model.modules()
            )
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt): engine.generate(PROMPTS, 500, Sampling(max_tokens=200, top_k=1))
        timer.join()
        assert whole() and same(engine, model)
        inside = []
        monkeypatch.setattr(engine.llm, "step", lambda: inside.append(whole()) or (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(EngineError, match="broken"): engine.generate(PROMPTS, 1, greedy())
        assert inside == [False] and whole() and engine.llm is None
        with VLLMEngine(model, tokenizer, share=True) as again: assert same(again, model)
        assert whole()

    def test_a_vocabulary_that_is_padded_and_a_norm_that_is_not_shared(self, tokenizer):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**{**SHAPE, "vocab_size": 330}, tie_word_embeddings=True)
        ).eval()
        shake(model, 0.15)
        model.model.norm.to(torch.float64)
        with VLLMEngine(model, tokenizer, share=True) as engine:
            assert engine.copied_bytes == 64 * 4 and engine.shared.copied == ("model.norm.weight",)
            model.model.norm.to(torch.float32)
            assert same(engine, model)
            with torch.no_grad(): model.model.norm.weight.mul_(torch.linspace(0.2, 3, 64))
            assert same(engine, model)

    def test_half_precision_beside_full_is_a_copy(self, tokenizer):
        with pytest.raises(ValueError, match="share=True: the model holds float32, and vLLM computes in bfloat16"):
            VLLMEngine(plain_model(), tokenizer, dtype=torch.bfloat16, share=True)

    def test_too_little_room_for_the_originals(self, tokenizer, monkeypatch):
        monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
        with pytest.raises(ValueError, match="share=True: the copy of the originals"):
            VLLMEngine(adapted(model_of()), tokenizer, adapter="fold", share=True)
        model = adapted(model_of())
        with VLLMEngine(model, tokenizer, share=True) as engine:
            assert engine.way == "swap" and engine.shared_bytes and same(engine, model)

    def plain(self, running, tokenizer):
        model = plain_model()
        return running("plain", lambda: VLLMEngine(model, tokenizer, max_num_seqs=32)), model

    def test_stop_strings_and_limits(self, running, tokenizer):
        engine, model = self.plain(running, tokenizer)
        free = engine.generate(PROMPTS, 1, greedy(12)).completions
        at, k = next(
            (i, j)
            for i, row in enumerate(free)
            for j, t in enumerate(row)
            if j and tokenizer.decode([t]).isascii() and tokenizer.decode([t]).strip()
        )
        word = tokenizer.decode(free[at][k:k + 1])
        assert same(engine, model, Sampling(greedy=True, max_tokens=12, stop=(word,), stop_token_ids=ENDS), 1)
        found = engine.generate(PROMPTS, 1, Sampling(greedy=True, max_tokens=12, stop=(word,), stop_token_ids=ENDS))
        assert found.finished[at] == "stop"
        assert word in tokenizer.decode(found.completions[at])
        assert len(found.completions[at]) <= k + 1
        assert same(engine, model, Sampling(greedy=True, max_tokens=(3, 1, 9, 12), stop_token_ids=ENDS), 1)
        free = engine.generate(PROMPTS, 1, Sampling(greedy=True, max_tokens=12)).completions
        end = free[1][5]
        found = engine.generate(PROMPTS, 1, Sampling(greedy=True, max_tokens=12, stop_token_ids=(end,)))
        assert found.finished[1] == "eos" and found.completions[1] == free[1][:free[1].index(end) + 1]

    def test_repetition_penalty(self, running, tokenizer):
        "One prompt at a time: Hugging Face counts padding as seen."
        engine, model = self.plain(running, tokenizer)
        sampling = greedy(12, repetition_penalty=1.7)
        ours = engine.generate(PROMPTS, 1, sampling)
        assert (
            ours.completions
            == [HuggingFace(model).generate([p], 1, sampling).completions[0] for p in PROMPTS]
            != engine.generate(PROMPTS, 1, greedy(12)).completions
        )

    def test_logps_are_the_training_steps(self, running, tokenizer):
        engine, model = self.plain(running, tokenizer)
        for sampling in (
            Sampling(max_tokens=20),
            Sampling(max_tokens=20, temperature=0.7),
            Sampling(max_tokens=20, temperature=1.3, top_p=0.8, top_k=40, min_p=0.02),
        ):
            out = engine.generate(PROMPTS, 4, sampling)
            for i, ids, logps in zip(out.owner, out.completions, out.logps):
                with torch.no_grad(): logits = model(torch.tensor([PROMPTS[i] + ids])).logits[0, len(PROMPTS[i]) - 1:-1]
                exact = sampling_logits(logits, sampling).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                assert torch.allclose(exact, torch.tensor(logps), atol=1e-5)

    def test_seeds(self, running, tokenizer):
        engine, _ = self.plain(running, tokenizer)
        each = Sampling(max_tokens=10, seeds=tuple(range(8)))
        a, b = engine.generate(PROMPTS, 2, each), engine.generate(PROMPTS, 2, each)
        assert a.completions == b.completions and a.completions[0] != a.completions[1]
        alone = engine.generate(PROMPTS[2:3], 1, Sampling(max_tokens=10, seeds=(4,)))
        assert alone.completions[0] == a.completions[4] # wherever it stands
        a, b, c = (engine.generate(PROMPTS, 2, Sampling(max_tokens=10, seed=s)).completions for s in (3, 3, 4))
        assert a == b != c
        torch.manual_seed(5)
        a = engine.generate(PROMPTS, 2, Sampling(max_tokens=10)).completions
        follow = torch.rand(1)
        torch.manual_seed(5)
        b = engine.generate(PROMPTS, 2, Sampling(max_tokens=10)).completions
        assert a == b and follow == torch.rand(1) and engine.generate(PROMPTS, 2, Sampling(max_tokens=10)).completions != b

    def test_the_distribution(self, running, tokenizer):
        "The first token of 4,000 completions against the exact probabilities, by chi-square."
        engine, model = self.plain(running, tokenizer)
        sampling = Sampling(max_tokens=1, temperature=0.8, top_k=12, seed=1)
        drawn = torch.tensor([c[0] for c in engine.generate(PROMPTS[:1], 4000, sampling).completions])
        with torch.no_grad(): p = sampling_logits(model(torch.tensor(PROMPTS[:1])).logits[0, -1:], sampling).softmax(-1)[0]
        seen, expected = torch.bincount(drawn, minlength=320).float(), p * 4000
        assert not seen[p == 0].any()
        keep = expected >= 5
        chi, freedom = ((seen - expected)[keep] ** 2 / expected[keep]).sum(), int(keep.sum()) - 1
        assert chi < freedom + 5 * (2 * freedom) ** 0.5

    def test_prefix_cache_is_shared_and_forgotten(self, running, tokenizer):
        engine, _ = self.plain(running, tokenizer)
        prompt = prompts_of(200)
        pool = engine.llm.engine_core.engine_core.scheduler.kv_cache_manager
        def cached(): return sum(b.block_hash is not None for b in pool.block_pool.blocks)
        engine.generate(prompt, 4, greedy(4))
        assert cached() >= 1 # a whole page of the prompt
        engine.sync()
        assert cached() == 0

    def test_bad_requests_leave_it_running(self, running, tokenizer):
        engine, model = self.plain(running, tokenizer)
        for prompts, sampling, words in (
            ([], greedy(), "empty"),
            (PROMPTS, greedy(250), "max_model_len=256"),
            ([[5, 400]], greedy(), "token 400"),
            (PROMPTS, Sampling(seeds=(1,)), "seeds"),
        ):
            with pytest.raises(ValueError, match=words): engine.generate(prompts, 1, sampling)
        assert same(engine, model)

    def test_interrupt(self, running, tokenizer):
        engine, model = self.plain(running, tokenizer)
        for how in (engine.interrupt, lambda: os.kill(os.getpid(), signal.SIGINT)):
            timer = threading.Timer(0.3, how)
            timer.start()
            before = signal.getsignal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt): engine.generate(PROMPTS, 500, Sampling(max_tokens=200, top_k=1))
            timer.join()
            assert signal.getsignal(signal.SIGINT) is before and not engine.llm.has_unfinished_requests()
        assert same(engine, model)

    def test_a_failure_inside_closes_it_and_a_new_one_starts(self, tokenizer, monkeypatch):
        model = plain_model()
        engine = VLLMEngine(model, tokenizer)
        monkeypatch.setattr(engine.llm, "step", lambda: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
        with pytest.raises(EngineError, match="out of memory.*max_num_seqs"): engine.generate(PROMPTS, 1, greedy())
        with pytest.raises(EngineError, match="does not run.*failed while sampling"): engine.generate(PROMPTS, 1, greedy())
        with VLLMEngine(model, tokenizer) as engine: assert same(engine, model)
        with pytest.raises(EngineError, match="closed"): engine.sync()
        engine.close()

    def test_a_cache_that_holds_no_completion(self, tokenizer):
        with pytest.raises(EngineError, match="(?s)could not start.*cache_bytes"):
            VLLMEngine(plain_model(), tokenizer, cache_bytes=1000)
        with VLLMEngine(plain_model(), tokenizer) as engine: assert same(engine, plain_model())

    def test_several_gpus_are_refused(self, tokenizer):
        with pytest.raises(EngineError, match="2 GPUs for one vLLM"): VLLMEngine(plain_model(), tokenizer, tensor_parallel_size=2)

    def test_misspelt_arguments_of_vllm(self, tokenizer):
        with pytest.raises(TypeError, match="Did you mean 'block_size'"): VLLMEngine(plain_model(), tokenizer, blocksize=32)

    def test_a_model_that_vllm_does_not_know(self, tokenizer):
        config = transformers.CodeGenConfig(vocab_size=320, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64)
        with pytest.raises(EngineError, match="could not start"):
            VLLMEngine(transformers.CodeGenForCausalLM(config), tokenizer, model_impl="vllm")

    def test_a_second_one_closes_the_first(self, tokenizer, capsys):
        first = VLLMEngine(plain_model(), tokenizer)
        with VLLMEngine(plain_model(), tokenizer) as second:
            assert first.llm is None and same(second, plain_model())
            first.close()
            assert same(second, plain_model())
        assert not torch.distributed.is_initialized()

    def test_a_small_cache_still_finishes(self, tokenizer):
        "More completions than the cache holds: vLLM lets some wait."
        with VLLMEngine(
            plain_model(), tokenizer, cache_bytes=vllm_start.cache_bytes_for(plain_model().config, 4 * 256, 4)
        ) as engine:
            assert same(engine, plain_model(), greedy(40), 6)

    def test_a_start_leaves_no_trace(self, tokenizer):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        env = dict(os.environ)
        threads = torch.set_num_threads
        with VLLMEngine(plain_model(), tokenizer) as engine:
            assert random.getstate() == states[0]
            assert np.random.get_state()[1].tolist() == states[1]
            assert torch.equal(torch.get_rng_state(), states[2])
            assert dict(os.environ) == env and torch.set_num_threads is threads
            assert torch.get_default_dtype() is torch.float32 and logging.root.manager.disable == 0
            engine.sleep()
            engine.wake() # nothing on a CPU
            assert same(engine, plain_model())

    def test_closing_gives_memory_back(self, tokenizer):
        import weakref
        engine = VLLMEngine(plain_model(), tokenizer)
        inner = weakref.ref(engine.llm.model_executor.driver_worker.worker.model_runner.get_model())
        engine.close()
        gc.collect()
        assert inner() is None

    def test_a_forgotten_engine(self, tokenizer):
        "One that nothing refers to is closed, and the model it read is free."
        import weakref
        model = model_of()
        engine, kept = VLLMEngine(model, tokenizer), weakref.ref(model)
        inner = weakref.ref(engine.llm)
        assert same(engine, model)
        del engine, model
        gc.collect()
        assert inner() is None and kept() is None and not torch.distributed.is_initialized()
        with VLLMEngine(plain_model(), tokenizer) as engine: assert same(engine, plain_model())

    def test_an_adapter_that_vllm_cannot_apply(self, tokenizer):
        model = adapted(model_of(), r=16)
        with VLLMEngine(model, tokenizer, adapter="swap") as engine:
            with pytest.raises(EngineError, match="adapter='fold'"): engine.sync(adapted(model_of(), r=32))
            assert same(engine, model)

    @pytest.mark.parametrize("algorithm,share", [("grpo", None), ("grpo", True), ("rloo", True)])
    def test_in_trls_trainers(self, algorithm, share, tmp_path, monkeypatch, patched):
        "Our engine in the place of TRL's: groups, a sync after each step, log-probs for the correction, weights untouched."
        seen, model = [], adapted(model_of(), target_modules="all-linear")
        real, made = VLLMEngine.generate, VLLMEngine.__init__
        monkeypatch.setattr(
            VLLMEngine, "generate", lambda self, prompts, n, s: seen.append((len(prompts), n, s)) or real(self, prompts, n, s)
        )
        monkeypatch.setattr(VLLMEngine, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "share": share}))
        base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
        trainer = patched(algorithm, model, tmp_path, use_vllm=True)
        trainer.train()
        engine = vllm_engines[trainer.vllm_generation]
        assert len(seen) == 3 and all(n == [4, 4] for _, n, _ in seen)
        assert trainer.processing_class.eos_token_id in seen[0][2].stop_token_ids
        assert bool(engine.shared) == bool(share)
        assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if "lora_" not in n)
        engine.sync()
        assert same(engine, trainer.model) # as trained, to the last step
        if algorithm == "grpo":
            rows = {
                k: v
                for e in trainer.state.log_history
                for k, v in e.items()
                if "importance_sampling_ratio/mean" in k or "logp_difference/mean" in k
            }
            assert all(abs(v - 1) < 1e-3 for k, v in rows.items() if "ratio" in k)
            assert all(abs(v) < 1e-3 for k, v in rows.items() if "difference" in k)
            assert rows
        engine.close()

    @pytest.mark.parametrize("how", ["engine", "fast_inference"])
    def test_vllm_by_name_or_by_the_model(self, how, tmp_path, capsys, patched, monkeypatch):
        "`engine='vllm'`, or a model loaded with `fast_inference=True`, is all; a full fine-tuning, saved, loads as it was trained."
        from grpo_nb.ground.events import said
        from grpo_nb.models.load import Settings

        said.clear()
        made = VLLMEngine.__init__
        monkeypatch.setattr(VLLMEngine, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "share": True}))
        model = model_of()
        if how == "fast_inference": model._grpo_nb = Settings("digits", 128, torch.float32, False, True, 0.6, 16)
        trainer = patched(
            "grpo", model, tmp_path, save_strategy="steps", save_steps=3, **({"engine": "vllm"} if how == "engine" else {})
        )
        engine = vllm_engines[trainer.vllm_generation]
        trainer.train()
        told = capsys.readouterr().out
        first = "engine='vllm' means use_vllm=True" if how == "engine" else "fast_inference=True: completions are sampled by vLLM"
        assert first in told
        assert "are shared" in told
        if how == "fast_inference":
            assert "60% of the GPU" in told and engine.max_model_len == 128 and engine._given["gpu_share"] == 0.6
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3").state_dict()
        assert all(torch.equal(w, loaded[n]) for n, w in trainer.model.state_dict().items()) and same(engine, trainer.model)
        assert engine.copied_bytes == 0 # Adam's updates went into the shared tensors
        engine.close()

    def test_two_processes(self, tmp_path):
        "Under DDP each process has an engine of its own, and closing it leaves their process group alone."
        assert "both sampled from their own weights" in in_two_processes("vllm_script.py", tmp_path)

    def test_a_run_is_stopped_while_it_samples(self, tmp_path, patched):
        "`run.stop()` ends vLLM's sampling between two tokens: the weights are whole, and the next run goes on from the checkpoint."
        from grpo_nb.run.run import GRPORun

        model = adapted(model_of())
        run = GRPORun(
            model, make_tokenizer(["1 2"], 320), reward_of, DATA,
            {**SETTINGS, "output_dir": str(tmp_path), "engine": "vllm", "max_completion_length": 200, "max_steps": 50},
        )
        engine, started = vllm_engines[run.trainer.vllm_generation], threading.Event()
        real = engine._run

        def endless(requests): # from the second step on
            if run.step >= 1: started.set()
            while run.step >= 1: real(requests)
            return real(requests)
        engine._run = endless
        run.start(background=True)
        assert started.wait(60)
        asked = time.perf_counter()
        run.stop()
        run.wait(30)
        assert run.state == "stopped" and run.checkpoint and time.perf_counter() - asked < 5
        assert not engine.llm.has_unfinished_requests() and not any(getattr(m, "merged", False) for m in model.modules())
        again = GRPORun(
            model, make_tokenizer(["1 2"], 320), reward_of, DATA,
            {**SETTINGS, "output_dir": str(tmp_path), "engine": "vllm", "max_steps": run.step + 1},
        )
        again.start(resume=True, background=False)
        assert again.state == "finished" and engine.llm is None
        vllm_engines[again.trainer.vllm_generation].close()

    def test_an_engine_that_dies_in_a_run(self, tmp_path, patched):
        "A clear error, the weights whole and the checkpoint intact; the same trainer, and the next one, go on with a new engine."
        from grpo_nb.run.run import GRPORun

        model = adapted(model_of())
        settings = {**SETTINGS, "output_dir": str(tmp_path), "engine": "vllm", "save_strategy": "steps", "save_steps": 1}
        run = GRPORun(model, make_tokenizer(["1 2"], 320), reward_of, DATA, settings)
        engine = vllm_engines[run.trainer.vllm_generation]
        real = engine.llm.step
        engine.llm.step = lambda: real() if run.step < 1 else (_ for _ in ()).throw(RuntimeError("CUDA out of memory"))
        with pytest.raises(EngineError, match="failed while sampling, and was closed.*Make room"): run.start(background=False)
        assert run.state == "failed" and engine.llm is None
        assert (tmp_path / "checkpoint-1").is_dir() and not torch.distributed.is_initialized()
        run.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        second = vllm_engines[run.trainer.vllm_generation]
        second.sync()
        assert second is not engine and run.step == 3 and same(second, run.trainer.model)
        again = GRPORun(model, make_tokenizer(["1 2"], 320), reward_of, DATA, {**settings, "max_steps": 4})
        again.start(resume=True, background=False)
        assert again.state == "finished" and again.step == 4
        vllm_engines[again.trainer.vllm_generation].close()

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_the_quickstart_task(self, tmp_path, capsys):
        "Sorting four digits: 100 steps with vLLM reach the accuracy that Hugging Face reaches."
        from grpo_nb.app.demo import adapter, quickstart_config
        from grpo_nb.models.load import FastLanguageModel
        from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL
        from grpo_nb.run.run import GRPORun
        from grpo_nb.tasks.tiny import tiny_model

        task = tasks.get("sort_digits", seed=0)
        model, tok = tiny_model(task, seed=0, measure=False)
        model = FastLanguageModel.get_peft_model(model, random_state=0, **adapter)
        def measure(): return tasks.accuracy(model, tok, task.test, task.reward, task.max_completion_length)
        before = measure()
        PatchFastRL("grpo", FastLanguageModel)
        started = time.perf_counter()
        run = GRPORun(model, tok, task.reward, task.train, {**quickstart_config(task, tmp_path, 100, 0), "engine": "vllm"}).start(
            background=False
        )
        seconds, after = time.perf_counter() - started, measure()
        engine = vllm_engines[run.trainer.vllm_generation]
        rewards = [row["value"] for row in run.history if row["name"] == "reward"]
        with capsys.disabled():
            print(
                f"\nvLLM {engine.version}, {engine.way}: accuracy {before:.3f} -> {after:.3f}, "
                f"reward {sum(rewards[:10]) / 10:.2f} -> {sum(rewards[-10:]) / 10:.2f}, {len(rewards)} steps in {seconds:.0f} s, "
                f"engine start {engine.start_seconds:.1f} s, last sync {1000 * engine.sync_seconds:.0f} ms",
                file=sys.stderr,
            )
        engine.close()
        UnpatchFastRL()
        assert after >= 0.93


@cache
def plain_model(): return model_of(tied=False)


class TestExports:
    "What is taken away, served by vLLM itself, and `fast_generate` through vLLM."
    pytestmark = needs_vllm

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        "A model loaded for vLLM, with an adapter that has learnt something."
        from grpo_nb import FastLanguageModel
        at = tmp_path_factory.mktemp("origin")
        own = make_tokenizer(["1 2"], 320)
        model = model_of(tied=False)
        model.generation_config = transformers.GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        for part in model, own: part.save_pretrained(at)
        model, own = FastLanguageModel.from_pretrained(str(at), load_in_4bit=False, fast_inference=True, max_lora_rank=8)
        model = FastLanguageModel.get_peft_model(model, r=4)
        shake(model, 0.1, "lora_B")
        yield model, own
        from grpo_nb.models.load import settings_of
        if (engine := settings_of(model).engine) is not None: engine.close()

    @pytest.mark.parametrize("method", ["merged_16bit", "merged_32bit"])
    def test_vllm_serves_an_export(self, method, trained, tmp_path):
        "vLLM's own LLM on the folder: the greedy answers and log-probs of the folder in transformers."
        from vllm import LLM, SamplingParams

        from grpo_nb import save
        model, own = trained
        save.merged(model, tmp_path / "m", own, method, dtype="bfloat16" if method == "merged_16bit" else None)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
        llm = LLM(model=str(tmp_path / "m"), dtype="float32", max_model_len=128, enforce_eager=True, seed=0)
        try:
            asked = SamplingParams(temperature=0, max_tokens=12, logprobs=0, prompt_logprobs=0, ignore_eos=True)
            for prompt, out in zip(PROMPTS, llm.generate([dict(prompt_token_ids=p) for p in PROMPTS], asked, use_tqdm=False)):
                said = out.outputs[0]
                row = torch.tensor([prompt + list(said.token_ids)])
                with torch.no_grad(): logits = again(row).logits[0, :-1]
                assert logits.argmax(-1)[len(prompt) - 1:].tolist() == list(said.token_ids)
                theirs = [line[t].logprob for t, line in zip(row[0, 1:].tolist(), [*out.prompt_logprobs[1:], *said.logprobs])]
                ours = logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
                assert torch.allclose(torch.tensor(theirs), ours, atol=1e-4)
        finally: llm.llm_engine.engine_core.shutdown()

    def test_fast_generate_with_an_adapter_and_without(self, trained, tmp_path, capsys):
        "What `load_lora` returned is sampled by vLLM; None is the model as it was before, though vLLM holds the adapter."
        from grpo_nb.engines.vllm.words import SamplingParams
        from grpo_nb.models.load import settings_of
        model, own = trained
        model.save_lora(tmp_path / "a")
        first = model.load_lora(tmp_path / "a")
        params, prompts = SamplingParams(temperature=0, max_tokens=10, logprobs=0), [dict(prompt_token_ids=p) for p in PROMPTS]

        def theirs(): # transformers, with what is in the model now
            found = [model.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False)[0, len(p):].tolist() for p in PROMPTS]
            return [f[:f.index(own.eos_token_id) + 1] if own.eos_token_id in f else f for f in found]

        def ours(lora): return [list(o.outputs[0].token_ids) for o in model.fast_generate(prompts, params, lora_request=lora)]
        expected = theirs()
        with model.disable_adapter(): plain = theirs()
        assert expected != plain
        assert ours(first) == expected and settings_of(model).engine.name == "vllm"
        assert ours(None) == plain and ours(first) == expected
        shake(model, 0.2, "lora_B") # trained on
        assert ours(first) == expected, "a file that was read is that adapter, whatever the model has learnt since"
        model.save_lora(tmp_path / "b")
        now = theirs()
        assert now != expected and ours(model.load_lora(tmp_path / "b")) == now and ours(first) == expected and ours(None) == plain
