"""The word of a question that says most, what it is about, and another one put in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rag.terms import HAN, passage_terms

_WORD = re.compile(rf"[A-Za-z0-9][\w'-]*|[{HAN}](?=([{HAN}]))")


def heaviest_word(question: str, weights: Mapping[str, float]) -> tuple[int, int]:
    """[start, end) of the word, or pair of Han characters, that weighs most; (0, 0) where none does."""
    best, place = 0.0, (0, 0)
    for match in _WORD.finditer(question):
        start, end = match.start(), match.end() + (match[1] is not None)
        weight = sum(weights.get(term, 0.0) for term in passage_terms(question[start:end]))
        if weight > best:
            best, place = weight, (start, end)
    return place


def about_another(question: str, place: tuple[int, int], word: str, text: str) -> str | None:
    """The question with `word` where its heaviest one stands, so that `text` answers it no more.

    None where it has no heaviest word, or the text holds that word too.
    """
    start, end = place
    if not end or not word or word.lower() in text.lower():
        return None
    return question[:start] + word + question[end:]
