"""Reads scanned pages with tesseract, where it is installed; without it, pages are only reported.

Chinese and English together need tesseract's language files chi_sim (or chi_tra) and eng.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

from ingest.layout import Gap, Line

# Each stands in a warning that is kept with the file, and tells `can_be_read_now` what to wait for.
HOW_TO = "install tesseract with its languages chi_sim and eng to have it read"
ADD_CHINESE = "add tesseract's language chi_sim for Chinese"
_OUT_OF_TIME = "not read for want of time; give a longer --timeout than"
_TIME_GIVEN = re.compile(re.escape(_OUT_OF_TIME) + r" (\d+)")

DPI = 300
_MAX_PIXELS = 40_000_000  # of a page's picture; a larger page is drawn coarser
_LANGUAGES = ("chi_sim", "chi_tra", "eng")
_CHINESE = frozenset(_LANGUAGES[:2])
_PAGE_SECONDS = 60.0
_MIN_CONFIDENCE = 35.0  # of 100, of a line; below, a picture's texture was taken for letters
_GOOD_CONFIDENCE = 75.0  # of a page; below, it may lie on its side or stand on its head
_QUOTE_CONFIDENCE = 70.0  # of a word with a quote in front; below, it was a speck in a wide space
_TITLE_SIZE = 1.45  # times the usual height, from which a line is set larger; tight boxes differ
_HAN = "\u3001-\u3029\u3400-\u9fff\uff01-\uff60“”"
_IS_HAN = re.compile(f"[{_HAN}]")
_AMONG_HAN = re.compile(rf"(?<=[{_HAN}])\s*([,;:!?])\s*(?=[{_HAN}]|$)")
_NUMBER = r"第[零〇一二三四五六七八九十百千\d]{1,9}[编章节条]"  # with a wide space behind it in print
_NUMBER_END = re.compile(_NUMBER + "$")
_NUMBER_AND_SPECK = re.compile(rf"^({_NUMBER})[“”\"']")
_IN_BRACKETS = re.compile(rf"\s*\(\s*([{_HAN}\d]{{1,12}})\s*\)\s*(?=[{_HAN}])")
_WIDE_MARKS = str.maketrans(",;:!?", "，；：！？")

_deadline: float | None = None
_seconds_given = 0.0


def limit_time(seconds: float, *, given: float) -> None:
    """All pages of the next file together get this long, of the time `given` for the file."""
    global _deadline, _seconds_given
    _deadline, _seconds_given = time.monotonic() + seconds, given


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read on a page, or in words why nothing was. `confidence` is from 0 to 100."""

    lines: list[Line] = field(default_factory=list)
    confidence: float = 0.0
    trouble: str = ""


class _Failed(Exception):
    """The program gave no result; the message says why."""


@dataclass(frozen=True, slots=True)
class Tesseract:
    """The program and the languages it is asked for, such as "chi_sim+eng"."""

    program: str
    languages: str

    @property
    def reads_chinese(self) -> bool:
        return not _CHINESE.isdisjoint(self.languages.split("+"))

    def read(self, page: Any) -> Reading:
        """The lines of a page (of pypdfium2), in points from its lower left corner.

        A page that is hardly legible is turned as its letters stand, and read again.
        """
        try:
            picture, dpi = _draw(page)
            best = self._read_picture(picture, dpi)
            if best.confidence < _GOOD_CONFIDENCE:
                turn = self._find_turn(picture)
                if turn:
                    turned = self._read_picture(picture.rotate(-turn, expand=True), dpi)
                    if turned.confidence > best.confidence:
                        best = turned
        except _Failed as error:
            return Reading(trouble=str(error))
        return best if best.lines else Reading(trouble="without text that OCR could find")

    def _read_picture(self, picture: Any, dpi: int) -> Reading:
        options = ["-l", self.languages, "--dpi", str(dpi), "tsv"]
        return read_tsv(self._run(picture, options), picture.height, dpi)

    def _find_turn(self, picture: Any) -> int:
        """By how many degrees to the right the picture has to be turned for its letters to stand."""
        try:
            found = self._run(picture, ["--psm", "0"])
        except _Failed:  # too few letters to tell, or the data for it (osd) is not installed
            return 0
        match = re.search(r"^Rotate: (\d+)", found, re.MULTILINE)
        return int(match[1]) if match else 0

    def _run(self, picture: Any, options: list[str]) -> str:
        left = _PAGE_SECONDS if _deadline is None else min(_PAGE_SECONDS, _deadline - time.monotonic())
        out_of_time = f"{_OUT_OF_TIME} {_seconds_given:.0f}"
        if left <= 1:
            raise _Failed(out_of_time)
        data = io.BytesIO()
        picture.save(data, format="PPM")
        try:
            done = subprocess.run(
                [self.program, "stdin", "stdout", *options],
                input=data.getvalue(), capture_output=True, timeout=left, check=True,
                # Its threads cost more than they bring, and files are read side by side anyway.
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except subprocess.TimeoutExpired as error:
            raise _Failed(out_of_time if left < _PAGE_SECONDS else "too intricate for OCR") from error
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
            raise _Failed(f"not read, tesseract failed ({said[:120]})") from error
        except OSError as error:
            raise _Failed(f"not read, tesseract failed ({error.strerror})") from error
        return done.stdout.decode("utf-8", "replace")


def _draw(page: Any) -> tuple[Any, int]:
    """The page as a grey picture, and how many dots an inch has in it."""
    width, height = page.get_size()
    scale = min(DPI / 72, math.sqrt(_MAX_PIXELS / max(1.0, width * height)))
    return page.render(scale=scale, grayscale=True).to_pil().convert("L"), max(1, round(72 * scale))


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


def can_be_read_now(warnings: tuple[str, ...], seconds: float) -> bool:
    """Whether pages that these warnings call unread can be read by what is there now."""
    said = "\n".join(warnings)
    times = [int(found) for found in _TIME_GIVEN.findall(said)]
    if times and seconds > max(times):
        return True
    if HOW_TO not in said and ADD_CHINESE not in said:
        return False
    tesseract = find_tesseract()
    return tesseract is not None and (HOW_TO in said or tesseract.reads_chinese)


def read_tsv(table: str, height: int, dpi: int = DPI) -> Reading:
    """Lines out of tesseract's table of words; `height` is the picture's, in pixels."""
    rows: dict[tuple[str, ...], list[_Word]] = {}
    for row in csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE):
        text = (row.get("text") or "").strip()
        if row.get("level") == "5" and text:
            key = (row["block_num"], row["par_num"], row["line_num"])
            rows.setdefault(key, []).append(_read_word(row, text, height, 72 / dpi))
    kept = [words for words in rows.values() if _confidence(words) >= _MIN_CONFIDENCE]
    lines = [_join_words(words) for words in kept]
    _level_heights(lines)
    return Reading(lines, _confidence([word for words in rows.values() for word in words]))


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    confidence: float
    x0: float
    x1: float
    y0: float
    y1: float


def _read_word(row: dict[str, str], text: str, height: int, scale: float) -> _Word:
    left, top = float(row["left"]), float(row["top"])
    return _Word(
        text, float(row["conf"]), left * scale, (left + float(row["width"])) * scale,
        (height - top - float(row["height"])) * scale, (height - top) * scale,
    )


def _confidence(words: list[_Word]) -> float:
    """The mean, each word as much as it has characters."""
    characters = sum(len(word.text) for word in words)
    return sum(word.confidence * len(word.text) for word in words) / max(1, characters)


def _join_words(words: list[_Word]) -> Line:
    size = median(word.y1 - word.y0 for word in words)
    line = Line("", words[0].x0, words[0].x1, min(w.y0 for w in words), max(w.y1 for w in words))
    part = words[0].text  # what stands between two wide spaces
    for word in words[1:]:
        text = word.text
        gap = word.x0 - line.x1
        if gap > size or gap > 0.5 * size and _NUMBER_END.fullmatch(part):
            line.text += _tidy_chinese(part)
            line.gaps.append(Gap(len(line.text), len(line.text) + 1, line.x1, word.x0))
            line.text += " "
            is_speck = word.confidence < _QUOTE_CONFIDENCE
            part = text.lstrip("“”\"'") or text if is_speck else text
        else:
            # Chinese comes a word or a character at a time, and has no spaces.
            is_han = _IS_HAN.match(part[-1]) and _IS_HAN.match(text)
            part += ("" if is_han else " ") + text
        line.x1 = max(line.x1, word.x1)
    line.text += _tidy_chinese(part)
    return line


def _tidy_chinese(text: str) -> str:
    """Marks between Chinese characters as Chinese writes them, without the spaces around them."""
    if _IS_HAN.search(text):
        text = _NUMBER_AND_SPECK.sub(r"\1 ", text)
        text = _AMONG_HAN.sub(lambda match: match[1].translate(_WIDE_MARKS), text)
        text = _IN_BRACKETS.sub(r"（\1）", text)
    return text


def _level_heights(lines: list[Line]) -> None:
    """Give lines of nearly one size one height.

    A word's box is as tight as its letters: "more" is lower than "Type", and neither is a title.
    """
    if not lines:
        return
    usual = median(line.height for line in lines for _ in line.text)
    for line in lines:
        if usual / 2 < line.height < _TITLE_SIZE * usual:
            middle = (line.y0 + line.y1) / 2
            line.y0, line.y1 = middle - usual / 2, middle + usual / 2
