"""Wrong arguments: the right exception, and a message that says what was given, what was expected, how to fix it."""

from __future__ import annotations

import re

import pytest
import torch

import evenly
from evenly.core import PatternError

X = torch.randn(2, 6, 4)


def shape_in(message: str, shape=(2, 6, 4)) -> bool:
    return re.search(r"[\[(]" + r",\s*".join(map(str, shape)) + r",?[\])]", message) is not None


BAD_PATTERNS = {  # name: pattern, sizes, words that the message must hold (regular expressions, any case)
    "unbalanced (": ("n (g c h -> n", {}, r"parenthes|bracket|\("),
    "unbalanced )": ("n g) c h -> n", {}, r"parenthes|bracket|\)"),
    "unbalanced on the right": ("n c h -> (n", {}, r"parenthes|bracket|\("),
    "nested": ("n (g (a c)) h -> n", {"g": 2, "a": 1}, r"parenthes|bracket|nest|inside"),
    "twice on the left": ("n c n -> c", {}, r"\bn\b.*(twice|duplicate|more than once|repeat)|(twice|duplicate).*\bn\b"),
    "twice inside parentheses": ("n (c c) h -> n", {}, r"twice|duplicate|more than once|repeat"),
    "twice on the right": ("n c h -> c c", {}, r"twice|duplicate|more than once|repeat"),
    "unknown on the right": ("n c h -> d", {}, r"\bd\b"),
    "unknown ellipsis on the right": ("n c h -> ...", {}, r"\.\.\.|ellipsis"),
    "two ellipses": ("... c ... -> c", {}, r"ellips|\.\.\."),
    "dots": ("n .. h -> n", {}, r"\.|ellips"),
    "ellipsis in parentheses": ("(... c) h -> c", {"c": 2}, r"ellips|\.\.\."),
    "no arrow": ("n c h", {}, r"->"),
    "two arrows": ("n c h -> c -> n", {}, r"->"),
    "empty": ("", {}, r"->|empty"),
    "spaces": ("   ", {}, r"->|empty"),
    "too few axes": ("n c -> c", {}, r"\b2\b.*\b3\b|\b3\b.*\b2\b"),
    "too many axes": ("n c h w -> c", {}, r"\b4\b.*\b3\b|\b3\b.*\b4\b"),
    "too many axes for the ellipsis": ("a b c ... d -> a", {}, r"\b4\b.*\b3\b|\b3\b.*\b4\b"),
    "unknown size": ("n c h -> c", {"g": 2}, r"\bg\b"),
    "size not given": ("n (g c) h -> n g", {}, r"\bg\b.*\bc\b|\bc\b.*\bg\b"),
    "does not divide": ("n (g c) h -> n g", {"g": 4}, r"\b6\b"),
    "wrong product": ("n (g c) h -> n g", {"g": 2, "c": 2}, r"\b6\b"),
    "wrong size": ("n c h -> c", {"c": 5}, r"\b5\b.*\b6\b|\b6\b.*\b5\b"),
    "one is not one": ("n 1 h -> n", {}, r"\b1\b.*\b6\b|\b6\b.*\b1\b"),
    "anonymous size": ("n 5 h -> n", {}, r"\b5\b.*\b6\b|\b6\b.*\b5\b"),
    "zero size": ("n (g c) h -> n g", {"g": 0}, r"\b0\b|positive"),
    "negative size": ("n (g c) h -> n g", {"g": -2}, r"-2|positive"),
    "bad character": ("n c, h -> c", {}, r","),
    "bad character 2": ("n c h => c", {}, r"->|="),
    "unicode minus": ("n c h −> c", {}, r"->|−"),
    "name begins with a digit": ("n 2c h -> n", {}, r"2c"),
    "name begins with underscore": ("n _c h -> n", {}, r"_c"),
    "name ends with underscore": ("n c_ h -> n", {}, r"c_"),
    "underscore": ("n _ h -> n", {}, r"_"),
    "emoji": ("n 🙂 h -> n", {}, r"🙂"),
    "colon": ("n c h: -> c", {}, r":"),
}


@pytest.mark.parametrize("call", [evenly.normalize, evenly.moments, evenly.whiten], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BAD_PATTERNS)
def test_bad_patterns(name, call):
    pattern, sizes, words = BAD_PATTERNS[name]
    for _ in range(2):  # a cached parse must raise again
        with pytest.raises(PatternError) as caught:
            call(X, pattern, **sizes)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert pattern in message, message
    assert shape_in(message), message
    assert re.search(words, message, re.IGNORECASE | re.DOTALL), message


def test_sizes_are_printed():
    with pytest.raises(PatternError) as caught:
        evenly.normalize(X, "n (g c) h -> n g", g=4)
    assert re.search(r"g\W+4", str(caught.value)), str(caught.value)


def test_pattern_error_is_a_value_error():
    assert issubclass(PatternError, ValueError)


@pytest.mark.parametrize("pattern", [3, ["n c -> c"], b"n c h -> c"])
def test_the_pattern_must_be_a_string(pattern):
    with pytest.raises((TypeError, PatternError), match=r"str|pattern"):
        evenly.normalize(X, pattern)


def test_a_pattern_is_needed_without_labels():
    with pytest.raises((TypeError, ValueError), match="pattern"):
        evenly.normalize(X)
    with pytest.raises((TypeError, ValueError), match="pattern"):
        evenly.moments(X)


@pytest.mark.parametrize("size", [2.0, "2", None])
def test_sizes_must_be_integers(size):
    with pytest.raises((TypeError, ValueError), match="g"):
        evenly.normalize(X, "n (g c) h -> n g", g=size)


# name: exception, options, words
BAD_OPTIONS = {
    "unknown scale": (ValueError, {"scale": "variance"}, r"variance.*std|std.*variance"),
    "unknown activation": (ValueError, {"activation": "tanh"}, r"tanh.*relu|relu.*tanh"),
    "negative eps": (ValueError, {"eps": -1e-5}, r"eps.*-1e-05|-1e-05.*eps"),
    "nan eps": (ValueError, {"eps": float("nan")}, r"eps"),
    "weight too long": (ValueError, {"weight": torch.ones(5)}, r"weight.*\b5\b.*\b6\b|weight.*\b6\b.*\b5\b"),
    "weight of size 1": (ValueError, {"weight": torch.ones(1)}, r"weight"),
    "weight of two axes": (ValueError, {"weight": torch.ones(6, 4)}, r"weight"),
    "bias too long": (ValueError, {"bias": torch.ones(4)}, r"bias.*\b4\b.*\b6\b|bias.*\b6\b.*\b4\b"),
    "affine of another axis": (ValueError, {"weight": torch.ones(6), "affine": "d"}, r"\bd\b"),
    "affine of the wrong axis": (
        ValueError,
        {"weight": torch.ones(6), "affine": "h"},
        r"\b6\b.*\b4\b|\b4\b.*\b6\b",
    ),
    "affine twice": (ValueError, {"weight": torch.ones(6), "affine": "c c"}, r"\bc\b"),
    "residual of another shape": (ValueError, {"residual": torch.ones(2, 6, 5)}, r"residual"),
    "residual that would enlarge x": (ValueError, {"residual": torch.ones(3, 2, 6, 4)}, r"residual"),
    "mask of floats": (TypeError, {"mask": torch.ones(2, 6, 4)}, r"mask.*bool|bool.*mask"),
    "mask of integers": (TypeError, {"mask": torch.ones(2, 6, 4, dtype=torch.uint8)}, r"mask.*bool|bool.*mask"),
    "mask of another shape": (ValueError, {"mask": torch.ones(2, 5, 4, dtype=torch.bool)}, r"mask"),
    "mask that would enlarge x": (ValueError, {"mask": torch.ones(3, 2, 6, 4, dtype=torch.bool)}, r"mask"),
    "labels too short": (ValueError, {"by": torch.tensor([0])}, r"\b1\b.*\b2\b|\b2\b.*\b1\b"),
    "labels of two axes": (ValueError, {"by": torch.zeros(2, 6, dtype=torch.int64)}, r"by|label"),
    "labels of floats": (TypeError, {"by": torch.tensor([0.0, 1.0])}, r"integer|int64|long"),
    "labels of bool": (TypeError, {"by": torch.tensor([False, True])}, r"integer|int64|long"),
    "label above num_groups": (ValueError, {"by": torch.tensor([0, 3]), "num_groups": 2}, r"\b3\b.*num_groups"),
    "negative label with num_groups": (ValueError, {"by": torch.tensor([0, -1]), "num_groups": 2}, r"-1"),
    "num_groups without labels": ((TypeError, ValueError), {"num_groups": 2}, r"num_groups"),
    "num_groups of zero": (ValueError, {"by": torch.tensor([0, 1]), "num_groups": 0}, r"num_groups"),
    "stats of another shape": (ValueError, {"stats": (torch.zeros(5), torch.ones(5))}, r"\b5\b.*\b6\b|\b6\b.*\b5\b"),
    "negative correction": (ValueError, {"correction": -1}, r"correction"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    error, options, words = BAD_OPTIONS[name]
    with pytest.raises(error) as caught:
        evenly.normalize(X, "n c h -> c", **options)
    assert re.search(words, str(caught.value), re.IGNORECASE | re.DOTALL), str(caught.value)


def test_the_leading_axis_must_be_reduced_with_labels():
    for call in (evenly.normalize, evenly.moments):
        with pytest.raises(ValueError, match="n c h -> n") as caught:
            call(X, "n c h -> n", by=torch.tensor([0, 1]))
        assert re.search(r"lead|first|reduc", str(caught.value))


@pytest.mark.parametrize("pattern", ["n c h -> n c", "n c h -> ", "n (g c) h -> n g"])
def test_affine_must_be_named_where_it_is_not_clear(pattern):
    sizes = {"g": 2} if "g" in pattern else {}
    with pytest.raises(ValueError, match="affine"):
        evenly.normalize(X, pattern, weight=torch.ones(6), **sizes)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32, torch.bool])
def test_input_types_that_are_refused(dtype):
    x = torch.ones(2, 6, 4).to(dtype)
    for call in (evenly.normalize, evenly.moments):
        with pytest.raises(TypeError) as caught:
            call(x, "n c h -> c")
        message = str(caught.value)
        assert str(dtype) in message or str(dtype).removeprefix("torch.") in message, message


def test_numpy_arrays_and_lists_are_refused():
    for x in (X.numpy(), X.tolist()):
        with pytest.raises(TypeError, match=r"Tensor|tensor"):
            evenly.normalize(x, "n c h -> c")


def test_errors_come_before_any_work_and_leave_inputs_alone():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="scale"):
        evenly.normalize(x, "n c h -> c", scale="no")
    assert torch.equal(x, X)
