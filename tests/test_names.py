"""Every name that public GRPO notebooks use, with the arguments that they give it, on a small model."""
import copy
import importlib
import math
import pickle

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import grpo_nb
import grpo_nb.engines.vllm.fast as fast
from grpo_nb.engines.vllm.words import SamplingParams, as_sampling, differs
from grpo_nb.ground import events
from grpo_nb.ground.check import RETIRED, TAKEN, as_now
from grpo_nb.models.load import FastLanguageModel, settings_of
from grpo_nb.models.lora import using
from grpo_nb.patch.objects import objects
from grpo_nb.tasks.tiny import make_model, make_tokenizer
from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A complete model folder."
    path = tmp_path_factory.mktemp("names") / "small"
    tokenizer = make_tokenizer(["What is 1 + 2? 3", "What is 4 + 5? 9"])
    for part in tokenizer, make_model(tokenizer, hidden_size=64, layers=2): part.save_pretrained(path)
    return str(path)


def loaded(folder, adapter=True, **given):
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=128, **{"load_in_4bit": False, **given})
    if adapter: model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    torch.manual_seed(0)
    for p in model.parameters():
        if adapter and p.requires_grad: p.data.normal_(std=0.3)
    return model, tokenizer


@pytest.fixture(scope="module")
def trained(folder): return loaded(folder)


@pytest.fixture
def heard(capsys):
    "What is said from here on."
    events.said.clear()
    capsys.readouterr()
    return lambda: capsys.readouterr().out


@pytest.fixture
def patched():
    PatchFastRL("grpo", FastLanguageModel)
    yield
    UnpatchFastRL()


def greedy(model, tokenizer, text, n=8):
    ids = tokenizer(text, return_tensors="pt")
    return model.generate(**ids, max_new_tokens=n, do_sample=False)[0, ids["input_ids"].shape[1]:].tolist()


# ---- a notebook, line by line

NOTEBOOK = '''
from grpo_nb.unsloth import FastLanguageModel, PatchFastRL, SamplingParams, is_bfloat16_supported, vLLMSamplingParams
PatchFastRL("GRPO", FastLanguageModel)
import torch
max_seq_length, lora_rank = 128, 8
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = FOLDER, max_seq_length = max_seq_length, load_in_4bit = False, load_in_8bit = False, load_in_16bit = False,
    load_in_fp8 = False, full_finetuning = False, fast_inference = True, max_lora_rank = lora_rank, gpu_memory_utilization = 0.9,
    offload_embedding = True, float8_kv_cache = True, unsloth_vllm_standby = True, random_state = 3407, torch_dtype = None,
    use_gradient_checkpointing = "unsloth")
model = FastLanguageModel.get_peft_model(
    model, r = lora_rank, target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha = lora_rank * 2, lora_dropout = 0, bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407,
    use_rslora = False, loftq_config = None, max_seq_length = max_seq_length)
from datasets import Dataset
dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "What is 1 + 2? " * 5}], "answer": "3"}] * 8)
def check_answer(prompts, completions, answer, **kwargs): return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
def length(completions, **kwargs): return [float(len(c[0]["content"])) for c in completions]
vllm_sampling_params = vLLMSamplingParams(min_p = 0.1, top_p = 1.0, top_k = -1, seed = 3407, stop = [tokenizer.eos_token],
                                          include_stop_str_in_output = True)
from trl import GRPOConfig, GRPOTrainer
training_args = GRPOConfig(
    vllm_sampling_params = vllm_sampling_params, temperature = 1.0, learning_rate = 5e-6, adam_beta1 = 0.9, adam_beta2 = 0.99,
    weight_decay = 0.001, warmup_ratio = 0.1, lr_scheduler_type = "linear", optim = "adamw_torch", logging_steps = 1,
    bf16 = is_bfloat16_supported(), fp16 = False, per_device_train_batch_size = 1, gradient_accumulation_steps = 1,
    num_generations = 4, max_prompt_length = 16, max_completion_length = 8, max_steps = 2, save_steps = 250, max_grad_norm = 0.1,
    report_to = "none", output_dir = FOLDER + "/out")
trainer = GRPOTrainer(model = model, processing_class = tokenizer, reward_funcs = [check_answer, length], args = training_args,
                      train_dataset = dataset)
output = trainer.train()
text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 1 + 2?"}], tokenize = False,
                                     add_generation_prompt = True)
sampling_params = SamplingParams(temperature = 0.8, top_p = 0.95, max_tokens = 16)
bare = model.fast_generate([text], sampling_params = sampling_params, lora_request = None)[0].outputs[0].text
model.save_lora(FOLDER + "/grpo_saved_lora")
tuned = model.fast_generate(text, sampling_params = sampling_params, lora_request = model.load_lora(FOLDER + "/grpo_saved_lora"))
tuned = tuned[0].outputs[0].text
FastLanguageModel.for_inference(model)
FastLanguageModel.for_training(model)
'''


def test_a_notebook_runs_with_the_import_swapped(folder, heard):
    names = {"FOLDER": folder}
    try: exec(compile(NOTEBOOK, "notebook", "exec"), names)
    finally: UnpatchFastRL()
    out, trainer = heard(), names["trainer"]
    assert names["output"].global_step == 2 and isinstance(names["bare"], str) and isinstance(names["tuned"], str)
    assert trainer.args.warmup_steps == 0.1 and trainer.args.get_warmup_steps(2) == 1 and trainer.args.min_p == 0.1
    assert trainer.args.generation_kwargs is None # the end of sequence ends by itself
    for words in ("offload_embedding=True", "float8_kv_cache=True", "unsloth_vllm_standby=True", "is plain checkpointing",
                  "warmup_ratio=0.1 is read as warmup_steps=0.1", "seed=3407 has no effect", "max_prompt_length=16",
                  "sampled in place", "per_device_train_batch_size=1 is read as 4"): assert words in out, (words, out)


def test_the_face_stays_small_and_the_namespace_says_what_others_have():
    assert "SamplingParams" not in grpo_nb.__all__ and len(grpo_nb.__all__) <= 12
    for module in "grpo_nb.unsloth", "grpo_nb.unsloth.chat_templates":
        found = importlib.import_module(module)
        for name in "train_on_responses_only", "get_chat_template", "standardize_sharegpt":
            with pytest.raises(ImportError, match="Write instead: .*(trl|SFTConfig)"): getattr(found, name)
        with pytest.raises(AttributeError): found.no_such_name
    UnpatchFastRL()


def test_only_the_namespace_patches_at_import():
    "`import grpo_nb` and its names lead nowhere near it."
    assert not [m for m, _ in grpo_nb._public.values() if "unsloth" in m] and "unsloth" not in repr(grpo_nb._beside)


# ---- retired settings

@pytest.mark.parametrize("total", [1, 3, 7, 10, 99, 1000, 4096])
@pytest.mark.parametrize("ratio", [0, 0.03, 0.1, 1 / 3, 0.5, 0.999, 1, 1.0])
def test_warm_up_is_exact(ratio, total):
    "`ceil(ratio * total)`, as `TrainingArguments.get_warmup_steps` computed it."
    from transformers import TrainingArguments
    steps = as_now({"warmup_ratio": ratio}, {"warmup_steps"})[0]["warmup_steps"]
    args = copy.copy(_arguments(TrainingArguments))
    args.warmup_steps = steps
    assert args.get_warmup_steps(total) == math.ceil(ratio * total)


_made = {}
def _arguments(kind): return _made.setdefault(kind, kind(output_dir="nowhere", use_cpu=True))


def test_every_taken_name_is_listed_and_leads_to_settings_that_exist():
    from trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig
    fields = {n for c in (GRPOConfig, DPOConfig, RLOOConfig, SFTConfig) for n in c.__dataclass_fields__}
    assert set(TAKEN) <= set(RETIRED)
    for name, take in TAKEN.items():
        for value in True, "steps", 3, 0.5, None:
            try: now = take(name, value)
            except Exception: continue # noqa: BLE001 not its kind, or without an equal: the sentence is `known_arguments`'
            assert set(now) <= fields, (name, now)


@pytest.mark.parametrize("given,now", [
    ({"evaluation_strategy": "no"}, {"eval_strategy": "no"}), ({"no_cuda": True}, {"use_cpu": True}),
    ({"per_gpu_train_batch_size": 8}, {"per_device_train_batch_size": 8}), ({"overwrite_output_dir": True}, {}),
    ({"use_liger_loss": False}, {"use_liger_kernel": False}),
    ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    ({"adafactor": True}, {"optim": "adafactor"}), ({"adafactor": False}, {}), ({"half_precision_backend": "auto"}, {}),
    ({"wandb_log_unique_prompts": True}, {"log_unique_prompts": True}), ({"vllm_max_model_len": 64}, {"vllm_max_model_length": 64}),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": 5}),
    ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
])
def test_what_is_exact_is_taken(given, now, patched, tmp_path):
    from trl import GRPOConfig
    config = GRPOConfig(output_dir=str(tmp_path), bf16=False, **given)
    for name, value in now.items(): assert getattr(config, name) == value
    assert as_now(given, GRPOConfig.__dataclass_fields__)[0] == now


@pytest.mark.parametrize("given,error,words", [
    ({"logging_dir": "x"}, TypeError, "transformers 5.15"), ({"save_safetensors": False}, TypeError, "safetensors"),
    ({"half_precision_backend": "apex"}, TypeError, "bf16 or fp16"), ({"warmup_ratio": 5}, ValueError, "at most 1"),
    ({"evaluation_strategy": "steps", "eval_strategy": "no"}, ValueError, "contradict"),
    ({"vllm_device": "cuda:1"}, TypeError, "TRL 0.18"),
    ({"max_prompt_length": 0}, ValueError, "max_prompt_length=0"), ({"max_prompt_length": "512"}, ValueError, "without the quotes"),
    ({"vllm_sampling_params": {"top_p": 1}}, ValueError, "must be a SamplingParams"),
    ({"vllm_sampling_params": SamplingParams(n=4)}, ValueError, "num_generations"),
    ({"vllm_sampling_params": SamplingParams(stop_token_ids=[3])}, ValueError, "use_vllm=True"),
    ({"vllm_sampling_params": SamplingParams(temperature=0.7), "temperature": 1.0}, ValueError, "contradict"),
])
def test_what_is_not_exact_is_a_sentence(given, error, words, patched, tmp_path):
    from trl import GRPOConfig
    with pytest.raises(error) as raised: GRPOConfig(output_dir=str(tmp_path), bf16=False, **given)
    assert words in str(raised.value)


def test_a_run_and_a_recipe_take_them_too(heard):
    from grpo_nb.recipe.trl import from_yaml
    from grpo_nb.run.inputs import make_config
    config = make_config({"warmup_ratio": 0.2, "evaluation_strategy": "no", "vllm_sampling_params": SamplingParams(top_k=5)})
    assert (config.warmup_steps, config.eval_strategy, config.top_k) == (0.2, "no", 5) and "warmup_ratio=0.2 is read" in heard()
    recipe = from_yaml("model_name_or_path: small\nreward_funcs: []\nwarmup_ratio: 0.3\noverwrite_output_dir: true\n")
    assert recipe.config == {"warmup_steps": 0.3} and "warmup_ratio=0.3 is read as warmup_steps=0.3" in heard()
    with pytest.raises(ValueError, match="at most 1"): from_yaml("model_name_or_path: small\nreward_funcs: []\nwarmup_ratio: 5\n")


def test_other_trainers_take_theirs(tmp_path):
    PatchFastRL("sft")
    try:
        from trl import SFTConfig
        config = SFTConfig(output_dir=str(tmp_path), bf16=False, max_seq_length=77, warmup_ratio=0.25, dataset_text_field="text")
        assert config.max_length == 77 and config.warmup_steps == 0.25 and not hasattr(config, "max_prompt_length")
        with pytest.raises(TypeError, match=r"TRL 0\.28.*dataset\.filter"): SFTConfig(output_dir=str(tmp_path), max_prompt_length=3)
    finally: UnpatchFastRL()


def test_sampling_params_become_settings(patched, tmp_path):
    from trl import GRPOConfig
    asked = SamplingParams(temperature=0.7, top_p=0.9, top_k=-1, min_p=0.1, max_tokens=33, stop="</answer>", seed=1)
    config = GRPOConfig(output_dir=str(tmp_path), bf16=False, vllm_sampling_params=asked)
    found = [getattr(config, n) for n in ("temperature", "top_p", "top_k", "min_p", "max_completion_length", "generation_kwargs")]
    assert found == [0.7, 0.9, 0, 0.1, 33, {"stop_strings": ["</answer>"]}]


# ---- prompts cut on the left

@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("most", [None, 7, 10_000])
@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_cut_as_trl_did(folder, tmp_path, algorithm, most, chat):
    "TRL up to 0.27 tokenized with `max_length=max_prompt_length, truncation=True` and the tokenizer's `truncation_side='left'`."
    import trl
    model, tokenizer = loaded(folder) # RLOO puts a second adapter on a model
    texts = ["What is 1 + 2?", "What is 4 + 5? " * 6]
    prompts = [[{"role": "user", "content": t}] for t in texts] if chat else texts
    PatchFastRL(algorithm, FastLanguageModel)
    try:
        config = getattr(trl, f"{algorithm.upper()}Config")(output_dir=str(tmp_path), bf16=False, max_prompt_length=most,
                                                            num_generations=2, per_device_train_batch_size=2, report_to="none")
        trainer = getattr(trl, f"{algorithm.upper()}Trainer")(
            model=model, processing_class=tokenizer, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)])
        found = trainer._tokenize_prompts(prompts)[0]
    finally: UnpatchFastRL()
    written = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts] if chat else texts
    old = copy.deepcopy(tokenizer)
    old.truncation_side = "left"
    how = dict(max_length=most, truncation=True) if most else {}
    assert [list(ids) for ids in found] == old(written, add_special_tokens=False, **how)["input_ids"]


# ---- loading

@pytest.mark.parametrize("given,error,words", [
    (dict(load_in_4bit=True, load_in_8bit=True), ValueError, "load_in_4bit=True and load_in_8bit=True"),
    (dict(load_in_8bit=True, load_in_16bit=True), ValueError, "give one of them"),
    (dict(full_finetuning=True, load_in_4bit=True), ValueError, "contradict"),
    (dict(full_finetuning=True, load_in_8bit=True), ValueError, "codes"),
    (dict(full_finetuning="yes"), ValueError, "full_finetuning='yes'"), (dict(load_in_fp8=True), ValueError, "load_in_8bit=True"),
    (dict(load_in_8bit=1.5), ValueError, "load_in_8bit=1.5"), (dict(use_gradient_checkpointing="unslot"), ValueError, "'unsloth'"),
    (dict(dtype="float32", torch_dtype="bfloat16"), ValueError, "torch_dtype"), (dict(torch_dtype="float8"), ValueError, "float8"),
    (dict(load_in_16bit=True, dtype="float32"), ValueError, "contradict"),
    (dict(rope_scaling={"type": "yarn"}), ValueError, "config.json"),
    (dict(resize_model_vocab=40000), ValueError, "random"), (dict(offload_embeding=True), TypeError, "offload_embeding"),
    (dict(max_lora_rank=0), ValueError, "max_lora_rank=0"), (dict(gpu_memory_utilization=60), ValueError, "gpu_memory_utilization"),
])
def test_wrong_flags_are_sentences_before_anything_is_read(given, error, words):
    with pytest.raises(error) as raised: FastLanguageModel.from_pretrained("no/such-model-here", **given)
    assert words in str(raised.value) and "Hub" not in str(raised.value)


def test_full_finetuning_trains_all_weights(folder, heard, tmp_path):
    model, tokenizer = loaded(folder, adapter=False, full_finetuning=True, use_gradient_checkpointing="unsloth")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters()) and settings_of(model).full_finetuning
    assert FastLanguageModel.get_peft_model(model, r=4) is model and model.is_gradient_checkpointing
    assert "rounded away" in (out := heard()) and "without an adapter" in out
    ids = torch.tensor([tokenizer("1 + 2 = 3")["input_ids"]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"save_lora\(\): this model has no adapter"): model.save_lora(tmp_path / "x")


def test_8_bits_are_trained_on(folder, heard):
    model, tokenizer = loaded(folder, load_in_8bit=True)
    assert model.is_loaded_in_8bit and "weights in 8-bit" in heard() and not settings_of(model).load_in_4bit
    ids = torch.tensor([tokenizer("1 + 2 = 3")["input_ids"]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    assert isinstance(model.fast_generate("1 + 2", SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].text, str)


@pytest.mark.parametrize("given,dtype", [
    (dict(load_in_16bit=True), torch.float32), (dict(load_in_16bit=True, dtype="bf16"), torch.bfloat16),
    (dict(torch_dtype="bfloat16"), torch.bfloat16), (dict(torch_dtype=None), torch.float32)])
def test_16_bits_and_the_old_name_of_dtype(folder, given, dtype):
    assert loaded(folder, adapter=False, **given)[0].dtype == dtype


# ---- checkpoints in the host's memory

@pytest.mark.parametrize("how", [True, False, None, "auto", "unsloth"])
@pytest.mark.parametrize("where", ["loading", "adapter"])
def test_checkpointing_is_what_was_asked(folder, how, where, heard):
    first, second = (how, None) if where == "loading" else (None, how)
    model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False, use_gradient_checkpointing=first)
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=second)
    assert model.is_gradient_checkpointing == (how in (True, "unsloth"))
    assert ("plain checkpointing" in heard()) == (how == "unsloth")


def test_checkpoints_here_and_there_have_the_same_gradients(folder, monkeypatch):
    "The way over the host's memory, with the copies done on a CPU; the trainer's own calls in between change nothing."
    import grpo_nb.models.modes as modes
    import grpo_nb.ops.layer.host as host
    moved = []
    class Copied:
        def __init__(self, x): self.x = x.clone()
    def put(x):
        if x.numel(): moved.append(x.shape) # PyTorch 2.11 saves an empty tensor beside each
        return Copied(x)
    monkeypatch.setattr(host, "put", put)
    monkeypatch.setattr(host, "get", lambda kept: kept.x.clone())
    found = []
    for way in True, "unsloth":
        model, tokenizer = loaded(folder)
        if way == "unsloth": modes.wrap(model.base_model.model, "_set_gradient_checkpointing", modes._held_on_host, **modes.WHERE)
        model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for m in model.modules():
            if type(m).__name__ == "Dropout": m.p = 0.2
        ids = torch.tensor([tokenizer("What is 1 + 2? What is 4 + 5?")["input_ids"]])
        torch.manual_seed(3)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(moved) == 2 and all(map(torch.equal, *found))


# ---- fast_generate

def test_answers_are_generates(trained, tmp_path):
    model, tokenizer = trained
    text, params = "What is 1 + 2?", SamplingParams(temperature=0, max_tokens=8)
    with_adapter = greedy(model, tokenizer, text)
    with model.disable_adapter(): without = greedy(model, tokenizer, text)
    saved = str(tmp_path / "saved")
    model.save_lora(saved)
    for prompts in text, [text], {"prompt": text}, tokenizer(text)["input_ids"], [tokenizer(text)["input_ids"]], \
            [{"prompt_token_ids": tokenizer(text)["input_ids"]}]:
        for request, expected in (None, without), (model.load_lora(saved), with_adapter), (saved, with_adapter):
            answer, = model.fast_generate(prompts, sampling_params=params, lora_request=request)
            assert answer.outputs[0].token_ids == expected and answer.finished
            assert answer.prompt_token_ids == tokenizer(text)["input_ids"]
            assert answer.outputs[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert greedy(model, tokenizer, text) == with_adapter
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


def test_the_engine_is_no_part_of_the_answer(trained, monkeypatch):
    model, _ = trained
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    here = model.fast_generate(["What is", "1 + 2"], params)
    monkeypatch.setattr(fast, "own_generation", lambda model: "its own generate")
    there = model.fast_generate(["What is", "1 + 2"], params)
    for a, b in zip(here, there):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids and a.outputs[0].text == b.outputs[0].text
        assert a.outputs[0].cumulative_logprob == pytest.approx(b.outputs[0].cumulative_logprob, abs=1e-4)
        assert [next(iter(x)) for x in a.outputs[0].logprobs] == a.outputs[0].token_ids


def test_n_seeds_stops_and_limits(trained):
    model, tokenizer = trained
    a, b, c = model.fast_generate(["What is", "What is", "1 +"], SamplingParams(n=3, seed=5, max_tokens=9))
    assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs] and len({tuple(o.token_ids) for o in a.outputs}) > 1
    assert [o.index for o in c.outputs] == [0, 1, 2] and all(len(o.token_ids) <= 9 for o in c.outputs)
    again = model.fast_generate("What is", SamplingParams(n=3, seed=5, max_tokens=9))[0]
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in a.outputs]
    how = dict(seed=8, max_tokens=40, ignore_eos=True)
    whole = model.fast_generate("What is", SamplingParams(**how))[0].outputs[0]
    stop = next(t for t in map(tokenizer.decode, whole.token_ids[1:]) if t.isalnum())
    for include in True, False:
        params = SamplingParams(**how, stop=[stop], include_stop_str_in_output=include)
        one = model.fast_generate("What is", params)[0].outputs[0]
        assert one.finish_reason == "stop" and one.stop_reason == stop and one.text.endswith(stop) == include
        assert one.token_ids == whole.token_ids[:len(one.token_ids)] and stop in tokenizer.decode(one.token_ids)
    each = model.fast_generate(["What is", "1 +"], [SamplingParams(ignore_eos=True, max_tokens=n) for n in (2, 5)])
    assert [len(r.outputs[0].token_ids) for r in each] == [2, 5]
    room = model.fast_generate("1 +", SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert len(room.outputs[0].token_ids) + len(room.prompt_token_ids) == 128 and room.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("prompts,given,error,words", [
    ([], {}, TypeError, "prompts=[]"), (3, {}, TypeError, "prompts=3"), ([""], {}, TypeError, "prompts[0]=''"),
    ([{"role": "user", "content": "x"}], {}, TypeError, "apply_chat_template"),
    ([[{"role": "user", "content": "x"}]], {}, TypeError, "apply_chat_template"),
    ("1 + 2 " * 99, {}, ValueError, "the model was loaded for 128"),
    ("1", dict(sampling_params={"n": 1}), TypeError, "SamplingParams"), ("1", dict(sampling_params=[]), ValueError, "0 entries"),
    ("1", dict(lora_request="no/where"), FileNotFoundError, "no/where"), ("1", dict(lora_request=True), TypeError, "load_lora"),
    ("1", dict(use_tqdm="x"), ValueError, "use_tqdm"),
])
def test_wrong_requests(trained, prompts, given, error, words):
    with pytest.raises(error) as raised: trained[0].fast_generate(prompts, **given)
    assert words in str(raised.value)


@pytest.mark.parametrize("given,words", [({"temperature": -1}, "temperature=-1"), ({"top_p": 0}, "top_p=0"), ({"n": 0}, "n=0"),
    ({"max_tokens": 0}, "max_tokens=0"), ({"stop": [""]}, "stop=''"), ({"presence_penalty": 1.0}, "presence_penalty=1.0"),
    ({"bad_words": ["x"]}, "bad_words"), ({"max_token": 3}, "'max_tokens'"), ({"top_k": -2}, "top_k=-2")])
def test_wrong_sampling_params(given, words):
    with pytest.raises((ValueError, TypeError)) as raised: SamplingParams(**given)
    assert words in str(raised.value)


def test_vllms_own_object_is_read_by_its_attributes():
    from types import SimpleNamespace
    theirs = SimpleNamespace(**{**vars(SamplingParams()), "top_k": -1, "temperature": 0.0, "output_kind": 0, "stop": []})
    assert differs(theirs) == {"temperature": 0.0} and as_sampling(theirs, (1,), [5]).greedy


# ---- save_lora, load_lora, and the model as an object

def test_a_round_trip_is_exact(folder, tmp_path):
    model, tokenizer = loaded(folder, use_gradient_checkpointing=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.save_lora(tmp_path / "a")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "a/adapter_model.safetensors"), load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    other, _ = loaded(folder, adapter=False)
    text, params = "What is 4 + 5?", SamplingParams(temperature=0, max_tokens=8)
    there = other.fast_generate(text, params, lora_request=other.load_lora(tmp_path / "a"))[0].outputs[0]
    assert there.token_ids == greedy(model, tokenizer, text) and not hasattr(other, "peft_config")
    assert all(p.requires_grad for p in other.parameters()) and FastLanguageModel.get_peft_model(other, r=4) is not other
    with using(model, model.load_lora(tmp_path / "a")), pytest.raises(RuntimeError), using(model, None): raise RuntimeError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_adapter_of_another_rank_comes_beside(folder, tmp_path):
    model, tokenizer = loaded(folder)
    wide, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=False, max_seq_length=128)
    wide = FastLanguageModel.get_peft_model(wide, r=8, lora_alpha=4, use_rslora=True)
    for p in wide.parameters():
        if p.requires_grad: p.data.normal_(std=0.3)
    wide.save_lora(tmp_path / "wide")
    mine, state = greedy(model, tokenizer, "1 + 2"), {n: p.detach().clone() for n, p in model.named_parameters()}
    out = model.fast_generate("1 + 2", SamplingParams(temperature=0, max_tokens=8), lora_request=model.load_lora(tmp_path / "wide"))
    assert out[0].outputs[0].token_ids == greedy(wide, tokenizer, "1 + 2") and greedy(model, tokenizer, "1 + 2") == mine
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: "lora" in n for n in state}
    assert list(model.peft_config) == ["default"] and all(torch.equal(p, state[n]) for n, p in model.named_parameters())


def test_methods_go_through_the_door_and_with_the_model(folder, tmp_path):
    model, tokenizer = loaded(folder)
    listed = {c.name for c in objects(model)}
    assert listed == {"fast_generate", "save_lora", "load_lora"}
    params = SamplingParams(temperature=0, max_tokens=4)
    first = model.fast_generate("1 + 2", params)[0].outputs[0].token_ids
    twin = copy.deepcopy(model)
    twin._grpo_nb.tokenizer_ref = model._grpo_nb.tokenizer_ref
    for p in model.parameters(): p.data.zero_()
    assert twin.fast_generate("1 + 2", params)[0].outputs[0].token_ids == first and twin.save_lora.args[0] is twin
    loaded_again = pickle.loads(pickle.dumps(twin))
    assert loaded_again.save_lora.args[0] is loaded_again and settings_of(loaded_again).engine is None
    twin.save_pretrained(tmp_path / "saved")
    assert not any("fast_generate" in f.read_text(errors="ignore") for f in (tmp_path / "saved").glob("*.json"))
    with pytest.raises(ValueError, match="the tokenizer that was loaded with this model is gone"): loaded_again.fast_generate("1")


def test_a_run_that_trains_is_not_disturbed(folder):
    from grpo_nb.ground.holders import let_go, take
    from grpo_nb.models.unwrap import causal_lm
    class Run: whereabouts = "the run in 'x', at step 1 of 2"
    model, _ = loaded(folder)
    run = Run()
    take(causal_lm(model), run)
    try:
        with pytest.raises(RuntimeError, match=r"fast_generate\(\): this model is being trained"): model.fast_generate("1")
    finally: let_go(run)
