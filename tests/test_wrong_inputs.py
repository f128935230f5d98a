"""What is wrong is refused at once, in one sentence that names the argument, its value and what would be right: tables by area.

An entry is the code that a user would write, and the words that the error has to hold. `python tests/test_wrong_inputs.py` prints
the counts.
"""
import contextlib
import copy
import io
import json
import math # noqa: F401 the tables speak of it
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

LIMIT = 900 # characters of an error; a list of what is allowed may be long


NAMES = { # module -> what the tables speak of
    "grpo_nb": "UnpatchFastRL doctor rewards studio", "grpo_nb.advice": "memory", "grpo_nb.recipe": "code value",
    "grpo_nb.tasks.evaluate": "accuracy greedy", "grpo_nb.trainers.table": "patch_table show_patch",
    "grpo_nb.ui.charts.charts": "LiveCharts", "grpo_nb.record.archive": "read", "grpo_nb.ui.lab.lab": "RewardLab",
    "grpo_nb.ui.completions.completions": "CompletionBrowser", "grpo_nb.record.store": "Store",
    "grpo_nb.ui.panels.panels": "HyperparameterPanel", "grpo_nb.ui.panels.rewards": "RewardPanel",
}


def made_folder(root, name, source, **changes): # file -> text, bytes, or None to leave it out
    folder = Path(root, name)
    folder.mkdir()
    for path in Path(source).iterdir():
        if path.name not in changes: (folder / path.name).write_bytes(path.read_bytes())
    for file, text in changes.items():
        if text is not None: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def folders(root, model, tokenizer) -> dict: # name -> path
    "A model's folder, and copies of it with one thing wrong."
    whole = Path(root, "whole")
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    weights = (whole / "model.safetensors").read_bytes()
    broken = dict(
        no_config={"config.json": None}, bad_config={"config.json": "{not json"}, odd_config={"config.json": "[1, 2]"},
        no_weights={"model.safetensors": None}, cut_weights={"model.safetensors": weights[:-1000]},
        bad_header={"model.safetensors": b"\0" * 7},
        pickled={"model.safetensors": None, "pytorch_model.bin": b"no pickle at all"},
        bad_tokenizer={"tokenizer.json": "{}"}, cut_tokenizer={"tokenizer.json": '{"version": "1.0", '},
        bad_template={"chat_template.jinja": "{% for message in messages %}{{ message['content'] "},
        unknown_type={"config.json": json.dumps({"model_type": "nope"})},
        adapter={"config.json": None, "adapter_config.json": "{}"},
    )
    made = {name: made_folder(root, name, whole, **changes) for name, changes in broken.items()}
    empty, file = Path(root, "empty"), Path(root, "file")
    empty.mkdir()
    file.write_text("")
    nothing = {"no_tokenizer": {p.name: None for p in whole.iterdir() if p.name.startswith(("tokenizer", "chat"))}}
    made |= {name: made_folder(root, name, whole, **changes) for name, changes in nothing.items()}
    return made | dict(whole=str(whole), empty=str(empty), file=str(file))


def build(root) -> dict:
    "Everything that the tables speak of; one tiny model is made once."
    from importlib import import_module

    import pandas
    import trl

    from grpo_nb import FastLanguageModel, GRPORun, PatchFastRL, tasks
    from grpo_nb.app import cli
    from grpo_nb.recipe import trl as recipes
    from grpo_nb.tasks.tiny import tiny_model

    spoken_of = {name: getattr(import_module(module), name) for module, names in NAMES.items() for name in names.split()}
    task = tasks.get("sort_digits", n_train=16, n_test=4)
    made, tokenizer = tiny_model(task, steps=0, measure=False, hidden_size=64, layers=1)
    at = folders(root, made, tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        model, tokenizer = FastLanguageModel.from_pretrained(at["whole"], max_seq_length=1024, load_in_4bit=False)
        adapted = FastLanguageModel.get_peft_model(copy.deepcopy(model), r=4)

    def right(completions, answer, **kwargs): return [float(c == a) for c, a in zip(completions, answer)]
    def other(completions, **kwargs): return [0.0] * len(completions)
    def strict(completions, answer): return [0.0] * len(completions)
    def needs(completions, gold, **kwargs): return [0.0] * len(completions)

    small = dict(max_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=8, use_cpu=True,
                 output_dir=str(Path(root, "out")), save_strategy="no")

    def config(**fields):
        PatchFastRL("grpo")
        return trl.GRPOConfig(**dict(output_dir=str(Path(root, "out")), use_cpu=True) | fields)

    def plain(**fields): # TRL's own configuration, changed after it was made
        found = trl.GRPOConfig(output_dir=str(Path(root, "out")), use_cpu=True, bf16=False)
        for name, given in fields.items(): setattr(found, name, given)
        return found

    def run(functions=right, dataset=task.train, config=None, model=model, tokenizer=tokenizer, **more):
        fields = {name: more.pop(name) for name in list(more) if name in trl.GRPOConfig.__dataclass_fields__}
        return GRPORun(model, tokenizer, functions, dataset, {**small, **fields} if config is None else config, **more)

    def rows(*prompts, **columns): return [{"prompt": p, "answer": "1", **columns} for p in prompts] * 4

    def load(name=at["whole"], **more): return FastLanguageModel.from_pretrained(name, **{"load_in_4bit": False, **more})

    def adapt(model=model, **more): return FastLanguageModel.get_peft_model(model, **more)

    def tiny(**more): return tiny_model(task, **{"steps": 0, "measure": False, "hidden_size": 64, "layers": 1, **more})

    def from_yaml(text, module="", **more):
        head = "model_name_or_path: m\n" if "model_name_or_path" not in text else ""
        return recipes.from_yaml(text if text.startswith("#") else head + text, module, **more)

    def written(name, text):
        path = Path(root, name)
        path.write_text(text)
        return str(path)

    def command(*argv): # what it prints, as an error
        out = io.StringIO()
        with contextlib.redirect_stderr(out):
            try: code = cli.main(list(argv))
            except SystemExit as end: code = end.code
        if code: raise ValueError(out.getvalue().strip())

    def doctor_of(text): command("doctor", written("doctor.yaml", text))

    good = f"model_name_or_path: {at['whole']}\ndataset_name: {written('rows.jsonl', json.dumps(dict(prompt='1', answer='1')))}\n"
    ready = run()
    frame = pandas.DataFrame({"prompt": ["x" * 50] * 500, "answer": ["1"] * 500})
    no_template = copy.deepcopy(tokenizer)
    no_template.chat_template = None
    bad_template = copy.deepcopy(tokenizer)
    bad_template.chat_template = "{{ raise_exception('System role not supported') }}"
    chat = [{"role": "user", "content": "Sort 3 1 2"}]
    return {**globals(), **spoken_of, **locals(), "datasets": import_module("datasets")}


# What an error has to hold, beside being one sentence that came before anything was changed
AREAS = {}

AREAS["PatchFastRL, UnpatchFastRL"] = [
    ("PatchFastRL('gpro')", "algorithm='gpro'", "'grpo'"), ("PatchFastRL(3)", "algorithm=3", "grpo"),
    ("PatchFastRL('')", "algorithm=''", "grpo"), ("PatchFastRL(True)", "algorithm=True", "grpo"),
    ("PatchFastRL(['grpo'])", "algorithm=['grpo']", "grpo"), ("PatchFastRL('grpo', 3)", "FastLanguageModel=3", "for_inference"),
    ("PatchFastRL('grpo', 'FastLanguageModel')", "FastLanguageModel='FastLanguageModel'", "grpo_nb.FastLanguageModel"),
    ("PatchFastRL(FastLanguageModel)", "algorithm=", "grpo"), ("UnpatchFastRL('gpro')", "algorithm='gpro'", "'grpo'"),
    ("UnpatchFastRL(3)", "algorithm=3", "grpo"), ("patch_table('gpro')", "algorithm='gpro'", "'grpo'"),
    ("show_patch('gpro')", "algorithm='gpro'", "'grpo'"), ("show_patch(None)", "algorithm=None", "grpo"),
]

AREAS["from_pretrained"] = [
    ("load(3)", "model_name=3", "Hub id"), ("load(None)", "model_name=None", "Hub id"), ("load('')", "model_name=''", "Hub id"),
    ("load('./nope')", "model_name='./nope'", "no such folder"), ("load('a/b/c')", "model_name='a/b/c'", "no such folder"),
    ("load('a b')", "model_name='a b'", "Hub id"), ("load(at['file'])", "model_name=", "is a file"),
    ("load(at['empty'])", "model_name=", "config.json"), ("load(at['adapter'])", "model_name=", "adapter"),
    ("load(at['no_config'])", "model_name=", "no config.json"), ("load(at['no_weights'])", "model_name=", "no weights"),
    ("load(at['no_tokenizer'])", "model_name=", "no tokenizer"), ("load(at['bad_config'])", "bad_config", "config.json"),
    ("load(at['odd_config'])", "odd_config", "config.json"), ("load(at['unknown_type'])", "unknown_type", "config.json"),
    ("load(at['cut_weights'])", "cut_weights", "model.safetensors"),
    ("load(at['bad_header'])", "bad_header", "model.safetensors"), ("load(at['pickled'])", "pickled", "pytorch_model.bin"),
    ("load(at['bad_tokenizer'])", "bad_tokenizer", "tokenizer.json"),
    ("load(at['cut_tokenizer'])", "cut_tokenizer", "tokenizer.json"),
    ("load(at['bad_template'])", "bad_template", "chat template"), ("load(max_seq_length=0)", "max_seq_length=0", "at least 1"),
    ("load(max_seq_length='2048')", "max_seq_length='2048'", "whole number"),
    ("load(max_seq_length=1.5)", "max_seq_length=1.5", "whole number"),
    ("load(max_seq_length=True)", "max_seq_length=True", "whole number"), ("load(dtype='int8')", "dtype='int8'", "bfloat16"),
    ("load(dtype=3)", "dtype=3", "bfloat16"), ("load(load_in_4bit='yes')", "load_in_4bit='yes'", "True"),
    ("load(load_in_4bit=None)", "load_in_4bit=None", "True"), ("load(fast_inference='x')", "fast_inference='x'", "True"),
    ("load(gpu_memory_utilization=0)", "gpu_memory_utilization=0", "above 0"),
    ("load(gpu_memory_utilization=1.5)", "gpu_memory_utilization=1.5", "at most 1"),
    ("load(gpu_memory_utilization='half')", "gpu_memory_utilization='half'", "number"),
    ("load(max_lora_rank=0)", "max_lora_rank=0", "at least 1"), ("load(token=123)", "token=123", "token"),
    ("load(token=[])", "token=[]", "token"), ("load(revision=3)", "revision=3", "branch"),
    ("load(revision='')", "revision=''", "branch"), ("load(trust_remote_code='yes')", "trust_remote_code='yes'", "True"),
    ("load(local_files_only='no')", "local_files_only='no'", "True"), ("load(device_map='gpu')", "device_map='gpu'", "'cuda'"),
    ("load(device_map=3.5)", "device_map=3.5", "device"), ("load(attn_implementation=3)", "attn_implementation=3", "sdpa"),
    ("load(attn_implementation='flash')", "attn_implementation='flash'", "sdpa"),
    ("load(model_kwargs=3)", "model_kwargs=3", "dict"),
    ("load(model_kwargs={'nonsense': 1})", "model_kwargs", "'nonsense'", "from_pretrained"),
    ("load(model_kwargs={'dtype': 'fp16'})", "model_kwargs", "'dtype'"),
    ("load(tokenizer_kwargs='x')", "tokenizer_kwargs='x'", "dict"),
    ("load(tokenizer_kwargs={'eos': 'x'})", "tokenizer_kwargs", "'eos'", "eos_token"),
    ("load(tokenizer_kwargs={'eos_token': '<|nope|>'})", "eos_token='<|nope|>'", "vocabulary"),
    ("load(tokenizer_kwargs={'pad_token': 3})", "pad_token=3", "token"),
    ("load(max_seq_len=3)", "max_seq_len", "'max_seq_length'"), ("load(full_finetuning='x')", "full_finetuning='x'", "True"),
]

AREAS["get_peft_model, for_*"] = [
    ("adapt(r=0)", "r=0", "at least 1"), ("adapt(r=-1)", "r=-1", "at least 1"), ("adapt(r='16')", "r='16'", "whole number"),
    ("adapt(r=1.5)", "r=1.5", "whole number"), ("adapt(r=True)", "r=True", "whole number"),
    ("adapt(r=128)", "r=128", "max_lora_rank=64"), ("adapt(lora_alpha='x')", "lora_alpha='x'", "number"),
    ("adapt(lora_alpha=0)", "lora_alpha=0", "above 0"), ("adapt(lora_alpha=math.inf)", "lora_alpha=inf", "finite"),
    ("adapt(lora_alpha=math.nan)", "lora_alpha=nan", "finite"), ("adapt(lora_dropout=1)", "lora_dropout=1", "below 1"),
    ("adapt(lora_dropout=-.1)", "lora_dropout=-0.1", "at least 0"), ("adapt(lora_dropout='x')", "lora_dropout='x'", "number"),
    ("adapt(bias='some')", "bias='some'", "lora_only"),
    ("adapt(target_modules='(q_proj')", "target_modules='(q_proj'", "regular expression"),
    ("adapt(target_modules=3)", "target_modules=3", "all-linear"),
    ("adapt(target_modules=[])", "target_modules=[]", "all-linear"),
    ("adapt(target_modules=['nope'])", "target_modules", "'nope'", "q_proj"),
    ("adapt(target_modules='q_prog')", "target_modules", "'q_proj'"), ("adapt(target_modules=[3])", "target_modules", "3"),
    ("adapt(target_modules={'q_proj': 1.5})", "target_modules={'q_proj': 1.5}"),
    ("adapt(modules_to_save='lm_head')", "modules_to_save='lm_head'", "list"),
    ("adapt(modules_to_save=3)", "modules_to_save=3", "list"), ("adapt(modules_to_save=['nope'])", "modules_to_save", "'nope'"),
    ("adapt(random_state='x')", "random_state='x'", "whole number"),
    ("adapt(random_state=-1)", "random_state=-1", "at least 0"),
    ("adapt(use_gradient_checkpointing='sloth')", "'sloth'", "'auto'"),
    ("adapt(use_gradient_checkpointing=3)", "use_gradient_checkpointing=3", "'auto'"),
    ("adapt(use_rslora='x')", "use_rslora='x'", "True"), ("adapt(use_dora='yes')", "use_dora='yes'", "True"),
    ("adapt(rank_pattern=3)", "rank_pattern=3", "dict"), ("adapt(rank_pattern={'q_proj': 'x'})", "rank_pattern", "'x'"),
    ("adapt(alpha_pattern=[])", "alpha_pattern=[]", "dict"),
    ("adapt(layers_to_transform='x')", "layers_to_transform='x'", "whole number"),
    ("adapt(init_lora_weights='nope')", "init_lora_weights='nope'"), ("adapt(lora_rank=3)", "lora_rank", "takes"),
    ("adapt(adapted)", "adapter already", "unload"), ("adapt(None)", "model=", "transformers model"),
    ("adapt('name')", "model=", "transformers model"),
    ("FastLanguageModel.for_inference(None)", "model=None", "from_pretrained"),
    ("FastLanguageModel.for_inference('x')", "model='x'", "from_pretrained"),
    ("FastLanguageModel.for_training(None)", "model=None"), ("FastLanguageModel.for_training(3)", "model=3"),
    ("FastLanguageModel.for_inference(tokenizer)", "model=", "from_pretrained"),
]

AREAS["GRPOConfig"] = [
    *[(f"config(num_generations={v})", f"num_generations={v}", "whole number of at least 2")
      for v in (0, 1, -3, "'8'", 8.0, True, None)],
    *[(f"config(num_generations_eval={v})", f"num_generations_eval={v}", "whole number") for v in (0, "'x'", 1.5)],
    *[(f"config(per_device_train_batch_size={v})", f"per_device_train_batch_size={v}", "at least 1")
      for v in (0, -8, "'8'", 1.5)],
    *[(f"config({n}={v})", f"{n}={v}", "at least 1")
      for n in ("gradient_accumulation_steps", "num_iterations", "steps_per_generation", "max_completion_length",
      "per_device_eval_batch_size")
      for v in (0, "'x'")],
    *[(f"config(temperature={v})", f"temperature={v}", "above 0") for v in (0, -1, "'hot'")],
    ("config(temperature=1e9)", "temperature=1000000000.0", "at most 1000"),
    ("config(temperature=math.nan)", "temperature=nan", "finite"),
    *[(f"config(top_p={v})", f"top_p={v}", "at most 1") for v in (0, 1.5, "'x'")],
    ("config(top_k=-2)", "top_k=-2", "at least 0"), ("config(top_k=1.5)", "top_k=1.5", "whole"),
    ("config(top_k=-1, engine='hf')", "top_k=-1", "top_k=0"), ("config(min_p=2)", "min_p=2", "at most 1"),
    ("config(repetition_penalty=0)", "repetition_penalty=0", "above 0"), ("config(beta=-1)", "beta=-1", "at least 0"),
    ("config(beta='x')", "beta='x'", "number"), ("config(epsilon=-1)", "epsilon=-1", "at least 0"),
    ("config(epsilon_high='x')", "epsilon_high='x'"), ("config(delta=-1)", "delta=-1", "above 0"),
    ("config(top_entropy_quantile=2)", "top_entropy_quantile=2", "at most 1"),
    ("config(loss_type='gpro')", "loss_type='gpro'", "'grpo'", "'dapo'"), ("config(loss_type=3)", "loss_type=3", "'dapo'"),
    ("config(importance_sampling_level='tokens')", "importance_sampling_level='tokens'", "'token'"),
    ("config(scale_rewards='grop')", "scale_rewards='grop'", "'group'"),
    ("config(multi_objective_aggregation='x')", "'x'", "sum_then_normalize"),
    ("config(learning_rate='1e-5')", "learning_rate='1e-5'", "1e-5 without the quotes"),
    ("config(learning_rate=-1)", "learning_rate=-1", "at least 0"),
    ("config(learning_rate=1e30)", "learning_rate=1e+30", "at most 100"),
    ("config(learning_rate=math.inf)", "learning_rate=inf", "finite"), ("config(max_steps=-5)", "max_steps=-5", "-1"),
    ("config(max_steps=0)", "max_steps=0", "-1"), ("config(max_steps='x')", "max_steps='x'", "whole"),
    ("config(num_train_epochs=0)", "num_train_epochs=0", "nothing"),
    ("config(num_train_epochs=-1)", "num_train_epochs=-1", "at least 0"),
    ("config(max_grad_norm=-1)", "max_grad_norm=-1", "at least 0"),
    ("config(save_steps=0)", "save_steps=0", "save_strategy='no'"), ("config(save_steps=-3)", "save_steps=-3", "above 0"),
    ("config(logging_steps=0)", "logging_steps=0", "above 0"), ("config(eval_steps=0)", "eval_steps=0", "above 0"),
    ("config(seed='x')", "seed='x'", "whole number"), ("config(seed=-1)", "seed=-1", "at least 0"),
    ("config(weight_decay=-1)", "weight_decay=-1", "at least 0"), ("config(adam_beta1=1)", "adam_beta1=1", "below 1"),
    ("config(warmup_steps=-1)", "warmup_steps=-1", "at least 0"),
    ("config(save_total_limit='x')", "save_total_limit='x'", "whole number"),
    ("config(generation_batch_size=7)", "generation_batch_size=7", "8 would"),
    ("config(generation_batch_size=0)", "generation_batch_size=0", "at least 1"),
    ("config(generation_batch_size=12)", "generation_batch_size=12", "8 or 16 would"),
    ("config(bf16='no')", "bf16='no'", "True or False"),
    ("config(gradient_checkpointing='yes')", "gradient_checkpointing='yes'", "True or False"),
    ("config(use_vllm='no')", "use_vllm='no'", "True or False"),
    ("config(mask_truncated_completions='x')", "mask_truncated_completions='x'", "True"),
    ("config(remove_unused_columns='x')", "remove_unused_columns='x'", "True or False"),
    ("config(log_completions='x')", "log_completions='x'", "True"),
    ("config(lr_scheduler_type='cosin')", "lr_scheduler_type='cosin'", "'cosine'"),
    ("config(optim='adam')", "optim='adam'", "adamw_torch"), ("config(save_strategy='never')", "save_strategy='never'", "'no'"),
    ("config(eval_strategy=3)", "eval_strategy=3", "'no'"), ("config(output_dir=3)", "output_dir=3", "text"),
    ("config(run_name=3)", "run_name=3", "text"), ("config(vllm_mode='local')", "vllm_mode='local'", "'colocate'"),
    ("config(vllm_gpu_memory_utilization=2)", "vllm_gpu_memory_utilization=2", "at most 1"),
    ("config(reward_weights='x')", "reward_weights='x'", "list"),
    ("config(dataloader_num_workers=-1)", "dataloader_num_workers=-1", "at least 0"),
    ("config(skip_zero_advantage='no')", "skip_zero_advantage='no'", "True or False"),
    ("config(step='pack')", "step='pack'", "'packed'"), ("config(unsloth_num_chunks=0)", "unsloth_num_chunks=0", "-1"),
    ("config(max_tokens_per_pack=0)", "max_tokens_per_pack=0", "at least 1"),
    ("config(max_tokens_per_pack='x')", "max_tokens_per_pack='x'", "whole"), ("config(engine='vlm')", "engine='vlm'", "'vllm'"),
    ("config(engine='hf', use_vllm=True)", "engine='hf'", "use_vllm=True"),
    ("config(num_generation=8)", "num_generation", "'num_generations'"),
    ("config(max_prompt_length=0)", "max_prompt_length=0", "at least 1"), ("config(warmup_ratio=5)", "warmup_ratio=5", "at most 1"),
    ("config(evaluation_strategy='sometimes')", "eval_strategy='sometimes'"), ("config(no_cuda='x')", "no_cuda='x'", "contradict"),
    ("config(vllm_dtype='half')", "vllm_dtype", "TRL 0.18"), ("config(use_liger_loss='x')", "use_liger_kernel='x'"),
    ("config(logging_dir='x')", "logging_dir", "transformers 5.15"),
]

AREAS["GRPORun(...)"] = [
    ("run(model='name')", "model='name'", "from_pretrained"), ("run(model=None)", "model=None", "from_pretrained"),
    ("run(model=copy.deepcopy(model).requires_grad_(False))", "no parameter that is trained", "get_peft_model"),
    ("run(tokenizer=None)", "tokenizer=None", "from_pretrained"), ("run(tokenizer='x')", "tokenizer='x'", "from_pretrained"),
    ("run(tokenizer=no_template)", "chat template", "tokenizer.chat_template"),
    ("run(tokenizer=bad_template)", "chat template", "System role not supported"), ("run([])", "rewards is empty"),
    ("run(3)", "rewards=3", "function"), ("run([right, 3])", "rewards: 3", "function"), ("run(None)", "rewards=None"),
    ("run('corectness')", "'corectness'", "'correctness'"), ("run({right: 'high'})", "the weight of 'right'='high'", "number"),
    ("run({right: math.nan})", "the weight of 'right'=nan", "finite"),
    ("run(SimpleNamespace)", "SimpleNamespace is a class", "instance"), ("run(strict)", "'strict'", "**kwargs"),
    ("run(needs)", "'gold'", "'answer'"),
    ("run('correctness', [{'prompt': 'x'}] * 4)", "'correctness' needs 'answer'", "'prompt'"),
    ("run(rewards.weighted({'correctness': 1}), [{'prompt': 'x'}] * 4)", "'correctness' needs 'answer'"),
    ("run(remove_unused_columns=True)", "'answer'", "remove_unused_columns=True"),
    ("run(rewards.soft_overlong)", "'max_length'"), ("run(dataset=None)", "dataset=None", "datasets.Dataset"),
    ("run(dataset=[])", "dataset=[]", "no rows"), ("run(dataset=3)", "dataset=3"),
    ("run(dataset=['a'])", "dataset[0] is a str", "dicts"),
    ("run(dataset=[{'question': 'x'}])", "no column 'prompt'", "'question'"),
    ("run(dataset={'train': task.train})", "dataset['train']"),
    ("run(dataset=datasets.DatasetDict(train=task.train))", "dataset['train']"),
    ("run(dataset={'prompt': ['x'], 'answer': ['1']})", "dict of columns", "Dataset.from_dict"),
    ("run(dataset=frame)", "pandas", "Dataset.from_pandas"), ("run(dataset=rows(None))", "row 0 is None", "messages"),
    ("run(dataset=rows(3))", "row 0 is 3", "text"), ("run(dataset=rows('x', 3))", "row 1 is 3"),
    ("run(dataset=rows({'role': 'user', 'content': 'x'}))", "is a dict", "list"), ("run(dataset=rows([]))", "empty list"),
    ("run(dataset=rows([{'text': 'x'}]))", "'role'", "'content'"),
    ("run(dataset=rows([{'role': 'user', 'content': None}]))", "content is None"),
    ("run(dataset=rows([{'role': 'user', 'content': [{'type': 'text', 'text': 'zebra'}]}]))", "row 0", "parts"),
    ("run(dataset=rows([{'role': 'user', 'content': 3}]))", "content is 3"),
    ("run(dataset=rows(json.dumps(chat)))", "JSON", "json.loads"),
    ("run(dataset=datasets.Dataset.from_dict({'prompt': [None] * 8, 'answer': ['1'] * 8}))", "row 0 is None"),
    *[(f"run(dataset=rows(chat, {n}='x'))", f"'{n}'", "rename_column")
      for n in ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")],
    ("run(dataset=rows(chat)[:1])", "dataset has 1 row", "2"),
    ("run(dataset=rows(chat), per_device_train_batch_size=32)", "dataset has 4 rows", "8"),
    ("run(dataset=rows('x ' * 3000))", "1024 positions", "max_completion_length=8"),
    ("run(max_completion_length=5000)", "max_completion_length=5000", "1024"),
    ("run(eval_dataset=[{'question': 'x'}])", "eval_dataset", "'prompt'"),
    ("run(eval_dataset=rows(None))", "eval_dataset", "None"), ("run(config=3)", "config=3", "GRPOConfig"),
    ("run(config='grpo.yaml')", "config='grpo.yaml'"), ("run(config={'num_generation': 4})", "'num_generations'"),
    ("run(config={'max_prompt_length': 0})", "max_prompt_length=0"), ("run(num_iterations=0)", "num_iterations=0", "at least 1"),
    ("run(temperature=0)", "temperature=0"), ("run(config=plain(temperature=0))", "temperature=0", "above 0"),
    ("run(config=plain(loss_type='gpro'))", "loss_type='gpro'"), ("run(reward_weights='x')", "reward_weights='x'", "list"),
    ("run(reward_weights=[1.0, 2.0])", "reward_weights=[1.0, 2.0]", "1 number"),
    ("run(reward_weights=['x'])", "reward_weights[0]='x'", "number"), ("run(beta=0.1, model=SimpleNamespace())", "model="),
    ("run(reward_time_out=3)", "reward_time_out", "'reward_timeout'"),
    ("run(reward_timeout='x')", "reward_timeout='x'", "number"), ("run(reward_timeout=0)", "reward_timeout=0", "above 0"),
    ("run(callbacks=3)", "callbacks=3", "list"), ("run(callbacks=[3])", "callbacks[0]=3"),
    ("run(trainer_class=int)", "trainer_class=<class 'int'>", "GRPOTrainer"), ("run(trainer_class='x')", "trainer_class='x'"),
    ("run(progress='x')", "progress='x'", "True or False"),
    ("GRPORun(model, tokenizer, right, task.train, beta=0.1)", "'beta'", "config={'beta'"),
    ("run(train_dataset=task.train)", "train_dataset", "dataset="), ("run(vllm_dtype='half')", "TRL 0.18"),
]

AREAS["methods, change(), mid-run"] = [
    ("ready.change()", "change()", "learning_rate"), ("ready.change(learning_rat=1)", "learning_rat", "'learning_rate'"),
    *[(f"ready.change(learning_rate={v})", f"learning_rate={v}", "number") for v in ("'x'", -1, "'1e-5'", True)],
    ("ready.change(learning_rate=1e30)", "learning_rate=1e+30", "at most 100"),
    ("ready.change(learning_rate=math.nan)", "learning_rate=nan"),
    *[(f"ready.change(temperature={v})", f"temperature={v}", "above 0") for v in (0, -1, "'x'")],
    ("ready.change(temperature=1e9)", "temperature=1000000000.0", "at most"),
    *[(f"ready.change(beta={v})", f"beta={v}", "at least 0") for v in (-1, "'x'")],
    ("ready.change(beta=0.1)", "beta=0.1", "reference"),
    *[(f"ready.change(max_completion_length={v})", f"max_completion_length={v}", "at least 1") for v in (0, 1.5, "'x'")],
    ("ready.change(max_completion_length=5000)", "max_completion_length=5000", "1024"),
    ("ready.change(max_completion_length=None)", "max_completion_length=None"),
    *[(f"ready.change(reward_weights={v})", "reward_weights", "number") for v in ("3", "[1, 2]", "['x']", "[float('inf')]")],
    ("ready.change(reward_weights={'nope': 1})", "'nope'", "right"),
    ("ready.change(num_generations=4)", "num_generations", "It takes"), ("ready.wait()", "wait()", "start()"),
    ("ready.stop()", "stop()", "start()"), ("ready.pause()", "pause()", "start()"), ("ready.resume()", "resume()", "start()"),
    ("ready.save()", "save()", "start()"), ("ready.stop(save='maybe')", "save='maybe'", "True or False"),
    ("ready.start(background='no')", "background='no'", "True or False"),
    ("ready.start(background=3)", "background=3", "True or False"),
    ("ready.start(resume='./nope')", "resume='./nope'", "checkpoint"),
    ("ready.start(resume=True)", "resume=True", "checkpoint"), ("ready.start(resume=3)", "resume=3", "checkpoint"),
    ("setattr(ready, 'token_values', 'x')", "token_values='x'", "True or False"), ("ended.start()", "start()", "finished"),
    ("ended.stop()", "stop()", "finished"), ("ended.change(beta=0)", "change()", "finished"),
    ("ended.wait(timeout='x')", "timeout='x'", "number"), ("ended.wait(timeout=-1)", "timeout=-1", "at least 0"),
    ("ended.pause()", "finished"), ("ready.events.subscribe(3)", "handler=3", "callable"),
    ("ready.events.subscribe(print, 3)", "types: 3"), ("ready.events.subscribe(print, queue=-1)", "queue=-1"),
]

AREAS["rewards.*, weighted"] = [
    *[(f"rewards.correctness(prompts=None, completions={v}, answer=['1'])", f"completions{w}", "text")
      for v, w in ((None, "=None"), ("[None]", "[0]=None"), ("[3]", "[0]=3"), ("3", "=3"), ("{}", "={}"))],
    ("rewards.correctness(prompts=None, completions='abc', answer=['1'])", "completions='abc'", "list"),
    ("rewards.correctness(prompts=None, completions=['a'])", "'answer'"),
    ("rewards.correctness(prompts=None, completions=['a'], answer='1')", "'answer' has text"),
    ("rewards.correctness(prompts=None, completions=['a'], answer=['1', '2'])", "'answer' has 2"),
    ("rewards.correctness(prompts=None, completions=['a'], answer=3)", "'answer'", "3"),
    ("rewards.correctness(ignore_case='yes')", "ignore_case='yes'", "True or False"),
    ("rewards.correctness(ignore_space=3)", "ignore_space=3", "True or False"),
    ("rewards.correctness(column=3)", "column=3", "column"), ("rewards.correctness(column='')", "column=''"),
    ("rewards.correctness(colum='x')", "colum", "'column'"),
    ("rewards.correctness(1, 2, 3, 4)", "correctness() takes 3 options"), ("rewards.correctness(name=3)", "name=3"),
    ("rewards.correctness(name='')", "name=''"), ("rewards.numeric_answer(percent='x')", "percent='x'", "'unit'"),
    ("rewards.numeric_answer(tolerance='x')", "tolerance='x'", "number"),
    ("rewards.numeric_answer(tolerance=-1)", "tolerance=-1", "0 or more"),
    ("rewards.numeric_answer(marked_only='x')", "marked_only='x'", "True or False"),
    ("rewards.format_tags(tags='think')", "tags='think'"), ("rewards.format_tags(tags=[])", "tags=[]"),
    ("rewards.format_tags(tags=['<a>'])", "tags=['<a>']"), ("rewards.format_tags(tags=3)", "tags=3"),
    ("rewards.tag_count(tags=[3])", "tags=[3]"), ("rewards.regex()", "'pattern'"),
    ("rewards.regex(pattern='(')", "pattern='('", "regular expression"),
    ("rewards.regex(pattern=3)", "pattern=3", "regular expression"),
    ("rewards.regex(pattern='a', full='x')", "full='x'", "True or False"), ("rewards.soft_overlong(max_length=10)", "'cache'"),
    ("rewards.soft_overlong(max_length=10, cache=20)", "cache=20", "max_length=10"),
    ("rewards.soft_overlong(max_length='x', cache=2)", "max_length='x'"), ("rewards.length_target(target=-1)", "target=-1"),
    ("rewards.length_target(target='x')", "target='x'"), ("rewards.length_target(target=3, width=0)", "width=0"),
    ("rewards.length_target(target=3, unit='x')", "unit='x'", "'tokens'"),
    ("rewards.length_target(target=3)(prompts=None, completions=['a'])", "completion_ids"),
    ("rewards.repetition_penalty(n=0)", "n=0"), ("rewards.repetition_penalty(penalty=1)", "penalty=1"),
    ("rewards.repetition_penalty(unit='x')", "unit='x'"), ("rewards.get('corectness')", "'corectness'", "'correctness'"),
    ("rewards.get(3)", "3", "Allowed"), ("rewards.get('regex')", "'pattern'"), ("rewards.get(right, x=1)", "right", "options"),
    ("rewards.weighted(3)", "weighted()", "3"), ("rewards.weighted({})", "no rewards"),
    ("rewards.weighted({'nope': 1})", "'nope'"), ("rewards.weighted({right: 'x'})", "'right'='x'"),
    ("rewards.weighted({right: math.nan})", "nan"), ("rewards.weighted([right])", "pairs"),
    ("rewards.weighted({right: 1}, name=3)", "name=3"), ("rewards.weighted({model: 1})", "reward model"),
    ("rewards.reward(lambda x: 1)", "text"), ("rewards.reward(3)", "3", "function"),
]

AREAS["tasks, tiny_model"] = [
    ("tasks.get('sort_digit')", "'sort_digit'", "'sort_digits'"), ("tasks.get(3)", "3", "sort_digits"),
    ("tasks.get('sort_digits', n_train=0)", "n_train=0"), ("tasks.get('sort_digits', n_test='x')", "n_test='x'"),
    ("tasks.get('sort_digits', n_train=10**7, digits=2)", "n_train=10000000"),
    ("tasks.get('sort_digits', digits=1)", "digits=1"), ("tasks.get('sort_digits', digit=3)", "'digits'"),
    ("tasks.get('sort_digits', seed='x')", "seed='x'"), ("tasks.get('reverse_string', alphabet='aab')", "alphabet='aab'"),
    ("tasks.get('countdown', count=9)", "count=9"), ("tasks.gsm8k('./nope.jsonl')", "nope.jsonl"),
    ("tasks.gsm8k(n_train=0)", "n_train=0"), ("tasks.gsm8k(3)", "path_or_hub_id=3"),
    ("tasks.gsm8k(written('g.jsonl', 'x'))", "g.jsonl, line 1"), ("tasks.gsm8k(written('h.jsonl', '[]'))", "h.jsonl, line 1"),
    ("tasks.gsm8k(written('i.jsonl', json.dumps(dict(question='a', answer='b'))))", "####"),
    ("tasks.gsm8k(at['whole'], instruction=3)", "instruction=3"), ("tasks.nope", "nope"),
    ("tiny_model('sort_digits')", "task='sort_digits'", "tasks.get"), ("tiny_model(None)", "task=None"),
    ("tiny_model(tasks.get('countdown', n_train=4, n_test=2))", "warm start"), ("tiny(steps=-1)", "steps=-1"),
    ("tiny(steps=1.5)", "steps=1.5"), ("tiny(batch_size=0)", "batch_size=0"), ("tiny(learning_rate='x')", "learning_rate='x'"),
    ("tiny(hidden_size='x')", "hidden_size='x'"), ("tiny(hidden_size=100)", "hidden_size=100", "64"),
    ("tiny(layers=1.5)", "layers=1.5"), ("tiny(layers=0)", "layers=0"), ("tiny(vocab_size=10)", "vocab_size=10", "262"),
    ("tiny(vocab_size='x')", "vocab_size='x'"), ("tiny(device='gpu')", "device='gpu'", "'cuda'"),
    ("tiny(on_step=3)", "on_step=3", "function"), ("tiny(measure='no')", "measure='no'", "True or False"),
    ("tiny(seed='x')", "seed='x'"), ("tiny(path=3)", "path=3"), ("tiny(path=at['file'])", "is a file"),
    ("tiny(hiden_size=64)", "'hidden_size'"), ("accuracy(model, tokenizer, [1])", "dataset"),
    ("accuracy(model, tokenizer, [])", "dataset"), ("accuracy(model, tokenizer, task.test, reward=3)", "reward=3"),
    ("accuracy(model, tokenizer, task.test, max_new_tokens=0)", "max_new_tokens=0"),
    ("accuracy(model, tokenizer, task.test, batch_size='x')", "batch_size='x'"),
    ("accuracy(None, tokenizer, task.test)", "model=None"), ("greedy(model, tokenizer, 'text')", "prompts='text'", "list"),
    ("greedy(model, tokenizer, [None])", "None"),
]

AREAS["doctor, memory.estimate"] = [
    ("doctor(model, tokenizer, right, task.train, small, prompts=1.5)", "prompts=1.5", "whole"),
    ("doctor(model, tokenizer, right, task.train, small, prompts=-1)", "prompts=-1"),
    ("doctor(model, tokenizer, right, task.train, small, seconds='x')", "seconds='x'"),
    ("doctor(model, tokenizer, right, task.train, small, seconds=-1)", "seconds=-1"),
    ("doctor(model, tokenizer, right, task.train, small, second=3)", "second"), ("memory.estimate(3)", "model=3"),
    ("memory.estimate(None)", "model=None"), ("memory.estimate('./nope')", "./nope"),
    ("memory.estimate(model, {'num_generation': 4})", "'num_generations'"),
    ("memory.estimate(model, {'vllm_dtype': 'half'})", "TRL 0.18"),
    ("memory.estimate(model, {'max_completion_length': 0})", "max_completion_length=0"),
    ("memory.estimate(model, {'max_completion_length': None})", "max_completion_length=None"),
    ("memory.estimate(model, {'step': 'x'})", "step='x'"), ("memory.estimate(model, device='T5')", "T5"),
    ("memory.estimate(model, prompt_length=0)", "prompt_length=0"),
    ("memory.estimate(model, completion_length='x')", "completion_length='x'"),
    ("memory.estimate(model, {'num_generations': 0})", "num_generations=0"),
    ("memory.estimate(model, {'per_device_train_batch_size': 0})", "per_device_train_batch_size=0"),
    ("memory.estimate(model, rows='x')", "rows='x'"), ("memory.estimate(model, load_in_4bit='x')", "load_in_4bit='x'"),
    ("memory.estimate(model, peft=3)", "peft=3"), ("memory.estimate(model, dtype='x')", "dtype='x'"),
]

AREAS["charts, browser, lab, studio"] = [
    ("LiveCharts(3)", "charts=3"), ("LiveCharts('rewards')", "'rewards'"), ("LiveCharts(['nope'])", "'nope'"),
    ("LiveCharts(mode='x')", "mode='x'", "'auto'"), ("LiveCharts(interval='x')", "interval='x'"),
    ("LiveCharts(interval=-1)", "interval=-1"), ("LiveCharts(print=3)", "print=3"), ("LiveCharts().attach(3)", "run=3"),
    ("LiveCharts().mark(1, 'x', kind='y')", "kind='y'"), ("LiveCharts().to_svg(theme='x')", "theme='x'"),
    ("LiveCharts().to_png('x.png', theme='x')", "theme='x'"), ("LiveCharts().to_png('x.png', scale='x')", "scale='x'"),
    ("LiveCharts().to_csv(3)", "path=3"), ("LiveCharts().to_html('/proc/nope/x.html')", "/proc/nope"),
    ("CompletionBrowser(3)", "3", "events"), ("CompletionBrowser(step=3)", "step", "'steps'"),
    ("CompletionBrowser(weights=3)", "weights=3", "dict"), ("CompletionBrowser(interval='x')", "interval='x'"),
    ("CompletionBrowser('./nope')", "./nope"), ("CompletionBrowser(steps=0)", "steps=0"),
    ("CompletionBrowser(latest=500)", "latest=500"), ("CompletionBrowser(spill='x.txt')", ".jsonl"),
    ("CompletionBrowser(rewards=3)", "rewards=3"), ("CompletionBrowser().page(show='x')", "show='x'"),
    ("CompletionBrowser().page(colour='x')", "colour='x'"), ("CompletionBrowser().page(cards='x')", "cards='x'"),
    ("CompletionBrowser().attach(3)", "run=3"), ("read(written('c.txt', ''))", "c.txt"),
    ("Store(max_bytes=0)", "max_bytes=0"), ("RewardLab(right, 'x')", "dataset='x'"), ("RewardLab(right, [])", "no rows"),
    ("RewardLab(right, 3)", "dataset=3"), ("RewardLab([])", "rewards is empty"), ("RewardLab(right, timeout=-1)", "timeout=-1"),
    ("RewardLab(right, timeout='x')", "timeout='x'"), ("RewardLab(right, rows('x'), answer='nope')", "answer='nope'"),
    ("RewardLab(right, format=3)", "format=3"), ("RewardLab(right).score()", "nothing to score"),
    ("RewardLab(right).score(3)", "completions=3"), ("RewardLab(right).score(['a'], ['b', 'c'])", "prompts has 2"),
    ("RewardLab(right).score(['a'], row=0)", "dataset"), ("RewardLab(right, rows('x')).score(['a'], row=99)", "row=99"),
    ("RewardLab(right, rows('x')).score(['a'], row='x')", "row='x'"), ("RewardLab(right, rows('x')).probe(0)", "rows=0"),
    ("RewardLab(right).attach(3)", "3"), ("studio(model, tokenizer, task.train, right, foo=1)", "foo"),
    ("studio(None, tokenizer, task.train)", "model=None"), ("studio(model, None, task.train)", "tokenizer=None"),
    ("studio(model, tokenizer, 3)", "dataset=3"), ("studio(model, tokenizer, task.train, 3)", "rewards=3"),
    ("studio(model, tokenizer, task.train, right, 3)", "config=3"),
    ("studio(model, tokenizer, task.train, right, charts='x')", "charts='x'"),
    ("studio(model, tokenizer, task.train, right, held_out=3)", "held_out=3"),
    ("studio(model, tokenizer, task.train, right, reward_timeout='x')", "reward_timeout='x'"),
    ("studio(model, tokenizer, task.train, right).open('x')", "page='x'"),
    ("studio(model, tokenizer, task.train, right).stop()", "start()"), ("HyperparameterPanel(model, 3)", "config=3"),
    ("HyperparameterPanel(model).set(nope=1)", "nope"), ("HyperparameterPanel(model).set(bf16='no')", "bf16='no'"),
    ("HyperparameterPanel(model).set(learning_rate='x')", "learning_rate='x'"), ("RewardPanel(3)", "rewards=3"),
    ("RewardPanel(right).set('nope')", "'nope'"), ("RewardPanel(right).set('right', weight='x')", "weight='x'"),
    ("RewardPanel(right).set('right', on='no')", "on='no'"), ("RewardPanel(right, 3)", "dataset=3"),
]

AREAS["recipes"] = [
    ("from_yaml('learning_rate: fast')", "learning_rate='fast'", "number"),
    ("from_yaml('num_generations: -3')", "num_generations=-3", "at least 2"),
    ("from_yaml('lora_r: abc\\nuse_peft: true')", "r='abc'", "whole number"),
    ("from_yaml('num_generation: 3')", "num_generation", "num_generations"), ("from_yaml('vllm_dtype: half')", "TRL 0.18"),
    ("from_yaml('temperature: 0')", "temperature=0"), ("from_yaml('bf16: maybe')", "bf16='maybe'"),
    ("from_yaml('loss_type: gpro')", "loss_type='gpro'"), ("from_yaml('reward_funcs: [os.system]')", "os.system", "allow"),
    ("from_yaml('reward_funcs: [my_package.reward]')", "my_package.reward", "allow"),
    ("from_yaml('reward_funcs: 3')", "reward_funcs", "3"), ("from_yaml('reward_funcs: [3]')", "reward_funcs", "3"),
    ("from_yaml('reward_funcs: nope')", "'nope'"), ("from_yaml('reward_funcs: [grpo_rewards.x]')", "grpo_rewards.x"),
    ("from_yaml('reward_funcs: [grpo_nb.tasks.rewards.nope]')", "'nope'"), ("from_yaml('- 1')", "mapping"),
    ("from_yaml('a: [')", "line"), ("recipes.from_yaml('')", "mapping"), ("recipes.from_yaml('beta: 0.1')", "model_name"),
    ("from_yaml('model_name_or_path: [a]')", "model_name"), ("from_yaml('model_name_or_path: 3')", "model_name"),
    ("from_yaml('lora_dropout: x\\nuse_peft: true')", "lora_dropout='x'"), ("from_yaml('use_peft: maybe')", "use_peft='maybe'"),
    ("from_yaml('load_in_4bit: maybe')", "load_in_4bit='maybe'"), ("from_yaml('dtype: int3')", "dtype='int3'"),
    ("from_yaml('datasets: 3')", "datasets", "3"), ("from_yaml('datasets: [3]')", "datasets"),
    ("from_yaml('dataset_name: 3')", "dataset_name=3"), ("from_yaml('dataset_train_split: 3\\ndataset_name: a')", "split"),
    ("from_yaml('# grpo_nb: {not json\\nmodel_name_or_path: m')", "line 1", "grpo_nb"),
    ("from_yaml('# grpo_nb: [1]\\nmodel_name_or_path: m')", "line 1"),
    ("from_yaml('# grpo_nb: {\"model\": 3}\\nmodel_name_or_path: m')", "line 1", "model"),
    ("from_yaml('# grpo_nb: {\"chosen\": {\"beta\": 3}}\\nmodel_name_or_path: m\\nbeta: 0.1')", "line 1", "chosen"),
    ("from_yaml('# a\\n# grpo_nb: {\"nope\": 3}\\nmodel_name_or_path: m')", "line 2", "nope"),
    ("from_yaml('# grpo_nb: {\"model\": {\"trust_remote_code\": true}}\\nmodel_name_or_path: m')", "trust_remote_code", "line 1"),
    ("from_yaml('trust_remote_code: true')", "trust_remote_code", "trust_remote_code=True"),
    ("from_yaml('# grpo_nb: {\"config\": {\"step\": \"x\"}}\\nmodel_name_or_path: m')", "step='x'"),
    ("recipes.read(written('x.yaml', '# grpo_nb: {\\nmodel_name_or_path: m'))", "x.yaml", "line 1"),
    ("recipes.read(written('y.yaml', 'beta: ['))", "y.yaml", "line"), ("recipes.read('./nope.yaml')", "nope.yaml"),
    ("recipes.read(3)", "path=3"), ("recipes.read(at['whole'])", "folder"),
    ("recipes.read(written('z.txt', 'x'))", "z.txt", ".yaml"), ("recipes.read(written('w.py', 'x ='))", "w.py", "line 1"),
    ("recipes.read(written('v.py', 'x = 1'))", "v.py", "GRPOTrainer"), ("recipes.write(3, root)", "recipe=3"),
    ("code.from_code('x =')", "line 1"), ("code.from_code('x = 1')", "GRPOTrainer"), ("code.from_code(3)", "text=3"),
    ("code.from_code('GRPORun(m, t, rewards.correctness, d)')", "from_pretrained"),
    ("code.from_code('m, t = FastLanguageModel.from_pretrained(name())\\nGRPORun(m, t, rewards.correctness, d)')", "line 1",
     "plain value"),
    ("code.from_code('m, t = FastLanguageModel.from_pretrained(\"m\")\\nGRPORun(m, t, rewards.nope, d)')", "'nope'"),
    ("code.from_code('m, t = FastLanguageModel.from_pretrained(\"m\")\\nGRPORun(m, t, \"correctness\", d, dict(beta=-1))')",
     "beta=-1"),
    ("value.Recipe({})", "model_name"), ("value.Recipe({'model_name': 3})", "model_name"), ("value.Recipe(3)", "model=3"),
    ("value.Recipe({'model_name': 'm'}, config={'learning_rate': '1e-5'})", "learning_rate='1e-5'", "without the quotes"),
    ("value.Recipe({'model_name': 'm'}, config={'num_generations': -3})", "num_generations=-3"),
    ("value.Recipe({'model_name': 'm'}, config=3)", "config=3"),
    ("value.Recipe({'model_name': 'm'}, lora={'r': 'abc'})", "r='abc'"),
    ("value.Recipe({'model_name': 'm'}, lora=3)", "lora=3"),
    ("value.Recipe({'model_name': 'm'}, rewards=(3,))", "rewards", "3"),
    ("value.Recipe({'model_name': 'm'}, dataset={})", "dataset={}"),
    ("value.Recipe({'model_name': 'm'}, dataset=3)", "dataset=3"),
    ("value.Recipe({'model_name': 'm'}, config={'reward_weights': [1.0]})", "reward_weights=[1.0]"),
    ("value.Choice('corectness')", "'corectness'"), ("value.Choice(3)", "3"), ("value.Choice('correctness', 'x')", "'x'"),
    ("value.Choice('correctness', options={'ignore_case': 'yes'})", "ignore_case='yes'"),
    ("value.Choice('correctness', options=3)", "options=3"),
]

AREAS["command line"] = [
    ("command('dmo')", "'demo'"), ("command('demo', '--task', 'sort_digit')", "'sort_digits'"),
    ("command('demo', '--task', 'countdown')", "no tiny model"), ("command('demo', '--steps', '0')", "steps=0"),
    ("command('demo', '--steps', 'x')", "--steps", "'x'"), ("command('demo', '--seed', '-1')", "seed=-1"),
    ("command('demo', '--output-dir', '/proc/nope', '--steps', '1')", "output_dir='/proc/nope'"),
    ("command('demo', '--output-dir', at['file'])", "is a file"), ("command('demo', '--step', '3')", "--step"),
    ("command('bench', 'stp')", "'step'"), ("command('bench', 'step', '--device', 'gpu')", "device='gpu'"),
    ("command('bench', 'step', '--shape', 'x')", "shape='x'"), ("command('bench', 'step', '--repeats', '0')", "repeats=0"),
    ("command('bench', 'step', '--micro-batches', '5')", "micro_batches=5"),
    ("command('bench', 'rollout', '--engine', 'x')", "'x'"), ("command('bench', 'rollout', '--shape', 'x')", "'x'"),
    ("command('patches', 'gpro')", "'grpo'"), ("command('doctor')", "CONFIG"),
    ("command('doctor', './nope.yaml')", "nope.yaml"), ("command('doctor', at['whole'])", "whole"),
    ("doctor_of('- 1')", "no settings"), ("doctor_of('a: [')", "doctor.yaml"),
    ("doctor_of('beta: 0')", "model_name_or_path is missing"),
    ("doctor_of('model_name_or_path: m')", "dataset_name is missing"),
    ("doctor_of(good + 'num_generation: 3')", "'num_generations'"),
    ("doctor_of(good + 'vllm_guided_decoding_regex: x')", "TRL 0.28"),
    ("doctor_of(good + 'reward_funcs: 3')", "reward_funcs", "3"),
    ("doctor_of(good + 'reward_funcs: [os.system]')", "os.system", "--allow-imports"),
    ("doctor_of(good + 'reward_funcs: [nope]')", "'nope'"),
    ("doctor_of('model_name_or_path: [a]\\ndataset_name: x.jsonl')", "model_name_or_path=['a']"),
    ("doctor_of(good + 'lora_r: abc\\nuse_peft: true')", "lora_r='abc'"),
    ("doctor_of(good + 'dataset_train_split: 3')", "dataset_train_split=3"),
    ("doctor_of(good + 'learning_rate: fast')", "learning_rate='fast'"),
    ("command('doctor', written('p.yaml', good), '--prompts', '-1')", "prompts=-1"),
    ("command('doctor', written('p.yaml', good), '--seconds', '-1')", "seconds=-1"),
    ("command('doctor', written('p.yaml', good), '--prompts', 'x')", "--prompts"),
]

# What TRL takes and what makes sense stays accepted
RIGHT = [
    *[f"config({f})"
      for f in ( "num_generations_eval=1", "temperature=1e-3", "learning_rate=0", "max_steps=-1", "beta=0.0",
      "epsilon_high=None", "top_entropy_quantile=1.0", "top_entropy_quantile=0", "save_steps=0.1", "generation_batch_size=16",
      "steps_per_generation=4", "warmup_steps=0.1", "logging_steps=0.5", "max_grad_norm=0", "max_grad_norm=None",
      "num_train_epochs=0, max_steps=3", "scale_rewards=False", "scale_rewards='batch'", "scale_rewards=True",
      "loss_type='luspo', importance_sampling_level='sequence'", "min_p=0.0", "top_k=50", "top_k=-1, use_vllm=True",
      "epsilon=3e-4, epsilon_high=4e-4", "epsilon_high=5.0, loss_type='cispo'", "num_train_epochs=0.5", "bf16=False", "bf16=0",
      "gradient_checkpointing_kwargs={'use_reentrant': False}", "lr_scheduler_type='cosine'", "optim='adafactor'",
      "report_to=[]", "report_to='none'", "learning_rate=1", "seed=0", "max_completion_length=None", "delta=2.0",
      "pad_to_multiple_of='auto'", "unsloth_num_chunks=-1", "max_tokens_per_pack=None", "reward_weights=[1, 0.5]",
      "eval_strategy='no'", "save_total_limit=None", "generation_kwargs={'stop_strings': ['x']}", "lr_scheduler_kwargs='{}'",
      "output_dir=Path('x')")],
    "run([right, other])", "run([right, other], reward_weights=[1, 2])", "run({right: 0.0, other: -1})",
    "run(dataset=rows('x', ''))", "run(dataset=rows([{'role': 'system', 'content': 'x'}, *chat]))",
    "run(dataset=rows([*chat, {'role': 'assistant', 'content': 'I'}]))", "run(dataset=rows('[1, 2]'))",
    "run(dataset=rows(chat, completion='x'))", "run(dataset=task.train.to_iterable_dataset())",
    "run(max_completion_length=900)", "run(dataset=rows(chat)[:2])", "run(reward_timeout=math.inf)",
    "run(other, remove_unused_columns=True)", "run(config=plain(max_steps=1))",
    "run(lambda completions, **kw: [0.0] * len(completions))", "run(callbacks=())",
    "ready.change(temperature=0.5, learning_rate=1e-4)", "rewards.correctness(ignore_case=True)",
    "rewards.weighted({right: 0})", "LiveCharts(interval=0)", "from_yaml('learning_rate: 1e-5')",
    "from_yaml('reward_funcs: accuracy_reward')", "from_yaml('reward_funcs: [accuracy_reward, think_format_reward]')",
    "from_yaml('bf16: yes\\nnum_generations: \"8\"')", "from_yaml('reward_funcs: [my_package.reward]', allow_imports=True)",
    "from_yaml('trust_remote_code: true', trust_remote_code=True)",
]


def sentence_of(error) -> str: # empty where it is one
    text = str(error)
    if isinstance(error, AssertionError): return f"an assertion: {text}"
    if len(text) > LIMIT: return f"{len(text)} characters"
    if text.count("\n") > 3: return f"{text.count(chr(10)) + 1} lines"
    return ""


def ours(error) -> bool: # whether it was raised here, and not in a library below
    frames = traceback.extract_tb(error.__traceback__)
    return any(part in frames[-1].filename for part in ("grpo_nb", "test_wrong_inputs", "<string>"))


def judge(world, line) -> tuple: # (kind, what was said)
    code, *words = line
    try:
        with contextlib.redirect_stdout(io.StringIO()): eval(code, world)
    except Exception as error: # noqa: BLE001 any error is what is looked at
        said = f"{type(error).__name__}: {error}"
        missing = [word for word in words if word not in str(error)]
        if not missing and not sentence_of(error): return "clear", said
        return ("unclear" if ours(error) else "deep"), f"{said[:400]} {missing} {sentence_of(error)}"
    return "accepted", "no error came"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    found = build(str(tmp_path_factory.mktemp("inputs")))
    found["ended"] = ended_run(found)
    yield found
    from grpo_nb import UnpatchFastRL

    UnpatchFastRL()


def ended_run(found): # a run that has done all its steps
    done = copy.copy(found["ready"])
    done.state = "finished"
    done._ended = SimpleNamespace(is_set=lambda: True, wait=lambda seconds: True)
    return done


@pytest.fixture
def nobody_is_asked(monkeypatch):
    "No wrong input may reach for the network."
    def connect(self, address, *more): raise AssertionError(f"reached out for {address}")
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("area", AREAS)
def test_wrong_inputs_are_refused_at_once(world, nobody_is_asked, area, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = {name: p.detach().clone() for name, p in world["model"].named_parameters()}
    settings = copy.deepcopy(world["model"].config.to_dict())
    found = [(line[0], *judge(world, line)) for line in AREAS[area]]
    counts = {kind: sum(k == kind for _, k, _ in found) for kind in ("clear", "unclear", "deep", "accepted")}
    print(f"{area}: {len(found)} inputs, {counts}")
    assert not [f"{code}: {kind}: {said}" for code, kind, said in found if kind != "clear"]
    now = dict(world["model"].named_parameters())
    assert now.keys() == before.keys() and all((now[name] == p).all() for name, p in before.items())
    assert world["model"].config.to_dict() == settings and not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", RIGHT)
def test_what_makes_sense_stays_accepted(world, nobody_is_asked, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    eval(code, world)


# ---- a run that does nothing says so

def test_no_reward_for_anything(world, capsys, tmp_path):
    "Every reward is None: the steps are done, and a sentence says that nothing was learned."
    def none(completions, **kwargs): return [None] * len(completions)
    run = world["run"](none, output_dir=str(tmp_path), max_steps=2, model=copy.deepcopy(world["adapted"])).start(background=False)
    said = capsys.readouterr().out
    assert run.state == "finished" and run.step == 2
    assert said.count("every reward returned None") == 1 and said.count("it learned nothing") == 1


@pytest.mark.parametrize("after, state, words", [(1, "stopped", "ended at step 1 of 3"), (0, "failed", "without doing one")])
def test_an_end_before_the_last_step(world, capsys, tmp_path, after, state, words):
    "A callback ends the run early: it has not finished; where no step was done, it has failed."
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    class Ends(TrainerCallback):
        def on_step_end(self, args, trainer_state, control, **kwargs): control.should_training_stop = True

    class Nothing(GRPOTrainer): # a sampler of one's own, which gives nothing
        def _get_train_sampler(self, dataset=None): return []

    more = dict(callbacks=[Ends()]) if after else dict(trainer_class=Nothing)
    model = copy.deepcopy(world["adapted"])
    run = world["run"](output_dir=str(tmp_path), max_steps=3, model=model, **more)
    if after: run.start(background=False)
    else:
        with pytest.raises(RuntimeError, match=words): run.start(background=False)
    assert run.state == state and run.step == after
    if after: assert words in capsys.readouterr().out


def test_there_are_as_many_as_were_found():
    assert len(AREAS) == 12 and sum(map(len, AREAS.values())) >= 369


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as root:
        with contextlib.redirect_stdout(io.StringIO()):
            world = build(root)
            world["ended"] = ended_run(world)
        only, sums = sys.argv[1:], [0] * 5
        print(f"{'area':32} inputs  clear  unclear  deep  accepted")
        for area, lines in AREAS.items():
            if only and not any(word in area for word in only): continue
            found = [(line[0], *judge(world, line)) for line in lines]
            row = [len(lines), *(sum(k == kind for _, k, _ in found) for kind in ("clear", "unclear", "deep", "accepted"))]
            sums = [a + b for a, b in zip(sums, row)]
            print(f"{area:32} {row[0]:6} {row[1]:6} {row[2]:8} {row[3]:5} {row[4]:9}")
            for code, kind, said in found:
                if kind != "clear": print(f"    {kind}: {code}: {said}")
        print(f"{'sum':32} {sums[0]:6} {sums[1]:6} {sums[2]:8} {sums[3]:5} {sums[4]:9}")
