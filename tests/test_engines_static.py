"""The step that a GPU records: Hugging Face's tokens, nothing read back, the same operations on the same addresses each time."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from test_engines import ENDS, FAMILIES, VOCABULARY, adapted, alone, fresh, greedy, made, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_nb.engines.inplace import engine as inplace
from grpo_nb.engines.inplace import static
from grpo_nb.engines.base import Sampling
from grpo_nb.engines.inplace.engine import InPlace
from grpo_nb.tasks.tiny import make_tokenizer


def still(model, tokenizer=None, **options): # an engine that works on a CPU as it does on a GPU, but for the record itself
    engine = InPlace(model, tokenizer, check=False, keep_bytes=options.pop("keep_bytes", 1 << 40), **options)
    engine.static = True
    assert engine.deviation() < 1e-4
    return engine


@pytest.mark.parametrize(
    "family", [f if f in ("qwen2", "qwen3", "gemma2 capped") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_greedy_is_hugging_face(family):
    "Ragged prompts, groups, ends of sequence; all at once, with three slots for twelve rows, and with a cache for few."
    model, prompts = made(family), prompts_of(5, 9, 3, 9)
    expected = [alone(model, p, 20) for p in prompts]
    for room in ({}, dict(slots=3), dict(cache_tokens=200), dict(slots=5, prefill_tokens=4)):
        engine = still(model, **room)
        for _ in range(2):
            found = engine.generate(prompts, 3, greedy(20))
            assert found.completions == [expected[i] for i in found.owner], (family, room)
            assert all(
                (c[-1] in ENDS) == (why == "eos") and (why == "eos" or len(c) == 20)
                for c, why in zip(found.completions, found.finished)
            )


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.7, top_p=0.9), dict(top_k=8), dict(repetition_penalty=1.3)])
def test_a_seed_is_the_same_completion_in_both_forms(settings):
    model = made("qwen3")
    prompts = prompts_of(5, 9, 3)
    how = Sampling(max_tokens=17, stop_token_ids=ENDS, seeds=range(12), **settings)
    one, other = (e.generate(prompts, 4, how) for e in (InPlace(model), still(model, slots=5)))
    assert one.completions == other.completions and one.finished == other.finished
    for a, b in zip(one.logps, other.logps): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)


def test_stop_strings_between_two_looks():
    model, prompts, tokenizer = made("qwen3 wide"), prompts_of(5, 8, 4), make_tokenizer(["1 2"], 320)
    free = InPlace(model).generate(prompts, 1, Sampling(greedy=True, max_tokens=30)).completions
    for stop in (
        [tokenizer.decode(row[i:i + 2]) for row, i in zip(free, (3, 11, 6))],
        [tokenizer.decode(row[i:i + 3]) for row, i in zip(free, (8, 1, 15))],
    ):
        how = Sampling(greedy=True, max_tokens=30, stop=[s for s in stop if s.strip()])
        one, other = (e.generate(prompts, 2, how) for e in (InPlace(model, tokenizer), still(model, tokenizer)))
        assert one.completions == other.completions and one.finished == other.finished and "stop" in one.finished


@pytest.mark.parametrize(
    "options",
    [dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"]), dict(target_modules=["q_proj", "down_proj", "up_proj"])],
)
def test_adapters(options):
    model = adapted(**options) if "target_modules" not in options else adapted_to(options["target_modules"])
    engine, prompts = still(model), prompts_of(5, 9)
    for _ in range(2):
        assert engine.generate(prompts, 2, greedy(12)).completions == [alone(model, p, 12) for p in prompts for _ in range(2)]
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad: p.add_(torch.randn_like(p) * 0.2)
    with model.disable_adapter():
        assert engine.generate(prompts, 1, greedy(12)).completions == [alone(model, p, 12) for p in prompts]
    assert engine.generate(prompts, 1, greedy(12)).completions == [alone(model, p, 12) for p in prompts]


def adapted_to(modules):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(fresh("qwen2"), LoraConfig(r=4, lora_alpha=8, target_modules=modules))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, 0.2)
    return model


# One record for all steps

class Watch(TorchDispatchMode):
    "Notes every operation with its shapes; refuses those whose result is read back or has a shape that depends on values."
    BACK = (
        "_local_scalar_dense", "nonzero", "unique", "masked_select", "item",
        "equal", "is_nonzero", "repeat_interleave.Tensor", "_unique2",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(f".{b}" in f".{name}." for b in self.BACK), f"{name} reads back from the device"
        if "index" in name:
            assert not any(
                isinstance(t, torch.Tensor) and t.dtype is torch.bool for a in args if isinstance(a, list | tuple) for t in a
            ), f"{name} selects by a mask"
        out = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        self.seen.append(
            (
                name, [tuple(a.shape) for a in given], [a.dtype for a in given],
                [a for a in args if isinstance(a, int | float | bool)],
            )
        )
        return out


@pytest.mark.parametrize("family", ["qwen3", "gemma2 capped", "phi3 partial", "mistral"])
@pytest.mark.parametrize(
    "settings", [dict(), dict(greedy=True), dict(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]
)
def test_every_step_is_the_same_operations(family, settings, monkeypatch):
    "Nothing is read back, no shape depends on a value, and no number is baked in: what a CUDA graph needs."
    notes, real = [], static.Recorder.run

    def run(self):
        with Watch() as watch: real(self)
        notes.append((self.slots, watch.seen))

    monkeypatch.setattr(static.Recorder, "run", run)
    still(made(family), slots=4).generate(prompts_of(5, 9, 3), 3, Sampling(max_tokens=12, stop_token_ids=ENDS, seed=1, **settings))
    by_slots = {}
    for slots, seen in notes: assert by_slots.setdefault(slots, seen) == seen
    assert len(notes) > 5


def test_the_table_stays_where_it_is_until_it_does_not_fit():
    model = made("qwen3")
    engine = still(model)
    engine.generate(prompts_of(5, 9), 4, greedy(12))
    key, table, recorder = engine.kept
    engine.generate(prompts_of(7, 2, seed=3), 3, Sampling(greedy=True, max_tokens=11, stop_token_ids=ENDS))
    assert engine.kept[1] is table and engine.kept[2] is recorder
    engine.generate(prompts_of(7, 2, seed=3), 4, Sampling(max_tokens=12, temperature=0.5, stop_token_ids=ENDS))
    assert engine.kept[1] is not table # another distribution is another record
    engine.sleep()
    assert engine.kept is not None
    engine.keep_bytes = 10
    engine.sleep()
    assert engine.kept is None


def test_a_slot_that_is_free_has_drawn_nothing():
    "What the kernels know an idle slot by, in the middle of a run and after it."
    engine, seen = still(made("qwen3")), []
    engine.generate(prompts_of(5, 9), 4, Sampling(greedy=True, max_tokens=(2, 3, 2, 30, 3, 2, 30, 2)))
    table, arrange = engine.kept[1], static.Recorder.arrange
    assert not table.count.any() and not table.alive.any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static.Recorder, "arrange", lambda self: (seen.append([bool(n) for n in table.count]), arrange(self))[1])
        engine.generate(prompts_of(5, 9), 4, Sampling(greedy=True, max_tokens=(2, 3, 2, 30, 3, 2, 30, 2)))
    assert seen[0] == [True] * 8 and sum(seen[-1]) == 2


def test_a_weight_in_another_place_is_another_record():
    model, prompts = fresh("qwen3"), prompts_of(5, 9)
    engine = still(model)
    engine.generate(prompts, 2, greedy(12))
    recorder = engine.kept[2]
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight.normal_()
    assert engine.generate(prompts, 1, greedy(12)).completions == [alone(model, p, 12) for p in prompts]
    assert engine.kept[2] is recorder
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = torch.randn_like(weight)
    assert engine.generate(prompts, 1, greedy(12)).completions == [alone(model, p, 12) for p in prompts]
    assert engine.kept[2] is not recorder


def test_after_an_interrupt_the_table_is_used_again(monkeypatch):
    model, prompts = made("qwen3"), prompts_of(5, 9)
    engine = still(model, slots=3)
    expected, real, steps = engine.generate(prompts, 3, greedy(15)).completions, static.Recorder.run, []

    def run(self):
        real(self)
        steps.append(1)
        if len(steps) == 4: raise KeyboardInterrupt

    monkeypatch.setattr(static.Recorder, "run", run)
    with pytest.raises(KeyboardInterrupt): engine.generate(prompts, 3, greedy(15))
    assert engine.generate(prompts, 3, greedy(15)).completions == expected


def test_few_slots_in_use_are_few_slots_run(monkeypatch):
    "When most completions have ended the step takes a smaller bucket, and the rows that are left go on unharmed."
    model, prompts, limits = made("qwen3"), prompts_of(5, 9), (2, 3, 2, 30, 3, 2, 30, 2)
    sizes, real = [], static.Recorder.run
    monkeypatch.setattr(static.Recorder, "run", lambda self: (sizes.append(self.slots), real(self)))
    found = still(model).generate(prompts, 4, Sampling(greedy=True, max_tokens=limits))
    plain = InPlace(model).generate(prompts, 4, Sampling(greedy=True, max_tokens=limits))
    assert found.completions == plain.completions and max(sizes) == 8 and min(sizes) == 2


SCRIPT = """
    import sys
    from test_engines import adapted, alone, greedy, made, prompts_of
    from test_engines_static import still
    from grpo_nb.engines.base import Sampling
    from grpo_nb.engines.inplace.engine import InPlace
    prompts = prompts_of(5, 9)
    for model in [adapted("qwen2")] if sys.argv[1] == "quick" else [made("gemma2 capped"), made("qwen3")]:
        n = 2 if sys.argv[1] == "quick" else 3
        found = still(model, slots=3).generate(prompts, 2, greedy(n))
        assert found.completions == [alone(model, p, n) for p in prompts for _ in range(2)], type(model)
    if sys.argv[1] == "quick": sys.exit(print(True))
    how, engine = Sampling(max_tokens=2, seeds=range(4), temperature=0.9), still(made("qwen3"))
    print(engine.generate(prompts, 2, how).completions == InPlace(made("qwen3")).generate(prompts, 2, how).completions)
"""


@pytest.mark.parametrize("which", ["quick", pytest.param("more", marks=pytest.mark.slow)])
def test_with_the_kernels_themselves(which):
    "Under Triton's interpreter, in fp32."
    here = os.path.dirname(__file__)
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), which], capture_output=True, text=True, cwd=here,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])},
    )
    assert found.returncode == 0 and found.stdout.strip() == "True", found.stderr[-2000:]


def test_buckets():
    assert [static.bucket(n, 40) for n in (1, 2, 3, 5, 8, 9, 33, 40)] == [1, 2, 4, 8, 8, 16, 40, 40]
    assert inplace.LOOK == 8 and VOCABULARY == 96
