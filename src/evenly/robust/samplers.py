"""Samplers that draw every group of samples equally often.

With replacement each draw is a group, uniformly, and a member of it, uniformly, so that a sample of group g has

.. math::
    P(i) = \\frac{1}{m\\, n_{g_i}},

the ``reweight_groups`` sampling of the reference below. Use it with :class:`evenly.robust.GroupDROLoss` (its group
means are very noisy for rare groups otherwise), or with a plain mean loss as the resampling baseline; without
replacement it is the subsampling baseline.

Reference:
    Shiori Sagawa, Pang Wei Koh, Tatsunori B. Hashimoto & Percy Liang, *Distributionally Robust Neural Networks for
    Group Shifts*, ICLR 2020, arXiv 1911.08731, algorithm 1 (step 1) and section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["GroupBalancedSampler"]


class GroupBalancedSampler(Sampler[int]):
    """Indices of samples, every group equally often.

    Args:
        groups: group id of each sample, integers (N,); ids need not be contiguous, groups without samples do not count.
        num_samples: draws in an epoch, over all processes. Default: N with replacement; the number of groups times the
            size of the smallest without.
        replacement: draw with replacement. Without, every group gives ``num_samples / m`` distinct members, drawn anew
            each epoch.
        generator: where random numbers come from. Default: a generator of its own, seeded by ``seed`` and the epoch, so
            that an epoch is the same in every run and on every process. A given one is advanced by each pass, and what
            it gives is neither epoch-deterministic nor resumable.
        stratified: with replacement, deal the groups out in shuffled rounds of m, so that any window of k m draws that
            begins at a multiple of m holds each group k times: batches lack no group where the batch size (per process)
            is a multiple of m. Without replacement too the members come in such rounds.
        seed: non-negative integer.
        num_replicas, rank: number of processes and which this is. Default: those of ``torch.distributed`` where it is
            initialized, else 1 and 0. Give ``num_replicas=1`` where another tool divides the sampler among processes.

    Each pass is one epoch and the next pass the next epoch; :meth:`set_epoch` goes to a certain one. ``state_dict``
    holds epoch and position in it, for a run that resumes in the middle of an epoch. The position counts indices that
    were handed out; a ``DataLoader`` with workers takes them ahead of the training, so set it from the batches that
    were trained on: ``{"epoch": e, "position": batches * batch_size}``.

    With several processes the draws are dealt out in turn and each process gets equally many; where they do not divide
    evenly, further draws are made (with replacement) or the first are repeated (without).

    The distribution with replacement is that of ``torch.utils.data.WeightedRandomSampler(1 / counts[groups], ...)``, at
    O(N) a sampler and O(num_samples) an epoch, and without its limit of 2^24 samples.

    Raises:
        ValueError: no sample; ``num_samples`` not positive, or without replacement not m times a number from 1 to the
            size of the smallest group; ``rank`` outside the processes; ``generator`` with several processes.
        TypeError: ids that are not integers.

    >>> groups = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    >>> sampler = GroupBalancedSampler(groups, num_samples=1000)
    >>> round(groups[list(sampler)].float().mean().item(), 1)
    0.5
    >>> sorted(groups[list(GroupBalancedSampler(groups, replacement=False))].tolist())
    [0, 0, 1, 1]
    """

    def __init__(
        self,
        groups: Tensor | Sequence[int],
        num_samples: int | None = None,
        replacement: bool = True,
        generator: torch.Generator | None = None,
        *,
        stratified: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        ids = torch.as_tensor(groups).detach().cpu()
        if ids.ndim != 1 or not ids.numel():
            raise ValueError(f"groups has shape {tuple(ids.shape)}, expected (N,) with at least one sample.")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"groups are {ids.dtype}, expected integers such as torch.int64.")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}, expected a non-negative integer.")
        _, index, self._sizes = torch.unique(ids, return_inverse=True, return_counts=True)
        self._members = torch.argsort(index, stable=True)  # those of the first group, then of the second, ...
        self._starts = self._sizes.cumsum(0) - self._sizes
        self.n_groups = len(self._sizes)
        self.replacement = replacement
        self.stratified = stratified
        self.generator = generator
        self.seed = seed
        self.num_samples = self._number(num_samples)
        self.num_replicas, self.rank = _processes(num_replicas, rank)
        if generator is not None and self.num_replicas > 1:
            raise ValueError(
                f"a generator cannot be kept the same on {self.num_replicas} processes; give seed= in its place."
            )
        self._next = 0  # the epoch of the next pass, and where in it that begins
        self._skip = 0
        self._epoch = self._position = 0  # of the pass under way

    def __iter__(self) -> Iterator[int]:
        epoch, start = self._next, self._skip
        self._next, self._skip = epoch + 1, 0
        self._epoch, self._position = epoch, start
        for self._position, index in enumerate(self._draw(epoch)[start:].tolist(), start + 1):  # noqa: B020
            yield index

    def __len__(self) -> int:
        """Draws of this process in an epoch."""
        return -(-self.num_samples // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch, from its beginning."""
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch={epoch!r}, expected a non-negative integer.")
        self._next = self._epoch = epoch
        self._skip = self._position = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch and position of the pass that is under way, or the beginning of the next."""
        if self._position == len(self):
            return {"epoch": self._epoch + 1, "position": 0}
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next pass begins where the saved one was.

        Raises:
            ValueError: a position outside the epoch, or a state to resume with a generator that was given.
        """
        if self.generator is not None and state["position"]:
            raise ValueError("a sampler with a given generator cannot resume in an epoch; give seed= in its place.")
        if not 0 <= state["position"] <= len(self):
            raise ValueError(f"position={state['position']}, expected 0 to {len(self)}, the draws of an epoch.")
        self.set_epoch(state["epoch"])
        self._skip = self._position = state["position"]

    def __repr__(self) -> str:
        return (
            f"GroupBalancedSampler({len(self._members)} samples in {self.n_groups} groups, num_samples="
            f"{self.num_samples}, replacement={self.replacement}, stratified={self.stratified}, seed={self.seed})"
        )

    def _number(self, num_samples: int | None) -> int:
        smallest = int(self._sizes.min())
        if num_samples is None:
            return len(self._members) if self.replacement else self.n_groups * smallest
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}, expected a positive integer.")
        if not self.replacement and (num_samples % self.n_groups or num_samples > self.n_groups * smallest):
            raise ValueError(
                f"num_samples={num_samples} without replacement, expected {self.n_groups} (groups) times a number from "
                f"1 to {smallest} (the smallest group)."
            )
        return num_samples

    def _draw(self, epoch: int) -> Tensor:
        """This process's indices of an epoch."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
        total = len(self) * self.num_replicas
        if self.replacement:
            drawn = self._with_replacement(total, generator)
        else:
            drawn = self._without_replacement(generator)
            drawn = drawn.repeat(-(-total // len(drawn)))[:total]
        return drawn[self.rank :: self.num_replicas]

    def _with_replacement(self, total: int, generator: torch.Generator) -> Tensor:
        m = self.n_groups
        if self.stratified:
            # Rounds over the draws of one process: it gets every num_replicas-th of them.
            rounds = -(-len(self) // m)
            keys = torch.rand(self.num_replicas, rounds, m, generator=generator)
            group = keys.argsort(dim=2).reshape(self.num_replicas, -1)[:, : len(self)].T.reshape(-1)
        else:
            group = torch.randint(m, (total,), generator=generator)
        # In float64 the product is below the size, for sizes below 2^53.
        u = torch.rand(total, generator=generator, dtype=torch.float64)
        return self._members[self._starts[group] + (u * self._sizes[group]).long()]

    def _without_replacement(self, generator: torch.Generator) -> Tensor:
        each = self.num_samples // self.n_groups
        # Members in random order, sorted by group: the first `each` of every group are a random subset.
        shuffle = torch.randperm(len(self._members), generator=generator)
        group = torch.repeat_interleave(torch.arange(self.n_groups), self._sizes)
        order = shuffle[torch.argsort(group[shuffle], stable=True)]
        taken = order[self._starts.unsqueeze(1) + torch.arange(each)]  # (m, each)
        if self.stratified:
            turn = torch.rand(each, self.n_groups, generator=generator).argsort(dim=1)
            return self._members[taken.T.gather(1, turn).reshape(-1)]
        return self._members[taken.reshape(-1)[torch.randperm(taken.numel(), generator=generator)]]


def _processes(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    running = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if running else 1
    if rank is None:
        rank = dist.get_rank() if running and num_replicas > 1 else 0
    if num_replicas < 1 or not 0 <= rank < num_replicas:
        raise ValueError(f"rank={rank} of num_replicas={num_replicas}, expected 0 <= rank < num_replicas.")
    return num_replicas, rank


def _mixed(seed: int, epoch: int) -> int:
    # One number from two, so that seed 0 in epoch 1 is not seed 1 in epoch 0.
    import numpy as np

    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0] >> np.uint64(1))
