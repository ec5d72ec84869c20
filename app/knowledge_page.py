"""The knowledge base page: what is in it, what could not be read, adding and removing, a search."""

from __future__ import annotations

import time
from typing import Any

import streamlit as st

from app import session
from app.markup import escape, escape_label, hit_html, notice_html, size_text
from app.session import say
from app.syncing import SyncJob, root_folders
from app.texts import number
from app.uploads import (
    MAX_FILES,
    MAX_MEGABYTES,
    check_upload,
    common_suffixes,
    delete_uploads,
    store_upload,
    upload_folder,
    uploaded_names,
)
from rag.errors import KnowledgeBaseError, RagError
from rag.knowledge import FileRecord, KnowledgeBase

_LOOK_SECONDS = 0.15
_SEARCH_RESULTS = 10


def show() -> None:
    settings = session.settings()
    job = session.sync_desk().current(settings.kb)
    try:
        base = session.model_store().base(settings.kb)
    except KnowledgeBaseError as error:
        if job is not None and not job.is_ended:
            _follow(job)
        show_missing(str(error))
        _show_add()
        return
    st.html(f'<h1 class="lr-title">{say("knowledge")}</h1>')
    records = list(base.files().values())
    _show_figures(base, records)
    if job is not None:
        _follow(job) if not job.is_ended else _show_outcome(job)
    _show_search()
    _show_add()
    _show_files(records)
    _show_sync(base)


def show_missing(message: str) -> None:
    """What stands in the place of both pages where there is no knowledge base."""
    settings = session.settings()
    job = session.sync_desk().current(settings.kb)
    st.html(f'<div class="lr-welcome"><h1>{say("no_kb")}</h1><p>{say("no_kb_note")}</p></div>')
    st.code(f"python -m ingest FOLDER --kb {settings.kb}", language=None)
    if session.HANDBOOK.is_dir() and st.button(
        say("build_handbook"), type="primary", icon=":material/auto_stories:", key="build-handbook",
        disabled=job is not None and not job.is_ended,
    ):
        job = session.sync_desk().start([session.HANDBOOK], settings, session.model_store())
    if job is None:
        st.html(f'<p class="lr-muted">{say("build_handbook_note")}</p>')
        with st.expander(say("notes")):
            st.html(f'<p class="lr-muted">{escape(message)}</p>')
    elif job.is_ended:
        _show_outcome(job)
    else:
        _follow(job)


def _show_figures(base: KnowledgeBase, records: list[FileRecord]) -> None:
    failed = sum(record.status == "failed" for record in records)
    size = sum(entry.stat().st_size for entry in base.folder.iterdir() if entry.is_file())
    figures = [
        (number(len(records)), say("files")), (number(base.count_chunks()), say("chunks_column")),
        (size_text(size), say("size_on_disk")),
    ]
    if failed:
        figures.append((number(failed), say("failed_files")))
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    st.html(f'<div class="lr-figures">{shown}</div>')


def _show_search() -> None:
    st.html(f'<h2 class="lr-heading">{say("try_search")}</h2>')
    question = st.text_input(
        say("try_search"), placeholder=say("try_search_placeholder"), key="raw-search",
        label_visibility="collapsed", icon=":material/search:",
    )
    if not question or not question.strip():
        return
    try:
        hits = session.model_store().searcher(session.settings()).retrieve(
            question.strip(), _SEARCH_RESULTS
        )
    except RagError as error:
        st.html(notice_html(say("failed"), str(error)))
        return
    if not hits:
        st.html(notice_html(say("try_search"), say("nothing_found"), kind="info"))
    cards = "".join(hit_html(hit, n, session.language()) for n, hit in enumerate(hits, 1))
    st.html(f'<div class="lr-sources">{cards}</div>')


def _show_files(records: list[FileRecord]) -> None:
    st.html(f'<h2 class="lr-heading">{say("files")}</h2>')
    rows: list[dict[str, Any]] = [
        {
            say("file"): record.path,
            say("status"): say("ok") if record.status == "ok" else say("failed_file"),
            say("pages_column"): str(record.pages or ""),
            say("chunks_column"): str(record.chunks),
            say("size"): size_text(record.size),
            say("notes"): "; ".join([*([record.error] if record.error else []), *record.warnings]),
        }
        # What needs attention comes first.
        for record in sorted(records, key=lambda record: (record.status == "ok", record.path))
    ]
    if rows:
        st.dataframe(
            rows, hide_index=True, width="stretch", height=min(440, 36 * len(rows) + 38),
            column_config={say("file"): st.column_config.TextColumn(width="medium")},
        )


def _show_add() -> None:
    st.html(f'<h2 class="lr-heading">{say("add_files")}</h2>')
    round_ = st.session_state.setdefault("upload_round", 0)  # a new key empties the widget
    shown = " ".join(common_suffixes())
    # Streamlit's own words on the button are English in every language.
    st.html(f'<style>.stApp {{ --lr-choose-files: "{say("choose_files")}"; }}</style>')
    given = st.file_uploader(
        say("add_files_note", types=shown, count=MAX_FILES, size=MAX_MEGABYTES),
        accept_multiple_files=True, key=f"upload-{round_}",
    )
    if not given or not st.button(say("add"), type="primary", key="add-files"):
        return
    if len(given) > MAX_FILES:
        message = say("too_many", count=len(given), limit=MAX_FILES)
        st.html(notice_html(say("add_files"), message))
        return
    folder = upload_folder(session.settings().kb)
    rejected: list[tuple[str, str]] = []
    num_stored = 0
    for upload in given:
        data = upload.getvalue()
        rejection = check_upload(upload.name, data)
        if rejection is None:
            store_upload(folder, upload.name, data)
            num_stored += 1
        else:
            reason = say(
                rejection.reason,
                **({"size": f"{rejection.megabytes:.0f}", "limit": MAX_MEGABYTES}
                   if rejection.reason == "too_large" else {}),
            )
            rejected.append((upload.name, reason))
    st.session_state["upload_round"] = round_ + 1
    st.session_state["rejected"] = rejected
    if num_stored:
        session.sync_desk().start([folder], session.settings(), session.model_store())
    st.rerun()


def _show_sync(base: KnowledgeBase) -> None:
    settings = session.settings()
    names = uploaded_names(upload_folder(settings.kb))
    if names:
        st.html(f'<h2 class="lr-heading">{say("remove")}</h2>')
        chosen = st.pills(
            say("remove_note"), names, selection_mode="multi", format_func=escape_label,
            key=f"remove-names-{len(names)}",
        )
        if chosen and st.button(say("delete"), key="remove-files", icon=":material/delete:"):
            delete_uploads(upload_folder(settings.kb), chosen)
            session.sync_desk().start([upload_folder(settings.kb)], settings, session.model_store())
            st.rerun()
    folders = [folder for folder in root_folders(base) if folder.is_dir()]
    if folders:
        note = say("resync_note", folders=", ".join(str(folder) for folder in folders))
        st.html(f'<p class="lr-muted">{escape(note)}</p>')
        if st.button(say("resync"), icon=":material/sync:", key="resync"):
            session.sync_desk().start(folders, settings, session.model_store())
            st.rerun()


def _follow(job: SyncJob) -> None:
    """Show a run until it ends."""
    bar = st.progress(0.0, text=say("building"))
    while not job.is_ended:
        share = job.done / job.total if job.total else 0.0
        # The name of a file is data: as a label it would be read as Markdown.
        bar.progress(min(1.0, share), text=f"{say('building')} {job.done}/{job.total or '…'}")
        time.sleep(_LOOK_SECONDS)
    st.rerun()


def _show_outcome(job: SyncJob) -> None:
    """What the last run did, and which uploads were not taken; shown until something else happens."""
    if job.unexpected:
        st.html(notice_html(say("failed"), say("unexpected", name=job.unexpected)))
    elif job.error:
        st.html(notice_html(say("failed"), job.error))
    elif job.report is not None:
        counts = job.report.counts
        keys = {name: name for name in ("added", "changed", "moved", "deleted", "unchanged")}
        keys["failed"] = "failed_count"
        said = [say(key, count=number(counts[name])) for name, key in keys.items() if counts[name]]
        lines = [" · ".join(said) or say("nothing_to_do")]
        lines += [f"{file.path}: {file.error}" for file in job.report.failed]
        st.html(notice_html(say("knowledge"), "\n".join(lines), kind="good"))
    for name, reason in st.session_state.get("rejected", []):
        st.html(notice_html(say("add_files"), say("rejected", name=name, reason=reason)))
