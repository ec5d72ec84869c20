"""Plain text: the file's own characters, with its encoding found out."""

from __future__ import annotations

import re
from pathlib import Path

from ingest.encoding import decode_text, is_binary
from ingest.outline import find_counted_headings, find_numbered_headings
from rag.document import Document, Heading
from rag.errors import LoadError

_MAX_TITLE = 60  # characters
_TITLE_END = re.compile(r"[。！？；：，、.!?;:,|]$")
_MARKDOWN_HEADING = re.compile(r"^(#{1,6})[ \t]+(\S[^\n]*)$", re.MULTILINE)


class TextLoader:
    """.txt and files like it. Numbered chapters and articles become headings."""

    media_type = "txt"
    suffixes: tuple[str, ...] = (".txt", ".text", ".log", ".rst", ".srt", ".vtt", ".tex")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        headings = (
            find_numbered_headings(text)
            or _find_hash_headings(text)
            or find_counted_headings(text)
        )
        return Document(
            path, text, self.media_type, guess_title(text), headings=tuple(headings),
            warnings=tuple(warnings),
        )


def read_text(file: Path) -> tuple[str, list[str]]:
    """The file's text with line ends as \\n, and what the user should know about it."""
    data = file.read_bytes()
    if is_binary(data):
        raise LoadError("this is not text, whatever its name says; it holds binary data.")
    decoded = decode_text(data)
    text = normalise_lines(decoded.text)
    warnings = []
    bad = text.count("\ufffd")
    if bad > 0.1 * max(1, len(text)):
        raise LoadError(
            f"this is not text in a known encoding ({bad} of {len(text)} characters unreadable "
            f"as {decoded.encoding}). Save it as UTF-8."
        )
    if bad:
        warnings.append(f"{bad} unreadable characters (read as {decoded.encoding})")
    elif not decoded.is_certain:
        warnings.append(f"encoding taken to be {decoded.encoding}")
    return text, warnings


def normalise_lines(text: str) -> str:
    """Line ends as \\n; characters that no reader can see or store become a space."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")


def guess_title(text: str) -> str:
    """A short first line that ends in no mark and stands by itself."""
    first, _, rest = text.lstrip("\n").partition("\n")
    first = first.strip()
    stands_alone = not rest.split("\n", 1)[0].strip() and bool(rest.strip())
    if 0 < len(first) <= _MAX_TITLE and stands_alone and not _TITLE_END.search(first):
        return first.lstrip("# ")
    return ""


def _find_hash_headings(text: str) -> list[Heading]:
    """Many plain text files are markdown in all but name: at least three `# Title` lines."""
    found = list(_MARKDOWN_HEADING.finditer(text))
    levels = {len(match[1]) for match in found}
    if len(found) < 3 or levels == {1} and len(found) > text.count("\n") // 8:
        return []  # a script's comments
    return [Heading(len(m[1]), m[2].strip().rstrip("#").strip(), m.start()) for m in found]
