"""Questions with answers -> what the model reads and what it should write, as token ids.

The prompts are those of `rag.pipeline`: same retriever, same passages, same words. A question
whose passages don't hold its place teaches nothing but to invent, so it is not trained on; measured
on are all, as in use.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rag.answer import Hit
from rag.citations import strip_markers
from rag.errors import PromptError
from rag.language import REFUSAL, detect_language
from rag.pipeline import Rag
from rag.prompt import Prompt
from rag.quality.evaluation import EvalQuestion, comparable_tokens, hit_is_right, holds

Part = Literal["train", "stop", "measure"]
_SHARED = 0.5  # of an answer's tokens: from there on a passage is taken for the one it comes from
_NO_PLACE = "the place of their answer is not among the passages found"
_TOO_LONG = "prompt and answer are longer than the model's context"
_NO_ANSWER = "no answer in their line"


@dataclass(frozen=True, slots=True)
class Example:
    """`prompt_ids` are read, `answer_ids` written: the answer's tokens and the end of the turn."""

    question: EvalQuestion
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """What came of the questions of one part, and why of others nothing came (reason -> how many)."""

    examples: tuple[Example, ...]
    left_out: dict[str, int]
    longer_than_written: int  # answers of more tokens than max_new_tokens: their ends are never written


def part_of(question: str) -> Part:
    """Seven in ten questions to train on, one to stop by, two to measure.

    By a hash of the question's words: a question stays where it is when the file grows, and one that
    stands twice is never in two parts.
    """
    words = " ".join(comparable_tokens(question)) or question
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big") % 10
    return "stop" if place == 0 else "measure" if place <= 2 else "train"


def wanted_text(question: EvalQuestion, hits: Sequence[Hit]) -> str | None:
    """The answer with the number of its passage, or the refusal; None where no hit holds its place."""
    if question.unanswerable:
        return REFUSAL[detect_language(question.question)]
    answer = strip_markers(question.answers[0]).strip()
    number, is_placed = _passage_number(question, answer, hits)
    if is_placed and number is None:
        return None
    return answer if number is None else f"{answer} [{number}]"


def _passage_number(
    question: EvalQuestion, answer: str, hits: Sequence[Hit]
) -> tuple[int | None, bool]:
    """The 1-based number of the passage that answers, and whether the line says where that stands."""
    quote, path = question.quote, question.path
    there = [(number, hit) for number, hit in enumerate(hits, 1) if path in (None, hit.chunk.path)]
    if quote is not None:
        for number, hit in there:
            if holds(hit.chunk.text, quote):
                return number, True
        if path is None or question.page is None:
            return None, True
    if path is not None and question.page is not None:
        return next((number for number, hit in there if hit_is_right(hit, question)), None), True
    # Only the file is known, or nothing: the passage with most of the answer's words in it.
    wanted = Counter(comparable_tokens(answer))
    shared, best = max(
        (((wanted & Counter(comparable_tokens(hit.chunk.text))).total(), -number) for number, hit in there),
        default=(0, 0),
    )
    is_placed = path is not None and not there
    return (-best if shared >= _SHARED * max(1, wanted.total()) else None), is_placed


def make_examples(
    rag: Rag, questions: Sequence[EvalQuestion], progress: Callable[[], None]
) -> Examples:
    """An example of each question that can teach, with the passages that the pipeline finds now."""
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    longer = 0
    for question in questions:
        made = _make_example(rag, question)
        if isinstance(made, str):
            left_out[made] += 1
        else:
            examples.append(made)
            longer += len(made.answer_ids) > rag.settings.max_new_tokens
        progress()
    return Examples(tuple(examples), dict(left_out), longer)


def _make_example(rag: Rag, question: EvalQuestion) -> Example | str:
    if not question.answers and not question.unanswerable:
        return _NO_ANSWER
    try:
        prompt: Prompt = rag.prompt(question.question)
    except PromptError as error:
        raise PromptError(f"question {question.id}: {error}") from error
    text = wanted_text(question, prompt.hits)
    if text is None:
        return _NO_PLACE
    prompt_ids = rag.generator.encode(prompt)
    answer_ids = rag.generator.encode_answer(text)
    if len(prompt_ids) + len(answer_ids) > rag.generator.context_length:
        return _TOO_LONG
    return Example(question, prompt_ids, answer_ids)
