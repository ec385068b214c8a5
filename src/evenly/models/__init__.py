"""Small reference networks: the ones that the workbench and the claims train.

:func:`resnet` is a small residual network for images, :func:`mlp` a multilayer perceptron for feature
vectors. Both take ``norm=``, the name of a recipe (:data:`RECIPES`) or a callable that builds a layer for a
number of features, so that every normalization of the library can be put in the same place.

:func:`gpt` is a small decoder-only language model of :class:`TransformerBlock`, with ``norm=``, ``qk_norm=`` and
``placement=``; :class:`NGPT` is the normalized Transformer. Both are language models with ``generate``.

:func:`fixup_resnet_cifar`, :func:`fixup_resnet_imagenet` and :func:`fixup_transformer` are Fixup's networks.
"""

from __future__ import annotations

from evenly.models.attention import Attention, AttentionBlock, FeedForward, Residual, TransformerBlock
from evenly.models.fixup import (
    FixupBasicBlock,
    FixupBottleneck,
    FixupResNet,
    fixup_resnet_cifar,
    fixup_resnet_imagenet,
    fixup_transformer,
)
from evenly.models.gpt import GPT, gpt
from evenly.models.mlp import MLP, mlp
from evenly.models.ngpt import NGPT, NGPTConfig
from evenly.models.recipes import RECIPES, Recipe, recipe, recipes_for
from evenly.models.resnet import ResNet, resnet
from evenly.models.rotary import Rotary

__all__ = [
    "GPT",
    "MLP",
    "NGPT",
    "RECIPES",
    "Attention",
    "AttentionBlock",
    "FeedForward",
    "FixupBasicBlock",
    "FixupBottleneck",
    "FixupResNet",
    "NGPTConfig",
    "Recipe",
    "ResNet",
    "Residual",
    "Rotary",
    "TransformerBlock",
    "fixup_resnet_cifar",
    "fixup_resnet_imagenet",
    "fixup_transformer",
    "gpt",
    "mlp",
    "recipe",
    "recipes_for",
    "resnet",
]
