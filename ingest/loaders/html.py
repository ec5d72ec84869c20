"""HTML: the text a reader sees, with headings, lists, tables and code; no scripts, no navigation.

The page is read as a stream of tags, never as a tree: a megabyte of nested tags costs nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from ingest.builder import DocumentBuilder, clean_line
from ingest.encoding import decode_text, is_binary
from ingest.loaders.text import normalise_lines
from rag.document import Document
from rag.errors import LoadError

_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_\-]+)", re.IGNORECASE)
_HIDDEN = frozenset(
    "script style noscript template svg iframe object canvas select button".split()
)
_ASIDE = frozenset("nav header footer aside".split())
_BLOCKS = frozenset(
    """address article aside blockquote body center dd details div dl dt fieldset figcaption figure
    footer form header hr html li main nav ol p pre section summary table tbody td tfoot th thead
    tr ul caption h1 h2 h3 h4 h5 h6 br""".split()
)
_HEADING = re.compile(r"h[1-6]")
_VOID = frozenset("br hr img input meta link col area base embed source track wbr".split())
_NAVIGATION_ROLES = frozenset("navigation banner contentinfo search complementary".split())
_MIN_MAIN_SHARE = 0.3  # of the visible text, for <main> or <article> to be taken as the page
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


class HtmlLoader:
    """.html files: the content of <main> or <article> where the page has one, else all of it."""

    media_type = "html"
    suffixes: tuple[str, ...] = (".html", ".htm", ".xhtml", ".shtml")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        data = file.read_bytes()
        if is_binary(data):
            raise LoadError("this is not HTML, whatever its name says; it holds binary data.")
        match = _CHARSET.search(data[:4096])
        decoded = decode_text(data, declared=match[1].decode("ascii") if match else None)
        builder = DocumentBuilder()
        title = add_html(builder, decoded.text)
        bad = decoded.text.count("\ufffd")
        if bad:
            builder.warnings.append(f"{bad} unreadable characters (read as {decoded.encoding})")
        return builder.build(path, self.media_type, title=title)


def add_html(builder: DocumentBuilder, html: str) -> str:
    """Add a page's text to the builder. Returns its title."""
    from lxml import etree

    html = _XML_DECLARATION.sub("", normalise_lines(html))
    page = _Page()
    if html.strip():
        parser = etree.HTMLParser(target=page, huge_tree=True, recover=True)
        try:
            parser.feed(html)
            parser.close()
        except (etree.XMLSyntaxError, AssertionError) as error:
            if not page.pieces:
                raise LoadError(f"this is no HTML that can be read: {error}") from error
    page.flush()
    for piece in page.choose_main():
        piece.add_to(builder)
    return clean_line(page.title)


class _Piece:
    """A block of the page: a heading, a paragraph, or a table."""

    __slots__ = ("is_aside", "is_main", "kind", "level", "rows", "text")

    def __init__(self, kind: str, text: str = "", level: int = 0) -> None:
        self.kind = kind
        self.text = text
        self.level = level
        self.rows: list[list[str]] = []
        self.is_aside = False
        self.is_main = False

    @property
    def length(self) -> int:
        return len(self.text) + sum(len(cell) for row in self.rows for cell in row)

    def add_to(self, builder: DocumentBuilder) -> None:
        if self.kind == "heading":
            builder.add_heading(self.level, self.text)
        elif self.kind == "table":
            builder.add_table(self.rows)
        elif self.kind == "item":
            builder.add_text(self.text, "\n")
        elif self.kind == "code":
            builder.add_text(self.text.strip("\n"))
        else:
            builder.add_paragraph(self.text)


class _Page:
    """Receives the parser's events (lxml's target interface) and collects the pieces."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.title = ""
        self._words: list[str] = []
        self._hidden = 0  # how many open tags hide what is inside
        self._open: list[tuple[str, str]] = []  # (tag, what it changed)
        self._aside = self._main = self._pre = 0
        self._in_title = False
        self._heading = 0
        self._lists: list[str] = []  # "ul" or the next number of an "ol"
        self._marker = ""
        self._tables: list[_Piece] = []
        self._columns_spanned = 1

    # events of the parser
    def start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = tag.lower() if isinstance(tag, str) else ""
        effect = ""
        if tag in _VOID:
            if tag in ("br", "hr"):
                self._words.append("\n")
            return
        if tag == "title" and not self.title:
            self._in_title = True
            effect = "title"
        elif tag in _HIDDEN or _is_hidden(attributes):
            self._flush_if_block(tag)
            self._hidden += 1
            effect = "hidden"
        elif not self._hidden:
            effect = self._open_visible(tag, attributes)
        self._open.append((tag, effect))

    def _open_visible(self, tag: str, attributes: dict[str, str]) -> str:
        if tag not in _BLOCKS:
            return ""
        if self._tables:
            return self._open_in_table(tag, attributes)
        self.flush()
        if _HEADING.fullmatch(tag):
            self._heading = int(tag[1])
            return "heading"
        if tag in ("ul", "ol"):
            self._lists.append("ul" if tag == "ul" else "1")
            return "list"
        if tag == "li":
            self._marker = self._next_marker()
            return ""
        if tag == "pre":
            self._pre += 1
            return "pre"
        if tag == "table":
            self._tables.append(self._mark(_Piece("table")))
            return "table"
        if tag in _ASIDE or attributes.get("role") in _NAVIGATION_ROLES:
            # A header inside of the article is the article's own.
            if not (tag in ("header", "footer") and self._main):
                self._aside += 1
                return "aside"
        if tag in ("main", "article") or attributes.get("role") == "main":
            self._main += 1
            return "main"
        return ""

    def _open_in_table(self, tag: str, attributes: dict[str, str]) -> str:
        table = self._tables[-1]
        if tag == "table":  # a table inside of a cell: its rows go on in a table of their own
            self._end_cell()
            self._tables.append(self._mark(_Piece("table")))
            return "table"
        if tag == "tr":
            self._end_cell()
            table.rows.append([])
        elif tag in ("td", "th"):
            self._end_cell()
            if not table.rows:
                table.rows.append([])
            span = attributes.get("colspan", "1")
            self._columns_spanned = min(50, int(span)) if span.isdigit() and span != "0" else 1
            return "cell"
        elif tag == "caption":
            return "caption"
        else:
            self._words.append(" ")
        return ""

    def end(self, tag: str) -> None:
        tag = tag.lower() if isinstance(tag, str) else ""
        if tag in _VOID:
            return
        while self._open:
            open_tag, effect = self._open.pop()
            self._close(open_tag, effect)
            if open_tag == tag:
                break

    def _close(self, tag: str, effect: str) -> None:
        if effect == "title":
            self._in_title = False
        elif effect == "hidden":
            self._hidden -= 1
        elif self._hidden:
            pass
        elif effect == "cell":
            self._end_cell()
        elif effect == "caption":
            self._end_caption()
        elif effect == "table":
            self._end_table()
        elif self._tables:
            if tag in _BLOCKS:
                self._words.append(" ")
        elif tag in _BLOCKS:
            self.flush()
            if effect == "heading":
                self._heading = 0
            elif effect == "list":
                self._lists.pop()
            elif effect == "pre":
                self._pre -= 1
            elif effect == "aside":
                self._aside -= 1
            elif effect == "main":
                self._main -= 1

    def data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden:
            self._words.append(data if self._pre else _collapse(data))

    def comment(self, text: str) -> None:
        pass

    def pi(self, target: str, data: str | None = None) -> None:
        pass

    def close(self) -> None:
        while self._open:
            self._close(*self._open.pop())

    # pieces
    def _mark(self, piece: _Piece) -> _Piece:
        piece.is_aside = self._aside > 0
        piece.is_main = self._main > 0
        return piece

    def _take_words(self) -> str:
        text = "".join(self._words)
        self._words = []
        return text

    def _flush_if_block(self, tag: str) -> None:
        if tag in _BLOCKS and not self._tables:
            self.flush()

    def flush(self) -> None:
        """What was read since the last block becomes a piece."""
        if self._tables:
            return
        text = self._take_words()
        if not text.strip():
            return
        if self._pre:
            self.pieces.append(self._mark(_Piece("code", text)))
            return
        lines = [clean_line(line) for line in text.split("\n")]
        text = "\n".join(line for line in lines if line)
        if self._heading:
            piece = _Piece("heading", text.replace("\n", " "), self._heading)
        elif self._marker or self._lists:
            indent = "  " * (len(self._lists) - 1)
            piece = _Piece("item", f"{indent}{self._marker}{text}")
            if not self.pieces or self.pieces[-1].kind not in ("item", "first item"):
                piece = _Piece("first item", piece.text.lstrip())
        else:
            piece = _Piece("paragraph", text)
        self._marker = ""
        self.pieces.append(self._mark(piece))

    def _next_marker(self) -> str:
        if not self._lists or self._lists[-1] == "ul":
            return "- "
        number = int(self._lists[-1])
        self._lists[-1] = str(number + 1)
        return f"{number}. "

    def _end_cell(self) -> None:
        text = clean_line(self._take_words())
        table = self._tables[-1]
        if self._columns_spanned and table.rows:
            table.rows[-1] += [text] + [""] * (self._columns_spanned - 1)
        elif text:
            table.rows.append([text])
        self._columns_spanned = 0

    def _end_caption(self) -> None:
        caption = clean_line(self._take_words())
        if caption:
            self.pieces.append(self._mark(_Piece("paragraph", caption)))

    def _end_table(self) -> None:
        text = clean_line(self._take_words())
        table = self._tables.pop()
        if text:
            if not table.rows:
                table.rows.append([])
            table.rows[-1].append(text)
        widest = max((len(row) for row in table.rows), default=0)
        if widest <= 1:  # a table used for layout
            for row in table.rows:
                for cell in row:
                    self.pieces.append(self._copy_mark(_Piece("paragraph", cell), table))
        else:
            self.pieces.append(table)
        self._columns_spanned = 1 if self._tables else 0

    def _copy_mark(self, piece: _Piece, like: _Piece) -> _Piece:
        piece.is_aside, piece.is_main = like.is_aside, like.is_main
        return piece

    def choose_main(self) -> list[_Piece]:
        """The pieces that are the page's content; all of them where that can't be told."""
        pieces = [piece for piece in self.pieces if piece.length]
        content = [piece for piece in pieces if not piece.is_aside]
        total = sum(piece.length for piece in content)
        main = [piece for piece in content if piece.is_main]
        if main and sum(piece.length for piece in main) >= _MIN_MAIN_SHARE * total:
            return main
        return content if total else pieces


def _is_hidden(attributes: dict[str, str]) -> bool:
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    style = attributes.get("style", "")
    return "display" in style and bool(re.search(r"display\s*:\s*none", style))


def _collapse(text: str) -> str:
    return re.sub(r"\s+", " ", text)
