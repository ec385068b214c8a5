"""Time of fitting and applying the standardizers, beside scikit-learn's.

    python benchmarks/stats.py                     # 20,000 rows of 64, 256 and 768 features, float32
    python benchmarks/stats.py --quick             # 64 and 256 features
    python benchmarks/stats.py --json out.json

All contestants run in turn, round after round, on the same rows; printed are medians in milliseconds and the ratio to
the peer that a user would pick instead: StandardScaler for what scales each channel or all by one number,
PCA(whiten=True, svd_solver="covariance_eigh") for what needs a covariance. `layer` is the same map as a module.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from evenly.stats import PHIStandardizer

METHODS = ("phi-s", "global", "standard", "pca", "zca", "cholesky", "hadamard")
SCALER, WHITENER = "StandardScaler (sklearn)", "PCA, whitened (sklearn)"


def measure(rows: int, width: int, rounds: int, clock: Callable[[], float]) -> list[dict]:
    """Time every contestant on one width; a row a contestant."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(rows, width)) * np.arange(1, width + 1.0) ** -0.5 + 1).astype(np.float32)
    tensor = torch.from_numpy(x)
    contestants = {SCALER: StandardScaler(), WHITENER: PCA(whiten=True, svd_solver="covariance_eigh")}
    contestants |= {method: PHIStandardizer(method) for method in METHODS}
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):  # the first warms up and is not counted
        for name, estimator in contestants.items():
            calls: dict[str, Callable[[], object]] = {
                "fit": lambda one=estimator: one.fit(x),
                "transform": lambda one=estimator: one.transform(x),
            }
            if isinstance(estimator, PHIStandardizer):
                calls["layer"] = lambda one=estimator: one.to_layer()(tensor)
            for what, call in calls.items():
                started = clock()
                call()
                if turn:
                    times.setdefault((name, what), []).append(clock() - started)
    out = []
    for name in contestants:
        peer = SCALER if name in ("global", "standard", SCALER) else WHITENER
        row: dict = {"rows": rows, "features": width, "estimator": name, "peer": peer}
        for what in ("fit", "transform", "layer"):
            if (name, what) in times:
                ms = 1e3 * statistics.median(times[name, what])
                base = 1e3 * statistics.median(times[peer, "transform" if what == "layer" else what])
                row |= {f"{what} ms": round(ms, 2), f"{what} / peer": round(ms / base, 2)}
        out.append(row)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, action="append", help="default: 64, 256, 768")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine that is busy; with one thread")
    parser.add_argument("--quick", action="store_true", help="64 and 256 features, 3 rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = []
    for width in options.features or ([64, 256] if options.quick else [64, 256, 768]):
        measured = measure(options.rows, width, 3 if options.quick else options.rounds, clock)
        rows += measured
        print(f"\n{options.rows} rows of {width} features, float32, {options.threads} threads for torch")
        print(
            f"{'estimator':26}{'fit ms':>10}{'/ peer':>8}{'transform ms':>14}{'/ peer':>8}{'layer ms':>10}{'/ peer':>8}"
        )
        for row in measured:
            cells = "".join(
                f"{row.get(f'{what} ms', ''):>{wide}}{row.get(f'{what} / peer', ''):>8}"
                for what, wide in (("fit", 10), ("transform", 14), ("layer", 10))
            )
            print(f"{row['estimator']:26}{cells}")
    if options.json:
        facts = {
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "machine": platform.machine(),
            "threads": options.threads,
            "clock": clock.__name__,
        }
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
