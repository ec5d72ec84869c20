"""Text -> sentences with offsets, in Chinese and English."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rag.terms import HAN, passage_terms

# A full stop ends a sentence where blank space and no lower-case letter follows, so that "3.5",
# "e.g. this" and "v2.1" stay whole. Chinese marks end one, and line breaks that are not mere wrapping.
_END = re.compile(
    r"[。！？；](?:[”’」』）)\"']*)|[!?](?:[\"')\]]*)(?=\s|$)|(?<![A-Z])(?<!\b[Nn]o)(?<!\b(?:Mr|Dr|St|vs|cf))"
    r"(?<!\bMrs)(?<!\b[Ff]ig)\.(?:[\"')\]]*)(?=\s+[A-Z0-9\"'“‘(\[]|\s*$)|\n+"
)

_WIDE = rf"[{HAN}，。、；：？！“”‘’（）《》]"
_BREAK_IN_CHINESE = re.compile(rf"(?<={_WIDE})[ \t]*\n\s*(?={_WIDE})")


def one_line(text: str) -> str:
    """The text with every run of blanks as one; line breaks within Chinese are no blank at all."""
    return " ".join(_BREAK_IN_CHINESE.sub("", text).split())


_LONGEST_JOINED = 120  # characters, up to which clauses parted by a Chinese semicolon stay together
# Columns between which text is wrapped to a width; a Han character takes two.
_NARROWEST, _WIDEST = 40, 130
_WIDE_CHARACTER = re.compile(r"[\u1100-\u115f\u2e80-\uffe6]")
_LINE_OF_ITS_OWN = re.compile(
    r"\s*(?:[-*+•·|>#=~`]|\(?\d{1,3}[.)、]|[（(][一二三四五六七八九十\d]+[)）]|第[一二三四五六七八九十百千零\d]+[编章节条])"
)
_LINE_ENDS = re.compile(r"[。！？；：.!?:;|][\"'”’」』)）\]]{0,4}\s*$")
_FIRST_WORD = re.compile(r"\s*([\u2e80-\uffe6]|[^\s\u2e80-\uffe6]+)")


def sentence_spans(text: str, *, unwrap: bool = True) -> list[tuple[int, int]]:
    """[start, end) of each sentence, without surrounding blanks. Every letter is in one of them.

    Lines that were wrapped to a width are one (without `unwrap` each line ends a sentence), and so are
    short clauses around a Chinese semicolon.
    """
    wrapped = _wrapping_breaks(text) if unwrap and "\n" in text else frozenset()
    spans: list[tuple[int, int]] = []
    begin = 0
    for match in [*_END.finditer(text), None]:
        if match and match.start() in wrapped:
            continue
        end = match.end() if match else len(text)
        piece = text[begin:end]
        stripped = piece.strip()
        if stripped:
            start = begin + len(piece) - len(piece.lstrip())
            spans.append((start, start + len(stripped)))
        begin = end
    if "；" not in text:
        return spans
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        last = joined[-1] if joined else None
        if last and text[last[1] - 1] == "；" and "\n" not in text[last[1] : start] and end - last[0] <= _LONGEST_JOINED:
            joined[-1] = (last[0], end)
        else:
            joined.append((start, end))
    return joined


def _wrapping_breaks(text: str) -> frozenset[int]:
    """Offsets of the line breaks that only keep lines short.

    A program that fills lines breaks one where the next word would not fit: so a break is kept for
    wrapping if the line and the next one's first word are wider together than the paragraph's widest
    line, that width is one that texts are wrapped to, and neither line looks like one of its own (a
    list item, a heading, a table's row, a sentence's end).
    """
    found: list[int] = []
    paragraph: list[str] = []
    at = begin = 0
    for line in [*text.split("\n"), ""]:
        if line and not line.isspace():
            if not paragraph:
                begin = at
            paragraph.append(line)
        elif paragraph:
            if len(paragraph) > 1 and max(map(len, paragraph)) <= _WIDEST:
                found += _breaks_of(paragraph, begin)
            paragraph = []
        at += len(line) + 1
    return frozenset(found)


def _breaks_of(lines: list[str], at: int) -> Iterator[int]:
    """The wrapping breaks of a paragraph that begins at offset `at`."""
    widths = [len(line) + len(_WIDE_CHARACTER.findall(line)) for line in lines]
    widest = max(widths)
    if not _NARROWEST <= widest <= _WIDEST:
        return
    for line, width, following in zip(lines, widths, lines[1:], strict=False):
        at += len(line) + 1
        if _LINE_ENDS.search(line) or _LINE_OF_ITS_OWN.match(following):
            continue
        word = _FIRST_WORD.match(following)
        if word is None or line[0] in "|#" or line[0].isdigit() and following[0].isdigit():
            continue
        wide = word[1] >= "\u2e80"
        # A mark that may not begin a line leaves one or two characters' room behind it.
        if wide and width + 4 >= widest or not wide and " " in line and width + 1 + len(word[1]) > widest:
            yield at - 1


def best_sentence_start(text: str, weights: Mapping[str, float]) -> int:
    """Offset of the sentence that holds most of the question's term weight; 0 where none does."""
    best, best_start = 0.0, 0
    for start, end in sentence_spans(text):
        held = sum(weights.get(term, 0.0) for term in set(passage_terms(text[start:end])))
        if held > best:
            best, best_start = held, start
    return best_start
