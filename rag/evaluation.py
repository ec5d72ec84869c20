"""Measure a knowledge base on questions with known answers.

A line has `question` and any of `id`, `answer` or `answers`, `path`, `page`, `quote`, `unanswerable`.
Answers are compared as in SQuAD (Rajpurkar et al., 2016): lower case, no punctuation, no articles;
Chinese character by character, as in CMRC 2018 (Cui et al., 2019).
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag.answer import Answer, Citation, Hit
from rag.citations import strip_markers
from rag.errors import InputError
from rag.language import detect_language
from rag.terms import HAN

RANKED = 10  # hits looked at for the reciprocal rank
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    """One line of the question file."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    path: str | None = None
    page: int | None = None
    quote: str | None = None
    unanswerable: bool = False

    @classmethod
    def parse(cls, row: Mapping[str, Any], number: int) -> EvalQuestion:
        """Raises InputError that names the line where a value is of the wrong kind."""
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"line {number} has no question.")
        answers = row.get("answers", row.get("answer", ()))
        if isinstance(answers, str):
            answers = [answers]
        if not isinstance(answers, (list, tuple)) or not all(isinstance(a, str) for a in answers):
            raise InputError(f"line {number}: answer must be a string, answers a list of strings.")
        page = row.get("page")
        if page is not None and (not isinstance(page, int) or isinstance(page, bool)):
            raise InputError(f"line {number}: page must be a whole number, not {page!r}.")
        return cls(
            id=str(row.get("id", number)), question=question, answers=tuple(answers),
            path=row.get("path"), page=page, quote=row.get("quote"),
            unanswerable=bool(row.get("unanswerable", False)),
        )


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What one question brought. `rank` is 0-based, None where no hit was right."""

    question: EvalQuestion
    answer: Answer
    rank: int | None
    seconds: float


def comparable_tokens(text: str) -> list[str]:
    """Words, and Han characters one by one; lower case, without punctuation and articles."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return _TOKEN.findall(_ARTICLES.sub(" ", plain))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 where the text is one of the answers, as tokens."""
    tokens = comparable_tokens(text)
    return float(any(tokens == comparable_tokens(answer) for answer in answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall over the tokens of any answer."""
    best = 0.0
    said = Counter(comparable_tokens(text))
    for answer in answers:
        wanted = Counter(comparable_tokens(answer))
        common = sum((said & wanted).values())
        if common:
            precision, recall = common / said.total(), common / wanted.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def holds(text: str, part: str) -> bool:
    """Whether the tokens of `part` stand in `text` one after the other."""
    wanted = comparable_tokens(part)
    if not wanted:
        return False
    return f" {' '.join(wanted)} " in f" {' '.join(comparable_tokens(text))} "


def hit_is_right(hit: Hit, question: EvalQuestion) -> bool:
    """Whether a hit is of the gold file and, where one is given, page."""
    if hit.chunk.path != question.path:
        return False
    if question.page is None:
        return True
    return question.page in (hit.page, hit.chunk.page)


def _citation_is_right(citation: Citation, question: EvalQuestion) -> bool:
    if question.path is not None:
        if citation.path != question.path:
            return False
        return question.page is None or citation.page is None or citation.page == question.page
    return any(holds(citation.quote, answer) for answer in question.answers)


def summarise(results: Sequence[EvalResult]) -> dict[str, Any]:
    """The figures over all questions, each over those it can be measured on; None over none."""
    located = [r for r in results if r.question.path is not None and not r.question.unanswerable]
    answered = [r for r in results if r.question.answers and not r.question.unanswerable]
    shown = [r for r in results if not r.question.unanswerable and (r.question.answers or r.question.quote)]
    refusable = [r for r in results if r.question.unanswerable]
    answerable = [r for r in results if not r.question.unanswerable]
    cited = [
        _citation_is_right(citation, r.question)
        for r in results for citation in r.answer.citations
        if r.question.unanswerable or r.question.path is not None or r.question.answers
    ]
    texts = {id(r): strip_markers(r.answer.text) for r in results}
    kept = _mean([not r.answer.refused for r in answerable])
    refused = _mean([r.answer.refused for r in refusable])
    tokens = [r.answer.stats for r in results]
    return {
        "n": len(results),
        "hit@1": _mean([r.rank == 0 for r in located]),
        "hit@5": _mean([r.rank is not None and r.rank < 5 for r in located]),
        "mrr": _mean([0.0 if r.rank is None else 1 / (r.rank + 1) for r in located]),
        "em": _mean([exact_match(texts[id(r)], r.question.answers) for r in answered]),
        "f1": _mean([token_f1(texts[id(r)], r.question.answers) for r in answered]),
        "answer_in_text": _mean([
            any(holds(texts[id(r)], part) for part in (*r.question.answers, r.question.quote or ""))
            for r in shown
        ]),
        "citation_precision": _mean(cited),
        "refusal_accuracy": _mean([r.answer.refused == r.question.unanswerable for r in results]),
        "answerable_kept": kept,
        "unanswerable_refused": refused,
        "quoted": _mean([r.answer.kind == "quoted" for r in results]),
        "prompt_tokens": sum(stats.prompt_tokens for stats in tokens),
        "reused_tokens": sum(stats.reused_tokens for stats in tokens),
        "new_tokens": sum(stats.new_tokens for stats in tokens),
        "seconds": round(sum(r.seconds for r in results), 3),
        "seconds_per_question": _mean([r.seconds for r in results]),
    }


def by_language(results: Sequence[EvalResult]) -> dict[str, dict[str, Any]]:
    """`summarise` for the questions of each language."""
    return {
        language: summarise(chosen)
        for language in ("zh", "en")
        if (chosen := [r for r in results if detect_language(r.question.question) == language])
    }


def _mean(values: Sequence[float | bool]) -> float | None:
    return round(sum(map(float, values)) / len(values), 4) if values else None


def evaluate(rag: Any, questions: Sequence[EvalQuestion], progress: Any = None) -> list[EvalResult]:
    """Ask every question. Retrieval is judged over RANKED hits, the answer has settings' top_k."""
    results: list[EvalResult] = []
    for question in questions:
        began = time.perf_counter()
        ranked = rag.retrieve(question.question, RANKED) if question.path is not None else []
        looked = time.perf_counter() - began
        answer = rag.ask(question.question)
        seconds = time.perf_counter() - began - looked
        rank = next((at for at, hit in enumerate(ranked) if hit_is_right(hit, question)), None)
        results.append(EvalResult(question, answer, rank, seconds))
        if progress is not None:
            progress(len(results), len(questions))
    return results
