"""Which loader reads which file. Importing this imports no parser: each loader does when it loads."""

from __future__ import annotations

import lzma
import re
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

from ingest.builder import clean_line
from ingest.loaders.archives import EmailLoader, EpubLoader, ZipLoader
from ingest.loaders.code import CodeLoader
from ingest.loaders.docx import DocxLoader
from ingest.loaders.html import HtmlLoader
from ingest.loaders.loader import Loader
from ingest.loaders.markdown import MarkdownLoader
from ingest.loaders.pdf import PdfLoader
from ingest.loaders.slides import PptxLoader
from ingest.loaders.structured import JsonLoader, NotebookLoader
from ingest.loaders.table import CsvLoader, XlsxLoader
from ingest.loaders.text import TextLoader
from rag.document import Document
from rag.errors import LoadError

LOADERS: tuple[Loader, ...] = (
    PdfLoader(), DocxLoader(), HtmlLoader(), MarkdownLoader(), TextLoader(), PptxLoader(),
    XlsxLoader(), CsvLoader(), JsonLoader(), NotebookLoader(), EpubLoader(), EmailLoader(),
    CodeLoader(), ZipLoader(),
)
_BY_SUFFIX = {suffix: loader for loader in LOADERS for suffix in loader.suffixes}
# What the parsers' libraries raise for torn and altered files. XML errors are SyntaxErrors.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, SyntaxError,
    struct.error, UnicodeError,
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TEXT_NAMES = frozenset("readme license licence notice authors changelog changes copying todo".split())
_HINTS = {
    ".doc": "Word's old format; save it as .docx",
    ".ppt": "PowerPoint's old format; save it as .pptx",
    ".xls": "Excel's old format; save it as .xlsx",
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg", ".ico"),
        "a picture; only documents are read",
    ),
    **dict.fromkeys((".mp3", ".mp4", ".wav", ".avi", ".mov", ".mkv", ".flac"), "sound or video"),
}

__all__ = ["LOADERS", "Loader", "find_loader", "load_document", "why_skipped"]


def find_loader(name: str) -> Loader | None:
    """The loader for a file of this name, None where its type is not known."""
    name = name.rsplit("/", 1)[-1].lower()
    stem, dot, suffix = name.rpartition(".")
    if not stem:  # no dot, or one at the start only
        return _BY_SUFFIX[".txt"] if name in _TEXT_NAMES else None
    return _BY_SUFFIX.get(dot + suffix)


def why_skipped(name: str) -> str:
    """One line on why a file without a loader is not read."""
    suffix = Path(name).suffix.lower()
    if suffix in _HINTS:
        return f"{suffix} is {_HINTS[suffix]}"
    return f"no loader for {suffix} files" if suffix else "no loader for files without a suffix"


def load_document(file: Path, path: str) -> Document:
    """Read one file with its loader; `path` becomes the document's path.

    Raises LoadError with one line that says why where it can't be read.
    """
    loader = find_loader(path) or find_loader(file.name)
    if loader is None:
        raise LoadError(why_skipped(file.name))
    try:
        document = loader.load(file, path)
    except OSError as error:
        raise LoadError(f"can't be opened: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise LoadError(f"the file is damaged: {clean_line(str(error))}") from error
    except RecursionError as error:
        raise LoadError("its parts are nested too deeply to be read") from error
    return _finish(document)


def _finish(document: Document) -> Document:
    """What holds for every format: text that can be stored as UTF-8, a warning where there's none."""
    document = replace(
        document, title=_mend(document.title), warnings=tuple(map(_mend, document.warnings)),
        headings=tuple(replace(heading, title=_mend(heading.title)) for heading in document.headings),
    )
    text = _mend(document.text)
    if text != document.text:
        if len(text) != len(document.text):  # pairs became one character: places have moved
            document = replace(document, pages=(), headings=())
        document = replace(document, text=text)
    if not text.strip() and not document.warnings:
        document = replace(document, warnings=("the file holds no text",))
    return document


def _mend(text: str) -> str:
    """Halves of characters, which UTF-8 does not know, put together or replaced."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
