"""Every reward on text and chat, its options and its errors; weighted sums; GSM8K; and a step of TRL with them."""
import asyncio
import copy
import inspect
import json
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from grpo_nb import rewards
from grpo_nb.ground import events
from grpo_nb.tasks.guard import RewardError, guard

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data/gsm8k/sample.jsonl").read_text().splitlines()]
FULL = [row["answer"] for row in ROWS]
GOLD = [a.split("####")[1].strip() for a in FULL]


def chat(texts): return [[{"role": "assistant", "content": t}] for t in texts]


@pytest.fixture(params=[list, chat], ids=["text", "chat"])
def form(request): return request.param


def score(reward, texts, form=list, **columns): return reward(prompts=["?"] * len(texts), completions=form(texts), **columns)


def test_text_of():
    messages = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "99"},
        {"role": "assistant", "content": "18"},
    ]
    assert rewards.text_of(messages).strip() == "18" and rewards.text_of([]) == "" and rewards.text_of({"content": "x"}) == "x"
    assert rewards.format_tags(
        completions=[[{"role": "assistant", "reasoning_content": "a", "content": "<answer>b</answer>"}]]
    ) == [1]
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"text": "b"}]
    assert rewards.text_of([{"role": "assistant", "content": parts}]) == "ab"


def test_gsm8k_gold_scores_one_and_the_next_zero(form):
    for answers in (FULL, GOLD):
        assert score(rewards.numeric_answer, FULL, form, answer=answers) == [1.0] * len(ROWS)
        assert score(rewards.correctness, FULL, form, answer=answers) == [1.0] * len(ROWS)
    following = score(rewards.numeric_answer, FULL, form, answer=FULL[1:] + FULL[:1])
    same = [float(a == b) for a, b in zip(GOLD, GOLD[1:] + GOLD[:1])]
    assert following == same and sum(same) == 2, "two neighbours of the sample have the same answer"


def test_correctness(form):
    texts = ["1 2\n3", " 1 2 3 ", "1 2 3 4", "<answer>1 2 3</answer> done", r"\boxed{1 2 3}", "<think>no</think>1 2 3", "1 2 3."]
    assert score(rewards.correctness, texts, form, answer=["1 2 3"] * 7) == [1, 1, 0, 1, 1, 1, 0]
    assert score(rewards.correctness(ignore_space=False), texts, form, answer=["1 2 3"] * 7) == [0, 0, 0, 1, 1, 1, 0]
    assert score(rewards.correctness, ["paris", "Paris"], form, answer=["Paris"] * 2) == [0, 1]
    assert score(rewards.correctness(True), ["paris"], form, answer=["Paris"]) == [1]
    assert score(rewards.correctness, ["18", "18"], form, answer=[18, None]) == [1, None]
    assert score(rewards.correctness(column="solution"), ["a"], form, solution=["a"]) == [1]


def test_numeric_answer(form, capsys):
    events.said.clear()
    assert score(rewards.numeric_answer, ["$18.00", "17", "none", "a", "b"], form, answer=[18, 18.0, "18", None, "no number"]) == [
        1, 0, 0, None, None,
    ]
    score(rewards.numeric_answer, ["1"], form, answer=["no number"])
    assert capsys.readouterr().out.count("have no number; those rows are not scored") == 1
    assert score(rewards.numeric_answer(marked_only=True), ["18", "#### 18"], form, answer=[18] * 2) == [0, 1]
    assert score(rewards.numeric_answer(percent="fraction"), ["50%"], form, answer=[0.5]) == [1]
    assert score(rewards.numeric_answer, ["50%"], form, answer=[50]) == [1]
    assert score(rewards.numeric_answer(tolerance=0.01), ["3.14", "3.13"], form, answer=["3.15"] * 2) == [1, 0]


@pytest.mark.parametrize("text, whole, count", [
    ("<think>a</think><answer>b</answer>", 1, 1),
    ("\n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1, 1),
    ("<think></think><answer></answer>", 1, 1),
    ("", 0, 0),
    ("b", 0, 0),
    ("<answer>b</answer><think>a</think>", 0, 1),
    ("x<think>a</think><answer>b</answer>", 0, 1),
    ("<think>a</think>x<answer>b</answer>", 0, 1),
    ("<think>a</think><answer>b</answer>x", 0, 1),
    ("<think>a<answer>b</answer></think>", 0, 1),
    ("<think>a</think><answer>b", 0, 0.75),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
    ("</think>a<think><answer>b</answer>", 0, 1),
])
def test_tags(form, text, whole, count):
    assert score(rewards.format_tags, [text], form) == [whole] and score(rewards.tag_count, [text], form) == [count]
    assert score(rewards.format_tags(["a"]), ["<a>" + text.replace("<a", "") + "</a>"], form) == [1]


def test_regex(form):
    import re
    assert score(rewards.regex(r"^\d+$"), ["18", "x"], form) == [1, 0]
    assert score(rewards.regex(re.compile("X", re.I), full=True), ["x", "xx"], form) == [1, 0]


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1200))
def test_soft_overlong_is_equation_13(longest, cache, n):
    if cache > longest: longest, cache = cache, longest
    expected = 0 if n <= longest - cache else -1 if n > longest else ((longest - cache) - n) / cache
    (got,) = rewards.soft_overlong(max_length=longest, cache=cache)(completions=["x"], completion_ids=[[0] * n])
    assert got == pytest.approx(expected, abs=1e-15) and -1 <= got <= 0


def test_length_target(form):
    assert score(rewards.length_target(target=4), ["x"] * 4, form, completion_ids=[[0] * n for n in (4, 2, 8, 9)]) == [1, .5, 0, 0]
    assert score(rewards.length_target(4, 8, "characters"), ["abcd", "", "a" * 12], form) == [1, .5, 0]
    assert score(rewards.length_target(target=0, unit="words"), ["", "a"], form) == [1, 0]


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repetition_penalty(ids, n):
    (got,) = rewards.repetition_penalty(n=n, penalty=-2)(completions=["x"], completion_ids=[ids])
    grams = [tuple(ids[i:i + n]) for i in range(max(0, len(ids) - n + 1))]
    assert -2 < got <= 0 and (got == 0) == (len(set(grams)) == len(grams))
    from trl.rewards import get_repetition_penalty_reward
    assert got == pytest.approx(get_repetition_penalty_reward(n, -2.0)([ids])[0])


def test_tokens_are_needed_or_another_unit(form):
    for r in (rewards.repetition_penalty, rewards.length_target(target=3), rewards.soft_overlong(max_length=3, cache=1)):
        with pytest.raises(ValueError, match=f"{r.__name__}.*'completion_ids'.*TRL passes them"): score(r, ["x"], form)
    assert score(rewards.repetition_penalty(n=1, unit="words"), ["a a", "a b"], form) == [-.5, 0]


def test_missing_column_names_it_and_those_that_are_there(form):
    for r in (rewards.correctness, rewards.numeric_answer):
        with pytest.raises(
            ValueError,
            match=f"'{r.__name__}' needs the column 'answer', which is not there. Did you mean 'answers'.*answers, prompt, task",
        ):
            score(r, ["1"], form, answers=["1"], task=["t"], trainer_state=None, completion_ids=[[1]])
    with pytest.raises(ValueError, match="'solution'"): score(rewards.correctness(column="solution"), ["1"], form, answer=["1"])
    with pytest.raises(ValueError, match="column 'answer' has 1 for 2 completions"):
        score(rewards.correctness, ["1", "2"], form, answer=["1"])
    with pytest.raises(ValueError, match="column 'answer' has text"): score(rewards.correctness, ["1"], form, answer="1")
    with pytest.raises(TypeError, match="must be a list"): rewards.correctness(completions="18", answer=["18"])
    with pytest.raises(RewardError, match="needs the column 'answer'"): guard(rewards.correctness)(prompts=["?"], completions=["1"])


WRONG = [
    ("correctness", dict(ignorecase=True), TypeError, "no argument 'ignorecase'. Did you mean 'ignore_case'"),
    ("numeric_answer", dict(percent="x"), ValueError, "percent='x'"),
    ("numeric_answer", dict(tolerance="x"), ValueError, "tolerance='x'"),
    ("numeric_answer", dict(tolerance=-1), ValueError, "tolerance=-1"),
    ("format_tags", dict(tags="think"), ValueError, "tags='think'"),
    ("tag_count", dict(tags=["<think>"]), ValueError, "without brackets"),
    ("tag_count", dict(tags=[]), ValueError, "tags="),
    ("regex", {}, TypeError, "needs the option 'pattern'"),
    ("regex", dict(pattern="("), ValueError, "pattern='('"),
    ("regex", dict(pattern=3), ValueError, "pattern=3"),
    ("soft_overlong", dict(max_length=10), TypeError, "'cache'"),
    ("soft_overlong", dict(max_length=10, cache=11), ValueError, "cache=11"),
    ("soft_overlong", dict(max_length=0, cache=0), ValueError, "max_length=0"),
    ("length_target", dict(target=-1), ValueError, "target=-1"),
    ("length_target", dict(target=1, width=0), ValueError, "width=0"),
    ("length_target", dict(target=1, unit="token"), ValueError, "Did you mean 'tokens'"),
    ("repetition_penalty", dict(n=0), ValueError, "n=0"),
    ("repetition_penalty", dict(penalty=1), ValueError, "penalty=1"),
    ("correctness", dict(name=""), ValueError, "name=''"),
    ("corectness", {}, ValueError, "Did you mean 'correctness'"),
    ("zebra", {}, ValueError, "reward='zebra' is not known. Allowed"),
    (3, {}, ValueError, "reward=3"),
]


@pytest.mark.parametrize("name, options, kind, text", WRONG, ids=str)
def test_wrong_options(name, options, kind, text):
    with pytest.raises(kind) as caught: rewards.get(name, **options)
    assert text in str(caught.value)
    if name in rewards.available() and options:
        with pytest.raises(kind): getattr(rewards, name)(**options)


def test_get_and_available():
    assert set(rewards.available()) == {
        "correctness", "numeric_answer", "math_verify", "format_tags", "tag_count",
        "regex", "soft_overlong", "length_target", "repetition_penalty", "code_tests", "has_code",
    }
    assert all(text.strip() for text in rewards.available().values())
    assert rewards.get("correctness") is rewards.correctness and rewards.get(len) is len
    made = rewards.get("regex", pattern="x", name="has_x")
    assert made.__name__ == "has_x" and rewards.get(made, full=True).options == {"pattern": "x", "name": "has_x", "full": True}
    with pytest.raises(TypeError, match="takes 2 options"): rewards.regex("a", True, 3)


def test_an_option_is_never_a_column():
    assert score(rewards.numeric_answer, ["18"], answer=["17"], tolerance=[5], percent=["x"], name=["y"]) == [0]


def test_rewards_travel():
    for r in (rewards.correctness, rewards.regex(r"\d", name="digits"), rewards.soft_overlong(10, 2)):
        for again in (pickle.loads(pickle.dumps(r)), copy.deepcopy(r)):
            assert again.__name__ == r.__name__ and again.options == r.options and repr(again) == repr(r)
    assert pickle.loads(pickle.dumps(rewards.correctness)) is rewards.correctness


def test_own_rewards():
    @rewards.reward
    def starts_with(text, letter, prompt, *, case=True):
        "1 where the text starts with the row's letter."
        return text.startswith(letter) if case else text.lower().startswith(letter.lower())
    try:
        assert rewards.get("starts_with", case=False)(prompts=["?"], completions=["Abc"], letter=["a"]) == [True]
        with pytest.raises(ValueError, match="column 'letter'"): starts_with(prompts=["?"], completions=["a"])
    finally: del rewards._known["starts_with"]
    with pytest.raises(TypeError, match="first parameter"): rewards.reward(lambda completions: 1)


def part(values, name, is_async=False):
    def f(prompts, completions, **columns): return values
    async def g(prompts, completions, **columns):
        await asyncio.sleep(0)
        return values
    made = g if is_async else f
    made.__name__ = name
    return made


@pytest.mark.parametrize("kinds", [(False, False), (True, False), (True, True)])
def test_weighted(kinds):
    a, b = part([1, 2, None, None], "a", kinds[0]), part([10, None, 3, None], "b", kinds[1])
    logged = {}
    both = rewards.weighted([(a, 0.5), (b, 2)], name="sum")
    assert both.__name__ == "sum" and inspect.iscoroutinefunction(both) == any(kinds)
    out = both(prompts=["?"] * 4, completions=["x"] * 4, log_metric=logged.__setitem__)
    if any(kinds): out = asyncio.run(out)
    assert out == [20.5, 1.0, 6.0, None] and logged == {"rewards/a/mean": 1.5, "rewards/b/mean": 6.5}
    assert rewards.weighted({a: 0.5, b: 2}).__doc__ == "0.5 * a + 2 * b"


def test_weighted_names_the_part_that_fails():
    for is_async in (False, True):
        both = rewards.weighted({part([1, 2], "good"): 1, part([1], "bad", is_async): 1})
        with pytest.raises(RewardError, match="'bad' at sample 1: returned 1 values for 2") as caught:
            out = guard(both)(prompts=["?"] * 2, completions=["x", "y"])
            if is_async: asyncio.run(out)
        assert caught.value.function == "bad"


def test_weighted_in_weighted_and_by_name():
    inner = rewards.weighted({"correctness": 1.0, rewards.regex("x"): 0.5}, name="inner")
    assert rewards.weighted({inner: 2})(completions=["x", "y"], answer=["x", "x"]) == [3.0, 0.0]


def test_weighted_wrong():
    import torch
    for parts, kind, text in (
        ({}, ValueError, "no rewards"),
        ({"corectness": 1}, ValueError, "Did you mean"),
        ([len], TypeError, "pairs"),
        ({len: "1"}, ValueError, "weight of 'len'='1'"),
        ({len: float("nan")}, ValueError, "finite"),
        ({torch.nn.Linear(1, 1): 1}, TypeError, "reward model"),
        ({"regex": 1}, TypeError, "'pattern'"),
        (3, TypeError, "pairs"),
    ):
        with pytest.raises(kind, match=text): rewards.weighted(parts)


def test_math_verify_is_asked_for_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for call in (
        lambda: rewards.get("math_verify"), lambda: rewards.math_verify(), lambda: guard(rewards.math_verify),
        lambda: rewards.weighted({"math_verify": 1}), lambda: rewards.math_verify(completions=["1"], answer=["1"]),
    ):
        with pytest.raises(ImportError, match="pip install math-verify"): call()


def test_math_verify(form):
    pytest.importorskip("math_verify")
    texts = [r"so \boxed{2\sqrt{3}}", r"$\sqrt{12}$", r"\boxed{\frac{1}{3}}", "<answer>18</answer>", "no idea", r"$x=5$"]
    answers = [r"\sqrt{12}", r"$2\sqrt{3}$", "1/3", "#### 18", "3", "4"]
    assert score(rewards.math_verify, texts, form, answer=answers) == [1, 1, 1, 1, 0, 0]
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score, rewards.math_verify, texts, form, answer=answers).result() == [1, 1, 1, 1, 0, 0]
    assert score(guard(rewards.math_verify, timeout=60), texts, form, answer=answers) == [1, 1, 1, 1, 0, 0]


def test_a_step_of_trl(tmp_path):
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", "add", *map(str, range(20))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        )
    )
    combined = rewards.weighted({part([0.5] * 8, "judge", True): 1, rewards.format_tags: 1})
    functions = [
        guard(f, timeout=60)
        for f in (
            rewards.correctness, rewards.numeric_answer, rewards.regex(r"\d", name="digit"), rewards.soft_overlong(4, 2), combined,
        )
    ]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=functions,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["add 1 2", "add 3 4"], "answer": ["3", "7"]}),
        args=GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=4, max_steps=1,
            logging_steps=1, report_to=[], bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name in ("correctness", "numeric_answer", "digit", "soft_overlong", "weighted", "judge", "format_tags"):
        assert f"rewards/{name}/mean" in logged
    assert logged["rewards/weighted/mean"] == pytest.approx(0.5) and logged["rewards/soft_overlong/mean"] <= 0
