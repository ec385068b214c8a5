"""Which parameters of a model are hidden matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenly.optim import SWAN, SinkGD, for_model


def names(groups):
    return [
        (group["rule"], group.get("blocks", 1), group.get("transpose", False), [name for name, _ in group["params"]])
        for group in groups
    ]


class Tiny(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.token_embedding = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(4, 2, bias=False)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))
        self.conv = nn.Conv1d(4, 4, 3)
        self.output = nn.Linear(4, 10, bias=False)
        if tied:
            self.output.weight = self.token_embedding.weight


def test_kinds():
    groups = for_model(Tiny(), lr=0.1, scale=0.5, exclude=["*embed*", "output"], weight_decay=0.01)
    assert names(groups) == [
        ("matrix", 3, False, ["attention.in_proj_weight"]),
        ("matrix", 1, False, ["attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"]),
        (
            "adam",
            1,
            False,
            [
                "token_embedding.weight",
                "mlp.0.bias",
                "mlp.1.weight",
                "mlp.1.bias",
                "conv.weight",
                "conv.bias",
                "output.weight",
            ],
        ),
    ]
    assert [group["lr"] for group in groups] == [0.05, 0.05, 0.1]
    assert all(group["weight_decay"] == 0.01 for group in groups)
    for make in (SinkGD, SWAN):
        optimizer = make(groups)
        assert next(group["param_names"] for group in optimizer.param_groups) == ["attention.in_proj_weight"]


def test_tied_and_frozen():
    model = Tiny(tied=True)
    model.mlp[0].weight.requires_grad_(False)
    groups = names(for_model(model, exclude=["conv"]))
    assert groups[1][3] == ["attention.out_proj.weight", "mlp.2.weight"]
    assert "token_embedding.weight" in groups[-1][3]
    assert not any("mlp.0.weight" in group[3] for group in groups)


def test_transformers_conventions():
    class Conv1D(nn.Module):  # as in transformers: stored (in, out)
        def __init__(self, out, size):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(size, out)), nn.Parameter(torch.zeros(out))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.c_attn, self.c_fc, self.last = (
                nn.Embedding(9, 4),
                Conv1D(12, 4),
                Conv1D(8, 4),
                nn.Linear(4, 9),
            )

        def get_output_embeddings(self):
            return self.last

    assert names(for_model(Model())) == [
        ("matrix", 3, True, ["c_attn.weight"]),
        ("matrix", 1, True, ["c_fc.weight"]),
        ("adam", 1, False, ["wte.weight", "c_attn.bias", "c_fc.bias", "last.weight", "last.bias"]),
    ]


def test_refuses():
    with pytest.raises(ValueError, match="exclude names 'haed', which fits no parameter; there are token_embedding"):
        for_model(Tiny(), exclude=["haed"])
    with pytest.raises(ValueError, match="LayerNorm has no hidden matrix"):
        for_model(nn.LayerNorm(3))
    with pytest.raises(ValueError, match="lr=-1"):
        for_model(Tiny(), lr=-1.0)
    with pytest.raises(ValueError, match="scale=-1"):
        for_model(Tiny(), scale=-1.0)
    with pytest.raises(TypeError, match=r"expected a list of patterns: \['head'\]"):
        for_model(Tiny(), exclude="head")
