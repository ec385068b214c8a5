"""Group ids from columns: numbering, names, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from evenly.robust import group_ids

FRAME = pd.DataFrame({"y": [1, 0, 1, 1], "sex": ["F", "M", "M", "F"], "old": [True, False, True, False]})


def test_numbering_is_row_major():
    made = group_ids(FRAME)
    assert made.ids.dtype == torch.int64
    assert made.ids.tolist() == [4 * y + 2 * (s == "M") + o for y, s, o in FRAME.itertuples(index=False)]
    assert len(made.names) == len(made.counts) == 8
    assert made.names[5] == "y=1, sex=F, old=True"
    assert made.counts.tolist() == torch.bincount(made.ids, minlength=8).tolist()
    assert made.categories == {"y": (0, 1), "sex": ("F", "M"), "old": (False, True)}
    assert made.codes[5].tolist() == [1, 0, 1]


def test_columns_may_be_chosen_and_come_in_any_container():
    want = group_ids(FRAME, ["sex", "y"])
    assert want.names == ("sex=F, y=0", "sex=F, y=1", "sex=M, y=0", "sex=M, y=1")
    columns = {"sex": np.array(FRAME["sex"]), "y": torch.tensor(FRAME["y"])}
    assert torch.equal(group_ids(columns).ids, want.ids)
    assert torch.equal(group_ids({"sex": list(FRAME["sex"]), "y": FRAME["y"].astype(float)}).ids, want.ids)


def test_observed_numbers_what_occurs():
    made = group_ids(FRAME, observed=True)
    assert made.names == (
        "y=0, sex=M, old=False",
        "y=1, sex=F, old=False",
        "y=1, sex=F, old=True",
        "y=1, sex=M, old=True",
    )
    assert made.ids.tolist() == [2, 0, 3, 1]
    assert (made.counts > 0).all()


@pytest.mark.parametrize("observed", [True, False])
def test_like_keeps_the_numbers(observed):
    made = group_ids(FRAME, observed=observed)
    again = group_ids(FRAME.iloc[[3, 1]], like=made)
    assert again.ids.tolist() == made.ids[[3, 1]].tolist()
    assert again.names == made.names
    assert int(again.counts.sum()) == 2
    other = FRAME.iloc[:1].assign(sex="X")
    with pytest.raises(ValueError, match="column 'sex' has the category 'X', which like= does not have"):
        group_ids(other, like=made)
    new = FRAME.iloc[:1].assign(y=0)
    if observed:
        with pytest.raises(ValueError, match="sample 0 is of the group 'y=0, sex=F, old=True', which like= does not"):
            group_ids(new, like=made)
    else:
        assert group_ids(new, like=made).ids.tolist() == [1]
    with pytest.raises(ValueError, match=r"columns \['sex'\] differ from those of like="):
        group_ids(FRAME, ["sex"], like=made)


def test_categoricals_keep_their_order():
    size = pd.Categorical(["small", "large", "small"], categories=["small", "large"])
    assert group_ids({"size": size}).names == ("size=small", "size=large")
    assert group_ids({"size": size}).ids.tolist() == [0, 1, 0]
    assert group_ids(pd.DataFrame({"size": size})).ids.tolist() == [0, 1, 0]


def test_refuses():
    for columns, error, message in (
        ({}, ValueError, "at least one column"),
        ({"a": [1, 2], "b": [1]}, ValueError, "different lengths"),
        ({"a": [1.0, float("nan")]}, ValueError, "column 'a' has 1 missing values"),
        ({"a": ["x", None]}, ValueError, "column 'a' has 1 missing values"),
        ({"a": [1.5, 2.0]}, TypeError, "fractional numbers; make bins first"),
        ({"a": [[1, 2]]}, TypeError, r"column 'a' has shape \(1, 2\)"),
        ([1, 2], TypeError, "expected a mapping of names to columns or a data frame"),
    ):
        with pytest.raises(error, match=message):
            group_ids(columns)
    with pytest.raises(ValueError, match="no column 'race'; there are y, sex, old"):
        group_ids(FRAME, ["race"])
    many = {"a": range(1000), "b": range(1000)}
    with pytest.raises(ValueError, match=r"1000000 groups \(1000 x 1000\)"):
        group_ids(many)
    assert len(group_ids(many, observed=True).names) == 1000
