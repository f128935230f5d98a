"""Rewards of a GRPO run; `trl grpo --config` imports them as grpo_rewards.NAME."""


def won(environments, **columns):
    "1 for a game that was won."
    return [float(game.won) for game in environments]
