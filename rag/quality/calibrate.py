"""Fit the refusal threshold on questions from the user's own documents.

Answerable are questions that were made of the documents (or brought by the user) and whose passage
is found. Unanswerable are the same questions with that passage hidden from retrieval, which is how
a gap in the documents looks, and questions about names that stand nowhere. Nothing is generated:
only the support of the passages found is looked at.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rag.answer import Hit
from rag.document import Chunk
from rag.embedder import load_embedder
from rag.errors import InputError
from rag.evidence import built_in_threshold
from rag.knowledge import KnowledgeBase, StoredChunk
from rag.pipeline import Rag
from rag.quality.evaluation import EvalQuestion, holds, placed
from rag.quality.questions import make_questions
from rag.quality.rewording import reword
from rag.refusal_threshold import RefusalFit, risk_curve, support_model
from rag.settings import Settings

LEAST = 20  # questions of each sort below which a fit would be chance
QUESTIONS = 300
_REWORDED = (0.2, 0.7)  # share of a made question's words that give way, drawn for each
_RESAMPLES = 200
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and where its answer stands: [start, end) of a file's text; no path, no answer."""

    question: str
    path: str | None = None
    start: int = 0
    end: int = 0
    answer: str = ""


class _HidingBase(KnowledgeBase):
    """A knowledge base as it would be without some sentence: chunks that overlap it are not there."""

    hidden: Asked | None = None

    def stored_chunks(self, rows: Sequence[int]) -> dict[int, StoredChunk]:
        found = super().stored_chunks(rows)
        hidden = self.hidden
        if hidden is None:
            return found
        return {row: stored for row, stored in found.items() if not _overlaps(stored.chunk, hidden)}


def _overlaps(chunk: Chunk, asked: Asked) -> bool:
    return chunk.path == asked.path and chunk.start < asked.end and asked.start < chunk.end


@dataclass(frozen=True, slots=True)
class Supports:
    """The supports that were measured. `lost`: answerable, but their passage was not found;
    `still_there`: what answers was found in spite of hiding its passage."""

    answerable: tuple[float, ...]
    hidden: tuple[float, ...]
    elsewhere: tuple[float, ...]
    lost: int
    still_there: int

    @property
    def unanswerable(self) -> tuple[float, ...]:
        return self.hidden + self.elsewhere


def made_questions(base: KnowledgeBase, *, count: int = QUESTIONS, seed: int = 0) -> list[Asked]:
    """Questions made of the documents, a quarter of them without an answer, in other words.

    A made question repeats its sentence word for word and is supported as hardly any question of a
    person is: a threshold fitted on such questions refuses most of what people ask.
    """
    rng = random.Random(seed)
    asked = []
    for made in make_questions(base, count=count, unanswerable=0.25, seed=seed):
        question = reword(made.question, made.quote, rng.uniform(*_REWORDED), rng)
        asked.append(
            Asked(question) if made.unanswerable
            else Asked(question, made.path, made.start, made.end, made.answer)
        )
    return asked


def own_questions(
    base: KnowledgeBase, questions: Sequence[EvalQuestion], *, tell: Callable[[str], object] = lambda line: None
) -> list[Asked]:
    """The user's questions with the place of their quote, answer or page. Those that name no place are
    left out, as their passage can't be hidden, and `tell` gets a line for each; InputError where that
    leaves none."""
    readable = {path for path, record in base.files().items() if record.status == "ok"}
    asked: list[Asked] = []
    for question in placed(questions, readable)[0]:
        try:
            asked.append(_located(base, question, readable))
        except _NoPlace as error:
            tell(f"question {question.id} is left out: {error}")
    if not any(each.path for each in asked):
        raise InputError(
            f"none of the {len(questions)} questions says where its answer stands. A line needs a path, and a "
            "quote, an answer that stands there word for word, or a page."
        )
    return asked


class _NoPlace(Exception):
    """Why it isn't known where a question's answer stands."""


def _located(base: KnowledgeBase, question: EvalQuestion, readable: Set[str]) -> Asked:
    if question.unanswerable:
        return Asked(question.question)
    if question.path is None:
        raise _NoPlace("it has no path")
    if question.path not in readable:
        raise _NoPlace(f"{question.path} is not in the knowledge base")
    document = base.document(question.path)
    page = next((page for page in document.pages if page.number == question.page), None)
    begin, end = (0, len(document.text)) if page is None else (page.start, page.end)
    answer = question.answers[0] if question.answers else ""
    for part in (question.quote, *question.answers):
        found = _pattern(part).search(document.text, begin, end) if part and part.strip() else None
        if found is not None:
            return Asked(question.question, question.path, *found.span(), answer)
    if page is not None:
        return Asked(question.question, question.path, begin, end, answer)
    where = question.path if question.page is None else f"{question.path}, which has no page {question.page}"
    raise _NoPlace(f"neither its quote nor an answer stands in {where}")


def _pattern(words: str) -> re.Pattern[str]:
    """Finds the words with any blanks and line breaks between them; beside Chinese ones there may be none."""
    pattern = last = ""
    for word in words.split():
        blank = r"\s+"
        for character in word:
            if _is_wide(character) or (last and _is_wide(last)):
                blank = r"\s*"
            pattern += (blank if last else "") + re.escape(character)
            last, blank = character, ""
    return re.compile(pattern)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def check_store(settings: Settings) -> None:
    """Raise InputError where the settings name a store that keeps no threshold of its own."""
    if settings.store != "embedded":
        raise InputError(
            f"calibrate measures a knowledge base in a folder, and store is {settings.store!r}: a base there is always "
            "asked with the built-in threshold. For a base in a folder leave out store and milvus_uri, and "
            "name it: --kb DIR."
        )


def measure(
    settings: Settings, questions: Sequence[Asked], *, progress: Callable[[], object] | None = None
) -> Supports:
    """Ask every question, and those with an answer once more with their passage hidden."""
    base = _HidingBase.open(settings.kb)
    assert isinstance(base, _HidingBase), "open makes the class it is called on"
    rag = Rag(base, load_embedder(settings.embedder, device=settings.device), settings)
    answerable, hidden, elsewhere = [], [], []
    lost = still_there = 0
    for asked in questions:
        base.hidden = None
        support, hits = _support(rag, asked.question)
        if asked.path is None:
            elsewhere.append(support)
        elif any(_overlaps(hit.chunk, asked) for hit in hits):
            answerable.append(support)
        else:
            lost += 1
        if asked.path is not None:
            base.hidden = asked
            support, hits = _support(rag, asked.question)
            if any(_answers(hit, asked) for hit in hits):
                still_there += 1
            else:
                hidden.append(support)
        if progress is not None:
            progress()
    return Supports(tuple(answerable), tuple(hidden), tuple(elsewhere), lost, still_there)


def _support(rag: Rag, question: str) -> tuple[float, Sequence[Hit]]:
    retrieval = rag.retriever.search_batch([question], rag.settings.top_k)[0]
    return rag.support(question, retrieval), retrieval.hits


def _answers(hit: Hit, asked: Asked) -> bool:
    """Whether a passage answers although the right one is hidden: a copy, or a widened neighbour.

    A short answer ("32") stands in many passages that don't answer.
    """
    return _overlaps(hit.chunk, asked) or (len(asked.answer) >= 8 and holds(hit.chunk.text, asked.answer))


def fit(settings: Settings, supports: Supports) -> RefusalFit:
    """The threshold with the best balanced accuracy. Raises InputError for too few questions."""
    answerable, unanswerable = np.array(supports.answerable), np.array(supports.unanswerable)
    if min(len(answerable), len(unanswerable)) < LEAST:
        raise InputError(
            f"there are {len(answerable)} questions whose passage is found and {len(unanswerable)} without an "
            f"answer; a fit needs {LEAST} of each. Ingest more documents, or bring questions with --questions."
        )
    built_in = built_in_threshold()
    threshold = _best_threshold(answerable, unanswerable)
    return RefusalFit(
        threshold=round(threshold, 4), built_in=round(built_in, 4),
        balanced_accuracy=round(_cross_validated(answerable, unanswerable), 4),
        built_in_balanced_accuracy=round(balanced_accuracy(answerable, unanswerable, built_in), 4),
        answerable=len(answerable), unanswerable=len(unanswerable), support_model=support_model(),
        embedder=load_embedder(settings.embedder, device=settings.device).fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        curve=risk_curve(supports.answerable, supports.unanswerable),
    )


def balanced_accuracy(
    answerable: npt.NDArray[np.float64], unanswerable: npt.NDArray[np.float64], threshold: float
) -> float:
    """Mean of the share of answerable ones kept and of unanswerable ones refused."""
    return float(((answerable >= threshold).mean() + (unanswerable < threshold).mean()) / 2)


def _best_threshold(answerable: npt.NDArray[np.float64], unanswerable: npt.NDArray[np.float64]) -> float:
    """The best threshold, smoothed: the mean, in log odds, of the best ones of resampled questions.

    A single best one jumps from gap to gap between a few supports.
    """
    rng = np.random.default_rng(0)
    found = [
        _logit(_sharpest(rng.choice(answerable, len(answerable)), rng.choice(unanswerable, len(unanswerable))))
        for _ in range(_RESAMPLES)
    ]
    return 1 / (1 + math.exp(-float(np.mean(found))))


def _sharpest(answerable: npt.NDArray[np.float64], unanswerable: npt.NDArray[np.float64]) -> float:
    """The middle of the gap where balanced accuracy is highest."""
    values = np.unique(np.concatenate([answerable, unanswerable]))
    kept = 1 - np.searchsorted(np.sort(answerable), values) / len(answerable)
    refused = np.searchsorted(np.sort(unanswerable), values) / len(unanswerable)
    best = int(np.argmax(kept + refused))
    return float((values[max(0, best - 1)] + values[best]) / 2)


def _logit(probability: float) -> float:
    clipped = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(clipped / (1 - clipped))


def _cross_validated(answerable: npt.NDArray[np.float64], unanswerable: npt.NDArray[np.float64]) -> float:
    """Balanced accuracy on questions that the threshold was not fitted on."""
    rng = np.random.default_rng(0)
    parts = [np.array_split(rng.permutation(values), _FOLDS) for values in (answerable, unanswerable)]
    scores = []
    for fold in range(_FOLDS):
        rest = [np.concatenate([part for at, part in enumerate(each) if at != fold]) for each in parts]
        scores.append(balanced_accuracy(parts[0][fold], parts[1][fold], _best_threshold(*rest)))
    return float(np.mean(scores))


def calibrate(
    settings: Settings, questions: Sequence[Asked], *, progress: Callable[[], object] | None = None
) -> tuple[RefusalFit, Supports, Path]:
    """Measure, fit, and keep the threshold with the knowledge base."""
    check_store(settings)
    supports = measure(settings, questions, progress=progress)
    found = fit(settings, supports)
    return found, supports, found.write(settings.kb)
