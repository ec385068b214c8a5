"""The normalizations that a model can be built with: one row each.

A recipe says which layer stands where a network normalizes, and what is done to the whole network besides
(``prepare``), such as standardizing its convolution weights. The networks of :mod:`evenly.models` and the
command ``evenly compare`` take every row of :data:`RECIPES`; a new method adds one row and appears in both.

``"frozen"`` and ``"sync"`` of :func:`evenly.nn.create` have no row: frozen batch normalization needs the
statistics of a trained network, and synchronized batch normalization needs a process group.

Reference: group normalization with weight standardization is the recipe of Qiao et al. 2019,
arXiv:1903.10520.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

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
        prepare: called with the finished network; changes it in place or returns another one. ``None``:
            nothing more to do.
        kinds: the inputs it is for: ``"image"`` (N, C, H, W), ``"tabular"`` (N, C), and ``"text"``, the tokens of a
            language model (N, T, C).
        language: for text, builds the language model from the sizes of :func:`evenly.models.gpt`, where that is more
            than a GPT with this layer. ``None``: such a GPT.
        description: one line for the report.
    """

    name: str
    layer: Layer
    prepare: Callable[[nn.Module], nn.Module] | None = None
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

    def finish(self, model: nn.Module) -> nn.Module:
        """Apply ``prepare`` to a finished network and return the network."""
        return model if self.prepare is None else self.prepare(model)


def _weight_standardize(model: nn.Module) -> nn.Module:
    from evenly.weights import weight_standardize_

    weight_standardize_(model)
    return model


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


def recipes_for(kind: str) -> list[str]:
    """The names of the recipes for inputs of a kind.

    Args:
        kind: ``"image"``, ``"tabular"`` or ``"text"``.

    Raises:
        ValueError: another kind.

    >>> "instance" in recipes_for("tabular")
    False
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return [name for name, row in RECIPES.items() if kind in row.kinds]
