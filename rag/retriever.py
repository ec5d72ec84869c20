"""Question -> list[Hit]: dense and term search bring candidates up, one fitted score ranks them."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rag.answer import Hit
from rag.document import Document
from rag.embedder import Embedder
from rag.errors import InputError
from rag.filter import EVERYTHING, Filter
from rag.knowledge import StoredChunk
from rag.language import Language, detect_language
from rag.numpy_threads import keep_numpy_to_one_thread
from rag.question_file import half_character
from rag.ranking import (
    FEATURES,
    FEATURES_OF,
    Candidate,
    count_close,
    match_features,
    rank,
    rank_closely,
)
from rag.retrieval_steps import kept_steps
from rag.sentences import best_sentence_start
from rag.soft_match import bundled_table
from rag.store import Store
from rag.term_weights import background, term_weights
from rag.terms import HAN, question_terms

CANDIDATES = 48  # from each of dense and term search, and compared in full
_MAX_QUESTION_TERMS = 64  # the heaviest ones of a question as long as a page
_DUPLICATE = 0.92  # Jaccard similarity of term sets from which two passages say the same
_DOCUMENTS_KEPT = 16
_HAN = re.compile(rf"[{HAN}]")
_DENIAL = re.compile(r"[不没无未勿禁]|^(?:not|no|never|cannot|without|t)$")
_NUMERAL = re.compile(
    r"[一二三四五六七八九十百千万两]|^(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelv|twenti|thirti|fifti|hundr)$"
)
_LONGEST_JOINED = 2_400  # characters
_WIDEST_GAP = 700  # characters between two passages of one place, in a file without pages


@dataclass(frozen=True, slots=True)
class WeighedQuestion:
    """A question as it is searched: its terms in order, and what each weighs in this base."""

    text: str
    language: Language
    terms: tuple[str, ...]
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What came of one search.

    `best_match` holds the best of each match feature among the hits, `pool_match` the median among
    all candidates.
    """

    weighed: WeighedQuestion
    hits: tuple[Hit, ...]
    best_match: np.ndarray  # float64 (FEATURES,)
    pool_match: np.ndarray  # float64 (FEATURES,)


@dataclass(slots=True)
class _CollectionFacts:
    generation: int
    chunks: int
    average_terms: float


class Retriever:
    """Searches one knowledge base with the embedder it was built with."""

    def __init__(self, base: Store, embedder: Embedder, *, without: str = "") -> None:
        """`without` names steps of `rag.retrieval_steps` to leave out, separated by commas."""
        self.steps = kept_steps(without)
        keep_numpy_to_one_thread()
        base.check_embedder(embedder)
        background()  # read now, so that the first question is as quick as the rest
        bundled_table()
        self.base = base
        self.embedder = embedder
        self._facts: _CollectionFacts | None = None
        self._documents: dict[tuple[int, str], Document] = {}  # (generation, path), read last

    def retrieve(self, question: str, k: int, *, where: Filter = EVERYTHING) -> list[Hit]:
        """Up to k passages, best first. Raises InputError for an empty question, or where no file is in `where`."""
        return self.retrieve_batch([question], k, where=where)[0]

    def retrieve_batch(self, questions: Sequence[str], k: int, *, where: Filter = EVERYTHING) -> list[list[Hit]]:
        """`retrieve` for each question, embedded and searched together."""
        return [list(found.hits) for found in self.search_batch(questions, k, where=where)]

    def search_batch(self, questions: Sequence[str], k: int, *, where: Filter = EVERYTHING) -> list[Retrieval]:
        """Up to k hits for each question of the files in `where`, with what speaks for them."""
        if k < 1:
            raise InputError(f"the number of passages must be at least 1, not {k}.")
        for number, question in enumerate(questions, 1):
            if not question.strip():
                raise InputError(f"question {number} of {len(questions)} is empty.")
            if half := half_character(question):
                raise InputError(f"question {number} of {len(questions)} holds {half}.")
        if not questions:
            return []
        vectors = self.embedder.embed_questions(questions)
        with self.base.snapshot():
            self.check_filter(where)
            found = self.base.search_dense(vectors, max(CANDIDATES, 3 * k), where=where)
            return [
                self._retrieve_one(question, vector, dense, k, where)
                for question, vector, dense in zip(questions, vectors, found, strict=True)
            ]

    def check_filter(self, where: Filter) -> None:
        """Raise InputError where no file of the base is in `where`."""
        if not where.is_everything and not self.base.matching(where):
            raise where.nothing_matches(self.base.files())

    def weigh(self, question: str) -> WeighedQuestion:
        """The question's terms with their weights in this base."""
        terms = question_terms(question)
        facts = self._collection_facts()
        counts = self.base.term_counts(terms)
        weights = term_weights(terms, counts, facts.chunks)
        if len(terms) > _MAX_QUESTION_TERMS:
            heaviest = set(sorted(terms, key=lambda term: -weights[term])[:_MAX_QUESTION_TERMS])
            terms = [term for term in terms if term in heaviest]
        return WeighedQuestion(
            text=question, language=detect_language(question), terms=tuple(terms),
            weights={term: weights[term] for term in terms},
        )

    def _collection_facts(self) -> _CollectionFacts:
        generation = self.base.generation
        if self._facts is None or self._facts.generation != generation:
            self._facts = _CollectionFacts(
                generation, self.base.count_chunks(), self.base.average_terms()
            )
        return self._facts

    def _retrieve_one(
        self, question: str, vector: np.ndarray, dense: list[tuple[int, float]], k: int, where: Filter
    ) -> Retrieval:
        weighed = self.weigh(question)
        stored, features = self._candidates(weighed, vector, dense, max(CANDIDATES, 3 * k), where)
        if not stored:
            return Retrieval(weighed, (), np.zeros(len(FEATURES)), np.zeros(len(FEATURES)))
        order, scores = self._ranked(weighed, stored, features, k)
        hits: list[Hit] = []
        kept: list[StoredChunk] = []
        kept_rows: list[int] = []
        for at in order:
            if len(hits) == k:
                break
            candidate = stored[at]
            if "distinct" in self.steps and any(_says_the_same(candidate, other) for other in kept):
                continue
            hit = self._with_page(Hit(
                chunk=candidate.chunk, score=scores[at],
                dense_score=float(features[at, 1]), bm25_score=float(features[at, 0]),
            ), weighed)
            kept.append(candidate)
            kept_rows.append(at)
            joins = "join" in self.steps
            neighbour = next((n for n, other in enumerate(hits) if joins and _can_join(other, hit)), None)
            if neighbour is None:
                hits.append(hit)
            else:
                hits[neighbour] = self._joined(hits[neighbour], hit)
        return Retrieval(
            weighed=weighed, hits=tuple(hits),
            best_match=features[kept_rows].max(axis=0), pool_match=np.median(features, axis=0),
        )

    def _ranked(
        self, weighed: WeighedQuestion, stored: list[StoredChunk], features: np.ndarray, k: int
    ) -> tuple[list[int], dict[int, float]]:
        """The candidates' places, best first, and the score of each."""
        if "fitted" in self.steps:
            first = rank(features, weighed.language)
        else:
            first = 2 * features[:, 0] / max(features[:, 0].max(), 1e-6) + features[:, 1]
        by_first = sorted(range(len(stored)), key=lambda at: (-first[at], stored[at].row))
        if "close" not in self.steps:
            return by_first, dict(enumerate(first.tolist()))
        count = max(k + 4, count_close([stored[at].chunk.text for at in by_first]))
        front, rest = by_first[:count], by_first[count:]
        close = rank_closely(
            weighed.text, first[front], [stored[at].chunk.text for at in front], weighed.language,
            prefer_language="language" in self.steps,
        )
        scores = dict(zip(front, close.tolist(), strict=True))
        order = sorted(front, key=lambda at: (-scores[at], stored[at].row)) + rest
        # Where so many are joined that places are left: the others, behind all that was compared closely.
        lowest = scores[order[len(front) - 1]]
        return order, scores | {at: lowest + float(first[at] - first[front[-1]]) for at in rest}

    def _candidates(
        self, weighed: WeighedQuestion, vector: np.ndarray, dense: list[tuple[int, float]], count: int,
        where: Filter = EVERYTHING,
    ) -> tuple[list[StoredChunk], np.ndarray]:
        """Chunks that either search brought up, with their match features (n, FEATURES)."""
        cosines = dict(dense) if "dense" in self.steps else {}
        by_terms: dict[int, float] = {}
        if "terms" in self.steps:
            by_terms = dict(self.base.search_terms(weighed.terms, count, where=where))
        missing = [row for row in by_terms if row not in cosines]
        for row, stored_vector in self.base.vectors_of(missing).items():
            cosines[row] = float(stored_vector @ vector)
        chosen = _most_promising(cosines, by_terms, count)
        stored = list(self.base.stored_chunks(chosen).values())
        features = match_features(
            weighed.terms, weighed.weights,
            [Candidate(item.row, item.body_terms, item.place_terms, cosines[item.row]) for item in stored],
            average_terms=self._collection_facts().average_terms,
        )
        for step, columns in FEATURES_OF.items():
            if step not in self.steps:
                features[:, columns] = 0.0
        return stored, features

    def _document(self, path: str) -> Document:
        """A file's text and pages, kept for the next hit: taking a long file apart takes milliseconds."""
        key = (self._collection_facts().generation, path)
        found = self._documents.get(key)
        if found is None:
            found = self.base.document(path)
            while len(self._documents) >= _DOCUMENTS_KEPT:
                self._documents.pop(next(iter(self._documents), key), None)
            self._documents[key] = found
        return found

    def _joined(self, first: Hit, second: Hit) -> Hit:
        """Two neighbouring passages as one, with the text between them."""
        low, high = sorted((first.chunk, second.chunk), key=lambda chunk: chunk.start)
        end = max(low.end, high.end)  # one may stand inside what was joined before
        text = self._document(low.path).text[low.start : end]
        shared = 0
        for a, b in zip(low.headings, high.headings, strict=False):
            if a != b:
                break
            shared += 1
        chunk = replace(
            low, text=text, end=end, headings=low.headings[:shared],
            last_page=high.last_page if high.end == end else low.last_page,
        )
        return replace(first, chunk=chunk)

    def _with_page(self, hit: Hit, weighed: WeighedQuestion) -> Hit:
        chunk = hit.chunk
        if chunk.page is None or chunk.page == chunk.last_page:
            return replace(hit, page=chunk.page)
        start = chunk.start + best_sentence_start(chunk.text, weighed.weights)
        return replace(hit, page=self._document(chunk.path).page_at(start))


def _most_promising(
    cosines: dict[int, float], by_terms: dict[int, float], count: int
) -> list[int]:
    """The rows worth a full comparison: best by a plain sum of both scores, each by its own best."""
    best_cosine = max(cosines.values(), default=1.0) or 1.0
    best_bm25 = max(by_terms.values(), default=1.0) or 1.0
    return heapq.nlargest(
        count, cosines,
        key=lambda row: (cosines[row] / best_cosine + 2 * by_terms.get(row, 0.0) / best_bm25, -row),
    )


def _says_the_same(first: StoredChunk, second: StoredChunk) -> bool:
    """Near duplicates: equal text, or one says all that the other says, in order, and hardly more.

    Where each has something that the other lacks, a word was replaced ("am" by "pm", 甲方 by 乙方), and
    whoever asks must see both.
    """
    if first.chunk.text == second.chunk.text:
        return True
    a, b = set(first.body_terms), set(second.body_terms)
    if len(a) < 8 or len(a & b) < _DUPLICATE * len(a | b):
        return False
    shorter, longer = sorted((_words(first.body_terms), _words(second.body_terms)), key=len)
    added = _added(shorter, longer)
    # Another figure or a denial makes another statement of the same words.
    return added is not None and not any(
        any(character.isdigit() for character in word) or _DENIAL.search(word) or _NUMERAL.search(word)
        for word in added
    )


def _words(terms: Sequence[str]) -> list[str]:
    """Words, and Han characters one by one: one more of these changes two of the pairs that are searched."""
    words: list[str] = []
    last = ""
    for term in terms:
        if not _HAN.match(term):
            words.append(term)
        elif len(last) == len(term) == 2 and last[1] == term[0]:
            words.append(term[1])  # the pair begins where the last one ended
        else:
            words.extend(term)
        last = term
    return words


def _added(shorter: Sequence[str], longer: Sequence[str]) -> list[str] | None:
    """The words that `longer` has between those of `shorter`; None where it lacks one of them."""
    added: list[str] = []
    at = 0
    for word in longer:
        if at < len(shorter) and word == shorter[at]:
            at += 1
        else:
            added.append(word)
    return added if at == len(shorter) else None


def _can_join(first: Hit, second: Hit) -> bool:
    """Whether two hits are of one place: the same page, or near each other where there are no pages.

    What is found is worth more when it comes from different places, and a passage reads better with
    what stands between its parts; so both become one, as long as that stays readable.
    """
    low, high = sorted((first.chunk, second.chunk), key=lambda chunk: chunk.start)
    if low.path != high.path or first.page != second.page:
        return False
    near = first.page is not None or high.start - low.end <= _WIDEST_GAP
    return near and max(low.end, high.end) - low.start <= _LONGEST_JOINED
