"""What every layer on a manifold must do. The rows are in manifold_cases.py; each check below runs for each row."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from conformance.cases import devices
from conformance.manifold_cases import LABELS, MANIFOLDS, ManifoldCase, N
from evenly.manifolds.geometry import Center

every_case = pytest.mark.parametrize("case", MANIFOLDS, ids=str)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def applies(condition, why):
    if not condition:
        pytest.skip(why)


def close(a, b, tolerance):
    assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.double().abs().max().item())


def exact(case: ManifoldCase, **settings):
    """The layer with gradients through the statistics, where it can be asked for them."""
    if case.normalizes and not case.domains:
        settings["detach_stats"] = False
    return case.build(**settings)


# ---- the manifold ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_output_stays_on_the_manifold(case, dtype):
    applies(case.onto, "it leaves the manifold on purpose")
    layer, x = case.build(dtype), case.draw(dtype=dtype)
    for mode in (layer.train(), layer.eval()):
        y = case.call(mode, x)
        assert y.dtype == dtype
        assert case.manifold.distance_from(y.detach()) < (1e-12 if dtype == torch.float64 else 1e-5)


@every_case
def test_mean_and_variance_are_controlled(case):
    """The output's mean is B and its variance s² v² / (v² + eps): proposition 4.2."""
    applies(case.normalizes, "it does not normalize")
    layer, x = case.build(), case.draw()
    y = case.call(layer, x)
    inner = layer.norm if case.domains else layer
    geometry, bias = layer.geometry, inner.bias_point()
    for label in (0, 1) if case.domains else (None,):
        rows = label == LABELS if case.domains else slice(None)
        variance = geometry.frechet_variance(x[rows], tol=1e-10)
        wanted = inner.weight**2 * variance / (variance + inner.eps)
        b = geometry.deform(bias).unsqueeze(0) if bias is not None else None
        at = b if b is not None else geometry.identity(case.manifold.n).unsqueeze(0)
        tangent = geometry.log(geometry.deform(y[rows]), Center(at)).value
        assert geometry.square_norm(tangent.mean(0)).sqrt().max() < case.tolerance
        torch.testing.assert_close(geometry.square_norm(tangent).mean(0), wanted, rtol=case.tolerance, atol=0)


@every_case
def test_translations_of_the_batch_do_not_change_it(case):
    applies(case.normalizes, "it does not normalize")
    applies(case.tolerance < 0.1, "one step of the flow starts from a mean that is not invariant")
    layer, x = case.build(), case.draw()
    a = case.draw(1)
    geometry = layer.geometry
    moved = geometry.product(a, x) if case.side == "left" else geometry.product(x, a)
    assert (moved - x).abs().max() > 0.05
    close(case.call(layer, moved), case.call(layer, x), 1e-7)


@every_case
def test_order_of_the_batch_does_not_matter(case):
    layer, x = case.build(), case.draw()
    order = torch.arange(N).view(-1, 2).flip(0).flatten()  # keeps the domains in place
    close(case.call(layer, x[order]), case.call(layer, x)[order], 1e-9)


# ---- numbers ---------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("device", devices())
def test_float32_is_float64_but_for_rounding(case, device):
    layer, x = case.build(torch.float32).to(device), case.draw(dtype=torch.float32).to(device)
    other = copy.deepcopy(layer).double()
    for name in ("train", "eval"):
        y = case.call(getattr(layer, name)(), x)
        assert (y.dtype, y.device.type) == (torch.float32, device)
        close(y, case.call(getattr(other, name)(), x.double()), case.half)


@every_case
def test_gradcheck(case):
    x = case.draw(4)
    for mode in ("train", "eval"):
        applies(not (case.domains and mode == "train"), "its statistics are always detached")
        layer = getattr(exact(case), mode)()
        z = torch.zeros_like(x, requires_grad=True)
        assert gradcheck(lambda z, layer=layer: case.call(layer, case.manifold.move(x, z)), z, fast_mode=True)


@every_case
def test_gradcheck_of_parameters(case):
    layer, x = exact(case).eval(), case.draw(3)
    names = [name for name, p in layer.named_parameters() if getattr(p, "manifold", None) is None]
    applies(names, "no parameters, or only on a manifold")
    values = tuple(dict(layer.named_parameters())[name].detach().clone().requires_grad_() for name in names)

    def run(*values):
        args = (x, LABELS[:3]) if case.domains else (x,)
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), args)

    assert gradcheck(run, values, fast_mode=True)


@every_case
def test_gradcheck_at_repeated_eigenvalues(case):
    applies(not case.domains, "its statistics are always detached")
    x = case.manifold.repeated(4, *case.channels)
    for mode in ("train", "eval"):
        layer = getattr(exact(case), mode)()
        if mode == "train" and case.manifold.n == 3:
            continue  # a batch of equal rotations has variance 0, where the layer divides by the root of eps
        z = torch.zeros_like(x, requires_grad=True)
        assert gradcheck(lambda z, layer=layer: case.call(layer, case.manifold.move(x, z)), z, fast_mode=True)


@every_case
def test_second_derivative(case):
    layer, x = exact(case).eval(), case.draw(2)
    z = torch.zeros_like(x, requires_grad=True)

    def run(z):
        return case.call(layer, case.manifold.move(x, z))

    if case.twice:
        assert gradgradcheck(run, z, fast_mode=True)
    else:
        (grad,) = torch.autograd.grad(run(z).square().sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ill_conditioned(case, dtype):
    """A matrix with condition number 1e8 (1e3 in float32): finite gradients, and the answer of float64."""
    applies(case.manifold.n == 4, "rotations all have condition number 1")
    x = case.draw()
    values, vectors = torch.linalg.eigh(x)
    digits = 8 if dtype == torch.float64 else 3
    if case.normalizes and not case.domains:  # it is the deformed matrix that counts
        digits /= max(1.0, getattr(case.make().geometry, "theta", 1.0))
    spread = torch.logspace(0, -digits, 4, dtype=torch.float64)
    x[1:] = ((vectors * spread) @ vectors.mT)[1:] * values[1:, ..., -1:, None]
    if "Correlation" in case.name:
        deviation = x.diagonal(dim1=-2, dim2=-1).sqrt()
        x = x / (deviation.unsqueeze(-1) * deviation.unsqueeze(-2))
    x = (0.5 * (x + x.mT)).to(dtype)
    layer = case.build(dtype, **({"karcher_tol": 1e-4} if "CRIM" in case.name or "AIM" in case.name else {}))
    x.requires_grad_()
    y = case.call(layer, x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    if dtype == torch.float32:
        close(y, case.call(case.build(torch.float64), x.detach().double()), 2e-2)


@every_case
def test_batch_of_one_and_equal_matrices(case):
    """No variance: the output is B, and gradients are finite."""
    layer, x = case.build(), case.draw(1)
    for batch in (x, x.expand(6, *x.shape[1:]).clone()):
        batch = batch.clone().requires_grad_()
        y = case.call(layer.train(), batch)
        y.sum().backward()
        assert batch.grad.isfinite().all()
        if case.normalizes:
            inner = layer.norm if case.domains else layer
            bias = inner.bias_point()
            eye = torch.eye(case.manifold.n, dtype=torch.float64)
            close(y, (eye if bias is None else bias).expand_as(y), 1e-6)


@every_case
def test_runs_repeat(case):
    x = case.draw()
    first, second = (case.call(case.build(), x) for _ in range(2))
    assert torch.equal(first, second)


# ---- modes and state -------------------------------------------------------------------------------------


@every_case
def test_train_and_eval(case):
    layer, x = case.build(), case.draw()
    trained = case.call(layer.train(), x)
    state = copy.deepcopy(layer.state_dict())
    y = case.call(layer.eval(), x)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    if not case.normalizes:
        assert torch.equal(y, trained)
        return
    assert torch.allclose(y, trained) == (getattr(layer, "momentum", 0.1) is None)  # the average of one batch
    # With momentum 1 the running statistics are the batch's.
    if case.domains:
        layer.set_momentum(1.0, 1.0)
    else:
        layer.momentum = 1.0
    trained = case.call(layer.train(), x)
    close(case.call(layer.eval(), x), trained, 1e-8)


@every_case
def test_running_state_approaches_the_batch(case):
    applies(case.normalizes, "no state")
    layer, x = case.build(), case.draw()
    suffix = "_test" if case.domains else ""
    start = getattr(layer, f"running_var{suffix}").clone()
    case.call(layer.train(), x)
    first = getattr(layer, f"running_var{suffix}").clone()
    assert not torch.equal(first, start)
    if case.domains:
        layer.set_momentum(0.5, 0.5)
    elif layer.momentum is not None:
        layer.momentum = 0.5
    for _ in range(30):
        with torch.no_grad():
            case.call(layer, x)
    want = case.call(layer.train(), x)
    close(case.call(layer.eval(), x), want, 1e-6)
    if not case.domains:
        layer.reset_parameters()
        assert torch.equal(layer.running_var, start)
        fresh = case.make(dtype=torch.float64)
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in layer.state_dict().items())


@every_case
def test_state_dict_deepcopy_and_pickle(case):
    layer, x = case.build(), case.draw()
    case.call(layer, x)
    layer.eval()
    want = case.call(layer, x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.make(dtype=torch.float64).eval()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    others = [loaded, copy.deepcopy(layer)]
    if not hasattr(layer, "parametrizations"):  # torch does not pickle parametrized modules
        others.append(pickle.loads(pickle.dumps(layer)))
    for other in others:
        assert torch.equal(case.call(other, x), want)
        assert [type(p) for p in other.parameters()] == [type(p) for p in layer.parameters()]


@every_case
def test_checkpointing_moves_the_state_once(case):
    applies(case.normalizes, "no state")
    x = case.draw()
    plain, again = case.build(), case.build()
    case.call(plain, x.clone().requires_grad_()).sum().backward()
    given = x.clone().requires_grad_()
    checkpoint(lambda x: case.call(again, x), given, use_reentrant=False).sum().backward()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in plain.state_dict().items())


# ---- torch -----------------------------------------------------------------------------------------------


@every_case
def test_compile(case):
    """One graph where no number of steps depends on the values; else with breaks."""
    layer, x = case.build(), case.draw()
    if any(getattr(p, "manifold", None) is not None for p in layer.parameters()):
        pytest.skip("torch does not trace geoopt's subclass of tensors")
    applies(not case.variant, "compiled with other settings")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=case.whole, backend="eager")
    given, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    case.call(compiled, given).square().sum().backward()
    case.call(layer, want).square().sum().backward()
    close(given.grad, want.grad, 1e-9)


@every_case
def test_autocast_changes_nothing(case):
    layer, x = case.build(torch.float32), case.draw(dtype=torch.float32)
    want = case.call(copy.deepcopy(layer), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.call(layer, x), want)


@every_case
def test_non_contiguous_input(case):
    layer, x = case.build(), case.draw()
    want = case.call(copy.deepcopy(layer), x)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    close(case.call(layer, strided), want, 1e-12)


@every_case
def test_parameters_are_trained_on_the_manifold(case):
    """Steps of an optimizer lower a loss; what lives on a manifold stays there."""
    import geoopt

    layer, x = case.build(), case.draw()
    applies(list(layer.parameters()), "no parameters")
    goal = case.call(copy.deepcopy(layer), case.draw()).detach()
    optimizer = geoopt.optim.RiemannianAdam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (case.call(layer, x) - goal).square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        assert any(p.grad.abs().max() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for p in layer.parameters():
        if getattr(p, "manifold", None) is not None:
            p.manifold.assert_check_point(p)


# ---- refusals --------------------------------------------------------------------------------------------


@every_case
def test_bad_matrices_are_named(case):
    applies(case.manifold.wrong, "a linear map takes any matrix")
    layer = case.build()
    for mode in (layer.train(), layer.eval()):
        for spoil, message in case.manifold.wrong:
            x = case.draw()
            x[2] = spoil(x[2])
            with pytest.raises(ValueError, match=message):
                case.call(mode, x)


@every_case
def test_bad_shapes_and_types_are_refused(case):
    layer, x = case.build(), case.draw()
    with pytest.raises(ValueError, match=r"got (shape )?\("):
        case.call(layer, x[..., :2])
    with pytest.raises(TypeError, match="float16"):
        case.call(layer, x.half())
    if any(True for _ in layer.parameters()):
        with pytest.raises(TypeError, match=r"holds torch.float64 and got torch.float32; convert"):
            case.call(layer, x.float())
        with pytest.raises(ValueError, match=rf"{case.manifold.n}"):
            case.call(layer, torch.eye(6, dtype=torch.float64).expand(N, *case.channels, 6, 6))


@every_case
def test_zero_samples(case):
    layer, x = case.build(), case.draw()[:0]
    y = case.call(layer.eval(), x)
    assert y.shape[0] == 0
    if case.normalizes and not case.domains:
        with pytest.raises(ValueError, match="at least one of the"):
            case.call(layer.train(), x)


@every_case
def test_repr_shows_the_settings(case):
    for text in case.shows:
        assert text in repr(case.make())
