"""The sidebar: pages, language, conversations, settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import PurePosixPath

import streamlit as st
from streamlit.navigation.page import StreamlitPage

from app import session
from app.markup import escape, escape_label, notice_html
from app.models import LoadedGenerator
from app.session import say
from app.texts import LANGUAGES, number
from rag.background import Background
from rag.errors import RagError
from rag.filter import EVERYTHING, Filter
from rag.settings import Settings

_log = logging.getLogger(__name__)
_SHORT = 0.3  # seconds; what is over by then needs no sign that it goes on


def show(pages: Sequence[StreamlitPage]) -> None:
    with st.sidebar:
        st.html(f'<div class="lr-brand"><span class="lr-logo"></span><b>{say("title")}</b></div>')
        for page in pages:
            st.page_link(page)
        _show_conversations(pages[0])
        _show_filter()
        _show_settings()
        _show_language()


def _show_language() -> None:
    # Not bound to a widget key: the choice outlives the widget.
    names = list(LANGUAGES)
    chosen = st.segmented_control(
        say("language"), names, default=session.language(), required=True,
        format_func=lambda name: LANGUAGES[name], key=f"language-{session.language()}",
        label_visibility="collapsed", width="stretch",
    )
    if chosen is not None and chosen != session.language():
        st.session_state["language"] = chosen
        st.rerun()


def _show_conversations(chat: StreamlitPage) -> None:
    current = session.conversation()
    if st.button(
        say("new_conversation"), icon=":material/add:", width="stretch", key="new-conversation",
        disabled=not current.turns,
    ):
        session.open_conversation(None)
        st.switch_page(chat)
    store = session.conversations()
    if not store.entries(limit=1):
        return
    st.html(f'<div class="lr-label">{say("conversations")}</div>')
    search = st.text_input(
        say("search_conversations"), placeholder=say("search_conversations"),
        label_visibility="collapsed", key="search-conversations", icon=":material/search:",
    )
    entries = store.entries(search or "", limit=12)
    if not entries:
        st.html(f'<div class="lr-muted">{say("no_conversation")}</div>')
    with st.container(key="conversations", gap=None):
        for entry in entries:
            is_current = entry.id == current.id
            if st.button(
                escape_label(entry.title), key=f"open-{entry.id}", width="stretch", wrap=False,
                type="secondary" if is_current else "tertiary",
            ) and not is_current:
                session.open_conversation(store.get(entry.id))
                st.switch_page(chat)


def _show_filter() -> None:
    """Which files the next questions are asked of."""
    settings = session.settings()
    try:
        base = session.model_store().base(settings)
    except RagError:
        return  # the page itself says what is missing and what to do
    files = {path: record for path, record in base.files().items() if record.status == "ok"}
    if len(files) < 2:
        _ask_of(EVERYTHING)  # what was chosen before the others went could not be lifted any more
        return
    days = sorted(date.fromtimestamp(record.modified) for record in files.values() if record.modified is not None)
    name = f"{settings.kb} {settings.milvus_uri}"  # other choices for another base
    # One label in every state: with another one it would be another expander, and closed.
    with st.expander(say("scope"), icon=":material/filter_alt:"):
        folders = st.multiselect(
            say("scope_folders"), folders_of(files), key=f"scope-folders {name}", placeholder=say("scope_any")
        )
        types = st.multiselect(
            say("scope_types"), types_of(files), key=f"scope-types {name}", placeholder=say("scope_any")
        )
        glob = st.text_input(say("scope_name"), key=f"scope-name {name}", placeholder="lease*, *2024*")
        since = until = None
        if len(days) == len(files):  # not in a base of an earlier version, until it is ingested again
            since, until = (
                st.date_input(
                    say(key), value=None, min_value=days[0], max_value=days[-1], key=f"{key} {name}", format="YYYY-MM-DD"
                )
                for key in ("scope_since", "scope_until")
            )
        globs = [part.strip() for part in glob.replace("，", ",").split(",") if part.strip()]
        try:
            chosen = Filter(folders, globs, types, since, until)
            count = len(base.matching(chosen))
        except RagError as error:
            said = "\n".join((str(error), say("scope_not_used")))
            st.html(notice_html(say("scope"), said))
            _ask_of(EVERYTHING)
            return
        line = say("scope_count", count=number(count), total=number(len(files)))
        st.html(f'<div class="lr-muted">{escape(line)}</div>')
    _ask_of(chosen)


def _ask_of(chosen: Filter) -> None:
    if chosen != session.where():
        st.session_state["where"] = chosen
        st.rerun()


def folders_of(paths: Iterable[str]) -> list[str]:
    """Every folder that holds a file, and those above it."""
    return sorted({str(parent) for path in paths for parent in PurePosixPath(path).parents if str(parent) != "."})


def types_of(paths: Iterable[str]) -> list[str]:
    """Every ending of a file's name."""
    return sorted({suffix[1:].lower() for path in paths if (suffix := PurePosixPath(path).suffix)})


def _show_settings() -> None:
    settings = session.settings()
    with st.expander(say("settings"), icon=":material/tune:"):
        # Sliders count at once; what has to be loaded waits for its button.
        # Their ranges give way where environment or rag.toml went further.
        top_k = st.slider(say("top_k"), 1, max(12, settings.top_k), settings.top_k, key="set-top-k")
        longest = settings.max_new_tokens
        max_new_tokens = st.slider(
            say("max_new_tokens"), min(16, longest), max(2048, longest), longest, key="set-max-new",
        )
        temperature = st.slider(
            say("temperature"), 0.0, max(2.0, settings.temperature), settings.temperature, step=0.1,
            key="set-temperature",
        )
        top_p = st.slider(
            say("top_p"), min(0.05, settings.top_p), 1.0, settings.top_p, step=0.05, key="set-top-p"
        )
        changed = replace(
            settings, top_k=top_k, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        st.session_state["settings"] = changed
        with st.form("models", border=False):
            generator = st.text_input(say("generator"), settings.generator, key="set-generator")
            folder = st.text_input(
                say("kb_folder"), settings.kb, key=f"set-kb-{settings.kb}", disabled=settings.store != "embedded"
            )
            is_sent = st.form_submit_button(say("apply"), width="stretch")
        if is_sent:
            _apply(changed, generator.strip(), folder.strip())
        if "model_change" in st.session_state:
            _follow_change()
        if error := st.session_state.get("settings_error"):
            st.html(notice_html(say("settings"), error))
        loaded = session.model_store().loaded(changed)
        line = (
            say("loaded", name=loaded.name, device=loaded.device, dtype=loaded.dtype)
            if loaded else say("not_loaded", name=changed.generator)
        )
        st.html(f'<div class="lr-muted">{escape(line)}</div>')
    try:
        base = session.model_store().base(settings)
    except RagError:
        return  # the page itself says what is missing and what to do
    line = say("holds", files=number(len(base.files())), chunks=number(base.count_chunks()))
    st.html(f'<div class="lr-muted">{escape(line)}</div>')


@dataclass(frozen=True, slots=True)
class _ModelChange:
    """Settings that wait until their model is loaded."""

    wanted: Settings
    loading: Background[LoadedGenerator]


def _apply(settings: Settings, generator: str, folder: str) -> None:
    """Take another model or knowledge base. Where the model can't be loaded, the old one stays."""
    st.session_state["settings_error"] = ""
    try:
        wanted = replace(settings, generator=generator, kb=folder)
    except RagError as error:
        st.session_state["settings_error"] = str(error)
        return
    if generator == settings.generator:
        _take(wanted)
        st.rerun()
    store = session.model_store()
    loading = Background(lambda: store.load_generator(wanted), name="loading")
    loading.is_over.wait(_SHORT)
    st.session_state["model_change"] = _ModelChange(wanted, loading)


@st.fragment(run_every=0.4)
def _follow_change() -> None:
    """Show that a model is being loaded, and take it or say why not; the page stays usable."""
    change: _ModelChange | None = st.session_state.get("model_change")
    if change is None:
        return
    if not change.loading.is_over.is_set():
        line = say("loading_model", name=change.wanted.generator)
        st.html(f'<div class="lr-stage"><span class="lr-pulse"></span>{escape(line)}</div>')
        return
    del st.session_state["model_change"]
    settings = session.settings()
    try:
        change.loading.result()
    except RagError as error:
        kept = say("kept_model", name=settings.generator)
        st.session_state["settings_error"] = f"{error}\n{kept}"
    except Exception as error:  # a bug: its traceback belongs in the log, not on the page
        _log.exception("a model could not be loaded")
        st.session_state["settings_error"] = say("unexpected", name=type(error).__name__)
    else:
        _take(replace(settings, generator=change.wanted.generator, kb=change.wanted.kb))
    st.rerun()


def _take(wanted: Settings) -> None:
    if wanted.kb != session.settings().kb:
        session.use_base(wanted.kb)
    st.session_state["settings"] = wanted
