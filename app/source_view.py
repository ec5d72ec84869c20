"""A cited file as it is: its pages as pictures with the passage marked, or its whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app.markup import escape, mark_html, notice_html, segments
from app.page_pictures import PagePicture, draw_page
from app.session import language, say
from app.syncing import find_file
from app.texts import InterfaceLanguage, text
from rag.answer import Answer
from rag.document import Document
from rag.errors import LoadError, RagError
from rag.store import Store

_MAX_PLACES = 4  # buttons under an answer


@dataclass(frozen=True, slots=True)
class Place:
    """A file with the spans in it that an answer cites, as offsets into its text."""

    path: str
    spans: tuple[tuple[int, int], ...]
    quotes: tuple[str, ...]
    page: int | None

    @property
    def key(self) -> str:
        return f"{self.path}-{self.spans[0][0]}"

    def label(self, language: InterfaceLanguage) -> str:
        name = self.path.rsplit("/", 1)[-1]
        if self.page is not None:
            name += f" · {text(language, 'page', number=self.page)}"
        return name


def places(answer: Answer) -> list[Place]:
    """One for each cited file, in the order in which they are cited."""
    found: dict[str, Place] = {}
    for citation in answer.citations:
        span = (citation.start, citation.end)
        known = found.get(citation.path)
        if known is None:
            found[citation.path] = Place(citation.path, (span,), (citation.quote,), citation.page)
        else:
            found[citation.path] = Place(
                known.path, (*known.spans, span), (*known.quotes, citation.quote), known.page
            )
    return list(found.values())[:_MAX_PLACES]


def show(base: Store, place: Place) -> None:
    """Open the file in a dialog."""

    @st.dialog(say("page_picture") if place.page is not None else say("file"), width="medium")
    def _dialog() -> None:
        st.html(f'<div class="lr-file">{escape(place.path)}</div>')
        try:
            document = base.document(place.path)
        except RagError:
            st.html(notice_html(say("sources"), say("changed_since"), kind="info"))
            return
        file = find_file(base, place.path)
        is_current = all(
            document.text[a:b] == quote for (a, b), quote in zip(place.spans, place.quotes, strict=True)
        )
        if not is_current:
            st.html(notice_html(say("sources"), say("changed_since"), kind="info"))
        pictures: list[tuple[int, PagePicture]] = []
        if document.media_type == "pdf" and is_current:
            pictures = _draw_pages(file, place, document)
            if not pictures:
                st.html(notice_html(say("page_picture"), say("page_missing"), kind="info"))
        if pictures:
            _show_pages(pictures)
        else:
            _show_text(document.text, place if is_current else None)
        if file is not None:
            st.download_button(
                say("download_source"), data=lambda: file.read_bytes(), file_name=file.name,
                mime="application/octet-stream", icon=":material/download:", on_click="ignore",
            )

    _dialog()


def _draw_pages(file: Path | None, place: Place, document: Document) -> list[tuple[int, PagePicture]]:
    """Each page that a cited span touches, once, with its number; none where the file no longer has them all."""
    if file is None:
        return []
    quotes: dict[int, list[str]] = {}
    for start, end in place.spans:
        for page in document.pages:
            low, high = max(start, page.start), min(end, page.end)
            if low < high and document.text[low:high].strip():
                quotes.setdefault(page.number, []).append(document.text[low:high])
    try:
        return [(number, draw_page(file, number, tuple(wanted))) for number, wanted in sorted(quotes.items())]
    except LoadError:
        return []


def _show_pages(pictures: Sequence[tuple[int, PagePicture]]) -> None:
    for number, picture in pictures:
        if len(pictures) > 1:
            st.html(f'<div class="lr-label">{text(language(), "page", number=number)}</div>')
        if not picture.num_found:
            st.html(f'<p class="lr-note">{say("page_unmarked")}</p>')
        st.image(picture.png, width="stretch", alt=text(language(), "page", number=number))


def _show_text(document_text: str, place: Place | None) -> None:
    spans = list(place.spans) if place is not None else []
    pieces: list[str] = []
    links: list[str] = []
    for segment in segments(document_text, 0, len(document_text), spans):
        shown = escape(segment.text)
        if segment.kind == "cited":
            number = len(links) + 1
            links.append(f'<a class="lr-chip" href="#passage-{number}">{number}</a>')
            shown = mark_html(segment.text, f"passage-{number}")
        pieces.append(shown)
    if links:
        st.html(f'<div class="lr-muted">{say("go_to_passage")} {"".join(links)}</div>')
    st.html(f'<div class="lr-document" tabindex="0">{"".join(pieces)}</div>')
