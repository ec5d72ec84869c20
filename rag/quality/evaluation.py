"""Measure a knowledge base on questions with known answers.

A line has `question` and any of `id`, `answer` or `answers`, `path`, `page`, `quote`,
`unanswerable`, `type`. Answers are compared as in SQuAD (Rajpurkar et al., 2016): lower case, no
punctuation, no articles; Chinese character by character, as in CMRC 2018 (Cui et al., 2019). A number
is one word, with or without commas between its thousands, and so are letters like those of "U.S.".
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rag.answer import Answer, Citation, Hit
from rag.citations import strip_markers
from rag.errors import InputError
from rag.evidence import asked_for
from rag.language import detect_language
from rag.quality.significance import Shares, interval, resampled
from rag.terms import HAN

RANKED = 10  # hits looked at for the reciprocal rank
_ARTICLES = frozenset(("a", "an", "the"))
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_INITIALS = re.compile(r"(?<![^\W_])[A-Za-z](?:\.[A-Za-z])+(?![^\W_])")
_DECIMAL = r"(?<!\d[.,])\d+[.,]\d+(?![.,]?\d)"  # but no date as 3.5.2021, no list as 1,2,3
_TOKEN = re.compile(rf"[{HAN}]|{_DECIMAL}|[^\W_{HAN}]+")


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
    type: str | None = None

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
        for name in ("path", "quote", "type"):
            if row.get(name) is not None and not isinstance(row[name], str):
                raise InputError(f"line {number}: {name} must be a string, not {row[name]!r}.")
        page = row.get("page")
        if page is not None and (not isinstance(page, int) or isinstance(page, bool)):
            raise InputError(f"line {number}: page must be a whole number, not {page!r}.")
        unanswerable = row.get("unanswerable")
        if unanswerable is not None and not isinstance(unanswerable, bool):
            raise InputError(
                f"line {number}: unanswerable must be true or false, without quotes, not {unanswerable!r}."
            )
        return cls(
            id=str(row.get("id", number)), question=question, answers=tuple(answers),
            path=row.get("path"), page=page, quote=row.get("quote"),
            unanswerable=bool(unanswerable), type=row.get("type"),
        )


def placed(questions: Sequence[EvalQuestion], paths: Iterable[str]) -> tuple[list[EvalQuestion], list[str]]:
    """The questions with their paths as the base writes them, and the paths that it doesn't hold.

    Some systems write é as one character, some as two; both mean one file.
    """
    given = list(paths)
    known = {unicodedata.normalize("NFC", path): path for path in given} | {path: path for path in given}
    found: list[EvalQuestion] = []
    missing: dict[str, None] = {}
    for question in questions:
        path = None if question.path is None else known.get(
            question.path, known.get(unicodedata.normalize("NFC", question.path))
        )
        if path is None and question.path is not None and not question.unanswerable:
            missing[question.path] = None
        found.append(question if path is None else replace(question, path=path))
    return found, list(missing)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What one question brought. `rank` is 0-based, None where no hit was right."""

    question: EvalQuestion
    answer: Answer
    rank: int | None
    seconds: float


def comparable_tokens(text: str) -> list[str]:
    """Words, numbers, and Han characters one by one; lower case, without punctuation.

    Articles are left out, unless nothing else is there: "A" may be one of several choices.
    """
    tokens = [token.lower() for token in _tokens(text)]
    return [token for token in tokens if token not in _ARTICLES] or tokens


def _tokens(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text)
    plain = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), plain)
    return _TOKEN.findall(_INITIALS.sub(lambda found: found.group().replace(".", ""), plain))


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1.0 where the text is one of the answers, as tokens."""
    tokens = comparable_tokens(text)
    return float(any(tokens == comparable_tokens(answer) for answer in answers))


def token_f1(text: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall over the tokens of any answer."""
    best = 0.0
    for answer in answers:
        wanted = Counter(comparable_tokens(answer))
        said = Counter(_tokens(text.lower()) if _ARTICLES.issuperset(wanted) else comparable_tokens(text))
        common = sum((said & wanted).values())
        if common:
            precision, recall = common / said.total(), common / wanted.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def holds(text: str, part: str) -> bool:
    """Whether the tokens of `part` stand in `text` one after the other."""
    wanted, said = comparable_tokens(part), comparable_tokens(text)
    if not wanted:
        return False
    if _ARTICLES.issuperset(wanted) and wanted != said:
        wanted, said = _tokens(part), _tokens(text)  # as they are written: "A" is a choice, "a" hardly is
    return f" {' '.join(wanted)} " in f" {' '.join(said)} "


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


# (what a question brings to a figure, what it could have brought); a whole of 0: it doesn't count
Share = tuple[float, float]
_NOTHING: Share = (0.0, 0.0)


def is_right(result: EvalResult) -> bool | None:
    """Whether the answer is the wanted one; None where the line says too little to tell."""
    question, answer = result.question, result.answer
    if question.unanswerable:
        return answer.refused
    if question.answers or question.quote:
        text = strip_markers(answer.text)
        return any(holds(text, part) for part in (*question.answers, question.quote or ""))
    if question.path is not None:
        return any(_citation_is_right(citation, question) for citation in answer.citations)
    return None


def measures(result: EvalResult) -> dict[str, Share]:
    """What one question brings to each of MEASURES."""
    question, answer, rank = result.question, result.answer, result.rank
    located = question.path is not None and not question.unanswerable
    answered = bool(question.answers) and not question.unanswerable
    shown = not question.unanswerable and bool(question.answers or question.quote)
    judged = question.unanswerable or question.path is not None or bool(question.answers)
    text = strip_markers(answer.text)
    right = [_citation_is_right(citation, question) for citation in answer.citations] if judged else []
    return {
        "hit@1": _share(located, rank == 0),
        "hit@5": _share(located, rank is not None and rank < 5),
        "mrr": _share(located, 0.0 if rank is None else 1 / (rank + 1)),
        "em": _share(answered, answered and exact_match(text, question.answers)),
        "f1": _share(answered, answered and token_f1(text, question.answers)),
        "answer_in_text": _share(shown, shown and bool(is_right(result))),
        "citation_precision": (float(sum(right)), float(len(right))),
        "refusal_accuracy": _share(True, answer.refused == question.unanswerable),
        "answerable_kept": _share(not question.unanswerable, not answer.refused),
        "unanswerable_refused": _share(question.unanswerable, answer.refused),
        "quoted": _share(True, answer.kind == "quoted"),
    }


def _share(counts: bool, value: float) -> Share:
    return (float(value), 1.0) if counts else _NOTHING


MEASURES = (
    "hit@1", "hit@5", "mrr", "em", "f1", "answer_in_text", "citation_precision", "refusal_accuracy",
    "answerable_kept", "unanswerable_refused", "quoted",
)  # fmt: skip
BALANCED = "balanced_refusal_accuracy"
FIGURES = (*MEASURES, BALANCED)


def shares_of(rows: Sequence[Mapping[str, Share]]) -> Shares:
    """The measures of some questions as arrays (questions, MEASURES)."""
    values = np.array([[row[name] for name in MEASURES] for row in rows], dtype=np.float64)
    values = values.reshape(len(rows), len(MEASURES), 2)
    return Shares(values[:, :, 0], values[:, :, 1])


def with_balanced(figures: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(..., MEASURES) -> (..., FIGURES).

    Refusal accuracy is high for whoever never refuses where nearly all questions have an answer.
    The balanced one is the mean of both kinds' shares, 0.5 for a coin and for who never refuses.
    """
    kept, refused = (figures[..., MEASURES.index(name)] for name in ("answerable_kept", "unanswerable_refused"))
    return np.concatenate([figures, ((kept + refused) / 2)[..., None]], axis=-1)


def summarise(results: Sequence[EvalResult]) -> dict[str, Any]:
    """The figures over all questions, each over those it can be measured on; None over none."""
    figures = figures_of([measures(result) for result in results])
    stats = [result.answer.stats for result in results]
    seconds = sum(result.seconds for result in results)
    return {
        "n": len(results),
        **figures,
        "prompt_tokens": sum(each.prompt_tokens for each in stats),
        "reused_tokens": sum(each.reused_tokens for each in stats),
        "new_tokens": sum(each.new_tokens for each in stats),
        "seconds": round(seconds, 3),
        "seconds_per_question": round(seconds / len(results), 4) if results else None,
    }


def figures_of(rows: Sequence[Mapping[str, Share]]) -> dict[str, float | None]:
    """FIGURES by name; None where no question counts."""
    return _named(with_balanced(shares_of(rows).totals()))


def intervals_of(rows: Sequence[Mapping[str, Share]]) -> dict[str, tuple[float, float] | None]:
    """The 95% bootstrap interval of each of FIGURES."""
    low, high = interval(with_balanced(resampled(shares_of(rows))))
    lows, highs = _named(low), _named(high)
    found: dict[str, tuple[float, float] | None] = {}
    for name in FIGURES:
        ends = lows[name], highs[name]
        found[name] = None if ends[0] is None or ends[1] is None else (ends[0], ends[1])
    return found


def _named(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    return {
        name: None if np.isnan(value) else round(float(value), 4)
        for name, value in zip(FIGURES, values, strict=True)
    }


def by_language(results: Sequence[EvalResult]) -> dict[str, dict[str, Any]]:
    """`summarise` for the questions of each language."""
    return {
        language: summarise(chosen)
        for language in ("zh", "en")
        if (chosen := [r for r in results if detect_language(r.question.question) == language])
    }


def type_of(question: EvalQuestion) -> str:
    """The line's own `type`; else its language with what is asked for, or that nothing answers it."""
    if question.type is not None:
        return question.type
    language = detect_language(question.question)
    if question.unanswerable:
        return f"{language} unanswerable"
    asked = asked_for(question.question)
    # "How many years" asks for both; the more particular kind names it.
    kind = next((kind for kind in ("time", "number", "reason", "name") if kind in asked), "other")
    return f"{language} {kind}"


def by_type(results: Sequence[EvalResult]) -> dict[str, dict[str, Any]]:
    """`summarise` for the questions of each type, in order of name."""
    groups: dict[str, list[EvalResult]] = {}
    for result in results:
        groups.setdefault(type_of(result.question), []).append(result)
    return {name: summarise(groups[name]) for name in sorted(groups)}


def risk_coverage(results: Sequence[EvalResult]) -> list[tuple[float, float, float]]:
    """(confidence, coverage, risk) for each confidence at which answers are still given.

    Coverage: share of all judged questions that are answered from that confidence on; risk: share
    of those answers that are not right (an answer to an unanswerable question never is).
    """
    judged = [(result, right) for result in results if (right := is_right(result)) is not None]
    given = sorted(
        ((result.answer.confidence, right) for result, right in judged if not result.answer.refused),
        key=lambda pair: -pair[0],
    )
    curve: list[tuple[float, float, float]] = []
    wrong = 0
    for count, (confidence, right) in enumerate(given, 1):
        wrong += not right
        if count == len(given) or given[count][0] < confidence:  # equal ones come together
            curve.append((round(confidence, 4), round(count / len(judged), 4), round(wrong / count, 4)))
    return curve


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
