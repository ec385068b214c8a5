"""The table of layers on manifolds: one row a layer with its settings, held to the suite in test_manifolds.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import evenly.manifolds as mf

N = 12  # samples of a batch
LABELS = torch.arange(N) % 2  # and their domains


class Manifold(ABC):
    """Points of a manifold: how to draw them, move them, and tell them."""

    n = 4

    @abstractmethod
    def draw(self, *batch: int) -> Tensor:
        """Points (\\*batch, n, n) in float64."""

    @abstractmethod
    def move(self, x: Tensor, z: Tensor) -> Tensor:
        """Points near ``x``, for any small matrices ``z``; those of ``z`` = 0 are ``x``."""

    @abstractmethod
    def distance_from(self, x: Tensor) -> float:
        """How far ``x`` is from being on the manifold."""

    @abstractmethod
    def repeated(self, *batch: int) -> Tensor:
        """Points with equal eigenvalues, or as special as the manifold has."""

    #: wrong points in the place of the third, and a part of the message
    wrong: tuple[tuple[Callable[[Tensor], Tensor], str], ...] = ()


class Covariances(Manifold):
    def draw(self, *batch):
        a = torch.randn(*batch, self.n, 2 * self.n, dtype=torch.float64)
        return a @ a.mT / (2 * self.n)

    def move(self, x, z):
        return x + 0.5 * (z + z.mT)

    def distance_from(self, x):
        lowest = torch.linalg.eigvalsh(x).min().clamp(max=0).abs()
        return max(lowest.item(), (x - x.mT).abs().max().item())

    def repeated(self, *batch):
        q = torch.linalg.qr(torch.randn(*batch, self.n, self.n, dtype=torch.float64))[0]
        values = torch.ones(*batch, self.n, dtype=torch.float64)
        values[..., -1] = 2.0
        values.view(-1, self.n)[0] = 3.0  # a multiple of the identity
        values.view(-1, self.n)[1, 0] += 1e-10
        return (q * values.unsqueeze(-2)) @ q.mT

    @staticmethod
    def _indefinite(x):
        return x - 10 * torch.eye(x.shape[-1], dtype=x.dtype)

    @staticmethod
    def _skewed(x):
        return x + torch.ones_like(x).triu(1)

    wrong = (
        (_skewed, r"matrix .*2.* is not symmetric: entries differ"),
        (_indefinite, r"matrix .*2.* is not positive definite: its smallest eigenvalue is -\d"),
        (lambda x: x * float("nan"), r"matrix .*2.* holds NaN or infinity"),
        (lambda x: x / 0, r"matrix .*2.* holds NaN or infinity"),
    )


class Correlations(Covariances):
    def draw(self, *batch):
        return mf.correlation(super().draw(*batch))

    def move(self, x, z):
        return mf.correlation(super().move(x, z))

    def distance_from(self, x):
        return max(super().distance_from(x), (x.diagonal(dim1=-2, dim2=-1) - 1).abs().max().item())

    def repeated(self, *batch):
        eye = torch.eye(self.n, dtype=torch.float64)
        equal = torch.linspace(0, 0.5, max(1, batch[0]), dtype=torch.float64)[:, None, None]
        x = (1 - equal) * eye + equal  # the first is the identity, the others have n - 1 equal eigenvalues
        return x.view(batch[0], *([1] * (len(batch) - 1)), self.n, self.n).expand(*batch, self.n, self.n).clone()

    wrong = (
        (Covariances._skewed, r"matrix .*2.* is not symmetric"),
        (lambda x: 2 * x, r"matrix .*2.* is not a correlation matrix: its diagonal differs from 1 by 1"),
        (lambda x: 2 * torch.eye(x.shape[-1]).to(x) - x * 0 - 1 + 0 * x, r"matrix .*2.*"),
        (lambda x: x * float("nan"), r"matrix .*2.* holds NaN or infinity"),
    )


class Rotations(Manifold):
    n = 3

    def draw(self, *batch):
        v = 0.5 * torch.randn(*batch, 3, 3, dtype=torch.float64)
        return torch.linalg.matrix_exp(v - v.mT)

    def move(self, x, z):
        return x @ torch.linalg.matrix_exp(z - z.mT)

    def distance_from(self, x):
        eye = torch.eye(3, dtype=x.dtype)
        return max((x.mT @ x - eye).abs().max().item(), (torch.linalg.det(x) - 1).abs().max().item())

    def repeated(self, *batch):
        # All the same: the centred batch is the identity, where angle and axis are lost.
        return self.draw().expand(*batch, 3, 3).clone()

    wrong = (
        (lambda x: 2 * x, r"matrix .*2.* is not a rotation: R.mT @ R differs"),
        (lambda x: -x, r"matrix .*2.* is a reflection"),
        (lambda x: x * float("nan"), r"matrix .*2.* holds NaN or infinity"),
    )


class SymmetricOnly(Covariances):
    """Any symmetric matrices are welcome."""

    wrong = (
        (Covariances._skewed, r"matrix .*2.* is not symmetric: entries differ"),
        (lambda x: x * float("nan"), r"matrix .*2.* holds NaN or infinity"),
    )


class Unchecked(Covariances):
    """Linear maps of matrices: what is on the manifold stays there, and nothing else is promised."""

    wrong = ()


@dataclass(frozen=True)
class ManifoldCase:
    """A layer on a manifold: ``make(device=, dtype=, **settings)`` builds it."""

    name: str
    objects: tuple[str, ...]  # "module:Name", as in the catalog
    make: Callable[..., nn.Module]
    manifold: Manifold = field(default_factory=Covariances)
    channels: tuple[int, ...] = ()
    catalog: str = "liebn"
    normalizes: bool = True  # it has a geometry, statistics, weight and bias
    domains: bool = False  # it also takes the label of each matrix's domain
    side: str = "left"  # translations of the batch from here do not change the output
    onto: bool = True  # the output is on the manifold too
    twice: bool = True  # it has second derivatives
    whole: bool = True  # it compiles to one graph
    variant: bool = False  # it compiles as another row does
    shows: tuple[str, ...] = ()  # what its repr must print
    tolerance: float = 1e-6  # of mean and variance in float64
    half: float = 1e-5  # largest relative error in float32

    def __str__(self) -> str:
        return self.name

    def draw(self, samples: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.manifold.draw(samples, *self.channels).to(dtype)

    def build(self, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
        """The layer with a scale and a bias that are not the fresh ones, which hide mistakes."""
        torch.manual_seed(3)
        layer = self.make(dtype=torch.float64, **settings)
        if self.normalizes:
            with torch.no_grad():
                inner = layer.norm if self.domains else layer
                inner.weight.add_(0.3 * torch.rand_like(inner.weight))
                if inner.bias is not None:
                    if inner.parametrization == "manifold":
                        inner.bias.copy_(self.manifold.draw(*self.channels))
                    else:
                        inner.bias.copy_(0.3 * torch.randn_like(inner.bias))
        return layer.to(dtype)

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, LABELS[: len(x)]) if self.domains else layer(x)


def _spd(metric: str, *, channels: tuple[int, ...] = (), **settings: Any) -> Callable[..., nn.Module]:
    settings = {"parametrization": "free", "karcher_tol": 1e-10, **settings}
    return lambda **more: mf.LieBNSPD((*channels, 4, 4), metric, **{**settings, **more})


def _rotation(**settings: Any) -> Callable[..., nn.Module]:
    settings = {"parametrization": "free", "karcher_tol": 1e-10, **settings}
    return lambda **more: mf.LieBNRotation(3, **{**settings, **more})


def _correlation(metric: str) -> Callable[..., nn.Module]:
    return lambda **more: mf.LieBNCorrelation(4, metric, **more)


_LIE = ("evenly.manifolds:LieBNSPD", "evenly.manifolds:SPD")
_ROTATION = ("evenly.manifolds:LieBNRotation", "evenly.manifolds:SO3")
_CORRELATION = ("evenly.manifolds:LieBNCorrelation", "evenly.manifolds:Correlation")

MANIFOLDS = (
    ManifoldCase("LieBNSPD (LEM)", _LIE, _spd("LEM"), shows=("(4, 4), SPD('LEM', alpha=1, beta=0)", "momentum=0.1")),
    ManifoldCase(
        "LieBNSPD (LEM, weighted, channels)",
        _LIE,
        _spd("LEM", alpha=2.0, beta=-0.3, channels=(3,)),
        channels=(3,),
        variant=True,
        shows=("(3, 4, 4)", "alpha=2, beta=-0.3"),
    ),
    ManifoldCase("LieBNSPD (LCM)", _LIE, _spd("LCM"), shows=("SPD('LCM', theta=1)",)),
    ManifoldCase("LieBNSPD (LCM, θ 0.5)", _LIE, _spd("LCM", theta=0.5), variant=True, shows=("theta=0.5",)),
    ManifoldCase("LieBNSPD (LCM, θ -0.5)", _LIE, _spd("LCM", theta=-0.5), variant=True),
    ManifoldCase("LieBNSPD (AIM)", _LIE, _spd("AIM"), whole=False),
    ManifoldCase(
        "LieBNSPD (AIM, θ 1.5, weighted)",
        _LIE,
        _spd("AIM", theta=1.5, alpha=0.5, beta=0.2),
        whole=False,
        variant=True,
        half=1e-4,
    ),
    ManifoldCase("LieBNSPD (AIM, θ -0.5)", _LIE, _spd("AIM", theta=-0.5), whole=False, variant=True),
    ManifoldCase(
        "LieBNSPD (AIM, 1 step)",
        _LIE,
        _spd("AIM", karcher_steps=1, karcher_tol=None),
        tolerance=0.2,
        shows=("karcher_steps=1",),
    ),
    ManifoldCase("LieBNSPD (AIM, geoopt's bias)", _LIE, _spd("AIM", parametrization="manifold"), whole=False),
    ManifoldCase("LieBNSPD (CRIM)", _LIE, _spd("CRIM"), side="right", whole=False, variant=True),
    ManifoldCase(
        "LieBNSPD (no bias, average)", _LIE, _spd("LEM", bias=False, momentum=None), variant=True, shows=("bias=False",)
    ),
    ManifoldCase("LieBNRotation", _ROTATION, _rotation(), Rotations(), whole=False, shows=("SO3(side='left')",)),
    ManifoldCase(
        "LieBNRotation (right, geoopt's bias)",
        _ROTATION,
        _rotation(side="right", parametrization="manifold"),
        Rotations(),
        side="right",
        whole=False,
    ),
    *(
        ManifoldCase(
            f"LieBNCorrelation ({metric})",
            _CORRELATION,
            _correlation(metric),
            Correlations(),
            twice=metric != "OLM",
            whole=metric in ("ECM", "LECM"),
            shows=(f"Correlation('{metric}')",),
        )
        for metric in ("ECM", "LECM", "OLM", "LSM")
    ),
    ManifoldCase(
        "DomainLieBN",
        ("evenly.manifolds:DomainLieBN",),
        lambda **more: mf.DomainLieBN(4, [0, 1], "LCM", bias=True, parametrization="free", **more),
        domains=True,
        whole=False,
        shows=("domains=2", "momentum=1", "momentum_test=0.1"),
    ),
    ManifoldCase(
        "BiMap",
        ("evenly.manifolds:BiMap",),
        lambda **more: mf.BiMap(4, 3, parametrization="free", **more),
        Unchecked(),
        normalizes=False,
        shows=("4, 3", "parametrization='free'"),
    ),
    ManifoldCase(
        "BiMap (geoopt's weight)",
        ("evenly.manifolds:BiMap",),
        lambda **more: mf.BiMap(4, 3, **more),
        Unchecked(),
        normalizes=False,
    ),
    ManifoldCase(
        "ReEig",
        ("evenly.manifolds:ReEig",),
        lambda device=None, dtype=None: mf.ReEig(0.5),
        SymmetricOnly(),
        normalizes=False,
        shows=("threshold=0.5",),
    ),
    ManifoldCase(
        "LogEig",
        ("evenly.manifolds:LogEig",),
        lambda device=None, dtype=None: mf.LogEig(flatten=True),
        normalizes=False,
        onto=False,
        shows=("flatten=True",),
    ),
)
