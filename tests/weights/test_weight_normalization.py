"""Weight normalization: the equations of Salimans & Kingma (2016) in float64, torch's own, and the initialization."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from evenly.nn import BatchNorm, MeanOnlyBatchNorm
from evenly.weights import (
    WeightNorm,
    data_dependent_init_,
    from_torch_state_dict,
    remove_weight_norm,
    weight_norm,
    weight_normalize_,
)

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def units(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """(output units, everything that feeds them), from the definition of each kind of layer."""
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    g = layer.groups
    w = weight.reshape(g, layer.in_channels // g, layer.out_channels // g, -1)
    return w.transpose(1, 2).reshape(layer.out_channels, -1)


def parts(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


@every_layer
@pytest.mark.parametrize("gain", ["linear", "exp"])
def test_the_function_stays_and_lengths_are_those_of_units(name, gain):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    before, plain = layer(x), layer.weight.detach().clone()
    assert weight_norm(layer, gain=gain) is layer
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    g, v = parts(layer)
    torch.testing.assert_close(v.detach(), plain, rtol=0, atol=0)
    with torch.no_grad():
        g.copy_(torch.randn_like(g))  # any sign
        v.mul_(3).add_(0.1)
    lengths = g.exp() if gain == "exp" else g
    flat = units(layer, v)
    want = lengths.reshape(-1, 1) * flat / flat.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(units(layer, layer.weight), want, rtol=1e-12, atol=1e-12)
    scaled = layer.weight.detach().clone()
    with torch.no_grad():
        v.mul_(7.0)
    torch.testing.assert_close(layer.weight.detach(), scaled, rtol=1e-12, atol=1e-12)
    y = layer(x)
    remove_weight_norm(layer)
    assert type(layer) is type(make())
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


def test_gradients_are_the_closed_forms():
    layer = weight_norm(nn.Linear(5, 4, bias=False).double())
    g, v = parts(layer)
    with torch.no_grad():
        g.mul_(1.7)
    x, t = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    w = layer.weight
    dw, dg, dv = torch.autograd.grad(((layer(x) - t) ** 2).sum(), (w, g, v), retain_graph=True, materialize_grads=True)
    w = w.detach()
    if not dw.any():  # layer(x) computes the weight anew
        dw = 2 * (x @ w.T - t).T @ x
    length = v.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(dg, (dw * v.detach()).sum(1, keepdim=True) / length)
    project = torch.eye(5, dtype=torch.float64) - w[:, :, None] * w[:, None] / w.square().sum(1)[:, None, None]
    torch.testing.assert_close(dv, g.detach() / length * torch.einsum("oij,oj->oi", project, dw))
    assert (dv * v.detach()).sum(1).abs().max() < 1e-10 * dv.abs().max()
    lengthened = (v.detach() - 0.1 * dv).square().sum(1)
    torch.testing.assert_close(lengthened, v.detach().square().sum(1) + 0.01 * dv.square().sum(1))


@every_layer
def test_equals_torch_in_values_gradients_and_training(name):
    make, shape = LAYERS[name]
    if name == "transposed grouped":
        pytest.skip("torch's function has one length for units of different groups")
    plain = make()
    theirs = parametrizations.weight_norm(copy.deepcopy(plain), dim=1 if name == "transposed" else 0)
    ours = weight_norm(copy.deepcopy(plain))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    for _ in range(5):
        x = torch.randn(shape)
        ya, yb = ours(x), theirs(x)
        torch.testing.assert_close(ya, yb, rtol=1e-5, atol=1e-6)
        for y, optimizer in zip((ya, yb), optimizers, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    g, v = (p.detach() for p in parts(ours)) if ours.bias is not None else ()
    want = torch._weight_norm(v, g, 1 if name == "transposed" else 0)
    torch.testing.assert_close(ours.weight.detach(), want)


def test_one_length_for_all_and_other_axes():
    layer = weight_norm(nn.Linear(3, 2), dim=None)
    assert parts(layer)[0].shape == ()
    theirs = parametrizations.weight_norm(nn.Linear(3, 2), dim=None)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs.weight, layer.weight)
    layer = weight_norm(nn.Linear(3, 2), dim=1)
    assert parts(layer)[0].shape == (1, 3)
    torch.testing.assert_close(layer.weight.norm(dim=0), parts(layer)[0][0].abs())


@pytest.mark.parametrize("gain", ["linear", "exp"])
def test_state_dicts_of_torch(gain):
    def net():
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))

    x = torch.randn(2, 1, 4, 4)
    new, plain = net(), net()
    for layer in (new[0], new[2]):
        parametrizations.weight_norm(layer)
    with pytest.warns(FutureWarning):
        old = nn.Sequential(
            nn.utils.weight_norm(nn.Conv2d(1, 3, 3)), nn.Flatten(), nn.utils.weight_norm(nn.Linear(12, 2))
        )
    for theirs in (new, old, plain):
        ours = net()
        weight_normalize_(ours, gain=gain)
        ours.load_state_dict(from_torch_state_dict(ours, theirs.state_dict()), strict=True)
        torch.testing.assert_close(ours(x), theirs(x))
        if theirs is old:  # also without translation
            other = net()
            weight_normalize_(other, gain=gain)
            other.load_state_dict(theirs.state_dict(), strict=True)
            torch.testing.assert_close(other(x), theirs(x))
    with torch.no_grad():
        new[0].parametrizations.weight.original0.neg_()
    if gain == "exp":
        with pytest.raises(ValueError, match="0 or below"):
            from_torch_state_dict(ours, new.state_dict())
    other = weight_norm(nn.Linear(3, 2), dim=1)
    with pytest.raises(ValueError, match="another axis"):
        from_torch_state_dict(other, parametrizations.weight_norm(nn.Linear(3, 2)).state_dict())


def test_recurrent_layers_normalize_input_and_state_apart():
    lstm, cell = nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.GRUCell(3, 4)
    x = torch.randn(5, 2, 3)
    before, before_cell = lstm(x)[0], cell(x[0])
    assert weight_normalize_(nn.ModuleList([lstm, cell])) == ["0", "1"]
    assert len(lstm.parametrizations) == 8
    torch.testing.assert_close(lstm(x)[0], before)
    torch.testing.assert_close(cell(x[0]), before_cell)
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(3)
    assert not torch.allclose(lstm(x)[0], before)
    assert lstm.parametrizations.weight_hh_l0.original0.shape == (16, 1)
    lstm(x)[0].sum().backward()
    assert lstm.parametrizations.weight_ih_l1.original1.grad.abs().max() > 0


def test_whitened_input_makes_it_batch_normalization():
    x = torch.randn(200, 4, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x)).mT)
    layer = weight_norm(nn.Linear(4, 3).double())
    norm = BatchNorm(3, eps=0.0, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(parts(layer)[0][:, 0])
        norm.bias.copy_(layer.bias)
    want = norm(x @ parts(layer)[1].T)
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments():
    with pytest.raises(ValueError, match="no parameter 'wieght'"):
        weight_norm(nn.Linear(3, 2), "wieght")
    with pytest.raises(ValueError, match="parametrized already, by WeightNorm"):
        weight_norm(weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="dim=2"):
        weight_norm(nn.Linear(3, 2), dim=2)
    with pytest.raises(ValueError, match="negative"):
        weight_norm(nn.Linear(3, 2), dim=-1)
    with pytest.raises(ValueError, match="gain"):
        weight_norm(nn.Linear(3, 2), gain="square")
    with pytest.raises(ValueError, match="transposed_groups"):
        WeightNorm(0, transposed_groups=2)
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1] = 0
    with pytest.raises(ValueError, match=r"zero norm.*1 output units"):
        weight_norm(layer)
    assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="no weight normalization"):
        remove_weight_norm(nn.Linear(3, 2))


def test_models():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert weight_normalize_(model, only=["2"]) == ["2"]
    assert weight_normalize_(model) == ["0"]
    assert weight_normalize_(model) == []
    with pytest.raises(ValueError, match="nowhere"):
        weight_normalize_(model, only=["nowhere"])
    with pytest.raises(ValueError, match="no linear"):
        weight_normalize_(nn.ReLU())
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one parameter"):
        weight_normalize_(tied)
    assert not parametrize.is_parametrized(tied[2])
    assert weight_normalize_(tied, only=lambda name, module: name == "2") == ["2"]
    dead = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.zeros_(dead[1].weight)
    with pytest.raises(ValueError, match=r"1\.weight: zero norm"):
        weight_normalize_(dead)
    assert not parametrize.is_parametrized(dead[0])
    again = pickle.loads(pickle.dumps(WeightNorm()))
    assert repr(again) == "WeightNorm(dim=0, gain='linear')"
    with pytest.raises(RuntimeError, match=r"(?i)serializ"):  # torch's rule for parametrized modules
        pickle.dumps(model)
    assert torch.equal(copy.deepcopy(model)(torch.ones(2, 3)), model(torch.ones(2, 3)))


# ---- the initialization ----------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Registered in another order than it runs, with a residual and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.a = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.norm = MeanOnlyBatchNorm(6)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = x + torch.relu(self.norm(self.b(x)))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def outputs(model, batches):
    """The outputs of each layer over all batches: (unit, values)."""
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name, layer, y):
        found.setdefault(name, []).append(y.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).detach())

    handles = [
        layer.register_forward_hook(lambda layer, x, y, name=name: keep(name, layer, y))
        for name, layer in model.named_modules()
        if parametrize.is_parametrized(layer)
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values, 1) for name, values in found.items()}


@pytest.mark.parametrize("gain", ["linear", "exp"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_unit_has_mean_0_and_variance_1(gain, count):
    model = Branching().eval()  # the running mean of the layer between stays what it is
    weight_normalize_(model, gain=gain)
    batches = [torch.randn(16, 2, 8, 8) * 3 + 1 for _ in range(count)]
    state = model.norm.running_mean.clone()
    order = data_dependent_init_(model, batches[0] if count == 1 else batches)
    assert order == ["a", "b", "up", "head"]
    measured = outputs(model, batches)
    assert list(measured) == order
    for values in measured.values():
        assert values.mean(1).abs().max() < 1e-5
        assert (values.var(1, correction=0) - 1).abs().max() < 1e-4
    assert torch.equal(model.norm.running_mean, state)
    assert 0.04 < float(parts(model.b)[1].detach().std()) < 0.06


def test_it_is_the_paper_step_by_step():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    weight_normalize_(model)
    x = torch.randn(50, 4, dtype=torch.float64)
    data_dependent_init_(model, x, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    v = [torch.empty(shape, dtype=torch.float64).normal_(0, 0.05, generator=generator) for shape in ((6, 4), (3, 6))]
    h = x
    for layer, direction in zip((model[0], model[2]), v, strict=True):
        torch.testing.assert_close(parts(layer)[1].detach(), direction)
        t = h @ (direction / direction.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(parts(layer)[0].detach()[:, 0], 1 / t.std(0, correction=0))
        torch.testing.assert_close(layer.bias.detach(), -t.mean(0) / t.std(0, correction=0))
        h = torch.relu((t - t.mean(0)) / t.std(0, correction=0))


def test_batches_and_other_parametrizations():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[2])
    x = torch.randn(60, 4)
    before = parts(model[0])[1].detach().clone()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(60)), batch_size=25)
    assert data_dependent_init_(model, loader, v_std=None) == ["0", "2"]
    assert torch.equal(parts(model[0])[1], before)
    y = model[0](x)
    assert (y.var(0, correction=0) - 1).abs().max() < 1e-4
    assert y.mean(0).abs().max() > 1e-4  # without a bias
    assert model(x).mean(0).abs().max() < 1e-5
    assert data_dependent_init_(model, [{"input": x}], only=["2"]) == ["2"]


def test_the_initialization_refuses():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="weight_normalize_"):
        data_dependent_init_(model, torch.randn(8, 4))
    weight_normalize_(model)
    with pytest.raises(RuntimeError, match="no variance"):
        data_dependent_init_(model, torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"Units \[0, 1, 2, 3, 4, 5\] of '0' are constant"):
        data_dependent_init_(model, torch.ones(8, 4))
    data_dependent_init_(model, torch.ones(8, 4), dead="keep")
    assert torch.equal(parts(model[0])[0], torch.ones(6, 1))
    with pytest.raises(ValueError, match="only once"):
        data_dependent_init_(model, iter([torch.randn(8, 4)]))
    with pytest.raises(ValueError, match="empty"):
        data_dependent_init_(model, [])
    with pytest.raises(TypeError, match="float"):
        data_dependent_init_(model, 3.0)
    with pytest.raises(ValueError, match="not finite"):
        data_dependent_init_(model, torch.full((8, 4), float("nan")))
    with pytest.raises(ValueError, match="v_std"):
        data_dependent_init_(model, torch.randn(8, 4), v_std=0.0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(self.used(x))

    twice = Twice()
    weight_normalize_(twice)
    with pytest.raises(ValueError, match="does not call \\['idle'\\]"):
        data_dependent_init_(twice, torch.randn(8, 4))
    with pytest.raises(ValueError, match="more than once"):
        data_dependent_init_(twice, torch.randn(8, 4), only=["used"])
    other = nn.Sequential(weight_norm(nn.Linear(4, 3), dim=1))
    with pytest.raises(ValueError, match="along axis 1"):
        data_dependent_init_(other, torch.randn(8, 4))


def test_it_trains_deep_networks_that_plain_weights_do_not():
    def net():
        torch.manual_seed(0)
        layers = []
        for _ in range(4):
            linear = nn.Linear(32, 32)
            nn.init.normal_(linear.weight, std=0.02)
            layers += [linear, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(32, 2))

    x = torch.randn(128, 32)
    t = (x[:, 0] > 0).long()
    losses = []
    for normed in (False, True):
        model = net()
        if normed:
            weight_normalize_(model)
            data_dependent_init_(model, x, v_std=None, dead="keep")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.6
    assert losses[1] < 0.4
