"""One training step of stock TRL and of patched TRL for sft, reward, prm and xpo: the table of `benchmarks/preference.py`.

    python benchmarks/supervised.py
    PYTHONPATH=path/to/another/trl python benchmarks/supervised.py --algorithm reward prm --json

sft and prm have rows without a common prompt, between a few tokens and the longest of the shape; half of a row is learned, and prm
has a label every 32 tokens of that half. reward and xpo have the pairs of `preference.rows`.
"""
import sys

import preference
import torch
from preference import SHAPE, Case, words

from grpo_nb.tasks.shapes import lengths, make_model
from grpo_nb.trainers import reward, sft, xpo


def ragged(ids, mask, answer): # the same, as (2n, T) rows of all lengths with prompts of their own
    g = torch.Generator().manual_seed(1)
    sizes = lengths(len(ids), (SHAPE.prompt + SHAPE.mean) // 2, ids.shape[1], 1)[:, None]
    at = torch.arange(ids.shape[1])
    mask = (at < sizes).long()
    return torch.randint(3, int(ids.max()) + 1, ids.shape, generator=g) * mask, mask, mask * (at >= sizes // 2)


def sft_batch(*parts):
    ids, mask, answer = ragged(*parts)
    return dict(input_ids=ids, attention_mask=mask, labels=torch.where(answer != 0, ids, -100))


def prm_batch(*parts):
    ids, mask, answer = ragged(*parts)
    ends = (answer != 0) & ((torch.arange(ids.shape[1]) % 32 == 31) | (answer.roll(-1, 1) == 0))
    return dict(input_ids=ids, attention_mask=mask, labels=torch.where(ends, ids % 2, -100))


def reward_batch(ids, mask, answer): return dict(input_ids=ids, attention_mask=mask)


def xpo_batch(ids, mask, answer):
    half = len(ids) // 2
    return dict(input_ids=ids[:half], attention_mask=mask[:half], ref_ids=ids[half:], ref_mask=mask[half:])


def xpo_loss(trainer, model, batch):
    "What XPO's training step does with completions once they are sampled."
    ours = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    theirs = dict(input_ids=batch["ref_ids"], attention_mask=batch["ref_mask"])
    chosen = torch.arange(len(batch["ref_ids"]), device=batch["ref_ids"].device) % 2 == 0
    return trainer._compute_losses(*trainer._compute_logprobs(model, ours, theirs, SHAPE.prompt), chosen)[0]


def head(auto:str, labels:int): # -> a function that makes a model with a small head
    def build(shape, device, dtype):
        import transformers
        config = make_model(shape, "meta", dtype).config
        config.num_labels = labels
        torch.manual_seed(0)
        return {"model": getattr(transformers, auto).from_config(config, dtype=dtype).to(device)}
    return build


def xpo_models(shape, device, dtype):
    judge = head("AutoModelForSequenceClassification", 1)(shape, device, dtype)["model"]
    return {"model": make_model(shape, device, dtype), "reward_funcs": judge, "reward_processing_classes": words()}


TRAINERS = "trl.trainer.{0}_trainer:{1}Trainer", "trl.trainer.{0}_config:{1}Config"
SOON = "trl.experimental.{0}.{0}_trainer:{1}Trainer", "trl.experimental.{0}.{0}_config:{1}Config"
def of(paths, *names): return [path.format(*names) for path in paths]
TEXT = [{"prompt": "<unk> ", "completion": "<unk>"}] * 2
PAIRS = [{"chosen_ids": [3, 1], "rejected_ids": [4, 1]}] * 2
STEPS = [{"input_ids": [3, 4], "labels": [-100, 1]}] * 2
CASES = {
    "sft": Case(*of(TRAINERS, "sft", "SFT"), TEXT, sft_batch, sft.patches),
    "reward": Case(
        *of(TRAINERS, "reward", "Reward"), PAIRS, reward_batch,
        lambda: reward.patches("reward"),
        build=head("AutoModelForSequenceClassification", 1),
    ),
    "prm": Case(
        *of(SOON, "prm", "PRM"), STEPS, prm_batch, lambda: reward.patches("prm"), build=head("AutoModelForTokenClassification", 2)
    ),
    "xpo": Case(
        *of(SOON, "xpo", "XPO"), [{"prompt": "<unk>"}] * 2, xpo_batch, xpo.patches, reference=True, build=xpo_models, loss=xpo_loss
    ),
}

if __name__ == "__main__":
    preference.CASES = CASES
    sys.exit(preference.main())
