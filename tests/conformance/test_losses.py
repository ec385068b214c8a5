"""What every loss on groups must do. The rows are in loss_cases.py; each check below runs for each row."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch.nn import functional

from conformance.cases import devices
from conformance.loss_cases import LOSSES

every_loss = pytest.mark.parametrize("case", LOSSES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def batch(step=0, size=24, n_groups=4, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(10 + step)
    logits = 2 * torch.randn(size, 3, generator=gen, dtype=torch.float64)
    targets = torch.randint(3, (size,), generator=gen)
    groups = torch.arange(size) % n_groups  # every group is there, in no block
    return logits.to(device, dtype), targets.to(device), groups.to(device)


def advance(loss, steps=3, **options):
    for step in range(steps):
        loss(*batch(step, **options))
    return loss


def state(loss):
    return {name: value.clone() for name, value in loss.state_dict().items()}


def assert_same_state(loss, want, **tolerance):
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, want[name], **tolerance or {"rtol": 0, "atol": 0})


@every_loss
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype, device):
    loss, exact = case(device=device), case(dtype=torch.float64)
    for step in range(3):
        logits, targets, groups = batch(step, dtype=dtype, device=device)
        logits.requires_grad_()
        y = loss(logits, targets, groups)
        y.backward()
        want = exact(logits.detach().double().cpu(), targets.cpu(), groups.cpu())
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (logits.grad.dtype, y.device.type) == (dtype, device)
        torch.testing.assert_close(y.double().cpu(), want, rtol=1e-6, atol=1e-6)


@every_loss
def test_gradcheck(case):
    loss = advance(case(dtype=torch.float64), dtype=torch.float64)
    logits, targets, groups = batch(7, size=9, dtype=torch.float64)
    weights = torch.rand(9, dtype=torch.float64) + 0.1

    def run(x, w=None):
        return copy.deepcopy(loss)(x, targets, groups, w)  # from the same state each time

    # Group weights are constants for the gradient; numerically they are not, so eval mode holds them.
    loss.eval()
    assert torch.autograd.gradcheck(run, (logits.requires_grad_(),))
    assert torch.autograd.gradgradcheck(run, (logits,))
    assert torch.autograd.gradcheck(lambda x: run(x, weights), (logits,))


@every_loss
def test_gradient_in_training_is_that_of_the_groups_means(case):
    loss = advance(case(dtype=torch.float64), dtype=torch.float64)
    logits, targets, groups = batch(7, dtype=torch.float64)
    held = copy.deepcopy(loss)
    y = loss(logits.requires_grad_(), targets, groups)
    (gradient,) = torch.autograd.grad(y, logits)
    with torch.no_grad():
        losses = held.sample_losses(logits, targets)
    means = torch.stack([losses[groups == g].mean() for g in range(4)])
    weights = (
        held.group_weights(means, torch.full((4,), 6.0)) if "CVaR" not in case.name else loss.group_weights(None, None)
    )
    torch.testing.assert_close(y.detach(), (weights * means).sum())
    one = torch.autograd.grad(held.sample_losses(logits, targets).sum(), logits)[0]  # rows do not see each other
    torch.testing.assert_close(gradient, one * (weights[groups] / 6).unsqueeze(1))


@every_loss
def test_one_group_is_the_mean_loss(case):
    loss = case(1, (7,), **({"adjustment": 1.0} if "adjustment" in case.settings else {}))
    for step in range(3):
        logits, targets, groups = batch(step, n_groups=1)
        mean = loss.sample_losses(logits, targets).mean()
        torch.testing.assert_close(loss(logits, targets, groups), mean)


@every_loss
def test_a_group_may_be_missing(case):
    loss = case()
    logits, targets, groups = batch()
    groups[groups == 2] = 1
    y = loss(logits.requires_grad_(), targets, groups)
    y.backward()
    assert y.isfinite()
    assert logits.grad.isfinite().all()
    assert loss.seen.tolist() == [True, True, False, True]
    assert loss.ema[2] == 0
    before = state(advance(loss, 1))
    loss(*batch(1)[:2], groups)
    assert loss.ema[2] == before["ema"][2] != 0  # not seen, not moved
    assert loss.ema[0] != before["ema"][0]


@every_loss
def test_an_empty_batch_is_zero_and_changes_nothing(case):
    loss = advance(case())
    before = state(loss)
    logits = torch.zeros(0, 3, requires_grad=True)
    y = loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    y.backward()
    assert y == 0
    assert logits.grad.shape == (0, 3)
    assert_same_state(loss, before)


@every_loss
def test_order_and_names_do_not_matter(case):
    first, second = case(dtype=torch.float64), case(dtype=torch.float64)
    for step in range(3):
        logits, targets, groups = batch(step, dtype=torch.float64)
        order = torch.randperm(len(groups))
        torch.testing.assert_close(first(logits, targets, groups), second(logits[order], targets[order], groups[order]))
    assert_same_state(first, state(second), rtol=1e-12, atol=1e-12)
    # Other numbers for the same groups.
    name = torch.tensor([2, 0, 3, 1])
    counts = torch.tensor([50, 30, 15, 5])
    other = {"adjustment": torch.tensor(case.settings["adjustment"])[name.argsort()]} if isinstance(
        case.settings.get("adjustment"), list) else {}  # fmt: skip
    third = case(counts=counts[name.argsort()], dtype=torch.float64, **other)
    for step in range(3):
        logits, targets, groups = batch(step, dtype=torch.float64)
        y = third(logits, targets, name[groups])
    torch.testing.assert_close(third.ema[name], first.ema)
    if "log_q" in case.state:
        torch.testing.assert_close(third.log_q[name], first.log_q)
    logits, targets, groups = batch(5, dtype=torch.float64)
    torch.testing.assert_close(third(logits, targets, name[groups]), first(logits, targets, groups))
    assert y.isfinite()


@every_loss
def test_ids_of_any_integer_type(case):
    logits, targets, groups = batch()
    want = case()(logits, targets, groups)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(case()(logits, targets, groups.to(dtype)), want)


@every_loss
def test_weights_repeat_and_leave_out(case):
    logits, targets, groups = batch(dtype=torch.float64)
    times = torch.arange(24) // 4 % 3  # 0, 1 or 2 times, each in every group
    weighted, repeated = case(dtype=torch.float64), case(dtype=torch.float64)
    dirty = torch.where(times.unsqueeze(1) == 0, float("nan"), logits).requires_grad_()
    y = weighted(dirty, targets, groups, times.double())
    y.backward()
    want = repeated(*(v.repeat_interleave(times, 0) for v in (logits, targets, groups)))
    torch.testing.assert_close(y.detach(), want)
    assert_same_state(weighted, state(repeated), rtol=1e-12, atol=1e-12)
    assert (dirty.grad[times == 0] == 0).all()
    assert dirty.grad.isfinite().all()
    nothing = case()(logits.float(), targets, groups, torch.zeros(24))
    assert nothing == 0


@every_loss
def test_state_dict(case):
    loss = advance(case())
    assert tuple(loss.state_dict()) == case.state
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    again = case()
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in (5, 6):
        assert torch.equal(again(*batch(step)), loss(*batch(step)))
    assert_same_state(again, state(loss))


@every_loss
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(case, how):
    loss = advance(case())
    again = copy.deepcopy(loss) if how == "deepcopy" else pickle.loads(pickle.dumps(loss))
    assert torch.equal(again(*batch(5)), loss(*batch(5)))
    assert_same_state(again, state(loss))


@every_loss
def test_eval_changes_nothing_and_uses_the_weights(case):
    loss = advance(case())
    before = state(loss)
    loss.eval()
    first = loss(*batch(5))
    assert torch.equal(loss(*batch(5)), first)
    assert_same_state(loss, before)
    if case.moves:
        fresh = case().eval()
        assert not torch.equal(fresh(*batch(5)), first)


@every_loss
def test_reset_and_determinism(case):
    loss, other = case(), case()
    got = [loss(*batch(step)) for step in range(3)]
    want = [other(*batch(step)) for step in range(3)]
    assert torch.equal(torch.stack(got), torch.stack(want))
    loss.reset()
    assert_same_state(loss, state(case()))
    assert torch.equal(loss(*batch(0)), got[0])


@every_loss
def test_compile(case):
    loss, plain = case(), case()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        logits, targets, groups = batch(step)
        other = logits.clone().requires_grad_()
        y = compiled(logits.requires_grad_(), targets, groups)
        y.backward()
        want = plain(other, targets, groups)
        want.backward()
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(logits.grad, other.grad)
    assert_same_state(loss, state(plain), rtol=1e-6, atol=1e-7)


@every_loss
def test_autocast(case):
    loss, plain = case(), case()
    weight = torch.randn(3, 3)
    for step in range(3):
        logits, targets, groups = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            y = loss(logits @ weight, targets, groups)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, plain((logits.bfloat16() @ weight.bfloat16()).float(), targets, groups))
    assert all(value.dtype in (torch.float32, torch.bool) for value in loss.state_dict().values())


@every_loss
def test_a_cast_keeps_the_state(case):
    loss = advance(case())
    before = state(loss)
    loss.bfloat16()
    loss.half()
    assert_same_state(loss, before)
    loss.double()
    assert all(value.dtype in (torch.float64, torch.bool) for value in loss.state_dict().values())
    assert loss(*batch(5, dtype=torch.float64)).dtype == torch.float64


@every_loss
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_losses(case, scale):
    loss = case()
    gen = torch.Generator().manual_seed(0)
    groups = torch.arange(12) % 4
    for _ in range(3):
        losses = (torch.rand(12, generator=gen) * scale).requires_grad_()
        y = loss.reduce(losses, groups)
        y.backward()
        assert y.isfinite()
        assert y > 0
        assert losses.grad.isfinite().all()
    assert all(value.isfinite().all() for value in loss.state_dict().values())


@every_loss
def test_zero_losses(case):
    loss = case()
    y = loss.reduce(torch.zeros(12), torch.arange(12) % 4)
    assert y == 0
    assert all(value.isfinite().all() for value in loss.state_dict().values())


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_nan_shows_and_does_not_stay(case, value):
    loss, clean = advance(case()), advance(case())
    losses, groups = torch.ones(12), torch.arange(12) % 4
    losses[1] = value
    assert not loss.reduce(losses, groups).isfinite()
    for held, want in ((loss.ema, clean.ema), (getattr(loss, "log_q", loss.ema), getattr(clean, "log_q", clean.ema))):
        assert held.isfinite().all()
        assert held[1] == want[1]
    assert loss(*batch(5)).isfinite()


@every_loss
def test_refuses_settings(case):
    for settings, message in case.refuses:
        with pytest.raises(ValueError, match=re.escape(message)):
            case(**settings)


@every_loss
def test_refuses_input(case):
    loss = case()
    logits, targets, groups = batch()
    for arguments, error, message in (
        ((logits.long(), targets, groups), ValueError, "predictions are torch.int64, expected floating-point logits"),
        ((logits, targets, groups.float()), TypeError, "groups are torch.float32, expected a tensor of integers"),
        ((logits, targets, groups.bool()), TypeError, "groups are torch.bool"),
        ((logits, targets, groups.tolist()), TypeError, "groups are list"),
        ((logits, targets, groups + 1), ValueError, "group id 4 outside [0, 4)"),
        ((logits, targets, groups - 1), ValueError, "group id -1 outside [0, 4)"),
        ((logits, targets, groups[:-1]), ValueError, "groups have shape (23,), expected (24,)"),
        ((logits, targets, groups, torch.ones(24).long()), ValueError, "weights are torch.int64"),
        ((logits, targets, groups, torch.ones(3)), ValueError, "of shape (3,), expected floats (24,)"),
        ((logits, targets, groups, -torch.ones(24)), ValueError, "weights must be at least 0"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            loss(*arguments)
    if isinstance(loss.loss, str):
        for arguments, message in (
            ((logits.unsqueeze(2), targets, groups), "cross_entropy takes logits (B, C)"),
            ((logits, targets[:-1], groups), "class indices have shape (B,)"),
            ((logits, targets.float(), groups), "floating-point targets are probabilities (B, C)"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                loss(*arguments)
        with pytest.raises(IndexError):
            loss(logits, targets - 100, groups)  # no index is ignored
    with pytest.raises(ValueError, match=r"shape \(24,\), got shape \(\)"):
        case(loss=lambda logits, targets: functional.cross_entropy(logits, targets))(logits, targets, groups)
    assert_same_state(loss, state(case()))


@every_loss
def test_repr(case):
    assert all(part in repr(case()) for part in case.shows)
    assert "sync=True" in repr(case(sync=True))
