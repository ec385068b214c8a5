"""The clipped surrogate loss against a loop over tokens, its gradient, and what masked tokens may do."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from evenly.policy import PolicyLoss, policy_loss

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def oracle(new, old, advantages, mask, low, high, dual, aggregation, length):
    rows = []
    for i in range(len(new)):
        row = []
        for t in range(len(new[i])):
            if not mask[i][t]:
                continue
            ratio, a = math.exp(new[i][t] - old[i][t]), advantages[i]
            clipped = min(max(ratio, 1 - low), 1 + high) if low is not None else ratio
            loss = max(-a * ratio, -a * clipped)
            row.append(min(loss, -a * dual) if dual is not None and a < 0 else loss)
        rows.append(row)
    if aggregation == "token-mean":
        every = [x for row in rows for x in row]
        return sum(every) / len(every)
    if aggregation == "seq-mean-token-mean":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    return sum(map(sum, rows)) / len(rows) / (length if aggregation == "seq-mean-token-sum-norm" else 1)


def tensors(spread=1.0):
    new = torch.randn(5, 7, dtype=torch.float64) - 2
    mask = torch.rand(5, 7) > 0.3
    mask[3] = False  # a rollout without a token
    return new, new + spread * torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64), mask


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("clip", "dual"), [((0.2, 0.28), 10.0), ((0.2, 0.2), None), (None, None), ((0.1, 0.5), 1.5)])
def test_is_the_formula(aggregation, clip, dual):
    new, old, a, mask = tensors()
    got = policy_loss(new, a, old_log_probs=old, mask=mask, clip=clip, dual_clip=dual, aggregation=aggregation)
    low, high = clip or (None, None)
    want = oracle(new.tolist(), old.tolist(), a.tolist(), mask.tolist(), low, high, dual, aggregation, 7)
    assert got.item() == pytest.approx(want)
    module = PolicyLoss(clip=clip, dual_clip=dual, aggregation=aggregation)
    assert torch.equal(module(new, a, old, mask), got)
    assert f"aggregation={aggregation!r}" in repr(module)
    same = policy_loss(
        new, a[:, None].expand(5, 7), old_log_probs=old, mask=mask.long(), clip=clip, dual_clip=dual,
        aggregation=aggregation,
    )  # fmt: skip
    torch.testing.assert_close(same, got)


def test_gradient():
    new, old, a, mask = tensors()
    new.requires_grad_()
    assert gradcheck(lambda x: policy_loss(x, a, old_log_probs=old, mask=mask), (new,))
    # On the samples' own policy it is REINFORCE: -A grad log pi.
    (gradient,) = torch.autograd.grad(policy_loss(new, a, mask=mask), new)
    torch.testing.assert_close(gradient, torch.where(mask, -a[:, None] / 5, 0.0))
    single = new.detach()[:, 0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(single, a), single)
    torch.testing.assert_close(gradient, -a / 5)


def test_no_gradient_through_advantages_or_the_old_policy():
    new, old, a, mask = (t.requires_grad_() if t.is_floating_point() else t for t in tensors())
    policy_loss(new, a, old_log_probs=old, mask=mask).backward()
    assert new.grad is not None and a.grad is None and old.grad is None


def test_clipping_stops_the_gradient():
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5, 3.0]], requires_grad=True)  # log ratios
    old = torch.zeros(1, 5)
    for sign, want in ((1.0, [0, 1, 0, 1, 0]), (-1.0, [1, 0, 1, 0, 0])):
        (gradient,) = torch.autograd.grad(policy_loss(new, torch.tensor([sign]), old_log_probs=old), new)
        assert (gradient != 0).int().tolist() == [want]  # the last: dual clip where A < 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
def test_masked_tokens_do_not_matter(bad):
    new, old, a, mask = tensors()
    spoiled, worse = (torch.where(mask, t, bad) for t in (new, old))
    spoiled.requires_grad_()
    new.requires_grad_()
    want, got = (
        policy_loss(new, a, old_log_probs=old, mask=mask),
        policy_loss(spoiled, a, old_log_probs=worse, mask=mask),
    )
    torch.testing.assert_close(got, want)
    want.backward()
    got.backward()
    torch.testing.assert_close(spoiled.grad, new.grad)


def test_empty_and_length():
    assert policy_loss(torch.zeros(0, 4), torch.zeros(0)) == 0
    new, _, a, _ = tensors()
    by_ten = policy_loss(new, a, aggregation="seq-mean-token-sum-norm", length=10)
    torch.testing.assert_close(by_ten, policy_loss(new, a) / 10)


def test_refused():
    new, old, a, _ = tensors()
    for options, message in (
        ({"clip": 0.2}, "clip=0.2, expected two numbers"),
        ({"clip": (1.5, 0.2)}, r"clip\[0\]=1.5"),
        ({"dual_clip": 1.0}, "dual_clip=1.0, expected a number above 1"),
        ({"aggregation": "mean"}, "aggregation='mean', expected one of 'token-mean'"),
        ({"length": 4}, "length=4 with aggregation='seq-mean-token-sum'"),
        ({"mask": torch.ones(5, 6)}, r"mask has shape \(5, 6\), expected that of log_probs, \(5, 7\)"),
        ({"old_log_probs": old[:4]}, r"old_log_probs has shape \(4, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            policy_loss(new, a, **options)
    with pytest.raises(ValueError, match=r"advantages has shape \(4,\), expected \(5,\)"):
        policy_loss(new, a[:4])
    with pytest.raises(ValueError, match=r"log_probs has shape \(5, 7, 1\)"):
        policy_loss(new.unsqueeze(2), a)
