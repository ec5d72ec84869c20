"""Looks into zip files (and the office formats, which are zip files) before anything is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

from rag.errors import LoadError

MAX_UNPACKED = 1 << 30  # bytes; more is taken for a zip bomb
MAX_RATIO = 200  # unpacked to packed; text seldom packs better than 20
_RATIO_MATTERS_FROM = 50 << 20  # bytes unpacked
_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def check_zip(file: Path, kind: str) -> None:
    """Raise LoadError where the file is no zip file, is protected, or unpacks to far too much.

    `kind` is what it should be, in words: "a Word document".
    """
    with file.open("rb") as stream:
        magic = stream.read(8)
    if magic == _OLE_MAGIC:
        raise LoadError(
            f"this is not {kind} of today's format: it is password-protected or was saved by an "
            "old Office. Open it and save it again without a password."
        )
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise LoadError(f"this is not {kind}, or it is damaged: {error}") from error
    unpacked = sum(member.file_size for member in members)
    packed = max(1, file.stat().st_size)
    if unpacked > MAX_UNPACKED or (
        unpacked > _RATIO_MATTERS_FROM and unpacked > MAX_RATIO * packed
    ):
        raise LoadError(
            f"it would unpack to {unpacked >> 20:,} MB from {packed >> 10:,} KB, "
            "which looks like a zip bomb. Unpack it by hand if it isn't one."
        )
    if any(member.flag_bits & 1 for member in members):
        raise LoadError("password-protected. Save it without a password and ingest it again.")
