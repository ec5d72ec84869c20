"""How much a term of a question says: inverse document frequency with a prior.

In a small knowledge base every word looks rare, and "the" in one of three passages would weigh as
much as a name. The share of passages that hold a term is therefore the base's own, mixed with the
share in a large bilingual collection that ships with the program (Bayesian smoothing, the
collection counting as `PRIOR_PASSAGES` passages).
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

PRIOR_PASSAGES = 300.0
# A Han bigram that stands neither in the base nor in the collection is mostly no word at all but
# the seam between two; a Latin word that stands nowhere is a rare name and keeps its weight.
_SEAM = 0.3
_COUNTS = Path(__file__).parent / "bundled" / "term_counts.txt.xz"


@lru_cache(maxsize=1)
def background_shares() -> dict[str, float]:
    """Share of the collection's passages that hold a term; "" is the share given to unknown terms."""
    with lzma.open(_COUNTS, "rt", encoding="utf-8") as lines:
        total = int(next(lines))
        shares = {}
        smallest = total
        for line in lines:
            term, count = line.rsplit(" ", 1)
            shares[term] = int(count) / total
            smallest = min(smallest, int(count))
    shares[""] = smallest / total / 2
    return shares


def term_weights(
    terms: Sequence[str], counts: Mapping[str, int], total: int
) -> dict[str, float]:
    """Weight of each term, positive. `counts`: passages of the base that hold it, of `total`."""
    shares = background_shares()
    unknown = shares[""]
    weights = {}
    for term in terms:
        prior = shares.get(term, unknown)
        share = (counts.get(term, 0) + PRIOR_PASSAGES * prior) / (total + PRIOR_PASSAGES)
        weights[term] = math.log(1.0 + (1.0 - share) / (share + 1e-4))
        if not counts.get(term) and term not in shares and not term.isascii():
            weights[term] *= _SEAM
    return weights
