"""What every sampler that balances groups must do. The rows are in loss_cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conformance.loss_cases import SAMPLERS

every_sampler = pytest.mark.parametrize("case", SAMPLERS, ids=str)
GROUPS = torch.tensor([0] * 50 + [1] * 30 + [2] * 15 + [3] * 5)[
    torch.randperm(100, generator=torch.Generator().manual_seed(1))
]


def shares(groups, indices):
    return torch.bincount(groups[indices], minlength=4).double() / len(indices)


@every_sampler
def test_indices_and_len(case):
    sampler = case(GROUPS)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == (20 if case.distinct else 100)
    assert all(type(index) is int for index in drawn)
    assert set(drawn) <= set(range(100))
    assert (len(set(drawn)) == len(drawn)) or not case.distinct
    assert len(list(case(GROUPS, num_samples=12))) == 12


@every_sampler
def test_coverage(case):
    sampler = case(GROUPS)
    seen = {index for _ in range(60) for index in sampler}
    assert len(seen) >= 98


@every_sampler
def test_balance(case):
    sampler = case(GROUPS)
    drawn = torch.tensor([index for _ in range(100) for index in sampler])
    deviation = (0.1875 / len(drawn)) ** 0.5
    assert (shares(GROUPS, drawn) - 0.25).abs().max() < (1e-12 if case.exact else 4 * deviation)


@every_sampler
def test_members_of_a_group_are_alike(case):
    sampler = case(GROUPS)
    drawn = torch.bincount(torch.tensor([index for _ in range(200) for index in sampler]), minlength=100).double()
    for g in range(4):
        count = drawn[g == GROUPS]
        statistic = ((count - count.mean()).square() / count.mean()).sum()  # chi-squared, if draws were independent
        degrees = len(count) - 1
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5
    assert (drawn[GROUPS == 3].mean() / drawn[GROUPS == 0].mean()).item() == pytest.approx(10, rel=0.1)


@every_sampler
def test_windows(case):
    if not (case.exact and case.settings.get("stratified")):
        pytest.skip("only stratified draws are balanced in every window")
    drawn = torch.tensor(list(case(GROUPS)))
    for window in drawn.split(8):
        if len(window) == 8:
            assert torch.bincount(GROUPS[window], minlength=4).tolist() == [2, 2, 2, 2]


@every_sampler
def test_an_epoch_is_the_same_everywhere(case):
    first, second = case(GROUPS, seed=3), case(GROUPS, seed=3)
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(second) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(case(GROUPS, seed=4)) != epochs[0]
    second.set_epoch(1)
    assert list(second) == epochs[1]
    assert list(second) == epochs[2]
    for value in (-1, 0.5):
        with pytest.raises(ValueError, match="expected a non-negative integer"):
            second.set_epoch(value)


@every_sampler
def test_a_broken_pass_does_not_shorten_the_next(case):
    sampler = case(GROUPS)
    epochs = [list(case(GROUPS)) for _ in range(1)]
    other = case(GROUPS)
    list(other)
    epochs.append(list(other))
    for _, _ in zip(sampler, range(5), strict=False):
        pass
    assert list(sampler) == epochs[1]


@every_sampler
def test_resumes_in_the_middle(case):
    sampler = case(GROUPS)
    list(sampler)
    passing = iter(sampler)
    head = [next(passing) for _ in range(7)]
    held = pickle.loads(pickle.dumps(sampler.state_dict()))
    assert held == {"epoch": 1, "position": 7}
    rest = list(passing)
    again = case(GROUPS)
    again.load_state_dict(held)
    assert again.state_dict() == held
    assert list(again) == rest
    assert again.state_dict() == sampler.state_dict() == {"epoch": 2, "position": 0}
    assert list(again) == list(sampler)
    whole = case(GROUPS)
    whole.set_epoch(1)
    assert list(whole) == head + rest
    with pytest.raises(ValueError, match="position=999, expected 0 to"):
        again.load_state_dict({"epoch": 0, "position": 999})


@every_sampler
def test_processes(case):
    ranks = [case(GROUPS, num_replicas=3, rank=rank) for rank in range(3)]
    for _ in range(2):
        drawn = [list(sampler) for sampler in ranks]
        assert {len(one) for one in drawn} == {len(sampler) for sampler in ranks} == {7 if case.distinct else 34}
        together = [index for turn in zip(*drawn, strict=True) for index in turn]
        if case.distinct:
            assert len(set(together)) == 20 and together[20:] == together[:1]
        assert all(one != drawn[0] for one in drawn[1:])
    if case.distinct:
        alone = case(GROUPS)
        list(alone)
        assert list(alone) == together[:20]
    elif case.exact:
        for one in drawn:
            counts = torch.bincount(GROUPS[one], minlength=4)
            assert counts.max() - counts.min() <= 1  # on every process


@every_sampler
def test_generator(case):
    drawn = [list(case(GROUPS, generator=torch.Generator().manual_seed(5))) for _ in range(2)]
    assert drawn[0] == drawn[1]
    sampler = case(GROUPS, generator=torch.Generator().manual_seed(5))
    assert list(sampler) == drawn[0] != list(sampler)
    with pytest.raises(ValueError, match="cannot resume in an epoch"):
        sampler.load_state_dict({"epoch": 0, "position": 3})


@every_sampler
def test_leaves_the_global_generator(case):
    before = torch.get_rng_state()
    list(case(GROUPS))
    assert torch.equal(torch.get_rng_state(), before)


@every_sampler
def test_in_a_loader(case):
    data = TensorDataset(torch.arange(100.0), GROUPS)
    loader = DataLoader(data, batch_size=4, sampler=case(GROUPS))
    batches = list(loader)
    assert len(batches) == len(loader) == (5 if case.distinct else 25)
    x, groups = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(GROUPS[x.long()], groups)


@every_sampler
def test_ids_of_any_kind(case):
    names = torch.tensor([7, -3, 1000, 12])
    plain, named = case(GROUPS), case(names[GROUPS].int())
    assert torch.equal(
        GROUPS[list(plain)].bincount(minlength=4).sort().values, GROUPS[list(named)].bincount(minlength=4).sort().values
    ) or not case.exact  # fmt: skip
    assert list(case(GROUPS.tolist())) == list(case(GROUPS))
    one = case([5] * 6)
    assert sorted(one) == list(range(6)) or not case.distinct
    assert set(case([0, 0, 0, 1], num_samples=2)) <= {0, 1, 2, 3}


@every_sampler
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(case, how):
    sampler = case(GROUPS)
    list(sampler)
    again = copy.deepcopy(sampler) if how == "deepcopy" else pickle.loads(pickle.dumps(sampler))
    assert list(again) == list(sampler)


@every_sampler
def test_refuses(case):
    for settings, message in case.refuses:
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            case(**{"groups": GROUPS, **settings})


@every_sampler
def test_repr(case):
    shown = repr(case(GROUPS))
    assert "100 samples in 4 groups" in shown
    assert f"replacement={not case.distinct}" in shown
