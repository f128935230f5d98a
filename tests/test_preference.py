"""DPO, KTO, CPO, ORPO and BCO: TRL's losses on log-probs from packs are TRL's losses. Runs under every TRL from 1.12."""
import copy
import importlib
import warnings
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from parity import PlainHead, assert_same, gradients, relative, tiny, tokenizer

from grpo_nb.patch.core import PatchError, PatchSet
from grpo_nb.trainers import preference
from grpo_nb.step.forward import uninstall_all
from grpo_nb.step import packed
from grpo_nb.trainers import seams
from grpo_nb.trainers.tokens import token_stats

warnings.filterwarnings("ignore")
pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {
    "dpo": "trl.trainer.dpo_config:DPOConfig",
    "kto": "trl.trainer.kto_config:KTOConfig",
    "cpo": "trl.experimental.cpo.cpo_config:CPOConfig",
    "orpo": "trl.experimental.orpo.orpo_config:ORPOConfig",
    "bco": "trl.experimental.bco.bco_config:BCOConfig",
}
ALGORITHMS = tuple(preference.WRAPPERS)
LOGITS = ("logits/chosen", "logits/rejected", "logits/chosen_sum", "logits/rejected_sum")


def load(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def have(algorithm):
    try: return load(seams.HOMES[algorithm].trainer)
    except ImportError as error: pytest.skip(f"the installed TRL has no {algorithm}: {error}")


def text(g, n): return " ".join(f"w{i}" for i in torch.randint(3, 67, (n,), generator=g).tolist())


def pairs(rows=8, ragged=True, seed=0):
    "Prompts of different lengths, some of them twice; a pad id stands inside a prompt and inside an answer."
    g = torch.Generator().manual_seed(seed)
    def pick(low, high): return int(torch.randint(low, high + 1, (1,), generator=g)) if ragged else high
    prompts = [text(g, pick(3, 9)) for _ in range(rows - 1)]
    prompts = [*prompts, prompts[0]]
    if ragged: prompts[1] += " <pad> w5"
    data = [dict(prompt=p + " ", chosen=text(g, pick(2, 8)), rejected=text(g, pick(1, 8))) for p in prompts]
    if ragged: data[2]["chosen"] = "w9 <pad> " + data[2]["chosen"]
    return data


def dataset(algorithm, ragged=True):
    data = pairs(ragged=ragged)
    if algorithm in ("kto", "bco"):
        data = [
            dict(prompt=d["prompt"], completion=d[kind], label=kind == "chosen") for d in data for kind in ("chosen", "rejected")
        ]
    return Dataset.from_list(data)


def make(algorithm, tmp_path, family="qwen3", lora=None, ragged=True, ref=True, **config):
    "A trainer as TRL makes it."
    cls, model, more = have(algorithm), tiny(family), {}
    if lora:
        from peft import LoraConfig, get_peft_model
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        if lora == "new": more = dict(peft_config=adapter)
        else: # TRL keeps a copy of an adapter that is there already, under the name "ref"
            model = get_peft_model(model, adapter)
            _shake(model)
    defaults = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, remove_unused_columns=False, max_length=64, seed=3, learning_rate=1e-3,
    )
    args = load(CONFIG[algorithm])(**{**defaults, **config})
    if ref and not lora and algorithm in ("dpo", "kto", "bco"): more = dict(ref_model=tiny(family, seed=1))
    trainer = cls(model=model, args=args, train_dataset=dataset(algorithm, ragged), processing_class=tokenizer(), **more)
    if lora: _shake(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _shake(model):
    "An adapter's B starts at 0, where A has no gradient and policy and reference are equal."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name: p.normal_(0, 0.1)


def batch_of(trainer): return next(iter(trainer.get_train_dataloader()))


def measure(trainer, batch):
    "Loss, gradients and every metric of one micro-batch."
    trainer.model.zero_grad()
    stores = getattr(trainer, "_metrics", None), getattr(trainer, "_stored_metrics", None)
    for store in stores:
        if store is not None: store["train"].clear()
    if hasattr(trainer, "_total_train_tokens"): trainer._total_train_tokens = 0
    running = copy.deepcopy(vars(trainer.running)) if hasattr(trainer, "running") else {}
    accelerator = running.pop("accelerator", None)
    loss = trainer.compute_loss(trainer.model, {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    loss.backward()
    if running:
        vars(trainer.running).update(running | {"accelerator": trainer.running.accelerator if accelerator is None else accelerator})
    metrics = {k: list(v) for store in stores if store is not None for k, v in store["train"].items()}
    return loss.item(), gradients(trainer.model), metrics


def same(trainer, batch, stock, algorithm, skip=()):
    "Ours beside what stock measured, loss, gradients and metrics."
    with PatchSet(preference.patches(algorithm)): ours = measure(trainer, batch)
    assert ours[2].keys() == stock[2].keys()
    models = [m for m in (trainer.model, getattr(trainer, "ref_model", None)) if m is not None]
    assert_same(ours, stock, lambda change: measure(trainer, change(batch)), *models, metric=(2e-5, 2e-5), skip=skip)


def compare(trainer, batch, algorithm, chunks=(-1, 3), skip=()):
    "Stock beside ours, in one pack and in several."
    stock = measure(trainer, batch)
    assert stock[1] and max(g.abs().max() for g in stock[1].values()) > 0
    for n in chunks:
        trainer.args.unsloth_num_chunks = n
        same(trainer, batch, stock, algorithm, skip)
    trainer.args.unsloth_num_chunks = -1
    return stock


@pytest.fixture(scope="module", autouse=True)
def head():
    with pytest.MonkeyPatch.context() as patched:
        if version("trl").startswith("1.15."): patched.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)
        yield


@pytest.fixture(autouse=True)
def clean():
    yield
    uninstall_all()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "One trainer an algorithm; its losses are chosen by its attributes."
    made = {}
    def get(algorithm):
        if algorithm not in made:
            more = dict(use_weighting=True) if algorithm == "dpo" else {}
            made[algorithm] = make(algorithm, tmp_path_factory.mktemp(algorithm), **more)
            made[algorithm].use_weighting = False
        return made[algorithm], batch_of(made[algorithm])
    return get


DPO = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]
DPO_CASES = [
    *[dict(loss_types=[name], loss_weights=[1.0], label_smoothing=0.1, beta=0.1) for name in DPO],
    dict(loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    *[dict(f_divergence_type=name) for name in ("forward_kl", "js_divergence")],
    # TRL computes this one in fp32 and less only: no truth is there
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5),
    dict(ld_alpha=0.4),
    dict(use_weighting=True),
    dict(label_smoothing=0.2),
]


@pytest.mark.parametrize(
    "case",
    DPO_CASES,
    ids=lambda c: "-".join(map(str, c["loss_types"])) if "loss_types" in c else next(iter(c)) + str(next(iter(c.values()))),
)
def test_dpo(shared, monkeypatch, case):
    trainer, batch = shared("dpo")
    for name, value in case.items():
        assert hasattr(trainer, name), name
        monkeypatch.setattr(trainer, name, value)
    compare(trainer, batch, "dpo")


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(shared, monkeypatch, name):
    trainer, batch = shared("kto")
    monkeypatch.setattr(trainer, "loss_type", name)
    monkeypatch.setattr(trainer, "calculate_KL", name == "kto")
    compare(trainer, batch, "kto")


@pytest.mark.parametrize("case", [
    dict(loss_type="sigmoid"),
    dict(loss_type="hinge"),
    dict(loss_type="ipo"),
    dict(loss_type="simpo", simpo_gamma=0.3),
    dict(loss_type="sigmoid", label_smoothing=0.2),
    dict(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5),
    dict(alpha=0.1),
], ids=str)
def test_cpo(shared, monkeypatch, case):
    trainer, batch = shared("cpo")
    for name, value in case.items():
        monkeypatch.setattr(trainer, name, value, raising=name != "simpo_gamma") # which is there only for simpo
    compare(trainer, batch, "cpo", skip=LOGITS)


def test_orpo(shared): compare(*shared("orpo"), "orpo", skip=LOGITS)


def test_bco(shared): compare(*shared("bco"), "bco", skip=LOGITS)


def test_bco_with_another_prompt_distribution(tmp_path):
    "Rejected rows weighed by how their prompts are distributed: a classifier of prompt embeddings."
    pytest.importorskip("sklearn")
    pytest.importorskip("joblib")
    cls = have("bco")
    def embed(input_ids, attention_mask):
        return torch.nn.functional.one_hot(input_ids, 67).float().mul(attention_mask[..., None]).sum(1)
    args = load(CONFIG["bco"])(
        output_dir=str(tmp_path), per_device_train_batch_size=8, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, remove_unused_columns=False, max_length=64, prompt_sample_size=16,
    )
    trainer = cls(model=tiny(), ref_model=tiny(seed=1), args=args, train_dataset=dataset("bco"), processing_class=tokenizer(),
                  embedding_func=embed, embedding_tokenizer=tokenizer())
    trainer.model.train()
    compare(trainer, batch_of(trainer), "bco", chunks=(2,), skip=LOGITS)


@pytest.mark.parametrize("algorithm", ["cpo", "orpo", "bco"])
def test_mean_logits_without_padding(tmp_path, algorithm):
    "The one metric that counts TRL's padding is equal where there is none."
    trainer = make(algorithm, tmp_path, ragged=False)
    compare(trainer, batch_of(trainer), algorithm, chunks=(-1,))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora", ["new", "ref"])
def test_lora(tmp_path, algorithm, lora):
    "The reference is the adapter switched off, or the adapter that was there before."
    if lora == "ref" and algorithm in ("cpo", "orpo", "bco"): pytest.skip("TRL keeps no adapter of that name there")
    trainer = make(algorithm, tmp_path, lora=lora)
    assert algorithm not in ("dpo", "kto") or ("ref" in trainer.model.peft_config) == (lora == "ref")
    stock = compare(trainer, batch_of(trainer), algorithm, skip=LOGITS if algorithm in ("cpo", "orpo", "bco") else ())
    assert all("lora" in name for name in stock[1])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_families(tmp_path, family):
    trainer = make("dpo", tmp_path, family=family)
    compare(trainer, batch_of(trainer), "dpo")


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_left_over_budget(shared, monkeypatch, algorithm):
    "Packs smaller than a pair: the prompt is repeated, the gradient is not."
    trainer, batch = shared(algorithm)
    stock = measure(trainer, batch)
    monkeypatch.setattr(trainer.args, "max_tokens_per_pack", 20, raising=False)
    for step in ("packed", "padded"):
        monkeypatch.setattr(trainer.args, "step", step, raising=False)
        same(trainer, batch, stock, algorithm)


@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
def test_dropout_takes_a_row_each(tmp_path, algorithm):
    "A shared prompt would draw once for two rows: every row has its own."
    trainer = make(algorithm, tmp_path)
    for layer in trainer.model.model.layers: layer.self_attn.attention_dropout = 0.0
    trainer.model.config.attention_dropout = 0.0
    trainer.model.model.layers[0].mlp.add_module("drop", torch.nn.Dropout(0.5)) # never called: only its presence counts
    compare(trainer, batch_of(trainer), algorithm, chunks=(2,), skip=LOGITS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trl_path(shared, monkeypatch, algorithm):
    "step='trl' is TRL's loss to the last digit, or to rounding where only the logits are TRL's."
    trainer, batch = shared(algorithm)
    stock = measure(trainer, batch)
    monkeypatch.setattr(trainer.args, "step", "trl", raising=False)
    monkeypatch.setattr(packed, "run_pack", lambda *a, **k: pytest.fail("a pack was run"))
    same(trainer, batch, stock, algorithm)


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "bco"])
def test_reference_ahead_of_training(tmp_path, monkeypatch, algorithm):
    "precompute_ref_log_probs: the columns of the data set."
    columns = {
        "dpo": ("ref_chosen_logps", "ref_rejected_logps"),
        "kto": ("ref_logps", "ref_KL_logps"),
        "bco": ("reference_logps",),
    }[algorithm]
    have(algorithm)
    monkeypatch.setattr("datasets.fingerprint._CACHING_ENABLED", False) # TRL would find the first trainer's file
    found, losses = [], []
    for patched in (False, True):
        with PatchSet(preference.patches(algorithm) if patched else ()):
            trainer = make(algorithm, tmp_path / str(patched), precompute_ref_log_probs=True)
            batches = list(trainer.get_train_dataloader())
            found.append(sorted(zip(*[torch.cat([torch.as_tensor(b[name]) for b in batches]).tolist() for name in columns])))
            losses.append(measure(trainer, batches[0])[0])
    for a, b in zip(*found): assert a == pytest.approx(b, rel=1e-5, abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulation_and_evaluation(tmp_path, algorithm):
    "Two optimiser steps of two micro-batches end at the same weights, and an evaluation logs the same."
    ends, logs = [], []
    for on in (False, True):
        trainer = make(
            algorithm, tmp_path / str(on), per_device_train_batch_size=4,
            gradient_accumulation_steps=2, max_steps=2, optim="sgd", learning_rate=0.05,
            max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer.args.unsloth_num_chunks = 2
        if on:
            with PatchSet(preference.patches(algorithm)): trainer.train()
        else: trainer.train()
        ends.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        logs.append([l for l in trainer.state.log_history if "loss" in l])
    start = dict(tiny().named_parameters())
    moved = {n: p - start[n].detach() for n, p in ends[0].items()}
    assert relative({n: p - start[n].detach() for n, p in ends[1].items()}, moved) < 1e-4
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        quiet = (*LOGITS, *(f"logits/{k}" for k in ("chosen", "rejected")), *[k for k in a if "runtime" in k or "second" in k])
        for k in a:
            if k not in quiet and isinstance(a[k], float): assert b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-4), k


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_twenty_steps(tmp_path, algorithm):
    "The loss falls."
    trainer = make(
        algorithm, tmp_path, max_steps=20, logging_steps=1, save_strategy="no",
        disable_tqdm=True, learning_rate=3e-3, lr_scheduler_type="constant",
    )
    with PatchSet(preference.patches(algorithm)): trainer.train()
    losses = [l["loss"] for l in trainer.state.log_history if "loss" in l]
    assert len(losses) == 20 and sum(losses[-4:]) < sum(losses[:4])


def test_checkpointing(tmp_path):
    "Layers that run again in the backward read the tree's mask there too; the pack that is alive is not the only one."
    trainer = make("dpo", tmp_path)
    batch = batch_of(trainer)
    stock = measure(trainer, batch)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    for n in (1, 3):
        trainer.args.unsloth_num_chunks = n
        same(trainer, batch, stock, "dpo")


def test_token_stats_says_what_is_wrong(shared):
    trainer, batch = shared("dpo")
    ids = batch["input_ids"]
    with pytest.raises(ValueError, match="want='entropi'.*entropy"):
        token_stats(trainer, trainer.model, ids, ids, ids, ("entropi",))
    with pytest.raises(ValueError, match="must be equal"): token_stats(trainer, trainer.model, ids, ids[:, 1:], ids)
    with pytest.raises(ValueError, match="algorithm='dop'.*dpo"): preference.patches("dop")
    assert token_stats(trainer, trainer.model, ids, ids != -1, torch.zeros_like(ids)) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_everything_comes_back(algorithm):
    cls = have(algorithm)
    before = dict(vars(cls))
    with PatchSet(preference.patches(algorithm)): assert dict(vars(cls)) != before
    assert vars(cls).keys() == before.keys() and all(vars(cls)[k] is v for k, v in before.items())


def test_an_algorithm_that_is_gone():
    try: load(seams.HOMES["bco"].trainer)
    except ImportError:
        with pytest.raises((PatchError, ValueError), match="bco"): PatchSet(preference.patches("bco")).apply()
    else: pytest.skip("the installed TRL has all five")
