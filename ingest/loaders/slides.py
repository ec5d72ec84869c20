"""PowerPoint: every slide is a page; its title is a heading, then texts, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from ingest.loaders.docx import join_runs
from ingest.loaders.table import show_value
from rag.document import Document
from rag.errors import LoadError

_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_C = "{http://schemas.openxmlformats.org/drawingml/2006/chart}"
_MAX_DEPTH = 20  # of groups in groups
_MAX_CATEGORIES = 200  # of a chart that are read
_MAX_SERIES = 20


class PptxLoader:
    """.pptx files. Page numbers are slide numbers."""

    media_type = "pptx"
    suffixes: tuple[str, ...] = (".pptx", ".pptm")
    version = 2

    def load(self, file: Path, path: str) -> Document:
        check_zip(file, "a PowerPoint presentation")
        try:
            from pptx import Presentation
        except ImportError as error:
            raise LoadError("reading .pptx needs a package: pip install python-pptx") from error
        try:
            slides = Presentation(str(file))
        except Exception as error:  # the library raises KeyError, ValueError, its own, ...
            raise LoadError(
                f"this is not a PowerPoint presentation, or it is damaged: {clean_line(str(error))}"
            ) from error
        builder = DocumentBuilder()
        pictures: list[int] = []
        for number, slide in enumerate(slides.slides, 1):
            builder.begin_page_at(number, builder.next_start())
            before = builder.length
            _add_slide(builder, slide, number)
            if builder.length == before and len(slide.shapes):
                pictures.append(number)
        if pictures:
            builder.warnings.append(
                f"{len(pictures)} of {len(slides.slides)} slides hold no text, only pictures"
            )
        title = clean_line(slides.core_properties.title or "")
        if title.lower() in ("powerpoint presentation", "powerpoint 演示文稿", "幻灯片 1"):
            title = ""
        return builder.build(path, self.media_type, title=title)


def _add_slide(builder: DocumentBuilder, slide: Any, number: int) -> None:
    title = slide.shapes.title
    if title is not None and title.has_text_frame:
        builder.add_heading(1, _read_frame(title.text_frame))
    for shape in _walk(slide.shapes, 0):
        if title is not None and shape.element is title.element:
            continue
        if getattr(shape, "has_table", False):
            builder.add_table([[_read_frame(cell.text_frame) for cell in row.cells] for row in shape.table.rows])
        elif getattr(shape, "has_chart", False):
            try:
                _add_chart(builder, shape.chart, number)
            except Exception as error:  # the library raises KeyError, ValueError, NotImplementedError, ...
                builder.warnings.append(f"slide {number}: a chart can't be read ({clean_line(str(error))})")
        elif getattr(shape, "has_text_frame", False):
            builder.add_paragraph(_read_frame(shape.text_frame))
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        builder.add_paragraph(slide.notes_slide.notes_text_frame.text)


def _read_frame(frame: Any) -> str:
    """The lines of a text frame."""
    lines = [clean_line(_read_paragraph(paragraph)) for paragraph in frame.paragraphs]
    return "\n".join(line for line in lines if line)


def _read_paragraph(paragraph: Any) -> str:
    runs: list[tuple[str, bool]] = []
    for element in paragraph._p:
        if element.tag == f"{_A}br":
            runs.append((" ", False))
        elif element.tag in (f"{_A}r", f"{_A}fld"):
            properties = element.find(f"{_A}rPr")
            baseline = "0" if properties is None else properties.get("baseline", "0")
            is_raised = not baseline.startswith("-") and baseline.strip("0%.") != ""
            runs.append(((element.findtext(f"{_A}t") or "").replace("\v", " "), is_raised))
    return join_runs(runs)


def _add_chart(builder: DocumentBuilder, chart: Any, number: int) -> None:
    """A chart's title, and its values as a table: a row a category, a column a series."""
    title = chart.chart_title.text_frame.text if chart.has_title and chart.chart_title.has_text_frame else ""
    is_cut = has_points = False
    tables: list[list[list[str]]] = []
    for plot in chart.plots:
        series = list(plot.series)
        labels = [str(category) for category in plot.categories]
        values = [list(one.values) for one in series]
        has_points |= any(one._element.find(f"{_C}xVal") is not None for one in series)
        num_rows = max(map(len, [labels, *values]))
        is_cut |= num_rows > _MAX_CATEGORIES or len(series) > _MAX_SERIES
        rows = [["", *(str(one.name) for one in series[:_MAX_SERIES])]]
        for row in range(min(num_rows, _MAX_CATEGORIES)):
            shown = [show_value(column[row]) if row < len(column) else "" for column in values[:_MAX_SERIES]]
            rows.append([labels[row] if row < len(labels) else "", *shown])
        tables.append(rows)
    builder.add_paragraph(clean_line(title))
    for rows in tables:
        builder.add_table(rows)
    if has_points:
        builder.warnings.append(f"slide {number}: of a chart of points, only their heights are read")
    if is_cut:
        builder.warnings.append(
            f"slide {number}: of a chart, {_MAX_CATEGORIES} categories and {_MAX_SERIES} series are read"
        )


def _walk(shapes: Any, depth: int) -> Iterator[Any]:
    """Shapes and those inside of groups, from top to bottom as they were drawn."""
    for shape in shapes:
        if hasattr(shape, "shapes") and depth < _MAX_DEPTH:
            yield from _walk(shape.shapes, depth + 1)
        else:
            yield shape
