"""Coloured digits: who has which colour, and nothing else."""

from __future__ import annotations

import pytest
import torch

from evenly.data import coloured_digits, load


def test_groups_are_label_and_colour():
    data, gray = coloured_digits(0.9, seed=3), load("digits", seed=3)
    for split in ("train", "test"):
        x, y, groups = (getattr(data, f"{split}_{what}") for what in ("x", "y", "groups"))
        lit = x.flatten(2).sum(2)  # (N, 3)
        assert (lit[:, 2] == 0).all()
        assert ((lit > 0).sum(1) == 1).all()
        assert torch.equal(groups, 2 * y + lit.argmax(1))
    assert torch.equal(data.train_x.sum(1, keepdim=True), gray.train_x)
    assert torch.equal(data.train_y, (gray.train_y >= 5).long())
    assert torch.equal(data.test_x.sum(1, keepdim=True), gray.test_x.repeat(2, 1, 1, 1))
    counts = data.train_group_counts.tolist()
    assert counts == torch.bincount(data.train_groups).tolist()
    for label in (0, 1):
        size = int((data.train_y == label).sum())
        assert counts[2 * label + 1 - label] == round(0.1 * size)
    test = torch.bincount(data.test_groups)
    assert test[0] == test[1] and test[2] == test[3]


def test_correlation_one_and_zero_and_seeds():
    assert coloured_digits(1.0).train_group_counts[[1, 2]].tolist() == [0, 0]
    assert coloured_digits(0.0).train_group_counts[[0, 3]].tolist() == [0, 0]
    first, again, other = coloured_digits(), coloured_digits(), coloured_digits(seed=1)
    assert torch.equal(first.train_x, again.train_x)
    assert not torch.equal(first.train_groups, other.train_groups)


def test_label_noise():
    clean, noisy = coloured_digits(label_noise=0.0), coloured_digits(label_noise=0.25)
    assert (clean.train_y != noisy.train_y).sum() == round(0.25 * len(clean.train_y))
    half = len(noisy.test_y) // 2
    assert torch.equal(noisy.test_y[:half], noisy.test_y[half:])


def test_subset_keeps_every_group():
    data = coloured_digits(0.99).subset(train=100, test=40)
    assert (len(data.train_x), len(data.train_y), len(data.train_groups)) == (100, 100, 100)
    assert (data.train_group_counts > 0).all()
    assert torch.bincount(data.test_groups).tolist() == [10, 10, 10, 10]
    assert torch.equal(data.train_groups // 2, data.train_y)
    assert data.subset() is data
    with pytest.raises(ValueError, match="3 train samples cannot hold all 4 groups"):
        data.subset(train=3)


def test_errors():
    with pytest.raises(ValueError, match=r"correlation=1.5, expected a number from 0 to 1"):
        coloured_digits(1.5)
    with pytest.raises(ValueError, match="label_noise=nan"):
        coloured_digits(label_noise=float("nan"))
