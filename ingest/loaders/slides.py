"""PowerPoint: every slide is a page; its title is a heading, then texts, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingest.archive import check_zip
from ingest.builder import DocumentBuilder, clean_line
from rag.document import Document
from rag.errors import LoadError

_MAX_DEPTH = 20  # of groups in groups


class PptxLoader:
    """.pptx files. Page numbers are slide numbers."""

    media_type = "pptx"
    suffixes: tuple[str, ...] = (".pptx", ".pptm")
    version = 1

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
            _add_slide(builder, slide)
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


def _add_slide(builder: DocumentBuilder, slide: Any) -> None:
    title = slide.shapes.title
    if title is not None and title.has_text_frame:
        builder.add_heading(1, title.text_frame.text.replace("\v", " "))
    for shape in _walk(slide.shapes, 0):
        if title is not None and shape.shape_id == title.shape_id:
            continue
        if getattr(shape, "has_table", False):
            builder.add_table([[cell.text for cell in row.cells] for row in shape.table.rows])
        elif getattr(shape, "has_text_frame", False):
            lines = [clean_line(part.text.replace("\v", " ")) for part in shape.text_frame.paragraphs]
            builder.add_paragraph("\n".join(line for line in lines if line))
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        builder.add_paragraph(slide.notes_slide.notes_text_frame.text)


def _walk(shapes: Any, depth: int) -> Iterator[Any]:
    """Shapes and those inside of groups, from top to bottom as they were drawn."""
    for shape in shapes:
        if hasattr(shape, "shapes") and depth < _MAX_DEPTH:
            yield from _walk(shape.shapes, depth + 1)
        else:
            yield shape
