"""Write a file and read it with its loader, for the tests of formats."""

from __future__ import annotations

from pathlib import Path

from ingest.loaders import load_document
from rag.document import Document


def load(folder: Path, name: str, content: str | bytes) -> Document:
    file = folder / name
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return load_document(file, name)


def titles(document: Document) -> list[tuple[int, str]]:
    for heading in document.headings:
        assert 0 <= heading.start < len(document.text)
    return [(heading.level, heading.title) for heading in document.headings]
