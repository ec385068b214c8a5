"""Shifted domains and corruptions of tables: the second axis of robustness, and its counterpart for tabular data.

A *domain* keeps the classes and changes where the data come from: other contrast, other background, another pose;
for a table, drifting sensors, missing cells, another population. :func:`domains_for` lists those of a data set and
:func:`apply_domain` makes its shifted test split. :func:`corruption_suite` gives the graded corruptions (types by
5 severities): the 15 image types of :mod:`evenly.data.corruptions`, or the tabular types here. Use both to see
whether a network that is good on its own test split stays good.

Tabular values are taken to be standardised (mean 0, std 1 on the training split), as :func:`evenly.data.load` gives
them: x -> x + N(0, s^2) (noise), x -> 0 with probability p (missing, filled with the mean),
x -> x exp(s g_j) (scale drift) and x -> x + s g_j (offset drift) with one g_j ~ N(0, 1) a feature, x_j <-> x_k for a
share of the features of a row (swap), x -> q round(x / q) (quantize), x -> x +- 5 with probability p (outliers).

The axis of domains follows Dalva et al., "Benchmarking the robustness of instance segmentation models",
arXiv 2109.01123; the choice of domains for small images and tables is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import overload

import torch
import torch.nn.functional as F

from evenly.data.corruptions import CORRUPTIONS, _check_images, _check_severity, _StreamDraws, corrupt_batch
from evenly.data.loaders import Dataset

__all__ = [
    "DOMAINS",
    "TABULAR_CORRUPTIONS",
    "Corruption",
    "Domain",
    "apply_domain",
    "corrupt_table",
    "corruption_suite",
    "domains_for",
    "tabular_corruptions",
]

#: (x, y, seed) -> (x, y) of the shifted domain.
Domain = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
#: (x, severity, seed) -> x; takes ``start=`` too, the index of the first sample.
Corruption = Callable[..., torch.Tensor]

#: Name of a tabular corruption -> its parameter for severity 1 to 5.
TABULAR_CORRUPTIONS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "gaussian_noise": (0.2, 0.4, 0.7, 1.0, 1.5),
        "missing": (0.05, 0.15, 0.3, 0.5, 0.7),
        "scale_drift": (0.1, 0.25, 0.5, 0.75, 1.0),
        "offset_drift": (0.2, 0.4, 0.7, 1.0, 1.5),
        "swap": (0.1, 0.2, 0.4, 0.6, 0.8),
        "quantize": (0.5, 1.0, 1.5, 2.0, 3.0),
        "outliers": (0.01, 0.03, 0.06, 0.12, 0.25),
    }
)


def domains_for(dataset: Dataset) -> dict[str, Domain]:
    """The shifted domains of the data set's kind: name -> function.

    Example:
        >>> from evenly.data import load
        >>> sorted(domains_for(load("wine")))
        ['feature_noise', 'label_shift', 'missing_cells', 'sensor_drift', 'subpopulation']
    """
    return dict(DOMAINS[dataset.kind])


@overload
def apply_domain(data: Dataset, name: str, seed: int = 0) -> Dataset: ...
@overload
def apply_domain(data: torch.Tensor, name: str, seed: int = 0) -> torch.Tensor: ...
def apply_domain(data: Dataset | torch.Tensor, name: str, seed: int = 0) -> Dataset | torch.Tensor:
    """The test split of a data set, or a batch of samples, as another domain would give it.

    Args:
        data: a data set (its test split is shifted, its training split is kept), or a float tensor: images
            (N, C, H, W) in [0, 1], or standardised rows (N, D).
        name: one of ``DOMAINS["image"]`` or ``DOMAINS["tabular"]``.
        seed: non-negative integer; the result depends on it and the data alone.

    Returns:
        The same type. Domains that draw rows anew (``subpopulation``, ``label_shift``) need the labels, hence
        a data set.

    Raises:
        ValueError: for a name that the kind of data does not have, or a tensor where labels are needed.

    Example:
        >>> from evenly.data import load
        >>> digits = load("digits")
        >>> shifted = apply_domain(digits, "inverted")
        >>> bool(torch.allclose(shifted.test_x, 1 - digits.test_x))
        True
    """
    if isinstance(data, Dataset):
        domain = _domain(data.kind, name)
        x, y = domain(data.test_x, data.test_y, seed)
        return dataclasses.replace(data, name=f"{data.name} ({name})", test_x=x, test_y=y)
    if not isinstance(data, torch.Tensor) or data.ndim not in (2, 4):
        got = tuple(data.shape) if isinstance(data, torch.Tensor) else type(data).__name__
        raise TypeError(f"expected a Dataset, images (N, C, H, W) or rows (N, D); got {got}")
    domain = _domain("image" if data.ndim == 4 else "tabular", name)
    if name in _RESAMPLING:
        raise ValueError(f"the domain {name!r} draws rows anew and needs their labels: pass the Dataset")
    return domain(data, torch.zeros(len(data), dtype=torch.int64), seed)[0]


def corruption_suite(dataset: Dataset) -> dict[str, Corruption]:
    """The corruptions of the data set's kind: name -> function of (x, severity, seed), severity 1 to 5.

    Images: :func:`evenly.data.corrupt_batch` with its name filled in; tables: :func:`corrupt_table`, less ``swap``
    where there is one feature. x is what the
    data set holds, before ``dataset.normalize``. Pass ``start=`` when x is a later batch.

    Example:
        >>> from evenly.data import load
        >>> digits = load("digits")
        >>> suite = corruption_suite(digits)
        >>> len(suite), suite["contrast"](digits.test_x, 5, 0).shape
        (15, torch.Size([360, 1, 8, 8]))
    """
    if dataset.kind == "image":
        return {name: _NamedCorruption(corrupt_batch, name) for name in CORRUPTIONS}
    suite = tabular_corruptions()
    if dataset.input_shape[0] < 2:
        del suite["swap"]
    return suite


def tabular_corruptions() -> dict[str, Corruption]:
    """The corruptions of tables: name -> function of (x, severity, seed)."""
    return {name: _NamedCorruption(corrupt_table, name) for name in TABULAR_CORRUPTIONS}


def corrupt_table(x: torch.Tensor, name: str, severity: int, *, seed: int = 0, start: int = 0) -> torch.Tensor:
    """Corrupt standardised rows (the equations are at the top of the module).

    Row i depends on (seed, name, severity, start + i), the drifts on (seed, name) and their severity alone, so a
    split into batches changes nothing and a drift grows along one direction.

    Args:
        x: float tensor (N, D), standardised.
        name: one of :data:`TABULAR_CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: non-negative integer.
        start: the index of the first row in its data set.

    Raises:
        TypeError: if ``x`` is not a floating-point tensor.
        ValueError: for an unknown name, a severity outside 1 to 5, a wrong shape.

    Example:
        >>> corrupt_table(torch.tensor([[0.6, -1.2]]), "quantize", 2)
        tensor([[ 1., -1.]])
    """
    if name not in TABULAR_CORRUPTIONS:
        raise ValueError(f"unknown tabular corruption {name!r}; the valid names are: {', '.join(TABULAR_CORRUPTIONS)}")
    _check_severity(severity)
    _check_rows(x)
    p = TABULAR_CORRUPTIONS[name][severity - 1]
    code = 1024 + 16 * list(TABULAR_CORRUPTIONS).index(name)
    features = x.shape[1]
    draws = _StreamDraws(seed, code + severity, len(x), start)

    def uniform() -> torch.Tensor:
        return torch.from_numpy(draws.uniform(features)).to(x)

    if name == "gaussian_noise":
        return x + p * torch.from_numpy(draws.normal(features)).to(x)
    if name == "missing":
        return torch.where(uniform() < p, torch.zeros_like(x), x)
    if name == "quantize":
        return p * torch.round(x / p)
    if name == "outliers":
        u = uniform()
        return x + 5 * ((u < p / 2).to(x) - ((u >= p / 2) & (u < p)).to(x))
    if name == "swap":
        return _swap(x, p, uniform())
    drift = torch.from_numpy(_StreamDraws(seed, code, 1, 0).normal(features)).to(x)
    return x * torch.exp(p * drift) if name == "scale_drift" else x + p * drift


# -------------------------------------------------------------------------------------------------------- images


def _image_domain(function: Callable[[torch.Tensor, int], torch.Tensor]) -> Domain:
    def domain(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        _check_images(x)
        out = function(x.detach().to("cpu", torch.float32), seed) if len(x) else x
        return out.clamp(0, 1).to(x), y

    domain.__doc__, domain.__name__ = function.__doc__, function.__name__.lstrip("_")
    return domain


def _uniform(x: torch.Tensor, seed: int, code: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(_StreamDraws(seed, 2048 + code, len(x), 0).uniform(*shape)).float()


def _inverted(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The negative: 1 - x."""
    return 1 - x


def _intensity(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Another exposure, one for all images: 0.5 x + 0.3."""
    return 0.5 * x + 0.3


def _gradient(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Light from one side, in a random direction an image: up to 0.6 of what is missing to white is added."""
    h, w = x.shape[2:]
    angle = 2 * math.pi * _uniform(x, seed, 0, 1)[:, 0, None, None]
    ys, xs = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)
    ramp = torch.sin(angle) * ys + torch.cos(angle) * xs
    return x + (1 - x) * 0.6 * ((ramp / math.sqrt(2) + 1) / 2)[:, None]


def _background(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A random coarse texture behind the image: up to 0.6 of what is missing to white is added."""
    coarse = _uniform(x, seed, 1, 4, 4)[:, None]
    texture = F.interpolate(coarse, size=x.shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
    return x + (1 - x) * 0.6 * texture


def _warp(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Sample x (N, C, H, W) at matrix (N, 2, 3) times the output's place, in pixels from the centre; edges repeat."""
    h, w = x.shape[2:]
    ys, xs = torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2
    place = torch.stack([xs.expand(h, w), ys[:, None].expand(h, w), torch.ones(h, w)])
    at = torch.einsum("nij,jhw->nhwi", matrix, place) * torch.tensor([2 / w, 2 / h])
    return F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False)


def _translated(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A shift by 1/8 to 1/5 of the side, in a random direction an image."""
    u = _uniform(x, seed, 2, 2)
    angle, length = 2 * math.pi * u[:, 0], min(x.shape[2:]) * (0.125 + 0.075 * u[:, 1])
    matrix = torch.eye(2, 3).repeat(len(x), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = length * torch.cos(angle), length * torch.sin(angle)
    return _warp(x, matrix)


def _rotated(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A rotation by 15 to 35 degrees, left or right."""
    u = _uniform(x, seed, 3, 2)
    angle = torch.deg2rad(15 + 20 * u[:, 0]) * torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle)
    matrix[:, 0, 1], matrix[:, 1, 0] = -torch.sin(angle), torch.sin(angle)
    return _warp(x, matrix)


def _scaled(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Smaller (0.65 to 0.8) or larger (1.25 to 1.45), by a coin."""
    u = _uniform(x, seed, 4, 2)
    factor = torch.where(u[:, 1] < 0.5, 0.65 + 0.15 * u[:, 0], 1.25 + 0.2 * u[:, 0])
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / factor
    return _warp(x, matrix)


def _stroke(x: torch.Tensor, sign: int) -> torch.Tensor:
    # A dilation by one pixel, blended: 0.4 of it at 8 pixels, all of it at 20, twice at 40.
    amount = min(x.shape[2:]) / 20
    out = sign * x
    while amount > 0:
        grown = F.max_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        out = out + min(1.0, amount) * (grown - out)
        amount -= 1
    return sign * out


def _thick(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Bright parts are thicker: dilation by side / 20 pixels, fractions by blending."""
    return _stroke(x, 1)


def _thin(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Bright parts are thinner: erosion by side / 20 pixels, fractions by blending."""
    return _stroke(x, -1)


# -------------------------------------------------------------------------------------------------------- tables


def _check_rows(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor (N, D) of standardised rows, got {got}")
    if x.ndim != 2:
        raise ValueError(f"rows must have shape (N, D), got {tuple(x.shape)}")


def _swap(x: torch.Tensor, share: float, u: torch.Tensor) -> torch.Tensor:
    """A share of the features of each row change places in a circle; u (N, D) ranks them."""
    count = min(x.shape[1], max(2, round(share * x.shape[1])))
    if x.shape[1] < 2:
        raise ValueError("swap needs at least 2 features, got 1")
    chosen = u.argsort(dim=1)[:, :count]
    return x.scatter(1, chosen, x.gather(1, chosen.roll(1, dims=1)))


def _sensor_drift(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each feature gets a scale exp(0.3 g) and an offset 0.5 g', the same for all rows."""
    _check_rows(x)
    draws = _StreamDraws(seed, 3072, 1, 0)
    scale, offset = (torch.from_numpy(draws.normal(x.shape[1])).to(x) for _ in range(2))
    return x * torch.exp(0.3 * scale) + 0.5 * offset, y


def _missing_cells(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """30 % of the cells are missing at random and filled with the training mean, 0."""
    return corrupt_table(x, "missing", 3, seed=seed), y


def _feature_noise(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian noise of 0.7 training standard deviations on each cell."""
    return corrupt_table(x, "gaussian_noise", 3, seed=seed), y


def _subpopulation(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows on one side of a random direction's median are drawn 9 times as often; as many rows, with replacement."""
    _check_rows(x)
    draws = _StreamDraws(seed, 3104, 1, 0)
    direction = torch.from_numpy(draws.normal(x.shape[1]))[0].double()
    score = x.detach().cpu().double() @ direction
    weight = torch.where(score > score.median(), 9.0, 1.0) if len(x) else score
    return _draw(x, y, weight, draws)


def _label_shift(x: torch.Tensor, y: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each class gets a random weight, from 1 to 9; as many rows, drawn with replacement."""
    _check_rows(x)
    draws = _StreamDraws(seed, 3105, 1, 0)
    classes, index = torch.unique(y.cpu(), return_inverse=True)
    order = torch.from_numpy(draws.uniform(max(1, len(classes))))[0].argsort()
    weights = 9.0 ** (order.double() / max(1, len(classes) - 1))
    return _draw(x, y, weights[index], draws)


def _draw(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, draws: _StreamDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    if not len(x):
        return x, y
    edges = (weight / weight.sum()).cumsum(0)
    rows = torch.searchsorted(edges, torch.from_numpy(draws.uniform(len(x)))[0]).clamp(max=len(x) - 1)
    return x[rows.to(x.device)], y[rows.to(y.device)]


class _NamedCorruption:
    """``function(x, name, severity, seed=, start=)`` with the name filled in; can be pickled."""

    def __init__(self, function: Corruption, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, x: torch.Tensor, severity: int, seed: int = 0, *, start: int = 0) -> torch.Tensor:
        return self.function(x, self.name, severity, seed=seed, start=start)

    def __repr__(self) -> str:
        return f"<corruption {self.name}>"


_RESAMPLING = {"subpopulation", "label_shift"}

#: Kind of data -> name of the domain -> function of (x, y, seed).
DOMAINS: Mapping[str, Mapping[str, Domain]] = MappingProxyType(
    {
        "image": MappingProxyType(
            {
                "inverted": _image_domain(_inverted),
                "intensity": _image_domain(_intensity),
                "gradient": _image_domain(_gradient),
                "background": _image_domain(_background),
                "translated": _image_domain(_translated),
                "rotated": _image_domain(_rotated),
                "scaled": _image_domain(_scaled),
                "thick": _image_domain(_thick),
                "thin": _image_domain(_thin),
            }
        ),
        "tabular": MappingProxyType(
            {
                "sensor_drift": _sensor_drift,
                "missing_cells": _missing_cells,
                "feature_noise": _feature_noise,
                "subpopulation": _subpopulation,
                "label_shift": _label_shift,
            }
        ),
    }
)


def _domain(kind: str, name: str) -> Domain:
    if name not in DOMAINS[kind]:
        raise ValueError(f"unknown domain {name!r} for {kind} data; the valid names are: {', '.join(DOMAINS[kind])}")
    return DOMAINS[kind][name]
