"""Shifted domains and the corruptions of tables."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from evenly.data import (
    CORRUPTIONS,
    DOMAINS,
    SEVERITIES,
    TABULAR_CORRUPTIONS,
    apply_domain,
    corrupt_table,
    corruption_suite,
    domains_for,
    load,
    tabular_corruptions,
)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def cancer():
    return load("breast_cancer")


@pytest.mark.parametrize("name", list(DOMAINS["image"]))
def test_image_domains(name, digits):
    out = apply_domain(digits, name, seed=1)
    assert out.test_x.shape == digits.test_x.shape
    assert out.test_x.dtype == torch.float32
    assert 0 <= out.test_x.min() <= out.test_x.max() <= 1
    assert torch.equal(out.test_y, digits.test_y)
    assert out.train_x is digits.train_x
    assert ((out.test_x - digits.test_x) ** 2).mean() > 2e-3
    assert torch.equal(out.test_x, apply_domain(digits, name, seed=1).test_x)
    assert torch.equal(out.test_x, apply_domain(digits.test_x, name, seed=1))
    part = apply_domain(digits.test_x[:5], name, seed=1)
    assert torch.allclose(part, out.test_x[:5], atol=1e-6)  # an image's shift is its own
    color = torch.rand(3, 3, 20, 14)
    assert apply_domain(color, name).shape == color.shape
    assert apply_domain(color[:0], name).shape == (0, 3, 20, 14)


def test_geometry_moves_a_dot_as_it_says():
    dot = torch.zeros(200, 1, 41, 41)
    dot[:, :, 20, 30] = 1  # 10 right of the centre
    where = torch.stack(torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")) - 20

    def moved(name):
        out = apply_domain(dot, name)[:, 0]
        mass = out.sum(dim=(1, 2)).clamp(min=1e-6)
        return torch.einsum("nhw,chw->nc", out, where) / mass[:, None], mass

    place, mass = moved("rotated")
    assert torch.allclose(place.norm(dim=1), torch.full((200,), 10.0), atol=0.5)
    angle = torch.rad2deg(torch.atan2(place[:, 0], place[:, 1])).abs()
    assert 13 < angle.min() < angle.max() < 37
    place, mass = moved("translated")
    shift = (place - torch.tensor([0.0, 10.0]))[mass > 0.5].norm(dim=1)
    assert 41 * 0.125 - 0.7 < shift.min() < shift.max() < 41 * 0.2 + 0.7
    place, _ = moved("scaled")
    assert {bool(p > 10) for p in place[:, 1]} == {True, False}


def test_stroke_and_light(digits):
    x = digits.test_x
    assert (apply_domain(x, "thick") >= x - 1e-6).all()
    assert (apply_domain(x, "thin") <= x + 1e-6).all()
    assert (apply_domain(x, "background") >= x - 1e-6).all()
    assert (apply_domain(x, "gradient") >= x - 1e-6).all()
    assert torch.allclose(apply_domain(x, "intensity"), 0.5 * x + 0.3)
    line = torch.zeros(1, 1, 40, 40)
    line[..., 20] = 1
    assert (apply_domain(line, "thick")[0, 0, 20] > 0.99).sum() == 5  # two pixels on each side at 40


@pytest.mark.parametrize("name", list(DOMAINS["tabular"]))
def test_tabular_domains(name, cancer):
    out = apply_domain(cancer, name, seed=2)
    assert out.test_x.shape == cancer.test_x.shape
    assert not torch.equal(out.test_x, cancer.test_x)
    assert torch.equal(out.test_x, apply_domain(cancer, name, seed=2).test_x)
    assert not torch.equal(out.test_x, apply_domain(cancer, name, seed=3).test_x)
    if name in ("subpopulation", "label_shift"):
        rows = {tuple(r.tolist()): int(y) for r, y in zip(cancer.test_x, cancer.test_y, strict=True)}
        assert all(rows[tuple(r.tolist())] == int(y) for r, y in zip(out.test_x, out.test_y, strict=True))
        with pytest.raises(ValueError, match="needs their labels: pass the Dataset"):
            apply_domain(cancer.test_x, name)
    else:
        assert torch.equal(out.test_y, cancer.test_y)
        assert torch.equal(out.test_x, apply_domain(cancer.test_x, name, seed=2))


def test_populations_shift(cancer):
    share = [(apply_domain(cancer, "label_shift", s).test_y == 1).double().mean().item() for s in range(6)]
    before = (cancer.test_y == 1).double().mean().item()
    assert min(share) < before - 0.2 or max(share) > before + 0.2
    moved = apply_domain(cancer, "subpopulation", 0).test_x.mean(dim=0) - cancer.test_x.mean(dim=0)
    assert moved.norm() > 0.5


def test_domain_errors(digits, cancer):
    assert list(domains_for(digits)) == list(DOMAINS["image"])
    with pytest.raises(
        ValueError, match=r"unknown domain 'missing_cells' for image data; the valid names are: inverted"
    ):
        apply_domain(digits, "missing_cells")
    with pytest.raises(ValueError, match="for tabular data"):
        apply_domain(cancer.test_x, "rotated")
    with pytest.raises(TypeError, match="expected a Dataset"):
        apply_domain([1], "rotated")
    with pytest.raises(TypeError, match=r"got \(3,\)"):
        apply_domain(torch.rand(3), "rotated")
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        apply_domain(torch.rand(2, 1, 8, 8) * 9, "rotated")
    with pytest.raises(TypeError, match="floating-point"):
        apply_domain(torch.ones(2, 8, dtype=torch.int64), "sensor_drift")


# ----------------------------------------------------------------------------------------- corruptions of tables


@pytest.mark.parametrize("name", list(TABULAR_CORRUPTIONS))
def test_table_corruptions_grow_and_do_not_depend_on_the_split(name):
    x = torch.randn(400, 30)
    error = [((corrupt_table(x, name, s) - x) ** 2).mean().item() for s in SEVERITIES]
    assert error[0] > 1e-3
    assert sorted(set(error)) == error
    whole = corrupt_table(x, name, 3, seed=5)
    parts = torch.cat([corrupt_table(x[:33], name, 3, seed=5), corrupt_table(x[33:], name, 3, seed=5, start=33)])
    assert torch.equal(whole, parts)
    assert name == "quantize" or not torch.equal(whole, corrupt_table(x, name, 3, seed=6))
    assert corrupt_table(x[:0], name, 1).shape == (0, 30)


def test_table_corruptions_are_what_they_say():
    x = torch.randn(2000, 20, dtype=torch.float64)
    for severity in SEVERITIES:
        level = {name: p[severity - 1] for name, p in TABULAR_CORRUPTIONS.items()}
        noise = corrupt_table(x, "gaussian_noise", severity) - x
        assert noise.std().item() == pytest.approx(level["gaussian_noise"], rel=0.03)
        assert (corrupt_table(x, "missing", severity) == 0).double().mean().item() == pytest.approx(
            level["missing"], abs=0.01
        )
        ratio = corrupt_table(x, "scale_drift", severity) / x
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
        assert (ratio > 0).all()
        offset = corrupt_table(x, "offset_drift", severity) - x
        assert torch.allclose(offset, offset[:1].expand_as(offset))
        swapped = corrupt_table(x, "swap", severity)
        assert torch.equal(swapped.sort(dim=1).values, x.sort(dim=1).values)
        assert ((swapped != x).sum(dim=1) == round(20 * level["swap"])).all()
        steps = corrupt_table(x, "quantize", severity) / level["quantize"]
        assert torch.allclose(steps, steps.round())
        hit = corrupt_table(x, "outliers", severity) != x
        assert hit.double().mean().item() == pytest.approx(level["outliers"], abs=0.01)


def test_table_errors():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"unknown tabular corruption 'fog'; the valid names are: gaussian_noise"):
        corrupt_table(x, "fog", 1)
    with pytest.raises(ValueError, match="severity must be"):
        corrupt_table(x, "swap", 0)
    with pytest.raises(ValueError, match=r"\(N, D\), got \(3,\)"):
        corrupt_table(x[:, 0], "swap", 1)
    with pytest.raises(TypeError, match="floating-point"):
        corrupt_table(x.long(), "swap", 1)
    with pytest.raises(ValueError, match="at least 2 features"):
        corrupt_table(x[:, :1], "swap", 1)


def test_suite_fits_the_data(digits, cancer):
    assert list(corruption_suite(digits)) == list(CORRUPTIONS)
    suite = corruption_suite(cancer)
    assert list(suite) == list(TABULAR_CORRUPTIONS) == list(tabular_corruptions())
    for data in (digits, cancer):
        for name, function in corruption_suite(data).items():
            out = function(data.test_x, 2, 7)
            assert out.shape == data.test_x.shape
            again = pickle.loads(pickle.dumps(function))
            assert torch.equal(again(data.test_x, 2, seed=7), out)
            assert torch.allclose(function(data.test_x[4:], 2, 7, start=4), out[4:], atol=2e-6)
            assert name in repr(function)
        assert not set(suite) & set(domains_for(data))
    one = dataclasses.replace(cancer, train_x=cancer.train_x[:, :1], test_x=cancer.test_x[:, :1])
    assert "swap" not in corruption_suite(one)
