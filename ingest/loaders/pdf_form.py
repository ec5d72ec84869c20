"""What is filled in a PDF's form: the text of its fields, put where it stands on the page."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ingest.builder import clean_line
from ingest.layout import Line

_MAX_OPTIONS = 1_000
_USUAL_SIZE = 12.0  # points, where the field doesn't name its type's size
_LETTER_WIDTH = 0.5  # of the type's size
_PASSWORD = 1 << 13  # flag of a text field
_UNSEEN = 1 << 1 | 1 << 5  # flags of an annotation: hidden, not shown on a screen


@dataclass(frozen=True, slots=True)
class FilledFields:
    """The lines that are written in a page's fields, and how many of its boxes are ticked."""

    lines: list[Line]
    num_ticked: int


def read_fields(page: Any, textpage: Any, form: Any) -> FilledFields:
    """What is filled in on a page, without what the page's own text shows in the same place."""
    import pypdfium2.raw as raw

    lines: list[Line] = []
    num_ticked = 0
    for index in range(raw.FPDFPage_GetAnnotCount(page)):
        annotation = raw.FPDFPage_GetAnnot(page, index)
        if not annotation:
            continue
        try:
            is_widget = raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_WIDGET
            if not is_widget or raw.FPDFAnnot_GetFlags(annotation) & _UNSEEN:
                continue
            kind = raw.FPDFAnnot_GetFormFieldType(form, annotation)
            if kind in (raw.FPDF_FORMFIELD_CHECKBOX, raw.FPDF_FORMFIELD_RADIOBUTTON):
                num_ticked += bool(raw.FPDFAnnot_IsChecked(form, annotation))
            elif value := _read_value(form, annotation, kind):
                lines += _write(value, form, annotation, textpage)
        finally:
            raw.FPDFPage_CloseAnnot(annotation)
    return FilledFields(lines, num_ticked)


def _read_value(form: Any, annotation: Any, kind: int) -> str:
    import pypdfium2.raw as raw

    if kind == raw.FPDF_FORMFIELD_TEXTFIELD:
        if raw.FPDFAnnot_GetFormFieldFlags(form, annotation) & _PASSWORD:
            return ""
        return _read_string(raw.FPDFAnnot_GetFormFieldValue, form, annotation)
    if kind in (raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX):
        chosen = [
            _read_string(raw.FPDFAnnot_GetOptionLabel, form, annotation, option)
            for option in range(min(_MAX_OPTIONS, raw.FPDFAnnot_GetOptionCount(form, annotation)))
            if raw.FPDFAnnot_IsOptionSelected(form, annotation, option)
        ]
        return ", ".join(chosen) or _read_string(raw.FPDFAnnot_GetFormFieldValue, form, annotation)
    return ""


def _read_string(read: Any, *which: Any) -> str:
    """A string of pdfium's, which first says how many bytes it has (UTF-16, with a zero behind)."""
    import pypdfium2.raw as raw

    size = read(*which, None, 0)
    if size <= 2:
        return ""
    buffer = ctypes.create_string_buffer(size)
    read(*which, ctypes.cast(buffer, ctypes.POINTER(raw.FPDF_WCHAR)), size)
    return buffer.raw[: size - 2].decode("utf-16-le", "replace")


def _write(value: str, form: Any, annotation: Any, textpage: Any) -> Iterator[Line]:
    """The value's lines within the field's box; none where the page's text shows the value there."""
    import pypdfium2.raw as raw

    box = raw.FS_RECTF()
    if not raw.FPDFAnnot_GetRect(annotation, box):
        return
    shown = textpage.get_text_bounded(box.left, box.bottom, box.right, box.top)
    if "".join(value.split()) in "".join(shown.split()):
        return
    given = ctypes.c_float()
    raw.FPDFAnnot_GetFontSize(form, annotation, given)
    size = max(1.0, min(given.value or _USUAL_SIZE, box.top - box.bottom))
    texts = [text for text in map(clean_line, value.replace("\r", "\n").split("\n")) if text]
    top = box.top if len(texts) > 1 else (box.top + box.bottom + size) / 2
    for text in texts:
        right = box.left + max(1.0, min(box.right - box.left, _LETTER_WIDTH * size * len(text)))
        yield Line(text, box.left, right, top - size, top, is_closed=True)
        top -= 1.2 * size


def fill_in(lines: list[Line], filled: list[Line]) -> list[Line]:
    """The page's lines with what is filled in: behind what stands to the left of it, else above what is lower."""
    lines = list(lines)
    for value in sorted(filled, key=lambda line: (-line.y1, line.x0)):
        labels = [n for n, line in enumerate(lines) if _is_label(line, value)]
        if labels:
            nearest = max(labels, key=lambda n: lines[n].x0)
            lines[nearest] = _join(lines[nearest], value)
        else:
            middle = (value.y0 + value.y1) / 2
            lower = (n for n, line in enumerate(lines) if (line.y0 + line.y1) / 2 < middle)
            lines.insert(next(lower, len(lines)), value)
    return lines


def _is_label(line: Line, value: Line) -> bool:
    """Whether the line stands on the value's row, and begins to the left of it."""
    overlap = min(line.y1, value.y1) - max(line.y0, value.y0)
    return line.x0 < value.x0 and overlap > 0.4 * min(line.height, value.height)


def _join(label: Line, value: Line) -> Line:
    """The label's line with the value in the gap where it stands, or at its end."""
    for number, gap in enumerate(label.gaps):
        if gap.x0 - label.height <= value.x0 < gap.x1:
            inserted = f" {value.text} "
            moved = len(inserted) - (gap.end - gap.start)
            return replace(
                label, text=label.text[: gap.start] + inserted + label.text[gap.end :],
                gaps=[
                    *label.gaps[:number],
                    *(replace(g, start=g.start + moved, end=g.end + moved) for g in label.gaps[number + 1 :]),
                ],
            )
    right = max(label.x1, value.x1)
    return replace(label, text=f"{label.text} {value.text}", x1=right, is_closed=True, is_hyphenated=False)
