"""A multilayer perceptron: linear layers, each followed by the normalization and a ReLU.

    h_0 = x;  h_i = relu(norm(W_i h_{i-1} + b_i));  y = W h_k + b

Use it for feature vectors, or for images where no structure shall help (they are flattened).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evenly.models._normed import NormedActivation
from evenly.models.recipes import Recipe, recipe

__all__ = ["MLP", "mlp"]


class MLP(nn.Module):
    """The network that :func:`mlp` builds.

    Args:
        in_features: length of a feature vector; images are flattened to it.
        num_classes: length of the output.
        layer: builds the normalization for a number of features.
        widths: features of each hidden layer.
        bias: whether the hidden layers have a bias (needed where nothing normalizes after them).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        layer: Callable[[int], nn.Module],
        widths: Sequence[int],
        bias: bool,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths is {tuple(widths)}, expected at least one hidden layer of at least one unit")
        layers: list[nn.Module] = []
        width_in = in_features
        for width in widths:
            linear = nn.Linear(width_in, width, bias=bias)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            if bias:
                nn.init.zeros_(linear.bias)
            layers += [linear, NormedActivation(layer(width), "relu")]
            width_in = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)))


def mlp(
    in_features: int,
    num_classes: int,
    *,
    norm: str | Recipe | Callable[[int], nn.Module] = "batch",
    widths: Sequence[int] = (64, 64),
) -> nn.Module:
    """A multilayer perceptron.

    Args:
        in_features: length of a feature vector (for images channels x height x width).
        num_classes: number of classes.
        norm: a name in :data:`evenly.models.RECIPES`, a ``"module:attribute"`` path, or a callable from the
            number of features to a module. With ``"none"`` the hidden layers have a bias.
        widths: units of each hidden layer.

    Returns:
        A module from (N, in_features) or (N, C, H, W) to logits (N, num_classes).

    Raises:
        ValueError: an unknown normalization, or no hidden layer.

    >>> import torch
    >>> mlp(30, 2, norm="layer")(torch.zeros(4, 30)).shape
    torch.Size([4, 2])
    """
    row = recipe(norm)
    model = MLP(in_features, num_classes, row.build, widths, bias=row.layer == "none")
    return row.finish(model, torch.zeros(2, in_features))
