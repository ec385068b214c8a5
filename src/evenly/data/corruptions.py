"""The 15 standard image corruptions at 5 severities, at full size and scaled to small images.

:func:`corrupt` is for one 8-bit image of at least 32 x 32 pixels and uses the published constants
(:data:`CORRUPTIONS`) as they are. :func:`corrupt_batch` is for a batch of tensors in [0, 1] of any size from
4 x 4 and shrinks every constant that is a length in pixels, so that 8 x 8 digits are degraded and not erased.
Use them to measure robustness: the same content, corrupted pixels.

Let x be an image in [0, 1]. The types, with the parameters in the order of :data:`CORRUPTIONS`:

- ``gaussian_noise`` (s): x + N(0, s^2). ``shot_noise`` (c): Poisson(x c) / c. ``impulse_noise`` (a): a fraction
  a of the values becomes 0 or 1.
- ``defocus_blur`` (radius, alias sigma): mean over a disc. ``glass_blur`` (sigma, max shift, iterations): blur,
  swap neighbouring pixels, blur. ``motion_blur`` (radius, sigma): half-Gaussian of 2 radius + 1 taps along an
  angle from U(-45, 45) degrees. ``zoom_blur`` (stop, step): mean of x and its zooms 1, 1 + step, ... < stop.
- ``snow`` (mean, std, zoom, threshold, blur radius, blur sigma, mix): flakes of thresholded noise in motion.
  ``frost`` (image weight, frost weight): x plus a crop of a frost texture. ``fog`` (c, decay): (x + c f) m / (m + c)
  with m = max(x) and f a diamond-square map. ``brightness`` (c): c is added to the value in HSV.
- ``contrast`` (c): (x - mean) c + mean, mean per channel. ``elastic_transform`` (alpha): displacements of smoothed
  uniform noise. ``pixelate`` (c): box reduction by c, nearest enlargement. ``jpeg_compression`` (quality).

Two differences from the published code. The frost photographs cannot be shipped: five textures are made by
:func:`frost_textures` instead, from plasma clouds and ridges, with a like mean and spread. Glass blur swaps
pixels as the text of the paper says; the published code overwrites one of the two.

References: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", 2019, arXiv 1903.12261; Michaelis et al., "Benchmarking robustness in object detection", 2019,
arXiv 1907.07484 (versions for images of any size); Dalva et al., "Benchmarking the robustness of instance
segmentation models", arXiv 2109.01123 (the protocol).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

__all__ = ["CORRUPTIONS", "FAMILIES", "SEVERITIES", "corrupt", "corrupt_batch", "frost_textures", "small_image_scale"]

Array = np.ndarray[Any, Any]
Params = tuple[float, ...]

SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

#: Name of the corruption -> its parameters for severity 1 to 5.
CORRUPTIONS: Mapping[str, tuple[Params, ...]] = MappingProxyType(
    {
        "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
        "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
        "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
        "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        "elastic_transform": ((250 * 0.05,), (250 * 0.065,), (250 * 0.085,), (250 * 0.1,), (250 * 0.12,)),
        "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
        "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
    }
)

#: Family -> the names of its corruptions.
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
        "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        "weather": ("snow", "frost", "fog", "brightness"),
        "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    }
)

_REFERENCE_SIDE = 224
_EXPONENT = 0.5
_CHUNK = 2**22  # values worked on at once
_GRAY = np.array([0.299, 0.587, 0.114])


def corrupt(image: Array, name: str, severity: int, *, rng: np.random.Generator | int) -> Array:
    """Corrupt one image with the published full-size constants.

    The result is truncated to 8 bits, not rounded, as in the published code. Cost: linear in the number of
    pixels; ``glass_blur`` is the slow one (about a microsecond a swap).

    Args:
        image: ``uint8`` array of shape (H, W), (H, W, 1) or (H, W, 3), RGB, both sides at least 32.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        rng: source of randomness; an integer is the seed of a new generator.

    Returns:
        ``uint8`` array of the same shape.

    Raises:
        TypeError: if ``image`` is not a ``uint8`` array or ``rng`` is neither a generator nor an integer.
        ValueError: for an unknown name (the valid ones are listed), a severity outside 1 to 5, a wrong shape.

    Example:
        >>> gray = np.full((48, 64, 3), 100, dtype=np.uint8)
        >>> corrupt(gray, "brightness", 2, rng=0)[0, 0]
        array([151, 151, 151], dtype=uint8)
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(
            f"corrupt() expects a numpy array of uint8 in 0..255, got {got}; for tensors in [0, 1] use corrupt_batch()"
        )
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"image must have shape (H, W), (H, W, 1) or (H, W, 3), got {image.shape}")
    if min(image.shape[:2]) < 32:
        raise ValueError(
            f"corrupt() needs both sides to be at least 32 pixels, got {image.shape[0]} x {image.shape[1]}; "
            "corrupt_batch() scales the corruptions to smaller images"
        )
    params = _parameters(name, severity)
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        rng = np.random.default_rng(int(rng))
    elif not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator or an integer seed, got {type(rng).__name__}")
    x = image.reshape(1, *image.shape[:2], -1) / 255.0
    out = np.clip(_FUNCTIONS[name](x, params, _GeneratorDraws(rng), 1.0), 0, 1) * 255
    if name in _EIGHT_BIT:
        out = np.rint(out)
    return out.astype(np.uint8).reshape(image.shape)


def corrupt_batch(
    x: torch.Tensor, name: str, severity: int, *, seed: int = 0, start: int = 0, full_size: bool = False
) -> torch.Tensor:
    """Corrupt a batch of images, with every length in pixels scaled to the size of the image.

    Lengths (radii, sigmas, shifts, displacements, block sizes, flake and crystal sizes) are multiplied by
    ``scale = min(1, sqrt(side / 224))``, side being the shorter one: 0.19 at 8, 0.35 at 28, 0.38 at 32 pixels.
    The square root lies between keeping the pixels (the published constants, which erase an 8 x 8 digit) and
    keeping proportions (blurs of a third of a pixel, which change nothing), and makes each severity a real and
    growing degradation at 8, 28 and 32 pixels. Amplitudes (noise, contrast, brightness, fog, weights, JPEG
    quality) are kept. Lengths below one pixel are meant: kernels are interpolated between pixels, glass swaps are
    done with a probability below one, snow is made at full size and averaged down, pixelation has at least one
    block fewer with each severity.

    Image i of the batch is corrupted with random numbers that depend on (seed, name, severity, start + i) alone,
    so any split into batches gives the same images as long as ``start`` counts on. Values are not rounded to 8 bits,
    but for ``jpeg_compression`` (and ``pixelate`` at scale 1). Computed on the CPU.

    Args:
        x: float tensor (N, C, H, W) in [0, 1], C of 1 or 3, sides of at least 4.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (weak) to 5 (strong).
        seed: non-negative integer.
        start: the index of the first image in its data set.
        full_size: use the published constants whatever the size; sides of at least 32.

    Returns:
        A tensor of the shape, dtype and device of ``x``, in [0, 1].

    Raises:
        TypeError: if ``x`` is not a floating-point tensor.
        ValueError: for an unknown name, a severity outside 1 to 5, a wrong shape, values outside [0, 1].

    Example:
        >>> x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> whole = corrupt_batch(x, "motion_blur", 3)
        >>> parts = torch.cat([corrupt_batch(x[:1], "motion_blur", 3), corrupt_batch(x[1:], "motion_blur", 3, start=1)])
        >>> whole.shape, torch.equal(whole, parts)
        (torch.Size([4, 1, 8, 8]), True)
    """
    _check_images(x)
    params = _parameters(name, severity)
    for label, value in (("seed", seed), ("start", start)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**62:
            raise ValueError(f"{label} must be a non-negative integer below 2**62, got {value!r}")
    if full_size and min(x.shape[-2:]) < 32:
        raise ValueError(f"full_size needs sides of at least 32, got {tuple(x.shape[-2:])}; leave it out to scale")
    if x.numel() == 0:
        return x.clone()
    scale = 1.0 if full_size else small_image_scale(min(x.shape[-2:]))
    step = max(1, _CHUNK // x[0].numel())
    code = 16 * (1 + list(CORRUPTIONS).index(name)) + severity
    out = torch.empty_like(x)
    for first in range(0, len(x), step):
        part = x[first : first + step].detach().to("cpu", torch.float32)
        draws = _StreamDraws(seed, code, len(part), start + first)
        channels_last = np.ascontiguousarray(part.permute(0, 2, 3, 1).numpy())
        done = np.clip(_FUNCTIONS[name](channels_last, params, draws, scale), 0, 1).astype(np.float32, copy=False)
        out[first : first + step] = torch.from_numpy(done).permute(0, 3, 1, 2).to(out)
    return out


def small_image_scale(side: int) -> float:
    """The factor on lengths in pixels for images of ``side`` pixels: ``min(1, sqrt(side / 224))``.

    Example:
        >>> [round(small_image_scale(side), 2) for side in (8, 28, 32, 224, 500)]
        [0.19, 0.35, 0.38, 1.0, 1.0]
    """
    return min(1.0, (side / _REFERENCE_SIDE) ** _EXPONENT)


def frost_textures() -> Array:
    """Five procedural frost textures, (5, 512, 512, 3) in [0, 1], the same on every call.

    Clouds from a diamond-square map, and over them ridges, 1 - |2 f - 1| of three finer maps raised to a power,
    which look like the seams of ice crystals. Bluish white. The array is read-only.

    Example:
        >>> frost_textures().shape
        (5, 512, 512, 3)
    """
    return _frost(1.0)


# ---------------------------------------------------------------------------------------------- checks and draws


def _parameters(name: str, severity: int) -> Params:
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; the valid names are: {', '.join(CORRUPTIONS)}")
    _check_severity(severity)
    return CORRUPTIONS[name][severity - 1]


def _check_severity(severity: int) -> None:
    if isinstance(severity, bool) or not isinstance(severity, (int, np.integer)) or not 1 <= severity <= 5:
        raise ValueError(f"severity must be an integer from 1 (weak) to 5 (strong), got {severity!r}")


def _check_images(x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(
            f"expected a floating-point tensor (N, C, H, W) in [0, 1], got {got}; divide 8-bit images by 255"
        )
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 4:
        raise ValueError(f"images must have shape (N, C, H, W), C of 1 or 3, sides of at least 4; got {tuple(x.shape)}")
    if x.numel():
        low, high = x.min().item(), x.max().item()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(
                f"image values must be in [0, 1], got {low:.4g} to {high:.4g}; "
                "divide 8-bit images by 255, and corrupt before the model's input normalization"
            )


class _StreamDraws:
    """Random numbers for images start .. start + n - 1; those of image i depend on (seed, code, i) only.

    A Philox counter stream a call, advanced to the words that belong to the first image. Each value takes
    exactly one word of 64 bits.
    """

    def __init__(self, seed: int, code: int, n: int, start: int) -> None:
        self.seed, self.code, self.n, self.start, self.calls = int(seed), code, n, int(start), 0

    def uniform(self, *shape: int) -> Array:
        """(n, *shape) from U[0, 1)."""
        size = math.prod(shape)
        words = -(-size // 4) * 4  # Philox makes four words a step
        bits = np.random.Philox(key=np.array([self.seed, self.code * 64 + self.calls], dtype=np.uint64))
        self.calls += 1
        bits.advance(self.start * (words // 4))
        return np.random.Generator(bits).random((self.n, words))[:, :size].reshape(self.n, *shape)

    def normal(self, *shape: int) -> Array:
        u = torch.from_numpy(self.uniform(*shape))
        return torch.special.ndtri(u.clamp_(min=2.0**-54)).numpy()

    def poisson(self, rate: Array) -> Array:
        return _poisson_quantile(self.uniform(*rate.shape[1:]), rate)


class _GeneratorDraws:
    """The same for one image, from a generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def uniform(self, *shape: int) -> Array:
        return self.rng.random((1, *shape))

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal((1, *shape))

    def poisson(self, rate: Array) -> Array:
        return self.rng.poisson(rate).astype(np.float64)


_Draws = _StreamDraws | _GeneratorDraws


def _poisson_quantile(u: Array, rate: Array) -> Array:
    """Inverse of the Poisson distribution function; cost: the sum of the results."""
    out = np.zeros(rate.size, dtype=np.float64)
    u, lam = u.reshape(-1), rate.reshape(-1).astype(np.float64)
    term = np.exp(-lam)
    active = np.flatnonzero(u >= term)
    u, lam, term = u[active], lam[active], term[active]
    total, k = term.copy(), 0
    while active.size:
        k += 1
        term = term * lam / k
        total = total + term
        out[active] = k
        # a term too small to move the sum ends the tail that rounding would leave open
        go = (u >= total) & ((total + term > total) | (k < lam))
        active, u, lam, term, total = active[go], u[go], lam[go], term[go], total[go]
    return out.reshape(rate.shape)


# ------------------------------------------------------------------------------------------------------- helpers
# x is (N, H, W, C) in [0, 1]; `scale` is 1 for the published constants.


def _convolve(x: Array, kernel: Array, mode: str) -> Array:
    """Correlate with one kernel (K, K), or with a kernel an image (N, K, K), over the taps that are not zero."""
    r = kernel.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (r, r), (r, r), (0, 0)), mode=mode)  # type: ignore[call-overload]
    h, w = x.shape[1:3]
    out = np.zeros_like(x)
    used = kernel if kernel.ndim == 2 else np.abs(kernel).max(axis=0)
    for i, j in np.argwhere(used):
        weight = kernel[i, j] if kernel.ndim == 2 else kernel[:, i, j, None, None, None]
        out += (weight * padded[:, i : i + h, j : j + w]).astype(x.dtype, copy=False)
    return out


def _gaussian(x: Array, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Array:
    """Gaussian blur of the axes 1 and 2. Below 0.6 pixels: three taps with the variance sigma^2."""
    if sigma >= 0.6:
        return ndimage.gaussian_filter(x, sigma, mode=mode, truncate=truncate, axes=(1, 2))
    a = sigma**2 / 2
    taps = np.array([a, 1 - 2 * a, a])
    return ndimage.correlate1d(ndimage.correlate1d(x, taps, axis=1, mode=mode), taps, axis=2, mode=mode)


def _splat(kernel: Array, n: Any, y: Array, x: Array, weight: Array) -> None:
    """Add weights at points between pixels, shared bilinearly among the four neighbours."""
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    fy, fx = y - y0, x - x0
    for dy, wy in ((0, 1 - fy), (1, fy)):
        for dx, wx in ((0, 1 - fx), (1, fx)):
            np.add.at(kernel, (n, y0 + dy, x0 + dx), weight * wy * wx)


@lru_cache(maxsize=64)
def _disc(radius: float, alias_sigma: float, scale: float) -> Array:
    if scale < 1:
        # The disc, convolved with the tent of linear interpolation: continuous in the radius down to nothing.
        r = radius * scale
        size = math.ceil(r) + 1
        points = (np.arange(64) + 0.5) / 32 - 1
        py, px = np.meshgrid(points * r, points * r, indexing="ij")
        inside = py**2 + px**2 <= r**2
        kernel = np.zeros((1, 2 * size + 1, 2 * size + 1))
        _splat(kernel, 0, py[inside] + size, px[inside] + size, np.full(int(inside.sum()), 1.0 / inside.sum()))
        return kernel[0]
    reach = int(max(8, radius))
    grid = np.arange(-reach, reach + 1)
    disc = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float32)
    disc /= disc.sum()
    half = 1 if radius <= 8 else 2
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * alias_sigma**2))
    taps = (taps / taps.sum()).astype(np.float32)
    return ndimage.correlate1d(ndimage.correlate1d(disc, taps, axis=0, mode="mirror"), taps, axis=1, mode="mirror")


def _motion(x: Array, radius: float, sigma: float, degrees: Array, scale: float) -> Array:
    """Half-Gaussian motion blur along an angle an image, the border repeated."""
    steps = np.arange(2 * int(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    angle = np.deg2rad(degrees)[:, None]
    dy, dx = steps * np.sin(angle), steps * np.cos(angle)  # (N, taps)
    if scale < 1:
        reach = math.ceil(steps[-1] * scale) + 1
        kernel = np.zeros((len(x), 2 * reach + 1, 2 * reach + 1), dtype=np.float32)
        rows = np.broadcast_to(np.arange(len(x))[:, None], dy.shape)
        _splat(kernel, rows, dy * scale + reach, dx * scale + reach, np.broadcast_to(weights, dy.shape))
        return _convolve(x, kernel, "edge")
    h, w = x.shape[1:3]
    ys, xs = np.arange(h), np.arange(w)
    out = np.zeros_like(x)
    for n in range(len(x)):
        for k, weight in enumerate(weights):
            oy, ox = math.ceil(dy[n, k] - 0.5), math.ceil(dx[n, k] - 0.5)
            if abs(oy) >= h or abs(ox) >= w:
                break  # the motion left the image
            rows, columns = np.clip(ys + oy, 0, h - 1), np.clip(xs + ox, 0, w - 1)
            out[n] += (weight * x[n][rows][:, columns]).astype(x.dtype, copy=False)
    return out


def _zoom_matrix(out: int, side: int, factor: float) -> Array:
    """(out, side): linear interpolation at the places that a zoom about the centre reads."""
    at = np.clip((side - 1) / 2 + (np.arange(out) - (out - 1) / 2) / factor, 0, side - 1)
    low = np.minimum(np.floor(at).astype(int), side - 2)
    matrix = np.zeros((out, side))
    rows = np.arange(out)
    matrix[rows, low] = 1 - (at - low)
    matrix[rows, low + 1] += at - low
    return matrix


def _cover(edges: Array, side: int) -> Array:
    """(blocks, side): the share of each pixel that lies in each block."""
    pixels = np.arange(side)
    return np.clip(np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels), 0, None)


def _area_matrix(out: int, side: int) -> Array:
    """(out, side): mean over areas, from side pixels to out pixels."""
    return _cover(np.linspace(0, side, out + 1), side) * out / side


def _apply(x: Array, rows: Array, columns: Array) -> Array:
    """rows (h, H) and columns (w, W) on the axes 1 and 2 of x (N, H, W, C)."""
    out = np.tensordot(rows.astype(x.dtype), x, axes=(1, 1))  # (h, N, W, C)
    out = np.tensordot(columns.astype(x.dtype), out, axes=(1, 2))  # (w, h, N, C)
    return out.transpose(2, 1, 0, 3)


def _clipped_zoom(x: Array, factor: float) -> Array:
    """The published zoom: crop the centre, enlarge it by linear interpolation; at least as large as x, or nearly."""
    h, w = (math.ceil(side / factor) for side in x.shape[1:3])
    top, left = (x.shape[1] - h) // 2, (x.shape[2] - w) // 2
    return ndimage.zoom(x[:, top : top + h, left : left + w], (1, factor, factor, 1), order=1)


def _plasma(size: int, decay: float, u: Array) -> Array:
    """Diamond-square maps in [0, 1]; size a power of two, u (N, size^2 - 1) from U[0, 1)."""
    out = np.zeros((len(u), size, size), dtype=u.dtype)
    used, wibble, step = 0, 100.0, size

    def wibbled(total: Array) -> Array:
        nonlocal used
        count = total[0].size
        noise = u[:, used : used + count].reshape(total.shape)
        used += count
        return total / 4 + wibble * wibble * (2 * noise - 1)

    while step >= 2:
        half = step // 2
        corners = out[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        out[:, half::step, half::step] = wibbled(pairs + np.roll(pairs, -1, axis=2))
        centres = out[:, half::step, half::step]
        across = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        down = centres + np.roll(centres, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        out[:, ::step, half::step] = wibbled(across)
        out[:, half::step, ::step] = wibbled(down)
        step, wibble = half, wibble / decay
    out -= out.min(axis=(1, 2), keepdims=True)
    return out / out.max(axis=(1, 2), keepdims=True)


@lru_cache(maxsize=8)
def _frost(scale: float) -> Array:
    if scale < 1:
        full = torch.from_numpy(_frost(1.0).transpose(0, 3, 1, 2).copy())
        size = math.ceil(full.shape[-1] * scale)
        small = F.interpolate(full, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out: Array = np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())
    else:
        rng = np.random.default_rng(20190312)
        gray = 0.2 + 0.5 * _plasma(512, 2.0, rng.random((5, 512 * 512 - 1), dtype=np.float32))
        for size, decay, height in ((256, 1.7, 0.35), (128, 1.55, 0.3), (128, 1.4, 0.25)):  # the maps repeat: tile
            ridges = 1 - np.abs(2 * _plasma(size, decay, rng.random((5, size * size - 1), dtype=np.float32)) - 1)
            gray += height * np.tile(ridges**8, (1, 512 // size, 512 // size))
        gray = np.clip(gray, 0, 1)
        out = gray[..., None] ** np.array([1.25, 1.05, 0.95], dtype=np.float32)
    out.setflags(write=False)
    return out


# --------------------------------------------------------------------------------------------------- corruptions


def _gaussian_noise(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    return x + p[0] * draws.normal(*x.shape[1:])


def _shot_noise(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    return draws.poisson(x * p[0]) / p[0]


def _impulse_noise(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    u = draws.uniform(*x.shape[1:])
    return np.where(u < p[0] / 2, 1.0, np.where(u < p[0], 0.0, x))


def _defocus_blur(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    return _convolve(x, _disc(p[0], p[1], scale), "reflect")


def _glass_blur(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    sigma, delta, iterations, chance = p[0] * scale, int(p[1]), int(p[2]), 1.0
    blurred = _gaussian(x, sigma)
    if scale == 1:
        blurred = np.floor(blurred * 255) / 255
    else:
        # A shift from -d..d-1 has the mean square (2 d^2 + 1) / 6. That of all iterations, times scale^2, is made
        # of swaps of whole pixels with a chance of at most a half (more would shift the image, not scatter it).
        delta = math.ceil(p[1] * scale / 2)
        swaps = p[2] * (2 * p[1] ** 2 + 1) * scale**2 / (2 * delta**2 + 1)
        iterations = math.ceil(2 * swaps)
        chance = swaps / iterations
    n, h, w, c = x.shape
    rows, columns = range(h - delta, delta, -1), range(w - delta, delta, -1)
    u = draws.uniform(iterations, len(rows), len(columns), 2)
    shift = np.floor(u * (2 * delta)).astype(np.int64) - delta
    if chance < 1:
        shift[draws.uniform(iterations, len(rows), len(columns)) >= chance] = 0
    other = (shift[..., 0] * w + shift[..., 1]).reshape(n, -1)  # what the shift adds to the flat index
    here = np.array([i * w + j for _ in range(iterations) for i in rows for j in columns])
    flat = blurred.reshape(n, h * w, c)
    if n < 8:  # plain lists are faster than arrays of a few elements
        out = np.empty_like(flat)
        for k in range(n):
            order = list(range(h * w))
            for a, b in zip(here.tolist(), (here + other[k]).tolist(), strict=True):
                order[a], order[b] = order[b], order[a]
            out[k] = flat[k][order]
    else:
        index = np.repeat(np.arange(h * w)[:, None], n, axis=1)  # (pixels, images), so that a step is contiguous
        lanes = np.arange(n)
        for a, b in zip(here.tolist(), (here[:, None] + other.T), strict=True):
            moved = index[b, lanes]
            index[b, lanes] = index[a]
            index[a] = moved
        out = np.take_along_axis(flat, index.T[..., None], axis=1)
    return _gaussian(out.reshape(x.shape), sigma)


def _motion_blur(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    return _motion(x, p[0], p[1], 90 * draws.uniform(1)[:, 0] - 45, scale)


def _zoom_blur(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    factors = np.arange(1, p[0], p[1])
    x = x.astype(np.float32)
    total = np.zeros_like(x)
    h, w = x.shape[1:3]
    for factor in factors:
        if scale < 1:
            factor = 1 + (factor - 1) * scale * _REFERENCE_SIDE / min(h, w)  # displacements are lengths
            total += _apply(x, _zoom_matrix(h, h, factor), _zoom_matrix(w, w, factor))
        else:
            layer = _clipped_zoom(x, factor)[:, :h, :w]
            total[:, : layer.shape[1], : layer.shape[2]] += layer
    return (x + total) / (len(factors) + 1)


def _snow(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    mean, std, zoom, threshold, radius, sigma, mix = p
    h, w = x.shape[1:3]
    # At a scale below 1 the flakes are made at full size, then seen at the size of the image.
    fh, fw = round(h / scale), round(w / scale)
    nh, nw = (fh, fw) if scale == 1 else (math.ceil(fh / zoom) + 1, math.ceil(fw / zoom) + 1)
    layer: Array = (mean + std * draws.normal(nh, nw)).astype(np.float32)[..., None]
    if scale < 1:
        layer = _apply(layer, _zoom_matrix(fh, nh, zoom), _zoom_matrix(fw, nw, zoom))
    else:
        layer = _clipped_zoom(layer, zoom)
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1)).astype(np.float32)
    if scale < 1:
        layer = _apply(layer, _area_matrix(h, fh), _area_matrix(w, fw))
    layer = _motion(layer, radius, sigma, -135 + 90 * draws.uniform(1)[:, 0], scale)
    layer = np.rint(layer * 255)[:, :h, :w] / 255
    gray = x if x.shape[-1] == 1 else (x @ _GRAY.astype(x.dtype))[..., None]
    x = mix * x + (1 - mix) * np.maximum(x, gray * 1.5 + 0.5)
    return x + layer + layer[:, ::-1, ::-1]


def _frost_corruption(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    textures = _frost(scale)
    h, w, c = x.shape[1:]
    side = max(textures.shape[1], math.ceil(1.1 * max(h, w)))
    u = draws.uniform(3)
    which = (u[:, 0] * len(textures)).astype(int)
    top, left = (u[:, 1] * (side - h)).astype(int), (u[:, 2] * (side - w)).astype(int)
    if textures.shape[1] < side:  # larger images get enlarged textures
        chosen = torch.from_numpy(textures[which]).permute(0, 3, 1, 2)
        textures = F.interpolate(chosen, size=(side, side), mode="bilinear").permute(0, 2, 3, 1).numpy()
        which = np.arange(len(x))
    crop = textures[
        which[:, None, None], (top[:, None] + np.arange(h))[:, :, None], (left[:, None] + np.arange(w))[:, None, :]
    ]
    if c == 1:
        crop = (crop @ _GRAY.astype(np.float32))[..., None]
    return p[0] * x + p[1] * crop


def _fog(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    h, w = x.shape[1:3]
    size = 1 << (max(h, w) - 1).bit_length()
    top = x.max(axis=(1, 2, 3), keepdims=True)
    plasma = _plasma(size, p[1], draws.uniform(size * size - 1))[:, :h, :w, None]
    return (x + p[0] * plasma) * top / (top + p[0])


def _brightness(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    if x.shape[-1] == 1:
        return x + p[0]
    hue, saturation, value = _rgb_to_hsv(x)
    return _hsv_to_rgb(hue, saturation, np.clip(value + p[0], 0, 1))


def _contrast(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * p[0] + mean


def _elastic_transform(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    n, h, w, c = x.shape
    noise = 2 * draws.uniform(2, h, w) - 1
    if scale < 1:
        # The displacement's standard deviation at 224 pixels, times scale, and smooth over at least a pixel.
        side = _REFERENCE_SIDE
        deviation = p[0] * 0.005 * side / math.sqrt(3) / (2 * math.sqrt(math.pi) * 0.01 * side)
        sigma = max(1.0, 0.01 * side * scale)
        smooth = ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3, axes=(2, 3))
        unit = 1 / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma)
        dy, dx = (torch.from_numpy(smooth[:, k] * (deviation * scale / unit)).float() for k in (0, 1))
        ys, xs = torch.arange(h, dtype=torch.float32)[:, None], torch.arange(w, dtype=torch.float32)
        grid = torch.stack([(2 * (xs + dx) + 1) / w - 1, (2 * (ys + dy) + 1) / h - 1], dim=-1)
        images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).float()
        warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return warped.permute(0, 2, 3, 1).numpy()
    noise *= 0.005 * h * p[0]
    field = ndimage.gaussian_filter(noise, (0.01 * h, 0.01 * w), mode="reflect", truncate=3, axes=(2, 3))
    out = np.empty_like(x)
    place = np.indices((h, w))
    for k in range(n):
        at = place + field[k]
        for channel in range(c):
            out[k, ..., channel] = ndimage.map_coordinates(x[k, ..., channel], at, order=1, mode="reflect")
    return out


def _pixelate(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    h, w, c = x.shape[1:]
    if scale < 1:
        severity = 1 + CORRUPTIONS["pixelate"].index(p)
        return _apply(x, _pixelate_matrix(h, severity, scale), _pixelate_matrix(w, severity, scale))
    size = (int(w * p[0]), int(h * p[0]))
    out = np.empty_like(x)
    for k, image in enumerate(_to_pil(x)):
        small = image.resize(size, Image.Resampling.BOX).resize((w, h), Image.Resampling.NEAREST)
        out[k] = np.asarray(small).reshape(h, w, c) / 255.0
    return out


@lru_cache(maxsize=64)
def _pixelate_matrix(side: int, severity: int, scale: float) -> Array:
    """(side, side): means over whole numbers of blocks of about 1 + (1/c - 1) scale pixels, read by the pixel grid.

    Each severity has at least one block fewer than the one before: 7, 6, 5, 4, 3 at 8 pixels.
    """
    blocks = side
    for (c,) in CORRUPTIONS["pixelate"][:severity]:
        blocks = max(1, min(blocks - 1, round(side / (1 + (1 / c - 1) * scale))))
    cover = _cover(np.linspace(0, side, blocks + 1), side)
    return cover.T @ (cover / cover.sum(axis=1, keepdims=True))


def _jpeg_compression(x: Array, p: Params, draws: _Draws, scale: float) -> Array:
    n, h, w, c = x.shape
    quality = int(p[0])
    if c == 1 and n > 1:
        # Gray blocks of 8 x 8 are coded each on its own, so many images make one picture. Colour is not: its
        # decoder interpolates across blocks.
        th, tw = -(-h // 8) * 8, -(-w // 8) * 8
        across = max(1, min(n, math.isqrt(n * th // tw) + 1, 60000 // tw))
        out = np.empty_like(x)
        per_picture = across * max(1, 60000 // th)
        for first in range(0, n, per_picture):
            part = x[first : first + per_picture, ..., 0]
            down = -(-len(part) // across)
            tiles = np.zeros((down * across, th, tw), dtype=np.uint8)
            tiles[: len(part)] = np.pad(_to_bytes(part), ((0, 0), (0, th - h), (0, tw - w)), mode="edge")
            picture = tiles.reshape(down, across, th, tw).transpose(0, 2, 1, 3).reshape(down * th, across * tw)
            coded = _jpeg(Image.fromarray(picture), quality).reshape(down, th, across, tw).transpose(0, 2, 1, 3)
            out[first : first + per_picture, ..., 0] = coded.reshape(-1, th, tw)[: len(part), :h, :w] / 255.0
        return out
    return np.stack([_jpeg(image, quality).reshape(h, w, c) for image in _to_pil(x)]) / 255.0


def _jpeg(image: Image.Image, quality: int) -> Array:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _to_bytes(x: Array) -> Array:
    return np.rint(x * 255).astype(np.uint8)


def _to_pil(x: Array) -> list[Image.Image]:
    return [Image.fromarray(image[..., 0] if x.shape[-1] == 1 else image) for image in _to_bytes(x)]


def _rgb_to_hsv(x: Array) -> tuple[Array, Array, Array]:
    value, low = x.max(axis=-1), x.min(axis=-1)
    delta = value - low
    safe = np.where(delta == 0, 1, delta)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    hue = np.where(value == b, 4 + (r - g) / safe, np.where(value == g, 2 + (b - r) / safe, (g - b) / safe))
    hue = np.where(value == r, (g - b) / safe, hue)
    hue = np.where(delta == 0, 0, (hue / 6) % 1)
    return hue, np.where(value == 0, 0, delta / np.where(value == 0, 1, value)), value


def _hsv_to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    sector = np.floor(hue * 6)
    f = hue * 6 - sector
    p, q, t = value * (1 - saturation), value * (1 - f * saturation), value * (1 - (1 - f) * saturation)
    choices = [(value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q)]
    which = sector.astype(int) % 6
    return np.stack([np.choose(which, [row[k] for row in choices]) for k in range(3)], axis=-1)


_EIGHT_BIT = {"pixelate", "jpeg_compression"}

_FUNCTIONS: dict[str, Callable[[Array, Params, _Draws, float], Array]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost_corruption,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
