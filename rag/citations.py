"""Answer text + hits -> citations that hold.

A model's `[n]` is a claim, not a fact. Every sentence of an answer is compared with the passages:
its words, weighed by how rare they are, must stand there, and all its numbers too. A marker out of
range is removed, one that points at the wrong passage is corrected, a missing one is set, and a
sentence that nothing supports is reported. Brackets that are no claim (`items[0]`, the interval
[0, 1], a source's own [2]) stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rag.answer import Citation, Hit
from rag.language import REFUSAL, detect_language
from rag.sentences import sentence_spans
from rag.simplified import simplify
from rag.term_weights import term_weights
from rag.terms import normalise, passage_terms, question_terms
from rag.values import plain

_BRACKET = re.compile(r"[ \t]*[\[【]\s*(\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)\s*[\]】]")
_MOST_MARKED = 999  # a bracket holds no higher number
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*%?")
_HAN_NUMERAL = re.compile(
    r"(?<![第几数十百千万])[一二两三四五六七八九十百千万零〇]+(?=个?月|年|日|天|周|个小时|小时|分钟|秒|元|万元|亿|倍|岁|米|公里|层|条|页|名|人|"
    r"次|项|位|块|款|章|级|台|件|步|种|头|(?:个(?![人别体性])))"
)
_WORDS = {word: str(value) for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
) if value > 1} | {"twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "ninety": "90", "hundred": "100"}
_WORD_TERMS = frozenset(term for word in _WORDS for term in passage_terms(word))
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")
# A name: written large inside an English sentence, or Latin in a Chinese one.
_NAME_EN = re.compile(r"(?<=[a-z0-9,;:'’] )[A-Z][\w'’-]*|\b[A-Za-z]*[a-z][A-Z]\w*|\b[A-Z]{2,}\w*")
_NAME_ZH = re.compile(r"[A-Za-z][A-Za-z0-9-]+|《([^》]+)》")
_BEFORE = 2  # sentences before a span in which its subject may be named
_NEGATION = re.compile(
    r"\b(?:not?|never|cannot|without|none)\b|n['’]t\b|不(?!同|断|仅|但|过|论|管|久|少|只)|没有|无法|并非|未(?!来)"
)
_CLAUSE = re.compile(r"[，,；;。]|(?<=[.!?])\s")
# Weighed share of a sentence's terms that one or two sentences of a passage must hold. Word forms
# differ between a question's words and a passage's, so it isn't 1.
SUPPORTED = 0.55
_CITED_BONUS = 0.08  # between near equals, the passage that the model named


@dataclass(frozen=True, slots=True)
class CheckedText:
    """The text with its markers set right, and what they stand for."""

    text: str
    citations: tuple[Citation, ...]
    unsupported: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Span:
    hit_number: int
    start: int  # in the hit's text
    end: int
    terms: frozenset[str]
    numbers: frozenset[str]
    text: str
    nearby: frozenset[str]  # terms of the sentences just before, where "it" may be named


@dataclass(frozen=True, slots=True)
class _Match:
    score: float
    span: _Span


# What Markdown would make a link or a picture of: [words](address), [1]: address, <address>, and
# bare addresses, which many pages link by themselves.
_LINK = re.compile(
    r"(?P<bracket>[\]】]\s?)(?=[(（]|:\s*\S)|(?P<angle><)(?=[a-z][a-z0-9+.-]{1,31}:|[^\s<>@]+@|/?a\b|/?i?frame\b|img\b)"
    r"|(?P<scheme>\b[a-z][a-z0-9+.-]{1,31}:)(?=//|[a-z]*\()|(?P<www>\bwww)(?=\.)", re.IGNORECASE,
)


def unlinked(text: str) -> str:
    """The text with nothing in it that a page would turn into a link; it reads the same.

    An answer is shown by pages of all kinds, and a document must not place a link in it. A
    zero-width space takes each one apart; citations quote the source as it is.
    """
    return _LINK.sub(lambda match: match.group(0) + "\u200b", text)


@dataclass(frozen=True, slots=True)
class Marker:
    """A bracket by which a text cites: [start, end) with the blanks before it, and its numbers."""

    start: int
    end: int
    numbers: tuple[int, ...]


def find_markers(text: str, num_hits: int, sources: Sequence[str] = ()) -> list[Marker]:
    """The brackets by which a text cites passages 1 to num_hits; others belong to what it says.

    Such are brackets in code, a list and what touches a word where a number in it is no passage's, and
    whatever stands behind the same words in one of `sources`, the passages' texts. A lone number that
    is no passage's counts as a marker gone astray. What a bracket is depends only on what is before it.
    """
    squeezed = [_squeezed(source) for source in sources]
    found: list[Marker] = []
    for match in _BRACKET.finditer(text):
        marker = Marker(match.start(), match.end(), tuple(map(int, re.findall(r"\d+", match[1]))))
        is_there = all(1 <= number <= num_hits for number in marker.numbers)
        goes_on = bool(found) and found[-1].end == marker.start
        before = text[: marker.start]
        at_word = not goes_on and match[0][0] in "[【" and bool(_WORD_END.search(before))
        if not is_there and (len(marker.numbers) > 1 or at_word) or _is_in_code(before):
            continue
        if not any(_stands_in(source, before, match[0]) for source in squeezed):
            found.append(marker)
    return found


_WORD_END = re.compile(r"[A-Za-z0-9_)\]]\Z")


def _is_in_code(before: str) -> bool:
    """Whether backticks are open at the end of a text."""
    line = before[before.rfind("\n") + 1 :]
    return before.count("```") % 2 == 1 or line.replace("```", "").count("`") % 2 == 1


@lru_cache(maxsize=256)
def _squeezed(text: str) -> str:
    return re.sub(r"[\s\u200b]", "", text).casefold()


_SIGNS_BEFORE = 12  # of the two words before a bracket; Chinese ones are not parted by blanks


def _stands_in(source: str, before: str, bracket: str) -> bool:
    """Whether a squeezed source has the bracket behind the same words."""
    words = _squeezed(" ".join(before[-200:].split()[-2:]))[-_SIGNS_BEFORE:]
    return bool(words) and words + _squeezed(bracket) in source


def strip_markers(text: str) -> str:
    """The text without any `[n]` that may be a marker."""
    return _without(text, 0, find_markers(text, _MOST_MARKED)).strip()


def _without(text: str, begin: int, markers: Sequence[Marker]) -> str:
    """The text from `begin` on without these markers, which all stand there."""
    ends = [begin, *(marker.end for marker in markers)]
    starts = [*(marker.start for marker in markers), len(text)]
    return "".join(text[start:end] for start, end in zip(ends, starts, strict=True))


# What may still become a marker: blanks, an open bracket, numbers.
_BEGUN = re.compile(r"[ \t]*(?:[\[【][\s\d,，、]{0,80})?$")


class MarkerStream:
    """A stream of text in which a marker comes whole or not at all, however its tokens were cut.

    Markers of passages that aren't there are left out, as they will be in the checked answer. `sources`
    as in `find_markers`.
    """

    def __init__(self, hits: int, sources: Sequence[str] = ()) -> None:
        self._hits = hits
        self._sources = sources
        self._text = ""
        self._num_shown = 0  # of its characters, those left out among them

    def push(self, piece: str) -> str:
        """What can be shown now; what could be the beginning of a marker waits."""
        self._text += piece
        return self._until(_settled(self._text, self._num_shown))

    def finish(self) -> str:
        """What is left at the end."""
        return self._until(len(self._text))

    def _until(self, end: int) -> str:
        text, begin = self._text[:end], self._num_shown
        self._num_shown = end
        astray = [
            marker for marker in find_markers(text, self._hits, self._sources)
            if marker.start >= begin and not all(1 <= number <= self._hits for number in marker.numbers)
        ]
        return _without(text, begin, astray)


def _settled(text: str, begin: int) -> int:
    """Where what could be the beginning of a marker begins, at `begin` or behind it."""
    begun = _BEGUN.search(text, begin)
    assert begun is not None, "the pattern matches the empty end too"
    return begun.start()


def is_refusal(text: str) -> bool:
    """Whether a model said that the passages hold no answer, in the words it was told to use."""
    bare = normalise(strip_markers(text)).rstrip("。. ")
    return any(bare.startswith(normalise(phrase).rstrip("。. ")) for phrase in REFUSAL.values())


def check_citations(
    text: str, hits: Sequence[Hit], *, page_at: Callable[[str, int], int | None], strict: bool = False
) -> CheckedText:
    """Set the markers of an answer right. `page_at(path, offset)` gives the page of a character.

    A sentence that no passage supports is kept and reported; where `strict`, it is taken out and
    reported.
    """
    checker = _Checker(hits, page_at)
    pieces: list[str] = []
    citations: dict[tuple[int, int, int], Citation] = {}
    unsupported: list[str] = []
    for sentence in _cited_sentences(text, find_markers(text, len(hits), _texts(hits))):
        checked = checker.check(sentence)
        if checked.is_unsupported:
            unsupported.append(sentence.text)
        if not (strict and checked.is_unsupported):
            pieces.append(checked.text)
        if citation := checked.citation:
            citations.setdefault((citation.marker, citation.start, citation.end), citation)
    return CheckedText(unlinked("".join(pieces).strip()), tuple(citations.values()), tuple(unsupported))


def _texts(hits: Sequence[Hit]) -> list[str]:
    return [hit.chunk.text for hit in hits]


@dataclass(frozen=True, slots=True)
class _CitedSentence:
    """`blank` is what stands behind it, `cited` the numbers of its markers, `end` where it and its blank
    space end in the text with markers. A blank beginning is a sentence without `text`."""

    text: str
    blank: str
    cited: tuple[int, ...]
    end: int


@dataclass(frozen=True, slots=True)
class _CheckedSentence:
    """`text` has its marker set right, and the blank space behind it."""

    text: str
    citation: Citation | None = None
    is_unsupported: bool = False


class _Checker:
    """Compares sentences of an answer, one by one, with the passages."""

    def __init__(self, hits: Sequence[Hit], page_at: Callable[[str, int], int | None]) -> None:
        self._hits = hits
        self._page_at = page_at
        self._spans = _passage_spans(hits)

    def check(self, sentence: _CitedSentence) -> _CheckedSentence:
        if not sentence.text:
            return _CheckedSentence(sentence.blank)
        claimed = [number for number in sentence.cited if 1 <= number <= len(self._hits)]
        match = _best_match(sentence.text, self._spans, claimed)
        if match is None:
            return _CheckedSentence(
                sentence.text + sentence.blank, is_unsupported=_claims_something(sentence.text)
            )
        marked = _with_marker(sentence.text, match.span.hit_number)
        return _CheckedSentence(marked + sentence.blank, _citation(match.span, self._hits, self._page_at))


class StrictStream:
    """A stream of text in which each sentence comes once it has been checked, as it will stand in the answer.

    A sentence that nothing supports never shows. One is whole when the next has begun: "3." may go on
    as "3.5", and a marker may follow. What is left at the end is for the checked answer to add.
    """

    def __init__(self, hits: Sequence[Hit], *, page_at: Callable[[str, int], int | None]) -> None:
        self._checker = _Checker(hits, page_at)
        self._sources = _texts(hits)
        self._text = ""
        self._num_checked = 0  # of its characters
        self._kept = ""  # checked and supported, or without anything to support
        self._is_begun = self._is_cited = self._is_refusal = False
        self.shown = ""

    def push(self, piece: str) -> str:
        """What can be shown now: whole sentences, nothing until one of them is supported."""
        self._text += piece
        text = self._text[: _settled(self._text, self._num_checked)]
        markers = find_markers(text, len(self._sources), self._sources)
        whole = _cited_sentences(text, markers, begin=self._num_checked)[:-1]
        if not whole:
            return ""
        if not self._is_begun and any(sentence.text for sentence in whole):
            self._is_begun = True
            self._is_refusal = is_refusal(self._text)  # a text that begins with its words is one
        for sentence in whole:
            checked = self._checker.check(sentence)
            if not checked.is_unsupported:
                self._kept += checked.text
            self._is_cited = self._is_cited or checked.citation is not None
        self._num_checked = whole[-1].end
        if self._is_refusal or not self._is_cited:
            return ""
        before, self.shown = self.shown, unlinked(self._kept.strip())
        return self.shown[len(before) :]


# Behind a full stop such a bracket neither begins a sentence nor hides that one begins.
_BRACKET_BEHIND_STOP = re.compile(rf"(?<=[.!?]){_BRACKET.pattern}")


def _cited_sentences(text: str, markers: Sequence[Marker], begin: int = 0) -> list[_CitedSentence]:
    """The sentences from `begin` on without their markers, in order.

    A marker counts for the sentence it stands in or directly behind, even behind its full stop. Models
    don't wrap lines: each ends a sentence.
    """
    there = [marker for marker in markers if marker.start >= begin]
    marks: list[tuple[int, int, tuple[int, ...]]] = []  # (offset in the bare text, length, numbers)
    removed = begin
    for marker in there:
        marks.append((marker.start - removed, marker.end - marker.start, marker.numbers))
        removed += marker.end - marker.start
    bare = _without(text, begin, there)

    def end_in_text(offset: int) -> int:
        return begin + offset + sum(size for at, size, _ in marks if at <= offset)

    result: list[_CitedSentence] = []
    spans = sentence_spans(_BRACKET_BEHIND_STOP.sub(lambda match: " " * len(match[0]), bare), unwrap=False)
    if spans and spans[0][0] > 0:
        result.append(_CitedSentence("", bare[: spans[0][0]], (), end_in_text(spans[0][0])))
    for at, (start, end) in enumerate(spans):
        following = spans[at + 1][0] if at + 1 < len(spans) else len(bare)
        cited = tuple(
            number for offset, _, numbers in marks for number in numbers
            if (start < offset <= end) or (end < offset < following)
            or (at + 1 == len(spans) and offset >= end)
        )
        result.append(_CitedSentence(bare[start:end], bare[end:following], cited, end_in_text(following)))
    return result


def _passage_spans(hits: Sequence[Hit]) -> list[_Span]:
    """Each sentence of each hit, and each pair of neighbouring ones."""
    spans: list[_Span] = []
    for number, hit in enumerate(hits, 1):
        text = hit.chunk.text
        ranges = sentence_spans(text)
        pairs = [(a[0], b[1]) for a, b in zip(ranges, ranges[1:], strict=False)]
        place = frozenset(passage_terms(hit.chunk.place))
        for start, end in [*ranges, *pairs]:
            sentence = text[start:end]
            first = next(at for at, place_ in enumerate(ranges) if place_[0] == start)
            before = text[ranges[max(0, first - _BEFORE)][0] : start]
            spans.append(_Span(
                number, start, end, frozenset(passage_terms(sentence)) | place,
                frozenset(_numbers(sentence)) | frozenset(_numbers(hit.chunk.place)),
                sentence, frozenset(passage_terms(before)),
            ))
    return spans


def _numbers(text: str) -> set[str]:
    """The numbers of a text as digits, so that "三个月", "3 个月" and "three months" agree."""
    written = plain(normalise(text))
    found = {number.replace(",", "").rstrip(".") for number in _NUMBER.findall(written)}
    found |= {_WORDS[word] for word in _NUMBER_WORD.findall(written)}
    return found | {str(_value(numeral)) for numeral in _HAN_NUMERAL.findall(written)}


_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000}


def _value(numeral: str) -> int:
    """A Chinese numeral as a number: 二十五 is 25, 一万二千 is 12,000, 二〇二一 is 2021."""
    if len(numeral) > 1 and all(sign in _DIGITS for sign in numeral):
        return int("".join(str(_DIGITS[sign]) for sign in numeral))
    total = part = digit = 0
    for sign in numeral:
        if sign == "万":
            total, part, digit = (total + part + digit or 1) * 10_000, 0, 0
        elif sign in _UNITS:
            part, digit = part + (digit or 1) * _UNITS[sign], 0
        else:
            digit = _DIGITS[sign]
    return total + part + digit


def _names(sentence: str) -> set[str]:
    """The terms of the names in a sentence."""
    pattern = _NAME_ZH if detect_language(sentence) == "zh" else _NAME_EN
    return {term for match in pattern.finditer(sentence) for term in question_terms(match.group())}


def _best_match(sentence: str, spans: Sequence[_Span], claimed: Sequence[int]) -> _Match | None:
    terms = question_terms(sentence)
    if not terms:
        return None
    weights = term_weights(terms, {}, 0)
    total = sum(weights.values())
    numbers, names = _numbers(sentence), _names(sentence)
    in_numbers = {term for term in terms if term.isdecimal() or term in _WORD_TERMS}
    negated = _is_negated(sentence)
    best: _Match | None = None
    for span in spans:
        if not numbers <= span.numbers or not names <= span.terms | span.nearby:
            continue
        # Its numbers are there, be it as other terms: 1200, 1,200.
        held = span.terms | in_numbers
        share = sum(weight for term, weight in weights.items() if term in held) / total
        if share < SUPPORTED or negated != _negates(span.text, weights):
            continue
        score = share + (_CITED_BONUS if span.hit_number in claimed else 0.0)
        shorter = best is not None and score == best.score and (
            span.end - span.start < best.span.end - best.span.start
        )
        if best is None or score > best.score + 0.02 or shorter:
            best = _Match(score, span)
    return best


def _negates(text: str, weights: Mapping[str, float]) -> bool:
    """Whether a clause that speaks of these terms holds a negation.

    Clause by clause, because "the rent is due on Monday, and pets are not allowed" does not deny
    the first half.
    """
    for clause in _CLAUSE.split(text):
        terms = set(passage_terms(clause))
        if terms and len(terms.intersection(weights)) >= 0.4 * len(terms) and _is_negated(clause):
            return True
    return False


def _is_negated(text: str) -> bool:
    return bool(_NEGATION.search(simplify(text).lower()))


def _claims_something(sentence: str) -> bool:
    """Whether a sentence has anything to support: "Sure!" and list numbers don't."""
    return len(question_terms(sentence)) >= 2


def _citation(
    span: _Span, hits: Sequence[Hit], page_at: Callable[[str, int], int | None]
) -> Citation:
    chunk = hits[span.hit_number - 1].chunk
    start = chunk.start + span.start
    return Citation(
        marker=span.hit_number, path=chunk.path, page=page_at(chunk.path, start), start=start,
        end=chunk.start + span.end, quote=chunk.text[span.start : span.end],
    )


def _with_marker(sentence: str, number: int) -> str:
    """The marker before the closing full stop in English, behind the sentence in Chinese."""
    if sentence.endswith((".", "!", "?")):
        return f"{sentence[:-1]} [{number}]{sentence[-1]}"
    return f"{sentence} [{number}]"
