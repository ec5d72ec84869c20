"""How much a term of a question says: inverse document frequency with a prior, less for seams.

In a small knowledge base every word looks rare, and "the" in one of three passages would weigh as
much as a name. The share of passages that hold a term is therefore the base's own, mixed with the
share in a large bilingual collection that ships with the program (Bayesian smoothing, the
collection counting as `PRIOR_PASSAGES` passages).

A bigram of Han characters is either a word or the seam between two. Seams are told by pointwise
mutual information (Church and Hanks, 1990): their two characters meet no more often than chance.
"""

from __future__ import annotations

import lzma
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PRIOR_PASSAGES = 300.0
_COUNTS = Path(__file__).parent / "bundled" / "term_counts.txt.xz"
# A bigram counts in full from a PMI of _WORD on, and down to _LEAST of its weight below _SEAM.
_WORD, _SEAM, _LEAST = -1.0, -4.0, 0.15
# A bigram this many times as frequent here as in the collection is a word of the base's own field.
_FIELD_RATIO, _FIELD_PASSAGES = 4.0, 3


@dataclass(frozen=True, slots=True)
class Background:
    """Shares of the collection's passages: of each term, and of Han characters as first and second."""

    shares: dict[str, float]
    unknown: float  # the share given to terms that are too rare to be listed
    first: dict[str, float]
    second: dict[str, float]

    def cohesion(self, bigram: str) -> float | None:
        """Pointwise mutual information of a bigram's characters, natural log; None where unlisted."""
        share = self.shares.get(bigram)
        if share is None:
            return None
        return math.log(share / (self.first[bigram[0]] * self.second[bigram[1]]))


@lru_cache(maxsize=1)
def background() -> Background:
    """The collection's counts, read once a process (about 60,000 terms)."""
    shares: dict[str, float] = {}
    first: defaultdict[str, float] = defaultdict(float)
    second: defaultdict[str, float] = defaultdict(float)
    with lzma.open(_COUNTS, "rt", encoding="utf-8") as lines:
        total = int(next(lines))
        for line in lines:
            term, count = line.rsplit(" ", 1)
            share = shares[term] = int(count) / total
            if len(term) == 2 and not term.isascii():
                first[term[0]] += share
                second[term[1]] += share
    return Background(shares, min(shares.values()) / 2, dict(first), dict(second))


def term_weights(
    terms: Sequence[str], counts: Mapping[str, int], total: int
) -> dict[str, float]:
    """Weight of each term, positive. `counts`: passages of the base that hold it, of `total`."""
    known = background()
    weights = {}
    for term in terms:
        count = counts.get(term, 0)
        prior = known.shares.get(term, known.unknown)
        share = (count + PRIOR_PASSAGES * prior) / (total + PRIOR_PASSAGES)
        weight = math.log(1.0 + (1.0 - share) / (share + 1e-4))
        if len(term) == 2 and not term.isascii():
            weight *= _wordness(known, term, count, total)
        weights[term] = weight
    return weights


def _wordness(known: Background, bigram: str, count: int, total: int) -> float:
    """From _LEAST for a seam to 1.0 for a word."""
    usual = known.shares.get(bigram, known.unknown)
    if count >= _FIELD_PASSAGES and count / total >= _FIELD_RATIO * usual:
        return 1.0
    cohesion = known.cohesion(bigram)
    if cohesion is None:  # in neither: a seam, or a name that stands nowhere
        return 0.6 if count else _LEAST
    return min(1.0, max(_LEAST, (cohesion - _SEAM) / (_WORD - _SEAM)))
