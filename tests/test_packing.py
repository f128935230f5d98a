"""Packs hold every real completion token once, under the budget, whatever the rows look like."""
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from grpo_nb.packs.batch import RolloutBatch
from grpo_nb.packs.plan import filler, padded_length, plan

quick = settings(max_examples=60, deadline=None)


def padded(prompts, answers, holes=None, pad=0, left=True, extra=0):
    "A batch of lists of ids; `holes` are masks for the completions, `extra` columns of padding on either side."
    wide, long = max(map(len, prompts)) + extra, max(1, *map(len, answers)) + extra
    def front(x, fill): return [fill] * (wide - len(x)) + x if left else x + [fill] * (wide - len(x))
    def back(x, fill): return x + [fill] * (long - len(x))
    holes = holes or [[1] * len(a) for a in answers]
    return RolloutBatch(*[torch.tensor(x) for x in (
        [front(p, pad) for p in prompts], [front([1] * len(p), 0) for p in prompts],
        [back(a, pad) for a in answers], [back(h, 0) for h in holes])])


@st.composite
def batches(draw):
    "Prompts shared by 1 to 4 rows, completions of 0 to 9 tokens with the pad id and holes inside, rows shuffled."
    ids = st.integers(0, 5)
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4))
    rows = [p for p in prompts for _ in range(draw(st.integers(1, 4)))]
    rows = draw(st.permutations(rows))
    answers = [draw(st.lists(ids, max_size=9)) for _ in rows]
    holes = [
        draw(st.lists(st.integers(0, 1), min_size=len(a), max_size=len(a))) if draw(st.booleans()) else [1] * len(a)
        for a in answers
    ]
    return padded(rows, answers, holes, left=draw(st.booleans()), extra=draw(st.integers(0, 2)))


def unpack(pack):
    "Row: (prompt, completion), read from the pack's layout alone."
    ids, out = pack.input_ids[0].tolist(), {}
    prompts = {g: (a, b) for a, b, g, k, _ in pack.spans.tolist() if k == 0}
    bodies = [(a, b, g) for a, b, g, k, _ in pack.spans.tolist() if k > 0]
    for row, (a, b, g) in zip(pack.rows.tolist(), bodies):
        lo, hi = prompts[g]
        assert pack.position_ids[0, lo:hi].tolist() == list(range(hi - lo))
        assert pack.position_ids[0, a:b].tolist() == list(range(hi - lo, hi - lo + b - a))
        out[row] = ids[lo:hi], ids[a:b]
    return out


def truth(batch):
    "Row: (prompt, completion), by the masks."
    def real(ids, mask): return [i for i, m in zip(ids.tolist(), mask.tolist()) if m]
    rows = [
        (real(p, pm), real(c, cm))
        for p, pm, c, cm in zip(batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask)
    ]
    return {i: row for i, row in enumerate(rows) if row[1]}


options = st.fixed_dictionaries(dict(share_prompts=st.booleans(), multiple_of=st.sampled_from([1, 4, 128])))


@quick
@given(batches(), st.integers(1, 60), options)
def test_every_token_once_under_the_budget(batch, budget, how):
    made = plan(batch, budget, **how)
    packs, wanted, seen = made.packs(), truth(batch), {}
    for pack in packs:
        inside = unpack(pack)
        assert not set(inside) & set(seen)
        seen.update(inside)
        assert pack.n_real <= budget or len(pack.rows) == 1
        assert len(pack) == padded_length(pack.n_real, how["multiple_of"])
        assert (pack.group[pack.n_real:] == -1).all() and (pack.position_ids[0, pack.n_real:] == 0).all()
        assert torch.equal(pack.target, batch.completion_ids[pack.row, pack.column])
        assert batch.completion_mask[pack.row, pack.column].bool().all()
    assert seen == wanted
    places = Counter((r, c) for pack in packs for r, c in zip(pack.row.tolist(), pack.column.tolist()))
    assert set(places.values()) <= {1} and set(places) == {tuple(x) for x in batch.completion_mask.nonzero().tolist()}
    assert made.n_tokens == len(places) and made.n_useful <= made.n_positions and 0 <= made.efficiency <= 1


@quick
@given(batches(), st.integers(1, 60), options)
def test_a_target_is_predicted_by_the_token_before_it(batch, budget, how):
    for pack in plan(batch, budget, **how).packs():
        ids, position = pack.input_ids[0], pack.position_ids[0]
        rows = truth(batch)
        for m, (at, row) in enumerate(zip(pack.predict.tolist(), pack.row.tolist())):
            whole = [*rows[row][0], *rows[row][1]]
            p = int(position[at])
            assert p == len(rows[row][0]) + int(pack.rank[m]) - 1
            assert whole[p] == int(ids[at]) and whole[p + 1] == int(pack.target[m])


@quick
@given(batches(), st.integers(1, 8))
def test_a_number_of_packs(batch, n):
    made = plan(batch, None, n_packs=n, multiple_of=1)
    assert len(made) == min(n, len(truth(batch)))
    seen = {row: both for pack in made.packs() for row, both in unpack(pack).items()}
    assert seen == truth(batch)


@quick
@given(batches(), st.integers(1, 60), st.data())
def test_rows_left_out(batch, budget, data):
    keep = data.draw(st.lists(st.booleans(), min_size=batch.shape[0], max_size=batch.shape[0]))
    made = plan(batch, budget, keep_rows=torch.tensor(keep))
    assert made.rows == [row for row in truth(batch) if keep[row]]


@quick
@given(batches(), st.integers(1, 60))
def test_values_make_the_round_trip(batch, budget):
    out = torch.full(batch.completion_ids.shape, -1.)
    values = torch.rand(batch.completion_ids.shape, generator=torch.Generator().manual_seed(0))
    for pack in plan(batch, budget).packs():
        mine = pack.gather(values)
        rows, mask = pack.to_rows(mine, fill=7)
        assert torch.equal(pack.from_rows(rows), mine) and int(mask.sum()) == len(mine) and (rows[~mask] == 7).all()
        for i, row in enumerate(pack.rows.tolist()): # a row's values, in the order of its columns
            assert torch.equal(rows[i][mask[i]], values[row][batch.completion_mask[row].bool()])
        assert torch.equal(pack.gather(torch.arange(batch.shape[0])[:, None]), pack.row)
        out = pack.scatter(mine, out)
    real = batch.completion_mask.bool()
    assert torch.equal(out[real], values[real]) and (out[~real] == -1).all()


@quick
@given(batches(), st.integers(1, 60), st.randoms())
def test_the_order_of_rows_does_not_matter(batch, budget, random):
    order = list(range(batch.shape[0]))
    random.shuffle(order)
    mixed = RolloutBatch(
        *[getattr(batch, name)[order] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
    )
    one, other = plan(batch, budget, multiple_of=1), plan(mixed, budget, multiple_of=1)
    assert sorted(one.lengths) == sorted(other.lengths) and len(one.groups) == len(other.groups)


def test_groups_are_found_by_what_the_prompt_says():
    batch = padded([[1, 2], [3], [1, 2], [2]], [[5], [6], [7], [8]])
    assert [g.rows for g in plan(batch).groups] == [(0, 2), (1,), (3,)]
    assert [g.rows for g in plan(batch, share_prompts=False).groups] == [(0,), (1,), (2,), (3,)]
    same_ids = RolloutBatch(
        torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 1).long(), torch.ones(2, 1)
    )
    assert len(plan(same_ids).groups) == 2 # the same ids with another mask are another prompt


def test_large_groups_are_cut_and_repeat_the_prompt():
    batch = padded([[1] * 10] * 8, [[2] * 5] * 8)
    made = plan(batch, 30, multiple_of=1)
    assert made.lengths == [30, 30] and [len(p.parts) if hasattr(p, "parts") else len(p) for p in made.parts] == [1, 1]
    assert plan(batch, 12, multiple_of=1).lengths == [15] * 8 # smaller than any row: one row a pack, longer than asked
    assert made.n_useful == 50 and made.n_positions == 60


def test_n_packs_is_balanced():
    batch = padded([[i] * 20 for i in range(1, 5) for _ in range(4)], [[7] * 10] * 16)
    sizes = plan(batch, None, n_packs=2, multiple_of=1).lengths
    assert sizes == [120, 120]
    assert max(plan(batch, None, n_packs=3, multiple_of=1).lengths) <= 110


def test_allowed_lengths():
    batch = padded([[1] * 10] * 8, [[2] * 5] * 8)
    assert plan(batch, 30, lengths=[16, 64]).lengths == [64, 64]
    assert plan(batch, 30, lengths=[16]).lengths == [128, 128]


def test_nothing_to_lay_out():
    batch = padded([[1], [2]], [[], []])
    made = plan(batch)
    assert len(made) == 0 and made.packs() == [] and made.efficiency == 0 and "0 packs" in repr(made)
    assert plan(batch, n_packs=3).packs() == [] and made.to_svg().startswith("<svg")
    assert filler(64).mask.shape == (0, 0) and len(filler(64)) == 64


def test_a_completion_without_a_prompt():
    batch = RolloutBatch(
        torch.ones(3, 2).long(), torch.tensor([[1, 1], [0, 0], [0, 0]]), torch.ones(3, 1).long(), torch.tensor([[1], [0], [1]])
    )
    with pytest.raises(ValueError, match="Row 2 has a completion of 1 tokens and an empty prompt"): plan(batch)
    assert plan(batch, keep_rows=torch.tensor([True, True, False])).rows == [0]


@pytest.mark.parametrize("arguments", [
    dict(max_tokens_per_pack=0),
    dict(max_tokens_per_pack=1.5),
    dict(n_packs=0),
    dict(multiple_of=0),
    dict(max_tokens_per_pack=None),
    dict(keep_rows=[True]),
])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))): plan(padded([[1], [2]], [[1], [2]]), **arguments)


def test_the_picture_is_well_formed():
    from xml.dom.minidom import parseString
    drawn = plan(padded([[1] * 9, [2] * 4, [1] * 9], [[3] * 5, [4] * 2, [5] * 7]), 16).to_svg()
    assert parseString(drawn).documentElement.tagName == "svg" and "useful" in drawn


@pytest.mark.parametrize(
    "change", [dict(prompt_mask=torch.ones(2, 3)), dict(completion_ids=torch.ones(3, 2)), dict(prompt_ids=[1])]
)
def test_shapes_are_checked(change):
    good = dict(
        prompt_ids=torch.ones(2, 2), prompt_mask=torch.ones(2, 2), completion_ids=torch.ones(2, 2), completion_mask=torch.ones(2, 2)
    )
    with pytest.raises(ValueError, match=next(iter(change))): RolloutBatch(**good | change)


def test_missing_inputs_are_named():
    with pytest.raises(KeyError, match="completion_mask"):
        RolloutBatch.from_inputs(dict(prompt_ids=1, prompt_mask=1, completion_ids=1))
