"""PDF: text with its geometry from pdfium, lines joined to paragraphs, page by page.

What stands where comes from pdfium's character boxes (`_read_page`); what belongs together is
decided in ingest/layout.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ingest.builder import clean_line
from ingest.layout import Gap, Line, Outline, PageText, lay_out
from ingest.loaders.pdf_form import fill_in, read_fields
from ingest.ocr import ADD_CHINESE, HOW_TO, Reading, find_tesseract
from rag.document import Document
from rag.errors import LoadError

_MIN_VISIBLE = 8  # fewer characters on a page with a big picture: the page is a scan
_SCAN_SHARE = 0.45  # of the page's area, for a picture to count as the scan of it
_MAX_STAMP = 80  # characters that a scanner or a scanning app may print over its picture
_WHOLE_SHARE = 0.8  # of the page's area, from which a picture may lie under such a stamp
_GARBLED_SHARE = 0.2  # of a page's characters that mean nothing, for the page to be reported
_WIDE_LINE = 0.25  # of the page's width, from which a line may be a table's row or of two columns
_WIDE_GAP = 0.9  # of a line's height; a space between words is about a third of it
_SPREAD = 1.03  # times a line's usual width for its characters, from which it may hold gaps
_LATIN_SPREAD = 0.45  # a Latin letter's width, times the line's height
_NO_LINE = Line(" ", 0.0, 0.0, 0.0, 0.0)
_SPACE_RUN = re.compile(r" +")
# pdfium writes this in place of a hyphen at a line's end, and no line break behind it
_HYPHEN = "\ufffe"
_LINE = re.compile(rf"([^\n{_HYPHEN}]*)([\n{_HYPHEN}]|$)")
_SPACES = str.maketrans({"\xa0": " ", "\u2002": " ", "\u2003": " ", "\t": " ", "\x02": _HYPHEN})
_MEANINGLESS = re.compile(r"[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")
_BAD_TITLE = re.compile(
    r"(?i)^(?:microsoft word|untitled|无标题|未命名|document\d*|slide 1|powerpoint)\b"
    r"|\.(?:docx?|pptx?|xlsx?|tex|dvi|indd|qxd|html?|pdf|wps)$|^[\W\d_]*$"
)


class PdfLoader:
    """.pdf files. Pages are 1-based in the order of the file."""

    media_type = "pdf"
    suffixes: tuple[str, ...] = (".pdf",)
    version = 5

    def load(self, file: Path, path: str) -> Document:
        import pypdfium2 as pdfium

        if file.stat().st_size == 0:
            return Document(path, "", self.media_type, warnings=("the file is empty",))
        try:
            pdf = pdfium.PdfDocument(file)
        except pdfium.PdfiumError as error:
            raise LoadError(_explain(str(error))) from error
        try:
            return self._read(pdf, path)
        finally:
            pdf.close()

    def _read(self, pdf: Any, path: str) -> Document:
        import pypdfium2 as pdfium
        import pypdfium2.raw as raw

        pages: list[PageText] = []
        health = _Health()
        try:
            pdf.init_forms()
        except pdfium.PdfiumError:
            health.is_form_unread = True
        for index in range(len(pdf)):
            pages.append(_read_page(pdf, index, health))
        if health.unreadable == len(pages):
            raise LoadError(f"none of its {len(pages)} pages can be read; the file is damaged.")
        title = clean_line(pdf.get_metadata_value("Title"))
        outline = tuple(_read_outline(pdf))
        document = lay_out(pages, path, self.media_type, title="" if _BAD_TITLE.search(title) else title,
                           outline=outline)
        warnings = health.describe(len(pages))
        if raw.FPDF_GetSecurityHandlerRevision(pdf) >= 0:
            warnings.append("encrypted, but its text can be read without a password")
        from dataclasses import replace

        return replace(document, warnings=tuple(warnings) + document.warnings)


def _explain(message: str) -> str:
    lowered = message.lower()
    if "password" in lowered:
        return "password-protected. Save it without a password and ingest it again."
    if "security" in lowered:
        return "encrypted in a way that can't be opened here. Save it without protection."
    return f"this is not a PDF, or it is damaged ({message.rstrip('.')})."


class _Health:
    """What is wrong with which pages (1-based)."""

    def __init__(self) -> None:
        self.empty: list[int] = []
        self.scanned: dict[str, list[int]] = {}  # by what became of them
        self.garbled: list[int] = []
        self.broken: list[int] = []
        self.ticked: list[int] = []
        self.is_form_unread = False

    @property
    def unreadable(self) -> int:
        return len(self.broken)

    def add_scan(self, page: int, outcome: str) -> None:
        self.scanned.setdefault(outcome, []).append(page)

    def describe(self, total: int) -> list[str]:
        """One line for each kind of trouble."""
        unread = ["what is filled in its form can't be read"] * self.is_form_unread
        if self.ticked:
            unread.append(f"which of its form's boxes are ticked is not read ({_ranges(self.ticked)})")
        said = [
            *((pages, f"scanned{outcome}") for outcome, pages in self.scanned.items()),
            (self.garbled, "garbled: the fonts don't say which characters they show"),
            (self.broken, "damaged and left out"),
            (self.empty, "empty"),
        ]
        return [
            f"{len(pages)} of {total} pages {'is' if len(pages) == 1 else 'are'} {what} "
            f"({_ranges(pages)})"
            for pages, what in said
            if pages
        ] + unread


def _ranges(pages: list[int]) -> str:
    """[1, 2, 3, 7] -> "page 1-3, 7"."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][1] == page - 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    shown = [f"{a}-{b}" if a != b else str(a) for a, b in runs[:12]]
    return "page " + ", ".join(shown) + (", ..." if len(runs) > 12 else "")


def _read_page(pdf: Any, index: int, health: _Health) -> PageText:
    import pypdfium2 as pdfium

    number = index + 1
    try:
        page = pdf[index]
        textpage = page.get_textpage()
    except pdfium.PdfiumError:
        health.broken.append(number)
        return PageText(number, 0.0, 0.0, [])
    try:
        width, height = page.get_size()
        if page.get_rotation() in (90, 270):  # boxes are those of the page before it is turned
            width, height = height, width
        lines, is_turned = _read_lines(textpage, width, height)
        if is_turned:
            width, height = height, width
        filled: list[Line] = []
        if pdf.formenv is not None:
            fields = read_fields(page, textpage, pdf.formenv)
            filled = fields.lines
            if fields.num_ticked:
                health.ticked.append(number)
        visible = sum(len(line.text.replace(" ", "")) for line in lines)
        share = _picture_share(page, width * height) if visible < _MAX_STAMP else 0.0
        if visible < _MIN_VISIBLE and share >= _SCAN_SHARE or share >= _WHOLE_SHARE:
            reading, outcome = _read_scan(page)
            read = sum(len(line.text) for line in reading.lines)
            if read > 2 * visible:
                lines = reading.lines
                width, height = page.get_size()
            if read > 2 * visible or visible < _MIN_VISIBLE:
                health.add_scan(number, outcome)
        elif not visible and not filled:
            health.empty.append(number)
        elif visible:
            meaningless = sum(len(_MEANINGLESS.findall(line.text)) for line in lines)
            if meaningless >= _GARBLED_SHARE * visible:
                health.garbled.append(number)
        return PageText(number, width, height, fill_in(lines, filled))
    finally:
        textpage.close()
        page.close()


def _read_scan(page: Any) -> tuple[Reading, str]:
    """What OCR reads on a scanned page, and for the report what became of it."""
    tesseract = find_tesseract()
    if tesseract is None:
        return Reading(), f", a picture without text; {HOW_TO}"
    reading = tesseract.read(page)
    if not reading.lines:
        return reading, f", {reading.trouble}"
    chinese = "" if tesseract.reads_chinese else f" ({tesseract.languages} only; {ADD_CHINESE})"
    return reading, f" and read by OCR{chinese}, which makes mistakes"


def _picture_share(page: Any, area: float) -> float:
    """The share of the page that pictures cover (overlaps counted twice, which does no harm)."""
    import pypdfium2.raw as raw

    covered = 0.0
    for picture in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE], max_depth=3):
        left, bottom, right, top = picture.get_bounds()
        covered += max(0.0, right - left) * max(0.0, top - bottom)
    return covered / area if area else 0.0


def _read_lines(textpage: Any, width: float, height: float) -> tuple[list[Line], bool]:
    """The page's lines as pdfium orders them, each with the box around it, in points.

    Where the text runs up or down the page (a wide table set sideways), boxes are turned so that
    it runs to the right, and the second value is True.
    """
    text, indices = _read_characters(textpage)
    boxes = _Boxes(textpage, indices, width, height)
    spans: list[tuple[int, int, bool]] = []  # first and last character, whether a word goes on
    for match in _LINE.finditer(text):
        stripped = match[1].strip()
        if stripped:
            first = match.start() + len(match[1]) - len(match[1].lstrip())
            spans.append((first, first + len(stripped) - 1, match[2] == _HYPHEN))
    boxes.find_turn([(first, last) for first, last, _ in spans if last - first >= 4])
    lines: list[Line] = []
    for first, last, is_hyphenated in spans:
        # A line may begin or end in another font: its own size is that of most of three places.
        middle = (first + last) // 2
        while middle > first and text[middle] == " ":
            middle -= 1
        places = [boxes.at(first), boxes.at(middle), boxes.at(last)]
        size, y0 = sorted((top - bottom, bottom) for _, bottom, _, top in places)[1]
        x0, x1 = places[0][0], max(places[0][0], places[2][2])
        is_bold = all(boxes.is_bold_at(place) for place in (first, middle, last))
        line = Line(text[first : last + 1], x0, x1, y0, y0 + size, is_bold, is_hyphenated)
        lines.append(line)
    usual = median((line.x1 - line.x0) / len(line.text) / line.height for line in lines or [_NO_LINE])
    if text.isascii():
        usual = min(usual, _LATIN_SPREAD)  # on a page of nothing but a table, all lines are wide
    for line, (first, last, _) in zip(lines, spans, strict=True):
        # pdfium joins what is drawn on one height: cells of a row, lines of two columns. Their gaps
        # are looked for where a line was drawn in pieces, or is wide for its number of characters.
        if line.x1 - line.x0 > _WIDE_LINE * width and (
            (line.x1 - line.x0) / len(line.text) / line.height > _SPREAD * usual
            or boxes.count_parts(first, last) > 1
        ):
            for space in _SPACE_RUN.finditer(line.text):
                gap_start = boxes.at(first + space.start() - 1)[2]
                gap_end = boxes.at(first + space.end())[0]
                if gap_end - gap_start > _WIDE_GAP * line.height:
                    line.gaps.append(Gap(space.start(), space.end(), gap_start, gap_end))
    rising = sum(lower.y0 > upper.y0 for upper, lower in zip(lines, lines[1:], strict=False))
    if rising > 0.7 * max(1, len(lines) - 1):  # pdfium orders the lines of a turned page from its foot
        lines.reverse()
    return lines, boxes.turn in ("up", "down")


class _Boxes:
    """Where a page's characters are: (left, bottom, right, top) by index into its text."""

    def __init__(self, textpage: Any, indices: list[int], width: float, height: float) -> None:
        import pypdfium2.raw as raw

        self._textpage = textpage
        self._indices = indices
        self._width = width
        self._height = height
        self._box = raw.FS_RECTF()
        self._read_box = raw.FPDFText_GetLooseCharBox
        self._read_weight = raw.FPDFText_GetFontWeight
        self._count_rects = raw.FPDFText_CountRects
        self.turn = "right"  # the direction in which lines run: "right", "up", "down", "left"

    def at(self, place: int) -> tuple[float, float, float, float]:
        index = self._indices[place] if self._indices else place
        box = self._box
        self._read_box(self._textpage, index, box)
        if self.turn == "up":
            return box.bottom, self._width - box.right, box.top, self._width - box.left
        if self.turn == "down":
            return self._height - box.top, box.left, self._height - box.bottom, box.right
        if self.turn == "left":
            return (
                self._width - box.right, self._height - box.top,
                self._width - box.left, self._height - box.bottom,
            )
        return box.left, box.bottom, box.right, box.top

    def is_bold_at(self, place: int) -> bool:
        index = self._indices[place] if self._indices else place
        return bool(self._read_weight(self._textpage, index) >= 600)

    def count_parts(self, first: int, last: int) -> int:
        """Of how many separately drawn pieces this stretch of text consists."""
        first, last = (self._indices[first], self._indices[last]) if self._indices else (first, last)
        return int(self._count_rects(self._textpage, first, last - first + 1))

    def find_turn(self, spans: list[tuple[int, int]]) -> None:
        """Set `turn` by the direction in which most of the lines run."""
        directions: Counter[str] = Counter()
        for first, last in spans[:40]:
            start, end = self.at(first), self.at(last)
            across, along = end[0] - start[0], end[1] - start[1]
            if abs(across) >= abs(along):
                directions["right" if across > 0 else "left"] += 1
            else:
                directions["up" if along > 0 else "down"] += 1
        self.turn = directions.most_common(1)[0][0] if directions else "right"


def _read_characters(textpage: Any) -> tuple[str, list[int]]:
    """The page's text with \\n at line ends, and each character's index in pdfium.

    The list is empty where the two are equal, which they nearly always are.
    """
    import pypdfium2.raw as raw

    count = textpage.count_chars()
    text = textpage.get_text_range() if count else ""
    if len(text) == count:
        return _plain(text).replace("\r", " "), []
    # Characters beyond 16 bits, or ones without a code: read one at a time.
    characters: list[str] = []
    indices: list[int] = []
    high = 0
    for index in range(count):
        code = raw.FPDFText_GetUnicode(textpage, index)
        if 0xD800 <= code < 0xDC00:
            high = code
            continue
        if 0xDC00 <= code < 0xE000:
            code = 0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00) if high else 0xFFFD
        high = 0
        characters.append(chr(code) if 0 < code < 0x110000 else "\ufffd")
        indices.append(index)
    return _plain("".join(characters)).replace("\r", " "), indices


def _plain(text: str) -> str:
    """Spaces of any width as a space, character for character; a form's \x02 is a hyphen too."""
    return text.translate(_SPACES)


def _read_outline(pdf: Any) -> Iterator[Outline]:
    """The bookmarks of the file: level, title, page. Loops and depth are bounded by pdfium2."""
    import pypdfium2 as pdfium

    try:
        for count, bookmark in enumerate(pdf.get_toc(max_depth=6)):
            if count >= 20_000:
                return
            destination = bookmark.get_dest()
            page = destination.get_index() if destination is not None else None
            title = clean_line(bookmark.get_title() or "")
            if page is not None and title:
                yield Outline(bookmark.level + 1, title, page + 1)
    except pdfium.PdfiumError:
        return
