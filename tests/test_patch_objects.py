"""Changes of single objects: made once, listed, taken back in any order, and nothing kept alive."""
import copy
import functools
import gc
import inspect
import pickle
import sys
import threading
import time
import weakref
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from parity import tiny
from torch import nn

from grpo_nb.ground.events import said
from grpo_nb.ops.layer.fuse import fuse, fused, unfuse
from grpo_nb.patch.core import applied
from grpo_nb.patch.objects import LEDGER, Changed, change, changing, objects, restore, restore_all, wrap, wrapping
from grpo_nb.patch.undo import MISSING, PatchError


class Plain:
    kind = "class"
    def run(self, x): return x + 1


class Odd: # compares with everything, cannot be hashed, takes no attribute
    __hash__ = None
    def __eq__(self, other): raise RuntimeError
    def __setattr__(self, name, value): raise RuntimeError
    def run(self, x): return x


class Slots:
    __slots__ = ("x",)


class Property:
    def __init__(self): self.inner = "theirs"
    @property
    def loader(self): return self.inner
    @loader.setter
    def loader(self, value): self.inner = value
    @loader.deleter
    def loader(self): del self.inner


def more(owner, inner, x, by=1): return inner(x) + by
def times(owner, inner, x): return inner(x) * 10
def squared(owner, inner, x): return inner(x) ** 2


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch): # a list of its own: other tests of this process may keep changed models
    monkeypatch.setattr("grpo_nb.patch.objects.ledgers", weakref.WeakSet())
    yield
    said.clear()
    restore_all()
    assert objects() == []


def patched(): return {p.name for p in applied()} & {"own accelerator", "process group kept", "plain linear", "thin parameters"}


WHO = dict(why="a test", by="test")


def test_a_change_is_made_once_listed_and_taken_back():
    a, b = Plain(), Plain()
    b.kind = "own"
    for owner in (a, b):
        assert change(owner, "kind", "changed", **WHO) and not change(owner, "kind", "changed", **WHO)
    assert objects() == [Changed(f"{__name__}:Plain", "kind", "test", "a test")] * 2 and objects(a) == objects()[:1]
    assert restore(a) == [] and restore(b) == [] and restore(b) == []
    assert vars(a) == {} and vars(b) == {"kind": "own"} and objects() == []


def test_what_is_refused_changes_nothing():
    a = Plain()
    with pytest.raises(AttributeError, match="Did you mean 'kind'"): change(a, "kinds", 1, **WHO)
    change(a, "kinds", 1, new=True, **WHO)
    with pytest.raises(PatchError, match="by 'test': restore it first"): change(a, "kinds", 2, **WHO)
    with pytest.raises(TypeError, match="cannot be called"): wrap(a, "kind", more, **WHO)
    with pytest.raises(AttributeError): wrap(a, "walk", more, **WHO)
    wrap(a, "run", more, **WHO)
    with pytest.raises(PatchError, match="something else"): wrap(a, "run", times, **WHO)
    assert a.run(1) == 3 and a.kinds == 1
    restore_all()
    assert vars(a) == {}


@pytest.mark.parametrize(
    "owner", [3, "text", Slots(), Plain, sys, object()], ids=["number", "text", "slots", "class", "module", "object"]
)
def test_owners_that_cannot_be_changed_are_named(owner):
    with pytest.raises(TypeError, match="__dict__|a Patch changes"): change(owner, "x", 1, new=True, **WHO)


def test_an_owner_that_compares_and_guards_itself():
    odd = Odd()
    wrap(odd, "run", times, **WHO)
    assert odd.run(2) == 20 and len(objects(odd)) == 1
    restore(odd)
    assert odd.run(2) == 2 and vars(odd) == {}


def test_a_property_is_asked():
    p = Property()
    change(p, "loader", "ours", **WHO)
    assert p.inner == "ours" and "loader" not in vars(p)
    restore(p)
    assert vars(p) == {"inner": "theirs"}
    del p.loader
    with changing(p, "loader", "ours", new=True, **WHO): assert p.inner == "ours"
    assert vars(p) == {}


def test_a_module_registers_nothing():
    model = nn.Sequential(nn.Linear(2, 2))
    keys, linear = list(model.state_dict()), model[0]
    change(model, "head", nn.Linear(1, 1), new=True, **WHO)
    change(linear, "weight", nn.Parameter(torch.zeros(2, 2)), **WHO)
    wrap(linear, "forward", times, **WHO)
    assert list(model.state_dict()) == keys and len(list(model.modules())) == 2 and (model[0].weight == 0).all()
    assert torch.equal(model(torch.ones(1, 2)), 10 * linear.bias[None])
    restore_all()
    assert "weight" not in vars(linear) and "forward" not in vars(linear)
    assert "head" not in vars(model) and (linear.weight != 0).any()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_changes_are_taken_back_in_any_order(order):
    a, arounds, left = Plain(), (more, times, squared), [0, 1, 2]
    for i in left: wrap(a, "run", arounds[i], why="a test", by=str(i))
    for i in order:
        expected = 2
        for j in left: expected = arounds[j](None, lambda x: x, expected) # the oldest innermost
        assert a.run(1) == expected and [c.by for c in objects(a)] == [str(j) for j in left]
        restore(a, by=str(i))
        left.remove(i)
    assert a.run(1) == 2 and vars(a) == {}


def test_contexts_nest_and_end_in_any_order():
    a = Plain()
    first, second = (changing(a, "kind", n, **WHO) for n in (1, 2))
    with wrapping(a, "run", more, **WHO), wrapping(a, "run", more, **WHO): assert a.run(1) == 4
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert a.kind == 2
    second.__exit__(None, None, None)
    assert vars(a) == {}
    with pytest.raises(ZeroDivisionError), changing(a, "kind", 1, **WHO): 1 / 0
    change(a, "kind", 1, **WHO)
    with changing(a, "kind", 2, **WHO): restore(a) # what is taken back inside is not taken back again
    assert vars(a) == {}


def wrapped_by_somebody(inner):
    @functools.wraps(inner)
    def outer(*args, **kwargs): return -inner(*args, **kwargs)
    return outer


def test_what_somebody_has_wrapped_since_stays_and_is_said(capsys):
    a = Plain()
    wrap(a, "run", more, **WHO)
    ours, a.run = a.run, wrapped_by_somebody(a.run)
    assert not wrap(a, "run", more, **WHO) and a.run(1) == -3, "twice is once, under somebody's wrapper too"
    left = restore(a)
    assert left == objects(a) and "keeps the change of 'test'" in capsys.readouterr().out and a.run(1) == -3
    assert restore_all() == left and capsys.readouterr().out == "", "said once"
    a.run = ours
    assert restore(a) == [] and vars(a) == {}


def test_what_somebody_has_taken_off_is_made_again():
    a = Plain()
    wrap(a, "run", more, **WHO)
    del a.run # as Accelerate's unwrapping does
    assert wrap(a, "run", more, **WHO) and a.run(1) == 3 and len(objects(a)) == 1
    del a.run
    assert restore(a) == [] and vars(a) == {}


def test_a_foreign_wrapper_between_two_of_ours_keeps_the_lower_one():
    a = Plain()
    wrap(a, "run", more, why="a test", by="low")
    a.run = theirs = wrapped_by_somebody(a.run)
    wrap(a, "run", times, why="a test", by="high")
    assert a.run(1) == -30 and [c.by for c in restore(a, by="low")] == ["low"] and a.run(1) == -30
    assert restore(a, by="high") == [] and vars(a)["run"] is theirs
    del a.run
    assert restore(a) == [] and vars(a) == {}


def test_a_wrapper_sees_the_class_as_it_is_now_and_has_its_signature(monkeypatch):
    a = Plain()
    wrap(a, "run", more, **WHO)
    assert str(inspect.signature(a.run)) == "(x)" and a.run.__name__ == "run"
    monkeypatch.setattr(Plain, "run", lambda self, x: x + 100)
    assert a.run(1) == 102 and a.run(1, by=5) == 106
    restore(a)
    a.run = lambda y, z=2: y
    wrap(a, "run", more, **WHO)
    assert str(inspect.signature(a.run)) == "(y, z=2)" and a.run(1) == 2


def test_copies_and_pickles():
    model = nn.Linear(1, 1)
    wrap(model, "forward", times, **WHO)
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin.weight.zero_(), twin.bias.fill_(1)
    assert twin(torch.ones(1)) == 10 and len(objects()) == 2
    assert restore(twin) == [] and twin(torch.ones(1)) == 1 and LEDGER not in vars(twin) and len(objects(model)) == 1
    shallow = copy.copy(model)
    assert restore(shallow) == [] and "forward" not in vars(shallow) and len(objects(model)) == 1
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(torch.ones(1)) * 10, model(torch.ones(1)))
    assert restore(loaded) == [] and "forward" not in vars(loaded)
    assert copy.deepcopy(MISSING) is MISSING and pickle.loads(pickle.dumps(MISSING)) is MISSING


def test_nothing_is_kept_alive():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for module in model: wrap(module, "forward", times, **WHO)
    model.forward = wrapped_by_somebody(model.forward)
    wrap(model, "forward", times, **WHO) # its record holds what closes over the model
    twin = copy.deepcopy(model[0])
    seen = [weakref.ref(x) for x in (model, *model, twin)]
    del model, module, twin
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4 and objects() == []


def test_many_changes_are_quick():
    modules = [nn.Linear(1, 1) for _ in range(1000)]
    def seconds():
        start = time.process_time()
        for m in modules: change(m, "forward", MethodType(Plain.run, m), **WHO)
        took = time.process_time() - start
        restore_all()
        return took
    assert min(seconds() for _ in range(3)) < 0.1 # 12 ms on a slow machine


def test_threads():
    a, failed = Plain(), []
    def work(i):
        try:
            for _ in range(200):
                with wrapping(a, "run", more, why="a test", by=str(i)): assert a.run(1) >= 3
        except BaseException as error: failed.append(error) # noqa: BLE001 reported below
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed and vars(a) == {}


def test_fuse_is_listed_and_leaves_nothing():
    from test_fused import peft_of
    peft = peft_of(tiny("qwen3"))
    base = peft.get_base_model()
    assert fuse(base) == fuse(base)
    assert {c.by for c in objects()} == {"ops.layer.fuse"} and sum(c.name == "forward" for c in objects()) >= 14
    twin, layer = copy.deepcopy(base), base.model.layers[0].self_attn.q_proj
    layer.forward = wrapped_by_somebody(layer.forward)
    unfuse(base)
    assert [c.name for c in objects(layer)] == ["forward"]
    ids = torch.arange(3, 9)[None]
    del layer.forward
    with fused(base): assert torch.equal(base(ids).logits, twin(ids).logits)
    restore(layer)
    unfuse(twin)
    assert objects() == []
    ref = weakref.ref(base)
    fuse(base)
    del peft, base, twin, layer
    gc.collect()
    assert ref() is None


class Outline:
    args = SimpleNamespace(generation_batch_size=1)
    def _generate(self, prompts): return [[7]], [[1]]
    def _calculate_rewards(self, ids): return [1.0]


def test_a_meter_leaves_its_trainer_as_it_was():
    from grpo_nb.run.measure import StepMeter
    trainer = Outline()
    trainer.model = SimpleNamespace(training=True)
    before, meter = dict(vars(trainer)), StepMeter(trainer)
    assert vars(trainer) == before
    with meter:
        meter.attach()
        assert [c.name for c in objects(trainer)] == ["_generate", "_calculate_rewards"]
        trainer._calculate_rewards([])
        with pytest.raises(PatchError): StepMeter(trainer).attach()
    assert meter.seconds["rewards"] > 0 and vars(trainer) == before and objects() == []


def test_a_run_leaves_its_trainer_as_it_was(tmp_path):
    from test_run import make
    run = make(tmp_path, max_steps=1)
    assert not [c for c in objects(run.trainer) if c.by == "run.measure"]
    run.start(background=False)
    assert run.state == "finished" and not [c for c in objects(run.trainer) if c.by == "run.measure"] and run._meter.records


def test_accelerates_reset_is_guarded_while_somebody_trains():
    from accelerate.state import AcceleratorState
    from grpo_nb.run.kernel import own_accelerator
    before = vars(AcceleratorState)["_reset_state"]
    with own_accelerator():
        with own_accelerator(): assert patched() == {"own accelerator"}
        other = threading.Thread(target=AcceleratorState._reset_state)
        AcceleratorState._shared_state["mark"] = True
        other.start()
        other.join()
        assert AcceleratorState._shared_state["mark"], "the outer one still trains"
        AcceleratorState._reset_state()
        assert "mark" not in AcceleratorState._shared_state
    assert vars(AcceleratorState)["_reset_state"] is before and not patched()


def test_what_is_changed_in_vllm_is_put_back(monkeypatch):
    from grpo_nb.engines.vllm.start import plain_linear, process_group_kept
    groups, utils, log = ModuleType("parallel_state"), ModuleType("utils"), []
    groups._WORLD, groups.destroy_distributed_environment = (
        SimpleNamespace(destroy=lambda: log.append("own")),
        lambda: log.append("all"),
    )
    utils.dispatch_cpu_unquantized_gemm = packs = lambda layer, remove_weight: log.append("packed")
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", groups)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.utils", utils)
    layer = SimpleNamespace()
    with process_group_kept(True) as found, plain_linear(True):
        assert found is groups and patched() == {"process group kept", "plain linear"}
        groups.destroy_distributed_environment()
        utils.dispatch_cpu_unquantized_gemm(layer, True)
    with process_group_kept(False) as found, plain_linear(False): groups.destroy_distributed_environment()
    assert found is groups and log == ["own", "all"] and groups._WORLD is None and layer.cpu_linear is nn.functional.linear
    assert utils.dispatch_cpu_unquantized_gemm is packs and not patched()


def test_a_parameters_loader_is_put_back():
    from grpo_nb.engines.vllm.one_copy import noted, thin
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
            self.b.weight_loader = self.own = lambda param, tensor: None
        def load_weights(self, weights):
            for name, tensor in weights: getattr(self, name).weight_loader(getattr(self, name), tensor)
    with thin(): model = Model()
    assert model.a.untyped_storage().nbytes() == 4 and not patched()
    calls = noted(model, [("a", torch.zeros(2, 2)), ("b", torch.zeros(2))], "default")
    assert calls[id(model.a)][0][0] == "default" and calls[id(model.b)][0][0] is model.own
    assert vars(model.b) == {"weight_loader": model.own} and vars(model.a) == {} and objects() == []
