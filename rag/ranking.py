"""Question and candidate passages -> one score each, a weighted sum of how well they match.

Two stages: all candidates by their terms and vectors as a whole, then the CLOSE best of them
sentence by sentence, in other words too.

The weights are fitted on questions (`python -m rag.bundled.fit_ranking`), one
set for each language of questions, because rank fusion without weights loses to BM25 alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rag.language import Language, detect_language
from rag.sentences import sentence_spans
from rag.soft_match import SoftMatch

FEATURES = (
    "bm25",  # BM25 over words and place, as a share of the most that the question could get
    "dense",  # cosine of question and passage
    "coverage",  # share of the question's term weight that the passage holds
    "window",  # the same within its best stretch of WINDOW terms
    "pairs",  # share of neighbouring question terms that are neighbours in the passage
    "place",  # share of the question's term weight in title, headings and file name
    "bm25_of_best",  # bm25 divided by the best of the candidates
    "dense_of_best",  # dense between the least (0) and the best (1) of the candidates, because the
    # cosines of different embedders have different ranges
)
# Which of them either search brings.
FEATURES_OF = {
    step: [at for at, name in enumerate(FEATURES) if name.startswith("dense") is (step == "dense")]
    for step in ("dense", "terms")
}
WINDOW = 30
CLOSE_FEATURES = (
    "score",  # what the first stage gave
    "soft",  # share of the question that the passage's best sentence says in the same or other words
    "dense_sentence",  # cosine of the question and the nearest sentence
)
# Candidates that the second stage looks at sentence by sentence: more of them where they are short,
# as its time goes with their length.
CLOSE, LEAST_CLOSE = 30, 10
_CLOSE_BYTES = 16_000
_K1, _B = 1.2, 0.6
# Where a folder says the same in both languages, one wants to read it in one's own. Not fitted:
# about half of what parts the first hit from the second.
SAME_LANGUAGE = 0.6
_FITTED = Path(__file__).parent / "bundled" / "ranking.json"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage that dense or term search brought up."""

    row: int
    body_terms: Sequence[str]
    place_terms: Sequence[str]
    dense: float


@dataclass(frozen=True, slots=True)
class _Fitted:
    first: npt.NDArray[np.float64]  # (FEATURES,)
    close: npt.NDArray[np.float64]  # (CLOSE_FEATURES,)


@lru_cache(maxsize=1)
def _fitted() -> dict[str, _Fitted]:
    """Language of the question -> its fitted weights."""
    values = json.loads(_FITTED.read_text(encoding="utf-8"))
    return {
        language: _Fitted(
            np.array([values["weights"][language][name] for name in FEATURES]),
            np.array([values["close_weights"][language][name] for name in CLOSE_FEATURES]),
        )
        for language in values["weights"]
    }


def match_features(
    terms: Sequence[str], weights: Mapping[str, float], candidates: Sequence[Candidate],
    *, average_terms: float,
) -> npt.NDArray[np.float64]:
    """float64 (candidates, FEATURES). `terms` are the question's, in order; `weights` theirs."""
    rows = np.zeros((len(candidates), len(FEATURES)))
    total = sum(weights[term] for term in terms) or 1.0
    pairs = list(zip(terms, terms[1:], strict=False))
    pair_total = sum(weights[a] + weights[b] for a, b in pairs) or 1.0
    wanted = set(terms)
    for row, candidate in zip(rows, candidates, strict=True):
        places = [(at, term) for at, term in enumerate(candidate.body_terms) if term in wanted]
        in_place = wanted.intersection(candidate.place_terms)
        counts = Counter(term for _, term in places)
        length = len(candidate.body_terms) + len(candidate.place_terms)
        norm = _K1 * (1 - _B + _B * length / max(1.0, average_terms))
        bm25 = 0.0
        for term in wanted:
            frequency = counts[term] + (1 if term in in_place else 0)
            if frequency:
                bm25 += weights[term] * frequency * (_K1 + 1) / (frequency + norm)
        row[0] = bm25 / (total * (_K1 + 1))
        row[1] = candidate.dense
        row[2] = sum(weights[term] for term in wanted if counts[term] or term in in_place) / total
        row[3] = _best_window(places, weights) / total
        row[4] = sum(weights[a] + weights[b] for a, b in pairs if _adjacent(places, a, b)) / pair_total
        row[5] = sum(weights[term] for term in in_place) / total
    if len(candidates):
        rows[:, 6] = rows[:, 0] / max(rows[:, 0].max(), 1e-6)
        least, best = rows[:, 1].min(), rows[:, 1].max()
        rows[:, 7] = (rows[:, 1] - least) / max(best - least, 1e-6)
    return rows


def _best_window(places: Sequence[tuple[int, str]], weights: Mapping[str, float]) -> float:
    """Largest weight of distinct question terms within WINDOW neighbouring terms."""
    best = held = 0.0
    inside: Counter[str] = Counter()
    begin = 0
    for at, term in places:
        while places[begin][0] <= at - WINDOW:
            gone = places[begin][1]
            inside[gone] -= 1
            if not inside[gone]:
                held -= weights[gone]
            begin += 1
        if not inside[term]:
            held += weights[term]
        inside[term] += 1
        best = max(best, held)
    return best


def _adjacent(places: Sequence[tuple[int, str]], first: str, second: str) -> bool:
    """Whether `second` follows `first` within three terms (stop words stay in passages)."""
    for index, (at, term) in enumerate(places):
        if term == first:
            for later, other in places[index + 1 : index + 4]:
                if later - at > 3:
                    break
                if other == second:
                    return True
    return False


def rank(features: npt.NDArray[np.float64], language: Language) -> npt.NDArray[np.float64]:
    """First-stage scores (candidates,), higher is better, for a question in `language`."""
    return features @ _fitted()[language].first


def count_close(texts: Sequence[str]) -> int:
    """How many of the passages, best first, the second stage looks at."""
    total = 0
    for number, text in enumerate(texts[:CLOSE]):
        total += len(text.encode())
        if total > _CLOSE_BYTES and number >= LEAST_CLOSE:
            return number
    return min(CLOSE, len(texts))


def close_features(
    question: str, scores: npt.NDArray[np.float64], texts: Sequence[str]
) -> npt.NDArray[np.float64]:
    """float64 (passages, CLOSE_FEATURES) of passages with their first-stage scores."""
    sentences: list[str] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        spans = sentence_spans(text)
        sentences += [text[start:end] for start, end in spans]
        owners += [number] * len(spans)
    rows = np.zeros((len(texts), len(CLOSE_FEATURES)))
    rows[:, 0] = scores
    match = SoftMatch(question, sentences)
    np.maximum.at(rows[:, 1], owners, match.coverages())
    np.maximum.at(rows[:, 2], owners, match.dense)
    return rows


def rank_closely(
    question: str, scores: npt.NDArray[np.float64], texts: Sequence[str], language: Language,
    *, prefer_language: bool = True,
) -> npt.NDArray[np.float64]:
    """Second-stage scores (passages,) for the passages that the first stage put in front."""
    same = np.array([detect_language(text) == language for text in texts])
    preference = SAME_LANGUAGE * same if prefer_language else 0.0
    return close_features(question, scores, texts) @ _fitted()[language].close + preference
