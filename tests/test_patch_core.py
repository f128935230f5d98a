import inspect
import pickle
import sys
import textwrap
import threading
import traceback
from importlib import import_module, invalidate_caches, reload

import pytest

from grpo_nb.patch.core import (MISSING, Anchor, Edit, Patch, PatchConflict, PatchError, PatchSet, Undo, Value, Versions, Wrap,
                                applied)
from grpo_nb.patch.rewrite import RewriteError, edited, rewrite

CODE = '''
from __future__ import annotations
import functools

LIMIT = 10

def profiled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs): return function(*args, **kwargs)
    return wrapper

def module_level(x, y=LIMIT):
    "adds"
    return x + y

class Base:
    def inherited(self, x): return ("base", x)
    def greet(self): return "hello"

class Trainer(Base):
    kind = "stock"

    def loss(self, model: Model, inputs, *, scale=2) -> float:
        """The loss.

    left of the margin"""
        ratio = model - inputs  # per token
        if self.beta != 0.0:
            # k3
            kl = ratio * 2
        else:
            kl = 0
        return (ratio + kl) * scale

    def greet(self):
        return super().greet() + " there"

    def secret(self):
        return self.__hidden

    @staticmethod
    def fixed(a): return a + 1

    @classmethod
    def made(cls, a): return cls, a

    @property
    def size(self): return self._size

    @size.setter
    def size(self, value): self._size = value

    @profiled
    def timed(self, x):
        return x + 1

    @staticmethod
    @profiled
    def both(x):
        return x + 1

    beta = 0.5
    fields = {"a": 1, "b": 2, "c": 3}

def outer(offset):
    def inner(x):
        values = [x + offset for _ in range(2)]
        return sum(values)
    return inner
closed = outer(5)
'''


@pytest.fixture
def lib(tmp_path, monkeypatch):
    "A library of our own; afterwards nothing may be left applied."
    (tmp_path / "fakelib.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("fakelib", None)
    invalidate_caches()
    yield import_module("fakelib")
    assert applied() == ()
    sys.modules.pop("fakelib", None)


def snapshot(*owners): return [dict(vars(o)) for o in owners]


def unchanged(before, *owners):
    for old, owner in zip(before, owners):
        now = vars(owner)
        assert now.keys() == old.keys()
        assert all(now[k] is old[k] for k in old if k not in ("__dict__", "__weakref__"))


# ---- the undo stack

def test_undo_records_every_kind_of_change_and_keeps_the_order_of_entries(lib):
    before = snapshot(lib, lib.Trainer, lib.Base)
    undo = Undo()
    undo.setattr(lib.Trainer, "fixed", None)
    undo.setattr(lib.Trainer, "fixed", 2)
    undo.setattr(lib.Trainer, "inherited", 3)
    undo.setattr(lib.Trainer, "fresh", 4, new=True)
    undo.delattr(lib.Trainer, "kind")
    undo.setattr(lib, "LIMIT", 5)
    undo.setitem(lib.Trainer.fields, "b", 9)
    undo.delitem(lib.Trainer.fields, "a")
    undo.setitem(lib.Trainer.fields, "d", 9)
    assert len(undo.changes) == 9 and lib.Trainer.fields == {"b": 9, "c": 3, "d": 9}
    undo.restore()
    undo.restore()
    unchanged(before, lib, lib.Trainer, lib.Base)
    assert list(lib.Trainer.fields.items()) == [("a", 1), ("b", 2), ("c", 3)]


def test_undo_raises_where_the_target_is_missing(lib):
    undo = Undo()
    with pytest.raises(AttributeError): undo.setattr(lib.Trainer, "los", 1)
    with pytest.raises(AttributeError, match="no attribute 'inherited' of its own"): undo.delattr(lib.Trainer, "inherited")
    with pytest.raises(KeyError): undo.delitem(lib.Trainer.fields, "z")
    assert undo.changes == []


def test_undo_refuses_over_a_foreign_change_and_changes_nothing(lib):
    undo = Undo()
    undo.setattr(lib.Trainer, "kind", "ours")
    undo.setattr(lib.Trainer, "beta", 1.0)
    lib.Trainer.kind = "theirs"
    with pytest.raises(PatchConflict, match="Trainer.kind should be 'ours', but 'theirs' stands there"): undo.restore()
    assert lib.Trainer.beta == 1.0 and len(undo.changes) == 2
    undo.restore(force=True)
    assert (lib.Trainer.kind, lib.Trainer.beta) == ("stock", 0.5)


def test_undo_of_an_owner_that_raises_after_it_was_set():
    class Meta(type):
        def __setattr__(cls, name, value):
            super().__setattr__(name, value)
            if value == "bad": raise RuntimeError("no")
    class Owner(metaclass=Meta): x = "good"
    undo = Undo()
    with pytest.raises(RuntimeError): undo.setattr(Owner, "x", "bad")
    assert Owner.x == "good" and undo.changes == []


def test_undo_of_an_object(lib):
    trainer, undo = lib.Trainer(), Undo()
    undo.setattr(trainer, "kind", "mine")
    assert trainer.kind == "mine"
    undo.restore()
    assert vars(trainer) == {} and not MISSING and repr(MISSING) == "nothing"


# ---- rewriting

def test_a_rewritten_function_keeps_what_it_was(lib):
    stock = lib.Trainer.loss
    new = rewrite(stock, [Edit("kl = _r_ * 2", "kl = _r_ * 3\nkl = kl + LIMIT"), Edit("kl = 0", "kl = 1", "after")])
    for name in (
        "__name__", "__qualname__", "__module__", "__doc__", "__globals__", "__defaults__", "__kwdefaults__", "__annotations__",
    ):
        assert getattr(new, name) is getattr(stock, name) or getattr(new, name) == getattr(stock, name)
    assert inspect.signature(new) == inspect.signature(stock) and "left of the margin" in new.__doc__
    assert new.__code__.co_consts[0] == stock.__doc__ and new.__code__.co_qualname == "Trainer.loss"
    assert new.__code__.co_firstlineno == stock.__code__.co_firstlineno
    trainer = lib.Trainer()
    assert new(trainer, 3, 1) == (2 + 2 * 3 + 10) * 2
    trainer.beta = 0.0
    assert new(trainer, 3, 1) == (2 + 1) * 2 and stock(trainer, 3, 1) == 4


def test_source_and_traceback_show_the_new_lines_at_the_old_number(lib):
    new = rewrite(lib.Trainer.loss, [Edit("ratio = _a_ - _b_", "ratio = _a_ / _b_")], "division")
    assert "ratio = model / inputs\n" in inspect.getsource(new) and "# k3" in inspect.getsource(new)
    with pytest.raises(ZeroDivisionError) as caught: new(lib.Trainer(), 1, 0)
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    stock_line = inspect.getsourcelines(lib.Trainer.loss)[1] + inspect.getsource(lib.Trainer.loss).split("\n").index(
        "        ratio = model - inputs  # per token")
    assert frame.line == "ratio = model / inputs" and frame.lineno == stock_line
    assert "division of fakelib.Trainer.loss" in frame.filename


def test_super_private_names_and_closures_survive(lib):
    trainer = lib.Trainer()
    trainer._Trainer__hidden = 7
    assert rewrite(lib.Trainer.greet, [Edit('" there"', '" you"')])(trainer) == "hello you"
    assert rewrite(lib.Trainer.secret, [Edit("return _x_", "return _x_ + self.__hidden")])(trainer) == 14
    assert rewrite(lib.closed, [Edit("range(2)", "range(3)")])(1) == 18
    assert rewrite(lib.closed, [Edit("range(2)", "range(3)")]).__closure__[0] is lib.closed.__closure__[0]
    new = rewrite(lib.Trainer.loss, [Edit("kl = 0", "kl = len(super().greet())")], owner=lib.Trainer)
    trainer.beta = 0.0
    assert new(trainer, 1, 1) == 10


def test_decorators_are_applied_again(lib):
    timed = rewrite(lib.Trainer.timed, [Edit("x + 1", "x + 2")])
    assert timed(None, 1) == 3 and timed.__wrapped__(None, 1) == 3 and timed.__code__ == lib.Trainer.timed.__code__
    both = rewrite(lib.Trainer.__dict__["both"], [Edit("x + 1", "x + 2")])
    assert isinstance(both, staticmethod) and both.__func__(1) == 3
    assert rewrite(lib.Trainer.__dict__["size"], [Edit("self._size", "self._size * 2")]).fset is lib.Trainer.size.fset
    again = rewrite(timed, [Edit("x + 2", "x + 3")])
    assert again(None, 1) == 4 and inspect.getsource(again).lstrip().startswith("@profiled")
    assert rewrite(rewrite(lib.Trainer.__dict__["both"], [Edit("x + 1", "x + 2")]), [Edit("x + 2", "x + 3")]).__func__(1) == 4
    lib.Trainer.timed = lib.profiled(lib.Trainer.timed)
    with pytest.raises(RewriteError, match="wrapped by something else"): rewrite(lib.Trainer.timed, [Edit("x + 1", "x + 2")])


@pytest.mark.parametrize("edits,message", [
    ([Edit("kl = _", "kl = 1")], "found 2 times"),
    ([Edit("kl = 0", "kl = _y_")], "not a wildcard of the anchor"),
    ([Edit("kl = 0", "continue")], "does not compile"),
    ([Edit("kl = 0", "kl = 1"), Edit("if _: ...\nelse: ...", "pass")], "Two edits change"),
    ([Edit("ratio * 2", "x = 1")], "An expression cannot be replaced"),
    ([Edit("def loss(_self_, _m_, _i_, *, scale=2): ...", "def loss(self): pass")], "must not change the name or the parameters"),
])
def test_edits_that_cannot_stand_are_refused(lib, edits, message):
    with pytest.raises((RewriteError, LookupError), match=message): rewrite(lib.Trainer.loss, edits)


def test_a_statement_that_shares_its_line_is_not_replaced(lib):
    with pytest.raises(RewriteError, match="shares its line"): rewrite(lib.Trainer.fixed, [Edit("return _x_", "return 0")])
    assert rewrite(lib.Trainer.fixed, [Edit("a + 1", "a + 2, a")])(1) == (3, 1)


def test_strings_over_several_lines_are_not_indented(lib):
    new = rewrite(lib.Trainer.greet, [Edit("return _x_", 'text = """a\nb"""\nreturn text')])
    assert new(None) == "a\nb"


def test_edits_before_and_after_an_expression_go_beside_its_statement(lib):
    new = rewrite(lib.Trainer.loss, [Edit("ratio * 2", "seen.append(1)", "before"), Edit("ratio * 2", "seen.append(2)", "after")])
    new.__globals__["seen"] = seen = []
    new(lib.Trainer(), 1, 1)
    assert seen == [1, 2]


def test_an_edit_after_the_last_line_of_a_text_without_a_newline():
    assert edited("a = c", [Edit("a = _x_", "b = _x_", "after")]) == "a = c\nb = c\n"


# ---- patches

def plain(self, model, inputs, *, scale=2): return "patched"


def loss_patch(**options):
    return Patch("loss", "fakelib:Trainer.loss", plain, signature="(self, model, inputs, *, scale=2)", **options)


def test_all_kinds_of_target_and_replacement_come_back_as_they_were(lib):
    before = snapshot(lib, lib.Trainer, lib.Base)
    fields = list(lib.Trainer.fields.items())
    patches = [
        loss_patch(anchors=["kl = ratio * 2", Anchor("if self.beta != 0.0: ...\nelse: ...", name="kl branch")]),
        Patch("inherited", "fakelib:Trainer.inherited", Wrap(lambda original: lambda self, x: ("wrapped", original(self, x)))),
        Patch("fixed", "fakelib:Trainer.fixed", Wrap(lambda original: lambda a: original(a) * 100)),
        Patch("made", "fakelib:Trainer.made", lambda cls, a: (cls.__name__, a)),
        Patch("size", "fakelib:Trainer.size", lambda self: -1),
        Patch("both", "fakelib:Trainer.both", Edit("x + 1", "x + 2")),
        Patch("timed", "fakelib:Trainer.timed", Edit("x + 1", "x + 2")),
        Patch("added", "fakelib:Trainer.added", lambda self: 1, new=True),
        Patch("value", "fakelib:Trainer.kind", "ours"),
        Patch("hook", "fakelib:Trainer.hook", Value(plain), new=True),
        Patch("module", "fakelib:module_level", Edit("x + y", "x * y")),
        Patch("constant", ("fakelib", "LIMIT"), 99),
        Patch("entry", ("fakelib:Trainer.fields", "d"), 4, new=True),
        Patch("entry", (lib.Trainer.fields, "a"), 7),
    ]
    for _ in range(2):
        with PatchSet(patches) as patched:
            t = lib.Trainer()
            assert patched.is_applied and all(r.ok for r in patched.check())
            assert t.loss(1, 2) == "patched" and t.inherited(1) == ("wrapped", ("base", 1))
            assert lib.Trainer.fixed(1) == t.fixed(1) == 200
            t.size = 3
            assert t.made(1) == ("Trainer", 1) and t.size == -1 and t.both(1) == 3 and t.timed(1) == 3 and t.added() == 1
            assert t.kind == "ours" and t.hook(1, 2) == "patched" and lib.module_level(3, 4) == 12 and lib.LIMIT == 99
            assert lib.Trainer.fields == {"a": 7, "b": 2, "c": 3, "d": 4} and lib.Base().inherited(1) == ("base", 1)
        unchanged(before, lib, lib.Trainer, lib.Base)
        assert list(lib.Trainer.fields.items()) == fields


def test_what_does_not_fit_is_listed_and_nothing_is_changed(lib):
    before = snapshot(lib, lib.Trainer)
    versions = Versions("pytest", "1.0", "2.0")
    patches = [
        loss_patch(),
        Patch("gone", "fakelib:Trainer.los", plain, versions=versions),
        Patch(
            "moved", "fakelib:Trainer.greet", plain, signature="(self, name)",
            anchors="return super().greet(name)", versions=versions,
        ),
        Patch("exists", "fakelib:Trainer.kind", 1, new=True),
        Patch("no module", "fakelib.sub:Trainer.kind", 1),
        Patch("no class", "fakelib:Triner.kind", 1),
        Patch("no entry", ("fakelib:Trainer.fields", "aa"), 1),
        Patch("edit", "fakelib:Trainer.greet", Edit("return 1", "return 2")),
        Patch("c", "builtins:len", Edit("return 1", "return 2")),
    ]
    with pytest.raises(PatchError) as caught: PatchSet(patches).apply()
    text = str(caught.value)
    unchanged(before, lib, lib.Trainer)
    assert len(caught.value.reports) == 8 and "8 of 9 patches" in text and f"pytest {pytest.__version__}" in text
    for words in [
        "Trainer has no 'los'. Did you mean 'loss'?", "known to work with pytest 1.0 to 2.0", "expected (self, name), found (self)",
        "Anchor 'return super().greet(name)'", "closest is fakelib.py:", "has 'kind' already: 'stock'",
        "fakelib.sub cannot be imported", "Did you mean 'Trainer'?", "dict of 3 entries has no 'aa'", "Anchor 'return 1'",
        "is not a Python function",
    ]:
        assert words in text, words
    assert not caught.value.reports[0].tested and caught.value.reports[-1].tested is None


def test_a_failure_while_applying_rolls_back(lib):
    before = snapshot(lib.Trainer)
    def broken(original): raise OSError("disk")
    patches = [loss_patch(), Patch("kind", "fakelib:Trainer.kind", "ours"), Patch("broken", "fakelib:Trainer.greet", Wrap(broken))]
    with pytest.raises(OSError) as caught: PatchSet(patches).apply()
    unchanged(before, lib.Trainer)
    assert "patch 'broken'" in caught.value.__notes__[0] and applied() == ()


def test_two_edits_of_one_function_that_break_each_other_roll_back(lib):
    before = snapshot(lib.Trainer)
    one, two = Edit("kl = 0", "kl = 1"), Edit("kl = 0", "kl = 2")
    with pytest.raises(PatchError, match="two, fakelib:Trainer.loss"):
        PatchSet([Patch("one", "fakelib:Trainer.loss", one), Patch("two", "fakelib:Trainer.loss", two)]).apply()
    unchanged(before, lib.Trainer)


def test_two_edits_of_one_function_add_up_and_revert(lib):
    before = snapshot(lib.Trainer)
    edits = PatchSet([Patch("one", "fakelib:Trainer.loss", Edit("kl = 0", "kl = 1")),
                      Patch("two", "fakelib:Trainer.loss", Edit("kl = ratio * 2", "kl = ratio * 5"))])
    with edits:
        assert lib.Trainer().loss(3, 1) == 24 and "kl = 1" in inspect.getsource(lib.Trainer.loss)
        assert all(r.ok for r in edits.check())
    unchanged(before, lib.Trainer)


def test_twice_is_once_also_across_sets(lib):
    before = snapshot(lib.Trainer)
    wrap = Patch("wrap", "fakelib:Trainer.fixed", Wrap(lambda f: lambda a: f(a) + 10))
    first, second = PatchSet([wrap]), PatchSet([wrap, loss_patch()])
    first.apply().apply()
    second.apply()
    wrap.apply()
    assert lib.Trainer.fixed(1) == 12 and [p.name for p in applied()] == ["wrap", "loss"]
    second.revert().revert()
    assert lib.Trainer.fixed(1) == 12 and first.is_applied and not second.is_applied
    first.revert()
    wrap.revert()
    unchanged(before, lib.Trainer)


def test_nested_with_of_one_set(lib):
    before, patched = snapshot(lib.Trainer), PatchSet([loss_patch()])
    with patched:
        with patched: pass
        assert lib.Trainer().loss(1, 2) == "patched"
    unchanged(before, lib.Trainer)
    patched.apply()
    with patched: pass
    assert patched.is_applied # it was before
    with pytest.raises(KeyError), PatchSet([Patch("kind", "fakelib:Trainer.kind", "ours")]): raise KeyError
    patched.revert()
    unchanged(before, lib.Trainer)


def test_another_patch_of_the_same_name_is_refused(lib):
    patch = Patch("kind", "fakelib:Trainer.kind", "ours").apply()
    with pytest.raises(PatchError, match="Another patch 'kind' is applied"): Patch("kind", "fakelib:Trainer.kind", "other").apply()
    patch.revert()
    with pytest.raises(ValueError, match="listed twice"): PatchSet([patch, patch])


def test_sets_that_overlap(lib):
    before = snapshot(lib.Trainer)
    low = PatchSet([Patch("low", "fakelib:Trainer.fixed", Wrap(lambda f: lambda a: f(a) + 10)), loss_patch()]).apply()
    high = PatchSet([Patch("high", "fakelib:Trainer.fixed", Wrap(lambda f: lambda a: f(a) * 2))]).apply()
    assert lib.Trainer.fixed(1) == 24
    with pytest.raises(PatchConflict, match="patch 'high' has been applied over it"): low.revert()
    assert lib.Trainer.fixed(1) == 24 and lib.Trainer().loss(1, 2) == "patched" and low.is_applied
    high.revert()
    low.revert()
    unchanged(before, lib.Trainer)


def test_a_foreign_change_in_between(lib):
    before = snapshot(lib.Trainer)
    patched = PatchSet([loss_patch(), Patch("kind", "fakelib:Trainer.kind", "ours")]).apply()
    def theirs(self): ...
    lib.Trainer.loss = theirs
    with pytest.raises(PatchConflict, match=r"theirs \(test_patch_core.py:\d+\) stands there now"): patched.revert()
    with pytest.raises(PatchConflict, match="stands there now"): patched.apply()
    assert lib.Trainer.kind == "ours" and lib.Trainer.loss is theirs
    patched.revert(force=True)
    unchanged(before, lib.Trainer)


def test_a_foreign_delete_in_between(lib):
    before = snapshot(lib.Trainer)
    patch = Patch("inherited", "fakelib:Trainer.inherited", lambda self, x: 1).apply()
    del lib.Trainer.inherited
    with pytest.raises(PatchConflict, match="nothing stands there now"): patch.revert()
    patch.revert(force=True)
    unchanged(before, lib.Trainer)


def test_a_reloaded_module_is_patched_anew(lib):
    patch = loss_patch().apply()
    old = lib.Trainer
    reload(lib)
    assert lib.Trainer is not old and lib.Trainer().beta == 0.5
    patch.apply()
    assert lib.Trainer().loss(1, 2) == "patched" and len(applied()) == 2
    patch.revert()
    assert lib.Trainer().loss(3, 1) == 12 and old.loss(old(), 3, 1) == 12


def test_threads_apply_and_revert_without_harm(lib):
    before, errors = snapshot(lib.Trainer), []
    patched = PatchSet([Patch("wrap", "fakelib:Trainer.fixed", Wrap(lambda f: lambda a: f(a) + 10)),
                        Patch("edit", "fakelib:Trainer.loss", Edit("kl = 0", "kl = 1"))])
    start = threading.Barrier(8)
    def work(i):
        try:
            start.wait()
            for _ in range(15):
                patched.apply() if i % 2 else patched.revert()
                assert lib.Trainer.fixed(1) in (2, 12)
                with patched: assert lib.Trainer.fixed(1) in (2, 12)
        except (AssertionError, PatchError) as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    patched.revert()
    assert errors == []
    unchanged(before, lib.Trainer)


def test_patched_functions_pickle(lib):
    patches = PatchSet([Patch("edit", "fakelib:Trainer.loss", Edit("kl = 0", "kl = 1")),
                        Patch("wrap", "fakelib:module_level", Wrap(lambda f: lambda x, y=10: f(x, y) + 1)),
                        Patch("fixed", "fakelib:Trainer.fixed", Edit("a + 1", "a + 2"))])
    with patches:
        for function in (lib.Trainer.loss, lib.module_level, lib.Trainer.fixed):
            assert pickle.loads(pickle.dumps(function)) is function
        trainer = lib.Trainer()
        assert pickle.loads(pickle.dumps(trainer.loss))(3, 1) == 12
        assert inspect.signature(lib.module_level) == inspect.signature(lib.module_level.__wrapped__)
        assert lib.module_level.__doc__ == "adds"


def test_the_difference_is_shown_before_and_after_applying(lib):
    patch = Patch("edit <1>", "fakelib:Trainer.loss", Edit("kl = 0", "kl = 1"), why="one & more")
    text = patch.diff()
    assert "-        kl = 0\n+        kl = 1\n" in text and text.startswith("--- fakelib:Trainer.loss (fakelib.py:")
    patch.apply()
    assert patch.diff() == text
    html = patch._repr_html_()
    assert "applied" in html and "&lt;1&gt;" in html and "one &amp; more" in html and "background:rgba(46" in html
    patch.revert()
    assert "+def plain(" in loss_patch().diff() and "-    ratio = model - inputs  # per token" in loss_patch().diff()
    wrap = Patch("wrap", "fakelib:Trainer.timed", Wrap(lambda f: lambda self, x: f(self, x) + 1))
    assert "lambda self, x" in wrap.diff() and "lines stay; ours calls them as `" in wrap.diff() and "\n-" not in wrap.diff()
    assert "+kind = 'ours'" in Patch("kind", "fakelib:Trainer.kind", "ours").diff()
    assert "(nothing)" in Patch("new", "fakelib:Trainer.new", 1, new=True).diff()
    assert "has no &#x27;gone&#x27;" in Patch("gone", "fakelib:Trainer.gone", 1)._repr_html_()
    assert PatchSet([patch, wrap])._repr_html_().count("<hr>") == 1


def test_wrap_of_a_method_of_one_object(lib):
    trainer = lib.Trainer()
    with PatchSet([Patch("one", (trainer, "greet"), Wrap(lambda bound: lambda: bound() + "!"))]):
        assert trainer.greet() == "hello there!"
    assert trainer.greet() == "hello there" and vars(trainer) == {}


@pytest.mark.parametrize("target", ["fakelib.Trainer.loss", "fakelib:", ("fakelib",), 3])
def test_bad_targets_are_refused_when_they_are_written(target):
    with pytest.raises(ValueError, match="target="): Patch("x", target, 1)


def test_bad_signature_and_edit_are_refused_when_they_are_written():
    with pytest.raises(ValueError, match="is not a parameter list"): Patch("x", "a:b", 1, signature="self")
    with pytest.raises(ValueError, match="Did you mean 'before'"): Edit("x", "y", "befor")
    with pytest.raises(ValueError, match="is not Python"): Edit("x", "y =")


def test_an_owner_without_attributes():
    assert "no attributes of its own" in str(Patch("x", (3, "real"), 1).check())


def test_versions():
    tested = Versions("trl", "1.12", "1.16")
    assert [v in tested for v in ("1.11.9", "1.12.0", "1.16.0", "1.16.4.dev0", "1.17.0.dev0", "2.0")] == [
        False, True, True, True, False, False,
    ]
    assert Versions("no-such-distribution-here", "1", "2").installed == ""


def test_the_package_imports_nothing_heavy():
    code = ("import sys; import grpo_nb.patch.core; "
            "print([m for m in ('torch', 'numpy', 'transformers', 'trl') if m in sys.modules])")
    import subprocess
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- the real TRL

def test_trl_is_patched_and_left_as_it_was():
    pytest.importorskip("trl")
    from trl import GRPOConfig, GRPOTrainer
    import trl.trainer.grpo_trainer as module
    owners = (GRPOTrainer, GRPOConfig, module)
    before, path = snapshot(*owners), "trl.trainer.grpo_trainer:GRPOTrainer."
    fields = list(GRPOConfig.__dataclass_fields__)
    versions = Versions("trl", "1.12", "1.16")
    k3 = Anchor("torch.exp(_ref_ - _new_) - (_ref_ - _new_) - 1", name="k3 estimator")
    patches = [
        Patch("loss", path + "_compute_loss", Edit("per_token_logps.detach() if _old_ is None else _old_",
              "per_token_logps.detach() if _old_ is None else (_old_)"), signature="(self, model, inputs)", versions=versions,
              anchors=[k3, 'coef_1 = torch.exp(_weights_)', Anchor('if self.beta != 0.0: ...', count=3)]),
        Patch("logps", path + "_get_per_token_logps_and_entropies", Wrap(lambda f: lambda self, *a, **k: f(self, *a, **k)),
              signature="(self, model, input_ids, attention_mask, logits_to_keep, ...)"),
        Patch("gamma", path + "get_gamma_weights", Wrap(lambda f: lambda *a, **k: f(*a, **k))),
        Patch("inputs", path + "_prepare_inputs", Edit("mode = _m_", "checked = True", "before")),
        Patch("log", path + "log", Edit("super().log(...)", "checked = True", "before")),
        Patch("field", (GRPOConfig.__dataclass_fields__, "max_tokens_per_pack"), 0, new=True),
        Patch("evaluate", path + "evaluate", Wrap(lambda f: lambda self, *a, **k: f(self, *a, **k))),
    ]
    with PatchSet(patches, "grpo") as grpo:
        assert all(r.ok for r in grpo.check()), "\n".join(map(str, grpo.check()))
        assert "(old_per_token_logps)" in inspect.getsource(GRPOTrainer._compute_loss)
        assert isinstance(vars(GRPOTrainer)["get_gamma_weights"], staticmethod) and "evaluate" in vars(GRPOTrainer)
        assert pickle.loads(pickle.dumps(GRPOTrainer._compute_loss)) is GRPOTrainer._compute_loss
        assert GRPOTrainer.log.__closure__ is not None and GRPOTrainer._prepare_inputs.__wrapped__
        assert len(textwrap.dedent(grpo.diff())) > 100
    unchanged(before, *owners)
    assert list(GRPOConfig.__dataclass_fields__) == fields and applied() == ()


def test_every_function_of_grpo_trainer_can_be_rewritten():
    pytest.importorskip("trl")
    from trl import GRPOTrainer
    for name, entry in vars(GRPOTrainer).items():
        inner = inspect.unwrap(getattr(entry, "__func__", entry))
        if not inspect.isfunction(inner): continue
        new = rewrite(entry, [])
        made = inspect.unwrap(getattr(new, "__func__", new))
        assert type(new) is type(entry) and made.__closure__ == inner.__closure__, name
        # the bytecode itself may differ: the compiler calls names that the compiled unit imports by another instruction
        for part in ("co_names", "co_varnames", "co_freevars", "co_cellvars", "co_firstlineno", "co_qualname"):
            assert getattr(made.__code__, part) == getattr(inner.__code__, part), (name, part)
        assert {line for *_, line in made.__code__.co_lines()} == {line for *_, line in inner.__code__.co_lines()}, name
