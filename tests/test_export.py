"""Taking a model away: what is written, loaded anew, is what was trained, or it is not there."""
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from grpo_nb import FastLanguageModel, save, tasks
from grpo_nb.ground.events import notices
from grpo_nb.models import folder as folder_module
from grpo_nb.models import merge, proof, stream
from grpo_nb.tasks.tiny import make_tokenizer

FEW = ("What is 17 + 25?", "Steps:\n\n1.  2")
slow = pytest.mark.slow
FAMILIES = "llama", "gemma2", "gpt2", *(pytest.param(k, marks=slow) for k in (
    "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gemma", "granite", "olmo2", "phi", "qwen3_moe", "mixtral"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([f"Sort {n}{n + 1}" for n in range(10)], 280)


def small(kind, tokenizer, dtype=torch.float32, **more):
    "A random model of a family with weights large enough that log-probs differ."
    own = dict(vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
               eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    if kind == "phi3": own.pop("head_dim")
    if kind == "gpt2": own = dict(vocab_size=own["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=128)
    if kind in ("gemma2", "gemma3_text"): own |= dict(query_pre_attn_scalar=8, sliding_window=8)
    if kind == "gemma3_text": own |= dict(num_hidden_layers=6)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **own | more)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 0.15)
            else: p.add_(0.1 * torch.randn_like(p))
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model


def adapted(model, **more):
    "With an adapter that has learnt something."
    found = get_peft_model(model, LoraConfig(**dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | more))
    learn(found)
    return found.eval()


def learn(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name: p.normal_(0, 0.1)
            if "modules_to_save" in name or "trainable_tokens_delta" in name: p.add_(0.1 * torch.randn_like(p))


def good(saved, exact=False):
    "What was written is the trained model, and the adapter is in it."
    one, *by_llama_cpp = saved.proofs
    assert all(p.method == f"{one.method} in llama.cpp" for p in by_llama_cpp), saved # where its binding is installed
    for p in saved.proofs: assert p.is_good and p.off <= p.allowed and (p.learnt is None or p.learnt > 0.05), str(p)
    if exact: assert one.difference < 1e-4 and one.same == one.of, str(one)
    else: assert one.difference <= one.explained + one.allowed, str(one)
    return one


# ---- every family, merged

@pytest.mark.parametrize("kind", FAMILIES)
def test_merged_is_what_was_trained(kind, tokenizer, tmp_path):
    saved = save.merged(adapted(small(kind, tokenizer)), tmp_path / "m", tokenizer, "merged_32bit", prompts=FEW)
    good(saved, exact=True)
    assert set(os.listdir(tmp_path)) == {"m"} and set(saved.files) == set(os.listdir(tmp_path / "m"))


# ---- every kind of adapter

KINDS = {
    "rslora": dict(use_rslora=True, r=8), "dora": dict(use_dora=True), "bias": dict(bias="all"),
    "lora_bias": dict(lora_bias=True, target_modules=["q_proj"]),
    "head": dict(modules_to_save=["lm_head"], target_modules=["q_proj"]),
    "embedding": dict(modules_to_save=["embed_tokens"], target_modules=["q_proj"]),
    "both": dict(modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"]),
    "on_embedding": dict(target_modules=["embed_tokens", "v_proj"]), "on_head": dict(target_modules=["lm_head"]),
    "tokens": dict(trainable_token_indices=[3, 5, 9], target_modules=["q_proj"]),
    "mlp_in_full": dict(modules_to_save=["mlp"], target_modules=["q_proj"]),
    "ranks": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
}


QUICK = ("dora", True), ("both", True), ("on_embedding", True), ("tokens", True), ("bias", False), ("on_head", False)
TABLE = [pytest.param(k, tied, marks=[] if (k, tied) in QUICK else slow) for k in KINDS for tied in (True, False)]


@pytest.mark.parametrize("kind,tied", TABLE)
def test_every_kind_of_adapter(kind, tied, tokenizer, tmp_path):
    model = adapted(small("qwen2", tokenizer, tie_word_embeddings=tied), **KINDS[kind])
    before = {n: p.clone() for n, p in model.named_parameters()}
    good(save.merged(model, tmp_path / "m", tokenizer, "merged_32bit", prompts=FEW), exact=True)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "the trained model was changed"
    parted = kind in ("head", "embedding", "both", "on_embedding", "on_head")
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and not parted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits_are_merged_in_thirty_two(dtype, tokenizer, tmp_path):
    "A 16-bit model with a float32 adapter: rounded once, and in its own format."
    model = adapted(small("llama", tokenizer, dtype))
    saved = save.merged(model, tmp_path / "m", tokenizer, prompts=FEW)
    one = good(saved)
    assert one.difference < 0.3
    name = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == name
    from safetensors.torch import load_file
    weights = load_file(tmp_path / "m/model.safetensors")
    theirs = adapted(small("llama", tokenizer, dtype)).float().merge_and_unload().state_dict()
    for n, w in weights.items(): assert w.dtype == dtype and torch.equal(w, theirs[n].to(dtype)), n


def test_two_adapters_at_once(tokenizer, tmp_path):
    model = adapted(small("llama", tokenizer))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    learn(model)
    good(save.merged(model, tmp_path / "m", tokenizer, "merged_32bit", prompts=FEW), exact=True)
    model.set_adapter("second")
    good(save.merged(model, tmp_path / "one", tokenizer, "merged_32bit", prompts=FEW), exact=True)


def test_all_weights_trained(tokenizer, tmp_path):
    one = good(save.merged(small("qwen3", tokenizer), tmp_path / "m", tokenizer, "merged_32bit", prompts=FEW), exact=True)
    assert one.learnt is None


def test_added_tokens_travel(tmp_path):
    "An embedding that was resized, and the tokens that it was resized for."
    own = make_tokenizer(["Sort 12"], 270)
    model = small("qwen2", own)
    own.add_tokens(["<think>", "</think>"])
    own.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    model.resize_token_embeddings(len(own) + 1)
    found = adapted(model, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    good(save.merged(found, tmp_path / "m", own, "merged_32bit", prompts=FEW), exact=True)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert again("<think>a<|tool|>")["input_ids"] == own("<think>a<|tool|>")["input_ids"]


# ---- what travels

def test_ends_template_licence_and_length_travel(tokenizer, tmp_path):
    origin = tmp_path / "origin"
    model = small("qwen2", tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 5]
    model.generation_config.temperature = 0.7 # without do_sample: transformers itself refuses to save this
    origin.mkdir()
    (origin / "LICENSE").write_text("May be used.")
    (origin / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Origin\n")
    model.config._name_or_path = str(origin)
    tokenizer.model_max_length = 17
    try: save.merged(adapted(model), tmp_path / "m", tokenizer, prompts=FEW)
    finally: tokenizer.model_max_length = 10**30
    said = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert said["eos_token_id"] == [tokenizer.eos_token_id, 5] and said["temperature"] == 0.7
    assert (tmp_path / "m/LICENSE").read_text() == "May be used."
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert again.model_max_length == 128 and again.eos_token == tokenizer.eos_token
    assert again.chat_template == tokenizer.chat_template
    card = (tmp_path / "m/README.md").read_text()
    assert "license: apache-2.0" in card and "nats" in card and str(tmp_path) not in card


def test_the_card_says_what_the_run_was(tokenizer, tmp_path):
    record = SimpleNamespace(name="first|try", state="finished", step=20, total_steps=20, seed=3, note="two numbers",
                             settings={"learning_rate": 2e-4, "rewards": ["exact_answer"]}, versions={"trl": "1.16.0"},
                             held_out=[dict(step=20, correct=37, n=40, low=0.8, high=0.98, name="larger")])
    save.merged(adapted(small("qwen2", tokenizer)), tmp_path / "m", tokenizer, prompts=FEW, record=record)
    card = (tmp_path / "m/README.md").read_text()
    for words in ("finished", "20 of 20", "seed 3", "two numbers", "0.0002", "exact_answer", "1.16.0", "37 of 40"):
        assert words in card, words
    assert card.startswith("---\n") and "library_name: transformers" in card


# ---- an export that is off

def test_what_is_off_is_not_left_behind(tokenizer, tmp_path, monkeypatch):
    "An adapter that was forgotten: found, named, removed."
    model = adapted(small("llama", tokenizer))
    with monkeypatch.context() as patched:
        base = {n: p.detach().clone() for n, p in small("llama", tokenizer).state_dict().items()}
        patched.setattr(save, "write_weights", lambda w, *a, **k: folder_module.write_weights(base, *a, **k))
        with pytest.raises(save.ExportError, match="nats away.*removed"): save.merged(model, tmp_path / "m", tokenizer, prompts=FEW)
    assert not os.listdir(tmp_path)
    wrong = transformers.AutoConfig.for_model("llama", rope_parameters=dict(rope_type="default", rope_theta=77.0))
    real = save.write_rest

    def other_positions(*args):
        real(*args)
        said = json.loads((args[2] / "config.json").read_text())
        (args[2] / "config.json").write_text(json.dumps(said | {"rope_parameters": wrong.rope_parameters}))
    monkeypatch.setattr(save, "write_rest", other_positions)
    with pytest.raises(save.ExportError): save.merged(model, tmp_path / "m", tokenizer, prompts=FEW)
    assert not os.listdir(tmp_path)


def test_a_tokenizer_that_reads_otherwise_is_found(tokenizer, tmp_path, monkeypatch):
    other = make_tokenizer(["Sort 12"], 262)
    real = save.write_rest
    monkeypatch.setattr(save, "write_rest", lambda model, t, *a: real(model, other, *a))
    model = small("qwen2", tokenizer)
    with pytest.raises(save.ExportError, match="tokenizer"): save.merged(model, tmp_path / "m", tokenizer, prompts=FEW)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("at", ["_shard", "write_tokenizer", "_put"])
def test_nothing_half_written_stays(error, at, tokenizer, tmp_path, monkeypatch):
    place = tmp_path / "m"
    place.mkdir()
    (place / "mine.txt").write_text("mine")

    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(folder_module, at, fails)
    model = adapted(small("qwen2", tokenizer))
    with pytest.raises(type(error)) as caught: save.merged(model, place, tokenizer, prompts=FEW)
    if isinstance(error, OSError): assert "disk is full" in str(caught.value)
    assert os.listdir(tmp_path) == ["m"] and os.listdir(place) == ["mine.txt"]


def test_an_earlier_export_gives_way_and_other_files_stay(tokenizer, tmp_path):
    model = adapted(small("qwen2", tokenizer))
    first = save.merged(model, tmp_path / "m", tokenizer, prompts=FEW, max_shard_size=20_000)
    assert len([f for f in first.files if f.endswith(".safetensors")]) > 2
    good(first)
    (tmp_path / "m/mine.txt").write_text("mine")
    good(save.merged(model, tmp_path / "m", tokenizer, prompts=FEW))
    left = set(os.listdir(tmp_path / "m"))
    assert {"mine.txt", "model.safetensors"} <= left and not any("-of-" in f or "index" in f for f in left)


def test_infinite_weights_and_too_large_ones(tokenizer, tmp_path):
    model = small("qwen2", tokenizer)
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(OverflowError, match="too large for float16"):
        save.merged(model, tmp_path / "m", tokenizer, dtype="float16", prompts=FEW)
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(OverflowError, match="not finite"): save.merged(model, tmp_path / "m", tokenizer, prompts=FEW)
    assert not os.listdir(tmp_path)


# ---- the adapter alone

def test_the_adapter_alone(tokenizer, tmp_path):
    model = adapted(small("qwen2", tokenizer), modules_to_save=["lm_head"], use_dora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    learn(model)
    saved = save.merged(model, tmp_path / "a", tokenizer, "lora", prompts=FEW)
    assert {"adapter_model.safetensors", "adapter_config.json", "second"} <= set(saved.files)
    again = PeftModel.from_pretrained(small("qwen2", tokenizer), tmp_path / "a").eval()
    rows = proof.rows_for(tokenizer, FEW)
    model.set_adapter("default")
    assert proof.apart(proof.log_probs(again, rows), proof.log_probs(model, rows)) < 1e-5
    with pytest.raises(ValueError, match="no adapter"): save.merged(small("qwen2", tokenizer), tmp_path / "b", tokenizer, "lora")


# ---- what cannot be

def test_what_cannot_be_is_said_before_anything_is_written(tokenizer, tmp_path):
    model = adapted(small("qwen2", tokenizer))
    for how, error, words in [
        (dict(save_method=["merged_16bit"]), ValueError, "merged_4bit"),
        (dict(save_method="merged_8bit"), ValueError, "merged_4bit"), (dict(dtype="int8"), ValueError, "bfloat16"),
        (dict(base="original"), ValueError, "its own original"), (dict(tokeniser=1), TypeError, "Did you mean 'tokenizer'"),
        (dict(prompts=[]), ValueError, "list of texts"), (dict(max_shard_size=-1), ValueError, "whole number of bytes"),
    ]:
        with pytest.raises(error, match=words): save.merged(model, tmp_path / "m", tokenizer, **how)
    with pytest.raises(TypeError, match="tokenizer"): save.merged(model, tmp_path / "m")
    with pytest.raises(ValueError, match="folder's name"): save.merged(model, "", tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError): save.merged(model, tmp_path / "file", tokenizer)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="switched off"): save.merged(model, tmp_path / "m", tokenizer)
    assert os.listdir(tmp_path) == ["file"]


def test_rounding_that_takes_the_training_away_is_said(tokenizer, tmp_path):
    model = adapted(small("qwen2", tokenizer))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.mul_(1e-3)
    seen = []
    end = notices.subscribe(lambda event: seen.append(event.message))
    try: (one,) = save.merged(model, tmp_path / "m", tokenizer, prompts=FEW).proofs
    finally: end()
    assert one.is_lost and any("as much as training did" in s for s in seen)


# ---- to the Hub

def test_pushing_sends_the_checked_folder(tokenizer, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, token=None): sent["token"] = token
        def create_repo(self, repo_id, **how): return SimpleNamespace(repo_id=sent.setdefault("repo", repo_id))
        def upload_folder(self, repo_id, folder_path, **how): sent["files"] = sorted(os.listdir(folder_path))
    monkeypatch.setattr(save, "HfApi", Hub)
    model = adapted(small("qwen2", tokenizer))
    save.push_merged(model, "me/mine", tokenizer, "merged_16bit", token="", prompts=FEW)
    assert sent["repo"] == "me/mine" and sent["token"] is None
    assert {"model.safetensors", "README.md", "export.json"} <= set(sent["files"])
    save.merged(model, "me/other", tokenizer, push_to_hub=True, save_method="lora", prompts=FEW)
    assert "adapter_model.safetensors" in sent["files"]
    with pytest.raises(ValueError): save.push_merged(model, "a/b/c", tokenizer)


# ---- as methods, after training

@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny") / "tiny"
    tasks.tiny_model(tasks.get("sort_digits"), at, steps=0, measure=False)
    return str(at)


def test_methods_on_a_model_that_was_trained(loaded, tmp_path):
    "After steps of the patched trainer, sampled in place: the model's own ways out."
    from trl import GRPOConfig, GRPOTrainer

    from grpo_nb import PatchFastRL, UnpatchFastRL
    model, own = FastLanguageModel.from_pretrained(loaded, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    task = tasks.get("sort_digits")
    PatchFastRL("grpo", FastLanguageModel)
    try:
        args = GRPOConfig(output_dir=str(tmp_path / "run"), num_generations=4, max_completion_length=6, max_steps=2, beta=0.0,
                          per_device_train_batch_size=8, learning_rate=5e-2, report_to="none", save_strategy="no", use_cpu=True,
                          bf16=False)

        def some(completions, **_): return [float(len(str(c)) % 3) for c in completions]
        data = task.train.select(range(16))
        GRPOTrainer(model=model, reward_funcs=[some], args=args, train_dataset=data, processing_class=own).train()
    finally: UnpatchFastRL()
    was = model.training
    one = good(model.save_pretrained_merged(tmp_path / "m", own, save_method="merged_32bit", prompts=FEW), exact=True)
    assert one.learnt > 0.05 and model.training is was
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "m"), load_in_4bit=False)
    assert again.num_parameters() == merge.causal_lm(again).num_parameters()


def test_methods_travel_with_copies_and_pickles(loaded, tmp_path):
    import copy
    import pickle
    model, own = FastLanguageModel.from_pretrained(loaded, load_in_4bit=False)
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert other.save_pretrained_merged.args[0] is other
    model = FastLanguageModel.get_peft_model(model, r=4)
    good_names = "save_pretrained_merged", "push_to_hub_merged", "save_pretrained_gguf", "push_to_hub_gguf"
    assert all(callable(getattr(model, n)) and getattr(model, n).__doc__ for n in good_names)


# ---- a base that was trained in four bits

@pytest.fixture(scope="module")
def four_bit(loaded):
    "A model in NF4 on this machine, with an adapter that has learnt something."
    from grpo_nb.models.device import why_not_four_bit
    if problem := why_not_four_bit("cpu"): pytest.skip(problem)
    model, own = FastLanguageModel.from_pretrained(loaded, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    learn(model)
    return model.eval(), own


@pytest.mark.parametrize("base", ["as_trained", "original", "folder"])
def test_a_four_bit_base_is_merged_from_what_was_asked_for(base, four_bit, loaded, tmp_path):
    "Unpacked as it was trained, or the weights from before packing: both to the last bit what PEFT merges."
    from safetensors.torch import load_file
    (model, own), origin = four_bit, base != "as_trained"
    saved = save.merged(model, tmp_path / "m", own, "merged_32bit", base=loaded if base == "folder" else base, prompts=FEW)
    one = good(saved)
    if not origin: assert one.difference < 1e-3 and one.same == one.of, str(one)
    else: assert 1e-3 < one.difference < 1 and one.explained > 1e-3, str(one)
    plain, _ = FastLanguageModel.from_pretrained(loaded, load_in_4bit=False)
    if not origin:
        by_name = dict(merge.causal_lm(model).named_modules())
        with torch.no_grad():
            for name, layer in plain.named_modules():
                packed = by_name.get(f"{name}.base_layer", by_name.get(name))
                if isinstance(layer, torch.nn.Linear) and merge.is_packed(packed): layer.weight.copy_(merge.unpacked(packed).weight)
    plain = FastLanguageModel.get_peft_model(plain, r=4)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    theirs, ours = plain.merge_and_unload().state_dict(), load_file(tmp_path / "m/model.safetensors")
    for name, weight in ours.items(): torch.testing.assert_close(weight, theirs[name].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["as_trained", pytest.param("folder", marks=slow)])
def test_a_four_bit_base_is_written_in_four_bits_again(base, four_bit, loaded, tmp_path):
    "The adapter is in what is packed anew, and packing alone explains the difference, whichever weights it was added to."
    model, own = four_bit
    one = good(save.merged(model, tmp_path / "m", own, "merged_4bit", base=loaded if base == "folder" else base, prompts=FEW))
    assert one.difference < one.learnt
    assert json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]["load_in_4bit"]
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "m"))
    assert sum(map(merge.is_packed, again.modules())) == sum(map(merge.is_packed, model.modules())) > 0
    assert os.listdir(tmp_path) == ["m"]


FORMATS = "merged_16bit", "merged_4bit", "lora", "q8_0"


@slow
@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("kind,tied,dtype", [
    ("dora", True, torch.bfloat16), ("rslora", False, torch.float16), ("bias", False, torch.bfloat16),
    ("both", True, torch.float16), ("tokens", True, torch.bfloat16)])
def test_every_format_of_every_kind(method, kind, tied, dtype, tokenizer, tmp_path):
    "What is trained in 16 bits, with all that an adapter can be, in each format: off by rounding and by nothing else."
    if method == "q8_0": needs_gguf()
    if method == "merged_4bit":
        from grpo_nb.models.device import why_not_four_bit
        if problem := why_not_four_bit("cpu"): pytest.skip(problem)
    model = adapted(small("qwen2", tokenizer, dtype, tie_word_embeddings=tied), **KINDS[kind])
    export = save.gguf if method == "q8_0" else save.merged
    saved = export(model, tmp_path / "m", tokenizer, method, prompts=FEW)
    if method == "lora": assert not saved.proofs and "adapter_model.safetensors" in saved.files
    else: good(saved)


# ---- memory

def test_a_layer_at_a_time(tokenizer):
    "At no time are the merged weights of two layers alive."
    import gc
    import weakref
    model, alive, most = adapted(small("llama", tokenizer, num_hidden_layers=6)), [], 0
    weights = stream.Weights(model)
    for name in weights:
        if "proj" not in name: continue
        alive.append(weakref.ref(weights[name]))
        gc.collect()
        most = max(most, sum(r() is not None for r in alive))
    assert most <= 2


@slow
def test_peak_memory_of_merging(tmp_path):
    "Beside the weights stand a shard, a layer and a matrix in the making, and no more for four times the layers."
    import subprocess
    import sys
    code, beside = Path(__file__).with_name("export_memory.py"), []
    for layers in 4, 16:
        done = subprocess.run([sys.executable, str(code), str(tmp_path), str(layers)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        size, more, shard, layer, largest = map(float, done.stdout.split()[-5:])
        assert more < shard + layer + 1.5 * largest, (size, more)
        beside.append(more)
        for file in tmp_path.iterdir(): file.unlink()
    assert beside[1] - beside[0] < layer < size / 10, (beside, size)


# ---- GGUF, where its package is

GGUF = "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"
QUICK_GGUF = ("llama", "q8_0"), ("gemma2", "bf16")


def needs_gguf(): pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.mark.parametrize("kind,name", [pytest.param(k, q, marks=[] if (k, q) in QUICK_GGUF else slow)
                                       for k in GGUF for q in ("f32", "bf16", "q8_0", "q4_0")])
def test_gguf_is_what_was_trained(kind, name, tokenizer, tmp_path):
    needs_gguf()
    one = good(save.gguf(adapted(small(kind, tokenizer)), tmp_path / "g", tokenizer, name, prompts=FEW))
    if name == "f32": assert one.difference < 1e-4 and one.same == one.of
    assert set(os.listdir(tmp_path / "g")) == {"Modelfile", "README.md", "export.json", f"g-{name.upper()}.gguf"}


# ---- read by llama.cpp itself, where its binding is

def needs_llama_cpp():
    needs_gguf()
    pytest.importorskip("llama_cpp", reason="llama.cpp's Python binding is not installed: pip install llama-cpp-python")


@slow
@pytest.mark.parametrize("kind", GGUF)
def test_llama_cpp_reads_what_was_trained(kind, tokenizer, tmp_path):
    "To the last bits where nothing is rounded; else as far away as its own rounding, and never in other tokens."
    needs_llama_cpp()
    saved = save.gguf(adapted(small(kind, tokenizer)), tmp_path / "g", tokenizer, ["f32", "bf16", "q8_0", "q4_1"], llama_cpp=True)
    by_name = {p.method: p for p in saved.proofs}
    assert len(by_name) == 8 and all(p.is_good for p in saved.proofs), saved
    exact = by_name["F32 in llama.cpp"] # Gemma's activation is looked up in a table of 16-bit numbers there
    assert exact.difference < (5e-3 if "gemma" in kind else 1e-5) and exact.same == exact.of, str(exact)
    assert "Q8_0 in llama.cpp" in (tmp_path / "g/README.md").read_text()


@slow
def test_what_llama_cpp_reads_otherwise_is_not_left_behind(tokenizer, tmp_path, monkeypatch):
    "Positions told wrongly in a key that transformers does not read: found by llama.cpp alone."
    needs_llama_cpp()
    from grpo_nb.models import gguf as gguf_module
    real = gguf_module.tell_settings

    def scaled(writer, base, rows):
        real(writer, base, rows)
        gguf_module._linear(writer, {"factor": 8.0})
    monkeypatch.setattr(gguf_module, "tell_settings", scaled)
    with pytest.raises(save.ExportError, match="in llama.cpp.*nats away"):
        save.gguf(small("qwen3", tokenizer), tmp_path / "g", tokenizer, "f32", prompts=FEW)
    assert not os.listdir(tmp_path)


def test_a_reader_that_falls_over_takes_nothing_along(tokenizer, tmp_path, monkeypatch):
    "llama.cpp ends its process over a file that it takes for wrong: said, and an error only for who asked for it."
    needs_gguf()
    from grpo_nb.models import llama_cpp as reader
    model, seen = small("qwen3", tokenizer), []
    monkeypatch.setattr(reader, "find_spec", lambda name: True)
    monkeypatch.setattr(reader, "START", "import os; os.write(2, b'error: unknown architecture'); os.abort()")
    end = notices.subscribe(lambda event: seen.append(event.message))
    monkeypatch.setattr(save, "why_not_llama_cpp", lambda: "")
    try: good(save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW))
    finally: end()
    assert any("ended by signal 6" in s and "transformers alone" in s for s in seen), seen
    with pytest.raises(save.ExportError, match="signal 6"):
        save.gguf(model, tmp_path / "h", tokenizer, "f32", prompts=FEW, llama_cpp=True)
    assert os.listdir(tmp_path) == ["g"]


def test_llama_cpp_is_asked_for_in_vain_before_anything_is_written(tokenizer, tmp_path, monkeypatch):
    needs_gguf()
    monkeypatch.setattr(save, "why_not_llama_cpp", lambda: "its binding is not installed: pip install llama-cpp-python.")
    model = small("qwen3", tokenizer)
    for value, words in (True, "llama_cpp=True.*pip install"), ("yes", "True or False, or None"):
        with pytest.raises(ValueError, match=words): save.gguf(model, tmp_path / "g", tokenizer, llama_cpp=value)
    assert not os.listdir(tmp_path)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=1e4,
              original_max_position_embeddings=32)
VARIANTS = {"bias": dict(attention_bias=True), "tied": dict(tie_word_embeddings=True), "no_groups": dict(num_key_value_heads=4),
            "llama3": dict(rope_parameters=LLAMA3)}


@pytest.mark.parametrize("variant", ["bias", *(pytest.param(v, marks=slow) for v in list(VARIANTS)[1:])])
def test_gguf_of_llamas_variants(variant, tokenizer, tmp_path):
    needs_gguf()
    more = VARIANTS[variant]
    model = adapted(small("llama", tokenizer, **more), bias="all" if "attention_bias" in more else "none")
    one = good(save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW))
    assert one.difference < 1e-4
    from grpo_nb.models.gguf_read import field
    file = tmp_path / "g/g-F32.gguf"
    assert field(file, "tokenizer.chat_template") == tokenizer.chat_template and field(file, "tokenizer.ggml.pre") == "smollm"
    assert field(file, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    import gguf
    assert ("rope_freqs.weight" in [t.name for t in gguf.GGUFReader(file).tensors]) is (variant == "llama3")


def test_a_list_of_quantisations_and_the_way_back(tokenizer, tmp_path):
    needs_gguf()
    model = adapted(small("qwen2", tokenizer))
    saved = save.gguf(model, tmp_path / "g", tokenizer, ["F16", "q8_0", "fast_quantized"], prompts=FEW, llama_cpp=False)
    assert [p.method for p in saved.proofs] == ["F16", "Q8_0"] and saved.proofs[0].difference < saved.proofs[1].difference
    assert "FROM ./g-F16.gguf" in (tmp_path / "g/Modelfile").read_text()
    folder = save.from_gguf(tmp_path / "g/g-F16.gguf", tmp_path / "back", dtype="float32")
    again, own = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)
    rows = proof.rows_for(tokenizer, FEW)
    assert proof.apart(proof.log_probs(again, rows), proof.log_probs(model, rows)) < 0.1
    with pytest.raises(ValueError, match="from_gguf"): FastLanguageModel.from_pretrained(str(tmp_path / "g/g-F16.gguf"))
    with pytest.raises(ValueError, match="no GGUF file"): save.from_gguf(tmp_path / "g/Modelfile", tmp_path / "x")


def test_what_gguf_cannot_carry_of_added_tokens_is_said(tmp_path):
    "Rules about the text around an added token: the user is told, and so is the card's reader."
    needs_gguf()
    from tokenizers import AddedToken
    own, seen = make_tokenizer(["Sort 12"], 270), []
    own.add_tokens([AddedToken("cat", single_word=True), AddedToken("<post>", rstrip=True), AddedToken("<pre>", lstrip=True)])
    model = adapted(small("qwen2", own))
    end = notices.subscribe(lambda event: seen.append(event.message))
    try: good(save.gguf(model, tmp_path / "g", own, "f32", prompts=FEW))
    finally: end()
    card = (tmp_path / "g/README.md").read_text()
    for words in ("finds 'system', 'user', 'assistant' and 1 more inside longer", "before '<pre>'", "after '<post>'"):
        assert words in card and sum(words in s for s in seen) == 1, words
    with pytest.raises(save.ExportError, match="reads 'concatenate'"):
        save.gguf(model, tmp_path / "h", own, "f32", prompts=["concatenate"])
    assert os.listdir(tmp_path) == ["g"]


@pytest.mark.parametrize("base", ["as_trained", "original"])
def test_gguf_of_a_four_bit_base(base, four_bit, tmp_path):
    needs_gguf()
    model, own = four_bit
    one = good(save.gguf(model, tmp_path / "g", own, "f32", base=base, prompts=FEW))
    assert one.difference < 1e-3 if base == "as_trained" else one.difference > 1e-3, str(one)


@pytest.mark.parametrize("kind", ["head", pytest.param("embedding", marks=slow), pytest.param("tokens", marks=slow)])
def test_gguf_of_a_tied_model_whose_ends_were_trained(kind, tokenizer, tmp_path):
    needs_gguf()
    model = adapted(small("qwen2", tokenizer, tie_word_embeddings=True), **KINDS[kind])
    assert good(save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW)).difference < 1e-4


@pytest.mark.parametrize("kind", ["qwen3", *(pytest.param(k, marks=slow) for k in GGUF if k != "qwen3")])
def test_a_file_alone_says_all_of_the_model(kind, tokenizer, tmp_path):
    "Read by its own header, without the configuration that it was written from."
    needs_gguf()
    model = small(kind, tokenizer)
    save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW)
    folder, rows = save.from_gguf(tmp_path / "g/g-F32.gguf", tmp_path / "back", dtype="float32"), proof.rows_for(tokenizer, FEW)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert proof.apart(proof.log_probs(again, rows), proof.log_probs(model, rows)) < 1e-4


@pytest.mark.parametrize("value", [None, 8, {"q8_0"}], ids=str)
def test_what_names_no_quantisation(value, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="quantization_method=.*a list of names"):
        save.gguf(small("qwen3", tokenizer), tmp_path / "g", tokenizer, value)


@pytest.mark.parametrize("name,words", [("q4_k_m", "llama-quantize"), ("quantized", "q4_k_m"), ("int4", "There are")])
def test_quantisations_that_the_package_cannot_write(name, words, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words): save.gguf(small("qwen2", tokenizer), tmp_path / "g", tokenizer, name)
    assert not os.listdir(tmp_path)


def test_models_that_cannot_be_proved_are_refused(tokenizer, tmp_path):
    needs_gguf()
    for kind, more, words in [("granite", {}, "cannot be read back"), ("gemma2", dict(query_pre_attn_scalar=3), "scaled otherwise"),
                              ("llama", dict(hidden_act="gelu"), "gelu"),
                              ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "dynamic")]:
        with pytest.raises(ValueError, match=words): save.gguf(small(kind, tokenizer, **more), tmp_path / "g", tokenizer)
    assert not os.listdir(tmp_path)


def test_a_gguf_that_is_off_is_not_left_behind(tokenizer, tmp_path, monkeypatch):
    needs_gguf()
    from grpo_nb.models import gguf as gguf_module
    monkeypatch.setattr(gguf_module, "as_told", lambda family, config, name, weight: weight.float())
    model = small("llama", tokenizer)
    with pytest.raises(save.ExportError, match="nats away"): save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW)
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(gguf_module, "_pour", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="disk is full"): save.gguf(model, tmp_path / "g", tokenizer, "f32", prompts=FEW)
    assert not os.listdir(tmp_path)
