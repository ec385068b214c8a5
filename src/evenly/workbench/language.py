"""Trials on text: a small language model on bytes, scored in bits per byte.

The networks are those of :meth:`evenly.models.Recipe.language_model`: a GPT of three blocks with 64 features and
4 heads, on windows of 64 bytes. The text is cut into windows; the last tenth of it is tested on. Bits per byte is the
mean cross-entropy, to base 2, of the bytes after each byte of the tested windows: what a byte would cost an arithmetic
coder that sees the window so far. Lower is better. A uniform guess costs 8, and nothing counts as more: a network that
diverged, or whose loss is not a number, counts as that guess.

Training is that of :mod:`evenly.workbench.trial` with gradients clipped to norm 1, betas 0.9 and 0.95, and weight
decay 0.1 on matrices. A network whose weight vectors are kept at length 1 (nGPT) has neither weight decay nor
warm-up, and is projected after every step, as its paper has it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evenly.data import TextData, load_text
from evenly.nn import NormalizedLinear, ProjectedOptimizer

if TYPE_CHECKING:
    from evenly.models._language import LanguageModel

__all__ = ["bits_per_byte", "build_language_model", "is_text", "language_optimizer", "load_words", "windows"]

LENGTH = 64
SIZES = {"dim": 64, "depth": 3, "num_heads": 4, "block_size": LENGTH}
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
TEST_WINDOWS = 512
UNIFORM = 8.0  # bits: the cost of a byte without a model
CHUNK = 64  # windows in one batch of evaluation


def is_text(spec: str) -> bool:
    """Whether a ``--data`` option names a text.

    >>> is_text("text"), is_text("text:book.txt"), is_text("digits")
    (True, True, False)
    """
    return spec == "text" or spec.startswith("text:")


@functools.lru_cache(maxsize=2)
def load_words(spec: str) -> TextData:
    """The text of a ``--data`` option: ``text`` (the source of Python's standard library) or ``text:FILE``.

    Raises:
        ValueError: a text that is too short for a window to train and one to test.
        FileNotFoundError: there is no such file.
    """
    name = spec.partition(":")[2]
    text = load_text(f"file:{name}" if name else "stdlib")
    if min(len(text.train), len(text.val)) <= LENGTH:
        raise ValueError(
            f"{spec} has {len(text.train)} bytes to train and {len(text.val)} to test, expected more than {LENGTH} each"
        )
    return text


def windows(text: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of a text and the byte after each of their bytes: (windows, 64) twice.

    >>> x, y = windows(torch.arange(130, dtype=torch.uint8))
    >>> x.shape, bool((y[:, :-1] == x[:, 1:]).all())
    (torch.Size([2, 64]), True)
    """
    rows = text.unfold(0, LENGTH + 1, LENGTH).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def build_language_model(norm: str) -> LanguageModel:
    """The language model of a trial, for a name in :data:`evenly.models.RECIPES` or ``"module:attribute"``.

    >>> build_language_model("rms").block_size
    64
    """
    from evenly.models import recipe

    return recipe(norm).language_model(256, **SIZES)


def language_optimizer(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, bool]:
    """AdamW for a language model, and whether the learning rate warms up."""
    unit = any(isinstance(module, NormalizedLinear) for module in model.modules())
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.0 if unit else WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    return (ProjectedOptimizer(optimizer, model), False) if unit else (optimizer, True)


@torch.no_grad()
def bits_per_byte(model: LanguageModel, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy of a model on windows, to base 2; 8 where it is more or not a number."""
    total = 0.0
    for inputs, targets in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        loss = model(inputs, targets)[1]
        assert loss is not None
        total += loss.double().item() * len(inputs)
    bits = total / len(x) / math.log(2)
    return min(bits, UNIFORM) if math.isfinite(bits) else UNIFORM
