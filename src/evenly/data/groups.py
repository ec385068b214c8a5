"""Data whose samples come in groups: a label and an attribute that agree in training and need not in use.

:func:`coloured_digits` is the small standard problem: digits whose colour tells the label in most training images and
in half of the test images. A network that reads colours is right on average and wrong on the groups where label and
colour disagree. Use it to see what a group method buys, by :class:`evenly.robust.WorstGroupAccuracy`.

Groups are numbered ``2 * label + colour``: with :math:`\\rho` the correlation, a share :math:`\\rho` of each class's
training images has the colour of its label, and every test image is there in both colours.

Reference:
    Martin Arjovsky, Léon Bottou, Ishaan Gulrajani & David Lopez-Paz, *Invariant Risk Minimization*, 2019,
    arXiv 1907.02893, section 5.2 (coloured MNIST). Here the label has no noise unless it is asked for, and the test set
    is balanced over groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evenly.data.loaders import Dataset, _moments, _proportional, load

__all__ = ["GroupedDataset", "coloured_digits"]

_COLOURS = ("red", "green")
_LABELS = ("0 to 4", "5 to 9")


@dataclass(frozen=True, eq=False, repr=False)
class GroupedDataset(Dataset):
    """A :class:`evenly.data.Dataset` whose samples have groups.

    Attributes:
        train_groups, test_groups: int64 (N,), indices into ``group_names``.
        group_names: one string a group.
    """

    train_groups: torch.Tensor = field(kw_only=True)
    test_groups: torch.Tensor = field(kw_only=True)
    group_names: tuple[str, ...] = field(kw_only=True)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.group_names)

    @property
    def train_group_counts(self) -> torch.Tensor:
        """Training samples in each group, int64 (num_groups,)."""
        return torch.bincount(self.train_groups, minlength=self.num_groups)

    def subset(self, *, train: int | None = None, test: int | None = None, seed: int = 0) -> GroupedDataset:
        """A part with at most ``train`` and ``test`` samples, stratified by group; None keeps a split as it is."""
        changes: dict[str, Any] = {}
        for split, count in (("train", train), ("test", test)):
            groups = getattr(self, f"{split}_groups")
            if count is None or count >= len(groups):
                continue
            present = len(torch.unique(groups))
            if count < present:
                raise ValueError(f"a subset of {count} {split} samples cannot hold all {present} groups")
            keep = _proportional(groups, count, seed)
            for what in ("x", "y", "groups"):
                changes[f"{split}_{what}"] = getattr(self, f"{split}_{what}")[keep]
        return dataclasses.replace(self, **changes) if changes else self

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1].replace('Dataset', 'GroupedDataset')}, {self.num_groups} groups)"


def coloured_digits(
    correlation: float = 0.95, *, seed: int = 0, test_fraction: float = 0.2, label_noise: float = 0.0
) -> GroupedDataset:
    """scikit-learn's digits in red or green, to be told apart as "0 to 4" and "5 to 9".

    Training images of class 0 are red and those of class 1 green, but for a share ``1 - correlation`` of each class,
    rounded to whole images. Each test image is there twice, once in each colour, so that the four groups of the test
    set are those of its two classes, and a network that reads colours alone is right on half of it.

    Args:
        correlation: share of the training images whose colour goes with the label, in [0, 1].
        seed: of the split, of which images disagree, and of the noise.
        test_fraction: share of the images in the test split, in (0, 1).
        label_noise: share of the labels that are flipped before colouring, in training and test, in [0, 1].

    Returns:
        Images (N, 3, 8, 8) in [0, 1] with an empty blue channel; groups ``2 * label + colour``.

    Raises:
        ValueError: a share out of range.

    >>> data = coloured_digits(0.9)
    >>> data
    GroupedDataset('coloured_digits', image 3x8x8, 2 classes, 1437 train, 720 test, 4 groups)
    >>> dict(zip(data.group_names, data.train_group_counts.tolist()))
    {'0 to 4, red': 649, '0 to 4, green': 72, '5 to 9, red': 72, '5 to 9, green': 644}
    """
    for name, share in (("correlation", correlation), ("label_noise", label_noise)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}, expected a number from 0 to 1")
    digits = load("digits", seed=seed, test_fraction=test_fraction)
    rng = np.random.default_rng((seed, 1))
    train_y, test_y = ((y >= 5).long() for y in (digits.train_y, digits.test_y))
    for y in (train_y, test_y):
        flipped = rng.permutation(len(y))[: round(label_noise * len(y))]
        y[flipped] = 1 - y[flipped]
    colour = train_y.clone()
    for label in (0, 1):
        members = rng.permutation(np.flatnonzero(train_y.numpy() == label))
        odd = members[: round((1 - correlation) * len(members))]
        colour[odd] = 1 - label
    both = torch.tensor([0, 1]).repeat_interleave(len(test_y))
    test_y = test_y.repeat(2)
    train_x = _painted(digits.train_x, colour)
    mean, std = _moments(train_x)
    return GroupedDataset(
        "coloured_digits",
        "image",
        train_x,
        train_y,
        _painted(digits.test_x.repeat(2, 1, 1, 1), both),
        test_y,
        _LABELS,
        mean.float(),
        std.float(),
        train_groups=2 * train_y + colour,
        test_groups=2 * test_y + both,
        group_names=tuple(f"{label}, {paint}" for label in _LABELS for paint in _COLOURS),
    )


def _painted(gray: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    out = gray.new_zeros(len(gray), 3, *gray.shape[2:])
    out[torch.arange(len(gray)), colour] = gray[:, 0]
    return out
