"""The 15 corruptions: the properties that the published benchmark has, references, scaling, seeds, errors."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_digits, load_sample_images

from evenly.data import CORRUPTIONS, FAMILIES, SEVERITIES, corrupt, corrupt_batch, frost_textures, small_image_scale
from evenly.data.corruptions import _poisson_quantile, _StreamDraws

NAMES = list(CORRUPTIONS)
# The published severities of these rise in strength; snow, frost and fog change several parameters at once.
MONOTONE = [n for n in NAMES if n not in ("snow", "frost", "fog")]

DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A real photograph, 96 x 128."""
    image = load_sample_images().images[0]
    return np.asarray(Image.fromarray(image).resize((128, 96), Image.Resampling.BOX))


def _images(photo: np.ndarray, side: int) -> torch.Tensor:
    """Digits at 8 pixels, gray photographs at 28, colour photographs at 32."""
    if side == 8:
        return torch.from_numpy(load_digits().images[:120] / 16.0).float()[:, None]
    tiles = [
        photo[i : i + side, j : j + side] for i in range(0, 96 - side + 1, 16) for j in range(0, 128 - side + 1, 16)
    ]
    x = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
    return x if side == 32 else x.mean(dim=1, keepdim=True)


def _mse(name: str, x: torch.Tensor) -> list[float]:
    return [((corrupt_batch(x, name, s) - x) ** 2).mean().item() for s in SEVERITIES]


def test_table():
    assert len(CORRUPTIONS) == 15
    assert all(len(levels) == 5 for levels in CORRUPTIONS.values())
    assert [n for family in FAMILIES.values() for n in family] == NAMES


# ------------------------------------------------------------------------------------------ full size, properties


@pytest.mark.parametrize("name", NAMES)
def test_full_size_keeps_shape_and_type_and_changes_the_image(name, photo):
    for image in (photo, photo[..., 0], photo[..., :1]):
        out = corrupt(image, name, 3, rng=0)
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        assert (out != image).mean() > 0.05
    assert np.array_equal(corrupt(photo, name, 2, rng=7), corrupt(photo, name, 2, rng=np.random.default_rng(7)))


@pytest.mark.parametrize("name", [n for n in MONOTONE if n != "glass_blur"])
def test_full_size_error_rises_with_severity(name, photo):
    error = [((corrupt(photo, name, s, rng=1).astype(float) - photo) ** 2).mean() for s in SEVERITIES]
    assert sorted(set(error)) == error


def test_gaussian_noise_has_its_standard_deviation():
    gray = np.full((256, 256), 128, np.uint8)
    noise = corrupt(gray, "gaussian_noise", 1, rng=0).astype(float)
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.02)
    assert noise.mean() == pytest.approx(128 - 0.5, abs=0.3)  # truncated, not rounded


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_changes_its_fraction(severity):
    gray = np.full((256, 256), 128, np.uint8)
    out = corrupt(gray, "impulse_noise", severity, rng=0)
    amount = CORRUPTIONS["impulse_noise"][severity - 1][0]
    assert (out != 128).mean() == pytest.approx(amount, rel=0.05)
    assert (out == 255).mean() == pytest.approx(amount / 2, rel=0.1)
    assert set(np.unique(out)) == {0, 128, 255}


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_has_the_variance_of_a_poisson_count(severity):
    (rate,) = CORRUPTIONS["shot_noise"][severity - 1]
    x = torch.full((4, 1, 64, 64), 0.3)
    out = corrupt_batch(x, "shot_noise", severity)
    assert out.mean().item() == pytest.approx(0.3, rel=0.02)
    if rate >= 12:  # no clipping at 1
        assert out.var().item() == pytest.approx(0.3 / rate, rel=0.05)
    counts = out * rate
    assert torch.allclose(counts, counts.round(), atol=1e-4)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_constant_images(severity):
    for color in ((90, 90, 90), (40, 80, 120)):
        flat = np.broadcast_to(np.array(color, np.uint8), (40, 48, 3)).copy()
        for name in (
            "contrast",
            "pixelate",
            "defocus_blur",
            "zoom_blur",
            "motion_blur",
            "elastic_transform",
            "glass_blur",
        ):
            # blurs sum weights in floating point, and the result is truncated; see the disc's sum below
            slack = 0 if name == "pixelate" else 1
            assert np.abs(corrupt(flat, name, severity, rng=0).astype(int) - flat).max() <= slack, name
    gray = np.full((40, 48, 3), 100, np.uint8)
    added = 255 * CORRUPTIONS["brightness"][severity - 1][0]
    assert np.abs(corrupt(gray, "brightness", severity, rng=0).astype(float) - (100 + added)).max() <= 1


def test_contrast_of_a_full_range_image(photo):
    out = corrupt(photo, "contrast", 4, rng=0).astype(float)
    expected = (photo - photo.mean(axis=(0, 1))) * 0.1 + photo.mean(axis=(0, 1))
    assert np.abs(out - expected).max() <= 1


def test_brightness_keeps_hue_and_saturation(photo):
    out = corrupt(photo, "brightness", 1, rng=0)
    before, after = (np.asarray(Image.fromarray(a).convert("HSV")).astype(int) for a in (photo, out))
    clear = (before[..., 1] > 60) & (before[..., 2] > 60) & (before[..., 2] < 220)
    assert np.abs(after[..., 2] - before[..., 2] - 25.5)[clear].max() <= 1.5
    assert np.abs(after[..., 1] - before[..., 1])[clear].max() <= 4
    turn = np.abs(after[..., 0] - before[..., 0])[clear]
    assert np.minimum(turn, 256 - turn).max() <= 4


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_and_pixelate_are_those_of_pillow(photo, severity):
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=CORRUPTIONS["jpeg_compression"][severity - 1][0])
    assert np.array_equal(corrupt(photo, "jpeg_compression", severity, rng=0), np.asarray(Image.open(buffer)))
    c = CORRUPTIONS["pixelate"][severity - 1][0]
    small = Image.fromarray(photo).resize((int(128 * c), int(96 * c)), Image.Resampling.BOX)
    expected = np.asarray(small.resize((128, 96), Image.Resampling.NEAREST))
    assert np.array_equal(corrupt(photo, "pixelate", severity, rng=0), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_is_a_disc(photo, severity):
    radius, alias = CORRUPTIONS["defocus_blur"][severity - 1]
    reach = max(8, radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= radius**2) / np.sum(x**2 + y**2 <= radius**2)
    taps = 1 if radius <= 8 else 2
    kernel = ndimage.gaussian_filter(disc, alias, mode="mirror", radius=taps)
    expected = np.stack([ndimage.correlate(photo[..., c] / 255, kernel, mode="mirror") for c in range(3)], axis=-1)
    expected = np.clip(expected, 0, 1) * 255  # the published kernels of radius 8 and 10 sum to 1.01
    assert np.abs(corrupt(photo, "defocus_blur", severity, rng=0) - expected).max() <= 1.001


def test_blurs_keep_the_mean_of_the_interior():
    dot = np.zeros((96, 96), np.uint8)
    dot[44:52, 44:52] = 255
    for name in ("defocus_blur", "glass_blur", "motion_blur"):
        out = corrupt(dot, name, 3, rng=0).astype(float)
        assert out.sum() + 0.5 * (out > 0).sum() == pytest.approx(dot.sum(dtype=float), rel=0.03), name


def test_motion_blur_moves_along_one_line():
    dot = np.zeros((97, 97), np.uint8)
    dot[48, 48] = 255
    y, x = np.nonzero(corrupt(dot, "motion_blur", 1, rng=3))
    assert np.linalg.matrix_rank(np.stack([y - 48, x - 48]).astype(float), tol=3) == 1
    assert np.abs(x - 48).max() <= 20
    assert np.abs(y - 48).max() <= np.abs(x - 48).max()  # within 45 degrees of the horizontal


def test_fog_of_a_black_image_is_black_and_frost_is_not():
    black = np.zeros((64, 64, 3), np.uint8)
    assert not corrupt(black, "fog", 5, rng=0).any()
    assert corrupt(black, "frost", 5, rng=0).mean() > 50


def test_frost_textures_are_fixed_and_look_like_frost():
    textures = frost_textures()
    assert textures.flags.writeable is False
    assert textures.min() >= 0
    assert textures.max() <= 1
    assert (textures[..., 2] >= textures[..., 0]).all()  # bluish
    assert 0.4 < textures.mean() < 0.8
    assert all(t.std() > 0.1 for t in textures)
    large = np.zeros((600, 700), np.uint8)  # larger than a texture
    assert corrupt(large, "frost", 1, rng=0).shape == (600, 700)


# -------------------------------------------------------------------------------------------------- small images


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize("side", [8, 28, 32])
def test_small_images_each_severity_is_a_real_and_growing_degradation(name, side, photo):
    x = _images(photo, side)
    error = _mse(name, x)
    assert error[0] > (2e-4 if name in ("jpeg_compression", "zoom_blur", "defocus_blur", "pixelate") else 1e-3)
    assert sorted(set(error)) == error


@pytest.mark.parametrize("name", ["snow", "frost", "fog"])
@pytest.mark.parametrize("side", [8, 28, 32])
def test_small_images_weather_is_real_and_worst_at_the_end(name, side, photo):
    x = _images(photo, side)
    error = _mse(name, x)
    assert min(error) > 5e-3
    assert error[4] > error[0] * 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(7, 1, 8, 8), (5, 3, 20, 11), (2, 3, 40, 33), (3, 1, 4, 4)])
def test_batch_keeps_shape_range_and_does_not_depend_on_the_split(name, shape):
    x = torch.rand(shape)
    before = x.clone()
    out = corrupt_batch(x, name, 4, seed=11)
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert 0 <= out.min() <= out.max() <= 1
    assert not torch.allclose(out, x, atol=1e-3)
    one_by_one = torch.cat([corrupt_batch(x[i : i + 1], name, 4, seed=11, start=i) for i in range(len(x))])
    assert torch.allclose(one_by_one, out, atol=2e-6)  # sums may be in another order


def test_batch_work_is_chunked_without_a_seam(monkeypatch):
    x = torch.rand(9, 3, 8, 8)
    whole = {name: corrupt_batch(x, name, 2) for name in NAMES}
    monkeypatch.setattr("evenly.data.corruptions._CHUNK", 2 * 3 * 64)
    for name in NAMES:
        assert torch.allclose(corrupt_batch(x, name, 2), whole[name], atol=2e-6), name


@pytest.mark.parametrize("name", [n for n in NAMES if n not in DETERMINISTIC])
def test_random_corruptions_depend_on_seed_index_and_severity(name):
    x = torch.rand(1, 1, 16, 16).expand(2, 1, 16, 16)
    first = corrupt_batch(x, name, 3, seed=1)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, corrupt_batch(x, name, 3, seed=2))
    assert torch.equal(first, corrupt_batch(x, name, 3, seed=1))


def test_full_size_batches_use_the_published_constants(photo):
    x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].double() / 255
    for name in DETERMINISTIC:
        out = corrupt_batch(x, name, 3, full_size=True)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(out - corrupt(photo, name, 3, rng=0)).max() < 1.01, name
    assert small_image_scale(224) == 1
    big = torch.rand(1, 1, 224, 230)
    assert torch.equal(corrupt_batch(big, "defocus_blur", 1), corrupt_batch(big, "defocus_blur", 1, full_size=True))


def test_tiled_jpeg_is_that_of_each_image():
    x = torch.rand(50, 1, 13, 21)
    together = corrupt_batch(x, "jpeg_compression", 5)
    for i in (0, 17, 49):
        buffer = io.BytesIO()
        Image.fromarray(np.rint(x[i, 0].numpy() * 255).astype(np.uint8)).save(buffer, "JPEG", quality=7)
        assert np.array_equal(np.rint(together[i, 0].numpy() * 255), np.asarray(Image.open(buffer)))


def test_small_blurs_keep_the_mean():
    x = torch.zeros(1, 1, 33, 33)
    x[..., 16, 16] = 1
    for name in ("defocus_blur", "motion_blur", "glass_blur"):
        for severity in SEVERITIES:
            out = corrupt_batch(x, name, severity)
            assert out.sum().item() == pytest.approx(1, abs=1e-3)
            assert out.max() < 0.95


def test_pixelate_of_digits_has_fewer_blocks_each_time():
    x = torch.rand(1, 1, 8, 8)
    ranks = [torch.linalg.matrix_rank(corrupt_batch(x, "pixelate", s)[0, 0], rtol=1e-4).item() for s in SEVERITIES]
    assert ranks == [7, 6, 5, 4, 3]


def test_empty_half_and_grad_inputs():
    assert corrupt_batch(torch.zeros(0, 3, 8, 8), "fog", 1).shape == (0, 3, 8, 8)
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    assert not corrupt_batch(x, "contrast", 1).requires_grad
    assert corrupt_batch(torch.rand(2, 1, 8, 8).half(), "gaussian_noise", 1).dtype == torch.float16


# ------------------------------------------------------------------------------------------------- random numbers


@given(rate=st.floats(0, 80), u=st.floats(0, 1, exclude_max=True))
def test_poisson_quantile_is_that_of_scipy(rate, u):
    ours = _poisson_quantile(np.array([u]), np.array([rate]))[0]
    if rate == 0:
        assert ours == 0
        return
    lower, upper = (stats.poisson.ppf(np.clip(u + d, 0, 1 - 1e-15), rate) for d in (-1e-12, 1e-12))
    assert max(lower, 0) <= ours <= max(upper, lower, 0) + (u > 1 - 1e-11) * 40


@given(start=st.integers(0, 2**40), n=st.integers(1, 9), size=st.integers(1, 9), seed=st.integers(0, 2**62 - 1))
def test_streams_do_not_depend_on_the_split(start, n, size, seed):
    whole = _StreamDraws(seed, 5, n, start).uniform(size)
    last = _StreamDraws(seed, 5, 1, start + n - 1).uniform(size)
    assert np.array_equal(whole[-1:], last)


def test_streams_are_uniform_and_normal():
    draws = _StreamDraws(0, 1, 500, 0)
    assert stats.kstest(draws.uniform(40).ravel(), "uniform").pvalue > 1e-3
    normal = draws.normal(41)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal[:-1].ravel(), normal[1:].ravel())[0, 1]) < 0.03


# --------------------------------------------------------------------------------------------------------- errors


def test_errors_of_corrupt(photo):
    with pytest.raises(ValueError, match=r"unknown corruption 'fogg'.*gaussian_noise.*jpeg_compression"):
        corrupt(photo, "fogg", 1, rng=0)
    for severity in (0, 6, 1.5, True):
        with pytest.raises(ValueError, match="severity must be an integer from 1"):
            corrupt(photo, "fog", severity, rng=0)
    with pytest.raises(TypeError, match=r"uint8 in 0\.\.255, got an array of float64.*corrupt_batch"):
        corrupt(photo / 255, "fog", 1, rng=0)
    with pytest.raises(TypeError, match="got list"):
        corrupt([1], "fog", 1, rng=0)
    with pytest.raises(ValueError, match="at least 32 pixels, got 31 x 128"):
        corrupt(photo[:31], "fog", 1, rng=0)
    with pytest.raises(ValueError, match=r"shape \(H, W\)"):
        corrupt(np.zeros((40, 40, 4), np.uint8), "fog", 1, rng=0)
    with pytest.raises(TypeError, match=r"numpy.random.Generator or an integer seed, got NoneType"):
        corrupt(photo, "fog", 1, rng=None)


def test_errors_of_corrupt_batch():
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match="valid names are: gaussian_noise"):
        corrupt_batch(x, "", 1)
    with pytest.raises(ValueError, match="severity"):
        corrupt_batch(x, "fog", 7)
    with pytest.raises(TypeError, match=r"tensor of torch.uint8; divide 8-bit images by 255"):
        corrupt_batch((x * 255).byte(), "fog", 1)
    for bad in (x * 255, x - 0.5, torch.full_like(x, float("nan"))):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            corrupt_batch(bad, "fog", 1)
    for shape in ((8, 8), (1, 2, 8, 8), (1, 1, 3, 8)):
        with pytest.raises(ValueError, match="N, C, H, W"):
            corrupt_batch(torch.rand(shape), "fog", 1)
    for key in ("seed", "start"):
        for value in (-1, 0.5, 2**70):
            with pytest.raises(ValueError, match=f"{key} must be a non-negative integer"):
                corrupt_batch(x, "fog", 1, **{key: value})
    with pytest.raises(ValueError, match="at least 32"):
        corrupt_batch(x, "fog", 1, full_size=True)
