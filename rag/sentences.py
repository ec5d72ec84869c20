"""Text -> sentences with offsets, in Chinese and English."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rag.terms import HAN, passage_terms

# A full stop ends a sentence where blank space and no lower-case letter follows, so that "3.5",
# "e.g. this" and "v2.1" stay whole. Chinese marks and line breaks always end one.
_END = re.compile(
    r"[。！？；](?:[”’」』）)\"']*)|[!?](?:[\"')\]]*)(?=\s|$)|(?<![A-Z])(?<!\b[Nn]o)(?<!\b(?:Mr|Dr|St|vs|cf))"
    r"(?<!\bMrs)(?<!\b[Ff]ig)\.(?:[\"')\]]*)(?=\s+[A-Z0-9\"'“‘(\[]|\s*$)|\n+"
)

_WIDE = rf"[{HAN}，。、；：？！“”‘’（）《》]"
_BREAK_IN_CHINESE = re.compile(rf"(?<={_WIDE})[ \t]*\n\s*(?={_WIDE})")


def one_line(text: str) -> str:
    """The text with every run of blanks as one; line breaks within Chinese are no blank at all."""
    return " ".join(_BREAK_IN_CHINESE.sub("", text).split())


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence, without surrounding blanks. Every letter is in one of them."""
    spans = []
    begin = 0
    for match in [*_END.finditer(text), None]:
        end = match.end() if match else len(text)
        piece = text[begin:end]
        stripped = piece.strip()
        if stripped:
            start = begin + len(piece) - len(piece.lstrip())
            spans.append((start, start + len(stripped)))
        begin = end
    return spans


def best_sentence_start(text: str, weights: Mapping[str, float]) -> int:
    """Offset of the sentence that holds most of the question's term weight; 0 where none does."""
    best, best_start = 0.0, 0
    for start, end in sentence_spans(text):
        held = sum(weights.get(term, 0.0) for term in set(passage_terms(text[start:end])))
        if held > best:
            best, best_start = held, start
    return best_start
