"""Questions with passages, as the extractor learns from them: token ids, answer spans, hard negatives.

Reading comprehension (the answer is a span of the passage), retrieval pairs (the whole passage
answers), questions made from plain text and translations (`made_questions`); of a part of these
also the question in other words, and one about another subject, which its passage does not answer.
And questions as people ask (`asked_questions`), which sentences of a passage answer, or nothing does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from tokenizers import Tokenizer

from rag.bundled.asked_questions import asked_questions
from rag.bundled.heaviest_word import about_another, heaviest_word
from rag.bundled.made_questions import made_across_languages, made_by_patterns, made_from_chinese
from rag.bundled.training_data import held_out, is_measured, read_rows
from rag.embedder import BUNDLED
from rag.extractor import LONGEST_QUESTION
from rag.quality.rewording import reword
from rag.term_weights import background
from rag.terms import question_terms

Ids = npt.NDArray[np.int32]
LONGEST_PASSAGE = 240  # tokens; a longer one is cut to a window that holds the answer
NEGATIVES = 12
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """One question. `spans` are [first, last] tokens of its passage; none where all of it answers.

    Where not `answered`, the passage is only what looks most like an answer.
    """

    question: Ids
    passage: int
    spans: tuple[tuple[int, int], ...]
    source: str
    answered: bool = True


@dataclass(slots=True)
class Reading:
    """Questions with the passages they are asked of, and for each the passages most like it."""

    passages: list[Ids]
    questions: list[Asked]
    negatives: Ids  # (questions, NEGATIVES)


def whole_tokenizer() -> Tokenizer:
    """The bundled embedder's tokenizer, cutting nothing off."""
    tokenizer = Tokenizer.from_file(str(next(BUNDLED.rglob("tokenizer.json"))))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class _Builder:
    def __init__(self) -> None:
        self.tokenizer = whole_tokenizer()
        self.passages: list[Ids] = []
        self.offsets: list[list[tuple[int, int]]] = []
        self.places: dict[str, int] = {}
        self.questions: list[Asked] = []

    def passage(self, text: str) -> int:
        if text not in self.places:
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            self.places[text] = len(self.passages)
            self.passages.append(np.array(encoded.ids, dtype=np.int32))
            self.offsets.append(encoded.offsets)
        return self.places[text]

    def ask(self, item: _Question) -> None:
        ids = self.tokenizer.encode(item.question, add_special_tokens=False).ids[:LONGEST_QUESTION]
        at = self.passage(item.text)
        spans: list[tuple[int, int]] = []
        if item.answer is not None:
            begin = item.text.find(item.answer)
            while begin >= 0 and len(spans) < 8:
                spans += self._tokens(at, begin, begin + len(item.answer))
                begin = item.text.find(item.answer, begin + 1)
            if not spans:
                return
        for start, end in item.sentences:  # wherever in them
            for first, last in self._tokens(at, start, end):
                spans += [(token, token) for token in range(first, last + 1)]
        if ids and len(self.passages[at]):
            self.questions.append(Asked(np.array(ids, dtype=np.int32), at, tuple(spans), item.source, item.answered))

    def _tokens(self, at: int, begin: int, end: int) -> list[tuple[int, int]]:
        inside = [n for n, (a, b) in enumerate(self.offsets[at]) if a < end and b > begin]
        return [(inside[0], inside[-1])] if inside else []

    def reading(self) -> Reading:
        """What was asked, all passages standing against each other."""
        negatives = most_alike(self.questions, self.passages, self.tokenizer.get_vocab_size())
        return Reading(self.passages, self.questions, negatives)


def read_training(data: Path, *, made: int, seed: int) -> Reading:
    """All training questions, none of them held out or measured. `made`: Chinese ones made from text."""
    rng = random.Random(seed)
    asked = list(_questions(data, made, rng))
    builder = _Builder()
    for item in (*asked, *_reworded(asked, rng), *_of_another_subject(asked, rng)):
        builder.ask(item)
    vocabulary = builder.tokenizer.get_vocab_size()
    negatives = np.zeros((len(builder.questions), NEGATIVES), dtype=np.int32)
    sources = [item.source for item in builder.questions]
    for group in _ALIKE:
        rows = [at for at, source in enumerate(sources) if source in group]
        negatives[rows] = most_alike([builder.questions[at] for at in rows], builder.passages, vocabulary)
    return Reading(builder.passages, builder.questions, negatives)


# Sources whose passages stand against each other.
_ALIKE = (
    {"squad1.1-train"}, {"medquad"}, {"made"}, {"drcd-dev-s2t", "cmrc2018-trial"}, {"lecoqa-train"}, {"patterns"},
    {"translated"}, {"asked"},
)
_REWORDED, _SWAPPED = 0.2, 0.08  # shares of the questions that come again in these forms


@dataclass(frozen=True, slots=True)
class _Question:
    question: str
    text: str
    answer: str | None  # none: all of the text, or one of the `sentences`
    source: str
    sentences: tuple[tuple[int, int], ...] = ()  # [start, end)
    answered: bool = True


def _questions(data: Path, made: int, rng: random.Random) -> Iterator[_Question]:
    for language in ("en", "zh"):
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
            if held_out(row["context"], language) or is_measured(row["question"]):
                continue
            answer = str(row["answer"])
            if answer in row["context"]:
                yield _Question(row["question"], row["context"], answer, row["src"])
        for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
            whole = row["src"] in ("medquad", "lecoqa-train")
            if whole and not held_out(row["positive"], language) and not is_measured(row["query"]):
                yield _Question(row["query"], row["positive"], None, row["src"])
    for source, triples in (
        ("made", made_from_chinese(data, made, rng)), ("patterns", made_by_patterns(data, rng)),
        ("translated", made_across_languages(data, rng)),
    ):
        for question, text, answer in triples:
            yield _Question(question, text, answer, source)
    yield from _as_asked(data, held_out=False)


def _as_asked(data: Path, *, held_out: bool) -> Iterator[_Question]:
    for item in asked_questions(data):
        if item.held_out == held_out:
            yield _Question(item.question, item.text, None, "asked", item.sentences, answered=bool(item.sentences))


def _reworded(asked: Sequence[_Question], rng: random.Random) -> Iterator[_Question]:
    """Some questions with a part of their words replaced by near ones that their passage does not use."""
    for item in asked:
        if item.source not in ("translated", "asked") and rng.random() < _REWORDED:
            yield replace(item, question=reword(item.question, item.text, rng.choice((0.2, 0.35, 0.5)), rng))


def _of_another_subject(asked: Sequence[_Question], rng: random.Random) -> Iterator[_Question]:
    """Some questions with their rarest word replaced by another one's: their passage answers them no more."""
    known = background()
    some = [item for item in asked if item.answer and item.source != "translated" and rng.random() < 2 * _SWAPPED]
    places = []
    for item in some:
        terms = question_terms(item.question)
        weights = {term: -math.log(known.shares.get(term, 1e-7)) for term in terms}
        places.append(heaviest_word(item.question, weights))
    for at in range(0, len(some) - 1, 2):
        word = some[at + 1].question[slice(*places[at + 1])]
        if question := about_another(some[at].question, places[at], word, some[at].text):
            yield replace(some[at], question=question, answered=False)


def read_heldout(data: Path, language: str) -> Reading:
    """Held-out questions with spans, of one language, to see how training goes."""
    builder = _Builder()
    for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
        answer = str(row["answer"])
        if held_out(row["context"], language) and not is_measured(row["question"]) and answer in row["context"]:
            builder.ask(_Question(row["question"], row["context"], answer, row["src"]))
    return builder.reading()


def read_heldout_asked(data: Path) -> Reading:
    """The held-out ones of the questions that people asked, those without an answer among them."""
    builder = _Builder()
    for item in _as_asked(data, held_out=True):
        builder.ask(item)
    return builder.reading()


def most_alike(questions: Sequence[Asked], passages: Sequence[Ids], vocabulary: int) -> Ids:
    """For each question the NEGATIVES passages, its own left out, with most of its tokens by idf.

    Searched among the passages that any of the questions is asked of.
    """
    used = sorted({item.passage for item in questions})
    place = {passage: at for at, passage in enumerate(used)}
    passages = [passages[at] for at in used]
    held = _matrix([np.unique(ids) for ids in passages], vocabulary)
    frequency = np.asarray(held.sum(axis=0)).ravel()
    idf = np.log(1 + len(passages) / (1 + frequency)).astype(np.float32)
    lengths = np.array([20 + len(ids) ** 0.5 for ids in passages], dtype=np.float32)
    asked = _matrix([np.unique(item.question) for item in questions], vocabulary) @ sparse.diags(idf)
    found = np.zeros((len(questions), NEGATIVES), dtype=np.int32)
    transposed = held.T.tocsr()
    for begin in range(0, len(questions), _BLOCK):
        scores = (asked[begin : begin + _BLOCK] @ transposed).toarray() / lengths
        own = [place[item.passage] for item in questions[begin : begin + _BLOCK]]
        scores[np.arange(len(own)), own] = -1.0
        found[begin : begin + len(own)] = np.argpartition(-scores, NEGATIVES, axis=1)[:, :NEGATIVES]
    return np.array(used, dtype=np.int32)[found]


def _matrix(rows: Sequence[Ids], width: int) -> sparse.csr_matrix:
    flat = np.concatenate(rows)
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return sparse.csr_matrix((np.ones(len(flat), dtype=np.float32), flat, ends), shape=(len(rows), width))
