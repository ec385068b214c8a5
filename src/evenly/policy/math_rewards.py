"""The 0/1 rewards of reasoning tasks: is the boxed answer right, and is the output in the asked-for form.

:func:`accuracy_reward` is 1 where the last boxed answer of the output verifies equal to the gold answer;
:func:`format_reward` is 1 where the whole output is one think block directly followed by one answer block. Both have
the signature of TRL's reward functions and work without it.

Use them with :class:`~evenly.policy.BNPO`, one reward component each (``num_rewards=2``).

Reference:
    Xiao, Zhang & Cao, *BNPO: Beta Normalization Policy Optimization*, 2025, arXiv 2506.02864 (the rewards of its
    experiments, as the released code has them). The comparison of answers is the library math-verify's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

__all__ = ["accuracy_reward", "format_reward"]

Completion = str | Sequence[dict[str, Any]]

_FORM = re.compile(r"<think>.*?</think><answer>.*?</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_END = 500  # characters of the output in which the answer is looked for


def format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1.0 for each output that is ``<think>...</think><answer>...</answer>`` and nothing else, each tag once; else 0.0.

    Args:
        completions: texts, or conversations whose last message's ``"content"`` is the text.

    Raises:
        TypeError: a completion is neither.

    >>> format_reward(["<think>2 + 2</think><answer>4</answer>", "4", "<think></think> <answer>4</answer>"])
    [1.0, 0.0, 0.0]
    """
    texts = [_text(one) for one in completions]
    return [float(bool(_FORM.fullmatch(text)) and all(text.count(tag) == 1 for tag in _TAGS)) for text in texts]


def accuracy_reward(completions: Sequence[Completion], solution: Sequence[str], **_: Any) -> list[float]:
    """1.0 for each output whose last boxed answer is mathematically equal to the gold answer; else 0.0.

    The answer is looked for in the last 500 characters of the output. What cannot be parsed, on either side, is 0.0.
    Boxes that math-verify takes for the parts of one answer, such as those joined by a comma, are compared together.

    Args:
        completions: texts, or conversations whose last message's ``"content"`` is the text.
        solution: the gold answers, one for each completion, as LaTeX without the box.

    Raises:
        ImportError: math-verify is not installed (``pip install evenly[trl]``).
        TypeError: a completion is neither a text nor a conversation.
        ValueError: the two lists differ in length.

    >>> accuracy_reward([r"It is \\boxed{\\frac{1}{2}}.", r"It is \\boxed{3}."], ["0.5", "4"])  # doctest: +SKIP
    [1.0, 0.0]
    """
    if len(completions) != len(solution):
        raise ValueError(f"There are {len(completions)} completions and {len(solution)} solutions; expected one each.")
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError("accuracy_reward needs math-verify: pip install evenly[trl]") from error
    # Its time limits are signals, which only the main thread can set.
    limits: dict[str, Any] = {} if threading.current_thread() is threading.main_thread() else {"parsing_timeout": None}
    verify_limits: dict[str, Any] = {"timeout_seconds": None} if limits else {}
    settings: dict[str, Any] = {"basic_latex": True, "units": True, "boxed": "all"}
    gold_form = LatexExtractionConfig(
        normalization_config=NormalizationConfig(**settings, malformed_operators=True, nits=True),
        boxed_match_priority=0,
        try_extract_without_anchor=True,
    )
    output_form = LatexExtractionConfig(
        normalization_config=NormalizationConfig(**settings, malformed_operators=False, nits=False),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    rewards = []
    for one, gold in zip(completions, solution, strict=True):
        text = _text(one)[-_END:]
        options: dict[str, Any] = {"extraction_mode": "first_match", **limits}
        wanted = parse(rf"\boxed{{{gold}}}", [gold_form], fallback_mode="no_fallback", **options)
        given = parse(text, [output_form], fallback_mode="first_match", **options) if wanted else []
        rewards.append(float(bool(given) and verify(wanted, given, **verify_limits)))
    return rewards


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], dict):
        content = completion[-1].get("content")
        if isinstance(content, str):
            return content
    raise TypeError(
        f"A completion is {completion!r}, expected a text or a list of messages with 'content', such as "
        f"[{{'role': 'assistant', 'content': 'text'}}]."
    )
