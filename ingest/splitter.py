"""Document -> chunks: by headings first, then paragraphs, then sentence ends in both languages.

Every chunk is a slice of the document's text, and every visible character is in some chunk. Sizes
are counted in the embedder's tokens, once a paragraph (and once a sentence of one that is too
long), never once a candidate. Chunks do not overlap: the retriever joins neighbours.

Sentences are cut by langchain-text-splitters' RecursiveCharacterTextSplitter, which with kept
separators and no stripping returns pieces that concatenate to the text: their offsets are exact.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rag.document import Chunk, Document

CountTokens = Callable[[Sequence[str]], list[int]]

VERSION = 2  # raised whenever the same document would be split otherwise

# A section below the first share of the budget is joined with its neighbours while they stay below
# the second: a chunk of many topics is found for none of them. On 546 lay questions about a statute
# of 1,260 articles the right page was among the first five for 0.780 of them; 0.773 with shares of
# 0.2 and 0.5, 0.788 with 0.4 and 0.8.
_SMALL_SHARE = 0.1
_JOINED_SHARE = 0.3

_BLANK_LINES = re.compile(r"\n[ \t\u3000\r]*(?:\n[ \t\u3000\r]*)+")
_VISIBLE = re.compile(r"[^\s]")
_WORD = re.compile(r"[^\W_]")
_TABLE_RULE = re.compile(r"\|(?:\s*:?-{3,}:?\s*\|)+\s*")
_SENTENCE_END = re.compile(r"[。！？；：.!?;:…”’」』）)\]\"'|>]\s*$")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\(?\d+[.)、])\s")

# Where a run of marks may end a sentence: from its first mark on, or from its second behind an initial
# or "e.g". Tried at every mark instead, a line of dots without a space takes its length squared.
_RUN_OF_MARKS = (
    r"(?:(?<![A-Z.!?;])(?<!e\.g)(?<!i\.e)|(?<=[A-Z][.!?;])|(?<=(?:e\.g|i\.e)[.!?;]))[.!?;]++"
)
_SEPARATORS = [
    # a sentence's end with the quotes and brackets that close on it
    rf"(?:[。！？；…]+[”’」』）】》\"')\]]*\s*|{_RUN_OF_MARKS}[\"'”’)\]]*+\s+)",
    r"(?:[，、：]\s*|[,:]\s+)",
    r"\s+",
    r"(?:[\s\S]{8})",  # text without a space: slices
]

_SENTENCE = re.compile(_SEPARATORS[0])

# Characters a token, beyond which no text is: a paragraph longer than so many times the budget is
# cut without being counted first.
_LONGEST = 24

# What cutting before a unit costs, in chunks: nothing between paragraphs.
_SENTENCE_COST = 0.15
_GLUE_COST = 50.0  # a heading from its text, a table's header from its first row


@dataclass(slots=True)
class _Section:
    """The text from one heading to the next."""

    start: int
    end: int
    path: tuple[str, ...]
    body: int  # where the text below the heading starts
    is_bare: bool = False  # nothing but the heading
    tokens: int = 0
    blocks: list[_Unit] = field(default_factory=list)


@dataclass(slots=True)
class _Unit:
    """A stretch that is not cut further: a paragraph, or a piece of a long one."""

    start: int
    end: int
    tokens: int = 0
    cost: float = 0.0  # of a cut in front of it
    columns: str = ""  # the header of the table it is a row of


@dataclass(slots=True)
class _Group:
    """Neighbouring sections that are split together."""

    sections: list[_Section]
    tokens: int

    @property
    def parent(self) -> tuple[str, ...]:
        return min((section.path for section in self.sections), key=len)[:-1]

    @property
    def path(self) -> tuple[str, ...]:
        """The headings that all its text stands under."""
        full = [section.path for section in self.sections if not section.is_bare]
        paths = full or [self.sections[-1].path]
        common = paths[0]
        for path in paths[1:]:
            same = 0
            while same < min(len(common), len(path)) and common[same] == path[same]:
                same += 1
            common = common[:same]
        return common


def split_document(
    document: Document, count_tokens: CountTokens, *, chunk_tokens: int
) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens, in reading order.

    The budget holds for `Chunk.indexed_text`, the heading path included (of which at most half of
    the budget is kept free). A document without visible text has no chunks.
    """
    sections = _read_sections(document)
    if not sections:
        return []
    # blocks: one counting for the whole document
    for section in sections:
        section.blocks = _read_blocks(document.text, section)
    blocks = [block for section in sections for block in section.blocks]
    _count(document.text, blocks, count_tokens, longest=_LONGEST * chunk_tokens)
    places = sorted({(document.title, *section.path) for section in sections})
    place_tokens = dict(zip(places, count_tokens([" > ".join(p) for p in places]), strict=True))

    def budget_of(path: tuple[str, ...]) -> int:
        return max(chunk_tokens - place_tokens[(document.title, *path)] - 1, chunk_tokens // 2)

    # groups of sections
    for section in sections:
        section.tokens = sum(block.tokens for block in section.blocks)
    groups = _group_sections(sections, chunk_tokens)

    # chunks
    pages = _PageFinder(document)
    chunks: list[Chunk] = []
    for group in groups:
        path = group.path
        if (document.title, *path) not in place_tokens:
            text = " > ".join((document.title, *path))
            place_tokens[(document.title, *path)] = count_tokens([text])[0]
        budget = budget_of(path)
        units = _join_blocks(group.sections)
        if group.tokens > budget:
            units = _refine(document.text, units, budget, count_tokens)
        for run in _pack(units, budget):
            chunks.append(_make_chunk(document, run, path, pages))
    return chunks


# sections ---------------------------------------------------------------------------------------


def _read_sections(document: Document) -> list[_Section]:
    text = document.text
    sections: list[_Section] = []
    stack: list[tuple[int, str]] = []  # (level, title)
    headings = document.headings
    first = headings[0].start if headings else len(text)
    if _VISIBLE.search(text, 0, first):
        sections.append(_Section(0, first, (), 0))
    for index, heading in enumerate(headings):
        end = headings[index + 1].start if index + 1 < len(headings) else len(text)
        while stack and stack[-1][0] >= heading.level:
            stack.pop()
        stack.append((heading.level, heading.title))
        if text.startswith(heading.title, heading.start):
            body = heading.start + len(heading.title)
        else:
            body = text.find("\n", heading.start, end)
            body = end if body < 0 else body
        section = _Section(heading.start, end, tuple(title for _, title in stack), body)
        section.is_bare = not _WORD.search(text, body, end)
        sections.append(section)
    return sections


def _group_sections(sections: list[_Section], chunk_tokens: int) -> list[_Group]:
    """Bare headings join what follows them; small sections join neighbours under one parent."""
    small = max(1, int(chunk_tokens * _SMALL_SHARE))
    limit = max(1, int(chunk_tokens * _JOINED_SHARE))
    if len(sections) > 1 and not sections[0].path and sections[0].tokens < small:
        sections[0].is_bare = True  # front matter, a line above the title: no topic of its own
    groups: list[_Group] = []
    waiting: list[_Section] = []
    for section in sections:
        waiting.append(section)
        if not section.is_bare:
            groups.append(_Group(waiting, sum(item.tokens for item in waiting)))
            waiting = []
    if waiting:
        if not groups:
            return [_Group(waiting, sum(item.tokens for item in waiting))]
        groups[-1].sections += waiting
        groups[-1].tokens += sum(item.tokens for item in waiting)
    joined = [groups[0]]
    for group in groups[1:]:
        last = joined[-1]
        parent = last.parent
        if (
            min(last.tokens, group.tokens) < small
            and last.tokens + group.tokens <= limit
            and group.parent[: len(parent)] == parent
        ):
            last.sections = last.sections + group.sections
            last.tokens += group.tokens
        else:
            joined.append(group)
    return joined


def _join_blocks(sections: list[_Section]) -> list[_Unit]:
    """The blocks of all sections; a heading without text of its own is glued to the next one."""
    for section, following in zip(sections, sections[1:], strict=False):
        if section.is_bare and section.path and following.blocks:
            following.blocks[0].cost = _GLUE_COST
    return [block for section in sections for block in section.blocks]


# units ------------------------------------------------------------------------------------------


def _read_blocks(text: str, section: _Section) -> list[_Unit]:
    """Paragraphs: what blank lines part. A heading's own line is glued to what follows it."""
    blocks: list[_Unit] = []
    position = section.start
    for match in _BLANK_LINES.finditer(text, section.start, section.end):
        _add_visible(blocks, text, position, match.start())
        position = match.end()
    _add_visible(blocks, text, position, section.end)
    has_heading = bool(section.path)
    for previous, block in zip(blocks, blocks[1:], strict=False):
        if has_heading and previous.start < section.body and not _WORD.search(
            text, section.body, previous.end
        ):
            block.cost = _GLUE_COST
    return blocks


def _add_visible(units: list[_Unit], text: str, start: int, end: int) -> None:
    """Add [start, end) without the white space around it, if anything is left."""
    piece = text[start:end]
    stripped = piece.strip()
    if stripped:
        start += len(piece) - len(piece.lstrip())
        units.append(_Unit(start, start + len(stripped)))


def _count(
    text: str, units: Iterable[_Unit], count_tokens: CountTokens, *, longest: int
) -> None:
    """Count the tokens of units of up to `longest` characters.

    A longer one is above any budget and will be cut, so its pieces are counted instead; it gets
    one token a character.
    """
    short: list[_Unit] = []
    for unit in units:
        unit.tokens = unit.end - unit.start
        if unit.tokens <= longest:
            short.append(unit)
    counts = count_tokens([text[unit.start : unit.end] for unit in short]) if short else []
    for unit, tokens in zip(short, counts, strict=True):
        unit.tokens = tokens


def _refine(
    text: str, units: list[_Unit], budget: int, count_tokens: CountTokens
) -> list[_Unit]:
    """Cut the units above the budget into lines, and lines above it into sentences."""
    lines: list[_Unit] = []
    for unit in units:
        if unit.tokens <= budget or not (cut := _cut_lines(text, unit)):
            lines.append(unit)
        else:
            _count(text, cut, count_tokens, longest=_LONGEST * budget)
            lines += cut
    refined: list[_Unit] = []
    glued = 0  # tokens of the headings that must share a chunk with the next unit
    for unit, following in zip(lines, [*lines[1:], None], strict=True):
        room = max(budget - glued, budget // 2)
        if unit.tokens <= room:
            refined.append(unit)
        else:
            refined += _cut_sentences(text, unit, room, count_tokens)
        is_glue = following is not None and following.cost >= _GLUE_COST
        glued = glued + unit.tokens if is_glue else 0
    return refined


def _cut_lines(text: str, unit: _Unit) -> list[_Unit]:
    """The unit's lines; none where they are only a paragraph's wrapping."""
    lines: list[_Unit] = []
    position = unit.start
    for line in text[unit.start : unit.end].split("\n"):
        _add_visible(lines, text, position, position + len(line))
        position += len(line) + 1
    if len(lines) < 2 or _is_wrapped([text[line.start : line.end] for line in lines]):
        return []
    lines[0].cost = unit.cost
    rows = [text[line.start : line.end] for line in lines]
    if len(rows) > 2 and _TABLE_RULE.fullmatch(rows[1]):
        columns = " | ".join(cell.strip() for cell in rows[0].strip().strip("|").split("|"))
        lines[1].cost = lines[2].cost = _GLUE_COST
        for row_unit, row in zip(lines[2:], rows[2:], strict=True):
            if row.startswith("|"):
                row_unit.columns = columns
    return lines


def _is_wrapped(lines: list[str]) -> bool:
    """Whether the line breaks are a fixed width's (as in e-mail) and not the author's."""
    widest = max(len(line) for line in lines)
    inner = lines[:-1]
    long = sum(len(line) > 0.6 * widest for line in inner)
    closed = sum(bool(_SENTENCE_END.search(line)) for line in inner)
    if sum(bool(_LIST_ITEM.match(line)) for line in inner) > 0.5 * len(inner):
        return False
    return 30 <= widest <= 130 and long >= 0.7 * len(inner) and closed <= 0.5 * len(inner)


def _cut_sentences(
    text: str, unit: _Unit, budget: int, count_tokens: CountTokens
) -> list[_Unit]:
    """Pieces of nearly equal size, cut at sentence ends, else clauses, words, characters."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    body = text[unit.start : unit.end]
    ends = [match.end() for match in _SENTENCE.finditer(body)]
    sentences = [body[i:j] for i, j in zip([0, *ends], [*ends, len(body)], strict=True) if i < j]
    counts = dict(zip(sentences, count_tokens(sentences), strict=True))

    def length(piece: str) -> int:
        if piece not in counts:
            counts[piece] = count_tokens([piece])[0]
        # A piece of length 0 (white space) would be taken over into the next chunk as an overlap.
        return max(1, counts[piece])

    tokens_until = {0: 0}  # by offset in the paragraph, at the ends of sentences
    position = tokens = 0
    for sentence in sentences:
        position += len(sentence)
        tokens += counts[sentence]
        tokens_until[position] = tokens
    pieces_needed = max(1, -(-tokens // budget))
    # A little above the equal share: sentences seldom end just where it does.
    target = min(budget, -(-tokens // pieces_needed) * 115 // 100 + 1)
    splitter = RecursiveCharacterTextSplitter(
        separators=_SEPARATORS, is_separator_regex=True, keep_separator="end",
        chunk_size=target, chunk_overlap=0, length_function=length, strip_whitespace=False,
    )
    pieces = splitter.split_text(body)
    assert "".join(pieces) == body, "the pieces of a paragraph must concatenate to it"
    units: list[_Unit] = []
    position = 0
    for piece in pieces:
        start, position = position, position + len(piece)
        before = len(units)
        _add_visible(units, text, unit.start + start, unit.start + position)
        for added in units[before:]:
            if start in tokens_until and position in tokens_until:
                added.tokens = tokens_until[position] - tokens_until[start]
            else:
                added.tokens = length(piece)
    for cut in units:
        cut.cost = _SENTENCE_COST
        cut.columns = unit.columns
    units[0].cost = unit.cost
    return units


# chunks -----------------------------------------------------------------------------------------


def _pack(units: list[_Unit], budget: int) -> list[list[_Unit]]:
    """Join units to runs within the budget: few, of nearly equal size, cut where it costs least.

    Exact, by dynamic programming over the cuts: a run costs 1 + (tokens / budget)^2 and its cut.
    """
    if not units or sum(unit.tokens for unit in units) <= budget:
        return [units] if units else []
    best = [0.0] + [float("inf")] * len(units)
    cut_at = [0] * (len(units) + 1)
    for end in range(1, len(units) + 1):
        tokens = 0
        for start in range(end - 1, -1, -1):
            tokens += units[start].tokens
            if tokens > budget and start < end - 1:
                break
            cost = best[start] + 1 + (tokens / budget) ** 2 + (units[start].cost if start else 0)
            if cost < best[end]:
                best[end], cut_at[end] = cost, start
    runs: list[list[_Unit]] = []
    end = len(units)
    while end:
        runs.append(units[cut_at[end] : end])
        end = cut_at[end]
    return runs[::-1]


class _PageFinder:
    def __init__(self, document: Document) -> None:
        self._starts = [page.start for page in document.pages]
        self._numbers = [page.number for page in document.pages]

    def find(self, offset: int) -> int | None:
        index = bisect_right(self._starts, offset) - 1
        return self._numbers[index] if index >= 0 else None


def _make_chunk(
    document: Document, run: list[_Unit], path: tuple[str, ...], pages: _PageFinder
) -> Chunk:
    start, end = run[0].start, run[-1].end
    columns = run[0].columns
    return Chunk(
        path=document.path, text=document.text[start:end], start=start, end=end,
        page=pages.find(start), last_page=pages.find(end - 1),
        headings=(*path, columns) if columns else path, title=document.title,
    )
