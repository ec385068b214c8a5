r"""The networks of Fixup: residual networks and a Transformer without normalization.

    basic:       y = relu(scale · conv(relu(conv(x + b) + b) + b) + b + shortcut(x))
    bottleneck:  the same with three convolutions, 1x1, 3x3 and 1x1

with scalars b (0) and scale (1), the last convolution of each block and the classifier at 0, and the others drawn after
He et al. (fan-out) times L^(-1/(2m - 2)); L counts the blocks of the network, m = 2 or 3. Modules and parameters have
the names of the released code, whose state dicts load.

For a network of your own see :func:`evenly.weights.fixup_`.

Reference:
    Hongyi Zhang, Yann N. Dauphin & Tengyu Ma, *Fixup Initialization: Residual Learning Without Normalization*, ICLR
    2019, arXiv 1901.09321, figure 1 and sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenly.weights import fixup_, fixup_init_

__all__ = [
    "FixupBasicBlock",
    "FixupBottleneck",
    "FixupResNet",
    "fixup_resnet_cifar",
    "fixup_resnet_imagenet",
    "fixup_transformer",
]

_IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class FixupBasicBlock(nn.Module):
    """Two 3x3 convolutions, four scalar biases and one multiplier.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: the shortcut, applied to the shifted input. If its output has fewer channels than the branch, zero
            channels are added. ``None``: the input itself.

    As built, the convolutions have torch's initialization: a network knows L and initializes them
    (:func:`evenly.weights.fixup_init_` with ``[block.conv1, block.conv2]``).

    >>> block = FixupBasicBlock(4, 4)
    >>> fixup_init_([[block.conv1, block.conv2]], L=16)
    >>> x = torch.randn(2, 4, 8, 8)
    >>> torch.equal(block(x), x.relu())
    True
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bias1b = _scalar(0.0)
        self.bias2a = _scalar(0.0)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.scale = _scalar(1.0)
        self.bias2b = _scalar(0.0)
        self.downsample = downsample

    def layers(self) -> list[nn.Module]:
        """The weight layers of the branch, in order."""
        return [self.conv1, self.conv2]

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, H / stride, W / stride)."""
        shifted = x + self.bias1a
        y = functional.relu(self.conv1(shifted) + self.bias1b)
        y = self.conv2(y + self.bias2a) * self.scale + self.bias2b
        return functional.relu(y + _shortcut(self.downsample, x, shifted, y))


class FixupBottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride) and 1x1, six scalar biases and one multiplier.

    Args:
        inplanes, stride, downsample: as in :class:`FixupBasicBlock`.
        planes: channels inside; the output has four times as many.

    >>> FixupBottleneck(16, 4)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.bias1a = _scalar(0.0)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bias1b = _scalar(0.0)
        self.bias2a = _scalar(0.0)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bias2b = _scalar(0.0)
        self.bias3a = _scalar(0.0)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.scale = _scalar(1.0)
        self.bias3b = _scalar(0.0)
        self.downsample = downsample

    def layers(self) -> list[nn.Module]:
        """The weight layers of the branch, in order."""
        return [self.conv1, self.conv2, self.conv3]

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4 planes, H / stride, W / stride)."""
        shifted = x + self.bias1a
        y = functional.relu(self.conv1(shifted) + self.bias1b)
        y = functional.relu(self.conv2(y + self.bias2a) + self.bias2b)
        y = self.conv3(y + self.bias3a) * self.scale + self.bias3b
        return functional.relu(y + _shortcut(self.downsample, x, shifted, y))


class FixupResNet(nn.Module):
    """The network that :func:`fixup_resnet_cifar` and :func:`fixup_resnet_imagenet` build.

    Args:
        block: :class:`FixupBasicBlock` or :class:`FixupBottleneck`.
        layers: blocks of each stage.
        num_classes: length of the output.
        width: channels of the first stage; each later stage has twice as many at half the resolution.
        in_channels: of the images.
        large: the stem and shortcuts for ImageNet (7x7 convolution and max pooling; projections) instead of those for
            CIFAR (3x3 convolution; without parameters).

    >>> network = FixupResNet(FixupBasicBlock, (1, 1), num_classes=10, width=8)
    >>> network(torch.randn(2, 3, 8, 8)).abs().max().item()
    0.0
    """

    def __init__(
        self,
        block: type[FixupBasicBlock] | type[FixupBottleneck],
        layers: tuple[int, ...],
        num_classes: int,
        width: int,
        in_channels: int = 3,
        large: bool = False,
    ) -> None:
        super().__init__()
        if not layers or min(*layers, num_classes, width, in_channels) < 1:
            raise ValueError(
                f"layers={layers}, num_classes={num_classes}, width={width} and in_channels={in_channels} must be "
                f"positive."
            )
        stem = (7, 2, 3) if large else (3, 1, 1)
        self.conv1 = nn.Conv2d(in_channels, width, *stem, bias=False)
        self.bias1 = _scalar(0.0)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        channels = width
        self.stages = [f"layer{index + 1}" for index in range(len(layers))]
        for index, (name, count) in enumerate(zip(self.stages, layers, strict=True)):
            planes = width * 2**index
            blocks: list[nn.Module] = []
            for number in range(count):
                stride = 2 if index and not number else 1
                out = planes * block.expansion
                blocks.append(block(channels, planes, stride, _projection(channels, out, stride, large)))
                channels = out
            self.add_module(name, nn.Sequential(*blocks))
        self.bias2 = _scalar(0.0)
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fixup: He (fan-out), scaled inside the branches; the last convolutions and the classifier 0."""
        blocks = [module for module in self.modules() if isinstance(module, FixupBasicBlock | FixupBottleneck)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        fixup_init_([block.layers() for block in blocks])
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.maxpool(functional.relu(self.conv1(x) + self.bias1))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)) + self.bias2)


def fixup_resnet_cifar(depth: int, num_classes: int = 10, *, width: int = 16, in_channels: int = 3) -> FixupResNet:
    """The residual network for small images: three stages of (depth - 2) / 6 basic blocks.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56, 110, 1202, ...
        num_classes: length of the output.
        width: channels of the first stage.
        in_channels: of the images.

    Raises:
        ValueError: another depth.

    >>> sum(p.numel() == 1 for p in fixup_resnet_cifar(20).parameters())  # 9 blocks of 5, and 2
    47
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth} is not 6 n + 2 for a whole n of at least 1, such as 20, 32, 44, 56 or 110.")
    return FixupResNet(FixupBasicBlock, (blocks,) * 3, num_classes, width, in_channels)


def fixup_resnet_imagenet(depth: int, num_classes: int = 1000, *, width: int = 64, in_channels: int = 3) -> FixupResNet:
    """The residual network for large images: basic blocks for depth 18 and 34, bottlenecks for 50, 101 and 152.

    Args:
        depth: one of these.
        num_classes, width, in_channels: as in :func:`fixup_resnet_cifar`.

    Raises:
        ValueError: another depth.

    >>> network = fixup_resnet_imagenet(50, width=4, num_classes=10)
    >>> network(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    if depth not in _IMAGENET:
        raise ValueError(f"depth={depth} is unknown, expected one of {', '.join(map(str, _IMAGENET))}.")
    block = FixupBasicBlock if depth < 50 else FixupBottleneck
    return FixupResNet(block, _IMAGENET[depth], num_classes, width, in_channels, large=True)


def fixup_transformer(
    d_model: int = 512,
    nhead: int = 8,
    num_encoder_layers: int = 6,
    num_decoder_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: str | Callable[[Tensor], Tensor] = "relu",
    **options: Any,
) -> nn.Transformer:
    """The encoder and decoder without layer normalization: ``torch.nn.Transformer`` with Fixup.

    L is 2 ``num_encoder_layers`` + 3 ``num_decoder_layers``. Linear layers have no biases; every sublayer has a shift
    before it and a multiplier at its end, the encoder's output a multiplier and a shift, the decoder's a shift.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, **options: as in
            ``torch.nn.Transformer`` (``batch_first``, ...).

    >>> model = fixup_transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    >>> source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    >>> torch.equal(model(source, target), target)  # every branch starts at 0
    True
    """
    model = nn.Transformer(
        d_model,
        nhead,
        num_encoder_layers,
        num_decoder_layers,
        dim_feedforward,
        dropout,
        activation,
        bias=False,
        **options,
    )
    like = next(model.parameters())
    source = torch.zeros(2, 2, d_model, device=like.device, dtype=like.dtype)
    fixup_(model, (source, source), classifier=False)
    model.encoder.norm = _End(scale=True).to(like)
    model.decoder.norm = _End(scale=False).to(like)
    return model


class _End(nn.Module):
    # The scalars at the end of the encoder and of the decoder.
    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.scale = _scalar(1.0) if scale else None
        self.bias = _scalar(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.scale is None else x * self.scale) + self.bias


class _Pick(nn.Module):
    # Every second position, as average pooling with a kernel of 1 does.
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


def _projection(channels: int, out: int, stride: int, large: bool) -> nn.Module | None:
    if stride == 1 and channels == out:
        return None
    return nn.Conv2d(channels, out, 1, stride, bias=False) if large else _Pick(stride)


def _shortcut(downsample: nn.Module | None, x: Tensor, shifted: Tensor, y: Tensor) -> Tensor:
    if downsample is None:
        return x
    shortcut = downsample(shifted)
    return functional.pad(shortcut, (0, 0, 0, 0, 0, y.shape[1] - shortcut.shape[1]))


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))
