"""Peak training memory and step time of whole networks: from torch.nn, from our layers, and with memory="low".

    python benchmarks/memory.py                      # ResNet-50 and 12-layer GPTs
    python benchmarks/memory.py --quick              # smaller inputs, two rounds
    python benchmarks/memory.py --only resnet --threads 1 --clock process --json out.json

Networks: a ResNet-50 (bottlenecks 3, 4, 6, 3; SGD with momentum) and a GPT of 12 blocks (width 384, 6 heads,
sequences of 256; AdamW) with rotary positions and a vocabulary of 256, so that logits are small beside the blocks;
the same with learned positions, where torch.nn has less to keep; and with the tied vocabulary of GPT-2 (50,257). Their
twins are written as one writes them with torch.nn: ``nn.BatchNorm2d`` and ``nn.ReLU(inplace=True)``, ``nn.LayerNorm``,
``nn.GELU`` and ``scaled_dot_product_attention``, with the same parameters; the losses of the first steps are compared.
A fourth row is the twin with every block under ``torch.utils.checkpoint``, which runs its matrix products twice.

Each contestant lives in a process of its own. *Peak* is exact: every allocation and release of PyTorch's allocator in
one step (forward, backward, optimizer), as the profiler reports them, on top of what lives between steps: parameters,
buffers, optimizer state and the batch (*held*). The rest of the peak is activations, gradients and working memory.
*RSS* is the peak of the process's resident memory in another step without the profiler, interpreter and libraries
included: a cross-check that also sees memory that does not come from PyTorch's allocator. Steps are timed in turn,
one process at a time, round after round; printed are medians. The clock ``process`` counts the processor's time, which
a busy machine changes less; it adds up threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import evenly.models as em
import evenly.nn as en

CONTESTANTS = ("torch.nn", "evenly", "evenly, memory='low'", "torch.nn, checkpoint a block")
GOAL_MEMORY, GOAL_TIME = 0.75, 1.1  # of memory='low', times torch.nn


@dataclass(frozen=True)
class Size:
    """A network and its input."""

    kind: str  # "resnet" or "gpt"
    batch: int
    side: int = 0  # of the images
    blocks: tuple[int, ...] = (3, 4, 6, 3)  # of the residual network
    width: int = 64  # of its first stage; features of the GPT
    depth: int = 12
    heads: int = 6
    length: int = 256
    vocabulary: int = 256
    tie: bool = False
    rotary: bool = True


FULL = {
    "ResNet-50, 32 images 3x128x128": Size("resnet", 32, side=128),
    "GPT 12x384, 8x256 tokens": Size("gpt", 8, width=384),
    "GPT 12x384, learned positions, 8x256 tokens": Size("gpt", 8, width=384, rotary=False),
    "GPT 12x384, vocabulary 50,257, 4x256 tokens": Size("gpt", 4, width=384, vocabulary=50257, tie=True),
}
QUICK = {
    "ResNet-50, 16 images 3x96x96": Size("resnet", 16, side=96),
    "GPT 12x384, 4x256 tokens": Size("gpt", 4, width=384),
}


# ---- the networks ---------------------------------------------------------------------------------------------------


class TorchBottleneck(nn.Module):
    """A bottleneck block of torch.nn."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1 or width_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class OurBottleneck(nn.Module):
    """The same block of our layers: activation and residual are part of the normalization."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = en.BatchNorm(width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = en.BatchNorm(width, activation="relu")
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = en.BatchNorm(4 * width, activation="relu")
        self.downsample: nn.Module | None = None
        if stride > 1 or width_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), en.BatchNorm(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return self.bn3(self.conv3(y), residual=x if self.downsample is None else self.downsample(x))


class ResNet50(nn.Module):
    """The residual network of bottlenecks; of one kind of layer or the other."""

    def __init__(self, size: Size, ours: bool, *, low: bool = False, again: bool = False) -> None:
        super().__init__()
        self.low, self.again = low, again
        block = OurBottleneck if ours else TorchBottleneck
        width = size.width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = en.BatchNorm(width, activation="relu") if ours else nn.BatchNorm2d(width)
        self.relu = nn.Identity() if ours else nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Module] = []
        width_in = width
        for stage, many in enumerate(size.blocks):
            for index in range(many):
                wide = width * 2**stage
                stages.append(block(width_in, wide, 2 if stage and not index else 1))
                width_in = 4 * wide
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(width_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        if self.low:
            with en.low_memory():
                return self.logits(x)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return self.head(x.mean((2, 3)))


class TorchBlock(nn.Module):
    """A block of a GPT of torch.nn."""

    def __init__(self, dim: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class GPT(nn.Module):
    """Embedding, blocks, norm, head; of one kind of layer or the other."""

    def __init__(self, size: Size, ours: bool, *, low: bool = False, again: bool = False) -> None:
        super().__init__()
        self.ours, self.low, self.again = ours, low, again
        dim, heads = size.width, size.heads
        self.embedding = nn.Embedding(size.vocabulary, dim)
        self.positions = None if size.rotary else nn.Embedding(size.length, dim)
        rope = 10000.0 if size.rotary else None
        self.blocks = nn.ModuleList(
            em.TransformerBlock(dim, heads, rope_base=rope) if ours else TorchBlock(dim, heads, size.rotary)
            for _ in range(size.depth)
        )
        self.norm = en.LayerNorm(dim) if ours else nn.LayerNorm(dim)
        self.head = nn.Linear(dim, size.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 / (2 * size.depth) ** (0.5 * name.endswith("out.weight")))
        if size.tie:
            self.head.weight = self.embedding.weight
        head = dim // heads
        angle = torch.arange(size.length)[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        if self.low:
            with en.low_memory():
                return self.logits(idx)
        return self.logits(idx)

    def logits(self, idx: Tensor) -> Tensor:
        x = self.embedding(idx)
        if self.positions is not None:
            x = x + self.positions.weight
        more = () if self.ours else (self.cos, self.sin)
        for block in self.blocks:
            x = checkpoint(block, x, *more, use_reentrant=False) if self.again else block(x, *more)
        return self.head(self.norm(x)).flatten(0, 1)


#: Names in our blocks, and in those of torch.nn.
_NAMES = {
    r"attention\.norm\.norm": "norm1",
    r"attention\.branch\.": "",
    r"mlp\.norm\.norm": "norm2",
    r"mlp\.branch\.up": "mlp.0",
    r"mlp\.branch\.out": "mlp.2",
}


def build(size: Size, contestant: str) -> nn.Module:
    """A contestant; all have the same parameters."""
    torch.manual_seed(0)
    make = ResNet50 if size.kind == "resnet" else GPT
    ours = contestant.startswith("evenly")
    first = make(size, True, low="low" in contestant)
    if ours:
        return first
    twin = make(size, False, again="checkpoint" in contestant)
    state = first.state_dict()
    for name in list(state):
        renamed = name
        for ours_, theirs in _NAMES.items():
            renamed = re.sub(ours_, theirs, renamed)
        state[renamed] = state.pop(name)
    twin.load_state_dict(state)
    return twin


# ---- one contestant -------------------------------------------------------------------------------------------------


class Contestant:
    """A network with its optimizer and its batch, trained step by step."""

    def __init__(self, size: Size, name: str) -> None:
        self.model = build(size, name)
        generator = torch.Generator().manual_seed(1)
        if size.kind == "resnet":
            self.x = torch.randn(size.batch, 3, size.side, size.side, generator=generator)
            self.target = torch.randint(1000, (size.batch,), generator=generator)
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
            )
        else:
            tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1), generator=generator)
            self.x, self.target = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> float:
        """One training step; the loss before it."""
        loss = functional.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def held(self) -> int:
        """Bytes that live between steps: parameters, buffers, optimizer state, batch."""
        state = (v for kept in self.optimizer.state.values() for v in kept.values() if isinstance(v, Tensor))
        return _bytes(chain(self.model.parameters(), self.model.buffers(), state, (self.x, self.target)))

    def peak(self) -> tuple[int, float]:
        """Bytes at the peak of one step, and its loss."""
        from torch.profiler import ProfilerActivity, profile

        held = self.held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            loss = self.step()
        events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return held + most, loss

    def resident(self) -> tuple[int | None, float]:
        """Bytes of resident memory at the peak of one step, where the system tells, and its loss."""
        clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        try:
            clear.write_text("5", encoding="utf-8")
        except OSError:
            return None, self.step()
        loss = self.step()
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        return None if found is None else 1024 * int(found[1]), loss


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def serve(size: Size, name: str, threads: int | None, clock: Callable[[], float]) -> None:
    """In a process of its own: measure, then time a step for each line that comes in."""
    if threads is not None:
        torch.set_num_threads(threads)
    contestant = Contestant(size, name)
    losses = [contestant.step()]  # the optimizer makes its state
    peak, loss = contestant.peak()
    losses.append(loss)
    resident, loss = contestant.resident()
    losses.append(loss)
    _say({"held": contestant.held(), "peak": peak, "rss": resident, "losses": losses})
    for _ in sys.stdin:
        started = clock()
        contestant.step()
        _say({"seconds": clock() - started})


def _say(what: dict[str, Any]) -> None:
    print("@" + json.dumps(what), flush=True)


# ---- all of them ----------------------------------------------------------------------------------------------------


def compare(size: Size, rounds: int, threads: int | None, clock: str) -> list[dict[str, Any]]:
    """Every contestant on one network; a row each."""
    workers: list[subprocess.Popen[str]] = []
    rows: list[dict[str, Any]] = []
    times: list[list[float]] = [[] for _ in CONTESTANTS]
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads could fill up
        try:
            for name in CONTESTANTS:
                given = json.dumps({"size": asdict(size), "name": name, "threads": threads, "clock": clock})
                command = [sys.executable, __file__, "--worker", given]
                pipe = subprocess.PIPE
                workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True))
                rows.append({"network": name, **_hear(workers[-1], errors)})
            for _ in range(rounds):
                for worker, found in zip(workers, times, strict=True):
                    assert worker.stdin is not None
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                    found.append(_hear(worker, errors)["seconds"])
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    for row, found in zip(rows, times, strict=True):
        row["seconds"] = statistics.median(found)
    plain = rows[0]
    for row in rows:
        row["peak_ratio"] = row["peak"] / plain["peak"]
        row["rss_ratio"] = row["rss"] / plain["rss"] if row["rss"] and plain["rss"] else None
        row["seconds_ratio"] = row["seconds"] / plain["seconds"]
    check_losses(rows)
    return rows


def check_losses(rows: list[dict[str, Any]]) -> None:
    """The contestants compute the same: torch.nn to rounding, memory='low' to the bit.

    Only the loss of the first step shows that to rounding: later ones follow gradients of batch normalization whose
    error in float32 is 2 % in either network (in float64 they agree to 1e-12).
    """
    losses = {row["network"]: row["losses"] for row in rows}
    if losses["evenly, memory='low'"] != losses["evenly"]:
        raise SystemExit(f"memory='low' does not give the losses of 'normal': {losses}")
    for name, found in losses.items():
        if abs(found[0] - losses["torch.nn"][0]) > 1e-4 * abs(losses["torch.nn"][0]):
            raise SystemExit(f"{name} does not give the losses of torch.nn: {losses}")


def _hear(worker: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    errors.seek(0)
    raise SystemExit(f"a contestant ended with status {worker.wait()}: {worker.args!r}\n{errors.read()[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller inputs, 2 rounds instead of 7")
    parser.add_argument("--only", nargs="*", help="networks whose name contains one of these words, in any case")
    parser.add_argument("--rounds", type=int, help="timed steps of each contestant")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        given = json.loads(args.worker)
        size = Size(**{**given["size"], "blocks": tuple(given["size"]["blocks"])})
        serve(
            size, given["name"], given["threads"], time.perf_counter if given["clock"] == "wall" else time.process_time
        )
        return
    if args.rounds is not None and args.rounds < 1:
        raise SystemExit(f"--rounds {args.rounds}: expected at least 1")
    rounds = args.rounds or (2 if args.quick else 7)
    threads = args.threads or torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {threads} threads, {platform.machine()}, float32, median of {rounds} steps, "
        f"{args.clock} clock"
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for name, size in (QUICK if args.quick else FULL).items():
        if args.only and not any(word.lower() in name.lower() for word in args.only):
            continue
        rows = results[name] = compare(size, rounds, args.threads, args.clock)
        print(
            f"\n{name}\n{'':30}{'held':>9}{'peak':>10}{'/ torch':>9}{'RSS':>10}{'/ torch':>9}{'step':>10}{'/ torch':>9}"
        )
        for row in rows:
            rss = "" if row["rss"] is None else f"{row['rss'] / 1e6:7.0f} MB"
            rss_ratio = "" if row["rss_ratio"] is None else f"{row['rss_ratio']:.2f}"
            print(
                f"{row['network']:30}{row['held'] / 1e6:6.0f} MB{row['peak'] / 1e6:7.0f} MB{row['peak_ratio']:9.2f}"
                f"{rss:>10}{rss_ratio:>9}{row['seconds']:8.2f} s{row['seconds_ratio']:9.2f}"
            )
        low = rows[CONTESTANTS.index("evenly, memory='low'")]
        reached = low["peak_ratio"] <= GOAL_MEMORY and low["seconds_ratio"] <= GOAL_TIME
        goal = f"memory='low' at most {GOAL_MEMORY} of the peak and {GOAL_TIME} of the time"
        if args.json is not None:
            settings = {"threads": threads, "clock": args.clock, "rounds": rounds, "torch": torch.__version__}
            args.json.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n", encoding="utf-8")
        print(f"goal: {goal}: {'reached' if reached else 'missed'}", flush=True)


if __name__ == "__main__":
    main()
