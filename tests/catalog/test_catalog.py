"""The register: complete, well-formed, and true about every row that says done."""

from __future__ import annotations

import importlib
import inspect

import pytest

from conformance.cases import covered_objects
from conformance.estimator_cases import ESTIMATORS
from conformance.loss_cases import LOSSES, SAMPLERS
from conformance.manifold_cases import MANIFOLDS
from conformance.module_cases import MODULES
from conformance.optimizer_cases import OPTIMIZERS
from conformance.recurrent_cases import RECURRENT
from conformance.reward_cases import REWARDS
from evenly import catalog, claims
from evenly.catalog import AREAS, CatalogError, Method

DONE = [row for row in catalog.methods() if row.done]

GOOD = """
[[method]]
id = "some-norm"
title = "Some Norm"
area = "nn"
kind = "layer"
arxiv = "1502.03167"
objects = []
state = "planned"
"""


def write(tmp_path, text):
    path = tmp_path / "register.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_119_rows_once():
    rows = catalog.methods()
    assert len(rows) == 119
    assert len({row.id for row in rows}) == 119
    assert len({row.title for row in rows}) == 119
    assert len({row.link for row in rows}) == 119
    assert {row.area for row in rows} == set(AREAS)
    assert [(list(AREAS).index(row.area), row.id) for row in rows] == sorted(
        (list(AREAS).index(row.area), row.id) for row in rows
    )


def test_rows_are_those_of_the_papers(shared_data):
    import json

    lines = (shared_data.parent / "papers" / "abstracts.jsonl").read_text(encoding="utf-8").splitlines()
    papers = {paper["id"]: paper for paper in map(json.loads, lines)}
    rows = {row.id: row for row in catalog.methods()}
    assert set(rows) == set(papers)
    for id, paper in papers.items():
        assert rows[id].area == paper["area"]
        assert rows[id].title.lower() == paper["title"].lower()


def test_link():
    assert catalog.method("batch-normalization").link == "https://arxiv.org/abs/1502.03167"
    assert catalog.method("gsr").arxiv is None
    assert catalog.method("gsr").link.startswith("https://openreview.net/")


def test_read_a_good_file(tmp_path):
    assert catalog.read(write(tmp_path, GOOD)) == (
        Method("some-norm", "Some Norm", "nn", "layer", (), "planned", arxiv="1502.03167"),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('state = "planned"', 'sate = "planned"', "unknown key 'sate'; did you mean 'state'"),
        ('state = "planned"', "", "missing 'state'"),
        ('state = "planned"', 'state = "almost"', "state is 'almost'; expected 'planned' or 'done'"),
        ('state = "planned"', 'state = "done"', "state is 'done' but objects is empty"),
        ('area = "nn"', 'area = "layers"', "area is 'layers'; expected 'nn', "),
        ('title = "Some Norm"', "title = 3", "title is 3; expected text"),
        ('"some-norm"', '"Some Norm"', "lower-case words joined by dashes"),
        ('arxiv = "1502.03167"', 'arxiv = "hep-th/1"', "arxiv is 'hep-th/1'; expected a number"),
        ('arxiv = "1502.03167"', "", "has neither of 'arxiv' and 'reference'"),
        ('arxiv = "1502.03167"', 'arxiv = "1502.03167"\nreference = "https://a.b"', "has both of"),
        ('arxiv = "1502.03167"', 'reference = "a book"', "expected a link"),
        ("objects = []", 'objects = "evenly.nn:BatchNorm"', "expected a list"),
        ("objects = []", 'objects = ["evenly.nn.BatchNorm"]', "expected 'evenly.module:name'"),
        ("objects = []", 'objects = ["evenly.nn:A", "evenly.nn:A"]', "names an object twice"),
        ("[[method]]", "[[methods]]", "unknown top-level key 'methods'"),
        ("[[method]]", "[method", "not valid TOML"),
    ],
)
def test_a_malformed_row_is_refused(tmp_path, old, new, message):
    with pytest.raises(CatalogError) as error:
        catalog.read(write(tmp_path, GOOD.replace(old, new)))
    assert message in str(error.value)
    assert "register.toml" in str(error.value)


def test_a_duplicate_id_is_refused(tmp_path):
    with pytest.raises(CatalogError, match="'some-norm' is used twice, by methods 1 and 2"):
        catalog.read(write(tmp_path, GOOD + GOOD))


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("batch-normalisation", "'batch-normalization'"),
        ("batchnorm", "'batch-normalization'"),
        ("zzzz", "`evenly list` shows every id"),
    ],
)
def test_an_unknown_id_has_close_matches(word, hint):
    with pytest.raises(CatalogError) as error:
        catalog.method(word)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evenly.nn.BatchNorm", "not of the form"),
        ("os:system", "not of the form"),
        ("evenly.nothing:X", "does not import"),
        ("evenly.nn:Nothing", "has no 'Nothing'"),
    ],
)
def test_resolve_refuses(name, message):
    with pytest.raises(CatalogError) as error:
        catalog.resolve(name)
    assert message in str(error.value)


def test_every_listed_object_imports():
    for row in catalog.methods():
        for name in row.objects:
            found = catalog.resolve(name)
            assert inspect.getdoc(found), f"{name} has no docstring"


def test_objects_have_one_home():
    seen: dict[str, str] = {}
    for row in catalog.methods():
        for name in row.objects:
            assert seen.setdefault(name, row.id) == row.id, f"{name} is listed by {seen[name]} and {row.id}"


@pytest.mark.parametrize("row", DONE, ids=lambda row: row.id)
class TestDone:
    def test_docstring_has_its_reference(self, row):
        reference = row.arxiv or row.reference
        for name in row.objects:
            found = catalog.resolve(name)
            module = importlib.import_module(found.__module__)
            texts = f"{inspect.getdoc(found)}\n{module.__doc__}"
            assert reference in texts, f"{name} names {reference} neither in its docstring nor in its module's"

    def test_its_classes_are_in_a_conformance_suite(self, row):
        # Functions, such as recalibrate_, have no suite of a kind; their own tests hold them.
        classes = {name for name in row.objects if inspect.isclass(catalog.resolve(name))}
        rows = (*RECURRENT, *OPTIMIZERS, *LOSSES, *SAMPLERS, *ESTIMATORS, *REWARDS)
        covered = covered_objects() | {case.object for case in rows}
        covered |= {name for case in (*MODULES, *MANIFOLDS) for name in case.objects}
        assert classes
        assert classes <= covered, f"give {sorted(classes - covered)} a row in tests/conformance"

    def test_claim_has_a_stored_full_result(self, row):
        claim = claims.get(row.id)
        result = claims.stored(row.id)
        assert result is not None, f"run `evenly claim {row.id}`"
        assert result["budget"] == "full"
        assert result["criterion"] == claim.criterion
        assert result["verdict"] in ("reproduced", "not reproduced")
        assert (claims.results_dir() / f"{row.id}.svg").is_file()
