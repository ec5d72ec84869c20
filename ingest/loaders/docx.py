"""Word documents: headings, paragraphs, lists, tables as markdown rows, notes; in document order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from ingest.outline import add_articles, find_counted_headings, find_numbered_headings
from rag.document import Document, Heading
from rag.errors import LoadError

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_HEADING_STYLE = re.compile(r"(?:heading|标题|標題|titre|überschrift)\s*([1-9])$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[。！？；：，.!?;:,|]$")
_MAX_TITLE = 60  # characters
_NOTES = "/word/footnotes.xml", "/word/endnotes.xml"


class DocxLoader:
    """.docx files. Deleted text of tracked changes is left out, inserted text is kept."""

    media_type = "docx"
    suffixes: tuple[str, ...] = (".docx", ".docm")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        import docx
        from docx.opc.exceptions import PackageNotFoundError
        from lxml import etree

        check_zip(file, "a Word document")
        try:
            package: Any = docx.Document(str(file))
        except (PackageNotFoundError, KeyError, ValueError, etree.XMLSyntaxError, OSError) as error:
            reason = clean_line(str(error.args[0] if error.args else error)).replace(str(file), path)
            raise LoadError(f"this is not a Word document, or it is damaged: {reason}") from error
        reader = _Reader(package)
        reader.read_body()
        reader.read_notes()
        document = reader.builder.build(path, self.media_type)
        headings = list(document.headings)
        text = document.text
        if headings:
            headings = add_articles(headings, text)
        else:
            headings = (
                find_numbered_headings(text) or reader.bold_headings or find_counted_headings(text)
            )
        title = clean_line(package.core_properties.title or "") or reader.title
        return replace(document, headings=tuple(headings), title=title or _guess_title(document))


def _guess_title(document: Document) -> str:
    """The only heading of the first level, else a short first line."""
    top = [heading.title for heading in document.headings if heading.level == 1]
    if len(top) == 1:
        return top[0]
    first = document.text.split("\n", 1)[0]
    return first if 0 < len(first) <= _MAX_TITLE and not _SENTENCE_END.search(first) else ""


class _Reader:
    def __init__(self, package: Any) -> None:
        self.builder = DocumentBuilder()
        self.title = ""
        self._package = package
        self._styles = {style.style_id: style for style in package.styles}
        self._levels: dict[str, int | None] = {}
        self._previous_was_item = False
        self._bold: list[Heading] = []
        self._num_paragraphs = 0

    @property
    def bold_headings(self) -> list[Heading]:
        """Short paragraphs all in bold, where they are the exception."""
        return self._bold if 2 <= len(self._bold) <= 0.4 * self._num_paragraphs else []

    def read_body(self) -> None:
        for element in _blocks(self._package.element.body):
            if element.tag == f"{_W}p":
                self._add_paragraph(element)
            else:
                self._add_table(element)
                self._previous_was_item = False

    def read_notes(self) -> None:
        """Footnotes and endnotes, below the text as [^1]: ..."""
        from lxml import etree

        lines: list[str] = []
        for part in self._package.part.package.iter_parts():
            if str(part.partname) not in _NOTES:
                continue
            root = etree.fromstring(part.blob, etree.XMLParser(resolve_entities=False))
            for note in root:
                if note.get(f"{_W}type") in (None, "normal"):
                    text = clean_line(" ".join(_read_text(p) for p in note.iter(f"{_W}p")))
                    if text:
                        lines.append(f"[^{note.get(f'{_W}id')}]: {text}")
        if lines:
            self.builder.add_paragraph("\n".join(lines))

    def _add_paragraph(self, element: Any) -> None:
        text = _read_text(element)
        if not text.strip():
            return
        style_id = _value(element, "pPr/pStyle")
        level = self._heading_level(element, style_id)
        if level is not None:
            self.builder.add_heading(level, text)
            self._previous_was_item = False
            return
        style = self._styles.get(style_id or "")
        name = (style.name or "") if style is not None else ""
        if name == "Title" and not self.title:
            self.title = clean_line(text)
        is_item = element.find(f"{_W}pPr/{_W}numPr") is not None or name.startswith("List ")
        lines = "\n".join(line for part in text.split("\n") if (line := clean_line(part)))
        if is_item:
            depth = int(_value(element, "pPr/numPr/ilvl") or 0)
            separator = "\n" if self._previous_was_item else "\n\n"
            self.builder.add_text("  " * min(depth, 8) + "- " + lines, separator)
        else:
            self._num_paragraphs += 1
            start = self.builder.next_start()
            self.builder.add_paragraph(lines)
            is_short = len(lines) <= _MAX_TITLE and not _SENTENCE_END.search(lines)
            if is_short and "\n" not in lines and _is_bold(element):
                self._bold.append(Heading(1, lines, start))
        self._previous_was_item = is_item

    def _heading_level(self, element: Any, style_id: str | None) -> int | None:
        outline = _value(element, "pPr/outlineLvl")
        if outline is not None and outline.isdigit() and int(outline) < 9:
            return int(outline) + 1
        if style_id is None:
            return None
        if style_id not in self._levels:
            self._levels[style_id] = self._style_level(style_id)
        return self._levels[style_id]

    def _style_level(self, style_id: str) -> int | None:
        """The level of a style, its own or inherited from the style it is based on."""
        for _ in range(12):
            style = self._styles.get(style_id)
            if style is None:
                return None
            if match := _HEADING_STYLE.match(style.name or ""):
                return int(match[1])
            outline = _value(style.element, "pPr/outlineLvl")
            if outline is not None and outline.isdigit() and int(outline) < 9:
                return int(outline) + 1
            style_id = _value(style.element, "basedOn") or ""
        return None

    def _add_table(self, element: Any) -> None:
        rows: list[list[str]] = []
        for row in element.iter(f"{_W}tr"):
            if next(row.iterancestors(f"{_W}tbl")) is not element:
                continue  # of a table inside of a cell, which is read with that cell
            cells: list[str] = []
            for cell in row.iter(f"{_W}tc"):
                if next(cell.iterancestors(f"{_W}tr")) is not row:
                    continue
                merged = cell.find(f"{_W}tcPr/{_W}vMerge")
                is_continued = merged is not None and merged.get(f"{_W}val") != "restart"
                text = "" if is_continued else " ".join(
                    _read_text(paragraph) for paragraph in cell.iter(f"{_W}p")
                )
                span = _value(cell, "tcPr/gridSpan") or "1"
                cells += [text] + [""] * (min(int(span), 63) - 1 if span.isdigit() else 0)
            rows.append(cells)
        if max((len(row) for row in rows), default=0) == 1:  # a box around text
            for row in rows:
                self.builder.add_paragraph(clean_line(row[0]))
        else:
            self.builder.add_table(rows)


def _blocks(body: Any) -> Iterator[Any]:
    """Paragraphs and tables in order, those inside of content controls and text boxes too."""
    for element in body:
        if element.tag == f"{_W}p":
            yield element
            for box in element.iter(f"{_W}txbxContent"):
                if not any(parent.tag == _FALLBACK for parent in box.iterancestors()):
                    yield from _blocks(box)
        elif element.tag == f"{_W}tbl":
            yield element
        elif element.tag in (f"{_W}sdt", f"{_W}sdtContent", f"{_W}ins", f"{_W}customXml"):
            yield from _blocks(element)


def _read_text(paragraph: Any) -> str:
    """The visible characters of a paragraph, without those of text boxes anchored in it."""
    parts: list[str] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        tag = element.tag
        if tag == f"{_W}t":
            parts.append(element.text or "")
        elif tag == f"{_W}tab":
            parts.append("\t")
        elif tag in (f"{_W}br", f"{_W}cr"):
            parts.append("\n")
        elif tag == f"{_W}noBreakHyphen":
            parts.append("-")
        elif tag in (f"{_W}footnoteReference", f"{_W}endnoteReference"):
            parts.append(f"[^{element.get(f'{_W}id')}]")
        elif tag in (f"{_W}del", f"{_W}moveFrom", f"{_W}txbxContent", f"{_W}pPr", _FALLBACK):
            continue
        else:
            stack.extend(reversed(element))
    return "".join(parts)


def _is_bold(paragraph: Any) -> bool:
    """Whether every run that shows text is set in bold by itself."""
    runs = [
        run for run in paragraph.iter(f"{_W}r") if any(t.text for t in run.iter(f"{_W}t"))
    ]
    marks = [run.find(f"{_W}rPr/{_W}b") for run in runs]
    return bool(marks) and all(
        mark is not None and mark.get(f"{_W}val") not in ("0", "false") for mark in marks
    )


def _value(element: Any, path: str) -> str | None:
    """The w:val of a descendant: _value(p, "pPr/pStyle")."""
    found = element.find("/".join(_W + step for step in path.split("/")))
    return None if found is None else found.get(f"{_W}val")
