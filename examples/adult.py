"""A model to audit: logistic regression on the training part of UCI Adult, which says who earns above 50,000 dollars.

    evenly audit --model examples.adult:factory --data adult:DIR --groups sex,race,age:25,45,65 --out audit.html

DIR holds ``adult.data`` and ``adult.test``, plain or gzipped; the factory reads them from the folder ``adult`` in the
folder that the environment variable ``EVENLY_DATA`` names. Training takes about a second.
"""

from __future__ import annotations

from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from evenly.data import load_adult

NOT_FEATURES = ("target", "fnlwgt", "age_cat")


def factory() -> Pipeline:
    """A pipeline that reads a frame of :func:`evenly.data.load_adult`, fitted on the training part."""
    train = load_adult(split="train")
    features = train.drop(columns=[*NOT_FEATURES])
    encode = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore", min_frequency=20), make_column_selector(dtype_exclude="number")),
        (StandardScaler(), make_column_selector(dtype_include="number")),
    )
    return make_pipeline(encode, LogisticRegression(max_iter=300)).fit(features, train["target"])
