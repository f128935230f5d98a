"""The objectives by themselves: what always holds."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grpo_nb.algo.advantage import SCALES, combine_rewards, group_advantage, leave_one_out, normalize_then_sum
from grpo_nb.algo.aggregate import AGGREGATES, Denominators, aggregate
from grpo_nb.algo.kl import ESTIMATORS, kl
from grpo_nb.algo.loss import POLICY_TERMS, LossInputs, LossSettings, entropy_bonus, policy_loss
from grpo_nb.algo.ratio import LEVELS, SAMPLING_MODES, log_ratio, off_policy_mask, sampling_correction

value = st.floats(-5, 5, allow_nan=False, width=32)
rewards = st.integers(1, 4).flatmap(lambda n: st.lists(value, min_size=4 * n, max_size=4 * n))


@given(rewards, st.sampled_from(SCALES))
@settings(max_examples=60, deadline=None)
def test_advantages_sum_to_zero_in_each_group(numbers, scale):
    a = group_advantage(torch.tensor(numbers, dtype=torch.float64), 4, scale).view(-1, 4)
    assert (a.sum(1).abs() <= 1e-9 * a.abs().sum(1).clamp(min=1)).all()


@given(value, st.integers(2, 9), st.sampled_from(SCALES))
@settings(max_examples=60, deadline=None)
def test_equal_rewards_have_no_advantage(reward, n, scale):
    r = torch.full((n,), reward)
    assert (group_advantage(r, n, scale) == 0).all() and (leave_one_out(r, n) == 0).all()


def test_advantages_equal_trl(tmp_path):
    "TRL's own lines, on rewards with spread."
    from trl.trainer.utils import nanstd

    r = torch.randn(24, generator=torch.Generator().manual_seed(0))
    grouped = r.view(-1, 4)
    theirs = ((grouped - grouped.mean(1, keepdim=True)) / (nanstd(grouped, dim=1).view(-1, 1) + 1e-4)).flatten()
    assert torch.allclose(group_advantage(r, 4), theirs, atol=1e-6)


def test_unscorable_rewards():
    nan = float("nan")
    r = torch.tensor([0.0, 1.0, nan, 1.0, nan, nan, nan, nan])
    for scale in SCALES:
        assert torch.isfinite(group_advantage(r, 4, scale)).all() and (group_advantage(r, 4, scale)[[2, 4, 5, 6, 7]] == 0).all()
    assert torch.isfinite(leave_one_out(r, 4)).all()
    both = torch.stack([r, torch.full((8,), nan)], 1)
    assert torch.equal(combine_rewards(both, torch.ones(2)).isnan(), r.isnan())
    assert torch.isfinite(normalize_then_sum(both, torch.ones(2), 4)).all()


@pytest.mark.parametrize("call", [
    lambda: group_advantage(torch.zeros(5), 2),
    lambda: group_advantage(torch.zeros(4), 2, "groups"),
    lambda: log_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "tokens"),
    lambda: kl(torch.zeros(1), torch.zeros(1), "k4"),
    lambda: aggregate("gpro", torch.zeros(1, 1), torch.ones(1, 1), None),
    lambda: sampling_correction(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "token"),
])
def test_bad_input_names_what_would_be_right(call):
    with pytest.raises(ValueError): call()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_on_policy(seed):
    "Right after sampling the ratio is exactly 1, and k3 of a policy with itself is exactly 0."
    g = torch.Generator().manual_seed(seed)
    logps, mask = -torch.rand(3, 5, generator=g) * 9, (torch.rand(3, 5, generator=g) > 0.3).float()
    for level in LEVELS:
        old = (logps * mask).sum(1, keepdim=True) if level == "sequence_sum" else logps
        assert (log_ratio(logps, old, mask, level).exp() == 1).all()
    other = -torch.rand(3, 5, generator=g) * 9
    assert (kl(logps, other) >= 0).all() and (kl(logps, logps) == 0).all() and (kl(logps, other, "k2") >= 0).all()
    for mode in SAMPLING_MODES: assert (sampling_correction(logps, logps, mask, mode, 0.5, 2.0) == 1).all()
    assert (off_policy_mask(torch.full((3, 1), -1.0), logps, logps, mask, 0.0) == 1).all()


def test_long_sums_cancel():
    "RLOO's ratio of a thousand tokens is exact where fp32 holds the old sum, near 9,000, where numbers lie 1e-3 apart."
    g = torch.Generator().manual_seed(3)
    logps, mask = -torch.rand(4, 1024, generator=g) * 18, torch.ones(4, 1024)
    offset = torch.tensor([[-0.125], [0.0], [0.0625], [0.125]]) # which such sums hold exactly
    ratio = log_ratio(logps, (logps * mask).sum(1, keepdim=True) + offset, mask, "sequence_sum").exp()
    assert torch.allclose(ratio, (-offset).exp(), rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match="sequence's sum"): log_ratio(logps, logps, mask, "sequence_sum")


def inputs_for(loss_type, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    def draw(*shape): return torch.randn(*shape, generator=g, dtype=dtype)
    logps = -draw(4, 6).abs()
    def near(): return logps + 0.1 * draw(4, 6)
    mask = torch.ones(4, 6, dtype=dtype)
    mask[1, 3:], mask[3] = 0, 0
    settings = LossSettings(
        loss_type=loss_type, beta=0.04, delta=1.5, off_policy_mask_threshold=2.0, epsilon_high=2.0 if loss_type == "cispo" else 0.2
    )
    advantages, old = draw(4, 1), near()
    if loss_type == "rloo": old = (old * mask).sum(1, keepdim=True)
    return LossInputs(logps.requires_grad_(), mask, advantages, old, near(), near(), entropies=draw(4, 6).abs()), settings


DENOMINATORS = Denominators(rows=4, tokens=9.0, max_completion_length=6, items=20.0, accumulation=2.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", POLICY_TERMS)
def test_gradients_agree_with_finite_differences(loss_type, level):
    given_, s = inputs_for(loss_type)
    if loss_type in ("cispo", "vespo"): # their weights are detached: compare with the weights held fixed is what the term means
        pytest.skip("the weight of this objective is detached by definition")
    from dataclasses import replace

    s = replace(s, importance_sampling_level=level, off_policy_mask_threshold=None)
    def f(logps): return policy_loss(replace(given_, logps=logps), s, DENOMINATORS)[0]
    assert torch.autograd.gradcheck(f, (given_.logps.detach().clone().requires_grad_(),), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("loss_type", POLICY_TERMS)
def test_masked_positions_have_no_say(loss_type):
    from dataclasses import replace

    given_, s = inputs_for(loss_type)
    loss, _ = policy_loss(given_, s, DENOMINATORS)
    grad, = torch.autograd.grad(loss, given_.logps)
    assert torch.isfinite(loss) and (grad[given_.mask == 0] == 0).all()
    changed = torch.where(given_.mask == 0, given_.logps.detach() - 3, given_.logps.detach()).requires_grad_()
    same, _ = policy_loss(replace(given_, logps=changed), s, DENOMINATORS)
    assert torch.isclose(loss, same)


@pytest.mark.parametrize("loss_type", POLICY_TERMS)
def test_packs_sum_to_the_batch(loss_type):
    "Loss and metrics of the rows in any two parts."
    from dataclasses import fields, replace

    given_, s = inputs_for(loss_type)
    whole, stats = policy_loss(given_, s, DENOMINATORS)
    def cut(rows): return replace(given_, **{f.name: v[rows] for f in fields(given_) if (v := getattr(given_, f.name)) is not None})
    parts = [policy_loss(cut(rows), s, DENOMINATORS) for rows in ([0, 3], [2, 1])]
    assert torch.isclose(sum(loss for loss, _ in parts), whole)
    for name in stats: assert torch.isclose((parts[0][1][name] + parts[1][1][name]).mean(), stats[name].mean())


def test_table_is_whole():
    assert set(POLICY_TERMS) == set(AGGREGATES) and set(ESTIMATORS) == {"k1", "k2", "k3"}
    assert entropy_bonus(torch.full((2, 3), 0.5), torch.ones(2, 3), 6.0, 2.0) == 0.25
