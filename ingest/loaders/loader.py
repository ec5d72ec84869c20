"""What every loader is: one file format to one Document."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rag.document import Document


class Loader(Protocol):
    """Reads the formats named by `suffixes`.

    `version` is raised whenever the text or the headings it extracts change: files that an older
    version loaded are then loaded again at the next ingest.
    """

    media_type: str
    suffixes: tuple[str, ...]
    version: int

    def load(self, file: Path, path: str) -> Document:
        """The file as a document whose path is `path`.

        Raises LoadError with one clear line where the file can't be read as this format.
        """
        ...
