"""Groups that teach: resample= and curriculum= of GRPOConfig, exact, resumable, in several processes, refused where they fail."""
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo_nb import PatchFastRL
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.trainers import resample
from grpo_nb.trainers.curriculum import Curriculum, PassRates, Pool, key_of
from torchrun import in_two_processes

TASK = get("sort_digits", n_train=48, n_test=8)
SMALL = dict(steps=0, hidden_size=64, layers=1)


@pytest.fixture(autouse=True, scope="module")
def patched(): PatchFastRL("grpo")


def rare(completions, **kwargs):
    "Half of the groups of four have a spread."
    return [float(sum(map(ord, c[-1]["content"])) % 6 == 0) for c in completions]


GIVEN = dict(max_steps=2, per_device_train_batch_size=16, num_generations=4, max_completion_length=3, learning_rate=0.1,
             optim="sgd", report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False, max_grad_norm=0.0,
             disable_tqdm=True, use_cpu=True, self_check=False)


def config(folder, **more):
    return GRPOConfig(output_dir=str(folder), **GIVEN | more)


def trainer_of(folder, rows=TASK.train, reward=rare, kind=GRPOTrainer, more=None, **settings):
    model, tokenizer = tiny_model(TASK, **SMALL)
    return kind(model=model, processing_class=tokenizer, reward_funcs=reward, args=config(folder, **settings), train_dataset=rows,
                **(more or {}))


def weights(trainer): return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


class Replayed(GRPOTrainer):
    "Samples what was noted before."
    noted = ()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        rows = next(self.noted)
        return [list(row["sampled"][0]) for row in rows], None


@pytest.mark.parametrize("settings", [
    dict(engine="inplace"), dict(engine="hf", beta=0.1), dict(engine="inplace", gradient_accumulation_steps=2, loss_type="grpo"),
    dict(engine="hf", steps_per_generation=2, num_iterations=2, max_steps=4, per_device_train_batch_size=8),
    dict(engine="inplace", scale_rewards="batch", loss_type="dr_grpo")], ids=str)
def test_the_gradient_is_that_of_a_batch_of_the_kept_groups(settings, tmp_path, monkeypatch):
    "Weights after some steps of SGD equal those of a plain trainer whose data set is the prompts that were kept, in their order."
    batches, chosen = [], resample.Batch.chosen
    def noting(self):
        batches.append(chosen(self))
        return batches[-1]
    monkeypatch.setattr(resample.Batch, "chosen", noting)
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda rows: rows) # its order follows random numbers
    more = {}
    if settings.get("beta"):
        from peft import LoraConfig
        more = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    mine = trainer_of(tmp_path / "a", resample="zero_spread", resample_limit=6, more=more, **settings)
    start = weights(mine)
    mine.train()
    assert all(group.spread for batch in batches for group in batch) and any(group.extra for batch in batches for group in batch)

    rows = Dataset.from_list([group.rows[0]["row"] for batch in batches for group in batch])
    torch.manual_seed(0)
    plain = trainer_of(tmp_path / "b", rows=rows, kind=Replayed, more=more, **{**settings, "engine": "hf"}, shuffle_dataset=False)
    with torch.no_grad():
        for name, p in plain.model.named_parameters(): p.copy_(start[name])
    plain.noted = iter([[row for group in batch for row in group.rows] for batch in batches])
    plain.train()
    moved = max((a - start[n]).abs().max().item() for n, a in weights(mine).items())
    assert moved > 1e-4
    for name, p in weights(plain).items(): torch.testing.assert_close(p, weights(mine)[name], atol=1e-5, rtol=1e-5)


def test_the_cost_is_logged_and_the_limit_holds(tmp_path):
    never = trainer_of(tmp_path / "never", reward=lambda completions, **kw: [0.0] * len(completions), resample="zero_spread",
                       resample_limit=2, max_steps=1)
    never.train()
    log = next(log for log in never.state.log_history if "reward" in log)
    assert (log["resample/rounds"], log["resample/extra"], log["resample/kept"], log["frac_reward_zero_std"]) == (2, 32, 0, 1)
    assert log["resample/seconds"] > 0 and log["num_tokens"] > 3 * 16
    few = trainer_of(tmp_path / "few", rows=TASK.train.select(range(5)), reward=lambda completions, **kw: [0.0] * len(completions),
                     resample="zero_spread", resample_limit=9, max_steps=1)
    few.train() # one prompt is left after the batch: it is asked, and that is all
    log = next(log for log in few.state.log_history if "reward" in log)
    assert log["resample/extra"] == 4
    off = trainer_of(tmp_path / "off", max_steps=1)
    off.train()
    assert not [name for log in off.state.log_history for name in log if name.startswith(("resample", "curriculum"))]


def test_what_rewards_log_stays_with_its_completion(tmp_path):
    "The extra columns of TRL's table are those of the rows that are trained on."
    def noting(completions, log_extra, log_metric, **kwargs):
        log_extra("text", [c[-1]["content"] for c in completions])
        log_metric("judged", len(completions))
        return rare(completions)
    mine = trainer_of(tmp_path, reward=noting, resample="zero_spread", max_steps=1)
    mine.train()
    assert [c[-1]["content"] for c in mine._logs["completion"]] == list(mine._logs["extra"]["text"])


@pytest.mark.parametrize("more", [dict(resample="zero_spread"), dict(curriculum="pass_rate", resample="zero_spread"),
                                  dict(curriculum="pass_rate", curriculum_column="level", gradient_accumulation_steps=2)], ids=str)
def test_a_run_that_goes_on_equals_one_that_never_stopped(more, tmp_path):
    rows = TASK.train.add_column("level", [i % 3 for i in range(len(TASK.train))])
    def run(folder, **settings):
        model, tokenizer = tiny_model(TASK, **SMALL)
        # one schedule for both: the number of steps is in it
        return GRPORun(model, tokenizer, rare, rows, config(folder, max_steps=4, save_strategy="steps", save_steps=2,
                                                                    lr_scheduler_type="constant", **more, **settings))
    whole = run(tmp_path / "a").start()
    part = run(tmp_path / "b")
    part.events.subscribe(lambda e: part.stop() if e.step == 2 and part._stop is None else None)
    part.start()
    assert part.state == "stopped" and part.step == 2
    again = run(tmp_path / "b").start(resume=True)
    assert again.state == "finished"
    for name, p in weights(whole.trainer).items(): torch.testing.assert_close(p, weights(again.trainer)[name], atol=0, rtol=0)
    drawn = [[(row["key"], row["passed"], row["extra"], row["step"]) for row in r.record.prompts] for r in (whole, again)]
    assert drawn[0] == drawn[1] and drawn[0]
    assert whole.record.pass_rates == again.record.pass_rates
    if "curriculum" in more:
        rates = [resample.teaching_of(r.trainer).curriculum.rates.found for r in (whole, again)]
        assert rates[0] == rates[1]


def test_a_curriculum_asks_what_is_passed_sometimes_and_nothing_that_is_held_out(tmp_path):
    rows = Dataset.from_list([dict(prompt=[dict(role="user", content=f"sort {i}")], level=i % 2) for i in range(24)])
    def hard(completions, level, **kwargs): return [0.0 if l else float(i % 2) for i, l in enumerate(level)]
    mine = trainer_of(tmp_path, rows=rows, reward=hard, curriculum="pass_rate", curriculum_column="level", max_steps=12,
                      logging_steps=1,
                      more=dict(eval_dataset=rows.select([0, 1])))
    mine.train()
    asked = [row["key"] for row in resample.teaching_of(mine).drawn]
    assert asked[8:].count("0") > 3 * asked[8:].count("1"), asked
    out = {key_of(rows[i]) for i in (0, 1)}
    pool = resample.pool_of(mine)
    assert len(pool) == 22 and not out & {key_of(rows[i]) for seed in range(50) for i in pool.draw(9, seed)}
    log = [log for log in mine.state.log_history if "curriculum/pass_rate" in log]
    assert len(log) == 12 and log[-1]["curriculum/seen"] == 1 and 0 < log[-1]["curriculum/pass_rate"] <= 0.5


def test_the_draw_follows_the_seed():
    rows = Dataset.from_list([dict(prompt=str(i)) for i in range(30)])
    pool, rates = Pool(rows), PassRates({key_of(dict(prompt="3")): [8, 8]})
    assert pool.draw(5, (1, 2)) == pool.draw(5, (1, 2)) != pool.draw(5, (1, 3))
    assert len(set(pool.draw(99, 0))) == 30 and 7 not in pool.draw(99, 0, without=[7])
    often = sum(3 in pool.draw(5, seed, rates, 0.1, 0.9) for seed in range(300))
    assert often < 10 < sum(3 in pool.draw(5, seed) for seed in range(300))


def test_rates_are_in_the_checkpoint_and_nowhere_else_needed(tmp_path):
    mine = trainer_of(tmp_path, curriculum="pass_rate", save_strategy="steps", save_steps=1)
    mine.train()
    kept = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["stateful_callbacks"]["Curriculum"]
    fresh = Curriculum()
    fresh.on_train_begin(None, SimpleNamespace(stateful_callbacks={"Curriculum": kept}), None)
    assert len(fresh.rates) == 4 and len(resample.teaching_of(mine).curriculum.rates) == 8


WRONG = [
    (dict(resample="zero"), {}, "resample='zero'"), (dict(resample=True), {}, "resample=True"),
    (dict(resample="zero_spread", resample_limit=0), {}, "resample_limit=0"),
    (dict(curriculum="easy_first"), {}, "curriculum='easy_first'"),
    (dict(curriculum="pass_rate", curriculum_low=1.5), {}, "curriculum_low=1.5"),
    (dict(curriculum="pass_rate", curriculum_low=0.9, curriculum_high=0.2), {}, "must be below curriculum_high"),
    (dict(curriculum="pass_rate", curriculum_pass="1"), {}, "without the quotes"),
    (dict(curriculum_high=0.5), {}, "needs curriculum='pass_rate'"),
    (dict(curriculum="pass_rate", curriculum_column="levle"), {}, "'levle'"),
    (dict(curriculum="pass_rate", curriculum_column=" "), {}, "curriculum_column"),
    (dict(resample="zero_spread"), dict(rows=TASK.train.to_iterable_dataset()), "stream"),
    (dict(resample="zero_spread"), dict(rows=TASK.train.add_column("image", [None] * len(TASK.train))), "'image'"),
    (dict(resample="zero_spread"), dict(more=dict(rollout_func=lambda prompts, trainer: {})), "rollout_func"),
    (dict(resample="zero_spread"), dict(kind=type("Mine", (GRPOTrainer,), dict(_prepare_inputs=lambda self, x: x))),
     "Mine has its own"),
]


@pytest.mark.parametrize("settings, more, words", WRONG, ids=[w[2] for w in WRONG])
def test_what_cannot_be_is_one_sentence(settings, more, words, tmp_path):
    with pytest.raises(ValueError) as error: trainer_of(tmp_path, **settings, **more)
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_other_trainers_refuse(tmp_path):
    from trl import RLOOConfig
    PatchFastRL("rloo")
    with pytest.raises(TypeError, match="resample"): RLOOConfig(output_dir=str(tmp_path), resample="zero_spread")


@pytest.mark.slow
def test_with_several_processes(tmp_path): # groups stand in two processes: 12 rows each, 8 completions of a prompt
    in_two_processes("teaching_script.py", tmp_path)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert a == b
    logs = json.loads((tmp_path / "logs.json").read_text())
    assert all(flat == 0 for flat, _ in logs) and len(logs) == 2 and sum(extra for _, extra in logs) > 0
