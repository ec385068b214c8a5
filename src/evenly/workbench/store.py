"""The store of a comparison: one SQLite file, written only by the driver, one transaction a trial.

A trial is known by the key of its settings (:attr:`evenly.workbench.TrialSettings.key`). A finished trial is
never run again; a failed one is kept with its error and run again the next time. The file uses write-ahead
logging, so a process killed at any moment leaves every finished trial intact; a lock file beside it keeps a
second driver out, and falls with the process that holds it.

Tables: ``meta`` (schema and version of evenly), ``runs`` (one row each time the command was started: when,
command, environment), ``trials`` (key, settings, state ``done | failed``, result or error, the run that wrote
it, how often it was tried).
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from evenly import __version__
from evenly.workbench.trial import TrialFailure, TrialResult, TrialSettings

__all__ = ["SCHEMA", "Store", "StoreError", "StoredTrial"]

SCHEMA = 1
"""Version of the tables. A store with another one is refused, never changed."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, started REAL NOT NULL, command TEXT NOT NULL, environment TEXT NOT NULL
);
CREATE TABLE trials (
    key TEXT PRIMARY KEY, settings TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('done', 'failed')),
    outcome TEXT NOT NULL, run INTEGER NOT NULL REFERENCES runs (id), tries INTEGER NOT NULL, finished REAL NOT NULL
);
"""


class StoreError(RuntimeError):
    """The store cannot be used: made by another version, damaged, or open in another process."""


@dataclass(frozen=True)
class StoredTrial:
    """One row of the store.

    Attributes:
        settings: what was run.
        outcome: :class:`TrialResult`, or :class:`TrialFailure` for a failed trial.
        run: id of the run that wrote the row.
        tries: how often the trial was run (more than 1 only after failures).
        finished: when, in seconds since the epoch.
    """

    settings: TrialSettings
    outcome: TrialResult | TrialFailure
    run: int
    tries: int
    finished: float


class Store:
    """The trials of one output folder.

    Args:
        folder: where ``trials.sqlite`` lies; made if it is absent.
        command: the command line or call that this run was started with, kept for the report.
        environment: versions and machine of this run, kept for the report.

    Raises:
        StoreError: the store was made by another version of evenly or of the tables, the file is no store, or
            another process has it open.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
    ...     len(store.trials())
    0
    """

    def __init__(self, folder: str | Path, command: str = "", environment: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "trials.sqlite"
        self._lock = FileLock(self.folder / "driver.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"{self.folder} is in use by another evenly compare; wait for it, or give another --out"
            ) from error
        try:
            self._open(command, environment or {})
        except BaseException:
            self._lock.release()
            raise

    def _open(self, command: str, environment: dict[str, Any]) -> None:
        # isolation_level=None: transactions are opened by hand, around each trial.
        self._connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._prepare()
            self.run = self._connection.execute(
                "INSERT INTO runs (started, command, environment) VALUES (?, ?, ?)",
                (time.time(), command, json.dumps(environment)),
            ).lastrowid
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreError(f"{self.path} cannot be read as a store of trials: {error}") from error
        except StoreError:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        names = {row[0] for row in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not names:
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} INSERT INTO meta VALUES ('schema', '{SCHEMA}'); "
                f"INSERT INTO meta VALUES ('evenly', '{__version__}'); COMMIT;"
            )
            return
        if "meta" not in names or "trials" not in names:
            raise StoreError(f"{self.path} is a database, but not a store of trials; give another --out")
        meta = dict(self._connection.execute("SELECT name, value FROM meta"))
        for name, ours in (("schema", str(SCHEMA)), ("evenly", __version__)):
            if meta.get(name) != ours:
                what = "tables of version" if name == "schema" else "evenly"
                raise StoreError(
                    f"{self.path} was made by {what} {meta.get(name)}, this is {ours}: results of the two must not "
                    "be mixed. Give another --out, or delete the folder to start over"
                )

    def save(self, settings: TrialSettings, outcome: TrialResult | TrialFailure) -> None:
        """Write one finished or failed trial, in one transaction."""
        state = "failed" if isinstance(outcome, TrialFailure) else "done"
        with self._transaction():
            self._connection.execute(
                "INSERT INTO trials (key, settings, state, outcome, run, tries, finished) VALUES (?, ?, ?, ?, ?, 1, ?) "
                "ON CONFLICT (key) DO UPDATE SET state = excluded.state, outcome = excluded.outcome, "
                "run = excluded.run, tries = tries + 1, finished = excluded.finished",
                (settings.key, settings.to_json(), state, outcome.to_json(), self.run, time.time()),
            )

    def trials(self) -> dict[str, StoredTrial]:
        """Every trial by its key, in the order in which they finished."""
        found = {}
        rows = self._connection.execute(
            "SELECT key, settings, state, outcome, run, tries, finished FROM trials ORDER BY finished, key"
        )
        for key, settings, state, outcome, run, tries, finished in rows:
            kind = TrialResult if state == "done" else TrialFailure
            found[key] = StoredTrial(TrialSettings.from_json(settings), kind.from_json(outcome), run, tries, finished)
        return found

    def runs(self) -> list[dict[str, Any]]:
        """Each start of the command on this folder: ``started``, ``command``, ``environment``, oldest first."""
        rows = self._connection.execute("SELECT started, command, environment FROM runs ORDER BY id")
        return [{"started": when, "command": what, "environment": json.loads(where)} for when, what, where in rows]

    def close(self) -> None:
        """Close the file and let others in."""
        self._connection.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)


class _Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.connection.execute("COMMIT" if kind is None else "ROLLBACK")
