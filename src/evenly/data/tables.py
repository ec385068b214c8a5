"""Adult and COMPAS: the two tables on which group methods are judged, as pandas frames with their group columns.

Use :func:`load_adult` and :func:`load_compas` where people are the samples and the question is how a model treats
groups of them. Both frames hold one row a person, a column ``target`` (int64, 0 or 1) and the group columns
:data:`GROUP_COLUMNS` (``sex``, ``race`` and ``age_cat``, each a string without missing values); everything else is in
the table's own units. The files are not part of the library: give their folder, or set ``EVENLY_DATA`` to the folder
that holds ``adult/`` and ``compas/``.

References:
    Ron Kohavi & Barry Becker, *Adult*, UCI machine learning repository, 1996.
    Jeff Larson, Surya Mattu, Lauren Kirchner & Julia Angwin, *How We Analyzed the COMPAS Recidivism Algorithm*,
    ProPublica, 2016: the filter of the rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GROUP_COLUMNS", "load_adult", "load_compas"]

#: The columns of both frames that hold groups of people.
GROUP_COLUMNS = ("sex", "race", "age_cat")

_ADULT = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
    "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip
_ADULT_NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
_ADULT_FILES = {"train": "adult.data", "test": "adult.test"}
_COMPAS_FILE = "compas-scores-two-years.csv"
_COMPAS = (
    "sex", "age", "age_cat", "race", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count",
    "c_charge_degree", "decile_score", "score_text",
)  # fmt: skip
_COMPAS_FILTER = ("days_b_screening_arrest", "is_recid", "c_charge_degree", "score_text", "two_year_recid")


def load_adult(
    folder: str | os.PathLike[str] | None = None, *, split: str = "all", missing: str = "keep"
) -> pd.DataFrame:
    """The UCI Adult census income table.

    Columns: ``age`` (years), ``workclass``, ``fnlwgt`` (the census' sampling weight, not a feature of the person),
    ``education``, ``education-num``, ``marital-status``, ``occupation``, ``relationship``, ``race``, ``sex``,
    ``capital-gain`` and ``capital-loss`` (dollars), ``hours-per-week``, ``native-country``; numbers are int64, the
    rest strings, unknown (``?``) is NaN. Added are ``age_cat`` (``"Less than 25"``, ``"25 - 45"``,
    ``"Greater than 45"``, COMPAS's bands) and, last, ``target``: 1 where the income is above 50,000 dollars.

    Args:
        folder: holds ``adult.data`` and ``adult.test``, as they are at UCI or with a header line, plain or ``.gz``;
            or holds a folder ``adult`` with them. Default: the folder named by ``EVENLY_DATA``.
        split: ``"train"`` (32,561 rows), ``"test"`` (16,281) or ``"all"``, training rows first.
        missing: ``"keep"``, or ``"drop"`` the rows with an unknown value.

    Returns:
        A frame with a fresh index.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: unknown ``split`` or ``missing``, or a file that is not this table.
    """
    import pandas as pd

    if split not in (*_ADULT_FILES, "all"):
        raise ValueError(f"split={split!r}, expected 'train', 'test' or 'all'")
    if missing not in ("keep", "drop"):
        raise ValueError(f"missing={missing!r}, expected 'keep' or 'drop'")
    place = _place(folder, "adult", _ADULT_FILES["train"])
    parts = [_adult_file(_find(place, name)) for part, name in _ADULT_FILES.items() if split in (part, "all")]
    frame = pd.concat(parts, ignore_index=True)
    income = frame.pop("income")
    frame["age_cat"] = _age_cat(frame["age"])
    frame["target"] = (income == ">50K").astype("int64")
    return frame.dropna(ignore_index=True) if missing == "drop" else frame


def load_compas(folder: str | os.PathLike[str] | None = None, *, filtered: bool = True) -> pd.DataFrame:
    """ProPublica's COMPAS table: two-year recidivism in Broward County, Florida.

    Columns: ``sex``, ``age`` (years), ``age_cat``, ``race``, ``juv_fel_count``, ``juv_misd_count``,
    ``juv_other_count``, ``priors_count`` (earlier offences), ``c_charge_degree`` (``"F"`` felony, ``"M"``
    misdemeanour), ``decile_score`` (1 to 10) and ``score_text`` (what the COMPAS tool said; not features, but what an
    audit looks at) and, last, ``target``: 1 where the person was charged with another crime within two years.
    Columns of the file that are only known later (dates and charges of the new crime) are left out.

    Args:
        folder: holds ``compas-scores-two-years.csv``, plain or ``.gz``; or holds a folder ``compas`` with it.
            Default: the folder named by ``EVENLY_DATA``.
        filtered: ProPublica's filter, 6,172 of 7,214 rows: the arrest is within 30 days of the screening, the case
            could be followed (``is_recid`` is not -1), the charge is no mere traffic offence (degree ``"O"``), and
            there is a score.

    Returns:
        A frame with a fresh index.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a file that is not this table.
    """
    import pandas as pd

    file = _find(_place(folder, "compas", _COMPAS_FILE), _COMPAS_FILE)
    frame = pd.read_csv(file, low_memory=False)
    lacking = sorted({*_COMPAS, *_COMPAS_FILTER} - set(frame.columns))
    if lacking:
        raise ValueError(f"{file} lacks the columns {', '.join(lacking)}; it is not {_COMPAS_FILE}")
    for name in ("decile_score", "priors_count"):  # the file holds them twice
        twin = f"{name}.1"
        if twin in frame and not frame[twin].equals(frame[name]):
            raise ValueError(f"the two columns {name!r} of {file} differ, expected copies")
    if filtered:
        frame = frame[
            frame["days_b_screening_arrest"].between(-30, 30)
            & (frame["is_recid"] != -1)
            & (frame["c_charge_degree"] != "O")
            & frame["score_text"].notna()  # written "N/A" in the file
        ]
    target = frame["two_year_recid"].astype("int64")
    return frame[list(_COMPAS)].assign(target=target).reset_index(drop=True)


def _place(folder: str | os.PathLike[str] | None, name: str, file: str) -> Path:
    """The folder with the files: the given one, or its folder ``name``."""
    if folder is None:
        given = os.environ.get("EVENLY_DATA")
        if not given:
            raise FileNotFoundError(
                f"no folder was given and EVENLY_DATA is not set: call load_{name}(FOLDER) with the folder that "
                f"holds {file}"
            )
        folder = given
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the folder {root} {'is a file' if root.exists() else 'does not exist'}")
    return root / name if (root / name).is_dir() else root


def _find(place: Path, name: str) -> Path:
    for file in (place / name, place / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{place} holds neither {name} nor {name}.gz")


def _adult_file(file: Path) -> pd.DataFrame:
    import pandas as pd

    # UCI's files have no header, a first line that begins with "|" in adult.test, and labels that end with ".".
    frame: Any = pd.read_csv(
        file, header=None, names=list(_ADULT), index_col=False, comment="|", skipinitialspace=True,
        na_values=["?"], keep_default_na=False, dtype=str,
    )  # fmt: skip
    if len(frame) and frame["age"].iloc[0] == "age":
        frame = frame.iloc[1:].reset_index(drop=True)
    frame["income"] = frame["income"].str.removesuffix(".")
    wrong = ~frame["income"].isin(["<=50K", ">50K"])
    if not len(frame) or wrong.any():
        found = f"{frame['income'][wrong].iloc[0]!r} in row {int(wrong.idxmax()) + 1}" if len(frame) else "no rows"
        raise ValueError(f"{file} is not the Adult table: expected '<=50K' or '>50K' as column 15, found {found}")
    try:
        return frame.astype(dict.fromkeys(_ADULT_NUMBERS, "int64"))
    except ValueError as error:
        raise ValueError(f"{file} is not the Adult table: expected whole numbers ({error})") from error


def _age_cat(age: Any) -> Any:
    import pandas as pd

    bands = pd.cut(age, [-float("inf"), 24, 45, float("inf")], labels=["Less than 25", "25 - 45", "Greater than 45"])
    return bands.astype(str)
