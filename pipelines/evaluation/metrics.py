"""Answers → scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Question:
    id: str
    type: str
    messages: list[dict]
    """The conversation up to where the answer is due."""
    pictures: list[str]
    """Paths, in reading order."""
    expected: str


def final_answer(text: str) -> str:
    """What an answer comes to: after its last "so", lower case, without a closing full stop."""
    words = text.lower().replace(" .", "").strip(" .").split()
    last = max((index for index, word in enumerate(words) if word == "so"), default=-1)
    return " ".join(words[last + 1 :])


def exact_match(answer: str, expected: str) -> float:
    return float(final_answer(answer) == final_answer(expected))


def bootstrap_interval(values: np.ndarray, groups: np.ndarray | None = None, rounds: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean, by resampling values, or whole groups of them (such as one photograph's captions)."""
    random = np.random.default_rng(0)
    if groups is not None:
        members = [values[groups == group] for group in np.unique(groups)]
        sums, sizes = np.array([m.sum() for m in members]), np.array([len(m) for m in members])
    else:
        sums, sizes = values, np.ones(len(values))
    picks = random.integers(len(sums), size=(rounds, len(sums)))
    means = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
