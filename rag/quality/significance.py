"""How sure a figure is: bootstrap intervals, and whether two runs differ by more than chance.

A figure is a share: the sum of what questions bring, over the sum of what they could have brought.
Both are given question by question, (questions, figures), so that a mean over some of the
questions and a ratio over citations are resampled the same way. Knows nothing of answers.

Intervals are percentile bootstrap (Efron, 1979) over questions. Two runs are compared on the same
questions: by the interval of their difference under the same resamples, and by a permutation test
that swaps the two runs' results question by question (Fisher, 1935; Smucker et al., 2007).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = 2_000
SEED = 20_240
_AT_ONCE = 200  # resamples held in memory together

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shares:
    """`parts` and `wholes`, float64 (questions, figures); a whole of 0 is a question that doesn't count."""

    parts: Array
    wholes: Array

    def __post_init__(self) -> None:
        assert self.parts.shape == self.wholes.shape and self.parts.ndim == 2, "one part to one whole"

    def totals(self) -> Array:
        """The figures, float64 (figures,); NaN where nothing counts."""
        return _ratio(self.parts.sum(axis=0), self.wholes.sum(axis=0))


def _ratio(parts: Array, wholes: Array) -> Array:
    empty = wholes == 0
    return np.where(empty, np.nan, parts / np.where(empty, 1.0, wholes))


def resampled(shares: Shares, *, rounds: int = ROUNDS, seed: int = SEED) -> Array:
    """The figures of `rounds` bootstrap samples of the questions, float64 (rounds, figures).

    The same number of questions and the same seed draw the same samples, so that two runs over the
    same questions can be subtracted from each other.
    """
    return np.concatenate([
        _ratio(counts @ shares.parts, counts @ shares.wholes)
        for counts in _samples(len(shares.parts), rounds, seed)
    ])


def _samples(questions: int, rounds: int, seed: int) -> Iterator[Array]:
    """How often each question is drawn, float64 (some rounds, questions)."""
    rng = np.random.default_rng(seed)
    for begin in range(0, rounds, _AT_ONCE):
        count = min(_AT_ONCE, rounds - begin)
        drawn = rng.integers(0, questions, size=(count, questions))
        rows = np.arange(count)[:, None] * questions
        flat = np.bincount((drawn + rows).ravel(), minlength=count * questions)
        yield flat.reshape(count, questions).astype(np.float64)


def interval(samples: Array, *, share: float = 0.95) -> tuple[Array, Array]:
    """Low and high end of the middle `share` of each column; NaN where a figure is undefined."""
    low, high = (1 - share) / 2, (1 + share) / 2
    ends = np.full((2, samples.shape[1]), np.nan)
    for column in range(samples.shape[1]):
        # A sample may by chance hold none of the questions that count for a figure.
        known = samples[:, column][~np.isnan(samples[:, column])]
        if known.size:
            ends[:, column] = np.quantile(known, [low, high])
    return ends[0], ends[1]


def swapped(a: Shares, b: Shares, *, rounds: int = ROUNDS, seed: int = SEED) -> tuple[Array, Array]:
    """Figures of both runs where each question's results may have changed sides, twice (rounds, figures)."""
    assert a.parts.shape == b.parts.shape, "both runs hold the same questions"
    rng = np.random.default_rng(seed)
    questions = len(a.parts)
    sides: tuple[list[Array], list[Array]] = ([], [])
    for begin in range(0, rounds, _AT_ONCE):
        kept = rng.integers(0, 2, size=(min(_AT_ONCE, rounds - begin), questions)).astype(np.float64)
        for side, first, second in ((0, a, b), (1, b, a)):
            parts = kept @ first.parts + (1 - kept) @ second.parts
            wholes = kept @ first.wholes + (1 - kept) @ second.wholes
            sides[side].append(_ratio(parts, wholes))
    return np.concatenate(sides[0]), np.concatenate(sides[1])


def p_values(observed: Array, chance: Array) -> Array:
    """Two-sided: how often chance brings a difference at least as large, float64 (figures,).

    The observed one counts among them, so that p is never 0 (Phipson and Smyth, 2010).
    """
    larger = np.abs(np.nan_to_num(chance)) >= np.abs(observed) - 1e-12
    p: Array = (larger.sum(axis=0) + 1) / (len(chance) + 1)
    return np.where(np.isnan(observed), np.nan, p)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): the more one looks, the more one finds."""
    order = sorted(range(len(p)), key=lambda at: p[at])
    corrected = [0.0] * len(p)
    highest = 0.0
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, p[at] * (len(p) - place)))
        corrected[at] = highest
    return corrected
