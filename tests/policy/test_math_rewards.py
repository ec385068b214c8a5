"""The 0/1 rewards of mathematics."""

from __future__ import annotations

import builtins
import threading

import pytest

from evenly.policy.math_rewards import accuracy_reward, format_reward


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>a\nb</think><answer>4</answer>", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a</think> <answer>4</answer>", 0.0),  # not directly
        ("<think>a</think><answer>4</answer>\n", 0.0),  # not the whole
        ("x<think>a</think><answer>4</answer>", 0.0),
        ("<think>a<think></think><answer>4</answer>", 0.0),  # a tag twice
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, want):
    assert format_reward([text]) == [want]
    assert format_reward([[{"role": "assistant", "content": text}]], prompts=["?"]) == [want]


@pytest.mark.parametrize(
    ("text", "gold", "want"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so \boxed{3}", "4", 0.0),
        (r"Try \boxed{3}. That is wrong. So the answer is \boxed{4}.", "4", 1.0),  # the last box
        ("the answer is 4", "4", 0.0),  # no box
        ("", "4", 0.0),
        (r"\boxed{4}" + " and so on" * 60, "4", 0.0),  # too far from the end
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    ],
)
def test_accuracy(text, gold, want):
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install evenly[trl]")
    assert accuracy_reward([text], [gold]) == [want]


def test_accuracy_in_a_thread():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install evenly[trl]")
    found = []
    thread = threading.Thread(target=lambda: found.extend(accuracy_reward([r"\boxed{2}", r"\boxed{3}"], ["2", "2"])))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match="There are 1 completions and 2 solutions"):
        accuracy_reward(["a"], ["1", "2"])
    for bad in (3, [], [{"role": "assistant"}]):
        with pytest.raises(TypeError, match="expected a text or a list of messages"):
            format_reward([bad])
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith(("math_verify", "latex2sympy2")):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install evenly\[trl\]"):
        accuracy_reward(["a"], ["1"])
