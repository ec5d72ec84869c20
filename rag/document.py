"""What flows from a file to the knowledge base: Document, Page, Heading, Chunk.

Every offset counts characters (Python string indices) in `Document.text`, the text that was
extracted from the file and that is shown to the reader. A chunk is always a slice of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a paginated file. `number` is 1-based; [start, end) are offsets into the text."""

    number: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading found by the loader. `level` is 1 for the highest; `start` is its offset."""

    level: int
    title: str
    start: int


@dataclass(frozen=True, slots=True)
class Document:
    """One file as text. `path` is relative to the ingested folder, with forward slashes."""

    path: str
    text: str
    media_type: str  # "pdf", "docx", "html", "md", "txt", ...
    title: str = ""
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    warnings: tuple[str, ...] = ()

    def page_at(self, offset: int) -> int | None:
        """The 1-based page that holds the character at `offset`; None in a file without pages."""
        found = None
        for page in self.pages:
            if page.start > offset:
                break
            found = page.number
        return found


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage: `text == document.text[start:end]`, with the place it came from.

    `page` and `last_page` are the 1-based pages of its first and last character, None where the
    file has none. `headings` is the path of headings above it, highest first.
    """

    path: str
    text: str
    start: int
    end: int
    page: int | None = None
    last_page: int | None = None
    headings: tuple[str, ...] = ()
    title: str = ""

    @property
    def place(self) -> str:
        """Title and heading path as one line, without saying the same twice."""
        parts: list[str] = []
        for part in (self.title, *self.headings):
            if part and part not in parts:
                parts.append(part)
        return " > ".join(parts)

    @property
    def indexed_text(self) -> str:
        """What is embedded and searched: where the passage stands, then its words."""
        place = self.place
        return f"{place}\n{self.text}" if place else self.text

    @property
    def id(self) -> str:
        """16 hex digits that depend only on place and text, so that two ingests agree."""
        key = f"{self.path}\0{self.start}\0{self.end}\0{self.text}"
        return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
