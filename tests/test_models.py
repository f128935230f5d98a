"Loading, adapters and modes: what is checked, what comes out, and what is put back."
import copy
import inspect
import pickle
import sys

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import grpo_nb.models.device as device
import grpo_nb.models.load as module
from grpo_nb.models.load import FastLanguageModel, check_tokenizer, find_model, settings_of, tokenizer_of
from grpo_nb.models.modes import Snapshot

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="about a machine without a GPU; test_models_gpu.py is about one that has it"
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = dict(
    vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
)


def write_model(folder, kind="qwen3", words=("<|pad|>",), template=TEMPLATE, config=None, **special):
    "A complete model folder: two random layers and a tokenizer of single characters."
    words = [*words, "<|end|>", "<|user|>", "<|assistant|>", "<unk>", *"0123456789 +="]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    special = {
        "pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<unk>",
        "extra_special_tokens": ["<|user|>", "<|assistant|>"], **special,
    }
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special).save_pretrained(folder)
    torch.manual_seed(0)
    make, configure = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}[kind]
    make(configure(**{**SHAPE, "bos_token_id": None, "eos_token_id": None, **(config or {})})).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_model(tmp_path_factory.mktemp("models") / "digits")


@pytest.fixture
def heard(monkeypatch):
    "What the module says, each time it says it."
    messages = []
    monkeypatch.setattr(module, "say", messages.append)
    return messages


@pytest.fixture
def sealed(monkeypatch):
    "Fails the test if anything is read or fetched."
    def forbidden(*args, **kwargs): raise AssertionError("something was loaded before the arguments were checked")
    for name in "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM":
        monkeypatch.setattr(module, name, type(name, (), {"from_pretrained": staticmethod(forbidden)}))


# --- arguments

@pytest.mark.parametrize("given, error, words", [
    ({"max_seq_len": 1}, TypeError, ["'max_seq_len'", "'max_seq_length'"]),
    ({"load_in_4bits": True}, TypeError, ["'load_in_4bits'", "'load_in_4bit'"]),
    ({"max_seq_length": 0}, ValueError, ["max_seq_length=0"]),
    ({"max_seq_length": 1.5}, ValueError, ["max_seq_length=1.5"]),
    ({"max_lora_rank": True}, ValueError, ["max_lora_rank=True"]),
    ({"gpu_memory_utilization": 0}, ValueError, ["gpu_memory_utilization=0", "above 0"]),
    ({"gpu_memory_utilization": 1.01}, ValueError, ["gpu_memory_utilization=1.01"]),
    ({"gpu_memory_utilization": "0.5"}, ValueError, ["gpu_memory_utilization='0.5'"]),
    ({"gpu_memory_utilization": float("nan")}, ValueError, ["gpu_memory_utilization=nan"]),
    ({"load_in_4bit": "yes"}, ValueError, ["load_in_4bit='yes'"]),
    ({"fast_inference": "vllm"}, ValueError, ["fast_inference='vllm'"]),
    ({"dtype": "bfloat61"}, ValueError, ["dtype='bfloat61'", "'bfloat16'"]),
    ({"dtype": torch.int8}, ValueError, ["dtype=torch.int8"]),
    ({"device_map": "cuda:0"}, ValueError, ["device_map='cuda:0'", "no such device"]),
    ({"device_map": "gpu"}, ValueError, ["'cuda'"]),
    ({"model_kwargs": {"dtype": "auto"}}, TypeError, ["model_kwargs", "'dtype'"]),
    ({"model_kwargs": ["x"]}, TypeError, ["model_kwargs=['x']"]),
    ({"tokenizer_kwargs": {"token": "x"}}, TypeError, ["tokenizer_kwargs", "'token'"]),
    (
        {"load_in_4bit": True, "model_kwargs": {"quantization_config": object()}},
        ValueError,
        ["load_in_4bit=True", "quantization_config"],
    ),
])
def test_bad_argument_is_named_before_anything_is_read(sealed, folder, given, error, words):
    with pytest.raises(error) as raised: FastLanguageModel.from_pretrained(folder, **given)
    assert all(w in str(raised.value) for w in words), str(raised.value)


@pytest.mark.parametrize("name", ["./digit", "{}/digit", "~/no-such-folder/x", "a/b/c", "/no/such/place"])
def test_missing_path(sealed, folder, name):
    name = name.format(folder.rsplit("/", 1)[0])
    with pytest.raises(FileNotFoundError, match="is a path, and there is no such folder") as raised:
        FastLanguageModel.from_pretrained(name)
    assert name in str(raised.value)
    if name.startswith("/") and name.endswith("digit"): assert "Did you mean 'digits'?" in str(raised.value)


@pytest.mark.parametrize("name", ["", None, 3, "a b", "a//b", "ends-with-"])
def test_not_a_name(sealed, name):
    with pytest.raises((ValueError, FileNotFoundError), match="model_name="): FastLanguageModel.from_pretrained(name)


def test_folder_that_is_no_model(tmp_path, sealed):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ValueError, match="is a file"): find_model(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="no config.json"): find_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"): find_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no weights"): find_model(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="no tokenizer"): find_model(tmp_path)


def test_home_is_expanded(tmp_path, monkeypatch, heard):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "digits")
    model, _ = FastLanguageModel.from_pretrained("~/digits", load_in_4bit=False)
    assert model.config._name_or_path == str(tmp_path / "digits")


def test_name_that_the_hub_does_not_give(monkeypatch, tmp_path, heard):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sorter-small").mkdir()
    with pytest.raises(OSError, match="Did you mean 'sorter-small'"):
        FastLanguageModel.from_pretrained("sorter-smal", local_files_only=True)


def test_signature_shows_the_documented_defaults():
    parameters = inspect.signature(FastLanguageModel.from_pretrained).parameters
    shown = {
        n: parameters[n].default
        for n in ("max_seq_length", "dtype", "load_in_4bit", "fast_inference", "gpu_memory_utilization", "max_lora_rank")
    }
    assert shown == dict(
        max_seq_length=2048, dtype=None, load_in_4bit=True, fast_inference=False, gpu_memory_utilization=0.5, max_lora_rank=64
    )
    assert repr(parameters["load_in_4bit"].default) == "True"
    assert list(inspect.signature(FastLanguageModel.get_peft_model).parameters)[:4] == [
        "model", "r", "lora_alpha", "target_modules",
    ]


# --- dtype and device

class FakeCUDA:
    "A machine with one GPU of a given compute capability."
    def __init__(self, monkeypatch, major, minor):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: "a GPU")


@pytest.mark.parametrize(
    "capability, expected", [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_dtype_follows_the_gpu(monkeypatch, capability, expected):
    FakeCUDA(monkeypatch, *capability)
    assert device.target_device() == torch.device("cuda", 0)
    assert device.best_dtype() == device.dtype_for(None, "cuda") == expected
    assert device.target_device({"a": "cpu", "b": 0}) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="no such device"): device.target_device("cuda:1")
    if expected == torch.float16:
        with pytest.raises(ValueError, match=r"dtype='bf16'.*a GPU has no bfloat16.*'float16'"): device.dtype_for("bf16", "cuda")
    else: assert device.dtype_for("bf16", "cuda") == torch.bfloat16


def test_bfloat16_on_a_t4_is_refused_before_loading(monkeypatch, sealed, folder):
    FakeCUDA(monkeypatch, 7, 5)
    with pytest.raises(ValueError, match="no bfloat16"): FastLanguageModel.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name, expected",
    [(None, torch.float32), ("bfloat16", torch.bfloat16), ("torch.float16", torch.float16), (torch.float32, torch.float32)],
)
def test_dtype_on_a_cpu(folder, heard, name, expected):
    model, _ = FastLanguageModel.from_pretrained(folder, dtype=name, load_in_4bit=False)
    assert model.dtype == settings_of(model).dtype == expected
    assert any("on a CPU" in m for m in heard) == (expected != torch.float32)


# --- 4 bits

def test_loaded_in_4bit(folder, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(folder)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and not isinstance(model.lm_head, bnb.nn.Linear4bit)
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    assert not model.training and settings_of(model).load_in_4bit and model.is_loaded_in_4bit
    assert any("4-bit NF4" in m for m in heard)


@pytest.mark.parametrize("problem", ["missing", "broken"])
def test_default_falls_back_and_a_wish_raises(folder, heard, monkeypatch, problem):
    if problem == "missing": monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        def fails(*args, **kwargs): raise RuntimeError("no kernel image")
        monkeypatch.setattr(bnb.functional, "quantize_4bit", fails)
    words = {
        "missing": "bitsandbytes is not installed. Install it",
        "broken": "does not run on cpu (RuntimeError: no kernel image)",
    }[problem]
    with pytest.raises(RuntimeError) as raised: FastLanguageModel.from_pretrained(folder, load_in_4bit=True)
    assert words in str(raised.value) and "load_in_4bit=False" in str(raised.value)
    model, _ = FastLanguageModel.from_pretrained(folder)
    assert not settings_of(model).load_in_4bit and model.dtype == torch.float32
    assert any(words in m and "32-bit" in m for m in heard)


def test_quantised_checkpoint_stays_as_it_is(folder, tmp_path, heard):
    first, tokenizer = FastLanguageModel.from_pretrained(folder)
    first.save_pretrained(tmp_path / "q"), tokenizer.save_pretrained(tmp_path / "q")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "q", load_in_4bit=False)
    assert settings_of(again).load_in_4bit and any("as stored, by bitsandbytes" in m for m in heard)
    pairs = list(zip(first.modules(), again.modules()))
    layers = [(a, b) for a, b in pairs if isinstance(a, bnb.nn.Linear4bit)]
    assert layers and all(torch.equal(a.weight.data, b.weight.data) and not b.support_avx512bf16_for_cpu for a, b in layers)
    ids = torch.randint(0, 18, (2, 5))
    with torch.no_grad(): torch.testing.assert_close(first(ids).logits, again(ids).logits)


def written_out(model, reference):
    "Put the values that `model`'s 4-bit codes stand for into `reference`."
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            value = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            reference.get_submodule(name).weight.data = value.to(torch.float32)


def adapter_gradients(model, ids):
    model.zero_grad()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_4bit_gradients_survive_a_generation_and_equal_dequantised_weights(tmp_path, heard, kind, checkpointing):
    folder = write_model(tmp_path / kind, kind, config={"attention_bias": kind == "llama"})
    model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=True)
    reference, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
    written_out(model, reference)
    both = [FastLanguageModel.get_peft_model(m, r=4, use_gradient_checkpointing=checkpointing) for m in (model, reference)]
    for m in both:
        torch.manual_seed(1)
        for p in m.parameters():
            if p.requires_grad: p.data.normal_(std=0.1)
    model, reference = both
    ids = torch.randint(0, 18, (3, 9))
    before, truth = adapter_gradients(model, ids), adapter_gradients(reference, ids)
    with torch.no_grad(), FastLanguageModel.for_inference(model), FastLanguageModel.for_inference(reference):
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
        model.generate(ids, max_new_tokens=4, do_sample=False)
    after = adapter_gradients(model, ids)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(after, truth, rtol=1e-4, atol=1e-6)
    assert truth.norm() > 1e-3


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16")
def test_the_switch_is_still_needed(folder, heard):
    model, _ = FastLanguageModel.from_pretrained(folder)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit): layer.support_avx512bf16_for_cpu = True
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data.normal_(std=0.1)
    ids = torch.randint(0, 18, (3, 9))
    before = adapter_gradients(model, ids)
    model.eval().generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.nn.functional.cosine_similarity(before, adapter_gradients(model, ids), dim=0) < 0.99


# --- tokenizer

def test_padding_is_chosen_from_the_vocabulary(tmp_path, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(write_model(tmp_path / "a", words=["<|fim_pad|>"], pad_token=None))
    assert tokenizer.pad_token == "<|fim_pad|>" and len(tokenizer) == 18 and model.get_input_embeddings().num_embeddings == 32
    assert any("no padding token; '<|fim_pad|>'" in m for m in heard)
    model, tokenizer = FastLanguageModel.from_pretrained(write_model(tmp_path / "b", pad_token="<|end|>"))
    assert tokenizer.pad_token == "<|pad|>" and any("pads with its end of sequence" in m for m in heard)
    model, tokenizer = FastLanguageModel.from_pretrained(write_model(tmp_path / "c", words=[], pad_token=None))
    assert tokenizer.pad_token == "<unk>"
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_padding_with_the_end_as_a_last_resort(tmp_path, heard):
    folder = write_model(tmp_path / "a", words=[], pad_token=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.unk_token = None
    check_tokenizer(tokenizer, 32, "a")
    assert tokenizer.pad_token == "<|end|>" and any("at once" in m for m in heard)


def test_missing_end_is_an_error_before_the_weights(tmp_path, heard, monkeypatch):
    folder = write_model(tmp_path / "a", eos_token=None)
    with monkeypatch.context() as patched:
        patched.setattr(module, "AutoModelForCausalLM", None)
        with pytest.raises(ValueError, match=r"eos_token is None.*'<\|end\|>'"): FastLanguageModel.from_pretrained(folder)
    model, tokenizer = FastLanguageModel.from_pretrained(folder, tokenizer_kwargs={"eos_token": "<|end|>"})
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def test_token_outside_the_vocabulary(folder, heard, tmp_path):
    small = write_model(tmp_path / "a", config={"vocab_size": 18})
    with pytest.raises(ValueError, match="eos_token='<brand-new>' is not in the vocabulary"):
        FastLanguageModel.from_pretrained(small, tokenizer_kwargs={"eos_token": "<brand-new>"})


def test_chat_template(tmp_path, heard, folder):
    FastLanguageModel.from_pretrained(folder)
    assert not any("chat template" in m for m in heard)
    FastLanguageModel.from_pretrained(write_model(tmp_path / "a", template=None))
    assert any("no chat template" in m for m in heard)


def test_ends_of_the_model_are_kept(tmp_path, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(write_model(tmp_path / "a", config={"eos_token_id": 7}))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [1, 7]
    assert any("each of them ends one" in m for m in heard)
    heard.clear()
    model, _ = FastLanguageModel.from_pretrained(write_model(tmp_path / "b", config={"eos_token_id": [1, 4]}))
    assert model.generation_config.eos_token_id == [1, 4] and not any("each of them" in m for m in heard)


def test_length_and_engine_are_said_and_recorded(folder, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=4096, fast_inference=True, gpu_memory_utilization=0.6, max_lora_rank=8
    )
    settings = settings_of(model)
    assert (settings.max_seq_length, settings.fast_inference, settings.gpu_memory_utilization, settings.max_lora_rank) == (
        256, True, 0.6, 8,
    )
    assert tokenizer.model_max_length == 256 and tokenizer.padding_side == "left"
    assert any("max_seq_length=4096" in m and "256 is used" in m for m in heard)
    assert any("fast_inference=True" in m and "vLLM" in m for m in heard)
    heard.clear()
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128)
    assert settings_of(model).max_seq_length == 128 and not any("max_seq_length" in m or "vLLM" in m for m in heard)


def test_link_to_the_tokenizer_is_weak(folder, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
    adapted = FastLanguageModel.get_peft_model(model)
    assert tokenizer_of(adapted) is tokenizer_of(model) is tokenizer
    FastLanguageModel.for_inference(adapted)
    for other in copy.deepcopy(adapted), pickle.loads(pickle.dumps(model)):
        assert tokenizer_of(other) is None and settings_of(other) == settings_of(model)
    del tokenizer
    assert tokenizer_of(model) is None
    with FastLanguageModel.for_training(adapted): assert adapted.training


# --- adapters

@pytest.fixture
def plain(folder, heard): return FastLanguageModel.from_pretrained(folder, load_in_4bit=False, max_lora_rank=32)[0]


@pytest.mark.parametrize("given, error, words", [
    ({"rank": 8}, TypeError, ["'rank'"]),
    ({"lora_alfa": 8}, TypeError, ["'lora_alpha'"]),
    ({"inference_mode": True}, TypeError, ["'inference_mode'"]),
    ({"r": 64}, ValueError, ["r=64", "max_lora_rank=32"]),
    ({"r": 0}, ValueError, ["r=0"]),
    ({"lora_alpha": 0}, ValueError, ["lora_alpha=0"]),
    ({"lora_dropout": 1}, ValueError, ["lora_dropout=1"]),
    ({"bias": "some"}, ValueError, ["bias='some'"]),
    ({"use_gradient_checkpointing": "unslot"}, ValueError, ["use_gradient_checkpointing='unslot'", "'unsloth'"]),
    ({"random_state": "x"}, ValueError, ["random_state='x'"]),
    ({"target_modules": ["q_prj"]}, ValueError, ["'q_prj'", "'q_proj'"]),
    ({"target_modules": "all_linear"}, ValueError, ["'all_linear'"]),
    ({"target_modules": ["q_proj", "self_attn"]}, ValueError, ["'self_attn'"]),
    ({"target_modules": ["q_proj", "input_layernorm"]}, ValueError, ["'input_layernorm'"]),
    ({"target_modules": []}, ValueError, ["target_modules=[]"]),
    ({"modules_to_save": ["lm_heat"]}, ValueError, ["'lm_heat'", "'lm_head'"]),
    ({"modules_to_save": "lm_head"}, TypeError, ["modules_to_save='lm_head'"]),
])
def test_bad_adapter_leaves_the_model_alone(plain, given, error, words):
    before = {n: (type(m), m.training) for n, m in plain.named_modules()}
    with pytest.raises(error) as raised: FastLanguageModel.get_peft_model(plain, **given)
    assert all(w in str(raised.value) for w in words), str(raised.value)
    assert before == {n: (type(m), m.training) for n, m in plain.named_modules()}
    assert all(p.requires_grad for p in plain.parameters())


def test_second_adapter_and_not_a_model(plain):
    adapted = FastLanguageModel.get_peft_model(plain)
    for model in adapted, plain:
        with pytest.raises(ValueError, match="has an adapter already"): FastLanguageModel.get_peft_model(model)
    FastLanguageModel.get_peft_model(adapted.unload(), r=4)
    with pytest.raises(TypeError, match="model=Linear"): FastLanguageModel.get_peft_model(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("targets, expected", [
    (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    (["q_proj", "layers.0.mlp.up_proj"], {"q_proj", "up_proj"}),
    (r".*layers\.1.*(k|v)_proj", {"k_proj", "v_proj"}),
    ("o_proj", {"o_proj"}),
])
def test_targets(plain, targets, expected):
    adapted = FastLanguageModel.get_peft_model(plain, target_modules=targets)
    assert {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in adapted.named_parameters() if "lora_A" in n} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_dtypes_of_the_parts(folder, heard, dtype, four_bit):
    model, _ = FastLanguageModel.from_pretrained(folder, dtype=dtype, load_in_4bit=four_bit)
    before = {n: p.dtype for n, p in model.named_parameters()}
    adapted = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=True)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    rest = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p.dtype
        for n, p in adapted.named_parameters()
        if not p.requires_grad
    }
    assert rest == before
    ids = torch.randint(0, 18, (2, 5))
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_seed_is_local(folder, heard):
    weights = []
    for seed in 1, 1, 2:
        model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        adapted = FastLanguageModel.get_peft_model(model, random_state=seed, r=4)
        assert torch.rand(1) == expected
        weights.append(torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_other_options_pass_through(plain):
    adapted = FastLanguageModel.get_peft_model(plain, use_rslora=True, layers_to_transform=[1], r=4)
    config = adapted.peft_config["default"]
    assert config.use_rslora and config.task_type == "CAUSAL_LM"
    assert {n.split("layers.")[1][0] for n, _ in adapted.named_parameters() if "lora_" in n} == {"1"}


# --- modes

def state(model, tokenizer):
    "Everything that the two modes switch, to be compared."
    base = model.get_base_model()
    hooks = list(base.get_input_embeddings()._forward_hooks)
    flags = [
        {k: m.__dict__.get(k) for k in ("training", "gradient_checkpointing", "_gradient_checkpointing_func")}
        for m in model.modules()
    ]
    return (
        flags, hooks, base.__dict__.get("_require_grads_hooks"),
        model.config.use_cache, base.generation_config.use_cache,
        tokenizer.padding_side,
    )


@pytest.fixture(params=[False, True])
def pair(request, folder, heard):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, lora_dropout=0.5, use_gradient_checkpointing=request.param), tokenizer


def test_modes_are_what_they_say(pair):
    model, tokenizer = pair
    wanted = settings_of(model).gradient_checkpointing
    FastLanguageModel.for_training(model)
    assert model.training and model.is_gradient_checkpointing == wanted
    assert not model.config.use_cache and tokenizer.padding_side == "right"
    FastLanguageModel.for_inference(model)
    assert not any(m.training for m in model.modules()) and not model.is_gradient_checkpointing
    assert model.config.use_cache and model.generation_config.use_cache and tokenizer.padding_side == "left"
    ids = torch.randint(0, 18, (2, 5))
    with torch.no_grad(): assert torch.equal(model(ids).logits, model(ids).logits)


def test_with_puts_everything_back(pair):
    model, tokenizer = pair
    for odd in range(3):
        if odd == 1:
            model.train()
            model.get_base_model().model.layers[0].eval()
        if odd == 2:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.config.use_cache = False
            tokenizer.padding_side = "right"
        before = state(model, tokenizer)
        for first, second in [("for_inference", "for_training"), ("for_training", "for_inference")]:
            with getattr(FastLanguageModel, first)(model) as same:
                assert same is model
                inner = state(model, tokenizer)
                with getattr(FastLanguageModel, second)(model):
                    with getattr(FastLanguageModel, first)(model): pass
                assert state(model, tokenizer) == inner
            assert state(model, tokenizer) == before
            with pytest.raises(KeyError), getattr(FastLanguageModel, first)(model): raise KeyError
            assert state(model, tokenizer) == before


def test_plain_calls_come_back_to_what_was_left(pair):
    model, tokenizer = pair
    model.train()
    model.get_base_model().model.layers[1].eval()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    before = state(model, tokenizer)
    FastLanguageModel.for_inference(model)
    inference = state(model, tokenizer)
    FastLanguageModel.for_training(model)
    assert state(model, tokenizer) == before
    FastLanguageModel.for_training(model)
    assert state(model, tokenizer) == before
    FastLanguageModel.for_inference(model)
    assert state(model, tokenizer) == inference


def test_calls_can_be_told_apart_from_with(pair):
    model, tokenizer = pair
    handle = FastLanguageModel.for_training(model)
    assert handle.model is model and handle.config is model.config and handle.training
    ids = torch.randint(0, 18, (1, 4))
    assert FastLanguageModel.for_inference(model)(input_ids=ids).logits.shape == (1, 4, 32)
    before = state(model, tokenizer)
    handle = FastLanguageModel.for_training(model)
    handle.restore()
    assert state(model, tokenizer) == before


def test_trainer_that_moved_the_model_is_followed(pair):
    model, tokenizer = pair
    FastLanguageModel.for_inference(model)
    model.train() # a trainer's doing
    FastLanguageModel.for_inference(model)
    assert not model.training and not model.is_gradient_checkpointing
    FastLanguageModel.for_training(model)
    assert model.training


def test_hooks_of_others_stay(pair):
    model, tokenizer = pair
    embeddings = model.get_input_embeddings()
    with FastLanguageModel.for_training(model):
        calls = []
        handle = embeddings.register_forward_hook(lambda *a: calls.append(1))
    model(torch.randint(0, 18, (1, 4)))
    assert calls == [1]
    handle.remove()


def test_a_model_of_another_origin(folder):
    model = Qwen3ForCausalLM.from_pretrained(folder)
    with FastLanguageModel.for_training(model): assert model.training
    assert not model.training and settings_of(model) is None
    adapted = FastLanguageModel.get_peft_model(model, r=128)
    assert Snapshot(adapted) and adapted.peft_config["default"].r == 128


# --- together with TRL

@pytest.mark.parametrize("kind, four_bit, beta", [("qwen3", True, 0.04), ("llama", True, 0.0), ("qwen3", False, 0.04)])
def test_stock_trainer_trains_it_without_a_processing_class(tmp_path, heard, kind, four_bit, beta):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = write_model(tmp_path / "m", kind)
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=folder, max_seq_length=4096, load_in_4bit=four_bit,
        fast_inference=True, gpu_memory_utilization=0.6, max_lora_rank=64,
    )
    model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(8)])

    def digits(completions, **columns):
        return [float(sum(c.isdigit() for c in completion[0]["content"])) for completion in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path / "out"), num_generations=4, per_device_train_batch_size=8,
        max_completion_length=6, max_steps=3, beta=beta, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )
    trainer = GRPOTrainer(model=model, reward_funcs=digits, args=config, train_dataset=dataset)
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    assert trainer.processing_class.pad_token_id == tokenizer.pad_token_id
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    trainer.train()
    assert max((p.detach() - before[n]).abs().max() for n, p in model.named_parameters() if n in before) > 1e-3
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert any(row.get("grad_norm", 0) > 0 for row in trainer.state.log_history)
