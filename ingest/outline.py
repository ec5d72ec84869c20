"""Headings of texts that mark them only by their wording: statutes, numbered chapters.

    第一编 总则 / 第一分编 / 第一章 / 第一节 / 第一条        Part I, Chapter 3, Section 2, Article 5
    一、 （一） 1. 1.1                                       (where there is nothing better)

A table of contents has the same lines with nothing between them. Of such a run only its tail can be
real headings, and only as far as each one is deeper than the one before it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from rag.document import Heading

_NUMBER = r"[ \u3000]?[零〇一二三四五六七八九十百千万两\d０-９]{1,9}[ \u3000]?"
_CHINESE = re.compile(
    rf"[ \t\u3000]*(?P<number>第{_NUMBER}(?P<kind>分编|编|部分|章|节|条)(?:之{_NUMBER})?)"
    r"(?P<gap>[ \t\u3000\u2002\u2003]*)(?P<rest>[^\n]*)"
)
_UNNUMBERED = re.compile(r"[ \t\u3000]*(?P<title>附[ \t\u3000\u2002]*则|序[ \t\u3000\u2002]*言)[ \t]*$")
_CHINESE_LEVEL = {"编": 1, "部分": 1, "分编": 2, "章": 3, "节": 4, "条": 5}
_ENGLISH = re.compile(
    r"[ \t]*(?P<kind>PART|BOOK|CHAPTER|SECTION|ARTICLE|Part|Book|Chapter|Section|Article)"
    r"[ \t]+(?P<number>[IVXLC]+|\d+)(?P<rest>[.:—– \t][^\n]*)?$"
)
_ENGLISH_LEVEL = {"part": 1, "book": 1, "chapter": 3, "section": 4, "article": 5}
_MAX_TITLE = 60  # characters of a chapter's title; a longer line is a sentence
_PUNCTUATION = re.compile(r"[。；，;,]|\.{4,}|…")  # dots lead to a page number in a contents list
_SPACES = re.compile(r"[ \u3000]")
_ARTICLE_LEVEL = 5
_MIN_HEADINGS = 3  # fewer lines that look like headings are taken for chance


@dataclass(frozen=True, slots=True)
class _Candidate:
    level: int
    title: str
    start: int
    end: int  # of the heading itself: an article's text goes on behind it


def find_numbered_headings(text: str) -> list[Heading]:
    """The headings of a text that counts its parts, chapters, sections or articles."""
    candidates = list(_candidates(text))
    if len(candidates) < _MIN_HEADINGS:
        return []
    kept: list[Heading] = []
    run: list[_Candidate] = []
    for index, candidate in enumerate(candidates):
        run.append(candidate)
        is_last = index + 1 == len(candidates)
        following = len(text) if is_last else candidates[index + 1].start
        if text[candidate.end : following].strip() or is_last:
            kept += [Heading(c.level, c.title, c.start) for c in _descending_tail(run)]
            run = []
    levels = sorted({heading.level for heading in kept})
    return [
        Heading(levels.index(heading.level) + 1, heading.title, heading.start) for heading in kept
    ]


_CHINESE_DIGITS = "零一二三四五六七八九"
_COUNTED = (
    re.compile(r"[ \t\u3000]*(?P<number>[一二三四五六七八九十]{1,3})、[ \t]*(?P<title>[^\n]+)"),
    re.compile(r"[ \t\u3000]*[（(](?P<number>[一二三四五六七八九十]{1,3})[）)][ \t]*(?P<title>[^\n]+)"),
    re.compile(r"[ \t\u3000]*(?P<number>[\d０-９]{1,2})(?:[.．、][ \t\u3000]*|[ \t\u3000]+)(?![\d０-９])(?P<title>[^\n]+)"),
    re.compile(r"[ \t\u3000]*(?P<number>\d{1,2}\.\d{1,2})[.．]?[ \t\u3000]+(?P<title>[^\n]+)"),
    re.compile(r"[ \t\u3000]*(?P<number>\d{1,2}\.\d{1,2}\.\d{1,2})[.．]?[ \t\u3000]+(?P<title>[^\n]+)"),
)
_SENTENCE = re.compile(r"[。；，;,!！?？:：]|\.$|\.{4,}|…|\|")
_MAX_COUNTED_TITLE = 50  # characters
_MIN_BODY = 60  # characters between two such headings on average; less is a list


def find_counted_headings(text: str) -> list[Heading]:
    """Headings that are only short lines with a running number: 一、 （一） 1. 1.1 1.1.1

    A line counts if its number follows the one before it (or starts again at one below another
    kind), and if there is text between the lines: otherwise they are a list.
    """
    found: list[tuple[int, int, str]] = []  # (start, kind, line)
    last: dict[int, str] = {}
    start = 0
    for line in text.split("\n"):
        for kind, pattern in enumerate(_COUNTED):
            match = pattern.fullmatch(line)
            if match is None:
                continue
            title = match["title"].strip()
            is_title = len(title) <= _MAX_COUNTED_TITLE and not _SENTENCE.search(title)
            if is_title and _follows(last.get(kind), match["number"]):
                last[kind] = match["number"]
                found.append((start, kind, " ".join(line.split())))
            break
        start += len(line) + 1
    kept: list[tuple[int, int, str]] = []
    for kind in range(len(_COUNTED)):
        lines = [entry for entry in found if entry[1] == kind]
        if len(lines) >= 2:
            kept += lines
    kept.sort()
    if len(kept) < 2 or (len(text) - kept[0][0]) / len(kept) < _MIN_BODY:
        return []
    levels = sorted({kind for _, kind, _ in kept})
    return [Heading(levels.index(kind) + 1, line, begin) for begin, kind, line in kept]


def _follows(before: str | None, number: str) -> bool:
    parts = [_read_number(part) for part in number.split(".")]
    if parts[-1] == 1:
        return True
    return before is not None and _read_number(before.split(".")[-1]) + 1 == parts[-1]


def _read_number(text: str) -> int:
    """"十二", "12" or "１２" as 12."""
    if text.isdigit():
        return int(text)
    tens, found, ones = text.rpartition("十")
    value = 0
    if found:
        value = 10 * (_CHINESE_DIGITS.find(tens) if tens else 1)
    return value + (_CHINESE_DIGITS.find(ones) if ones else 0)


def add_articles(headings: list[Heading], text: str) -> list[Heading]:
    """The headings a file itself names, with the articles (第…条) below them as the lowest level."""
    candidates = [c for c in _candidates(text) if c.level == _ARTICLE_LEVEL]
    if len(candidates) < _MIN_HEADINGS:
        return headings
    level = max((heading.level for heading in headings), default=0) + 1
    taken = [heading.start for heading in headings]
    articles = [
        Heading(level, candidate.title, candidate.start)
        for candidate in candidates
        if not any("\n" not in text[start : candidate.start] for start in _near(taken, candidate.start))
    ]
    return sorted([*headings, *articles], key=lambda heading: heading.start)


def _near(starts: list[int], offset: int) -> list[int]:
    """The last of the sorted starts that is not behind `offset`."""
    index = bisect_right(starts, offset) - 1
    return starts[index : index + 1] if index >= 0 else []


def _descending_tail(run: list[_Candidate]) -> list[_Candidate]:
    tail = [run[-1]]
    for candidate in reversed(run[:-1]):
        if candidate.level >= tail[0].level:
            break
        tail.insert(0, candidate)
    return tail


def _candidates(text: str) -> list[_Candidate]:
    found: list[_Candidate] = []
    start = 0
    for line in text.split("\n"):
        candidate = _read_line(line, start)
        if candidate is not None:
            found.append(candidate)
        start += len(line) + 1
    return found


def _read_line(line: str, start: int) -> _Candidate | None:
    if match := _CHINESE.match(line):
        level = _CHINESE_LEVEL[match["kind"]]
        begin = start + match.start("number")
        if level == _ARTICLE_LEVEL:
            if match["rest"] and not match["gap"]:
                return None  # "第三条规定的..." is a sentence about an article
            title = _SPACES.sub("", match["number"])
            return _Candidate(level, title, begin, start + match.end("number"))
        rest = match["rest"].strip()
        if len(rest) > _MAX_TITLE or _PUNCTUATION.search(rest):
            return None
        if not match["gap"] and rest and rest[0] in "的中和与规":
            return None
        number = _SPACES.sub("", match["number"])
        return _Candidate(level, f"{number} {_join_spaced(rest)}".strip(), begin, start + len(line))
    if match := _UNNUMBERED.match(line):
        title = "".join(match["title"].split())
        return _Candidate(1, title, start + match.start("title"), start + len(line))
    if match := _ENGLISH.match(line):
        rest = (match["rest"] or "").strip()
        if len(rest) > _MAX_TITLE or rest.endswith((",", ";")) or re.search(r"\.{4,}", rest):
            return None
        level = _ENGLISH_LEVEL[match["kind"].lower()]
        begin = start + match.start("kind")
        return _Candidate(level, " ".join(line.split()), begin, start + len(line))
    return None


def _join_spaced(title: str) -> str:
    """"总 则" is typeset with a space inside a two-character word; the word is "总则"."""
    words = title.split()
    is_spaced = len(words) > 1 and all(len(word) == 1 for word in words)
    return "".join(words) if is_spaced else " ".join(words)
