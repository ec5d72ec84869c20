"""Collects a document's text piece by piece and remembers where headings and pages begin.

Used by the loaders whose text is not the file's own (pdf, docx, html, ...): paragraphs are parted
by one blank line, so that the splitter sees them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rag.document import Document, Heading, Page

_SPACE = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u205f\f\v]+")


# Marks that show nothing and part words for a search: hyphens that are only possible, joiners.
# Ligatures are written out.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"), "") | str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
)


def clean_line(text: str) -> str:
    """One line: line breaks and runs of spaces become one space, invisible marks go."""
    text = text.replace("\r", " ").replace("\n", " ")
    return _SPACE.sub(" ", spell_out(text)).strip()


def spell_out(text: str) -> str:
    """Without marks that show nothing, and with ligatures as letters."""
    return text if text.isascii() else text.translate(_INVISIBLE)


class DocumentBuilder:
    """Add paragraphs, headings, tables and pages in reading order, then `build`."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._headings: list[Heading] = []
        self._page_starts: list[tuple[int, int]] = []  # (number, start)
        self.warnings: list[str] = []

    @property
    def length(self) -> int:
        """Characters so far: where the next piece would start if nothing parted it."""
        return self._length

    def add_text(self, text: str, separator: str = "\n\n") -> int:
        """Append text after `separator`. Returns the offset at which the text starts."""
        if self._length:
            self._append(separator)
        start = self._length
        self._append(text)
        return start

    def _append(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)

    def add_paragraph(self, text: str, separator: str = "\n\n") -> None:
        """Append a paragraph; one without visible text is left out."""
        text = text.strip()
        if text:
            self.add_text(text, separator)

    def add_heading(self, level: int, title: str) -> None:
        """Append a heading as a line of its own."""
        title = clean_line(title)
        if title:
            start = self.add_text(title)
            self._headings.append(Heading(max(1, level), title, start))

    def mark_heading(self, level: int, title: str, start: int) -> None:
        """Name text that has been added already as a heading."""
        self._headings.append(Heading(max(1, level), title, start))

    def add_table(self, rows: Sequence[Sequence[str]]) -> None:
        """Append a table as markdown rows, the first of them its header."""
        table = format_table(rows)
        if table:
            self.add_text(table)

    @property
    def text(self) -> str:
        """What was added so far."""
        return "".join(self._parts)

    def add_document(self, document: Document, *, levels_below: int = 0) -> int:
        """Append another document's text, its headings `levels_below` levels lower.

        Returns what its own offsets begin at.
        """
        if not document.text.strip():
            return self._length
        offset = self.add_text(document.text.strip("\n"))
        offset -= len(document.text) - len(document.text.lstrip("\n"))
        for heading in document.headings:
            self.mark_heading(heading.level + levels_below, heading.title, heading.start + offset)
        return offset

    def begin_page(self, number: int) -> None:
        """What is added from here on stands on this page (1-based)."""
        self.begin_page_at(number, self._length)

    def begin_page_at(self, number: int, start: int) -> None:
        """The page begins at this offset, which may lie within text that was added already."""
        self._page_starts.append((number, start))

    def next_start(self, separator: str = "\n\n") -> int:
        """The offset at which the next piece will start."""
        return self._length + len(separator) if self._length else 0

    def build(self, path: str, media_type: str, *, title: str = "") -> Document:
        text = "".join(self._parts)
        starts = self._page_starts
        ends = [start for _, start in starts[1:]] + [len(text)] * bool(starts)
        pages = tuple(
            Page(number, start, end) for (number, start), end in zip(starts, ends, strict=True)
        )
        headings = tuple(sorted(self._headings, key=lambda heading: heading.start))
        return Document(path, text, media_type, title, pages, headings, tuple(self.warnings))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown rows: `| a | b |`, a rule below the first. Empty rows and columns are left out."""
    cells = [[clean_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    cells = [row for row in cells if any(row)]
    if not cells:
        return ""
    width = max(len(row) for row in cells)
    cells = [row + [""] * (width - len(row)) for row in cells]
    kept = [column for column in range(width) if any(row[column] for row in cells)]
    lines = ["| " + " | ".join(row[column] for column in kept) + " |" for row in cells]
    if len(lines) > 1:
        lines.insert(1, "|" + " --- |" * len(kept))
    return "\n".join(lines)
