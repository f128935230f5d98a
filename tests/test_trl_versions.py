"""What the patches do with the TRL that is installed, whichever it is: there and back, what moved, what is not there."""
import json
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_nb.models.load import FastLanguageModel
from grpo_nb.patch.core import PatchError, Value, look_up, split
from grpo_nb.patch.undo import Undo
from grpo_nb.trainers import colocate, patch, seams, table

HERE = [name for name in seams.HOMES if seams.has(name)]
ABSENT = [name for name in seams.HOMES if not seams.has(name)]


def everything():
    "All attributes of every trainer and configuration, and the entries of their dataclass fields and annotations."
    classes = [look_up(path) for name in HERE for path in (seams.HOMES[name].config, seams.HOMES[name].trainer)]
    classes += [look_up(path.rpartition(".")[0]) for path in seams.SAMPLERS.values() if seams.has_module(path)] + [
        look_up(colocate.PATH)
    ]
    owners = [vars(c) for c in classes] + [
        vars(c)[n] for c in classes for n in ("__dataclass_fields__", "__annotations__") if n in vars(c)
    ]
    return [(owner, dict(owner)) for owner in owners]


def unchanged(before, order=True):
    return all(owner.keys() == had.keys() and (not order or list(owner) == list(had)) and all(owner[k] is v for k, v in had.items())
               for owner, had in before)


@pytest.fixture(autouse=True)
def stock():
    "TRL as it was before the test, and afterwards again, by identity."
    patch.UnpatchFastRL()
    before = everything()
    yield before
    patch.UnpatchFastRL()
    assert unchanged(before, order=False) # a test that deletes an attribute and sets it again finds it at the end


@pytest.mark.parametrize(
    "calls", [*([name] for name in HERE), [None], ["again"], ["sampling"], ["sampling", None, "one by one"]], ids=str
)
def test_everything_comes_back(stock, calls):
    "Every attribute of every class is the very object that it was, in its place; nothing but the algorithm's own classes changes."
    for call in calls:
        if call == "sampling": patch.PatchRL(FastLanguageModel)
        elif call == "again":
            patch.PatchFastRL()
            patch.UnpatchFastRL()
            patch.PatchFastRL(None, FastLanguageModel)
        elif call == "one by one": [patch.UnpatchFastRL(name) for name in reversed(HERE)]
        else: patch.PatchFastRL(call, FastLanguageModel)
        if call == "one by one": assert set(patch.applied) <= {"online_dpo"}
        elif call is None or call in HERE:
            assert all(p.is_applied and patch.checked(p).ok for n in ([call] if call else HERE) for p in patch.patches_of(n))
    if len(calls) == 1 and calls[0] in HERE:
        home = seams.HOMES[calls[0]]
        others = [
            pair
            for pair in stock
            if not any(
                pair[1].get("__module__") == p.partition(":")[0]
                for p in (home.config, home.trainer, *([colocate.PATH] if calls[0] in patch.GROUPS else []))
            )
            and "__module__" in pair[1]
        ]
        assert unchanged(others)
    patch.UnpatchFastRL()
    assert unchanged(stock) and not patch.applied


@pytest.mark.parametrize("first", ["grpo", "rloo"])
def test_the_way_to_vllm_is_shared(stock, first):
    "GRPO and RLOO have it in common: it comes with the first of them and goes with the last, whichever that is."
    second = {"grpo": "rloo", "rloo": "grpo"}[first]
    def on(): return {p.is_applied for p in patch.shared_patches("grpo")}
    def rows(name): return [r.state for r in table.patch_table(name) if r.patch == "vLLM in this process"]
    assert patch.shared_patches("grpo") is patch.shared_patches("rloo")
    assert on() == {False} and rows("grpo") == ["off"] and not patch.shared_patches("dpo")
    patch.PatchRL(FastLanguageModel)
    assert on() == {False}
    patch.PatchFastRL(first)
    patch.PatchFastRL(second)
    assert on() == {True} and rows(first) == rows(second) == ["on"]
    patch.UnpatchFastRL(first)
    assert on() == {True} and second in patch.applied
    patch.PatchFastRL(first)
    patch.UnpatchFastRL(second)
    assert on() == {True}
    patch.UnpatchFastRL(first)
    assert on() == {False}
    patch.UnpatchFastRL()
    assert unchanged(stock)


def test_a_vllm_generation_that_moved(stock):
    "One error that names it, and nothing is patched."
    moved, owner = Undo(), look_up(colocate.PATH)
    moved.delattr(owner, "sync_weights")
    try:
        with pytest.raises(PatchError, match="VLLMGeneration has no 'sync_weights'"): patch.PatchFastRL("rloo")
        assert not patch.applied
    finally: moved.restore()


def methods(algorithm):
    "The methods that an algorithm's patches replace, each once: (class, name)."
    found = [(look_up(owner), key) for owner, key in (split(p.target) for p in patch.patches_of(algorithm)
                                                      if not isinstance(p.replacement, Value)) if isinstance(owner, str)]
    return [pair for i, pair in enumerate(found) if pair not in found[:i]]


@pytest.mark.parametrize("algorithm", HERE)
def test_renamed_methods_are_all_named(stock, algorithm):
    "A TRL in which the methods have another name: one error with each of them; nothing is patched."
    moved, gone = Undo(), []
    for cls, name in methods(algorithm):
        if name.startswith("__"): continue
        if name not in vars(cls): cls = next(c for c in cls.__mro__ if name in vars(c)) # PRM's loss is transformers' own
        moved.setattr(cls, f"{name}_2", vars(cls)[name], new=True)
        moved.delattr(cls, name)
        gone.append((cls, name))
    now = everything()
    try:
        with pytest.raises(PatchError) as caught: patch.PatchFastRL(algorithm)
        assert unchanged(now) and not patch.applied
        for cls, name in gone: # some are inherited from transformers' Trainer now; those are not the ones
            assert f"{cls.__name__} has no {name!r}{' of its own' if hasattr(cls, name) else ''}" in str(caught.value)
        names = {p.name for p in patch.patches_of(algorithm) if split(p.target)[1] in {name for _, name in gone}}
        assert gone and {r.state for r in table.patch_table(algorithm) if r.patch in names} == {"moved"}
    finally: moved.restore()
    assert seams.trl_version() in str(caught.value) and "known to work with trl 1.12" in str(caught.value)
    patch.PatchFastRL(algorithm)


def test_a_changed_formula_is_found(stock):
    "The same names and signatures, but other lines: the error lists each anchor, and the closest line that is there."
    from trl import GRPOTrainer, RLOOTrainer

    def _compute_loss(self, model, inputs):
        log_ratio = inputs["per_token_logps"] - inputs["old_per_token_logps"]
        loss = log_ratio.mean()
        return loss

    moved = Undo()
    for cls in (GRPOTrainer, RLOOTrainer): moved.setattr(cls, "_compute_loss", _compute_loss)
    now = everything()
    try:
        with pytest.raises(PatchError) as caught: patch.PatchFastRL()
        assert unchanged(now)
    finally: moved.restore()
    missing = [a.name for a in (*seams.GRPO_LOSS, *seams.RLOO_LOSS)]
    assert all(repr(name) in str(caught.value) for name in missing)
    assert "GRPOTrainer" in str(caught.value) and "RLOOTrainer" in str(caught.value)


@pytest.mark.parametrize("line,anchor", [
    ("per_token_loss = per_token_loss + 0.1 * entropies", "terms of a token's loss"),
    ("per_token_loss = per_token_loss * 2", "factors of a token's loss"),
    ("loss = loss + self.penalty", "terms added to the loss"),
    ("loss = loss - self.bonus", "terms taken from the loss"),
])
def test_a_new_term_of_the_loss_is_found(line, anchor):
    "A statement more in GRPO's loss, at its end."
    import inspect
    from textwrap import dedent, indent

    from trl import GRPOTrainer

    source = dedent(inspect.getsource(GRPOTrainer._compute_loss))
    assert all(a.find(source) for a in seams.GRPO_LOSS)
    changed = source.replace("    return loss\n", indent(f"{line}\nreturn loss\n", "    "))
    wrong = [a.name for a in seams.GRPO_LOSS if not holds(a, changed)]
    assert wrong == [anchor]


def holds(anchor, source):
    try: return anchor.find(source)
    except LookupError: return None


@pytest.mark.parametrize("algorithm", ABSENT or ["none"])
def test_an_algorithm_that_is_gone(algorithm, capsys):
    if algorithm == "none": pytest.skip("this TRL has them all")
    with pytest.raises(ValueError, match=rf"{algorithm} is in TRL 1\.12 and 1\.13; this is {seams.trl_version()}"):
        patch.PatchFastRL(algorithm.upper())
    row, = table.patch_table(algorithm)
    assert row.state == "not in this TRL" and "1.12 and 1.13" in row.why


def test_none_takes_all_that_there_is():
    patch.PatchFastRL()
    assert list(patch.applied) == HERE
    states = {r.algorithm: r.state for r in table.patch_table() if r.patch != "inference mode"}
    assert all(states[name] == "on" for name in HERE) and all(states[name] == "not in this TRL" for name in ABSENT)


def test_the_table_shows_what_is(capsys):
    from trl import GRPOTrainer

    patch.PatchFastRL("grpo")
    found = table.patch_table()
    assert {r.algorithm for r in found} == {"objects"} | set(seams.HOMES) | {
        n for n, p in seams.SAMPLERS.items() if seams.has_module(p)
    }
    assert {r.state for r in found if r.algorithm == "grpo" and r.patch != "inference mode"} == {"on"}
    assert {r.state for r in found if r.algorithm == "dpo"} == {"off"}
    assert all(r.saves and r.why for r in found if r.state in ("on", "off"))
    lines = str(found).splitlines()
    assert lines[0] == f"TRL {seams.trl_version()}" and max(map(len, lines)) <= 120 and all(len(r.target) for r in found)
    assert json.loads(found.to_json())["patches"][0] == found.records[0]
    html = found._repr_html_()
    assert html.count("<tr") == len(found) + 1 and "GRPOTrainer._compute_loss" in html
    moved = Undo()
    moved.setattr(GRPOTrainer, "_compute_loss", lambda self: None)
    try:
        row = next(r for r in table.patch_table("grpo") if r.target == "GRPOTrainer._compute_loss")
        assert row.state == "moved" and "stands there now" in row.why
        assert table.main(SimpleNamespace(json=True, algorithm="grpo")) == 1
    finally: moved.restore()
    assert table.main(SimpleNamespace(json=False, algorithm="gpro")) == 2 and "Did you mean 'grpo'" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", HERE)
def test_differences(algorithm):
    shown = table.show_patch(algorithm.upper())
    text, html = repr(shown), shown._repr_html_()
    assert all(p.name in text and p.why in text for p in shown.patches) and "+" in text and len(html) > len(text)
    patch.PatchFastRL(algorithm)
    assert repr(table.show_patch(algorithm)) == text


@pytest.mark.parametrize("target", seams.SAMPLERS.values())
def test_sampling_in_inference_mode(target):
    "`PatchRL` alone: the model is in inference mode inside, as it was outside, and nothing else is patched."
    from parity import tiny

    if not seams.has_module(target): pytest.skip(f"TRL {seams.trl_version()} has no {target}")
    owner, name = split(target)
    cls, seen, moved = look_up(owner), [], Undo()
    def sample(self, *args, **kwargs): seen.append((self.model_wrapped.training, args, kwargs))
    moved.setattr(cls, name, sample)
    patch.PatchRL(FastLanguageModel)
    try:
        model = tiny().train()
        trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda m: m), model_wrapped=model)
        getattr(cls, name)(trainer, 1, more=2)
        assert seen == [(False, (1,), {"more": 2})] and model.training
        assert all(len(sets) == 1 for sets in patch.applied.values())
    finally:
        patch.UnpatchFastRL()
        moved.restore()
    with pytest.raises(TypeError, match="for_inference"): patch.PatchRL(object)


OTHER = """
import sys, warnings
from grpo_nb.trainers import colocate, patch, seams, table
from grpo_nb.patch.core import PatchError
assert seams.trl_version() == "9.99.0"
patch.PatchFastRL("rloo")
try: patch.PatchFastRL("grpo")
except PatchError as error: print(error)
from trl import GRPOTrainer, GRPOConfig, RLOOConfig
assert not hasattr(GRPOConfig, "step") and hasattr(RLOOConfig, "step") and list(patch.applied) == ["rloo"]
"""


def test_an_untested_version(tmp_path):
    "Another version number, and one formula of GRPO changed: RLOO fits, which is said; GRPO does not, and stays as it is."
    installed = distribution("trl")
    shutil.copytree(Path(look_up("trl").__file__).parent, tmp_path / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    info = tmp_path / "trl-9.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.99.0\n")
    file = tmp_path / "trl/trainer/grpo_trainer.py"
    text = file.read_text()
    assert text.count("per_token_kl = per_token_kl * coef_1") == 1
    file.write_text(text.replace("per_token_kl = per_token_kl * coef_1", "per_token_kl = per_token_kl * coef_1.detach()"))
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n{OTHER}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=800, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # another version is compared with the newest that was tested; an older one's sources are not that one's
    newest = installed.version.startswith("1.16.")
    assert ("TRL 9.99.0 was not tested (trl 1.12 to 1.16 were)" if newest else "are not as in TRL 1.16") in done.stdout
    assert "packed loss" in done.stdout and "'KL correction'" in done.stdout and "coef_1.detach()" in done.stdout, done.stdout
    assert installed.version != "9.99.0"
