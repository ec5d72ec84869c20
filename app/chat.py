"""The pages' entry: streamlit run app/chat.py

Sets the page up, lets in who may come in, draws the sidebar, and runs the chosen page.
"""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_REPOSITORY = str(_HERE.parent)
if _REPOSITORY not in sys.path:  # run from a checkout that is not installed
    sys.path.insert(0, _REPOSITORY)

import streamlit as st  # noqa: E402

from app import chat_page, inside_page, knowledge_page, session, sidebar  # noqa: E402
from app.access import is_local  # noqa: E402
from app.markup import notice_html  # noqa: E402
from app.session import say  # noqa: E402
from rag.errors import RagError  # noqa: E402


def main() -> None:
    st.set_page_config(
        page_title=say("title"), page_icon=str(_HERE / "icon.png"), layout="centered",
        initial_sidebar_state="auto",
    )
    st.html(_HERE / "style.css")
    if not _is_let_in():
        return
    try:
        session.settings()
    except RagError as error:
        st.html(notice_html(say("failed"), str(error)))
        return
    pages = [
        st.Page(chat_page.show, title=say("chat"), icon=":material/forum:", url_path="chat", default=True),
        st.Page(
            knowledge_page.show, title=say("knowledge"), icon=":material/folder_open:",
            url_path="knowledge",
        ),
        st.Page(
            inside_page.show, title=say("inside"), icon=":material/neurology:", url_path="inside"
        ),
    ]
    st.session_state["pages"] = {"knowledge": pages[1], "inside": pages[2]}
    page = st.navigation(pages, position="hidden")
    sidebar.show(pages)
    page.run()


def _is_let_in() -> bool:
    """Draw what stands in the way where this session may not go on."""
    gate = session.password_gate()
    if gate is None:
        if is_local(st.get_option("server.address")):
            return True
        st.html(notice_html(say("password"), say("exposed")))
        return False
    if st.session_state.get("let_in"):
        return True
    address = session.address()
    st.html(f'<div class="lr-welcome"><h1>{say("title")}</h1></div>')
    with st.form("access", border=False):
        given = st.text_input(say("password"), type="password")
        is_sent = st.form_submit_button(say("enter"), type="primary")
    if is_sent and gate.check(given, address):
        st.session_state["let_in"] = True
        st.rerun()
    locked = gate.seconds_locked(address)
    if locked > 0:
        st.html(notice_html(say("password"), say("locked", seconds=int(locked) + 1)))
    elif is_sent:
        st.html(notice_html(say("password"), say("wrong_password")))
    return False


main()
