"""PHI-S: zero mean and unit variance in every dimension, by one rotation and one scalar.

Features of different models (CLIP, DINOv2, SAM, ...) differ in variance by orders of magnitude, and a student that
is trained on all of them with a squared error learns the largest. Scaling each channel, or whitening, makes them
even, and distorts what was far and near. PHI-S (PCA, Hadamard, isotropic standardization) rotates so that every
dimension has the same variance, and divides by one number: distances keep their ratios, and the map is invertible.
Use it on teacher features before distillation, before quantization, or to mix embeddings of different models.

With the mean :math:`\\mu` and the covariance :math:`\\Sigma = U \\Lambda U^T` of the rows (divisor N - 1), a
normalized Hadamard matrix H (entries :math:`\\pm 1/\\sqrt C`) and
:math:`\\varphi = \\sqrt{\\mathrm{tr}\\,\\Sigma / C}`,

.. math::

    y = T (x - \\mu), \\quad T = \\varphi^{-1} H U^T, \\qquad x = T^{-1} y + \\mu, \\quad T^{-1} = \\varphi U H^T,

since :math:`(H \\Lambda H^T)_{ii} = \\sum_j H_{ij}^2 \\lambda_j = \\mathrm{tr}\\,\\Lambda / C` for every i. The paper
compares it with these, which :class:`PHIStandardizer` has too:

====================  ===============================================  ==================================
method                T                                                 covariance of y
====================  ===============================================  ==================================
``"phi-s"``           :math:`\\varphi^{-1} H U^T`                        unit diagonal; isotropic
``"global"``          :math:`\\varphi^{-1} I`                            trace C; isotropic
``"standard"``        :math:`\\mathrm{diag}(1/\\sigma_c)`                 unit diagonal
``"pca"``             :math:`\\Lambda^{-1/2} U^T`                         identity
``"zca"``             :math:`U \\Lambda^{-1/2} U^T`                       identity
``"cholesky"``        :math:`L^{-1}, \\Sigma = L L^T`                     identity
``"hadamard"``        :math:`H \\Lambda^{-1/2} U^T`                       identity
``"none"``            :math:`I`                                         unchanged
====================  ===============================================  ==================================

Where the paper and the released code differ, or are silent: the released code replaces H by an orthogonalized random
±1 matrix where it finds no Hadamard matrix, and the variances are then equal only about. Here that matrix is
followed by C - 1 plane rotations (Davies & Higham) which make them equal exactly, so PHI-S holds its promise in every
width; ``rotation=`` chooses. Eigenvectors are ordered by variance and signed so that the largest entry is positive;
the released code leaves both to LAPACK, so its T differs from ours by a rotation of y. The paper's compared methods
have no Cholesky whitening.

References:
    M. Ranzinger, J. Barker, G. Heinrich, P. Molchanov, B. Catanzaro and A. Tao, *PHI-S: Distribution Balancing for
    Label-Free Multi-Teacher Distillation*, ICLR 2025, arXiv 2410.01680, section 3 and appendix (Hadamard matrices).
    P. I. Davies and N. J. Higham, *Numerically stable generation of correlation matrices and their factors*, BIT 40,
    2000, section 3 (the plane rotations).
    A. Kessy, A. Lewin and K. Strimmer, *Optimal whitening and decorrelation*, 2018, arXiv 1512.00809.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_feature_names_in,
    _generate_get_feature_names_out,
    check_array,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from evenly.core import Covariance, covariance, merge, merge_processes, moments, principal_axes
from evenly.stats.hadamard import hadamard, hadamard_construction, has_hadamard
from evenly.stats.standardize import Standardize

__all__ = ["Drift", "PHIStandardizer"]

Method = Literal["phi-s", "global", "standard", "pca", "zca", "cholesky", "hadamard", "none"]
Rotation = Literal["auto", "hadamard", "bernoulli"]
_DIAGONAL = ("global", "standard", "none")
_WHITENING = ("pca", "zca", "cholesky", "hadamard")
_METHODS = ("phi-s", *_DIAGONAL, *_WHITENING)
_ROTATIONS = ("auto", "hadamard", "bernoulli")
_PIECE = 2**21  # values that are turned to float64 at a time


class Drift(NamedTuple):
    """How far transformed data are from zero mean and unit variance: 0, 1, 1 on the data of the fit."""

    mean: float
    """the largest mean of a dimension, in absolute value"""
    low: float
    """the smallest variance of a dimension"""
    high: float
    """the largest variance of a dimension"""


class PHIStandardizer(TransformerMixin, BaseEstimator):
    """Make features even by an invertible linear map, fitted on their mean and covariance.

    Input is a table (n, C) of numpy, pandas or polars, or an array or torch tensor (..., C), features last: the
    tokens (n, tokens, C) of a transformer are n · tokens rows. Tensors come back as tensors, of their type and on
    their device, and gradients flow through :meth:`transform`. Statistics, eigenvectors and the map are float64; the
    map is applied in the type of the input (float32 for half, float64 for whole numbers).

    Args:
        method: ``"phi-s"``, or one of the methods it is compared with (see the module).
        eps: added to the variances before a division by their root, in the units of the variance: to the eigenvalues
            for whitening, to each channel's for ``"standard"``. ``"phi-s"`` and ``"global"`` need none and have none.
        rotation: H for ``"phi-s"`` and ``"hadamard"``. ``"auto"``: a Hadamard matrix, and where
            :func:`hadamard` has none of order C, a random rotation that is corrected until the variances are equal.
            ``"hadamard"``: that, or an error. ``"bernoulli"``: the released code's approximation for orders without a
            Hadamard matrix, an orthogonalized random ±1 matrix, with a warning.
        correction: the covariance divides by N - ``correction``.
        random_state: seed of the random ±1 matrix, used only where there is no Hadamard matrix.

    Attributes:
        mean_: (C,).
        var_: (C,), variances of the channels.
        covariance_: (C, C); not for ``"global"``, ``"standard"`` and ``"none"``, which keep variances only.
        eigenvalues_: (C,), of the covariance, largest first; where there is a covariance.
        scale_: φ, the root of the mean variance: errors in y times φ are errors in x for ``"phi-s"``, ``"global"``.
        components_: T, (C, C), so that ``y = (x - mean_) @ components_.T``.
        inverse_components_: its inverse, ``x = y @ inverse_components_.T + mean_``.
        rotation_: what H is, in words, for ``"phi-s"`` and ``"hadamard"``.
        n_samples_seen_: rows that the statistics count.
        n_features_in_, feature_names_in_: as in scikit-learn.

    Raises:
        ValueError: fewer than 2 rows, NaN or infinity, a width other than the fit's, no variance at all; for
            ``"standard"`` a constant channel and for whitening a singular covariance, unless ``eps`` is above 0.

    Cost: O(N C²) for the covariance and O(C³) once for its eigenvectors; O(N C) for the methods that keep variances.
    A transform is one C x C product a row, and nothing once it is folded into a layer (:meth:`to_layer`).

    Reference:
        arXiv 2410.01680, section 3.

    >>> x = np.random.default_rng(0).normal(size=(500, 12)) * 10.0 ** -np.arange(12)
    >>> phi_s = PHIStandardizer().fit(x)
    >>> np.round(np.cov(phi_s.transform(x).T).diagonal(), 6)
    array([1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.])
    >>> np.allclose(phi_s.inverse_transform(phi_s.transform(x)), x), phi_s.rotation_
    (True, 'paley-1(12)')
    """

    def __init__(
        self,
        method: Method = "phi-s",
        *,
        eps: float = 0.0,
        rotation: Rotation = "auto",
        correction: int = 1,
        random_state: Any = 0,
    ) -> None:
        self.method = method
        self.eps = eps
        self.rotation = rotation
        self.correction = correction
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> PHIStandardizer:
        """Measure the rows of ``X`` and compute the map. ``y`` is ignored."""
        self._check_settings()
        rows = self._rows(X, reset=True, at_least=2)
        self._stats = _measure(rows, second=self.method not in _DIAGONAL)
        self._solved: _Map | None = self._solve()
        return self

    def partial_fit(self, X: Any, y: Any = None) -> PHIStandardizer:
        """Add the rows of ``X`` to the statistics: the result is :meth:`fit` on all rows seen, in any order.

        The map is computed when it is first used, so that a stream costs no eigenvectors a piece.
        """
        self._check_settings()
        old = getattr(self, "_stats", None)
        second = self.method not in _DIAGONAL
        if old is not None and isinstance(old, Covariance) != second:
            raise ValueError(
                f"partial_fit goes on with statistics of another method, which keep {'no ' if second else 'a '}"
                f"covariance, and method={self.method!r} now. Call fit, or partial_fit on a clone."
            )
        new = _measure(self._rows(X, reset=old is None, at_least=1), second=second)
        self._stats = new if old is None else merge(old, new)
        self._solved = None
        return self

    def synchronize(self, process_group: dist.ProcessGroup | None = None) -> PHIStandardizer:
        """Merge the statistics of all processes of a group, exactly; call it once, after the last ``partial_fit``.

        Two all-reduces, of C and of C² float64 numbers. Each process then has the statistics of all rows.

        Raises:
            NotFittedError: a process has seen no row (also with no ``partial_fit``).
            RuntimeError: ``torch.distributed`` is not initialized.
        """
        check_is_fitted(self)
        backend = dist.get_backend(process_group) if dist.is_available() and dist.is_initialized() else ""
        device = torch.device("cuda") if "nccl" in backend else torch.device("cpu")
        moved = type(self._stats)(*(value.to(device) for value in self._stats))
        merged = merge_processes(moved, process_group)
        self._stats = type(merged)(*(value.cpu() for value in merged))
        self._solved = None
        return self

    def transform(self, X: Any) -> Any:
        """T (x - μ) for each row: the shape of ``X``, in its type; gradients flow to a tensor."""
        check_is_fitted(self)
        rows = self._rows(X, reset=False, at_least=1)
        out = _forward(rows, self._stats.mean, self._map().matrix)
        return _restore(out, X)

    def inverse_transform(self, Y: Any) -> Any:
        """T⁻¹ y + μ for each row. Where ``eps`` is above 0 this is the inverse of the map with ``eps``."""
        check_is_fitted(self)
        rows = _flat(Y)
        if not isinstance(rows, Tensor):
            rows = check_array(rows, dtype=[np.float64, np.float32], estimator=self, input_name="Y")
        else:
            _check_finite(rows, "Y")
        if rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"Y has {rows.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                f"features as input."
            )
        return _restore(_backward(rows, self._stats.mean, self._map().inverse), Y)

    def drift(self, X: Any) -> Drift:
        """How far :meth:`transform` of other data is from what it is on the data of the fit.

        >>> x = np.random.default_rng(0).normal(size=(100, 4))
        >>> PHIStandardizer().fit(x).drift(2 * x).high.__round__(3)
        4.0
        """
        check_is_fitted(self)
        rows = self._rows(X, reset=False, at_least=2)
        held = _measure(_forward(rows, self._stats.mean, self._map().matrix), second=False)
        var = held.var * _correct(held.count, self.correction)
        return Drift(held.mean.abs().max().item(), var.min().item(), var.max().item())

    def to_layer(
        self,
        channel_dim: int = -1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Standardize:
        """The map as a module with buffers: to wrap a teacher, or to fold into the last layer of a student's head.

        >>> x = torch.randn(100, 8) * 3 + 1
        >>> phi_s = PHIStandardizer().fit(x)
        >>> torch.allclose(phi_s.to_layer()(x), phi_s.transform(x), atol=1e-5)
        True
        """
        check_is_fitted(self)
        found = self._map()
        layer = Standardize(
            self.n_features_in_, channel_dim=channel_dim, diagonal=found.matrix.ndim == 1, device=device, dtype=dtype
        )
        layer.mean.copy_(self._stats.mean)
        layer.matrix.copy_(found.matrix)
        layer.inverse_matrix.copy_(found.inverse)
        return layer

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns: the input's where each column is scaled alone, else ``phistandardizer0``, ..."""
        check_is_fitted(self, "n_features_in_")
        if self.method in _DIAGONAL:
            return _check_feature_names_in(self, input_features)
        return _generate_get_feature_names_out(self, self.n_features_in_, input_features=input_features)

    @property
    def n_samples_seen_(self) -> int:
        return int(self._fitted("n_samples_seen_").count.max())

    @property
    def mean_(self) -> np.ndarray:
        return self._fitted("mean_").mean.numpy()

    @property
    def var_(self) -> np.ndarray:
        stats = self._fitted("var_")
        var = stats.cov.diagonal() if isinstance(stats, Covariance) else stats.var
        return (var * _correct(stats.count, self.correction)).numpy()

    @property
    def covariance_(self) -> np.ndarray:
        stats = self._fitted("covariance_")
        if not isinstance(stats, Covariance):
            raise AttributeError(f"method={self.method!r} keeps variances only (var_), no covariance_.")
        return (stats.cov * _correct(stats.count, self.correction)).numpy()

    @property
    def eigenvalues_(self) -> np.ndarray:
        self._fitted("eigenvalues_")
        values = self._map().values
        if values is None:
            raise AttributeError(f"method={self.method!r} keeps variances only (var_), no eigenvalues_.")
        return values.numpy()

    @property
    def scale_(self) -> float:
        return float(np.sqrt(self.var_.mean()))

    @property
    def components_(self) -> np.ndarray:
        self._fitted("components_")
        return _square(self._map().matrix).numpy()

    @property
    def inverse_components_(self) -> np.ndarray:
        self._fitted("inverse_components_")
        return _square(self._map().inverse).numpy()

    @property
    def rotation_(self) -> str:
        self._fitted("rotation_")
        words = self._map().rotation
        if words is None:
            raise AttributeError(f"method={self.method!r} uses no Hadamard matrix, so there is no rotation_.")
        return words

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_stats")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fitted(self, name: str) -> Any:
        if not hasattr(self, "_stats"):
            raise NotFittedError(f"{type(self).__name__} has no {name} yet: call fit or partial_fit first.")
        return self._stats

    def _check_settings(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method={self.method!r} is unknown, expected one of {', '.join(map(repr, _METHODS))}.")
        if self.rotation not in _ROTATIONS:
            known = ", ".join(map(repr, _ROTATIONS))
            raise ValueError(f"rotation={self.rotation!r} is unknown, expected one of {known}.")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps}, expected a finite number of at least 0.")
        if self.eps and self.method not in (*_WHITENING, "standard"):
            raise ValueError(f"eps={self.eps} is for whitening and 'standard'; method={self.method!r} has none.")
        if self.correction not in (0, 1):
            raise ValueError(f"correction={self.correction}, expected 0 or 1.")

    def _rows(self, X: Any, *, reset: bool, at_least: int) -> Any:
        """``X`` as checked rows (n, C): a floating-point tensor, or a float32 or float64 array."""
        rows = _flat(X)
        if not isinstance(rows, Tensor):
            return validate_data(
                self, rows, reset=reset, dtype=[np.float64, np.float32], ensure_min_samples=at_least, copy=False
            )
        name = type(self).__name__
        if rows.is_complex():
            raise ValueError(f"Complex data not supported: {name} got a tensor of {rows.dtype}.")
        if len(rows) < at_least or not rows.shape[1]:
            raise ValueError(
                f"Found {len(rows)} sample(s) and {rows.shape[1]} feature(s) in a tensor of shape {tuple(X.shape)}; "
                f"{name} needs at least {at_least} and 1."
            )
        if reset:
            self.n_features_in_ = rows.shape[1]
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif rows.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {rows.shape[1]} features, but {name} is expecting {self.n_features_in_} features as input."
            )
        _check_finite(rows, "X")
        return rows if rows.is_floating_point() else rows.double()

    def _map(self) -> _Map:
        if self._solved is None:
            self._solved = self._solve()
        return self._solved

    def _solve(self) -> _Map:
        stats, count = self._stats, float(self._stats.count.max())
        if count < 2:
            raise ValueError(f"{type(self).__name__} has seen 1 sample, expected at least 2.")
        factor = _correct(stats.count, self.correction)
        second = (stats.cov if isinstance(stats, Covariance) else stats.var) * factor
        var = second.diagonal() if second.ndim == 2 else second
        constant = _constant(var, stats.mean, count)
        if constant.all() and self.method in ("phi-s", "global"):
            raise ValueError(
                f"every one of the {len(var)} features is constant over {count:.0f} rows: there is no variance to "
                f"scale to 1."
            )
        if self.method in _DIAGONAL:
            return _diagonal_map(self.method, var, constant, self.eps)
        values, vectors = principal_axes(second)
        values = values.clamp(min=0)
        if self.method == "phi-s":
            turn, name = self._rotation(values / values.mean())
            matrix, phi = turn @ vectors.mT, var.mean().sqrt()
            return _Map(matrix / phi, matrix.mT * phi, values, name)
        if self.eps == 0 and values[-1] <= len(values) * torch.finfo(values.dtype).eps * values[0]:
            raise ValueError(
                f"the covariance of {len(values)} features over {count:.0f} rows is singular (eigenvalues from "
                f"{values[0]:.3g} to {values[-1]:.3g}), and method={self.method!r} divides by their roots. Set eps "
                f"above 0, or use method='phi-s', which needs no full rank."
            )
        if self.method == "cholesky":
            eye = torch.eye(len(values), dtype=second.dtype)
            lower = torch.linalg.cholesky(second + self.eps * eye)
            return _Map(torch.linalg.solve_triangular(lower, eye, upper=False), lower, values, None)
        roots = (values + self.eps).sqrt()
        matrix, inverse = vectors.mT / roots[:, None], vectors * roots
        words: str | None = None
        if self.method == "zca":
            matrix, inverse = vectors @ matrix, inverse @ vectors.mT
        elif self.method == "hadamard":
            turn, words = self._rotation(torch.ones_like(values))
            matrix, inverse = turn @ matrix, inverse @ turn.mT
        return _Map(matrix, inverse, values, words)

    def _rotation(self, values: Tensor) -> tuple[Tensor, str]:
        """H, such that the diagonal of H diag(values) Hᵀ is 1, and what it is."""
        size = len(values)
        if has_hadamard(size):
            return hadamard(size), hadamard_construction(size)
        if self.rotation == "hadamard":
            hadamard(size)  # says why there is none
        signs = check_random_state(self.random_state).randint(2, size=(size, size)) * 2.0 - 1.0
        turn, _ = np.linalg.qr(signs)
        turn = np.where(turn.diagonal() > 0, turn, -turn).T.copy()
        if self.rotation == "auto":
            return torch.from_numpy(_equalize(turn, values.numpy())), f"equalized({size})"
        if self.method == "phi-s":
            var = ((turn**2) @ values.numpy()).astype(float)
            warnings.warn(
                f"no Hadamard matrix of order {size}: with rotation='bernoulli' variances are 1 only about (here "
                f"{var.min():.3g} to {var.max():.3g}). rotation='auto' makes them equal.",
                stacklevel=4,
            )
        return torch.from_numpy(turn), f"bernoulli({size})"


class _Map(NamedTuple):
    """T and its inverse, (C, C) or the diagonal (C,); eigenvalues and the name of H where there are any."""

    matrix: Tensor
    inverse: Tensor
    values: Tensor | None
    rotation: str | None


def _diagonal_map(method: str, var: Tensor, constant: Tensor, eps: float) -> _Map:
    if method == "none":
        size = torch.ones_like(var)
    elif method == "global":
        size = var.mean().sqrt().expand_as(var).clone()
    else:
        if eps == 0 and constant.any():
            where = constant.nonzero().flatten().tolist()
            raise ValueError(
                f"{len(where)} of {len(var)} features are constant (the first is number {where[0]}), and method="
                f"'standard' divides by their standard deviation. Drop them, or set eps above 0."
            )
        size = (var + eps).sqrt()
    return _Map(1 / size, size, None, None)


def _equalize(turn: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rotate pairs of rows of ``turn`` until each entry of the diagonal of R diag(values) Rᵀ is 1, its mean.

    The plane of the smallest and the largest entry has a rotation that makes the smallest 1; after at most C - 1 of
    them all are. O(C) each.
    """
    turn = turn.copy()
    gram = (turn * values) @ turn.T
    for _ in range(len(values) - 1):
        diagonal = gram.diagonal()
        i, j = int(diagonal.argmin()), int(diagonal.argmax())
        if diagonal[j] - diagonal[i] <= 8 * np.finfo(float).eps:
            break
        low, high, cross = diagonal[i] - 1, diagonal[j] - 1, gram[i, j]
        # the root of smaller size of high t² - 2 cross t + low = 0
        root = np.sqrt(cross**2 - low * high)
        t = low / (cross + root if cross >= 0 else cross - root)
        c = 1 / np.sqrt(1 + t * t)
        s = c * t
        plane = np.array([[c, -s], [s, c]])
        turn[[i, j]] = plane @ turn[[i, j]]
        gram[[i, j]] = plane @ gram[[i, j]]
        gram[:, [i, j]] = gram[:, [i, j]] @ plane.T
    return turn


def _measure(rows: Any, *, second: bool) -> Any:
    """Mean and covariance (or variance) of rows (n, C), in float64, on the CPU; pieces bound the memory."""
    size = rows.shape[1]
    step = max(4 * size, _PIECE // size)
    measured: Callable[..., Any] = covariance if second else moments
    total = None
    for start in range(0, len(rows), step):
        part = measured(_wide(rows[start : start + step]), "n c -> c")
        total = part if total is None else merge(total, part)
    assert total is not None
    return type(total)(*(value.cpu() for value in total))


def _wide(part: Any) -> Tensor:
    if isinstance(part, Tensor):
        part = part.detach()
        return part.double() if part.device.type in ("cpu", "cuda") else part.cpu().double()
    part = np.ascontiguousarray(part, dtype=np.float64)
    return torch.from_numpy(part if part.flags.writeable else part.copy())


def _forward(x: Any, mean: Tensor, matrix: Tensor) -> Any:
    # The mean in two parts, so that a large one costs float32 data no digits.
    high = _like(mean, x)
    out = (x.float() if isinstance(x, Tensor) and x.element_size() < 4 else x) - high
    low = mean - (torch.from_numpy(high) if isinstance(high, np.ndarray) else high.cpu()).double()
    if low.any():
        out -= _like(low, x)
    matrix = _like(matrix, x)
    return out * matrix if matrix.ndim == 1 else out @ matrix.T


def _backward(y: Any, mean: Tensor, inverse: Tensor) -> Any:
    y = y.float() if isinstance(y, Tensor) and y.element_size() < 4 else y
    inverse = _like(inverse, y)
    out = y * inverse if inverse.ndim == 1 else y @ inverse.T
    out += _like(mean, y)
    return out


def _like(value: Tensor, x: Any) -> Any:
    """``value`` as what ``x`` is: an array or a tensor, of its type (float32 for half)."""
    if not isinstance(x, Tensor):
        return value.numpy().astype(x.dtype, copy=False)
    return value.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)


def _flat(X: Any) -> Any:
    """Arrays and tensors of more than two axes as rows; tensors of fewer are refused, arrays by scikit-learn."""
    if isinstance(X, Tensor) and X.ndim < 2:
        raise ValueError(
            f"Expected a tensor of shape (..., features) with at least 2 axes, got {tuple(X.shape)}. Reshape your data "
            f"with x.reshape(-1, 1) if it has a single feature or x.reshape(1, -1) if it is a single sample."
        )
    if isinstance(X, Tensor | np.ndarray) and X.ndim > 2:
        return X.reshape(-1, X.shape[-1])
    return X


def _restore(rows: Any, X: Any) -> Any:
    if isinstance(X, Tensor):
        rows = rows.to(X.dtype) if X.is_floating_point() else rows
    return rows.reshape(X.shape) if isinstance(X, Tensor | np.ndarray) and X.ndim > 2 else rows


def _check_finite(rows: Tensor, name: str) -> None:
    if not rows.isfinite().all():
        what = "NaN" if rows.isnan().any() else "infinity"
        raise ValueError(f"Input {name} contains {what}. Drop or impute such rows first.")


def _constant(var: Tensor, mean: Tensor, count: float) -> Tensor:
    """Where a variance is not more than the rounding of its mean: the bound for two-pass sums."""
    eps = torch.finfo(var.dtype).eps
    return var <= count * eps * var + (count * eps * mean).square()


def _correct(count: Tensor, correction: int) -> Tensor:
    return count / (count - correction) if correction else torch.ones_like(count)


def _square(matrix: Tensor) -> Tensor:
    return matrix.diag() if matrix.ndim == 1 else matrix
