"""Small reference networks: the ones that the workbench and the claims train.

:func:`resnet` is a small residual network for images, :func:`mlp` a multilayer perceptron for feature
vectors. Both take ``norm=``, the name of a recipe (:data:`RECIPES`) or a callable that builds a layer for a
number of features, so that every normalization of the library can be put in the same place.
"""

from __future__ import annotations

from evenly.models.mlp import MLP, mlp
from evenly.models.recipes import RECIPES, Recipe, recipe, recipes_for
from evenly.models.resnet import ResNet, resnet

__all__ = ["RECIPES", "MLP", "Recipe", "ResNet", "mlp", "recipe", "recipes_for", "resnet"]
