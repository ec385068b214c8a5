"""The normalizations that a model can be built with: one row each.

A recipe says which layer stands where a network normalizes, what is done to the whole network besides (``prepare``),
such as standardizing its convolution weights, and what its initialization takes from data (``start``). The networks
of :mod:`evenly.models` and the command ``evenly compare`` take every row of :data:`RECIPES`; a new method adds one row
and appears in both. Rows with ``default=False`` are compared where they are named.

``"frozen"`` and ``"sync"`` of :func:`evenly.nn.create` have no row: frozen batch normalization needs the
statistics of a trained network, and synchronized batch normalization needs a process group.

References: group or batch-channel normalization with weight standardization: Qiao et al. 2019, arXiv:1903.10520; weight
normalization, alone and with mean-only batch normalization: Salimans & Kingma 2016, arXiv:1602.07868; Fixup: Zhang et
al. 2019, arXiv:1901.09321.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from evenly.models._language import LanguageModel

__all__ = ["RECIPES", "Layer", "Recipe", "recipe", "recipes_for"]

Layer = str | Callable[[int], nn.Module]
"""A name that :func:`evenly.nn.create` knows, or a callable from the number of features to a module."""

KINDS = ("image", "tabular", "text")

VECTORS = ("image", "tabular")


@dataclass(frozen=True)
class Recipe:
    """One way to normalize a network.

    Args:
        name: how users call it, in ``norm=`` and ``--norms``.
        layer: the layer in the places where the network normalizes: a name for :func:`evenly.nn.create`, or
            a callable that takes the number of features (channels, axis 1) and returns a module.
        prepare: called with the finished network and an example of its input, whose values do not matter; changes the
            network in place or returns another one. ``None``: nothing more to do.
        start: called with the network and a list of batches of training inputs, before training: initialization from
            data, in place. ``None``: none.
        default: whether ``evenly compare`` takes it where no normalizations are named; others are named with
            ``--norms``.
        kinds: the inputs it is for: ``"image"`` (N, C, H, W), ``"tabular"`` (N, C), and ``"text"``, the tokens of a
            language model (N, T, C).
        language: for text, builds the language model from the sizes of :func:`evenly.models.gpt`, where that is more
            than a GPT with this layer. ``None``: such a GPT.
        description: one line for the report.
    """

    name: str
    layer: Layer
    prepare: Callable[[nn.Module, Tensor], nn.Module] | None = None
    start: Callable[[nn.Module, list[Tensor]], object] | None = None
    default: bool = True
    kinds: tuple[str, ...] = VECTORS
    language: Callable[..., LanguageModel] | None = None
    description: str = ""

    def build(self, num_features: int) -> nn.Module:
        """The layer for inputs with ``num_features`` channels in axis 1.

        >>> recipe("batch").build(8).weight.shape
        torch.Size([8])
        """
        if isinstance(self.layer, str):
            from evenly.nn import create

            return create(self.layer, num_features)
        return self.layer(num_features)

    def language_model(self, vocab_size: int, **sizes: Any) -> LanguageModel:
        """The language model with this normalization.

        Args:
            vocab_size: number of token ids.
            **sizes: ``dim``, ``depth``, ``num_heads``, ``block_size`` of :func:`evenly.models.gpt`.

        >>> recipe("qknorm").language_model(256, dim=32, depth=1).blocks[0].attention.branch.qk_norm
        'l2'
        """
        if self.language is not None:
            return self.language(vocab_size, **sizes)
        from evenly.models.gpt import gpt

        return gpt(vocab_size, norm=self, **sizes)

    def finish(self, model: nn.Module, example: Tensor) -> nn.Module:
        """Apply ``prepare`` to a finished network, with an example of its input, and return the network."""
        return model if self.prepare is None else self.prepare(model, example)

    def initialize(self, model: nn.Module, batches: list[Tensor]) -> None:
        """Apply ``start`` to a network, with batches of training inputs.

        >>> import torch
        >>> from evenly.models import mlp
        >>> model, x = mlp(4, 2, norm="wn"), torch.randn(64, 4)
        >>> recipe("wn").initialize(model, [x])
        >>> y = model(x)
        >>> bool(y.mean(0).abs().max() < 1e-5)
        True
        """
        if self.start is not None:
            self.start(model, batches)


def _weight_standardize(model: nn.Module, example: Tensor) -> nn.Module:
    from evenly.weights import weight_standardize_

    weight_standardize_(model)
    return model


def _weight_normalize(model: nn.Module, example: Tensor) -> nn.Module:
    from evenly.weights import weight_normalize_

    weight_normalize_(model)
    return model


def _from_data(model: nn.Module, batches: list[Tensor]) -> None:
    from evenly.weights import data_dependent_init_

    # A unit that is constant on these inputs, as a corner of an image can make it, keeps its length.
    data_dependent_init_(model, batches, dead="keep")


def _fixup(model: nn.Module, example: Tensor) -> nn.Module:
    from evenly.weights import fixup_

    fixup_(model, example)
    return model


def _nothing(num_features: int) -> nn.Module:
    from evenly.nn import NoNorm

    return NoNorm()  # as "none", but for a bias in front of it, which scalars replace


def _query_key_norm(vocab_size: int, **sizes: Any) -> LanguageModel:
    from evenly.models.gpt import gpt

    return gpt(vocab_size, norm="layer", qk_norm="l2", **sizes)


def _ngpt(
    vocab_size: int, *, dim: int = 128, depth: int = 4, num_heads: int = 4, block_size: int = 128
) -> LanguageModel:
    from evenly.models.ngpt import NGPT, NGPTConfig

    # A perceptron of three matrices, as SwiGLU has, with as many weights as the two of a GPT.
    config = NGPTConfig(vocab_size, depth, num_heads, dim, block_size, mlp_ratio=8 / 3, alpha_init=1 / depth)
    return NGPT(config)


_ROWS = (
    Recipe("none", "none", description="no normalization"),
    Recipe("batch", "batch", description="one statistic a channel, over the batch and all positions"),
    Recipe("layer", "layer", kinds=KINDS, description="one statistic a sample (of text: a token), over all its values"),
    Recipe("group", "group", description="one statistic a sample and group of channels"),
    Recipe(
        "group+ws",
        "group",
        _weight_standardize,
        kinds=("image",),
        description="group normalization, with standardized convolution weights",
    ),
    Recipe(
        "bcn+ws",
        "bcn",
        _weight_standardize,
        kinds=("image",),
        default=False,
        description="batch, then group normalization, with standardized convolution weights",
    ),
    Recipe(
        "bcn-est+ws",
        "bcn-est",
        _weight_standardize,
        kinds=("image",),
        default=False,
        description="as bcn+ws, with estimates in place of the statistics of the batch",
    ),
    Recipe("power", "power", default=False, description="a running mean square a channel, in both passes"),
    Recipe("online", "online", default=False, description="running statistics a channel, sample after sample"),
    Recipe(
        "wn",
        "none",
        _weight_normalize,
        _from_data,
        description="no layer; weights of learned length and direction, initialized from data",
    ),
    Recipe(
        "wn+mean-only",
        "mean-only",
        _weight_normalize,
        _from_data,
        default=False,
        description="as wn, with the mean of the batch taken out of each channel",
    ),
    Recipe(
        "fixup",
        _nothing,
        _fixup,
        kinds=("image",),
        description="no layer; branches that start at 0, rescaled weights, learned scalars",
    ),
    Recipe("instance", "instance", kinds=("image",), description="one statistic a sample and channel"),
    Recipe("rms", "rms", kinds=KINDS, description="as layer, dividing by the root mean square without centring"),
    Recipe("scale", "scale", kinds=KINDS, description="the vector of a sample divided by its length, times one gain"),
    Recipe(
        "qknorm",
        "layer",
        kinds=("text",),
        language=_query_key_norm,
        description="layer, and attention on cosines of queries and keys times one learned scale",
    ),
    Recipe(
        "ngpt",
        "none",
        kinds=("text",),
        language=_ngpt,
        description="nGPT: hidden states and weight vectors of length 1, projected after every step",
    ),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}
"""Every recipe by name, in the order of the tables."""


def recipe(norm: str | Recipe | Callable[[int], nn.Module]) -> Recipe:
    """The recipe for a name, an import path or a callable.

    Args:
        norm: a name in :data:`RECIPES`; ``"module:attribute"``, where the attribute is a :class:`Recipe` or
            a callable from the number of features to a module; or such a callable itself.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or the path does not lead to a
            recipe or a callable.

    >>> recipe("group+ws").layer
    'group'
    >>> recipe("torch.nn:BatchNorm2d").build(3).num_features
    3
    """
    if isinstance(norm, Recipe):
        return norm
    if callable(norm):
        return Recipe(getattr(norm, "__name__", repr(norm)), norm, kinds=KINDS)
    if norm in RECIPES:
        return RECIPES[norm]
    module, _, attribute = norm.partition(":")
    if not attribute:
        raise ValueError(
            f"unknown normalization {norm!r}: known are {', '.join(RECIPES)}; "
            "or give your own as 'module:attribute', a callable from the number of features to a module"
        )
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"normalization {norm!r} cannot be imported: {error}") from error
    if isinstance(found, Recipe):
        return found
    if not callable(found):
        raise ValueError(f"normalization {norm!r} is {found!r}, neither a Recipe nor a callable")
    return Recipe(norm, found, kinds=KINDS, description=f"{module}:{attribute}")


def recipes_for(kind: str, default: bool | None = None) -> list[str]:
    """The names of the recipes for inputs of a kind.

    Args:
        kind: ``"image"``, ``"tabular"`` or ``"text"``.
        default: only those that ``evenly compare`` takes unasked (``True``), or only the others (``False``).

    Raises:
        ValueError: another kind.

    >>> "instance" in recipes_for("tabular")
    False
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return [name for name, row in RECIPES.items() if kind in row.kinds and default in (None, row.default)]
