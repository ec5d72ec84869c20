"""The knowledge base page: what is in it, what could not be read, adding and removing, a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from app import session
from app.markup import escape, hit_html, notice_html, progress_html, size_text
from app.session import say
from app.syncing import SyncJob, root_folders
from app.texts import number
from app.uploads import (
    MAX_FILES,
    MAX_MEGABYTES,
    MAX_TOTAL_MEGABYTES,
    UploadBatch,
    common_suffixes,
    delete_uploads,
    sanitise_name,
    upload_folder,
    uploaded_names,
)
from rag.errors import KnowledgeBaseError, RagError
from rag.knowledge import DATABASE, FileRecord, KnowledgeBase
from rag.store import Store

_LOOK_SECONDS = 0.25
_SEARCH_RESULTS = 10
_SHOWN_REJECTED = 20  # uploads that were not taken, named one by one


def show() -> None:
    settings = session.settings()
    job = session.sync_desk().current(settings.kb)
    try:
        base = session.model_store().base(settings)
    except KnowledgeBaseError as error:
        show_missing(str(error))
        _show_add()
        return
    st.html(f'<h1 class="lr-title">{say("knowledge")}</h1>')
    if settings.store == "embedded":
        _show_choice(base)
    else:
        st.html(f'<div class="lr-muted">{say("kept_in_milvus", uri=escape(settings.milvus_uri))}</div>')
    records = list(base.files().values())
    _show_figures(base, records)
    if job is not None:
        _show_outcome(job) if job.is_ended else _follow(job)
    if records:
        _show_search()
    _show_add()
    if records:
        _show_files(records)
    _show_sync(base)


def show_missing(message: str) -> None:
    """What stands in the place of both pages where there is no knowledge base."""
    settings = session.settings()
    job = session.sync_desk().current(settings.kb)
    st.html(f'<div class="lr-welcome"><h1>{say("no_kb")}</h1><p>{say("no_kb_note")}</p></div>')
    where = f"--kb {settings.kb}"
    if settings.store != "embedded":
        where += f" --store {settings.store} --milvus-uri {settings.milvus_uri}"
    st.code(f"python -m ingest FOLDER {where}", language=None)
    if session.HANDBOOK.is_dir() and st.button(
        say("build_handbook"), type="primary", icon=":material/auto_stories:", key="build-handbook",
        disabled=session.sync_desk().is_busy(settings.kb),
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


# which one


def _show_choice(base: Store) -> None:
    """The knowledge bases that stand side by side in one folder, and a new one among them."""
    current = base.folder.resolve()
    known = sorted(
        {current, *(file.parent.resolve() for file in current.parent.glob(f"*/{DATABASE}"))}
    )
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="choice"):
        chosen = st.selectbox(
            say("choose_kb"), known, index=known.index(current), format_func=lambda folder: folder.name,
            key=f"choose-{current}", label_visibility="collapsed", width=320,
        )
        with (
            st.popover(say("new_kb"), icon=":material/add:", key="new-kb"),
            st.form("new-kb-form", border=False, clear_on_submit=True),
        ):
            name = st.text_input(say("new_kb_name"), max_chars=80)
            is_sent = st.form_submit_button(say("create"), type="primary")
    if chosen is not None and chosen != current:
        session.use_base(str(chosen))
        st.rerun()
    if is_sent and name.strip():
        folder = current.parent / sanitise_name(name)
        try:
            KnowledgeBase.create(folder)
        except RagError as error:
            st.html(notice_html(say("failed"), str(error)))
            return
        session.use_base(str(folder))
        st.rerun()


def _show_figures(base: Store, records: list[FileRecord]) -> None:
    failed = sum(record.status == "failed" for record in records)
    figures = [
        (number(len(records)), say("files")), (number(base.count_chunks()), say("chunks_column")),
        (size_text(sum(record.size for record in records)), say("size_of_files")),
    ]
    if isinstance(base, KnowledgeBase):
        size = sum(entry.stat().st_size for entry in base.folder.iterdir() if entry.is_file())
        figures.append((size_text(size), say("size_on_disk")))
    if failed:
        figures.append((number(failed), say("failed_files")))
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    st.html(f'<div class="lr-figures">{shown}</div>')


# searching


def _show_search() -> None:
    st.html(f'<h2 class="lr-heading">{say("try_search")}</h2>')
    question = st.text_input(
        say("try_search"), placeholder=say("try_search_placeholder"), key="raw-search",
        label_visibility="collapsed", icon=":material/search:",
    )
    if not question or not question.strip():
        return
    began = time.perf_counter()
    try:
        hits = session.model_store().searcher(session.settings()).retrieve(
            question.strip(), _SEARCH_RESULTS
        )
    except RagError as error:
        st.html(notice_html(say("failed"), str(error)))
        return
    took = f"{1000 * (time.perf_counter() - began):.0f}"
    if not hits:
        st.html(notice_html(say("try_search"), say("nothing_found"), kind="info"))
        return
    st.html(f'<div class="lr-muted">{say("found_in", count=len(hits), milliseconds=took)}</div>')
    cards = "".join(hit_html(hit, n, session.language()) for n, hit in enumerate(hits, 1))
    st.html(f'<div class="lr-sources">{cards}</div>')


# the health of the files


def _show_files(records: list[FileRecord]) -> None:
    st.html(f'<h2 class="lr-heading">{say("files")}</h2>')
    has_notes = any(record.error or record.warnings for record in records)
    rows: list[dict[str, Any]] = []
    # What needs attention comes first.
    for record in sorted(records, key=lambda r: (r.status == "ok", not r.warnings, r.path)):
        notes = "; ".join([*([record.error] if record.error else []), *record.warnings])
        key = "failed_file" if record.status != "ok" else "with_notes" if notes else "ok"
        row = {
            say("file"): record.path, say("status"): say(key),
            say("pages_column"): str(record.pages or ""), say("chunks_column"): record.chunks,
            say("size"): size_text(record.size),
        }
        if has_notes:
            row[say("notes")] = notes
        rows.append(row)
    column = st.column_config
    st.dataframe(
        rows, hide_index=True, width="stretch", height=min(440, 36 * len(rows) + 38),
        column_config={
            say("file"): column.TextColumn(width=250 if has_notes else 360),
            say("status"): column.TextColumn(width=100),
            say("pages_column"): column.TextColumn(width=66, alignment="right"),
            say("chunks_column"): column.NumberColumn(width=76),
            say("size"): column.TextColumn(width=80, alignment="right"),
            say("notes"): column.TextColumn(width=520),
        },
    )


# adding, removing, reading again


def _show_add() -> None:
    st.html(f'<h2 class="lr-heading">{say("add_files")}</h2>')
    round_ = st.session_state.setdefault("upload_round", 0)  # a new key empties the widgets
    # Streamlit's own words on the buttons are English in every language.
    st.html(
        f'<style>.st-key-drop-files {{ --lr-choose: "{say("choose_files")}"; }} '
        f'.st-key-drop-folder {{ --lr-choose: "{say("choose_folder")}"; }}</style>'
    )
    with st.container(key="drops"):
        with st.container(key="drop-files"):
            given = st.file_uploader(
                say("choose_files"), accept_multiple_files=True, key=f"upload-{round_}",
                label_visibility="collapsed",
            )
        with st.container(key="drop-folder"):
            given += st.file_uploader(
                say("choose_folder"), accept_multiple_files="directory", key=f"upload-folder-{round_}",
                label_visibility="collapsed",
            )
    limits = say(
        "add_files_note", types=" ".join(suffix[1:] for suffix in common_suffixes()), count=MAX_FILES,
        size=MAX_MEGABYTES, total=MAX_TOTAL_MEGABYTES,
    )
    st.html(f'<p class="lr-muted">{limits}</p>')
    # Of a folder, what is hidden (.git, .DS_Store) is left out without a word.
    given = [upload for upload in given if not _is_hidden(upload.name)]
    if not given:
        return
    size = sum(upload.size for upload in given)
    if len(given) > MAX_FILES or size > MAX_TOTAL_MEGABYTES * 2**20:
        message = say(
            "too_many", count=number(len(given)), size=f"{size / 2**20:,.0f}", limit=MAX_FILES,
            most=MAX_TOTAL_MEGABYTES,
        )
        st.html(notice_html(say("add_files"), message))
        return
    if st.button(say("add", count=number(len(given))), type="primary", key="add-files"):
        _take(given)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def _take(given: Sequence[Any]) -> None:
    """Store what may be stored, and read it in the background."""
    settings = session.settings()
    folder = upload_folder(settings.kb)
    batch = UploadBatch(folder)
    rejected: list[tuple[str, str]] = []
    for upload in given:
        try:
            rejection = batch.take(upload.name, upload.getvalue())
        except RagError as error:
            rejected.append((upload.name, str(error)))
            continue
        if rejection is None:
            continue
        values = (
            {"size": f"{rejection.megabytes:.0f}", "limit": MAX_MEGABYTES}
            if rejection.reason == "too_large" else {}
        )
        rejected.append((upload.name, say(rejection.reason, **values)))
    st.session_state["upload_round"] += 1
    folder.mkdir(parents=True, exist_ok=True)
    session.sync_desk().start([folder], settings, session.model_store(), rejected)
    st.rerun()


def _show_sync(base: Store) -> None:
    settings = session.settings()
    names = uploaded_names(upload_folder(settings.kb))
    if names:
        st.html(f'<h2 class="lr-heading">{say("remove")}</h2>')
        chosen = st.multiselect(
            say("remove_note"), names, key=f"remove-names-{len(names)}", placeholder=say("remove_choose")
        )
        if chosen and st.button(
            say("delete_files", count=number(len(chosen))), key="remove-files", icon=":material/delete:"
        ):
            delete_uploads(upload_folder(settings.kb), chosen)
            session.sync_desk().start([upload_folder(settings.kb)], settings, session.model_store())
            st.rerun()
    folders = [folder for folder in root_folders(base) if folder.is_dir()]
    if folders:
        st.html(f'<h2 class="lr-heading">{say("resync_title")}</h2>')
        note = say("resync_note", folders=", ".join(_short(folder) for folder in folders))
        st.html(f'<p class="lr-muted">{escape(note)}</p>')
        if st.button(say("resync"), icon=":material/sync:", key="resync"):
            session.sync_desk().start(folders, settings, session.model_store())
            st.rerun()


def _short(folder: Path) -> str:
    """A folder as people name it: from their home, or from where the program was started."""
    for start, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if folder.is_relative_to(start) and folder != start:
            return f"{sign}{folder.relative_to(start).as_posix()}"
    return str(folder)


# a run


@st.fragment(run_every=_LOOK_SECONDS)
def _follow(job: SyncJob) -> None:
    """Show a run until it ends. The rest of the page stays usable meanwhile."""
    if job.is_ended:
        st.rerun()
    seconds = time.monotonic() - job.began
    st.html(progress_html(job.done, job.total, tuple(job.last), seconds, session.language()))


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
        kind = "info" if job.report.failed else "good"
        st.html(notice_html(say("up_to_date"), "\n".join(lines), kind=kind))
    if job.rejected:
        lines = [f"{name}: {reason}" for name, reason in job.rejected[:_SHOWN_REJECTED]]
        if len(job.rejected) > _SHOWN_REJECTED:
            lines.append(say("and_more", count=number(len(job.rejected) - _SHOWN_REJECTED)))
        st.html(notice_html(say("rejected", count=number(len(job.rejected))), "\n".join(lines)))
