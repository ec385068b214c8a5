"""What every recurrent module must do. The rows are in recurrent_cases.py; each check below runs for each row."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from conformance.cases import devices
from conformance.recurrent_cases import RECURRENT, RecurrentCase

every_case = pytest.mark.parametrize("case", RECURRENT, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def build(case: RecurrentCase, **options):
    """The module with random parameters: fresh gains and biases of 1 and 0 hide mistakes in them."""
    module = case.make(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return module


def output(module, x):
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def data(case, dtype=torch.float32, device="cpu"):
    return torch.randn(case.shape).to(device, dtype)


@every_case
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(case, device, dtype):
    module = build(case, device=device, dtype=dtype)
    x = data(case, dtype, device)
    y = output(module, x)
    assert (y.dtype, y.device.type) == (dtype, device)
    exact = output(copy.deepcopy(module).double(), x.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]
    assert (y.double() - exact).abs().max() < limit


@every_case
def test_autocast(case):
    module = build(case)
    x = data(case).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = output(module, x)
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert (y.float() - output(module, x)).abs().max() < 0.15


@every_case
def test_state_dict_deepcopy_and_pickle(case):
    module, x = build(case), data(case)
    want = output(module, x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(output(other, x), want)


@every_case
def test_train_equals_eval_and_runs_repeat(case):
    module, x = build(case), data(case)
    want = output(module.train(), x)
    assert torch.equal(output(module, x), want)
    assert torch.equal(output(module.eval(), x), want)


@every_case
def test_compile(case):
    module, x = build(case), data(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, x), output(module, x), rtol=1e-5, atol=1e-6)


@every_case
def test_one_bad_sample_spoils_no_other(case):
    module, x = build(case), data(case)
    want = output(module, x)
    bad = x.clone()
    bad.select(case.samples, 1).fill_(float("nan"))
    y = output(module, bad)
    keep = [0, 2, 3]
    axis = case.samples
    index = torch.tensor(keep)
    torch.testing.assert_close(y.index_select(axis, index), want.index_select(axis, index))
    assert y.select(axis, 1).isnan().any()


@every_case
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_extreme_scale_stays_finite(case, scale):
    module = build(case)
    x = (data(case) * scale).requires_grad_()
    y = output(module, x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@every_case
def test_zero_samples(case):
    shape = list(case.shape)
    shape[case.samples] = 0
    y = output(build(case), torch.randn(shape))
    assert y.shape[case.samples] == 0


@every_case
def test_non_contiguous_input(case):
    module, x = build(case), data(case)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(output(module, strided), output(module, x))


@every_case
def test_wrong_features_and_types_are_refused(case):
    module = build(case)
    with pytest.raises(ValueError, match="3 features"):
        module(torch.randn(*case.shape[:-1], 5))


@every_case
def test_repr_shows_the_settings(case):
    assert "3, 8" in repr(case.make())
    assert "eps=1e-05" in repr(case.make())


@every_case
def test_gradients_reach_every_parameter(case):
    module = build(case)
    state = output(module, data(case))
    state = state * torch.randn_like(state)
    state.sum().backward()
    zero = [name for name, parameter in module.named_parameters() if not parameter.grad.abs().max() > 0]
    # From a zero state a cell's recurrent weights get none: W_h h = 0, and so does the gain of its norm.
    assert all("hh" in name or "hn" in name for name in zero) if case.samples == 0 else not zero
