"""Text as bytes: Python's standard library as a corpus that every machine has, and a user's own file.

Use :func:`load_text` for small language models on bytes. The split is by position: the first 90 % train, the
rest validates, as is usual for one running text.
"""

from __future__ import annotations

import gzip
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["TextData", "load_text", "stdlib_source"]

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


@dataclass(frozen=True, eq=False, repr=False)
class TextData:
    """A text as bytes: ``train`` and ``val``, one-dimensional uint8 tensors (``.long()`` gives token ids)."""

    name: str
    train: torch.Tensor
    val: torch.Tensor

    @property
    def vocabulary(self) -> int:
        """Number of token ids: 256, a byte each."""
        return 256

    def __repr__(self) -> str:
        return f"TextData({self.name!r}, {len(self.train)} train bytes, {len(self.val)} val bytes)"


def stdlib_source(max_bytes: int = 1_000_000) -> bytes:
    """The source of the running Python's standard library, folder by folder in the order of names.

    Tests and installed packages are left out. The text depends on the Python version alone.

    Args:
        max_bytes: the text is cut off there.

    Raises:
        ValueError: if ``max_bytes`` is not positive, or the library has less source than that.
        FileNotFoundError: if this Python was installed without its source.

    Example:
        >>> len(stdlib_source(1000))
        1000
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    out = bytearray()
    for file in _sources(root):
        out += file.read_bytes()
        if len(out) >= max_bytes:
            return bytes(out[:max_bytes])
    if not out:
        raise FileNotFoundError(f"no Python source in {root}; use load_text('file:PATH') with a text of your own")
    raise ValueError(f"the standard library has {len(out)} bytes of source, fewer than max_bytes={max_bytes}")


def load_text(spec: str, *, max_bytes: int | None = None, val_fraction: float = 0.1) -> TextData:
    """Load a text by its spec: ``stdlib`` or ``file:PATH`` (raw or gzip).

    Args:
        spec: which text.
        max_bytes: at most so many bytes from the start (default: 1,000,000 of ``stdlib``, all of a file).
        val_fraction: share at the end that validates, in (0, 1).

    Raises:
        ValueError: for an unknown spec, a damaged gzip file, a text too short to split.
        FileNotFoundError: if there is no such file.

    Example:
        >>> load_text("stdlib", max_bytes=2000)
        TextData('stdlib', 1800 train bytes, 200 val bytes)
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, both excluded; got {val_fraction}")
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 2):
        raise ValueError(f"max_bytes must be an integer of at least 2 or None, got {max_bytes!r}")
    if spec == "stdlib":
        raw = stdlib_source() if max_bytes is None else stdlib_source(max_bytes)
    elif spec.startswith("file:") and spec != "file:":
        raw = _read_bytes(Path(spec[len("file:") :]).expanduser())[:max_bytes]
    else:
        raise ValueError(f"unknown text {spec!r}; known: stdlib, file:PATH (raw or .gz)")
    held_out = max(1, round(len(raw) * val_fraction))
    if len(raw) - held_out < 1:
        raise ValueError(f"{spec} has {len(raw)} bytes, too few to split into training and validation")
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return TextData(spec, data[:-held_out].clone(), data[-held_out:].clone())


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.is_dir():
            if path.name not in _LEFT_OUT:
                yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"the file {path} does not exist")
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file: {error}") from error
