"""Lines with their places on pages -> one text in paragraphs, with pages and headings.

Running heads, feet and page numbers are dropped. A line break is the paper's, not the author's,
where the first word of the next line would not have fitted on the line: such lines are joined,
Chinese without a space, hyphenated English without its hyphen. Everything else parts paragraphs: a
wider gap, another size of type, an indent, a bullet or a number.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from ingest.builder import DocumentBuilder, format_table, spell_out
from ingest.outline import add_articles, find_counted_headings, find_numbered_headings
from rag.document import Document, Heading

_CJK = "\u2e80-\u303f\u3040-\u30ff\u31f0-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f“”‘’—…"
_CJK_END = re.compile(rf"[{_CJK}]$")
_CJK_START = re.compile(rf"[{_CJK}]")
_CLOSED = re.compile(r"[。！？；：.!?:;][”’」』）)\]\"']*$")
_BULLET = re.compile(
    r"(?:[-–—•●○◦▪■□◆▶►✓*·](?=\s|[^\W\d_])\s*"
    r"|\(?\d{1,3}[.)、．](?!\d)\s*(?=\S)|[（(][一二三四五六七八九十\d]{1,3}[）)]|[一二三四五六七八九十]{1,3}、"
    r"|\[\d{1,3}\]\s|[a-zA-Z][.)]\s|第[零〇一二三四五六七八九十百千万\d]{1,9}(?:分编|编|部分|章|节|条)[\s　]"
    r"|【[^】]{1,12}】|\d{1,3}\u3000)"
)
_PAGE_NUMBER = re.compile(
    r"[-–—·~\s]*(?:第\s*)?(?:page\s*|p\.\s*)?(\d{1,5}|[ivxlc]{1,7})\s*(?:页|頁)?"
    r"(?:\s*(?:/|of|共|，|,)\s*(?:共\s*)?\d{1,5}\s*(?:页|頁)?)?[-–—·~\s]*",
    re.IGNORECASE,
)
_LEADERS = re.compile(r"\s*(?:[.·…] ?){4,}\s*")  # "4.1 Functions . . . . . 8"
_CONTENTS_LINE = re.compile(r"(?:[.·…] ?){4,}\s*[\divxlc]{1,5}$")
_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NUMBERED_TITLE = re.compile(r"(\d{1,2}(?:\.\d{1,2}){0,4})\.?\s+[^\W\d_]")
# Words that keep their hyphen when a line ends behind it.
_COMPOUND_HEADS = frozenset("self well non high low long short end state open real pre post".split())
_CAPITALS = re.compile(r"(?:[IVXLC]{1,6}\.|\d{1,2}(?:\.\d{1,2})*\.?)?\s*[A-Z][A-Z &,:'/-]{3,79}")

_EDGE_LINES = 3  # at the top and the bottom of a page, where running heads and feet stand
_MARGIN = 0.12  # of the page's height, within which a line can be one of them
_NUMBER_MARGIN = 0.18  # the same for a page number
_RUNNING_SHARE = 0.3  # of the pages on which a line must come back to be a running head
_CELL_GAP = 1.5  # of a line's height, from which a gap parts two cells
_MIN_ROWS = 6  # lines with a gap at one place, for a page to have columns
_MAX_TITLE = 160  # characters of a heading
_LARGER = 1.13  # times the size of running text, for a line to be a heading


@dataclass(frozen=True, slots=True)
class Gap:
    """A wide space inside of a line: where it is in the text, and from where to where, in points."""

    start: int
    end: int
    x0: float
    x1: float


@dataclass(slots=True)
class Line:
    """One line of a page, in points from the lower left corner. `is_hyphenated`: a word goes on.

    `is_closed`: it ends with what is filled in a form; the next line begins something else.
    """

    text: str
    x0: float
    x1: float
    y0: float
    y1: float
    is_bold: bool = False
    is_hyphenated: bool = False
    gaps: list[Gap] = field(default_factory=list)
    is_closed: bool = False

    @property
    def height(self) -> float:
        return max(0.1, self.y1 - self.y0)


@dataclass(slots=True)
class PageText:
    number: int
    width: float
    height: float
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Outline:
    """A bookmark of the file. `level` is 1 for the highest, `page` 1-based."""

    level: int
    title: str
    page: int


@dataclass(slots=True)
class _Paragraph:
    """Lines that belong together, each with the number of its page."""

    lines: list[tuple[int, Line]] = field(default_factory=list)
    is_table: bool = False

    @property
    def size(self) -> float:
        return median(line.height for _, line in self.lines)


def lay_out(
    pages: Sequence[PageText], path: str, media_type: str,
    *, title: str = "", outline: Sequence[Outline] = (),
) -> Document:
    """One document out of the pages' lines."""
    for page in pages:
        page.lines = _join_row(_order_columns(page))
    _drop_running_lines(pages)
    body_size = _body_size(pages)
    paragraphs = _form_paragraphs(pages, body_size)
    vocabulary = _hyphenated_words(pages)
    builder = DocumentBuilder()
    placed: list[tuple[_Paragraph, str, int]] = []  # (paragraph, its text, its start)
    next_page = 0
    for paragraph in paragraphs:
        text, page_offsets = _join_lines(paragraph, vocabulary)
        while next_page < len(pages) and pages[next_page].number <= paragraph.lines[0][0]:
            # The blank line between two paragraphs belongs to the page before.
            builder.begin_page_at(pages[next_page].number, builder.next_start())
            next_page += 1
        start = builder.add_text(text)
        for number, offset in page_offsets:
            while next_page < len(pages) and pages[next_page].number <= number:
                builder.begin_page_at(pages[next_page].number, start + offset)
                next_page += 1
        placed.append((paragraph, text, start))
    for page in pages[next_page:]:
        builder.begin_page_at(page.number, builder.length)
    for heading in _find_headings(placed, body_size, outline, builder.text):
        builder.mark_heading(heading.level, heading.title, heading.start)
    return builder.build(path, media_type, title=title or _guess_title(placed, body_size))


# lines ------------------------------------------------------------------------------------------


def _order_columns(page: PageText) -> list[Line]:
    """The lines of a page of two columns that was drawn row by row, one column after the other.

    Only where many lines have a wide gap at one place and prose on both sides of it; a table's
    rows, with their short cells, stay rows.
    """
    starts = [gap for line in page.lines for gap in line.gaps]
    if len(starts) < _MIN_ROWS:
        return page.lines
    middle = median((gap.x0 + gap.x1) / 2 for gap in starts)
    crossed = [
        (line, gap) for line in page.lines for gap in line.gaps if gap.x0 < middle < gap.x1
    ]
    if len(crossed) < max(_MIN_ROWS, len(page.lines) // 2):
        return page.lines
    narrowest = 0.22 * page.width
    left = median(gap.x0 - line.x0 for line, gap in crossed)
    right = median(line.x1 - gap.x1 for line, gap in crossed)
    others = sum(len(line.gaps) - 1 for line, _ in crossed)
    if min(left, right) < narrowest or others > 0.3 * len(crossed):
        return page.lines
    ordered: list[Line] = []
    columns: tuple[list[Line], list[Line]] = [], []
    gap_at = {id(line): gap for line, gap in crossed}
    for line in page.lines:
        gap = gap_at.get(id(line))
        if gap is not None:
            head, tail = line.text[: gap.start], line.text[gap.end :]
            columns[0].append(replace(line, text=head, x1=gap.x0, is_hyphenated=False, gaps=[]))
            columns[1].append(replace(line, text=tail, x0=gap.x1, gaps=[]))
        elif line.x1 < middle or line.x0 > middle:
            columns[line.x0 > middle].append(line)
        else:  # over both columns: what stands above it comes first
            ordered += [*columns[0], *columns[1], line]
            columns = [], []
    return [*ordered, *columns[0], *columns[1]]


def _join_row(lines: list[Line]) -> list[Line]:
    """Join what stands on one row one behind the other: raised letters, words set apart."""
    joined: list[Line] = []
    for line in lines:
        last = joined[-1] if joined else None
        if last is not None and _is_same_row(last, line):
            gap = line.x0 - last.x1
            wide = gap > 0.12 * max(last.height, line.height)
            is_hyphen = last.is_hyphenated and not wide
            last.text += "-" if is_hyphen else " " if wide else ""
            place = len(last.text)
            last.gaps += [replace(g, start=g.start + place, end=g.end + place) for g in line.gaps]
            last.text += line.text
            last.x1, last.is_hyphenated, last.is_closed = line.x1, line.is_hyphenated, line.is_closed
            if line.height > last.height:
                last.y0, last.y1 = line.y0, line.y1
        else:
            joined.append(line)
    return joined


def _is_same_row(last: Line, line: Line) -> bool:
    overlap = min(last.y1, line.y1) - max(last.y0, line.y0)
    gap = line.x0 - last.x1
    size = max(last.height, line.height)
    return overlap > 0.5 * min(last.height, line.height) and -0.3 * size <= gap <= 2.5 * size


def _drop_running_lines(pages: Sequence[PageText]) -> None:
    """Remove heads, feet and page numbers: what comes back at the edge of many pages."""
    if len(pages) < 2:
        return
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    offsets: dict[int, set[int]] = defaultdict(set)  # printed number less page -> pages
    for page in pages:
        for line in _edge_lines(page, _MARGIN):
            seen[_running_key(line)].add(page.number)
        for line in _edge_lines(page, _NUMBER_MARGIN):
            for number in _printed_numbers(line):
                offsets[number - page.number].add(page.number)
    needed = max(2 if len(pages) < 6 else 3, int(_RUNNING_SHARE * len(pages)))
    running = {key for key, numbers in seen.items() if len(numbers) >= needed}
    offset, counted = max(offsets.items(), key=lambda item: len(item[1]), default=(0, set()))
    is_counted = len(counted) >= max(2, len(pages) // 4)

    def is_running(page: PageText, line: Line) -> bool:
        if _running_key(line) in running:
            return True
        if not is_counted or page.number + offset not in _printed_numbers(line):
            return False
        # It carries the page's number: a chapter's head comes back on few pages, but it comes back.
        return bool(_PAGE_NUMBER.fullmatch(line.text)) or len(seen[_running_key(line)]) >= 2

    for page in pages:
        edge = _edge_lines(page, _NUMBER_MARGIN)
        dropped = {id(line) for line in edge if is_running(page, line)}
        page.lines = [line for line in page.lines if id(line) not in dropped]


def _printed_numbers(line: Line) -> set[int]:
    """The numbers a line begins and ends with, where a page's number is printed."""
    found = re.findall(r"^\W*(\d{1,5})\b|\b(\d{1,5})\W*$|第\s*(\d{1,5})\s*[页頁]", line.text)
    return {int(number) for groups in found for number in groups if number}


def _edge_lines(page: PageText, margin: float) -> list[Line]:
    """The uppermost and the lowest lines, and only where they stand in the page's margins."""
    by_height = sorted(page.lines, key=lambda line: -line.y1)
    low, high = margin * page.height, (1 - margin) * page.height
    top = [line for line in by_height[:_EDGE_LINES] if line.y0 > high]
    bottom = [line for line in by_height[-_EDGE_LINES:] if line.y1 < low]
    return top + bottom


def _running_key(line: Line) -> tuple[str, int]:
    """The line with its numbers left out, and how high it stands (in steps of 6 points)."""
    return _DIGITS.sub("#", line.text.replace(" ", "").lower()), round(line.y0 / 6)


# paragraphs -------------------------------------------------------------------------------------


def _form_paragraphs(pages: Sequence[PageText], body_size: float) -> list[_Paragraph]:
    paragraphs: list[_Paragraph] = []
    last: Line | None = None
    last_page, last_edges = 0, _Edges([])
    for page in pages:
        edges = _Edges(page.lines)
        for line in page.lines:
            is_new_page = page.number != last_page
            if last is not None and not is_new_page and _are_rows(last, line):
                paragraph = paragraphs[-1]
                if len(paragraph.lines) > 1 and not paragraph.is_table:
                    paragraphs.append(_Paragraph([paragraph.lines.pop()]))
                paragraphs[-1].is_table = True
            elif last is None or paragraphs[-1].is_table or not (
                _continues_over_break(last, line, last_edges, edges)
                if is_new_page
                else _continues(last, line, edges, len(paragraphs[-1].lines))
                or _is_same_title(last, line, body_size)
            ):
                paragraphs.append(_Paragraph())
            paragraphs[-1].lines.append((page.number, line))
            last, last_page, last_edges = line, page.number, edges
    return paragraphs


def _cells(line: Line) -> list[str]:
    """The line cut at gaps that are wider than a space or a typesetter's indent."""
    cells: list[str] = []
    position = 0
    for gap in line.gaps:
        if gap.x1 - gap.x0 > _CELL_GAP * line.height:
            cells.append(line.text[position : gap.start])
            position = gap.end
    return [*cells, line.text[position:]]


def _are_rows(last: Line, line: Line) -> bool:
    """Whether two lines are neighbouring rows of one table: as many cells, one of them in line."""
    cells = len(_cells(line))
    # A grid may be airy; two cells far apart are more often two columns.
    reach = (6 if cells > 2 else 3) * line.height
    if cells < 2 or cells != len(_cells(last)) or not 0 < last.y0 - line.y0 < reach:
        return False
    lefts, last_lefts = ({round(gap.x1) for gap in row.gaps} for row in (line, last))
    in_line = any(abs(x - y) <= 2 for x in lefts for y in last_lefts)
    rights, last_rights = ({round(gap.x0) for gap in row.gaps} for row in (line, last))
    in_line |= any(abs(x - y) <= 2 for x in rights for y in last_rights)
    in_line |= any(abs(x - y) <= 3 for x, y in zip(_middles(line), _middles(last)))
    return in_line and abs(last.x0 - line.x0) <= 2 * line.height


def _middles(line: Line) -> list[float]:
    """Where the inner cells of a row have their middles: cells may be centred in their columns."""
    gaps = [gap for gap in line.gaps if gap.x1 - gap.x0 > _CELL_GAP * line.height]
    return [(left.x1 + right.x0) / 2 for left, right in zip(gaps, gaps[1:], strict=False)]


class _Edges:
    """How far to the left and the right the lines reach that stand above and below a line."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines
        self._cache: dict[tuple[int, int], tuple[float, float]] = {}
        gaps = [
            upper.y0 - lower.y0
            for upper, lower in zip(lines, lines[1:], strict=False)
            if 0 < upper.y0 - lower.y0 < 3 * upper.height
        ]
        self.pitch = median(gaps) if gaps else 0.0  # between two lines' feet

    def of(self, line: Line) -> tuple[float, float]:
        key = (round(line.x0 / 4), round(line.height))
        if key not in self._cache:
            self._cache[key] = self._measure(line)
        return self._cache[key]

    def _measure(self, line: Line) -> tuple[float, float]:
        size = line.height
        column = [
            other
            for other in self._lines
            if abs(other.x0 - line.x0) <= 3 * size and 0.85 < other.height / size < 1.18
        ]
        # A few lines are wider than the column: a title over two of them. The right edge is where
        # many lines end; where no end is common (text that isn't justified), it is the widest of
        # lines that are not alone.
        left = min(other.x0 for other in column)
        ends = sorted((other.x1 for other in column), reverse=True)
        buckets = Counter(round(end / (0.5 * size)) for end in ends)
        common, count = max(buckets.items(), key=lambda item: (item[1], item[0]))
        if count >= 3 and count >= 0.25 * len(column):
            return left, (common + 0.5) * 0.5 * size
        if len(ends) < 8:
            return left, ends[0]
        for end in ends:  # a line or two that run over the edge (long addresses, code) are no edge
            if sum(end - 2.5 * size <= other <= end for other in ends) >= min(3, len(ends)):
                return left, end
        return left, ends[0]


def _continues(last: Line, line: Line, edges: _Edges, num_lines: int) -> bool:
    """Whether `line` goes on with the paragraph that `last` is the latest line of."""
    if last.is_hyphenated:
        return True
    if last.is_closed or last.is_bold != line.is_bold or not _is_same_size(last, line):
        return False
    if _CONTENTS_LINE.search(last.text) or max(len(_cells(last)), len(_cells(line))) >= 3:
        return False
    pitch = last.y0 - line.y0
    if pitch <= 0:  # further up: the next column, or a page laid out in an unusual order
        return _is_unfinished(last, line, edges) and not _BULLET.match(line.text)
    usual = edges.pitch or 1.3 * last.height
    if pitch > 1.4 * max(usual, last.height) or _BULLET.match(line.text):
        return False
    if line.x0 - last.x0 > 1.2 * line.height and num_lines > 1:
        return False  # an indent
    left, _ = edges.of(line)
    if num_lines == 1 and line.x0 - last.x0 > 0.5 * line.height and not _BULLET.match(last.text):
        return False
    if num_lines == 1 and line.x0 - left > 1.2 * line.height and _CLOSED.search(last.text):
        return False  # both are indented: two paragraphs, the first of one line
    if num_lines > 1 and line.x0 - left > 1.2 * line.height and line.x0 - last.x0 > 0.8 * line.height:
        return False
    return _was_full(last, line, edges)


def _is_same_title(last: Line, line: Line, body_size: float) -> bool:
    """Whether both are lines of one title: large type, set close, each line centred on its own."""
    return (
        min(last.height, line.height) >= _LARGER * body_size
        and 0.93 < line.height / last.height < 1.07
        and last.is_bold == line.is_bold
        and 0 < last.y0 - line.y0 < 1.6 * line.height
        and not _CLOSED.search(last.text)
        and not _BULLET.match(line.text)
    )


def _is_same_size(last: Line, line: Line) -> bool:
    """Fonts of one size differ in height, those of another script most of all."""
    ratio = line.height / last.height
    return 0.8 < ratio < 1.25 or (
        0.7 < ratio < 1.43 and line.text[:1].isascii() != last.text[:1].isascii()
    )


def _was_full(last: Line, line: Line, edges: _Edges) -> bool:
    """Whether the first word of `line` would not have fitted behind `last`."""
    _, right = edges.of(last)
    character = max(0.1, line.x1 - line.x0) / max(1, len(line.text))
    if _CJK_START.match(line.text):
        # one character, and a mark that must not begin a line may have taken it along
        needed = 2.2 * min(character, line.height)
    else:
        needed = (len(line.text.split(" ", 1)[0]) + 1) * character
    return last.x1 + needed >= right - 0.1 * line.height


def _is_unfinished(last: Line, line: Line, edges: _Edges) -> bool:
    return (
        not _CLOSED.search(last.text)
        and 0.87 < line.height / last.height < 1.15
        and _was_full(last, line, edges)
    )


def _continues_over_break(last: Line, line: Line, last_edges: _Edges, edges: _Edges) -> bool:
    """Whether a paragraph goes on over a page break: it stopped in mid-sentence at the edge."""
    if last.is_hyphenated:
        return True
    if last.is_closed or _BULLET.match(line.text) or last.is_bold != line.is_bold:
        return False
    left, _ = edges.of(line)
    is_indented = line.x0 - left > 0.8 * line.height
    return not is_indented and _is_unfinished(last, line, last_edges)


def _body_size(pages: Sequence[PageText]) -> float:
    """The height of the type that most characters are set in."""
    sizes: Counter[float] = Counter()
    for page in pages:
        for line in page.lines:
            sizes[round(line.height * 2) / 2] += len(line.text)
    return sizes.most_common(1)[0][0] if sizes else 0.0


# text -------------------------------------------------------------------------------------------


def _hyphenated_words(pages: Sequence[PageText]) -> set[str]:
    """Words the document spells with a hyphen inside of a line, in lower case."""
    found: set[str] = set()
    for page in pages:
        for line in page.lines:
            if "-" in line.text:
                found.update(re.findall(r"[^\W\d_]+-[^\W\d_]+", line.text.lower()))
    return found


def _join_lines(paragraph: _Paragraph, vocabulary: set[str]) -> tuple[str, list[tuple[int, int]]]:
    """The paragraph as one line (a table as rows), and at which offset each further page begins in it."""
    if paragraph.is_table:
        return format_table([_cells(line) for _, line in paragraph.lines]), []
    number, first = paragraph.lines[0]
    text = spell_out(first.text)
    page_offsets: list[tuple[int, int]] = []
    is_hyphenated = first.is_hyphenated
    for page, line in paragraph.lines[1:]:
        following = spell_out(line.text)
        text = _join_two(text, following, is_hyphenated, vocabulary)
        if page != number:
            page_offsets.append((page, len(text) - len(following)))
            number = page
        is_hyphenated = line.is_hyphenated
    if len(page_offsets) == 0:
        text = _LEADERS.sub(" ... ", text) if _CONTENTS_LINE.search(text) else text
    return text + ("-" if is_hyphenated else ""), page_offsets


def _join_two(text: str, following: str, is_hyphenated: bool, vocabulary: set[str]) -> str:
    if not is_hyphenated and re.search(r"[^\W\d_]-$", text):
        is_hyphenated, text = True, text[:-1]
    if is_hyphenated:
        head = re.search(r"[^\W\d_]+$", text)
        tail = re.match(r"[^\W\d_]+", following)
        if head and tail and tail[0][0].islower():
            whole = f"{head[0]}-{tail[0]}".lower()
            is_compound = whole in vocabulary or head[0].lower() in _COMPOUND_HEADS
            return text + ("-" if is_compound else "") + following
        return f"{text}-{following}"
    if _CJK_END.search(text) and _CJK_START.match(following):
        return text + following
    if _CJK_END.search(text) or _CJK_START.match(following):
        # "2020 年": typesetters put a space between the scripts only now and then
        return text + following
    return f"{text} {following}"


# headings ---------------------------------------------------------------------------------------


def _find_headings(
    placed: Sequence[tuple[_Paragraph, str, int]], body_size: float,
    outline: Sequence[Outline], text: str,
) -> list[Heading]:
    """By the file's own bookmarks, else by numbered chapters and articles, else by size of type."""
    from_outline = _match_outline(placed, outline)
    if len(from_outline) >= 2 and len(from_outline) >= 0.5 * len(outline):
        return add_articles(from_outline, text)
    return (
        find_numbered_headings(text) or _by_size(placed, body_size) or find_counted_headings(text)
    )


def _squeeze(text: str) -> str:
    return re.sub(r"\W+", "", text).lower()


def _match_outline(
    placed: Sequence[tuple[_Paragraph, str, int]], outline: Sequence[Outline]
) -> list[Heading]:
    """The paragraphs that the bookmarks name, in order."""
    by_page: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for paragraph, text, start in placed:
        by_page[paragraph.lines[0][0]].append((_squeeze(text[: 2 * _MAX_TITLE]), start))
    headings: dict[int, Heading] = {}
    after = -1
    for mark in outline:
        wanted = _squeeze(mark.title)
        for found, start in by_page[mark.page]:
            if wanted and start > after and (
                found == wanted
                or found.endswith(wanted) and len(found) <= len(wanted) + 8
                or found.startswith(wanted) and len(wanted) >= 8
            ):
                headings[start] = Heading(mark.level, mark.title, start)
                after = start
                break
    return [headings[start] for start in sorted(headings)]


def _by_size(
    placed: Sequence[tuple[_Paragraph, str, int]], body_size: float
) -> list[Heading]:
    """Short paragraphs set larger than the running text, or bold with a number in front."""
    found: list[tuple[float, str, int]] = []  # (rank, text, start)
    num_bold = sum(paragraph.lines[0][1].is_bold for paragraph, _, _ in placed)
    for paragraph, text, start in placed:
        if len(text) > _MAX_TITLE or not _WORD.search(text) or len(paragraph.lines) > 4:
            continue
        if paragraph.is_table:
            continue
        size = round(paragraph.size * 2) / 2
        is_bold = paragraph.lines[0][1].is_bold
        if size >= _LARGER * body_size:
            found.append((size, text, start))
        elif is_bold and (match := _NUMBERED_TITLE.match(text)):
            found.append((body_size - match[1].count("."), text, start))
        elif len(paragraph.lines) > 1 or _CLOSED.search(text):
            continue
        elif _CAPITALS.fullmatch(text):
            found.append((body_size, text, start))
        elif is_bold and num_bold <= 0.3 * len(placed) and len(text) <= 80:
            found.append((body_size - 1, text, start))
    if len(found) > 0.4 * len(placed) and len(found) > 4:
        return []  # a slide or a poster, where large type says nothing
    ranks = sorted({rank for rank, _, _ in found}, reverse=True)
    return [Heading(min(6, ranks.index(rank) + 1), text, start) for rank, text, start in found]


def _guess_title(placed: Sequence[tuple[_Paragraph, str, int]], body_size: float) -> str:
    """The first page's largest line, where it is clearly larger than the running text."""
    first = [item for item in placed[:12] if item[0].lines[0][0] == placed[0][0].lines[0][0]]
    first = [item for item in first if _WORD.search(item[1]) and len(item[1]) <= _MAX_TITLE]
    if not first:
        return ""
    paragraph, text, _ = max(first, key=lambda item: item[0].size)
    return text if paragraph.size >= 1.2 * body_size else ""
