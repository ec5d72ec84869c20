"""HTML: the text a reader sees, with headings, lists, tables and code; no scripts, no navigation.

The page is read as a stream of tags, never as a tree: a megabyte of nested tags costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
_BLOCKS = frozenset(
    """address article aside blockquote body center dd details div dl dt fieldset figcaption figure
    footer form header hr html li main nav ol p pre section summary table tbody td tfoot th thead
    tr ul caption h1 h2 h3 h4 h5 h6 br""".split()
)
_HEADING = re.compile(r"h[1-6]")
_VOID = frozenset("br hr img input meta link col area base embed source track wbr".split())
_FURNITURE_TAGS = frozenset("nav header footer aside".split())
_FURNITURE_ROLES = {
    "navigation": "nav", "search": "nav", "banner": "header", "contentinfo": "footer",
    "complementary": "aside",
}
_MIN_MAIN_SHARE = 0.8  # of the visible text, for <main> or <article> to be taken as the page
_MOSTLY = 0.5  # of a text, from which it is mostly links
_MIN_FURNITURE_TOLD = 100  # characters beside the links, for a footer or the like to be missed
_MAX_REPEATED = 200  # characters of a cell that is repeated in each row it spans
_MAX_SPANNED = 1000  # rows
_MAX_SPANNED_COLUMN = 100
_NOTE_MARK = re.compile(r"(?i)foot-?note|end-?note|note-?ref|\breference\b|\bcitation\b")
_NOTE_LINK = re.compile(r"(?i)foot-?note-?ref|\bnote-?ref|\bdoc-noteref\b")
_BEFORE_EXPONENT = re.compile(r"(?:[^\W_]|[)\]}]|\d[ \t]+)\Z")
_BEFORE_MARK = re.compile(r"[^\W_]\Z|[.,;:!?。，；：！？”’\"»]\Z")
_BEFORE_NOTE = re.compile(r"[.,;:!?。，；：！？”’\"»]\Z")
_WORD_ENDING = re.compile(r"[^\W\d_]{2,}\.?|[aeoªº]")  # "1st", "M<sup>me</sup>", "n<sup>o</sup>"
_INNER_SIGN = re.compile(r"\S[\s+\-−–,*/·×]+\S")
_XML_DECLARATION = re.compile(r"^\s*<\?xml[^>]*\?>")


class HtmlLoader:
    """.html files: the content of <main> or <article> where the page has one, else all of it."""

    media_type = "html"
    suffixes: tuple[str, ...] = (".html", ".htm", ".xhtml", ".shtml")
    version = 3

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


def add_html(builder: DocumentBuilder, html: str, *, is_book: bool = False) -> str:
    """Add a page's text to the builder. Returns its title. In a book, asides are notes and boxes."""
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
    chosen = page.choose_main(is_book=is_book)
    for piece in chosen:
        piece.add_to(builder)
    if num_missed := page.count_missed(chosen):
        builder.warnings.append(
            f"{num_missed:,} characters that stand beside the page's main part were left out"
        )
    return clean_line(page.title)


class _Furniture:
    """A part that is marked up as standing beside the content: navigation, header, footer, aside."""

    __slots__ = ("has_title", "is_inside", "kind", "length", "linked", "outer")

    def __init__(self, kind: str, outer: _Furniture | None, *, is_inside: bool) -> None:
        self.kind = kind  # "nav", "header", "footer" or "aside"
        self.outer = outer
        self.is_inside = is_inside  # of the main part, or of a section: it is that part's own
        self.has_title = False  # it holds an <h1>
        self.length = self.linked = 0  # characters, without those of furniture inside of it


class _Piece:
    """A block of the page: a heading, a paragraph, or a table. `linked`: characters in links."""

    __slots__ = ("furniture", "is_main", "kind", "level", "linked", "rows", "text")

    def __init__(self, kind: str, text: str = "", level: int = 0) -> None:
        self.kind = kind
        self.text = text
        self.level = level
        self.rows: list[list[str]] = []
        self.furniture: _Furniture | None = None
        self.is_main = False
        self.linked = 0

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


class _Grid:
    """A table's rows as they are read; a cell over several rows stands in each of them."""

    def __init__(self, piece: _Piece) -> None:
        self.piece = piece
        self._spans: dict[int, tuple[int, str]] = {}  # column -> (its last row, text)

    @property
    def rows(self) -> list[list[str]]:
        return self.piece.rows

    def begin_row(self) -> None:
        self.end_row()
        self.rows.append([])

    def end_row(self) -> None:
        if self.rows and self.rows[-1]:
            self._fill()

    def begin_group(self) -> None:
        """No cell reaches from the head of a table into its body."""
        self.end_row()
        self._spans.clear()

    def add_cell(self, text: str, num_columns: int, num_rows: int) -> None:
        self._fill()
        row = self.rows[-1]
        if num_rows > 1 and len(row) < _MAX_SPANNED_COLUMN:
            last = len(self.rows) - 1 + num_rows - 1
            self._spans[len(row)] = last, text if len(text) <= _MAX_REPEATED else ""
            for column in range(len(row) + 1, len(row) + num_columns):
                self._spans[column] = last, ""
        row += [text] + [""] * (num_columns - 1)

    def _fill(self) -> None:
        """Cells from the rows above, as far as they stand next in this row."""
        row = self.rows[-1]
        while (span := self._spans.get(len(row))) and len(self.rows) - 1 <= span[0]:
            row.append(span[1])


class _Raised:
    """An open <sup>, or a link that may lead to a note: where in the words it begins."""

    __slots__ = ("is_note", "start")

    def __init__(self, start: int, *, is_note: bool) -> None:
        self.start = start
        self.is_note = is_note


class _Page:
    """Receives the parser's events (lxml's target interface) and collects the pieces."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.title = ""
        self._words: list[str] = []
        self._hidden = 0  # how many open tags hide what is inside
        self._open: list[tuple[str, str]] = []  # (tag, what it changed)
        self._furniture: list[_Furniture] = []  # those that are open
        self._main = self._sections = self._pre = 0
        self._raised: list[_Raised] = []
        self._links: list[int] = []  # where in the words the open ones begin
        self._linked = 0  # characters in links since the last piece
        self._in_title = False
        self._heading = 0
        self._lists: list[str] = []  # "ul" or the next number of an "ol"
        self._marker = ""
        self._tables: list[_Grid] = []
        self._columns_spanned = self._rows_spanned = 1

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
            return self._open_inline(tag, attributes)
        if self._tables:
            return self._open_in_table(tag, attributes)
        self.flush()
        if _HEADING.fullmatch(tag):
            self._heading = int(tag[1])
            if tag == "h1" and self._furniture:
                self._furniture[-1].has_title = True
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
            self._tables.append(_Grid(self._mark(_Piece("table"))))
            return "table"
        role = attributes.get("role") or ""
        kind = tag if tag in _FURNITURE_TAGS else _FURNITURE_ROLES.get(role, "")
        # A header inside of the article is the article's own.
        if kind and not (tag in ("header", "footer") and self._main):
            is_inside = self._main > 0 or kind in ("header", "footer") and self._sections > 0
            outer = self._furniture[-1] if self._furniture else None
            self._furniture.append(_Furniture(kind, outer, is_inside=is_inside))
            return "furniture"
        if tag in ("main", "article") or role == "main":
            self._main += 1
            return "main"
        if tag == "section":
            self._sections += 1
            return "section"
        return ""

    def _open_inline(self, tag: str, attributes: dict[str, str]) -> str:
        marks = " ".join(attributes.get(name) or "" for name in ("class", "role", "epub:type"))
        if tag == "sup":
            opens_link = bool(self._links) and not "".join(self._words[self._links[-1] :]).strip()
            is_note = opens_link or bool(_NOTE_MARK.search(marks))
            self._raised.append(_Raised(len(self._words), is_note=is_note))
            return "raised"
        if tag == "a" and "href" in attributes:
            if self._raised:
                self._raised[-1].is_note = True
            self._links.append(len(self._words))
            is_note = bool(_NOTE_LINK.search(marks))
            if not is_note and "#" not in (attributes["href"] or ""):
                return "link"
            self._raised.append(_Raised(len(self._words), is_note=is_note))
            return "link within"
        return ""

    def _open_in_table(self, tag: str, attributes: dict[str, str]) -> str:
        table = self._tables[-1]
        if tag == "table":  # a table inside of a cell: its rows go on in a table of their own
            self._end_cell()
            self._tables.append(_Grid(self._mark(_Piece("table"))))
            return "table"
        if tag == "tr":
            self._end_cell()
            table.begin_row()
        elif tag in ("td", "th"):
            self._end_cell()
            if not table.rows:
                table.begin_row()
            self._columns_spanned = max(1, _read_span(attributes.get("colspan"), 50))
            # 0 is as far as the table goes
            self._rows_spanned = _read_span(attributes.get("rowspan"), _MAX_SPANNED) or _MAX_SPANNED
            return "cell"
        elif tag == "caption":
            return "caption"
        else:
            if tag in ("thead", "tbody", "tfoot"):
                table.begin_group()
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
        elif effect in ("link", "link within", "raised"):
            self._close_inline(effect)
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
            elif effect == "furniture":
                self._furniture.pop()
            elif effect == "main":
                self._main -= 1
            elif effect == "section":
                self._sections -= 1

    def _close_inline(self, effect: str) -> None:
        if effect != "raised":
            self._links.pop()
        if effect != "link" and self._raised:
            raised = self._raised.pop()
            text = "".join(self._words[raised.start :])
            before = "".join(self._words[max(0, raised.start - 8) : raised.start])
            if effect == "link within":
                # Style sheets raise it: "900<a href='#note'>1</a>".
                raised.is_note |= text.isdecimal() and bool(_BEFORE_MARK.search(before))
            if effect == "raised" or raised.is_note:
                text = _write_raised(before, text, is_note=raised.is_note)
            self._words[raised.start :] = [text]

    def data(self, data: str) -> None:
        if self._in_title:
            self.title += data
        elif not self._hidden:
            text = data if self._pre else _collapse(data)
            self._words.append(text)
            if self._links:
                self._linked += len(text.strip())

    def comment(self, text: str) -> None:
        pass

    def pi(self, target: str, data: str | None = None) -> None:
        pass

    def close(self) -> None:
        while self._open:
            self._close(*self._open.pop())

    # pieces
    def _mark(self, piece: _Piece) -> _Piece:
        piece.furniture = self._furniture[-1] if self._furniture else None
        piece.is_main = self._main > 0
        return piece

    def _add(self, piece: _Piece) -> None:
        """Append a piece, and count it for the part it stands in."""
        piece.linked = min(piece.length, self._linked)
        self._linked -= piece.linked
        if piece.furniture is not None:
            piece.furniture.length += piece.length
            piece.furniture.linked += piece.linked
        self.pieces.append(piece)

    def _take_words(self) -> str:
        text = "".join(self._words)
        self._words = []
        self._raised = []  # a block inside of one ends it
        self._links = [0] * len(self._links)
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
            self._add(self._mark(_Piece("code", text)))
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
        self._add(self._mark(piece))
        self._linked = 0

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
            table.add_cell(text, self._columns_spanned, self._rows_spanned)
        elif text:
            table.rows.append([text])
        self._columns_spanned = 0

    def _end_caption(self) -> None:
        caption = clean_line(self._take_words())
        if caption:
            self._add(self._mark(_Piece("paragraph", caption)))

    def _end_table(self) -> None:
        text = clean_line(self._take_words())
        grid = self._tables.pop()
        if text:
            if not grid.rows:
                grid.begin_row()
            grid.rows[-1].append(text)
        grid.end_row()
        table = grid.piece
        widest = max((len(row) for row in table.rows), default=0)
        if widest <= 1:  # a table used for layout
            for row in table.rows:
                for cell in row:
                    self._add(self._copy_mark(_Piece("paragraph", cell), table))
        else:
            self._add(table)
        self._linked = 0
        self._columns_spanned = 1 if self._tables else 0
        self._rows_spanned = 1

    def _copy_mark(self, piece: _Piece, like: _Piece) -> _Piece:
        piece.furniture, piece.is_main = like.furniture, like.is_main
        return piece

    # what is the page's content
    def choose_main(self, *, is_book: bool = False) -> list[_Piece]:
        """The pieces that are the page's content; all of them where that can't be told."""
        pieces = [piece for piece in self.pieces if piece.length]
        main = [piece for piece in pieces if piece.is_main]
        has_title = any(piece.kind == "heading" and piece.level == 1 for piece in main)

        def is_kept(part: _Furniture | None) -> bool:
            if part is None:
                return True
            if part.kind == "nav" or _is_mostly_links(part.length, part.linked):
                return False
            is_own = part.is_inside or is_book and part.kind == "aside"
            is_title = part.kind == "header" and part.has_title and not has_title
            # Without a main part nothing says that the content is elsewhere.
            return (is_own or is_title or not main) and is_kept(part.outer)

        content = [piece for piece in pieces if is_kept(piece.furniture)]
        outside = [
            piece for piece in content
            if not piece.is_main and (piece.furniture is None or piece.furniture.is_inside)
        ]
        total = sum(piece.length for piece in content)
        num_outside = sum(piece.length for piece in outside)
        is_navigation = _is_mostly_links(num_outside, sum(piece.linked for piece in outside))
        if main and (is_navigation or total - num_outside >= _MIN_MAIN_SHARE * total):
            beside = set(map(id, outside))
            return [piece for piece in content if id(piece) not in beside]
        return content if total else pieces

    def count_missed(self, chosen: list[_Piece]) -> int:
        """Characters that were left out of the chosen pieces and are neither links nor navigation."""
        kept = set(map(id, chosen))
        left_out = [piece for piece in self.pieces if piece.length and id(piece) not in kept]
        beside = [piece for piece in left_out if piece.furniture is None]
        missed = _count_unlinked(beside)
        furniture = _count_unlinked(
            piece for piece in left_out
            if piece.furniture is not None and not _is_navigation(piece.furniture)
        )
        return missed + (furniture if furniture >= _MIN_FURNITURE_TOLD else 0)


def _is_navigation(part: _Furniture) -> bool:
    if _is_mostly_links(part.length, part.linked):
        return True
    inner: _Furniture | None = part
    while inner is not None and inner.kind != "nav":
        inner = inner.outer
    return inner is not None


def _is_mostly_links(length: int, linked: int) -> bool:
    return linked > 0 and linked >= _MOSTLY * length


def _count_unlinked(pieces: Iterable[_Piece]) -> int:
    """Characters outside of links; 0 where most of them are links."""
    pieces = list(pieces)
    length, linked = sum(piece.length for piece in pieces), sum(piece.linked for piece in pieces)
    return 0 if _is_mostly_links(length, linked) else length - linked


def _write_raised(before: str, text: str, *, is_note: bool) -> str:
    """A superscript as plain text that runs on behind `before`: "10^6", "[1]" for a mark of a note.

    What is set higher must not read as one more digit: 900 and a note 1 are not 9001.
    """
    mark = text.strip()
    space = " " if text[-1:].isspace() else ""
    if not mark or mark.startswith(("[", "^")) or _WORD_ENDING.fullmatch(mark) and not is_note:
        return text
    if is_note or mark.isdecimal() and _BEFORE_NOTE.search(before):
        return f"[{mark}]{space}"
    if not any(character.isalnum() for character in mark) or not _BEFORE_EXPONENT.search(before):
        return text
    return (f"^({mark})" if _INNER_SIGN.search(mark) else f"^{mark}") + space


def _read_span(value: str | None, largest: int) -> int:
    return min(largest, int(value)) if value and value.isdecimal() and len(value) < 6 else 1


def _is_hidden(attributes: dict[str, str]) -> bool:
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    style = attributes.get("style", "")
    return "display" in style and bool(re.search(r"display\s*:\s*none", style))


def _collapse(text: str) -> str:
    return re.sub(r"\s+", " ", text)
