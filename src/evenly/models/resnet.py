"""A small residual network for small images.

Blocks of two 3x3 convolutions with a shortcut, each convolution followed by the normalization (post-activation,
He et al. 2015) or preceded by it (pre-activation, He et al. 2016):

    post:  y = relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))
    pre:   y = conv(relu(norm(conv(relu(norm(x)))))) + shortcut(x)

The first stage keeps the resolution, each later stage halves it and has its own width; then the mean over
positions and one linear layer. Use it where a network must train in seconds on 8x8 to 64x64 images.

References: arXiv:1512.03385 (post-activation), arXiv:1603.05027 (pre-activation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.core.recompute import check_memory, saving
from evenly.models._normed import NormedActivation
from evenly.models.recipes import Recipe, recipe

__all__ = ["ResNet", "resnet"]


class ResNet(nn.Module):
    """The network that :func:`resnet` builds.

    Args:
        in_channels: channels of the input images.
        num_classes: length of the output.
        layer: builds the normalization for a number of channels.
        widths: channels of each stage.
        blocks: residual blocks a stage.
        preactivation: normalize before the convolution (True) or after it (False).
        bias: whether the convolutions have a bias (needed where nothing normalizes after them).
        memory: ``"normal"`` or ``"low"``; see :func:`resnet`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        layer: Callable[[int], nn.Module],
        widths: Sequence[int],
        blocks: int,
        preactivation: bool,
        bias: bool,
        memory: str = "normal",
    ) -> None:
        super().__init__()
        check_memory(memory)
        self.memory = memory
        if not widths or min(widths) < 1 or blocks < 1:
            raise ValueError(f"widths is {tuple(widths)} and blocks {blocks}, expected at least one of each")
        block = _PreBlock if preactivation else _PostBlock
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=bias)
        self.stem = conv(in_channels, widths[0])
        self.stem_norm = None if preactivation else NormedActivation(layer(widths[0]), "relu")
        stages: list[nn.Module] = []
        width_in = widths[0]
        for stage, width in enumerate(widths):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(block(width_in, width, stride, conv, layer))
                width_in = width
        self.blocks = nn.Sequential(*stages)
        self.last_norm = NormedActivation(layer(width_in), "relu") if preactivation else None
        self.head = nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        with saving(self.memory):
            x = self.stem(x)
            if self.stem_norm is not None:
                x = self.stem_norm(x)
            x = self.blocks(x)
            if self.last_norm is not None:
                x = self.last_norm(x)
            return self.head(x.mean((2, 3)))


def resnet(
    in_channels: int,
    num_classes: int,
    *,
    norm: str | Recipe | Callable[[int], nn.Module] = "batch",
    widths: Sequence[int] = (16, 32),
    blocks: int = 1,
    preactivation: bool = False,
    memory: str = "normal",
) -> nn.Module:
    """A small residual network.

    Args:
        in_channels: channels of the input images.
        num_classes: number of classes.
        norm: a name in :data:`evenly.models.RECIPES`, a ``"module:attribute"`` path, or a callable from the
            number of channels to a module. With ``"none"`` the convolutions have a bias.
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: residual blocks a stage.
        preactivation: normalization and activation before each convolution instead of after it.
        memory: ``"normal"``, or ``"low"`` to keep less for the backward pass, with the same gradients: outputs of
            normalizations are computed again; see :class:`evenly.nn.low_memory`.

    Returns:
        A module from (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: an unknown normalization or ``memory``, or no stage.

    >>> import torch
    >>> resnet(1, 10, norm="group")(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    row = recipe(norm)
    model = ResNet(in_channels, num_classes, row.build, widths, blocks, preactivation, row.layer == "none", memory)
    return row.finish(model, torch.zeros(2, in_channels, 8, 8))


class _PostBlock(nn.Module):
    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Conv2d],
        layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = conv(width_in, width, stride=stride)
        self.norm1 = NormedActivation(layer(width), "relu")
        self.conv2 = conv(width, width)
        self.norm2 = NormedActivation(layer(width), "relu")
        self.shortcut = _Shortcut(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=self.shortcut(x))


class _PreBlock(nn.Module):
    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        conv: Callable[..., nn.Conv2d],
        layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = NormedActivation(layer(width_in), "relu")
        self.conv1 = conv(width_in, width, stride=stride)
        self.norm2 = NormedActivation(layer(width), "relu")
        self.conv2 = conv(width, width)
        self.shortcut = _Shortcut(width_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(y)) + self.shortcut(x)


class _Shortcut(nn.Module):
    # Without parameters ("option A" of arXiv:1512.03385): the mean of each 2x2 square, new channels zero.
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.more = width - width_in
        self.stride = stride
        if self.more < 0:
            raise ValueError(f"widths must not shrink: {width_in} channels are followed by {width}")

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = functional.avg_pool2d(x, self.stride, ceil_mode=True)
        return functional.pad(x, (0, 0, 0, 0, 0, self.more)) if self.more else x
