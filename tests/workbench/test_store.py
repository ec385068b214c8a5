"""The store: what is written comes back, what cannot be used is refused with a reason."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from evenly.workbench import Store, StoreError, TrialFailure, TrialResult, TrialSettings

SETTINGS = TrialSettings("batch", "digits", batch_size=4, seed=0, epochs=1, lr=0.1)
RESULT = TrialResult(
    False,
    3,
    ((1, 2.5), (3, 0.1234567890123)),
    clean=0.9,
    corruptions={"fog": (0.5, 0.25)},
    domains={"inverted": 0.1},
    parameters=7,
    seconds_per_step=0.01,
    memory_bytes=5,
)


def test_round_trip(tmp_path: Path) -> None:
    other = replace(SETTINGS, seed=1)
    with Store(tmp_path, "evenly compare", {"torch": "2"}) as store:
        store.save(SETTINGS, RESULT)
        store.save(other, TrialFailure("ValueError: no", "trace"))
    with Store(tmp_path, "evenly compare again") as store:
        found = store.trials()
        assert found[SETTINGS.key].outcome == RESULT
        assert found[SETTINGS.key].settings == SETTINGS
        assert found[other.key].outcome == TrialFailure("ValueError: no", "trace")
        assert [run["command"] for run in store.runs()] == ["evenly compare", "evenly compare again"]
        assert store.runs()[0]["environment"] == {"torch": "2"}
        store.save(other, RESULT)
        again = store.trials()[other.key]
        assert (again.outcome, again.tries, again.run) == (RESULT, 2, 2)


def test_keys_differ_where_settings_do() -> None:
    keys = {SETTINGS.key}
    for change in (
        {"norm": "layer"},
        {"seed": 1},
        {"lr": 0.2},
        {"ood": "digits"},
        {"purpose": "tune"},
        {"severities": (1,)},
        {"code": "2"},
        {"data_hash": "f"},
    ):
        keys.add(replace(SETTINGS, **change).key)
    assert len(keys) == 9


@pytest.mark.parametrize(("name", "said"), [("schema", "tables of version 0"), ("evenly", "made by evenly 0")])
def test_another_version_is_refused(tmp_path: Path, name: str, said: str) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "trials.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE name = ?", (name,))
    connection.close()
    with pytest.raises(StoreError, match=f"{said}, this is .* another --out"):
        Store(tmp_path)
    # The refusal let go of the lock.
    with pytest.raises(StoreError, match=said):
        Store(tmp_path)


def test_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(StoreError, match="cannot be read"):
        Store(tmp_path)
    (tmp_path / "trials.sqlite").unlink()
    with sqlite3.connect(tmp_path / "trials.sqlite") as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(StoreError, match="not a store of trials"):
        Store(tmp_path)


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(StoreError, match="in use by another"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with contextlib.suppress(ZeroDivisionError), store._transaction():
            store._connection.execute("DELETE FROM runs")
            raise ZeroDivisionError
        assert len(store.runs()) == 1
