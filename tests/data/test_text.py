"""Texts as bytes."""

from __future__ import annotations

import gzip

import pytest
import torch

from evenly.data import load_text, stdlib_source


def test_stdlib_is_python_in_a_fixed_order():
    text = stdlib_source(300_000)
    assert len(text) == 300_000
    assert text == stdlib_source(300_000)
    assert text.startswith(stdlib_source(1000))
    assert b"import " in text
    assert b"def " in text


def test_split_is_by_position(tmp_path):
    raw = bytes(range(256)) * 4
    (tmp_path / "a.bin").write_bytes(raw)
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    for name in ("a.bin", "a.gz"):
        data = load_text(f"file:{tmp_path / name}")
        assert data.train.dtype == torch.uint8
        assert bytes(data.train.tolist()) + bytes(data.val.tolist()) == raw
        assert len(data.val) == 102
        assert data.vocabulary == 256
    assert len(load_text(f"file:{tmp_path / 'a.gz'}", max_bytes=10, val_fraction=0.3).train) == 7


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown text 'book'; known: stdlib, file:PATH"):
        load_text("book")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_text(f"file:{tmp_path / 'no'}")
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(ValueError, match="has 1 bytes, too few"):
        load_text(f"file:{tmp_path / 'one'}")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"hello" * 100)[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        load_text(f"file:{tmp_path / 'bad.gz'}")
    with pytest.raises(ValueError, match="positive integer"):
        stdlib_source(0)
    with pytest.raises(ValueError, match="fewer than max_bytes"):
        stdlib_source(10**10)
    for fraction in (0, 1):
        with pytest.raises(ValueError, match="val_fraction"):
            load_text("stdlib", val_fraction=fraction)
    with pytest.raises(ValueError, match="max_bytes"):
        load_text("stdlib", max_bytes=1)


def test_real_text(shared_data):
    data = load_text(f"file:{shared_data / 'tinyshakespeare' / 'input.txt.gz'}")
    assert len(data.train) + len(data.val) == 1_115_394
    assert bytes(data.train[:14].tolist()) == b"First Citizen:"
