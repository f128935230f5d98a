import ast
import textwrap

import pytest
from hypothesis import given, strategies as st

from grpo_nb.patch.anchor import (Anchor, AnchorAmbiguous, AnchorError, AnchorMissing, matches, parse, signature_difference,
                                  signature_of, source_of)


def found(pattern, code): return len(Anchor(pattern, count=None).find_all(code))


def way(pattern, code):
    bound = next(matches(parse(pattern).body, parse(code).body, {}), None)
    return bound and {k: ast.unparse(v) if isinstance(v, ast.AST) else v for k, v in bound.items()}


@pytest.mark.parametrize("pattern,code,bound", [
    ("_x_ + 1", "a.b + 1", {"x": "a.b"}),
    ("_x_ = _y_", "loss = f(1)", {"x": "loss", "y": "f(1)"}),
    ("_x_ - _x_", "f(a) - f( a )", {"x": "f(a)"}),
    ("_x_ - _x_", "a - b", None),
    ("self._name_(1)", "self.go(1)", {"name": "go"}),
    ("_ + _y_", "a + b", {"y": "b"}),
    ("f(..., _z_)", "f(a, b, c)", {"z": "c"}),
    ("f(_a_, ..., _a_)", "f(x, y, x)", {"a": "x"}),
    ("f(_a_, ..., _a_)", "f(x, y, z)", None),
    ("f(x=1, y=_v_)", "f(y=2, x=1)", {"v": "2"}),
    ("f(x=1)", "f(x=1, y=2)", None),
    ("f(x=_)", "f(y=1)", None),
    ("f(..., y=_v_)", "f(*args, x=1, y=2, **more)", {"v": "2"}),
    ("f(**_kw_)", "f(**more)", {"kw": "more"}),
    ("f(_x_)", "f(*args)", None),
    ("x[_i_, ...]", "x[0, 1, 2]", {"i": "0"}),
    ("{'a': _v_, **...}", "{'a': 1, 'b': 2}", {"v": "1"}),
    ("{**..., 'b': _v_}", "{'a': 1, **c, 'b': 2}", {"v": "2"}),
    ("{'a': 1}", "{'a': 1, 'b': 2}", None),
    ("x = 1", "x = True", None),
    ("x = 1", "x = 1.0", None),
    ("x = 1e-4", "x = 0.0001", True),
    ("x = ...", "x = a + b", True),
    ("'ab'", "'a' \"b\"", True),
    ("f'{_x_}!'", "f'{a + b}!'", {"x": "a + b"}),
    ("if c: ...", "if c:\n  a\n  b", True),
    ("if c: ...", "if c:\n  a\nelse:\n  b", None),
    ("if c: ...\nelse: ...", "if c:\n  a", True),
    ("def f(self, x): ...", "@d\ndef f(self, x: int) -> None:\n  'doc'", True),
    ("def _f_(_x_): ...", "def g(y): pass", {"f": "g", "x": "y"}),
    ("class A: ...", "@d\nclass A:\n  x = 1", True),
    ("for _ in _y_: ...", "for i, j in z:\n  pass", {"y": "z"}),
    ("with a as _b_: ...", "with a as c: pass", {"b": "c"}),
    ("return", "return None", None),
    ("async def f(): ...", "def f(): ...", None),
    ("lambda: _x_", "lambda: 1", {"x": "1"}),
    ("not_a_wildcard", "_x_", None),
    ("__x__", "y", None),
])
def test_what_a_pattern_matches(pattern, code, bound):
    result = way(pattern, code)
    assert (result is None) == (bound is None)
    if isinstance(bound, dict): assert {k: v for k, v in result.items() if k in bound} == bound


def test_statements_are_found_in_every_block():
    code = textwrap.dedent('''
        try:
            a = 1
            b = 2
        except E:
            a = 1
            skip()
            b = 2
        else:
            while x:
                a = 1
        finally:
            with y: a = 1
        match z:
            case 1: a = 1
    ''')
    assert found("a = 1", code) == 5
    assert found("a = 1\nb = 2", code) == 1
    assert found("a = 1\n...\nb = 2", code) == 2
    assert found("try: ...\nexcept E: ...\nelse: ...\nfinally: ...", code) == 1


def test_an_expression_is_found_at_every_depth_but_not_in_an_f_string():
    assert found("f(_x_)", "f(f(g(f(1))))") == 3
    assert found("a.b", "a.b = 1; del a.b; x = a.b.c; y = f'{a.b}'") == 3


def test_the_span_counts_characters_and_lines_of_the_file():
    code = "x = 'é'; y = f(  # remark\n    'ü', 1)\n"
    match = Anchor("f(...)").find(code)
    assert match.text == "f(  # remark\n    'ü', 1)" and match.span == (1, 13, 2, 11)
    assert (match.line, match.end_line) == (1, 2)


def test_a_decorator_belongs_to_its_def():
    code = "x = 1\n@wrap(1)\n@again\ndef f(): pass\n"
    match = Anchor("def f(): ...").find(code)
    assert match.line == 2 and match.text.startswith("@wrap(1)")


def test_form_feed_does_not_move_lines():
    assert Anchor("b = 2").find("a = '\x0c'\n\x0c\nb = 2\n").line == 3


class Sample:
    @staticmethod
    def static(a, *, b=1): return a + b

    @classmethod
    def made(cls): return cls()

    @property
    def size(self): return len(self.parts)

    def text(self):
        return """
left of the margin
"""


def test_sources_of_methods_are_kept_as_written():
    assert Anchor("a + b").find(Sample.__dict__["static"]).bound == {}
    assert Anchor("cls()").find(Sample.__dict__["made"])
    assert Anchor("len(_x_)").find(Sample.__dict__["size"]).bound == {"x": "self.parts"}
    match = Anchor(r"return '\nleft of the margin\n'").find(Sample.text)
    with open(__file__) as file: assert file.read().splitlines()[match.line - 1].strip().startswith('return """')
    assert Anchor("def made(cls): ...").find(Sample).line > match.source.first - 12
    assert source_of(source_of(Sample)) is not None


def test_errors_name_the_anchor_the_place_and_the_closest_line():
    code = "def f(self):\n    if self.beta != 0.0:\n        kl = 1\n    return kl\n"
    with pytest.raises(AnchorMissing) as caught: Anchor("if self.bete != 0.0: ...", name="kl branch").find(code)
    assert "'kl branch'" in str(caught.value) and "line 2: if self.beta != 0.0:" in str(caught.value)
    with pytest.raises(AnchorMissing, match="not together and in this order"):
        Anchor("return kl\nif self.beta != 0.0: ...").find(code)
    with pytest.raises(AnchorMissing, match="there is no `kl = 2`"): Anchor("if _: kl = 1\nkl = 2").find(code)
    with pytest.raises(AnchorAmbiguous, match="2 times.*line 3: kl; line 4: kl"): Anchor("kl", count=1).find(code)
    assert Anchor("kl", count=2).find(code).line == 3 and Anchor("kl", count=None).find(code).line == 3
    with pytest.raises(AnchorMissing, match="2 times in the source, not 3"): Anchor("kl", count=3).find(code)
    with pytest.raises(AnchorMissing, match="Nothing there resembles it"): Anchor("zebra(quagga)").find(code)
    with pytest.raises(AnchorError, match="no Python source to search for builtins.len"): Anchor("x").find(len)


@pytest.mark.parametrize("code,message", [("if", "is not Python"), ("...", "begin and end"), ("a\n...", "begin and end"),
                                          ("_x_", "wildcard alone"), ("", "begin and end")])
def test_bad_anchors_are_refused_when_they_are_written(code, message):
    with pytest.raises(ValueError, match=message): Anchor(code)


names = st.sampled_from("abcxyz")
expressions = st.recursive(names | st.integers(0, 9).map(str), lambda e: st.one_of(
    st.tuples(e, st.sampled_from(["+", "*", "-", "if a else"]), e).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    st.tuples(names, e, e).map(lambda t: f"{t[0]}({t[1]}, k={t[2]})"),
    st.tuples(e, names).map(lambda t: f"({t[0]}).{t[1]}"),
    st.tuples(e, e).map(lambda t: f"[{t[0]}, {t[1]}]")), max_leaves=12)


@given(expressions)
def test_code_matches_itself_however_it_is_formatted(code):
    plain = ast.unparse(ast.parse(code))
    assert way(code, plain) is not None
    assert way(code, "(" + code.replace(" ", "\n  ") + ") # remark") is not None


@given(expressions, expressions)
def test_two_codes_match_exactly_when_their_trees_are_equal(a, b):
    assert (way(a, b) is not None) == (ast.dump(ast.parse(a)) == ast.dump(ast.parse(b)))


@given(expressions)
def test_a_wildcard_binds_what_stands_there(code):
    assert way("f(_x_, 1)", f"f({code}, 1)") == {"x": ast.unparse(ast.parse(code))}
    assert way("_x_ == _x_", f"{code} == {code}") is not None


def stock(self, model, inputs, return_outputs=False, *, scale=1.0, **kwargs): ...


@pytest.mark.parametrize("expected,words", [
    ("(self, model, inputs, return_outputs=False, *, scale=1.0, **kwargs)", ""),
    ("(self, model, inputs, return_outputs=..., *, scale=..., **kwargs)", ""),
    ("(self, model, ...)", ""),
    ("(...)", ""),
    ("(self, model, inputs, ...)", ""),
    ("(self, model)", "new: inputs, return_outputs, scale, kwargs"),
    ("(self, model, batch, ...)", "missing: batch"),
    ("(self, inputs, model, ...)", "in another order"),
    ("(self, inputs, ...)", "inserted: model"),
    ("(self, model, inputs, return_outputs=True, ...)", "return_outputs had the default True, has False"),
    ("(self, model, inputs=..., ...)", "inputs had the default ..., has none"),
    ("(self, model, inputs, return_outputs, ...)", "return_outputs had no default, has False"),
    ("(self, model, inputs, return_outputs=False, scale=1.0, **kwargs)", "scale was positional, is keyword only"),
])
def test_signatures(expected, words):
    difference = signature_difference(expected, stock)
    assert words in difference and bool(difference) == bool(words)


def test_signature_of_static_and_class_methods_and_of_what_has_none():
    assert signature_of(Sample.__dict__["static"]) == "(a, *, b=1)" and signature_of(Sample.__dict__["made"]) == "(cls)"
    assert signature_difference("(a, /, b='x y', *c, d)", eval('lambda a, /, b="x y", *c, d: 0')) == ""
    with pytest.raises(AnchorError): signature_of(3)
    with pytest.raises(ValueError, match="is not a parameter list"): signature_difference("(self", stock)
