"""What every reward normalizer must do. The rows are in reward_cases.py; each check runs for each row."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch

from conformance import reward_worker
from conformance.cases import devices
from conformance.reward_cases import REWARDS
from evenly.policy import RewardNormalizer

every_normalizer = pytest.mark.parametrize("case", REWARDS, ids=str)

#: Ragged groups in no order; labels are any integers.
IDS = torch.tensor([5, -2, 5, 70, 70, -2, 5, 70, 8, 8, -2, -2, 5, 70, 8, 6, 6])


def rewards(dtype=torch.float64, seed=0, binary=False):
    gen = torch.Generator().manual_seed(seed)
    values = torch.rand(len(IDS), generator=gen, dtype=torch.float64).round(decimals=2)
    return ((values > 0.4).double() if binary else values).to(dtype)


def apply(case, r, ids=IDS, normalizer=None, **options):
    """The advantages, with a fresh normalizer unless one is given; labels where the method takes them."""
    return (normalizer or case())(r, ids if case.groups else None, **options)


def close(got, want, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@every_normalizer
def test_ragged_groups(case):
    for binary in (False, True):
        r = rewards(binary=binary)
        a = apply(case, r)
        assert a.shape == r.shape and a.isfinite().all() and a.abs().max() > 0
        for label in IDS.unique():
            rows = label == IDS
            if case.sums_to_zero:
                close(a[rows].sum(), torch.zeros((), dtype=a.dtype), 1e-11)
            order = r[rows].argsort()  # within a group, a higher reward never has a lower advantage
            assert (a[rows][order].diff() >= 0).all()
        if case.local:
            for label in IDS.unique():
                rows = label == IDS
                close(apply(case, r[rows], IDS[rows]), a[rows])


@every_normalizer
def test_rewards_matter(case):
    """A test of the tests: the advantages are not the rewards."""
    assert not torch.allclose(apply(case, rewards()), rewards(), atol=1e-2)


@every_normalizer
@pytest.mark.parametrize("singletons", ["error", "zero", "raw"])
def test_one_rollout_groups(case, singletons):
    ids, r = IDS.clone(), rewards()
    ids[3] = 1000
    normalizer = case(singletons=singletons)
    if not case.groups:
        assert apply(case, r, normalizer=normalizer).isfinite().all()
        return
    if singletons == "error":
        with pytest.raises(ValueError, match=r"Group 1000 has 1 rollout .* at least 2 samples per group.*singletons"):
            normalizer(r, ids)
        return
    a = normalizer(r, ids)
    rest = torch.arange(len(r)) != 3
    if singletons == "zero":
        assert a[3] == 0
        if case.scale != 0 or case.local:  # the batch's own scale sees the lone reward
            close(a[rest], case()(r[rest], ids[rest]))
    else:
        assert a[3] > 0
    assert a.isfinite().all()


@every_normalizer
def test_equal_rewards(case):
    for value in (0.0, 0.1, 0.7, 1.0):
        r = rewards()
        r[IDS == 70] = value
        a = apply(case, r)
        assert a.isfinite().all()
        if case.equal_is_zero:
            assert (a[IDS == 70] == 0).all(), "exactly, not up to rounding"
        same = torch.full_like(r, value)
        a = apply(case, same)
        assert a.isfinite().all()
        if case.settings.get("baseline") != 0.5:
            assert (a.abs() <= 1e-15).all()


@every_normalizer
def test_empty(case):
    normalizer = case()
    before = copy.deepcopy(normalizer.state_dict())
    none = torch.zeros(0, dtype=torch.long)
    assert apply(case, torch.zeros(0), none, normalizer).shape == (0,)
    response = torch.ones(0, 4, dtype=torch.bool)
    assert apply(case, torch.zeros(0), none, normalizer, response_mask=response).shape == (0, 4)
    assert apply(case, torch.zeros(0), none, normalizer, num_groups=3).shape == (0,)
    assert all(torch.equal(before[name], value) for name, value in normalizer.state_dict().items())
    assert all(value.isfinite().all() for value in normalizer.state_dict().values())


@every_normalizer
def test_permutation_equivariance(case):
    r = rewards()
    order = torch.randperm(len(r))
    close(apply(case, r[order], IDS[order]), apply(case, r)[order])


@every_normalizer
def test_labels_are_names(case):
    r = rewards()
    names = {5: 900, -2: 3, 70: -10, 8: 0, 6: 41}  # other numbers in another order
    renamed = torch.tensor([names[int(label)] for label in IDS])
    close(apply(case, r, renamed), apply(case, r))
    close(apply(case, r, renamed.int()), apply(case, r))
    _, dense = IDS.unique(return_inverse=True)
    close(apply(case, r, dense, num_groups=5), apply(case, r))
    close(apply(case, r, dense + 2, num_groups=9), apply(case, r))  # groups without a rollout


@every_normalizer
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype, device):
    r = rewards(dtype)
    ids = IDS.to(device)
    normalizer = case().to(device)
    a = apply(case, r.to(device), ids, normalizer)
    assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert a.device.type == device
    close(a.cpu().double(), apply(case, r.double()), 1e-6 if a.dtype == torch.float32 else 1e-12)


@every_normalizer
def test_nan_policy(case):
    for bad in (float("nan"), float("inf"), -float("inf")):
        r = rewards()
        r[7] = bad
        with pytest.raises(ValueError, match=r"not finite \(row 7: .*mask="):
            apply(case, r)
        mask = torch.ones(len(r), dtype=torch.bool)
        mask[7] = False
        a = apply(case, r, mask=mask)
        assert a[7] == 0 and a.isfinite().all()
        kept = apply(case, r[mask], IDS[mask])
        close(a[mask], kept)  # as if it were not there
    nothing = apply(case, r, mask=torch.zeros(len(r), dtype=torch.bool))
    assert (nothing == 0).all()


@every_normalizer
def test_bad_labels(case):
    r = rewards()
    if not case.groups:
        assert apply(case, r).shape == r.shape
        with pytest.raises(ValueError, match=r"group_ids has shape \(3,\), expected \(17,\)"):
            case()(r, torch.arange(3))
        return
    for ids, kind, message in (
        (None, TypeError, "group_ids is missing: give each rollout an integer label"),
        (IDS.tolist(), TypeError, r"group_ids is a list, expected a tensor of integers.*numpy.unique"),
        (IDS.float(), TypeError, r"group_ids is torch.float32, expected integers. Convert with group_ids.long\(\)"),
        (IDS > 5, TypeError, "group_ids is torch.bool, expected integers"),
        (IDS[:3], ValueError, r"group_ids has shape \(3,\), expected \(17,\): one label for each of the 17 rollouts"),
        (IDS.unsqueeze(1), ValueError, r"group_ids has shape \(17, 1\), expected \(17,\)"),
        (IDS.to("meta"), ValueError, "group_ids is on meta and rewards on cpu: move it"),
    ):
        with pytest.raises(kind, match=message):
            case()(r, ids)
    with pytest.raises(ValueError, match=r"group_ids has labels from -2 to 70, expected 0 to 3 \(num_groups\)"):
        case()(r, IDS, num_groups=4)
    with pytest.raises(ValueError, match="num_groups=0, expected a whole number of at least 1"):
        case()(r, IDS, num_groups=0)


@every_normalizer
def test_bad_rewards_and_masks(case):
    r = rewards()
    for given, kind, message in (
        ([1.0] * 17, TypeError, "rewards is a list, expected a tensor"),
        (torch.ones(17, dtype=torch.long), TypeError, r"rewards is torch.int64, .*rewards.float\(\)"),
        (torch.ones(17, 1, 1), ValueError, r"rewards has shape \(17, 1, 1\), expected \(rollouts,\)"),
        (torch.ones(17, 3), ValueError, r"rewards has 3 components, .*num_rewards=3"),
    ):
        with pytest.raises(kind, match=message):
            apply(case, given)
    with pytest.raises(TypeError, match=r"mask is torch.float64, expected a boolean tensor"):
        apply(case, r, mask=r)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected that of rewards, \(17,\)"):
        apply(case, r, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"response_mask has shape \(3, 4\), expected \(17, tokens\)"):
        apply(case, r, response_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"reward_weights is \[1.0, 2.0\], expected 1 finite numbers"):
        apply(case, r, reward_weights=[1.0, 2.0])
    if case.bounded:
        with pytest.raises(ValueError, match=r"rewards must lie in \[0, 1\]; row 2 is \[1.5\].*reward_range="):
            apply(case, torch.where(torch.arange(17) == 2, 1.5, r))


@every_normalizer
def test_refuses_settings(case):
    for settings, message in case.refuses:
        with pytest.raises((ValueError, TypeError)) as caught:
            case(**settings)
        assert message in str(caught.value)


@every_normalizer
def test_invariances(case):
    r = rewards()
    a = apply(case, r)
    if case.shift:
        close(apply(case, r + 3.25), a, 1e-10)
    if case.scale is not None:
        close(apply(case, 4 * r), 4**case.scale * a, 1e-10)
    if case.bounded:
        close(apply(case, 6 * r - 2, normalizer=case(reward_range=(-2.0, 4.0))), a, 1e-9)
        with pytest.raises(ValueError, match="must lie in"):
            apply(case, 6 * r - 2)
    assert case.shift or case.scale is not None or case.bounded or case.settings.get("baseline") == 0.5 or case.scale


@every_normalizer
def test_components(case):
    first, second = rewards(seed=0), rewards(seed=1)
    both = torch.stack([first, second], 1)
    one, other = apply(case, first), apply(case, second)
    close(apply(case, both, normalizer=case(num_rewards=2)), (one + other) / 2)
    weighted = apply(case, both, normalizer=case(num_rewards=2), reward_weights=[2.0, -1.0])
    close(weighted, (2 * one - other) / 2)
    same = torch.stack([first] * 3, 1)
    close(apply(case, same, normalizer=case(num_rewards=3)), one)
    close(apply(case, first.unsqueeze(1)), one)
    mask = torch.ones_like(both, dtype=torch.bool)
    mask[4, 1] = False
    got = apply(case, both, normalizer=case(num_rewards=2), mask=mask)
    rest = apply(case, second, mask=mask[:, 1])
    close(got, (one + rest) / 2)


@every_normalizer
def test_tokens(case):
    response = torch.rand(len(IDS), 6) > 0.3
    a = apply(case, rewards())
    for mask in (response, response.long(), response.float()):
        got = apply(case, rewards(), response_mask=mask)
        assert torch.equal(got, torch.where(response, a.unsqueeze(1), 0.0))


@every_normalizer
def test_no_gradient(case):
    r = rewards().requires_grad_()
    before = r.detach().clone()
    a = apply(case, r)
    assert not a.requires_grad and a.grad_fn is None
    assert torch.equal(r, before)
    assert not list(case().parameters())


@every_normalizer
def test_state_dict(case):
    normalizer = case()
    assert tuple(sorted(normalizer.state_dict())) == tuple(sorted(case.state))
    for seed in range(3):
        apply(case, rewards(seed=seed), normalizer=normalizer)
    file = io.BytesIO()
    torch.save(normalizer.state_dict(), file)
    file.seek(0)
    loaded = case()
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copies = [loaded, copy.deepcopy(normalizer), pickle.loads(pickle.dumps(normalizer))]
    want = apply(case, rewards(seed=7), normalizer=normalizer)
    for other in copies:
        assert torch.equal(apply(case, rewards(seed=7), normalizer=other), want)  # goes on where it was
        for name, value in other.state_dict().items():
            assert torch.equal(value, normalizer.state_dict()[name])
    if case.state:
        assert not torch.equal(normalizer.running_mean, case().running_mean)


@every_normalizer
def test_evaluation_changes_nothing(case):
    normalizer = case()
    apply(case, rewards(), normalizer=normalizer)
    before = copy.deepcopy(normalizer.state_dict())
    normalizer.eval()
    first = apply(case, rewards(seed=3), normalizer=normalizer)
    assert torch.equal(apply(case, rewards(seed=3), normalizer=normalizer), first)
    assert all(torch.equal(before[name], value) for name, value in normalizer.state_dict().items())


@every_normalizer
def test_function_beside_it(case):
    if case.function is None:
        pytest.skip("state needs the module")
    r = torch.stack([rewards(), rewards(seed=1)], 1)
    labels = (IDS,) if case.groups else ()
    assert torch.equal(case.function(r, *labels, **case.settings), apply(case, r, normalizer=case(num_rewards=2)))


@every_normalizer
def test_determinism(case):
    assert torch.equal(apply(case, rewards()), apply(case, rewards()))


@every_normalizer
def test_non_contiguous(case):
    wide = torch.stack([rewards(), rewards(seed=1)], 1)
    assert torch.equal(apply(case, wide[:, 0]), apply(case, rewards()))
    labels = torch.stack([IDS, IDS], 1)[:, 0]
    assert torch.equal(apply(case, rewards(), labels), apply(case, rewards()))


@every_normalizer
def test_repr_and_documentation(case):
    text = repr(case(singletons="zero", sync=True))
    assert text.startswith(case.object.split(":")[1] + "(")
    for part in (*case.shows, "num_rewards=1", "singletons='zero'", "sync=True"):
        assert part in text
    assert ">>>" in inspect.getdoc(type(case()))
    assert isinstance(case(), RewardNormalizer)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    torch.multiprocessing.spawn(reward_worker.worker, args=(str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@every_normalizer
def test_two_processes_are_one(case, parts):
    want, state = reward_worker.run(case)
    (first, first_state), (second, second_state) = parts[0][case.name], parts[1][case.name]
    for (_, whole), (rows, a), (others, b) in zip(want, first, second, strict=True):
        assert len(rows) + len(others) == len(whole)
        close(a, whole[rows])
        close(b, whole[others])
    for name, value in state.items():
        close(first_state[name], value)
        assert torch.equal(first_state[name], second_state[name])


def test_an_error_is_one_on_every_process(parts):
    assert all("not finite (row 3" in part["error"] for part in parts)
