"""The chat page: a question, the answer as it is written, and where each sentence comes from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import knowledge_page, session, source_view
from app.conversations import Conversation, Turn, shorten
from app.jobs import Job
from app.markup import (
    answer_html,
    copy_html,
    cost_html,
    escape,
    escape_label,
    live_html,
    notice_html,
    question_html,
    scope_text,
    sources_html,
)
from app.session import say
from rag.answer import Answer
from rag.errors import KnowledgeBaseError
from rag.store import Store

_LOOK_SECONDS = 0.08  # between two looks at an answer that is being written
_HTML_KEPT = 200  # rendered turns a session remembers
# Once when a question is asked and once when its answer stands, so that both are in view.
_SCROLL = """
export default function ({ data }) {
  const moment = data.turn + data.moment;
  if (window.lrMoment === moment) return;
  window.lrMoment = moment;
  requestAnimationFrame(() => {
    const question = document.getElementById("question-" + data.turn);
    if (question) question.scrollIntoView({ block: "start" });
  });
}
"""
# One listener for every copy button of the page.
_COPY = """
export default function () {
  if (window.lrCopies) return;
  window.lrCopies = true;
  document.addEventListener("click", async (event) => {
    const button = event.target.closest && event.target.closest(".lr-copy");
    if (!button) return;
    const text = button.dataset.text;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // not a secure context, as over plain http from another machine
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.classList.add("lr-done");
    setTimeout(() => button.classList.remove("lr-done"), 1500);
  });
}
"""
# Asked of the handbook; shown where its file is in the knowledge base.
_EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "zh": (
        ("zh/07-自回归解码与KV缓存.pdf", "KV 缓存里为什么不存查询？"),
        ("zh/05-MHA-MQA-GQA.md", "GQA 能不能减少注意力打分的计算量？"),
        ("zh/04-自注意力与掩码.html", "FlashAttention 算出来的是不是近似值？"),
        ("zh/10-量化.docx", "用 GPTQ 或 AWQ 压缩模型，需要重新训练吗？"),
    ),
    "en": (
        ("en/08-prefill-decode-and-batching.pdf", "What is done in chunked prefill?"),
        ("en/03-self-attention-and-masks.md", "How long is the sliding attention window of Mistral 7B?"),
        ("en/16-faiss-and-vector-databases.html", "Can I delete single vectors from an HNSW index in FAISS?"),
        ("en/05-attention-heads-mha-mqa-gqa.html", "How do you turn a multi-head model into one with grouped queries?"),
    ),
}


def show() -> None:
    settings = session.settings()
    store = session.model_store()
    try:
        base = store.base(settings)
    except KnowledgeBaseError as error:
        knowledge_page.show_missing(str(error))
        return
    if not base.count_chunks():
        st.html(notice_html(say("knowledge"), say("empty_kb"), kind="info"))
        return
    store.warm(settings)
    conversation = session.conversation()
    running = next((turn for turn in conversation.turns if not turn.is_ended), None)
    if not conversation.turns:
        _show_welcome(base)
    for turn in conversation.turns:
        if turn is running:
            break
        _show_turn(turn, base, is_last=turn is conversation.turns[-1])
    if conversation.turns and running is None:
        _show_conversation_tools(conversation)
    live = st.container(key="live") if running is not None else None
    # In a container of its own: at the end of the page itself Streamlit would scroll to the bottom
    # whenever anything grows, and a source that is opened would jump out of sight.
    with st.container(key="composer"):
        if not session.where().is_everything:
            st.html(f'<div class="lr-muted lr-scope">{scope_text(session.where(), session.language())}</div>')
        question = st.chat_input(say("ask_placeholder"), key="question", max_chars=4000)
    if question and question.strip():
        ask(question.strip())
        st.rerun()
    if view := st.session_state.pop("source_view", None):
        source_view.show(base, view)
    if conversation.turns and running is None:
        _scroll_to(conversation.turns[-1])
        _copier()(key="copier", height=0)
    if running is not None and live is not None:
        with live:
            _follow(running, conversation)


def ask(question: str, *, search_text: str | None = None, replace_last: bool = False) -> None:
    """Put a question into the line, at the end of the conversation or in place of its last turn."""
    conversation = session.conversation()
    settings = session.settings()
    store = session.model_store()
    if replace_last and conversation.turns and conversation.turns[-1].is_ended:
        conversation.turns.pop()
    turn = Turn(question, search_text=search_text, where=session.where())
    conversation.turns.append(turn)
    if not conversation.title:
        conversation.title = shorten(question)
    st.query_params["c"] = conversation.id
    session.desk().submit(
        Job(turn, conversation, lambda: store.rag(settings), session.conversations().keep)
    )


def _show_welcome(base: Store) -> None:
    st.html(
        f'<div class="lr-welcome"><h1>{say("title")}</h1><p>{say("tagline")}</p></div>'
    )
    files = base.files()
    examples = [question for path, question in _EXAMPLES[session.language()] if path in files]
    if examples:
        st.html(f'<div class="lr-label">{say("try_one")}</div>')
        with st.container(key="examples"):
            for number, question in enumerate(examples):
                if st.button(question, key=f"example-{number}", width="stretch", wrap=True):
                    ask(question)
                    st.rerun()
    if pages := st.session_state.get("pages"):
        with st.container(key="first-steps"):
            st.page_link(pages["knowledge"], label=say("add_own"), icon=":material/upload_file:")
            st.page_link(pages["inside"], label=say("see_inside"), icon=":material/neurology:")


# one turn


def _show_turn(turn: Turn, base: Store, *, is_last: bool) -> None:
    rendered = _rendered(turn, base)
    st.html(rendered.question)
    if rendered.searched:
        st.html(rendered.searched)
    st.html(rendered.answer)
    if rendered.sources:
        st.html(rendered.sources)
    _show_actions(turn, is_last=is_last)
    if rendered.cost:
        st.html(rendered.cost)


@dataclass(frozen=True, slots=True)
class _Rendered:
    question: str
    searched: str
    answer: str
    sources: str
    cost: str


def _rendered(turn: Turn, base: Store) -> _Rendered:
    """A finished turn as HTML; made once for each state of the knowledge base."""
    language = session.language()
    key = (turn.id, turn.state, language, base.generation, str(base.folder))
    kept: dict[object, _Rendered] = st.session_state.setdefault("rendered", {})
    if key not in kept:
        while len(kept) >= _HTML_KEPT:
            kept.pop(next(iter(kept)))
        searched = ""
        if not turn.where.is_everything:
            searched = f'<div class="lr-muted lr-searched">{scope_text(turn.where, language)}</div>'
        if turn.searched and turn.searched != turn.question:
            searched += (
                f'<div class="lr-muted lr-searched">{say("searched_for")}: {escape(turn.searched)}</div>'
            )
        sources = ""
        if turn.answer is not None:
            documents = _documents(turn.answer, base)
            sources = sources_html(turn.answer, turn.id, documents, language)
        kept[key] = _Rendered(
            question_html(turn.question, language, turn.id), searched, answer_html(turn, language), sources,
            cost_html(turn, language),
        )
    return kept[key]


def _documents(answer: Answer, base: Store) -> dict[str, str]:
    """The texts of the files that the answer's passages come from, as far as they are still there."""
    texts: dict[str, str] = {}
    for path in {hit.chunk.path for hit in answer.hits}:
        try:
            texts[path] = base.document(path).text
        except KnowledgeBaseError:
            continue  # removed since; its card says so
    return texts


def _show_actions(turn: Turn, *, is_last: bool) -> None:
    answer = turn.answer
    found = source_view.places(answer) if answer is not None else []
    if found:
        with st.container(horizontal=True, gap="small", key=f"views-{turn.id}"):
            for place in found:
                if st.button(
                    escape_label(place.label(session.language())), key=f"view-{turn.id}-{place.key}",
                    icon=":material/find_in_page:",
                ):
                    st.session_state["source_view"] = place
                    st.rerun()
    with st.container(horizontal=True, gap="small", vertical_alignment="center", key=f"actions-{turn.id}"):
        if answer is not None:
            st.html(copy_html(answer.text, session.language()), width="content")
        if is_last:
            if st.button(say("ask_again"), key=f"again-{turn.id}", icon=":material/refresh:", type="tertiary"):
                ask(turn.question, search_text=turn.search_text, replace_last=True)
                st.rerun()
            _show_edit(turn)
            _show_search_correction(turn)
        if answer is not None:
            st.feedback(
                "thumbs", key=f"feedback-{turn.id}", default=turn.feedback, on_change=_keep_feedback,
                args=(turn, session.conversation()),
            )


def _show_edit(turn: Turn) -> None:
    with st.popover(say("edit"), icon=":material/edit:", type="tertiary", key=f"edit-{turn.id}"):
        with st.form(f"edit-form-{turn.id}", border=False):
            question = st.text_area(say("edit"), turn.question, max_chars=4000, label_visibility="collapsed")
            is_sent = st.form_submit_button(say("send"), type="primary")
        if is_sent and question.strip():
            ask(question.strip(), replace_last=True)
            st.rerun()


def _show_search_correction(turn: Turn) -> None:
    """What was searched for, to be corrected; the question itself stays."""
    if not turn.searched:
        return
    with st.popover(
        say("searched_for"), icon=":material/manage_search:", type="tertiary", key=f"search-{turn.id}"
    ):
        with st.form(f"search-form-{turn.id}", border=False):
            search_text = st.text_area(say("change_search"), turn.searched, max_chars=4000)
            is_sent = st.form_submit_button(say("search_again"), type="primary")
        if is_sent and search_text.strip():
            ask(turn.question, search_text=search_text.strip(), replace_last=True)
            st.rerun()


def _keep_feedback(turn: Turn, conversation: Conversation) -> None:
    turn.feedback = st.session_state.get(f"feedback-{turn.id}")
    session.conversations().keep(conversation)


def _show_conversation_tools(conversation: Conversation) -> None:
    with st.container(horizontal=True, gap="small", horizontal_alignment="right", key="conversation-tools"):
        st.download_button(
            say("export"), data=conversation.to_markdown, file_name="conversation.md",
            mime="text/markdown", icon=":material/download:", type="tertiary", on_click="ignore",
        )
        with st.popover(say("rename"), icon=":material/label:", type="tertiary", key="rename"):
            title = st.text_input(say("rename"), conversation.title, max_chars=80)
            if title.strip() and title != conversation.title:
                conversation.title = title.strip()
                session.conversations().keep(conversation)
                st.rerun()
        if st.button(say("delete"), key="delete-conversation", icon=":material/delete:", type="tertiary"):
            session.conversations().delete(conversation.id)
            session.open_conversation(None)
            st.rerun()


def _scroll_to(turn: Turn) -> None:
    """Bring a turn's question to the top."""
    moment = "answered" if turn.is_ended else "asked"
    _scroller()(key=f"scroll-{moment}", data={"turn": turn.id, "moment": moment}, height=0)


@st.cache_resource(show_spinner=False)
def _scroller() -> Any:
    return st.components.v2.component("scroll_to_turn", js=_SCROLL)


@st.cache_resource(show_spinner=False)
def _copier() -> Any:
    return st.components.v2.component("copy_answers", js=_COPY)


# an answer that is being made


def _follow(turn: Turn, conversation: Conversation) -> None:
    """Show the turn while it is answered. Whatever interrupts this script leaves the answer alone."""
    desk = session.desk()
    st.html(question_html(turn.question, session.language(), turn.id))
    slot = st.empty()
    shown = ""
    slot.html(live_html(turn, session.language(), num_before=desk.num_before(turn)))
    _scroll_to(turn)
    st.button(
        say("stop"), key=f"stop-{turn.id}", icon=":material/stop_circle:", on_click=desk.stop,
        args=(turn,),
    )
    for waiting in conversation.turns[conversation.turns.index(turn) + 1 :]:
        st.html(question_html(waiting.question, session.language(), waiting.id))
        st.html(live_html(waiting, session.language(), num_before=desk.num_before(waiting)))
    while not turn.is_ended:
        now = live_html(turn, session.language(), num_before=desk.num_before(turn))
        if now != shown:
            slot.html(now)
            shown = now
        time.sleep(_LOOK_SECONDS)
    st.rerun()
