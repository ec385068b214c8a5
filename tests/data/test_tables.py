"""Adult and COMPAS as frames."""

from __future__ import annotations

import gzip

import pytest

from evenly.data import GROUP_COLUMNS, load_adult, load_compas

ADULT = "39, State-gov, 77516, Bachelors, 13, Never-married, ?, Not-in-family, White, Male, 2174, 0, 40, Cuba, <=50K"
HEADER = (
    "age, workclass, fnlwgt, education, education-num, marital-status, occupation, relationship, race, sex, "
    "capital-gain, capital-loss, hours-per-week, native-country, classification"
)
COMPAS = "sex,age,age_cat,race,juv_fel_count,juv_misd_count,juv_other_count,decile_score,score_text,priors_count,"
COMPAS += "days_b_screening_arrest,c_charge_degree,is_recid,two_year_recid,decile_score,priors_count"
KEPT = "Male,69,Greater than 45,Other,0,0,0,1,Low,2,-30,F,0,1,1,2"


def write_adult(folder, *, header, dot=""):
    rows = [ADULT, ADULT.replace("39", "25", 1).replace("<=50K", ">50K").replace("?", "Sales")]
    first = [HEADER] if header else []
    (folder / "adult.data").write_text("\n".join([*first, *rows]) + "\n\n")
    first = [HEADER] if header else ["|1x3 Cross validator"]
    text = "\n".join([*first, rows[1].replace("25", "46", 1) + dot]) + "\n"
    (folder / "adult.test.gz").write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("header", [True, False])
def test_adult_of_uci_and_with_a_header(tmp_path, header, monkeypatch):
    place = tmp_path / "adult"
    place.mkdir()
    write_adult(place, header=header, dot="" if header else ".")
    frame = load_adult(place)
    assert list(frame.columns) == [*HEADER.split(", ")[:-1], "age_cat", "target"]
    assert frame["target"].tolist() == [0, 1, 1]
    assert frame["age_cat"].tolist() == ["25 - 45", "25 - 45", "Greater than 45"]
    assert frame["occupation"].isna().tolist() == [True, False, False]
    assert frame["capital-gain"].dtype == frame["target"].dtype == "int64"
    assert load_adult(place, missing="drop").index.tolist() == [0, 1]
    assert [len(load_adult(tmp_path, split=split)) for split in ("train", "test", "all")] == [2, 1, 3]
    monkeypatch.setenv("EVENLY_DATA", str(tmp_path))
    assert load_adult().equals(frame)


def test_compas_filter(tmp_path):
    wrong = [
        KEPT.replace("-30", "-31"),
        KEPT.replace("-30", ""),
        KEPT.replace(",F,", ",O,"),
        KEPT.replace("Low", "N/A"),
        KEPT.replace("F,0", "F,-1"),
    ]
    file = tmp_path / "compas-scores-two-years.csv"
    file.write_text("\n".join([COMPAS, *wrong, KEPT]) + "\n")
    frame = load_compas(tmp_path)
    assert frame.to_dict("records") == [
        {
            "sex": "Male", "age": 69, "age_cat": "Greater than 45", "race": "Other", "juv_fel_count": 0,
            "juv_misd_count": 0, "juv_other_count": 0, "priors_count": 2, "c_charge_degree": "F", "decile_score": 1,
            "score_text": "Low", "target": 1,
        }
    ]  # fmt: skip
    assert len(load_compas(tmp_path, filtered=False)) == 6
    file.write_text("\n".join([COMPAS, KEPT[:-1] + "3"]) + "\n")
    with pytest.raises(ValueError, match=r"two columns 'priors_count' .* differ"):
        load_compas(tmp_path)


def test_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("EVENLY_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"EVENLY_DATA is not set: call load_compas\(FOLDER\)"):
        load_compas()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_adult(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"holds neither adult.data nor adult.data.gz"):
        load_adult(tmp_path)
    with pytest.raises(ValueError, match="split='val', expected 'train', 'test' or 'all'"):
        load_adult(tmp_path, split="val")
    with pytest.raises(ValueError, match="missing='fill'"):
        load_adult(tmp_path, missing="fill")
    (tmp_path / "adult.data").write_text(ADULT.replace("<=50K", "50K"))
    with pytest.raises(ValueError, match=r"not the Adult table: .* found '50K' in row 1"):
        load_adult(tmp_path, split="train")
    (tmp_path / "adult.data").write_text(ADULT.replace("39", "old"))
    with pytest.raises(ValueError, match="expected whole numbers"):
        load_adult(tmp_path, split="train")
    (tmp_path / "adult.data").write_text("")
    with pytest.raises(ValueError, match="found no rows"):
        load_adult(tmp_path, split="train")
    (tmp_path / "compas-scores-two-years.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns age, age_cat"):
        load_compas(tmp_path)


def test_real_adult(shared_data):
    train, test = load_adult(shared_data, split="train"), load_adult(shared_data / "adult", split="test")
    assert (len(train), len(test)) == (32561, 16281)
    assert train["target"].mean() == pytest.approx(0.2408, abs=1e-4)
    assert len(load_adult(shared_data, missing="drop")) == 45222  # as adult.names says
    assert train["sex"].value_counts().to_dict() == {"Male": 21790, "Female": 10771}
    assert not train[[*GROUP_COLUMNS, "target"]].isna().any().any()


def test_real_compas(shared_data):
    frame = load_compas(shared_data)
    assert (len(frame), len(load_compas(shared_data, filtered=False))) == (6172, 7214)
    # ProPublica's notebook: these counts, and 2,809 who did it again
    assert frame["race"].value_counts()[["African-American", "Caucasian", "Hispanic"]].tolist() == [3175, 2103, 509]
    assert frame["target"].sum() == 2809
    assert not frame.isna().any().any()
