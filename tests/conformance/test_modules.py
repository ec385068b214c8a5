"""What every module must do. The rows are in module_cases.py; each check below runs for each row."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from conformance.cases import devices
from conformance.module_cases import MODULES, ModuleCase

every_case = pytest.mark.parametrize("case", MODULES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def build(case: ModuleCase):
    """The module with gains and biases that are not the fresh 1 and 0, which hide mistakes."""
    torch.manual_seed(0)
    module = case.make()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.rand_like(parameter))
    return module


def output(module, x):
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


@every_case
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(case, device, dtype):
    module = build(case).to(device, dtype)
    x = case.input(dtype, device)
    y = output(module, x)
    assert (y.dtype, y.device.type) == (dtype, device)
    exact = output(copy.deepcopy(module).double(), x if case.tokens else x.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: case.half}[dtype]
    assert (y.double() - exact).abs().max() < limit * exact.abs().max()


@every_case
def test_gradcheck(case):
    module = build(case).double()
    x = case.input(torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(*parameters):
        state = dict(zip(names, parameters, strict=True))
        result = torch.func.functional_call(module, state, (x[:2],))
        return result[0] if isinstance(result, tuple) else result

    leaves = tuple(value.detach().clone().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    if not case.tokens:
        assert torch.autograd.gradcheck(lambda x: output(module, x), (x[:2].requires_grad_(),), fast_mode=True)


@every_case
def test_autocast(case):
    module = build(case)
    x = case.input()
    with torch.autocast("cpu", torch.bfloat16):
        y = output(module, x)
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    want = output(module, x)
    assert (y.float() - want).abs().max() < case.half * want.abs().max()


@every_case
def test_state_dict_deepcopy_and_pickle(case):
    module, x = build(case), case.input()
    want = output(module, x)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    others = [loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for other in others:
        assert torch.equal(output(other, x), want)


@every_case
def test_train_equals_eval_and_runs_repeat(case):
    module, x = build(case), case.input()
    want = output(module.train(), x)
    assert torch.equal(output(module, x), want)
    assert torch.equal(output(module.eval(), x), want)


@every_case
def test_compile(case):
    module, x = build(case), case.input()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, x), output(module, x), rtol=1e-5, atol=1e-6)


@every_case
def test_samples_do_not_see_each_other(case):
    module, x = build(case), case.input()
    want = output(module, x)
    other = x.clone()
    other[1] = (x[1] + 1) % case.tokens if case.tokens else float("nan")
    y = output(module, other)
    keep = [0, 2, 3]
    torch.testing.assert_close(y[keep], want[keep])
    assert not torch.equal(y[1], want[1])


@every_case
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_scale_stays_finite(case, scale):
    if case.tokens:
        pytest.skip("token ids have no scale")
    module = build(case)
    x = (case.input() * scale).requires_grad_()
    y = output(module, x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@every_case
def test_zero_samples(case):
    x = case.input()[:0]
    y = output(build(case), x)
    assert y.shape[0] == 0


@every_case
def test_non_contiguous_input(case):
    module, x = build(case), case.input()
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(output(module, strided), output(module, x))


@every_case
def test_wrong_features_are_refused(case):
    if not case.features:
        pytest.skip("checked by torch")
    with pytest.raises(ValueError, match=case.features):
        build(case)(torch.randn(*case.shape[:-1], 5))


@every_case
def test_repr_shows_the_settings(case):
    for text in case.shows:
        assert text in repr(case.make())


@every_case
def test_gradients_reach_every_parameter(case):
    module = build(case)
    y = output(module, case.input())
    (y * torch.randn_like(y)).sum().backward()
    zero = [name for name, parameter in module.named_parameters() if not parameter.grad.abs().max() > 0]
    assert not zero
