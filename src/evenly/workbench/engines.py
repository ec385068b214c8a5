"""Where trials run: a pool of processes on this machine, or a Ray cluster.

Both engines take settings with :meth:`Engine.submit` and hand back ``(settings, outcome)`` from
:meth:`Engine.completed` in the order in which trials finish; more may be submitted in between. An outcome is a
:class:`~evenly.workbench.TrialResult` or, if the trial raised or its process died, a
:class:`~evenly.workbench.TrialFailure`: one bad trial never stops the rest. Workers stay alive between trials, so
that PyTorch and the data are loaded once each.

Engines write nothing. Results go to the caller, who alone keeps the store.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings, run_trial

__all__ = ["Engine", "LocalEngine", "Outcome", "RayEngine", "make_engine"]

Outcome = TrialResult | TrialFailure


class Engine(ABC):
    """Runs trials somewhere. Use it in a ``with`` block; leaving the block stops what still runs."""

    workers: int

    @abstractmethod
    def submit(self, settings: TrialSettings) -> None:
        """Put a trial in the queue."""

    @abstractmethod
    def completed(self) -> Iterator[tuple[TrialSettings, Outcome]]:
        """Wait for trials and yield each as it finishes, until none is queued or running."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; trials that have not finished are dropped."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_engine(
    name: str,
    *,
    workers: int | None = None,
    address: str | None = None,
    device: str = "cpu",
    cache: str | Path | None = None,
) -> Engine:
    """An engine by name.

    Args:
        name: ``"local"`` or ``"ray"``.
        workers: trials at a time; ``None``: one a CPU core that this process may use, or one a device on CUDA.
        address: address of a running Ray cluster; ``None`` starts one on this machine.
        device: the device of the trials.
        cache: passed to :func:`~evenly.workbench.run_trial`.

    Raises:
        ValueError: an unknown engine, fewer than one worker, or an address for the local engine.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    if name == "local":
        if address is not None:
            raise ValueError("address is for --engine ray; the local engine has none")
        return LocalEngine(workers or _default_workers(device), cache)
    if name == "ray":
        return RayEngine(workers, address, device, cache)
    raise ValueError(f"unknown engine {name!r}: known are local and ray")


def _default_workers(device: str) -> int:
    if device.startswith("cuda"):
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _attempt(settings: TrialSettings, cache: str | Path | None) -> Outcome:
    started = time.perf_counter()
    try:
        return run_trial(settings, cache)
    except Exception as error:
        text = " ".join(str(error).split())
        return TrialFailure(f"{type(error).__name__}: {text}", traceback.format_exc(), time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------- this machine


class LocalEngine(Engine):
    """A pool of processes on this machine, one trial and one thread each.

    A worker that dies (killed, out of memory) costs the trial it was running and is replaced. Workers end by
    themselves when the driver dies, even by SIGKILL.

    Args:
        workers: number of processes.
        cache: passed to :func:`~evenly.workbench.run_trial`.
    """

    def __init__(self, workers: int, cache: str | Path | None = None) -> None:
        self.workers = workers
        self._cache = None if cache is None else str(cache)
        # Fresh interpreters: a fork of a process that runs threads, as one with PyTorch does, can deadlock.
        self._context = multiprocessing.get_context("spawn")
        self._queue: deque[TrialSettings] = deque()
        self._pool: list[_Worker] = []
        self._unborn = 0  # workers in a row that died before they were ready

    def submit(self, settings: TrialSettings) -> None:
        self._queue.append(settings)
        if len(self._pool) < self.workers:
            self._pool.append(_Worker(self._context, self._cache))
        self._feed()

    def warm_up(self) -> None:
        """Start all workers now, so that they import PyTorch while the caller does something else."""
        while len(self._pool) < self.workers:
            self._pool.append(_Worker(self._context, self._cache))

    def _feed(self) -> None:
        for worker in self._pool:
            if self._queue and worker.ready and worker.settings is None:
                worker.give(self._queue.popleft())

    def completed(self) -> Iterator[tuple[TrialSettings, Outcome]]:
        while self._queue or any(worker.settings is not None for worker in self._pool):
            self._feed()
            waiting: dict[Any, _Worker] = {}
            for worker in self._pool:
                waiting[worker.pipe] = worker
                waiting[worker.process.sentinel] = worker
            events = multiprocessing.connection.wait(list(waiting))
            for worker in {id(waiting[e]): waiting[e] for e in events}.values():
                finished = self._hear(worker)
                if finished is not None:
                    yield finished

    def _hear(self, worker: _Worker) -> tuple[TrialSettings, Outcome] | None:
        # A dead worker's last message may still be in the pipe: read before looking at the process.
        try:
            if worker.pipe.poll():
                message = worker.pipe.recv()
                if message == "ready":
                    worker.ready = True
                    self._unborn = 0
                    self._feed()
                    return None
                settings, worker.settings = worker.settings, None
                assert settings is not None
                self._feed()
                return settings, message
        except (EOFError, ConnectionError):
            worker.process.join(timeout=5)
        if worker.process.is_alive():
            return None
        return self._bury(worker)

    def _bury(self, worker: _Worker) -> tuple[TrialSettings, Outcome] | None:
        worker.process.join()
        code = worker.process.exitcode
        self._pool.remove(worker)
        worker.pipe.close()
        if not worker.ready:
            self._unborn += 1
            if self._unborn > self.workers:
                raise RuntimeError(
                    f"the worker processes end before they are ready (exit code {code}); their error is above"
                )
        if self._queue or worker.settings is not None:
            self._pool.append(_Worker(self._context, self._cache))
        if worker.settings is None:
            return None
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        return worker.settings, TrialFailure(
            f"WorkerDied: the process of the trial ended by {how}",
            "The worker process ended before it sent a result. A common cause is too little memory: "
            "try fewer --workers or a smaller model.",
            time.perf_counter() - worker.began,
        )

    def close(self) -> None:
        self._queue.clear()
        for worker in self._pool:
            worker.process.terminate()
        for worker in self._pool:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self._pool.clear()


class _Worker:
    def __init__(self, context: Any, cache: str | None) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, cache, list(sys.path)), daemon=True)
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        with _environment(**single), _without_main():
            self.process.start()
        theirs.close()
        self.ready = False
        self.settings: TrialSettings | None = None
        self.began = 0.0

    def give(self, settings: TrialSettings) -> None:
        self.settings = settings
        self.began = time.perf_counter()
        with contextlib.suppress(ConnectionError):  # died while idle: its sentinel tells
            self.pipe.send(settings)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    # For the child only: it inherits the environment at its start.
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    # A spawned process imports the script that started it, which would run a script without a main guard again.
    # A trial needs nothing from there: settings name models and layers by import path.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: multiprocessing.connection.Connection, cache: str | None, path: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            settings = pipe.recv()
            pipe.send(_attempt(settings, cache))
        except (EOFError, ConnectionError):  # the driver is gone
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ------------------------------------------------------------------------------------------------------- Ray


class RayEngine(Engine):
    """Trials as tasks of a Ray cluster, one CPU each (and one GPU on CUDA).

    ``evenly`` and the data must be there for the cluster's workers, under the same paths. A task is tried once: a
    worker that dies is a failed trial. Needs ``pip install evenly[ray]``.

    Args:
        workers: tasks at a time; ``None``: as many as the cluster has CPUs.
        address: address of a running cluster (``"auto"``, ``"ray://host:10001"``, ``"host:6379"``); ``None``
            starts one on this machine, which ends with the engine.
        device: the device of the trials.
        cache: passed to :func:`~evenly.workbench.run_trial`; a folder that all workers see, or ``None``.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        device: str = "cpu",
        cache: str | Path | None = None,
    ) -> None:
        self._ray = ray = _import_ray()
        self._cache = None if cache is None else str(cache)
        self._gpus = 1 if device.startswith("cuda") else 0
        self._running: dict[Any, TrialSettings] = {}
        self._queue: deque[TrialSettings] = deque()
        self._joined = ray.is_initialized()  # by the caller: then it is not ours to shut down
        if not self._joined:
            here = str(Path(__file__).resolve().parents[2])
            paths = os.pathsep.join(
                dict.fromkeys([here, str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            )
            options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": paths.rstrip(os.pathsep)}}}
            if address is None:
                options |= {"num_cpus": workers or _default_workers("cpu"), "include_dashboard": False}
            try:
                # The driver's own line says what runs; Ray's log would break the live table.
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
            except ConnectionError as error:
                raise ConnectionError(
                    f"no Ray cluster answers at {address!r}: start one with `ray start --head`, or leave --address out"
                ) from error
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(num_cpus=1, num_gpus=self._gpus, max_retries=0)(_attempt)

    def submit(self, settings: TrialSettings) -> None:
        self._queue.append(settings)
        self._feed()

    def _feed(self) -> None:
        while self._queue and len(self._running) < self.workers:
            settings = self._queue.popleft()
            self._running[self._task.remote(settings, self._cache)] = settings

    def completed(self) -> Iterator[tuple[TrialSettings, Outcome]]:
        while self._queue or self._running:
            self._feed()
            done, _ = self._ray.wait(list(self._running), num_returns=1)
            for reference in done:
                settings = self._running.pop(reference)
                try:
                    outcome = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    lines = str(error).strip().splitlines() or [""]
                    outcome = TrialFailure(f"{type(error).__name__}: {lines[0]}", str(error))
                self._feed()
                yield settings, outcome

    def close(self) -> None:
        self._queue.clear()
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if not self._joined:
            self._ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs Ray, which is not installed: pip install evenly[ray]") from error
    return ray
