"""Files that come through the page: checked, given harmless names, kept in one folder."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ingest.loaders import LOADERS, find_loader
from rag.errors import InputError

MAX_FILES = 200  # at a time
MAX_MEGABYTES = 50  # each; .streamlit/config.toml stops larger ones before they are sent
MAX_TOTAL_MEGABYTES = 400  # at a time, all together: they pass through memory
_MAX_DEPTH = 8  # folders within an uploaded folder
_MAX_NAME_BYTES = 180  # file systems take 255; a number and a temporary name must still fit
_ZIPPED = frozenset(
    {".docx", ".docm", ".pptx", ".pptm", ".xlsx", ".xlsm", ".epub", ".zip", ".odt", ".odp", ".ods"}
)
_RESERVED = re.compile(r"^(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", re.IGNORECASE)

# What editors leave beside a file: a copy of before, one not yet saved, a mark that it is open.
_LEFTOVER = re.compile(r".*~|#.*#|~\$.*", re.DOTALL)

Reason = Literal["too_large", "empty_file", "leftover", "same_name", "wrong_type", "not_what_it_says"]


@dataclass(frozen=True, slots=True)
class Rejection:
    name: str
    reason: Reason
    megabytes: float = 0.0


def upload_folder(kb: str | Path) -> Path:
    """Where a knowledge base keeps what was uploaded to it; inside its own folder."""
    return Path(kb) / "uploads"


def suffixes() -> list[str]:
    """Endings that can be read, such as ".pdf"."""
    return sorted({suffix for loader in LOADERS for suffix in loader.suffixes})


def common_suffixes() -> list[str]:
    """Those of them that most people have, the usual ones first."""
    known = set(suffixes())
    usual = ".pdf .docx .pptx .xlsx .html .md .txt .csv .json .epub .eml .ipynb .zip".split()
    return [suffix for suffix in usual if suffix in known]


def sanitise_name(name: str) -> str:
    """A name that is one plain file in any folder on any system.

    Folders, control characters, signs with a meaning to file systems, and dots and spaces at
    either end go; letters of every script stay.
    """
    name = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(
        "_" if sign in '<>:"|?*' else sign
        for sign in name
        if unicodedata.category(sign)[0] != "C"
    )
    kept = re.sub(r"\s+", " ", kept).strip(". ").removeprefix("~$").strip(". ")
    stem, dot, suffix = kept.rpartition(".")
    if not dot:
        stem, suffix = kept, ""
    if not stem.strip("~$# ") or _RESERVED.match(kept):
        stem = f"file {stem}".strip()
    limit = _MAX_NAME_BYTES - len(suffix.encode()) - 1
    stem = stem.encode()[: max(1, limit)].decode(errors="ignore").rstrip(". ")
    return f"{stem}.{suffix}" if suffix else stem


def sanitise_path(name: str) -> str:
    """The path of a file within an uploaded folder, every part of it made a plain name.

    What leads upwards or to a root goes, so that it stays in the folder it is put into; of a deeper
    one the folders next to the file are kept.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part.strip(". ")]
    return "/".join(sanitise_name(part) for part in parts[-1 - _MAX_DEPTH :]) or sanitise_name("")


def check_upload(name: str, data: bytes) -> Rejection | None:
    """Why a file is not taken, or None. Judges the content, not only the name."""
    megabytes = len(data) / 2**20
    if megabytes > MAX_MEGABYTES:
        return Rejection(name, "too_large", megabytes)
    if not data:
        return Rejection(name, "empty_file")
    # As it was given: without its signs a leftover would have the name of the file itself, and replace it.
    if _LEFTOVER.fullmatch(name.replace("\\", "/").rsplit("/", 1)[-1].strip()):
        return Rejection(name, "leftover")
    clean = sanitise_name(name)
    if find_loader(clean) is None:
        return Rejection(name, "wrong_type")
    suffix = Path(clean).suffix.lower()
    if suffix == ".pdf":
        is_right = b"%PDF-" in data[:1024]
    elif suffix in _ZIPPED:
        is_right = data[:4] == b"PK\x03\x04"
    else:
        is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        is_right = is_utf16 or b"\x00" not in data[:65536]
    return None if is_right else Rejection(name, "not_what_it_says")


class UploadBatch:
    """Files that are given together. One of an earlier batch is replaced, one of the same batch never is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: set[tuple[int, int]] = set()  # by number: some systems take A.md and a.md for one file

    def take(self, name: str, data: bytes) -> Rejection | None:
        """Store a file, or say why it is not taken. Raises InputError as `store_upload` does."""
        rejection = check_upload(name, data)
        if rejection is None and _numbers(self._folder / sanitise_path(name)) & self._stored:
            rejection = Rejection(name, "same_name")
        if rejection is None:
            self._stored |= _numbers(store_upload(self._folder, name, data))
        return rejection


def _numbers(file: Path) -> set[tuple[int, int]]:
    """The file's number on its disk; empty where it is not there."""
    try:
        found = file.lstat()
    except OSError:
        return set()
    return {(found.st_dev, found.st_ino)}


def store_upload(folder: Path, name: str, data: bytes) -> Path:
    """Write an accepted file; one of the same path is replaced. Returns where it is.

    Raises InputError where a file or link stands in the place of one of its folders.
    """
    target = folder / sanitise_path(name)
    place = folder
    place.mkdir(parents=True, exist_ok=True)
    for part in target.parent.relative_to(folder).parts:
        place = place / part
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InputError(f"{place.name} in {place.parent} is not a folder; {name} was not stored.")
        place.mkdir(exist_ok=True)
    handle, fresh = tempfile.mkstemp(dir=place, prefix=".upload-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(fresh, target)  # a link of that name is replaced, not followed
    except BaseException:
        os.unlink(fresh)
        raise
    return target


def uploaded_names(folder: Path) -> list[str]:
    """The files that were uploaded, as paths within the folder. Links are not followed."""
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(place).relative_to(folder)
        names += [
            (inner / name).as_posix() for name in files
            if not name.startswith(".") and not (Path(place) / name).is_symlink()
        ]
    return sorted(names)


def delete_uploads(folder: Path, names: Iterable[str]) -> list[str]:
    """Delete files of these names; a name that is not in the folder is left alone."""
    present = set(uploaded_names(folder))
    deleted: list[str] = []
    for name in names:
        if name in present:
            (folder / name).unlink(missing_ok=True)
            deleted.append(name)
    for place, _, _ in os.walk(folder, topdown=False):
        if place != str(folder) and not os.listdir(place):
            os.rmdir(place)
    return deleted
