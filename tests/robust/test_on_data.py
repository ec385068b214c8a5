"""Losses, sampler and metric together: the worst group of coloured digits and of Adult gains."""

from __future__ import annotations

import pandas as pd
import torch
from torch import nn

from evenly.data import coloured_digits, load_adult
from evenly.robust import ERMLoss, GroupBalancedSampler, GroupDROLoss, WorstGroupAccuracy, group_ids


def train(method, x, y, groups, counts, *, classes=2, epochs, lr, decay, batch):
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], classes)
    m = len(counts)
    loss = GroupDROLoss(m, counts, adjustment=1.0) if method == "DRO" else ERMLoss(m)
    sampler = GroupBalancedSampler(groups, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    for _ in range(epochs):
        order = torch.tensor(list(sampler)) if method == "DRO" else torch.randperm(len(y))
        for rows in order.split(batch):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows], groups[rows]).backward()
            optimizer.step()
    return model, loss


@torch.no_grad()
def evaluate(model, x, y, groups, counts, names):
    metric = WorstGroupAccuracy(len(counts), counts, names)
    for rows in torch.arange(len(y)).split(4096):
        metric.update(model(x[rows]), y[rows], groups[rows])
    return metric.compute()


def test_coloured_digits():
    data = coloured_digits(0.95)
    x, test = (data.normalize(v).flatten(1) for v in (data.train_x, data.test_x))
    found = {}
    for method in ("ERM", "DRO"):
        model, loss = train(
            method,
            x,
            data.train_y,
            data.train_groups,
            data.train_group_counts,
            epochs=20,
            lr=0.02,
            decay=0.1,
            batch=128,
        )
        found[method] = evaluate(model, test, data.test_y, data.test_groups, data.train_group_counts, data.group_names)
    print(*(f"{name}\n{result}" for name, result in found.items()), loss.q, sep="\n")
    assert found["ERM"].worst_group in (1, 2)  # label and colour disagree
    assert found["DRO"].worst > found["ERM"].worst + 0.1
    assert found["ERM"].adjusted_average > found["ERM"].average + 0.05  # the test set is balanced, training is not


def test_adult(shared_data):
    parts = [load_adult(shared_data, split=split) for split in ("train", "test")]
    ids = group_ids(parts[0], ["target", "sex"])
    groups = [ids.ids, group_ids(parts[1], ["target", "sex"], like=ids).ids]
    both = pd.concat([part.drop(columns=["target", "fnlwgt"]) for part in parts])
    table = torch.tensor(pd.get_dummies(both).to_numpy(dtype="float32"))
    x, test = table.split([len(part) for part in parts])
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test = (x - mean) / std, ((test - mean) / std).clamp(-10, 10)
    y, test_y = (torch.tensor(part["target"].to_numpy()) for part in parts)
    found = {}
    for method in ("ERM", "DRO"):
        model, _ = train(method, x, y, groups[0], ids.counts, epochs=2, lr=0.01, decay=1e-3, batch=256)
        found[method] = evaluate(model, test, test_y, groups[1], ids.counts, ids.names)
    print(*(f"{name}\n{result}" for name, result in found.items()), sep="\n")
    assert ids.names[found["ERM"].worst_group] == "target=1, sex=Female"
    assert found["DRO"].worst > found["ERM"].worst + 0.15
    assert found["DRO"].average > 0.75
