"""The steps of retrieval, each of which can be left out to see what it is worth.

`Settings(retrieval_without="close, join")` leaves two out; `python -m benchmarks.ablation` measures
every one.
"""

from __future__ import annotations

from rag.errors import SettingsError

STEPS = {
    "dense": "candidates by the embedder's vectors; without it, by terms alone",
    "terms": "candidates by BM25; without it, by vectors alone",
    "fitted": "weights fitted on questions; without it, BM25 and cosine each by its best, two to one",
    "close": "the best candidates compared with the question sentence by sentence",
    "distinct": "passages that say the same as a better one left out",
    "join": "passages of one page or place made one",
    "language": "passages in the question's language preferred to their like in the other",
}


def kept_steps(without: str) -> frozenset[str]:
    """The steps that are left when those in a comma-separated list are not taken.

    Raises SettingsError for a name that is no step, or where nothing is left to search with.
    """
    left_out = {name.strip() for name in without.split(",") if name.strip()}
    if unknown := sorted(left_out - set(STEPS)):
        raise SettingsError(f"retrieval has no step {', '.join(unknown)}. Its steps are {', '.join(STEPS)}.")
    if {"dense", "terms"} <= left_out:
        raise SettingsError("retrieval without dense and without terms has nothing to search with. Keep one of them.")
    return frozenset(STEPS) - left_out
