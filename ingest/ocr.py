"""Reads scanned pages with tesseract, where it is installed; without it, pages are only reported.

Chinese and English together need tesseract's language files chi_sim (or chi_tra) and eng.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ingest.layout import Line

HOW_TO = "install tesseract with its languages chi_sim and eng to have it read"
DPI = 300
_LANGUAGES = ("chi_sim", "chi_tra", "eng")
_PAGE_SECONDS = 60.0
_MIN_CONFIDENCE = 30.0  # of 100; below, a picture's texture was taken for letters
_HAN = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")

_deadline: float | None = None


def limit_time(seconds: float) -> None:
    """All pages of the next file together get this long; pages beyond it stay unread."""
    global _deadline
    _deadline = time.monotonic() + seconds


@dataclass(frozen=True, slots=True)
class Tesseract:
    """The program and the languages it is asked for, such as "chi_sim+eng"."""

    program: str
    languages: str

    def read(self, picture: Any) -> list[Line]:
        """The lines of a page's picture (a PIL image at `DPI`), in points from the lower left.

        No lines where there is no time left or the program fails on it.
        """
        left = _PAGE_SECONDS if _deadline is None else min(_PAGE_SECONDS, _deadline - time.monotonic())
        if left <= 1:
            return []
        data = io.BytesIO()
        picture.save(data, format="PNG")
        try:
            done = subprocess.run(
                [self.program, "stdin", "stdout", "-l", self.languages, "--dpi", str(DPI), "tsv"],
                input=data.getvalue(), capture_output=True, timeout=left, check=True,
            )
        except (subprocess.SubprocessError, OSError):
            return []
        return read_tsv(done.stdout.decode("utf-8", "replace"), picture.height)


@lru_cache(maxsize=1)
def find_tesseract() -> Tesseract | None:
    """The installed program with the languages it has of those that are wanted."""
    program = shutil.which("tesseract")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--list-langs"], capture_output=True, timeout=20, check=True, text=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    there = set((done.stdout + done.stderr).split())
    languages = [language for language in _LANGUAGES if language in there]
    return Tesseract(program, "+".join(languages)) if languages else None


def read_tsv(table: str, height: int) -> list[Line]:
    """Lines out of tesseract's table of words; `height` is the picture's, in pixels."""
    scale = 72 / DPI
    lines: dict[tuple[str, ...], Line] = {}
    for row in csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE):
        word = (row.get("text") or "").strip()
        if row.get("level") != "5" or not word or float(row["conf"]) < _MIN_CONFIDENCE:
            continue
        key = (row["block_num"], row["par_num"], row["line_num"])
        x0, top = float(row["left"]) * scale, (height - float(row["top"])) * scale
        x1 = x0 + float(row["width"]) * scale
        bottom = top - float(row["height"]) * scale
        line = lines.get(key)
        if line is None:
            lines[key] = Line(word, x0, x1, bottom, top)
        else:
            # Chinese comes a word or a character at a time, and has no spaces.
            is_spaced = not (_HAN.search(line.text[-1]) and _HAN.search(word[0]))
            line.text += " " * is_spaced + word
            line.x1, line.y0, line.y1 = x1, min(line.y0, bottom), max(line.y1, top)
    return list(lines.values())
