"""Word documents: headings, paragraphs, lists, tables as markdown rows, notes; in document order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from ingest.outline import add_articles, find_counted_headings, find_numbered_headings
from rag.document import Document, Heading
from rag.errors import LoadError

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
_HEADING_STYLE = re.compile(r"(?:heading|标题|標題|titre|überschrift)\s*([1-9])$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[。！？；：，.!?;:,|]$")
_MAX_TITLE = 60  # characters
_ORDINALS = frozenset({"st", "nd", "rd", "th"})  # behind a digit
_BRANDS = frozenset({"tm", "sm"})
_NOTES = "/word/footnotes.xml", "/word/endnotes.xml"


class DocxLoader:
    """.docx files. Deleted text of tracked changes is left out, inserted text is kept."""

    media_type = "docx"
    suffixes: tuple[str, ...] = (".docx", ".docm")
    version = 3

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
        self._raised = frozenset(
            style_id for style_id, style in self._styles.items()
            if _value(style.element, "rPr/vertAlign") == "superscript"
        )
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
                    text = clean_line(" ".join(_read_text(p, self._raised) for p in note.iter(f"{_W}p")))
                    if text:
                        lines.append(f"[^{note.get(f'{_W}id')}]: {text}")
        if lines:
            self.builder.add_paragraph("\n".join(lines))

    def _add_paragraph(self, element: Any) -> None:
        text = _read_text(element, self._raised)
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
                    _read_text(paragraph, self._raised) for paragraph in cell.iter(f"{_W}p")
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


def join_runs(runs: Iterable[tuple[str, bool]]) -> str:
    """The text of (text, is raised) runs. A raised one keeps apart from what it stands behind.

    10 with a raised 6 is 10^6 and not 106; 1st and a mark like * stay as they are.
    """
    parts: list[str] = []
    for is_raised, neighbours in groupby((run for run in runs if run[0]), key=lambda run: run[1]):
        text = "".join(text for text, _ in neighbours)
        before = parts[-1][-1] if parts else " "
        if is_raised and not before.isspace() and not text[0].isspace():
            is_mark = not any(character.isalnum() for character in text)
            is_ordinal = before.isdigit() and text.strip().lower() in _ORDINALS
            if not (is_mark or is_ordinal or text.strip().lower() in _BRANDS):
                parts.append("^")
        parts.append(text)
    return "".join(parts)


def _read_text(paragraph: Any, raised_styles: frozenset[str]) -> str:
    """The visible characters of a paragraph, without those of text boxes anchored in it."""
    parts: list[tuple[str, bool]] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        tag = element.tag
        if tag == f"{_W}t":
            text = element.text or ""
            is_raised = _is_raised(element.getparent(), raised_styles)
            if is_raised and text.strip() and any(True for _ in element.iterancestors(f"{_W}hyperlink")):
                text, is_raised = f"[{text.strip()}]", False  # a link to a note
            parts.append((text, is_raised))
        elif tag == f"{_W}tab":
            parts.append(("\t", False))
        elif tag in (f"{_W}br", f"{_W}cr"):
            parts.append(("\n", False))
        elif tag == f"{_W}noBreakHyphen":
            parts.append(("-", _is_raised(element.getparent(), raised_styles)))
        elif tag in (f"{_W}footnoteReference", f"{_W}endnoteReference"):
            parts.append((f"[^{element.get(f'{_W}id')}]", False))
        elif tag == f"{_M}oMath":
            parts.append((_read_formula(element), False))
        elif tag in (f"{_W}del", f"{_W}moveFrom", f"{_W}txbxContent", f"{_W}pPr", _FALLBACK):
            continue
        else:
            stack.extend(reversed(element))
    return join_runs(parts)


def _is_raised(run: Any, raised_styles: frozenset[str]) -> bool:
    own = _value(run, "rPr/vertAlign")
    return own == "superscript" or own is None and _value(run, "rPr/rStyle") in raised_styles


def _read_formula(element: Any) -> str:
    """An equation in one line: E=mc^2, (a+b)/2, √(x)."""
    if element.tag in (f"{_M}t", f"{_W}t"):
        return element.text or ""
    name = str(element.tag).removeprefix(_M)
    if name.endswith("Pr") or element.tag in (f"{_W}del", f"{_W}moveFrom", f"{_W}rPr"):
        return ""

    def part(child: str) -> str:
        found = element.find(_M + child)
        return "" if found is None else "".join(map(_read_formula, found))

    def character(path: str, usual: str) -> str:
        found = element.find("/".join(_M + step for step in path.split("/")))
        return usual if found is None else found.get(f"{_M}val") or ""

    scripts = "".join(mark + _bracket(part(child)) for mark, child in (("_", "sub"), ("^", "sup")) if part(child))
    if name in ("sSup", "sSub", "sSubSup"):
        return _bracket(part("e")) + scripts
    if name == "sPre":
        return scripts + part("e")
    if name == "f":
        return f"{_bracket(part('num'))}/{_bracket(part('den'))}"
    if name == "rad":
        return f"{part('deg')}√({part('e')})"
    if name == "d":
        inner = "|".join("".join(map(_read_formula, e)) for e in element.findall(f"{_M}e"))
        return f"{character('dPr/begChr', '(')}{inner}{character('dPr/endChr', ')')}"
    if name == "nary":
        return f"{character('naryPr/chr', '∫')}{scripts} {part('e')}"
    if name == "m":
        rows = [", ".join("".join(map(_read_formula, e)) for e in row) for row in element.findall(f"{_M}mr")]
        return "; ".join(rows)
    return "".join(map(_read_formula, element))


def _bracket(part: str) -> str:
    """Brackets around a part of a formula that more than one letter or number makes up."""
    is_simple = part.isalnum() or part[:1] == "(" and part[-1:] == ")" and part.count("(") == 1
    return part if is_simple or not part else f"({part})"


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
