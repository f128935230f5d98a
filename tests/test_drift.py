"""TRL and its companions change: what the patches stand in for is said where it does, and the gradient is the changed one's.

`pytest tests/test_drift.py -m "slow or not slow" -s` prints the table: the change, what was said, the path, and how far the patched
trainer's gradient is from that of the changed TRL without patches."""
import ast
import importlib
import json
import linecache
import sys
from contextlib import contextmanager
from inspect import getattr_static, unwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from parity import grpo_trainer, relative, tiny
from windows import generation_batch, optimiser_steps, prepare

from grpo_nb.patch import rewrite
from grpo_nb.patch.anchor import function_of, source_of
from grpo_nb.patch.core import PatchError, look_up
from grpo_nb.patch.fingerprint import fingerprint
from grpo_nb.patch.undo import Undo
from grpo_nb.trainers import drift, patch, seams, self_check as comparison, state

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unpatched")]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
newest = pytest.mark.skipif(not seams.trl_version().startswith(seams.TESTED.last), reason="the changes are written for TRL's lines")
LOSS = "_compute_loss"
TABLE = []


def changed(entry, owner, *replacements):
    "A method with text replaced in its source, the last place of each; a default argument too."
    original = unwrap(function_of(entry))
    source = source_of(original)
    text = source.text
    for old, new in zip(replacements[::2], replacements[1::2]):
        before, found, after = text.rpartition(old)
        assert found, f"{source.label} has no {old!r}"
        text = before + new + after
    node, filename = rewrite.definition(text), f"<drift {len(linecache.cache)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    made = rewrite.new_function(rewrite.compiled(node, original, filename), original, owner)
    plain = [ast.literal_eval(d) for d in node.args.defaults if isinstance(d, ast.Constant | ast.UnaryOp)]
    if len(plain) == len(node.args.defaults): made.__defaults__ = tuple(plain) or None
    made = rewrite.decorated(made, node, entry, filename, "drift", source.label)
    return type(entry)(made) if isinstance(entry, staticmethod | classmethod) else made


@contextmanager
def drifted(algorithm, method, *replacements):
    "Inside, TRL's method says something else. A helper ('module:name') does so wherever TRL has imported it."
    undo, target = Undo(), method if ":" in method else f"{seams.HOMES[algorithm].trainer}.{method}"
    module, _, name = target.partition(":")
    owner = look_up(module if "." not in name else f"{module}:{name.partition('.')[0]}")
    key = name.rpartition(".")[2]
    entry = getattr_static(owner, key)
    made = changed(entry, owner if isinstance(owner, type) else None, *replacements)
    if isinstance(owner, type): undo.setattr(owner, key, made, new=key not in vars(owner))
    else:
        for holder in [m for n, m in list(sys.modules.items()) if n.startswith("trl.") and vars(m).get(key) is entry]:
            undo.setattr(holder, key, made)
    try: yield
    finally:
        patch.UnpatchFastRL() # some patches stand around what was changed
        undo.restore()


def group_step(algorithm, tmp_path, old=True, **config):
    "Gradients of one optimiser step of two micro-batches; `old`: off policy, as the packed step takes it at later steps only."
    cls = {"rloo": rloo_trainer}.get(algorithm, grpo_trainer)
    trainer = cls(tiny(), tmp_path, **config)
    batch = generation_batch(16)
    g = torch.Generator().manual_seed(3)
    shape = batch["completion_ids"].shape
    if old: batch["old_per_token_logps"] = -4 + 0.3 * torch.randn(shape, generator=g)
    if algorithm == "rloo": batch["old_logps"] = -4.0 * batch["completion_mask"].sum(1)
    if config.get("beta"): batch["ref_per_token_logps"] = -4 + 0.3 * torch.randn(shape, generator=g)
    prepare(trainer, 2, 2, 1, [batch])
    (_, grads), = optimiser_steps(trainer, [2])[0]
    return grads


def rloo_trainer(model, tmp_path, **config):
    from datasets import Dataset
    from parity import tokenizer
    from trl import RLOOConfig, RLOOTrainer

    given = dict(output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=12, bf16=False,
                 use_cpu=True, report_to=[], gradient_checkpointing=False, beta=0.0)
    def reward(completions, **kw): return [0.0] * len(completions)

    trainer = RLOOTrainer(model=model, reward_funcs=reward, args=RLOOConfig(**given | config), processing_class=tokenizer(),
                          train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * 8))
    trainer.model.train()
    return trainer


def other_step(algorithm, tmp_path, **config):
    "Gradients of the first optimiser step of another trainer."
    import test_joint

    trainer = test_joint.make(algorithm, tmp_path, max_steps=1, **config)
    steps, _ = test_joint.trained(trainer)
    return steps[0]


def step_of(algorithm, tmp_path, config):
    return (group_step if algorithm in patch.GROUPS else other_step)(algorithm, tmp_path, **config)


def row(capsys, tmp_path, label, algorithm, config=None):
    "The step of what is there now, without patches and with them; a line of the table."
    config = config or {}
    theirs = step_of(algorithm, tmp_path / "theirs", config)
    capsys.readouterr()
    try:
        patch.PatchFastRL(algorithm)
        ours = step_of(algorithm, tmp_path / "ours", config)
        path = "packed" if applied(algorithm) else "TRL's"
    except PatchError as error: ours, path, words = None, "refused", str(error)
    else: words = capsys.readouterr().out
    off = None if ours is None else relative(ours, theirs)
    said = ("not as in TRL", "is off TRL's own", "do not fit")
    told = next((line for line in words.splitlines() if any(text in line for text in said)), "")
    TABLE.append((algorithm, label, told[:110], path, off))
    return told, path, off, words


def applied(algorithm):
    return all(p.is_applied for p in patch.patches_of(algorithm) if drift.part_of(algorithm, p) == algorithm)


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if not TABLE: return
    print(f"\n{'':10} {'change':44} {'path':8} {'off by':>8}  said")
    for algorithm, label, told, path, off in TABLE:
        print(f"{algorithm:10} {label:44} {path:8} {'' if off is None else format(off, '8.1g')}  {told}")


G, R = "grpo", "rloo"
KL = {"beta": 0.1}
CHANGES = [ # what it is, whose, the method, texts in pairs, settings
    ("factor on the loss", G, LOSS, ("return loss", "return loss * 2.0")),
    ("factor near 1", G, LOSS, ("return loss", "return loss * 1.01")),
    ("sign", G, LOSS, ("return loss", "return -loss")),
    ("early return", G, LOSS, ("        # Log the metrics\n", "        if mode == 'train': return loss * 3\n")),
    ("term in place", G, LOSS, ("        # Log the metrics\n", "        loss += 0.1 * per_token_logps.mean()\n")),
    ("term after the sum", G, LOSS, (
        "        # Log the metrics\n",
        "        loss = 0.1 * (per_token_logps * mask).mean() + loss\n",
    )),
    ("factor on token losses", G, LOSS, (
        '        mode = "train" if',
        '        per_token_loss = 2 * per_token_loss\n        mode = "train" if',
    )),
    ("token losses in place", G, LOSS, (
        '        mode = "train" if',
        '        per_token_loss += per_token_logps\n        mode = "train" if',
    )),
    ("advantages scaled", G, LOSS, ('advantages = inputs["advantages"]', 'advantages = 2 * inputs["advantages"]')),
    ("advantages clipped", G, LOSS, ('advantages = inputs["advantages"]', 'advantages = inputs["advantages"].clamp(-0.5, 0.5)')),
    ("advantages unsqueezed otherwise", G, LOSS, (
        "advantages = advantages.unsqueeze(1)",
        "advantages = advantages[:, None] * 1.5",
    )),
    ("old log-probs left out", G, LOSS, ('old_per_token_logps = inputs.get("old_per_token_logps")', "old_per_token_logps = None")),
    ("ratio halved", G, LOSS, ("coef_1 = torch.exp(log_importance_weights)", "coef_1 = torch.exp(log_importance_weights / 2)")),
    ("log-ratio clamped", G, LOSS, (
        "        if self.importance_sampling_level ==",
        "        log_ratio = log_ratio.clamp(-0.1, 0.1)\n        if self.importance_sampling_level ==",
    )),
    ("lower bound", G, LOSS, (
        "torch.clamp(coef_1, 1 - self.epsilon_low, 1 + self.epsilon_high)",
        "torch.clamp(coef_1, 1 - 2 * self.epsilon_low, 1 + self.epsilon_high)",
    )),
    ("mask of the first token", G, LOSS, (
        "        # Compute the per_token_logps and the entropy",
        "        mask = mask.clone(); mask[:, 0] = 0\n        # Compute the per_token_logps",
    )),
    ("mask of tools passed over", G, LOSS, ('else completion_mask * inputs["tool_mask"]', "else completion_mask")),
    ("another normaliser", G, LOSS, (
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0)',
        'normalizer = inputs["num_items_in_batch"].clamp(min=100.0)',
    )),
    ("steps of generation left out", G, LOSS, (" / self.args.steps_per_generation", "")),
    ("mean instead of sum", G, LOSS, (
        "loss = (per_token_loss * mask).sum() / normalizer",
        "loss = (per_token_loss * mask).mean() / normalizer * 96",
    )),
    ("a branch", G, LOSS, (
        "        if self.beta != 0.0:\n            per_token_loss",
        "        if self.max_completion_length > 3: per_token_loss = per_token_loss * 0.5\n"
        "        if self.beta != 0.0:\n            per_token_loss",
    )),
    ("k3 halved", G, LOSS, (
        "            # Importance sampling correction for the KL",
        "            per_token_kl = per_token_kl / 2\n            # Importance sampling correction for the KL",
    ), KL),
    ("beta squared", G, LOSS, ("self.beta * per_token_kl", "self.beta ** 2 * per_token_kl"), KL),
    ("KL of positive advantages", G, LOSS, ("self.beta * per_token_kl", "self.beta * per_token_kl * (advantages > 0)"), KL),
    ("normaliser of grpo", G, LOSS, (
        "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()",
        "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=2.0)).mean()",
    ), {"loss_type": "grpo"}),
    ("clamp of cispo", G, LOSS, (
        "torch.clamp(coef_1, max=self.epsilon_high).detach()",
        "torch.clamp(coef_1, max=self.epsilon_high / 9)",
    ), {"loss_type": "cispo"}),
    ("temperature of sapo", G, LOSS, ("* 4 / temperatures", "* 2 / temperatures"), {"loss_type": "sapo"}),
    ("length of dr_grpo", G, LOSS, (
        "(per_token_loss.size(0) * self.max_completion_length)",
        "(per_token_loss.size(0) * 99)",
    ), {"loss_type": "dr_grpo"}),
    ("a new metric", G, LOSS, ("        return loss", "        self._metrics[mode]['new'].append(1.0)\n        return loss")),
    ("a metric that means something else", G, LOSS, ("global_masked_mean(entropies)", "global_masked_mean(entropies ** 2)")),
    ("a renamed variable", G, LOSS, (
        "per_token_loss1 = coef_1",
        "first = coef_1",
        "torch.min(per_token_loss1,",
        "torch.min(first,",
    )),
    ("weights of vespo", G, "get_gamma_weights", ("return phi_seq", "return 2 * phi_seq"), {"loss_type": "vespo"}),
    ("mask of off-policy rows", G, "get_off_policy_mask", (
        "is_pos_adv | is_low_kl",
        "is_pos_adv & is_low_kl",
    ), {"off_policy_mask_threshold": 0.5}),
    ("threshold of the entropy", G, "get_high_entropy_mask", ("threshold", "threshold / 2")),
    ("log-probs scaled", G, "_get_per_token_logps_and_entropies", ("return logps,", "return 2 * logps,")),
    ("log-probs of another column", G, "_get_per_token_logps_and_entropies", (
        "logps = torch.cat(all_logps, dim=0)",
        "logps = torch.cat(all_logps, dim=0).roll(1, 1)",
    )),
    ("a default argument", G, "_get_per_token_logps_and_entropies", ("compute_entropy=False", "compute_entropy=True")),
    ("loss in its wrapper", G, "compute_loss", (
        "return self._compute_loss(model, inputs)",
        "return 2 * self._compute_loss(model, inputs)",
    )),
    ("the buffer is read backwards", G, "_prepare_inputs", (
        "self._step % self.args.steps_per_generation]",
        "-1 - self._step % self.args.steps_per_generation]",
    )),
    ("a training step is scaled", G, "training_step", ("        return output", "        return output * 1.0")),
    ("micro-batches are split otherwise", G, "trl.trainer.utils:split_tensor_dict", ("chunk_size =", "chunk_size = 1 *")),
    ("rows are shuffled otherwise", G, "trl.trainer.utils:shuffle_sequence_dict", (
        "torch.randperm(batch_size)",
        "torch.randperm(batch_size).flip(0)",
    )),
    ("the head of the log-probs", G, "trl.trainer.utils:add_fused_lm_head", ("temperature,\n", "temperature * 2,\n")),
    ("rewards", G, "_calculate_rewards", ("return rewards_per_func", "return rewards_per_func * 1.0"), {"old": False}),
    ("a turn of sampling", G, "_generate_single_turn", (
        "return completion_ids, logprobs",
        "return completion_ids, None",
    ), {"old": False}),
    ("factor on the loss", R, LOSS, ("return loss", "return loss * 2.0")),
    ("sign", R, LOSS, ("loss = per_sequence_loss.mean()", "loss = -per_sequence_loss.mean()")),
    ("sum instead of mean", R, LOSS, ("loss = per_sequence_loss.mean()", "loss = per_sequence_loss.sum()")),
    ("old log-probs", R, LOSS, ('old_logps = inputs["old_logps"]', 'old_logps = inputs["old_logps"] / 2')),
    ("log-probs are means", R, LOSS, (
        "logps = (per_token_logps * completion_mask).sum(1)",
        "logps = (per_token_logps * completion_mask).mean(1)",
    )),
    ("lower bound", R, LOSS, ("1 - self.epsilon_low, 1 + self.epsilon_high)", "1 - self.epsilon_low / 2, 1 + self.epsilon_high)")),
    ("log-probs scaled", R, "_get_per_token_logps_and_entropies", ("return logps,", "return 2 * logps,")),
    ("factor on the loss", "dpo", LOSS, (
        "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)",
        "per_sequence_loss = -2 * F.logsigmoid(self.beta * delta_score)",
    )),
    ("a branch", "dpo", LOSS, ("        loss = 0.0\n", "        loss = 0.0\n        if self.beta > 1: return loss\n")),
    ("the reference ahead", "dpo", "compute_ref_log_probs", ("return ref_logps.chunk", "return (2 * ref_logps).chunk")),
    ("a renamed variable", "dpo", "compute_loss", ("num_items_in_batch=None", "num_items_in_batch=0")),
    ("factor on the loss", "kto", LOSS, ("loss = losses.nanmean()", "loss = 2 * losses.nanmean()")),
    ("weights exchanged", "kto", LOSS, ("self.desirable_weight * chosen_losses", "3 * self.desirable_weight * chosen_losses")),
    ("divergence halved", "kto", "_compute_kl_logps", ("].sum(-1)", "].sum(-1) * 0.5")),
    ("factor on the loss", "sft", "compute_loss", ("loss = per_token_loss.sum() /", "loss = 2 * per_token_loss.sum() /")),
    ("a normaliser", "sft", "compute_loss", (".clamp(min=1)", ".clamp(min=1000)")),
    ("factor on the loss", "reward", "compute_loss", (
        "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()",
        "loss = -2 * nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()",
    )),
    ("sign", "reward", "compute_loss", ("rewards_chosen - rewards_rejected).mean()", "rewards_rejected - rewards_chosen).mean()")),
    ("likelihood of half", "cpo", "concatenated_forward", (
        "loss = loss_fct(logits, labels)",
        "loss = 0.5 * loss_fct(logits, labels)",
    )),
    ("log-probs are sums of half", "cpo", "get_batch_logps", (
        "return (per_token_logps * loss_mask).sum(-1)",
        "return 0.5 * (per_token_logps * loss_mask).sum(-1)",
    )),
    ("factor on the loss", "cpo", "cpo_loss", ("return losses,", "return 2 * losses,")),
    ("likelihood of half", "orpo", "concatenated_forward", (
        "loss = loss_fct(logits, labels)",
        "loss = 0.5 * loss_fct(logits, labels)",
    )),
    ("odds doubled", "orpo", "odds_ratio_loss", ("losses = self.beta * ratio", "losses = 2 * self.beta * ratio")),
    ("loss", "orpo", "get_batch_loss_metrics", (
        "loss = policy_nll_loss - losses.mean()",
        "loss = policy_nll_loss - 2 * losses.mean()",
    )),
]
QUICK = (0, 14, 22, 29, 30, 34, 45, 58)
names = [f"{algorithm}: {label}" for label, algorithm, *_ in CHANGES]


@newest
@pytest.mark.parametrize("number", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(len(CHANGES))],
                         ids=lambda n: names[n])
def test_a_change_of_trls_is_said(number, tmp_path, capsys):
    "Said with the lines, and the patched trainer's gradient is the changed TRL's; packed where only sampling changed."
    label, algorithm, method, texts, *config = CHANGES[number]
    with drifted(algorithm, method, *texts):
        told, path, off, words = row(capsys, tmp_path, label, algorithm, *config)
        sampling = {m.name for m in drift.moved(f"{algorithm} sampling")} if algorithm in patch.GROUPS else ()
    assert told and path == ("packed" if sampling else path) and path != "refused" or "do not fit" in told
    if path != "refused":
        assert path == ("packed" if sampling else "TRL's") and off < 1e-5 and method.rpartition(".")[2].rpartition(":")[2] in words
        assert "\n+" in words and "drift='accept'" in words


# ---- what is unchanged

def mine(): return [part for part in drift.PARTS if any(drift.part_of(n, p) == part for n in seams.HOMES if seams.has(n)
                                                         for p in (*patch.patches_of(n), *patch.shared_patches(n)))]


def test_the_sources_are_those_of_the_installed_version():
    "Every part's, for each of the tested versions; and the texts that are kept are those that the fingerprints are of."
    assert seams.trl_version() in seams.TESTED, "make fingerprints, after the version was added to TESTED"
    assert not [m.target for part in mine() for m in drift.moved(part)]
    assert all(fingerprint(text) == found for found, text in drift.sources().items())
    for algorithm in seams.HOMES: assert drift.versions_of(algorithm) == seams.minor_versions(
        seams.HOMES[algorithm].versions.first, seams.HOMES[algorithm].versions.last)


def test_every_patch_has_a_part():
    for name in (n for n in seams.HOMES if seams.has(n)):
        for p in (*patch.patches_of(name), *patch.shared_patches(name)): assert drift.part_of(name, p) in {"", *drift.PARTS}


@contextmanager
def called(number):
    "Inside, the installed TRL says that it is another version."
    with mock.patch.object(seams, "version", lambda name: number): yield


@newest
@pytest.mark.parametrize("number,words", [("1.16.1", None), ("1.17.0", "has the very source that it has in TRL 1.16")])
def test_another_version_with_the_same_sources(number, words, capsys):
    "A patch version is patched without a word more; a new one with what was compared."
    with called(number): patch.PatchFastRL("grpo")
    out = capsys.readouterr().out
    assert applied("grpo") and ((words in out) if words else "tested" not in out)


@newest
@pytest.mark.parametrize("number", ["1.16.1", "1.17.0"])
@pytest.mark.parametrize("choice", ["trl", "refuse", "accept"])
def test_another_version_with_another_source(number, choice, capsys):
    from trl import GRPOConfig, GRPOTrainer

    with called(number), drifted("grpo", LOSS, "return loss", "return loss * 2.0"):
        now = GRPOTrainer._compute_loss
        if choice == "refuse":
            with pytest.raises(PatchError, match=r"_compute_loss is not as in TRL 1\.16(.|\n)*\+ +return loss \* 2\.0"):
                patch.PatchFastRL("grpo", drift="refuse")
            return
        patch.PatchFastRL("grpo", drift=choice)
        out = capsys.readouterr().out
        assert f"TRL {number}: GRPOTrainer._compute_loss is not as in TRL 1.16" in out and "+    return loss * 2.0" in out
        assert "very source" not in out and (GRPOTrainer._compute_loss is now) == (choice == "trl")
        assert hasattr(GRPOConfig, "max_tokens_per_pack") and applied("grpo") == (choice == "accept")
        patch.PatchFastRL("rloo")
        assert applied("rloo")
        patch.UnpatchFastRL()
        assert GRPOTrainer._compute_loss is now
    with pytest.raises(ValueError, match="drift='maybe'"): patch.PatchFastRL("grpo", drift="maybe")


def test_what_moved_is_listed(tmp_path):
    "The first lines of `make test-trl`, for a TRL in a folder."
    import shutil

    import fingerprints

    shutil.copytree(Path(look_up("trl").__file__).parent, tmp_path / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trl-1.99.0.dist-info").mkdir()
    (tmp_path / "trl-1.99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.99.0\n")
    file = tmp_path / "trl/trainer/rloo_trainer.py"
    before, found, after = file.read_text().rpartition("        return loss\n\n    # During eval")
    assert found
    file.write_text(f"{before}        return 3 * loss\n\n    # During eval{after}")
    text = fingerprints.report(tmp_path)
    last = seams.TESTED.last
    if seams.trl_version().startswith(last):
        assert f"rloo: RLOOTrainer._compute_loss is not as in TRL {last}" in text and "+    return 3 * loss" in text
        assert f"grpo: as in TRL {last}" in text


# ---- libraries

def first(tmp_path, capsys, model=None, dtype=None, self_check=True, **config):
    "The first step of a patched trainer -> (its record, its gradients, what was said)."
    trainer = grpo_trainer(model or tiny(), tmp_path, **config)
    if dtype: trainer.model.to(dtype)
    prepare(trainer, 2, 2, 1, [generation_batch(16)], check=self_check)
    comparison.told.clear()
    capsys.readouterr()
    (_, grads), = optimiser_steps(trainer, [2])[0]
    return trainer, grads, capsys.readouterr().out


def adapted(shake=False):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    if shake:
        with torch.no_grad(): [p.normal_(0, 0.1) for n, p in model.named_parameters() if "lora_B" in n]
    return model


def mask_not_passed():
    "transformers' mask without the case that hands a mask of four dimensions through."
    module = importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    own = module.create_causal_mask

    def create_causal_mask(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4: attention_mask = None
        return own(*args, attention_mask=attention_mask, **kwargs)
    return mock.patch.object(module, "create_causal_mask", create_causal_mask)


def other_adapter():
    "peft's forward with another weight of the adapter."
    from peft.tuners.lora.layer import Linear
    own = Linear.forward

    def forward(self, x, *args, **kwargs): return own(self, x, *args, **kwargs) + 0.5 * (own(self, x) - self.base_layer(x))
    forward.__module__ = "peft.tuners.lora.layer"
    return mock.patch.object(Linear, "forward", forward)


LIBRARIES = {"a 4-D mask is not passed through": (mask_not_passed, lambda: tiny()),
             "an adapter's forward": (other_adapter, lambda: adapted(True)), "a fresh adapter's forward": (other_adapter, adapted)}


CASES = [(n, b) for n in LIBRARIES for b in (0.0, 0.1)]


@pytest.mark.parametrize("name,beta", [c if c in CASES[::5] else pytest.param(*c, marks=pytest.mark.slow) for c in CASES])
def test_a_librarys_change_is_found(name, beta, tmp_path, capsys):
    "The first step's gradient differs: TRL's path is taken, and said with the numbers."
    change, model = LIBRARIES[name]
    with change():
        theirs = group_model(model(), tmp_path / "theirs", beta)
        patch.PatchFastRL("grpo")
        trainer, ours, out = first(tmp_path, capsys, model(), beta=beta)
    told = next((line for line in out.splitlines() if "is off TRL's own" in line), "")
    path = "TRL's" if state.state_of(trainer).differs else "packed"
    TABLE.append(("grpo", name + (f", beta={beta}" if beta else ""), told[:110], path, relative(ours, theirs)))
    assert told and state.state_of(trainer).differs and relative(ours, theirs) < 1e-5
    state.state_of(trainer).run = None
    with change(): patch.UnpatchFastRL()


def group_model(model, tmp_path, beta):
    trainer = grpo_trainer(model, tmp_path, beta=beta)
    batch = generation_batch(16)
    if beta:
        with torch.no_grad():
            ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            from trl.trainer.utils import use_adapter
            ask = trainer._get_per_token_logps_and_entropies
            if trainer.ref_model is None:
                with use_adapter(trainer.model, adapter_name="ref" if "ref" in trainer.model.peft_config else None):
                    found = ask(trainer.model, ids, mask, batch["completion_ids"].shape[1])
            else: found = ask(trainer.ref_model, ids, mask, batch["completion_ids"].shape[1])
            batch["ref_per_token_logps"] = found[0]
    prepare(trainer, 2, 2, 1, [batch])
    return optimiser_steps(trainer, [2])[0][0][1]


SETTINGS = {
    "fp32": {}, "bf16": dict(dtype=torch.bfloat16), "beta": dict(beta=0.1), "autocast": dict(config=dict(bf16=True)),
    "adapter": dict(model=adapted), "adapter that has moved": dict(model=lambda: adapted(True), beta=0.1),
    **{name: dict(config=dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}))
       for name, reentrant in (("checkpointing", False), ("reentrant checkpointing", True))},
    "gspo": dict(config=dict(importance_sampling_level="sequence")), "gemma2": dict(model=lambda: tiny("gemma2")),
}


SLOW = ("kto", "reward", "cpo", "orpo")
QUICK_SETTINGS = ("autocast", "adapter", "reentrant checkpointing")


@pytest.mark.parametrize("name", [n if n in QUICK_SETTINGS else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_what_agrees_is_left_as_it_was(name, tmp_path, capsys):
    "Gradients, metrics, weights and draws are bit for bit those without the comparison."
    given = dict(SETTINGS[name])
    model, config, dtype = given.pop("model", tiny), given.pop("config", {}), given.pop("dtype", None)
    patch.PatchFastRL("grpo")
    found = []
    for check in (True, False):
        trainer, grads, out = first(tmp_path / str(check), capsys, model(), dtype, self_check=check, **config, **given)
        metrics = {k: list(v) for k, v in trainer._metrics["train"].items() if "time" not in k and "second" not in k}
        found.append((grads, metrics, torch.rand(3), dict(trainer.model.named_parameters()), out))
    (g, m, d, w, said), (g2, m2, d2, w2, silent) = found
    assert g.keys() == g2.keys() and all(torch.equal(g[n], g2[n]) for n in g) and torch.equal(d, d2)
    assert json.dumps(m) == json.dumps(m2) and all(torch.equal(w[n], w2[n]) for n in w)
    assert "the first step's gradient is TRL's own to" in said and "first step" not in silent
    assert not state.state_of(trainer).differs


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [*["dpo", "sft"], *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_other_trainers_are_compared(algorithm, bf16, tmp_path, capsys):
    "The same run with and without the comparison; it says that they agree."
    import test_joint

    test_joint.some(algorithm)
    patch.PatchFastRL(algorithm)
    runs = []
    for check in (True, False):
        comparison.told.clear()
        capsys.readouterr()
        trainer = test_joint.make(algorithm, tmp_path / str(check), self_check=check, bf16=bf16)
        runs.append((*test_joint.trained(trainer), capsys.readouterr().out))
    (a, logs, said), (b, logs2, silent) = runs
    assert all(torch.equal(g[n], h[n]) for g, h in zip(a, b) for n in g) and logs == logs2
    assert "the first step's gradient is TRL's own to" in said and "first step" not in silent


def test_dropout_and_what_cannot_be_compared(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    patch.PatchFastRL("grpo")
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2))
    _, _, out = first(tmp_path, capsys, model)
    assert "is TRL's own to" in out and model.training and any(m.training for m in model.modules() if "Dropout" in type(m).__name__)
    other = tiny(attention_dropout=0.1)
    _, _, out = first(tmp_path, capsys, other)
    assert "is not compared with TRL's own loss: the attention drops" in out or "takes the path" in out
    with mock.patch.object(comparison, "compare", side_effect=RuntimeError("no memory")):
        trainer, _, out = first(tmp_path, capsys)
    assert "could not be compared with TRL's own loss: RuntimeError: no memory" in out and not state.state_of(trainer).differs


@pytest.mark.parametrize("lora", [False, True])
def test_patches_taken_back_in_the_middle_of_a_batch(lora, tmp_path):
    "The reference's log-probs were left for the packed loss; TRL's own finds them."
    from transformers import TrainerCallback

    class Back(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): patch.UnpatchFastRL()

    patch.PatchFastRL("grpo")
    trainer = grpo_trainer(adapted() if lora else tiny(), tmp_path, beta=0.1, max_steps=3, steps_per_generation=4, logging_steps=1,
                           gradient_accumulation_steps=2, per_device_train_batch_size=4, save_strategy="no", learning_rate=1e-3)
    trainer.reward_funcs[0] = lambda completions, **kw: [float(len(c) % 3) for c in completions]
    trainer.add_callback(Back())
    trainer.train()
    kl = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert trainer.state.global_step == 3 and len(kl) == 3 and kl[0] == 0.0 < kl[1]
    assert all("ref_per_token_logps" in inputs for inputs in trainer._buffered_inputs)
