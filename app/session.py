"""What a browser session has chosen, and what all of them share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import streamlit as st

from app.access import PasswordGate
from app.conversations import Conversation, ConversationStore
from app.inside import Inspector
from app.jobs import Desk
from app.models import ModelStore
from app.syncing import SyncDesk
from app.texts import InterfaceLanguage, language_of_locale, text
from rag.filter import EVERYTHING, Filter
from rag.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
HANDBOOK = REPOSITORY / "knowledge"


@st.cache_resource(show_spinner=False)
def model_store() -> ModelStore:
    return ModelStore()


@st.cache_resource(show_spinner=False)
def desk() -> Desk:
    return Desk()


@st.cache_resource(show_spinner=False)
def sync_desk() -> SyncDesk:
    return SyncDesk()


@st.cache_resource(show_spinner=False, max_entries=1)
def inspector(name: str) -> Inspector:
    """The copy of the model that shows its attention; one at a time."""
    return Inspector(name)


@st.cache_resource(show_spinner=False)
def password_gate() -> PasswordGate | None:
    """None where no password is set."""
    password = os.environ.get("RAG_PASSWORD", "")
    return PasswordGate(password) if password else None


@st.cache_resource(show_spinner=False, max_entries=8)
def conversation_store(folder: str) -> ConversationStore:
    return ConversationStore(Path(folder))


def address() -> str:
    """Where this session's browser is; wrong passwords are counted by it."""
    return st.context.ip_address or "local"


def language() -> InterfaceLanguage:
    """The interface language: chosen, or the browser's."""
    if st.session_state.get("language") is None:
        st.session_state["language"] = language_of_locale(st.context.locale)
    chosen: InterfaceLanguage = st.session_state["language"]
    return chosen


def say(key: str, **values: object) -> str:
    """The words for `key` in this session's language."""
    return text(language(), key, **values)


def settings() -> Settings:
    """This session's settings. Raises SettingsError where environment or rag.toml are wrong."""
    if "settings" not in st.session_state:
        st.session_state["settings"] = Settings.load()
    chosen: Settings = st.session_state["settings"]
    return chosen


def where() -> Filter:
    """The part of the knowledge base that this session asks."""
    chosen: Filter = st.session_state.get("where", EVERYTHING)
    return chosen


def use_base(folder: str) -> None:
    """Go over to another knowledge base, and to a new conversation about it."""
    st.session_state["settings"] = replace(settings(), kb=folder)
    st.session_state["where"] = EVERYTHING
    open_conversation(None)


def conversations() -> ConversationStore:
    """The conversations about this session's knowledge base."""
    return conversation_store(str(Path(settings().kb).resolve()))


def conversation() -> Conversation:
    """The open conversation: this session's, the one that the address names, or a new one."""
    store = conversations()
    current: Conversation | None = st.session_state.get("conversation")
    if current is None:
        current = store.get(st.query_params.get("c", "")) or store.start()
        st.session_state["conversation"] = current
    return current


def open_conversation(chosen: Conversation | None) -> None:
    """Go to a conversation; None begins a new one."""
    st.session_state["conversation"] = chosen or conversations().start()
    if chosen is None:
        st.query_params.pop("c", None)
    else:
        st.query_params["c"] = chosen.id
