"""A PDF page as a picture, with passages marked on it."""

from __future__ import annotations

import io
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

from rag.errors import LoadError

_SCALE = 1.8  # pixels a point: sharp on a screen, some 200 kB a page
_MARK = (250, 204, 64)
_LEAST_FOUND = 0.7  # of a quote's characters, in one stretch or a few
# PDFium must not be used by two threads at once.
_PDFIUM = threading.Lock()

Box = tuple[float, float, float, float]  # left, bottom, right, top in points


@dataclass(frozen=True, slots=True)
class PagePicture:
    """`num_found` counts the quotes that were found on the page and marked."""

    png: bytes
    num_found: int


@lru_cache(maxsize=32)
def _draw(file: Path, changed: int, page_number: int, quotes: tuple[str, ...]) -> PagePicture:
    import pypdfium2

    with _PDFIUM:
        pdf = pypdfium2.PdfDocument(file)
        try:
            page = pdf[page_number - 1]
            boxes, num_found = _find_boxes(page.get_textpage(), quotes)
            image = page.render(scale=_SCALE).to_pil().convert("RGB")
            width, height = page.get_size()
        finally:
            pdf.close()
    if boxes:
        image = _mark(image, boxes, width, height)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return PagePicture(out.getvalue(), num_found)


def draw_page(file: Path, page_number: int, quotes: tuple[str, ...]) -> PagePicture:
    """A page (1-based) with the quotes marked that stand on it.

    Raises LoadError where the file has no such page, or is no PDF any more.
    """
    import pypdfium2

    try:
        return _draw(file, file.stat().st_mtime_ns, page_number, quotes)
    except (pypdfium2.PdfiumError, IndexError, OSError) as error:
        raise LoadError(f"page {page_number} of {file.name} can't be drawn: {error}") from error


def _mark(image: Any, boxes: Sequence[Box], width: float, height: float) -> Any:
    """Colour the boxes as a text marker would: light gets tinted, ink stays."""
    from PIL import Image, ImageChops, ImageDraw

    layer = Image.new("RGB", image.size, (255, 255, 255))
    draw = ImageDraw.Draw(layer)
    across, down = image.width / width, image.height / height
    for left, bottom, right, top in boxes:
        draw.rounded_rectangle(
            (left * across - 2, (height - top) * down - 2, right * across + 2, (height - bottom) * down + 2),
            radius=3, fill=_MARK,
        )
    return ImageChops.multiply(image, layer)


def _find_boxes(textpage: Any, quotes: Sequence[str]) -> tuple[list[Box], int]:
    """A box for each line of each quote that stands on the page.

    The text that was extracted differs from the page's in spaces, hyphens and the order of a few
    signs, so letters are compared without them.
    """
    letters: list[str] = []
    places: list[int] = []  # the page's character number for each letter
    raw = textpage.get_text_range()
    for number in range(min(textpage.count_chars(), len(raw))):
        for letter in _letters(raw[number]):
            letters.append(letter)
            places.append(number)
    page_text = "".join(letters)
    boxes: list[Box] = []
    num_found = 0
    for quote in quotes:
        wanted = "".join(_letters(quote))
        ranges = _find_ranges(page_text, wanted)
        if ranges:
            num_found += 1
            for start, end in ranges:
                boxes += _lines([textpage.get_charbox(places[at]) for at in range(start, end)])
    return boxes, num_found


def _letters(value: str) -> str:
    folded = unicodedata.normalize("NFKC", value)
    return "".join(sign for sign in folded if not sign.isspace() and sign not in "-\u00ad\u2010\u2011\ufffe\x02")


def _find_ranges(page_text: str, wanted: str) -> list[tuple[int, int]]:
    """Where the letters stand: in one stretch, or in the few that hold most of them."""
    if not wanted:
        return []
    start = page_text.find(wanted)
    if start >= 0:
        return [(start, start + len(wanted))]
    least = min(6, len(wanted))
    blocks = SequenceMatcher(None, page_text, wanted, autojunk=False).get_matching_blocks()
    ranges = [(block.a, block.a + block.size) for block in blocks if block.size >= least]
    found = sum(end - start for start, end in ranges)
    return ranges if found >= _LEAST_FOUND * len(wanted) else []


def _lines(boxes: Sequence[Box]) -> list[Box]:
    """Boxes of characters joined where they stand on one line."""
    lines: list[Box] = []
    for left, bottom, right, top in boxes:
        if right <= left or top <= bottom:
            continue
        if lines:
            a, b, c, d = lines[-1]
            is_beside = min(d, top) - max(b, bottom) > 0.3 * min(d - b, top - bottom)
            if is_beside and left - c < 4 * (top - bottom) and left > a - 1:
                lines[-1] = (a, min(b, bottom), max(c, right), max(d, top))
                continue
        lines.append((left, bottom, right, top))
    return lines
