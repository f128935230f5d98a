"""Rewards of a GRPO run; `trl grpo --config` imports them as grpo_rewards.NAME."""


def right(completions, answer, **columns):
    "1 where the model's own last word is the answer."
    return [float(c[-1]["role"] == "assistant" and (c[-1]["content"] or "").strip() == a) for c, a in zip(completions, answer)]
