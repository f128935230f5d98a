"""The tiny model: made the same way each time, complete on disk, right about a third of the time; and held-out accuracy."""
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_nb import tasks
from grpo_nb.tasks import tiny
from grpo_nb.tasks.evaluate import accuracy, evaluation_mode, exact_answer, final_text, greedy

SMALL = dict(hidden_size=64, layers=1, batch_size=8, measure=False)


@pytest.fixture(scope="module")
def task(): return tasks.get("sort_digits", n_train=64, n_test=24)


@pytest.fixture(scope="module")
def made(task): return tiny.tiny_model(task, steps=2, **SMALL)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- the tokenizer


@pytest.mark.parametrize("text", [
    "Sort the digits: 4913", "a user says: xuserx", "Grüße, 你好 🙂\n\ttabs  two spaces",
    'Reverse the letters: "cabed"', "assistant system user", "don't 12,345.67",
])
def test_tokenizer_reads_back(made, text):
    _, tokenizer = made
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_token_a_digit_and_a_letter():
    tokenizer = tiny.make_tokenizer(["Reverse the letters in order: 123"])
    assert tokenizer.tokenize("4913") == list("4913") and tokenizer.tokenize('"letters"') == list('"letters"')
    assert len(tokenizer.tokenize(" letters")) == 1 and len(tokenizer) <= 320


def test_tokenizer_has_pad_eos_and_template(made):
    _, tokenizer = made
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 9 and max(ids) < 320


def test_vocabulary_has_a_floor():
    assert len(tiny.make_tokenizer(["Sort"], 262)) == 262
    with pytest.raises(ValueError, match="vocab_size=100"): tiny.make_tokenizer([], 100)


# --- the model


def test_size(task):
    model = tiny.make_model(tiny.make_tokenizer(["Sort the digits: 1"]))
    assert 1e6 < model.num_parameters() < 3e6 and model.dtype == torch.float32


def test_same_seed_same_model_and_random_state_untouched(task, made):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.random.get_rng_state(), random.getstate()
    again, _ = tiny.tiny_model(task, steps=2, **SMALL)
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    assert same(made[0], again) and made[0].warm_start.losses == again.warm_start.losses
    other, _ = tiny.tiny_model(task, steps=2, seed=1, **SMALL)
    assert not same(again, other)


def test_folder_is_complete(task, tmp_path):
    model, tokenizer = tiny.tiny_model(task, tmp_path / "model", steps=1, **SMALL)
    loaded, read = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert same(model, loaded) and read.get_vocab() == tokenizer.get_vocab() and read.chat_template == tokenizer.chat_template
    assert loaded.generation_config.eos_token_id == read.eos_token_id and loaded.config.pad_token_id == read.pad_token_id
    prompts = task.test["prompt"][:4]
    assert greedy(loaded, read, prompts, 5) == greedy(model, tokenizer, prompts, 5)
    assert loaded.config.model_type == "qwen3" and (tmp_path / "model" / "model.safetensors").is_file()


def test_progress_and_losses(task):
    seen = []
    model, _ = tiny.tiny_model(task, steps=12, on_step=lambda *a: seen.append(a), **{**SMALL, "batch_size": 32})
    assert [s[:2] for s in seen] == [(i + 1, 12) for i in range(12)] and tuple(s[2] for s in seen) == model.warm_start.losses
    assert seen[-1][2] < seen[0][2] - 1 and model.warm_start.accuracy is None and not model.training


def test_held_out_questions_are_never_drawn(task):
    held = {p[0]["content"] for p in task.test["prompt"]}
    drawn = []

    def draw(chance):
        e = task.warm_start.draw(chance)
        if chance.random() < 0.5: e = e._replace(question=next(iter(held)))
        return e
    tokenizer = tiny.make_tokenizer(["Sort the digits: 1"])
    drawn = tiny._example_rows(tasks.WarmStart(draw, 1), random.Random(0), held, 40, tokenizer)
    assert len(drawn) == 40 and not held & {tokenizer.decode(q).split("\n")[1].removesuffix("<|im_end|>") for q, _ in drawn}


def test_works_where_gradients_are_off(task):
    with torch.no_grad(): model, _ = tiny.tiny_model(task, steps=1, **SMALL)
    assert model.warm_start.steps == 1


@pytest.mark.parametrize("call, error, words", [
    (lambda t: tiny.tiny_model("sort_digits"), TypeError, "tasks.get"),
    (lambda t: tiny.tiny_model(t, hiden_size=64), TypeError, "Did you mean 'hidden_size'"),
    (lambda t: tiny.tiny_model(t, hidden_size=100), ValueError, "hidden_size=100"),
    (lambda t: tiny.tiny_model(t, layers=0), ValueError, "layers=0"),
    (lambda t: tiny.tiny_model(t, vocab_size=10), ValueError, "vocab_size=10"),
    (lambda t: tiny.tiny_model(t, steps=-1), ValueError, "steps=-1"),
    (lambda t: tiny.tiny_model(t, batch_size=0), ValueError, "batch_size=0"),
    (lambda t: tiny.tiny_model(tasks.get("countdown", n_train=4, n_test=4)), ValueError, "'countdown'"),
    (lambda t: tiny.tiny_model(t, __file__), NotADirectoryError, "path="),
])
def test_bad_input(task, call, error, words):
    with pytest.raises(error, match=words): call(task)


# --- accuracy


@pytest.mark.parametrize("completion, text", [
    ("a ", "a"), ([{"role": "assistant", "content": "a"}], "a"), ([], ""), ([{"role": "assistant", "content": None}], ""),
    ("<think>b</think>a", "a"), ("x <answer> a </answer> y", "a"),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}, {"role": "tool", "content": "a"}], ""), # cut off behind a call
    ([{"role": "tool", "content": "b"}, {"role": "assistant", "content": "a"}], "a"),
])
def test_final_text(completion, text): assert final_text(completion) == text


def test_accuracy_leaves_everything_as_it_was(task, made):
    model, tokenizer = made
    model.train()
    model.model.layers[0].eval()
    tokenizer.padding_side, model.config.use_cache = "right", False
    modes, config, generation = [m.training for m in model.modules()], model.config.to_dict(), model.generation_config.to_dict()
    backend, state = tokenizer.backend_tokenizer.to_str(), torch.random.get_rng_state()
    share, texts = accuracy(model, tokenizer, task.test, task.reward, 5, return_completions=True)
    assert 0 <= share <= 1 and len(texts) == 24
    assert modes == [m.training for m in model.modules()] and config == model.config.to_dict()
    assert generation == model.generation_config.to_dict() and tokenizer.padding_side == "right"
    assert backend == tokenizer.backend_tokenizer.to_str() and torch.equal(state, torch.random.get_rng_state())
    model.config.use_cache = True
    model.eval()
    tokenizer.padding_side = "left"


def test_mode_comes_back_after_an_error(made):
    made[0].train()
    with pytest.raises(KeyError), evaluation_mode(made[0]): raise KeyError
    assert all(m.training for m in made[0].modules())


def test_batch_size_and_prompt_length_do_not_matter(task, made):
    prompts = [*task.test["prompt"][:5], [{"role": "user", "content": "A much longer question about 1 2 3"}], "plain"]
    assert greedy(*made, prompts, 6, batch_size=1) == greedy(*made, prompts, 6, batch_size=7)


def test_reward_none_is_left_out(task, made):
    def reward(completions, **columns): return [None, *[1.0] * 11, *[0.5] * 12]
    assert accuracy(*made, task.test, reward, 2) == 11 / 23


def test_accuracy_passes_the_columns(made):
    task = tasks.get("countdown", n_train=4, n_test=3)

    def reward(prompts, completions, answer, numbers, target, **rest):
        assert set(rest) == {"trainer_state", "log_extra", "log_metric"}
        assert isinstance(completions[0], list) and prompts[0][0]["role"] == "user"
        return [1.0] * len(target)
    assert accuracy(*made, task.test, reward, 2) == 1.0


@pytest.mark.parametrize("change, words", [
    (dict(dataset=lambda t: t.test.rename_column("prompt", "prompts")), "Did you mean 'prompts'"),
    (dict(dataset=lambda t: t.test.select([])), "empty"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(batch_size=1.5), "batch_size=1.5"),
    (dict(reward=lambda completions, **k: [1.0]), "1 values for 24"),
])
def test_accuracy_bad_input(task, made, change, words):
    change = {"dataset": lambda t: t.test, "max_new_tokens": 2, **change}
    with pytest.raises(ValueError, match=words): accuracy(*made, change.pop("dataset")(task), **change)


def test_accuracy_without_template(task, made):
    import copy
    tokenizer = copy.deepcopy(made[1])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"): accuracy(made[0], tokenizer, task.test)


def test_exact_answer_needs_as_many_answers():
    with pytest.raises(ValueError): exact_answer(["1"], ["1", "2"])


# --- the warm start in full


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sort_digits", "reverse_string", "add_numbers", "count_letters"])
def test_warm_start_is_right_about_a_third_of_the_time(name):
    model, _ = tasks.tiny_model(tasks.get(name))
    assert 0.2 < model.warm_start.accuracy < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns_from_there(tmp_path, seed):
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    task = tasks.get("sort_digits", seed=seed)
    model, tokenizer = tasks.tiny_model(task, seed=seed)
    assert 0.25 <= model.warm_start.accuracy <= 0.45
    config = GRPOConfig(output_dir=str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=64, num_generations=8, beta=0.0,
                        loss_type="dapo", temperature=1.0, warmup_steps=5, max_completion_length=8, bf16=False, use_cpu=True,
                        gradient_checkpointing=False, max_steps=100, report_to=[], save_strategy="no", disable_tqdm=True, seed=seed)
    trainer = GRPOTrainer(model=model, reward_funcs=task.reward, args=config, train_dataset=task.train, processing_class=tokenizer,
                          peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    assert accuracy(trainer.model, tokenizer, task.test, task.reward, task.max_completion_length) >= 0.9
