"""Numbers as they are written, where the answer stands, exactness, and texts made to be hard to read."""
import json
import random
from decimal import Decimal
from fractions import Fraction as F
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from grpo_nb.tasks.answers import after_thinking, boxed, find_number, hashed, marked, numbers, same_number, tagged, to_number

ONE_NUMBER = {
    "18": 18, "18.": 18, "18.0": 18, "+18": 18, "-18": -18, "−18": -18, "–18": -18, "－１８": -18, "- 18": -18,
    ".5": F(1, 2), "-.5": F(-1, 2), "007": 7,
    "1,234": 1234, "1,234,567.50": F(2469135, 2), "1,00,000": 100000, "1_000_000": 10**6, "1'000": 1000,
    "1\u202f000": 1000, "1\u00a0000": 1000, r"1{,}234": 1234, r"1\,234": 1234,
    "$18": 18, "$ 18": 18, r"\$18": 18, "18$": 18, "$1,234.50": F(2469, 2), "-$5": -5, "$-5": -5, "−$5": -5,
    "€5": 5, "5 €": 5, "£3.20": F(16, 5), "US$20": 20, "Rs. 500": 500, "USD18": 18, "18 USD": 18,
    "50%": 50, "50 %": 50, r"50\%": 50, "50 percent": 50, "-2.5%": F(-5, 2),
    "3/4": F(3, 4), "3 / 4": F(3, 4), "-3/4": F(-3, 4), r"\frac{3}{4}": F(3, 4), r"\dfrac{3}{4}": F(3, 4), r"\tfrac34": F(3, 4),
    r"\frac{-3}{4}": F(-3, 4), r"-\frac{3}{4}": F(-3, 4), "36/2": 18, r"\frac{1,000}{4}": 250,
    "1 3/4": F(7, 4), "-1 3/4": F(-7, 4), r"1\frac{3}{4}": F(7, 4), "½": F(1, 2), "2½": F(5, 2), "-½": F(-1, 2),
    "1.5e3": 1500, "1.5E-3": F(3, 2000), r"1.5 \times 10^{3}": 1500, "1.5×10^3": 1500, "1.5*10^-3": F(3, 2000), "10^3": 1000,
    "2.5 million": 2500000, "$3 billion": 3 * 10**9,
    "18 dollars": 18, "18km": 18, "60 km/h": 60, "18 m^2": 18, "18th": 18, r"18\text{ eggs}": 18, r"18^\circ": 18, "20 °C": 20,
    "about 18 eggs": 18, "x = 18": 18, "9 * 2 = 18": 18,
}
NO_NUMBER = [
    "", " ", "none", "eighteen", "x", "x2", "H2O", "-", "$", "%", ".", "1/0", r"\frac{1}{0}",
    r"\frac{\pi}{2}", r"2\sqrt{3}", "√2", "2π", "2^5", "5²", "1.2.3", "3/4/2024", "12:30", "1,5",
    "1e999999999", "10^99999", "9" * 5000, "0." + "1" * 5000, r"\text{no solution}",
]


@pytest.mark.parametrize("text", ONE_NUMBER)
def test_one_number(text):
    assert to_number(text) == find_number(text) == ONE_NUMBER[text] or (text == "- 18" and to_number(text) == -18)
    assert find_number(rf"so \boxed{{{text}}} in 3 days") == ONE_NUMBER[text]
    assert find_number(f"<think>1 2</think><answer>{text}</answer> 99") == ONE_NUMBER[text]
    assert find_number(f"20 days.\n#### {text}") == ONE_NUMBER[text]


@pytest.mark.parametrize("text", NO_NUMBER)
def test_no_number(text):
    assert to_number(text) is None and find_number(text) is None
    assert find_number(f"There were 18. \\boxed{{{text}}}") is None


@pytest.mark.parametrize(
    "text", ["(1, 2)", "1 or 2", "3 + 4", "3 - x", "2 * x", r"2 \times 3", "x > 3", r"5\pi", r"\sqrt{4}", "5 feet 3 inches"]
)
def test_one_number_means_one(text): assert to_number(text) is None


@pytest.mark.parametrize("text, value", [
    ("The answer is 18. That is 126 in 7 days.", 18),
    ("The answer is 18, not 20.", 18),
    ("Answer: $18\nin 7 days", 18),
    ("A: 18", 18),
    ("Q: 3?\nA: 18 of 20", 18),
    ("**Answer:** 18 eggs, 3 days", 18),
    ("Answer:\n\n**18**\nfor 3 days", 18),
    ("the final answer is: \\( 18 \\) in 3 days", 18),
    ("answer = 3/4 of 20", F(3, 4)),
    ("The answer is 9 * 2 = 18 for 3 days", 18),
    ("The answer is therefore approximately $18 for 3", 18),
    ("The answer is 5. No: the answer is 18, for 3", 18),
    ("The answer is not 3. He has 18", 18),
    ("The answer is 3 + 4", None),
    ("ANSWER IS -5 at 3", -5),
    ("Data: 3", 3),
    ("banana: 3, then 4", 4),
])
def test_stated(text, value): assert find_number(text) == value


@pytest.mark.parametrize("text, value", [
    ("10-20", 20), ("x=-5", -5), ("5 - 3", 3), ("- 18\n- 19", 19), ("He has 3 ducks, 4 hens.", 4),
    ("in 2019 he made $5.", 5), ("18)", 18), ("...5", 5), ("答案是18个", 18), ("18 by 3/4/2024", None),
    ("x_1 = 4, x_{2}", 4), ("4 x^2", 4), ("(18)", 18), ("18 18", 18),
])
def test_last_number(text, value): assert find_number(text) == value


def test_marks_win_in_order():
    assert find_number("<answer>1</answer> \\boxed{2}\n#### 3\nThe answer is 4. 5") == 1
    assert find_number("\\boxed{2}\n#### 3\nThe answer is 4. 5") == 2
    assert find_number("#### 3\nThe answer is 4. 5") == 3
    assert find_number("The answer is 4. 5") == 4
    assert find_number("<answer>one of \\boxed{1} in 3</answer>") == 1
    assert find_number("<think>\\boxed{3}</think> 18") == 18
    assert find_number("<think>18") is None and find_number("18</think>") is None
    assert find_number("The answer is 4.", marked_only=True) is None


def test_marks():
    assert boxed(r"\boxed{\frac{\sqrt{3}}{4}}") == r"\frac{\sqrt{3}}{4}"
    assert boxed(r"\boxed{1} \boxed{2") == "1" and boxed(r"\boxed{a\}b}") == r"a\}b"
    assert boxed(r"\boxed{\boxed{3}}") == r"\boxed{3}" and boxed("none") is None and boxed("}}{") is None
    assert tagged("<answer>1</answer><ANSWER>2</Answer><answer>3") == "2"
    assert tagged("</answer>1<answer>") is None and tagged("<x>1</x>", "x") == "1"
    assert hashed("### 3") is None and hashed("##### 3") is None
    assert hashed("#### 1) Count\n#### 18 \nbye") == "18 "
    assert hashed("a #### 5") == "5" and hashed("#### ") is None
    assert hashed("#### Summary\nIt is 5.") is None and marked("#### Final: Paris\n\n") == "Final: Paris"
    assert after_thinking("<think>a</think>b<think>c") == "b"


def test_percent():
    assert same_number("50%", 50) and not same_number("50%", "0.5")
    assert same_number("50%", "0.5", percent="fraction") and not same_number("50%", 50, percent="fraction")
    for call in (
        lambda: find_number("1", percent="half"),
        lambda: to_number("1", percent="half"),
        lambda: numbers("1", percent="half"),
    ):
        with pytest.raises(ValueError, match="percent='half' is not known.*'unit', 'fraction'"): call()


def test_answers_that_are_numbers():
    import numpy as np
    assert find_number(0.1) == F(1, 10) == find_number(Decimal("0.1")) == find_number(np.float64(0.1))
    assert find_number(np.int64(3)) == 3 and find_number(F(1, 3)) == F(1, 3)
    assert find_number(1e-07) == F(1, 10**7) and find_number(-0.0) == 0
    assert all(find_number(x) is None for x in (float("nan"), float("inf"), None, True, Decimal("Infinity")))
    assert same_number("0.3", 0.3) and not same_number(0.1 + 0.2, 0.3)
    assert not same_number(None, None) and same_number("1.01", 1, tolerance=0.01)


@given(st.integers(-10**15, 10**15))
def test_integers_in_every_dress(n):
    for text in (
        str(n), f"{n:,}", f"${n:,}", f"{n}.", f"{n}.00", f"{n} eggs", f"\\boxed{{{n:,}}}",
        f"#### {n:,}", f"<answer>\n{n}\n</answer>", f"The answer is {n:,}.", f"{n}%", f"A: {n}",
    ):
        assert find_number(text) == n, text


@given(st.fractions(max_denominator=10**6))
def test_fractions_and_back(f):
    sign, a, b = "-" * (f < 0), abs(f.numerator), f.denominator
    for text in (
        f"{sign}{a}/{b}", rf"{sign}\frac{{{a}}}{{{b}}}", rf"\boxed{{{sign}\dfrac{{{a}}}{{{b}}}}}", f"so {sign}{a}/{b} of it",
    ):
        assert find_number(text) == f, text
    whole, rest = divmod(a, b)
    if whole and rest: assert find_number(f"{sign}{whole} {rest}/{b}") == f == find_number(rf"{sign}{whole}\frac{{{rest}}}{{{b}}}")


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-10**9, max_value=10**9, places=6))
def test_decimals_are_exact(d):
    assert find_number(f"{d:f}") == F(d) == find_number(f"{d:,f}") == find_number(d)
    assert find_number(f"{d:e}") == F(d)


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            list("0123456789.,-+/%$€ \n\\{}<>#=:^*eEx_A")
            + [
                "\\boxed{", "\\frac{", "<answer>", "</answer>", "#### ",
                "answer is ", "½", "−", "<think>", "</think>", " million", "²",
            ]
        ),
        max_size=60,
    ).map("".join)
)
def test_any_text_gives_a_fraction_or_none(text):
    found = find_number(text)
    assert found is None or isinstance(found, F)
    assert all(n is None or isinstance(n, F) for n in numbers(text))
    assert same_number(text, text) == (found is not None)


@pytest.mark.parametrize("piece", [
    "1", "1 ", "1,", "1,000,", "1.", "1/", "1^", "$", "-", "<answer>", "\\boxed{", "\\frac{", "\\frac{1}{",
    "answer is ", "answer is 1=", "#### ", "####\n", "A:\n", "1 \\times ", "\\text{", "½", "<think>",
])
def test_long_texts_take_one_pass(piece):
    found = find_number(piece * 30000)  # with a quadratic search this runs into the time limit of the suite
    assert found is None or isinstance(found, F)


ROWS = [json.loads(line) for line in (Path(__file__).parent / "data/gsm8k/sample.jsonl").read_text().splitlines()]
GOLD = [row["answer"].split("####")[1].strip() for row in ROWS]
DRESS = [
    "{}", "#### {}", r"so \boxed{{{}}} in 3 days", r"\boxed{{\${}}}",
    "<think>3 + 4</think><answer>{}</answer>", "First 3. The answer is {}.", "It makes ${}.",
    "**Answer: {} eggs** in 3 days", "A: {}", "After 3 days there are {} left.",
    r"\boxed{{{}\text{{ eggs}}}}", "{}.00",
]


def test_gsm8k_in_every_dress():
    for row, gold in zip(ROWS, GOLD):
        value = F(gold.replace(",", ""))
        assert find_number(row["answer"]) == value and all(find_number(d.format(gold)) == value for d in DRESS), gold
        other = str(value + random.Random(gold).choice([-1, 1, 10, F(1, 2)]))
        assert not any(same_number(d.format(other), row["answer"]) for d in DRESS)
