"""The parts of the pages that need no page: markup, access, uploads, conversations, the line."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import texts
from app.access import PasswordGate, is_local
from app.conversations import Conversation, ConversationStore, Turn, shorten
from app.jobs import Desk, Job
from app.markup import (
    answer_html,
    cost_html,
    escape_label,
    live_html,
    question_html,
    scope_text,
    segments,
    source_id,
    sources_html,
)
from app.page_pictures import _find_ranges, draw_page
from app.uploads import (
    UploadBatch,
    check_upload,
    delete_uploads,
    sanitise_name,
    sanitise_path,
    store_upload,
    suffixes,
    uploaded_names,
)
from rag.answer import Answer, Citation, Disagreement, GenerationStats, Hit
from rag.document import Chunk
from rag.errors import GeneratorError, InputError, LoadError
from rag.filter import Filter

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> ![p](http://evil.test/p.png) "\'>'
KNOWLEDGE = Path(__file__).parent.parent / "knowledge"


class Elements(HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.by_tag: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.by_tag.append((self.tags[-1] if self.tags else "", data))
        self.text += data


def make_answer(
    text: str = "The fee is 20 euros [1].", *, document: str = "Fees. The fee is 20 euros. It is due in May.",
    path: str = "fees.md", unsupported: tuple[str, ...] = (), kind: Any = "generated",
) -> Answer:
    """An answer that cites "The fee is 20 euros." of the document, [6, 26)."""
    hit = Hit(chunk=Chunk(path, document, 0, len(document), title="Fees"), score=2.5, page=None)
    return Answer(
        question="What is the fee?", text=text, kind=kind, hits=(hit,), unsupported=unsupported,
        citations=(Citation(1, path, None, 6, 26, document[6:26]),),
    )


# markup


def test_nothing_from_a_user_a_model_or_a_document_becomes_markup() -> None:
    answer = make_answer(
        f"{HOSTILE} [1]", document=f"Fees.{HOSTILE} and more of it", path=f"{HOSTILE}.md",
        unsupported=(HOSTILE,),
    )
    turn = Turn("q", state="done", answer=answer)
    pages = [
        question_html(HOSTILE, "en", "t"),
        answer_html(turn, "zh"),
        sources_html(answer, turn.id, {answer.hits[0].chunk.path: answer.hits[0].chunk.text}, "en"),
        sources_html(answer, turn.id, {}, "en"),
        live_html(Turn("q", state="writing", text=HOSTILE), "en", num_before=0),
        answer_html(Turn("q", state="failed", error=HOSTILE), "en"),
        answer_html(Turn("q", state="stopped", text=HOSTILE), "en"),
    ]
    allowed = {"div", "span", "a", "b", "i", "p", "h3", "details", "summary", "mark"}
    for page in pages:
        found = Elements(page)
        assert set(found.tags) <= allowed, set(found.tags) - allowed
        assert all(not name.startswith("on") for name, _ in found.attributes)
        assert all(value.startswith("#source-") for name, value in found.attributes if name == "href")
        assert "<script>alert(1)</script>" in found.text


@pytest.mark.parametrize("state", ["done", "stopped", "failed"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_turn_that_ends_while_it_is_drawn_is_drawn_as_being_written(state: Any, language: Any) -> None:
    # The worker's thread ends a turn between the page's look at it and the drawing: a KeyError once.
    html = live_html(Turn("q", state=state, text="The fee"), language, num_before=0)
    assert texts.text(language, "writing") in html and "The fee" in html


def test_a_label_shows_markdown_signs_as_they_are() -> None:
    assert escape_label("a*b [c](d)\n_e_") == r"a\*b \[c\]\(d\) \_e\_"


def test_a_chip_leads_to_the_exact_characters_that_are_cited() -> None:
    answer = make_answer()
    html = answer_html(Turn("q", id="t", state="done", answer=answer), "en")
    assert f'href="#{source_id("t", 1)}"' in html
    source = sources_html(answer, "t", {"fees.md": answer.hits[0].chunk.text}, "en")
    assert f'<mark id="{source_id("t", 1)}">The fee is 20 euros.</mark>' in source


def test_a_marker_without_a_citation_leads_nowhere() -> None:
    html = answer_html(Turn("q", state="done", answer=make_answer("See [7].")), "en")
    assert "<a " not in html and ">7</span>" in html


def chips(html: str) -> list[str]:
    return re.findall(r'lr-chip[^>]*>(\d+)<', html)


def test_only_the_marker_behind_a_quotation_is_a_chip() -> None:
    # The source's own references were once links to passages that have nothing to do with them.
    quote = "It was proposed in [2] and refined in [1]"
    answer = make_answer(f"{quote} [1]\n{quote}. [1]", document=quote, kind="quoted")
    html = answer_html(Turn("q", state="done", answer=answer), "en")
    assert chips(html) == ["1", "1"] and html.count("proposed in [2] and refined in [1]") == 2


def test_brackets_of_the_text_are_no_chips() -> None:
    document = "The fee, proposed in [1], lies in [0, 1] and is fees[0]."
    answer = make_answer("The fee, proposed in [1], lies in [0, 1] and is fees[0] [1]. See `a[1]`.", document=document)
    for turn in (Turn("q", state="done", answer=answer), Turn("q", state="stopped", text=answer.text, hits=answer.hits)):
        html = answer_html(turn, "en")
        assert chips(html) == ["1"]
        assert "proposed in [1], lies in [0, 1] and is fees[0]<" in html and "`a[1]`" in html
    assert chips(live_html(Turn("q", state="writing", text="A fee [1, 2].", hits=answer.hits * 2), "en", num_before=0)) == ["1", "2"]


def test_an_unsupported_sentence_is_marked_and_no_other() -> None:
    answer = make_answer("The fee is 20 euros [1]. It never changes.", unsupported=("It never changes.",))
    html = answer_html(Turn("q", state="done", answer=answer), "en")
    assert re.findall(r'<span class="lr-unsupported">(.*?)</span>', html) == ["It never changes."]
    assert texts.text("en", "unsupported_note") in html


@pytest.mark.parametrize("kind", ["generated", "quoted", "refused"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_kind_of_an_answer_is_written_on_it(kind: str, language: Any) -> None:
    html = answer_html(Turn("q", state="done", answer=make_answer(kind=kind)), language)
    assert f'data-kind="{kind}"' in html and texts.text(language, kind) in html


def test_segments_are_one_slice_of_the_document_with_the_citation_cut_out() -> None:
    document = "".join(f"Sentence number {n} stands here.\n" for n in range(60))
    start, end = document.index("Sentence number 20"), document.index("Sentence number 30")
    cited = document.index("Sentence number 24")
    shown = segments(document, start, end, [(cited, cited + 31)])
    joined = "".join(segment.text for segment in shown)
    assert joined in document
    assert [s.text for s in shown if s.kind == "cited"] == ["Sentence number 24 stands here."]
    assert [s.kind for s in shown] == ["around", "passage", "cited", "passage", "around"]
    assert shown[0].text.startswith("Sentence")  # cut at a line, not within a word


def test_of_a_long_passage_the_part_around_the_citation_is_shown() -> None:
    document = "".join(f"Sentence number {n:04} stands here.\n" for n in range(400))
    cited = document.index("Sentence number 0200")
    shown = segments(document, 0, len(document), [(cited, cited + 33)])
    assert [s.kind for s in shown] == ["passage", "cited", "passage"]
    assert len("".join(s.text for s in shown)) < 1200
    whole = segments(document, 100, 9000, [])
    assert document[100:9000] in "".join(s.text for s in whole)


def test_a_source_that_changed_since_says_so_and_shows_the_passage_as_it_was() -> None:
    answer = make_answer()
    html = sources_html(answer, "t", {"fees.md": "Something else now."}, "en")
    assert texts.text("en", "changed_since") in html
    assert ">The fee is 20 euros.</mark>" in html


def test_every_text_is_there_in_both_languages_with_the_same_values() -> None:
    for key in texts.KEYS:
        english, chinese = texts._TEXTS[key]
        assert english and chinese
        assert set(re.findall(r"{(\w+)}", english)) == set(re.findall(r"{(\w+)}", chinese)), key


def test_every_text_is_used() -> None:
    code = "".join(file.read_text(encoding="utf-8") for file in Path(texts.__file__).parent.glob("*.py"))
    built = {"generated", "quoted", "refused", "generated_note", "quoted_note", "refused_note", "queued",
             "loading", "searching", "reading", "writing", "too_large", "empty_file", "wrong_type",
             "not_what_it_says", "retrieval", "prefill", "decode", "check", "added", "changed", "moved", "deleted", "unchanged"}
    unused = [key for key in texts.KEYS if key not in built and code.count(f'"{key}"') < 2]
    assert unused == []


def test_the_style_sheet_holds_no_sign_for_which_the_browser_drops_it_whole() -> None:
    assert "<" not in (Path(texts.__file__).parent / "style.css").read_text(encoding="utf-8")


# access


def test_the_password_is_wanted_and_attempts_are_limited() -> None:
    gate = PasswordGate("密码 one")
    assert gate.check("密码 one", "a", now=0.0)
    assert not any(gate.check("guess", "a", now=float(n)) for n in range(5))
    assert gate.seconds_locked("a", now=5.0) == 295.0  # 300 s after the first of the five, at 0
    assert not gate.check("密码 one", "a", now=5.0)  # locked, even though it is right
    assert gate.check("密码 one", "b", now=5.0)  # another address is not
    assert gate.check("密码 one", "a", now=301.0)


def test_many_addresses_together_are_limited_too() -> None:
    gate = PasswordGate("p")
    for n in range(50):
        gate.check("guess", f"10.0.0.{n}", now=0.0)
    assert gate.seconds_locked("10.9.9.9", now=1.0) > 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), (None, False),
     ("", False), ("192.168.1.4", False), ("my-server", False)],
)
def test_only_a_loopback_address_counts_as_local(address: str | None, expected: bool) -> None:
    assert is_local(address) is expected


# uploads


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("报告 2024.pdf", "报告 2024.pdf"),
        ("../../etc/passwd.txt", "passwd.txt"),
        ("C:\\Users\\x\\a.md", "a.md"),
        (".htaccess", "htaccess"),
        ("a\x00b\nc.txt", "abc.txt"),
        ("x\u202egpj.md", "xgpj.md"),
        ("con.txt", "file con.txt"),
        ("a:b?.md", "a_b_.md"),
        ("~$draft.docx", "draft.docx"),
        ("/", "file"),
    ],
)
def test_uploaded_names_become_plain_names(given: str, expected: str) -> None:
    assert sanitise_name(given) == expected


def test_a_long_name_keeps_its_ending_and_fits_every_file_system() -> None:
    name = sanitise_name("长" * 300 + ".pdf")
    assert name.endswith("长.pdf") and len(name.encode()) <= 180


def test_uploads_are_judged_by_their_content() -> None:
    assert check_upload("a.pdf", b"%PDF-1.7 ...") is None
    assert check_upload("a.docx", b"PK\x03\x04...") is None
    assert check_upload("a.txt", "文字".encode()) is None
    assert check_upload("a.txt", "文字".encode("utf-16")) is None
    reasons = {
        name: (check_upload(name, data) or pytest.fail(name)).reason
        for name, data in {
            "a.pdf": b"MZ\x90\x00", "b.docx": b"<html>", "c.md": b"\x7fELF\x00\x00", "d.txt": b"",
            "e.exe": b"MZ",
        }.items()
    }
    assert reasons == {
        "a.pdf": "not_what_it_says", "b.docx": "not_what_it_says", "c.md": "not_what_it_says",
        "d.txt": "empty_file", "e.exe": "wrong_type",
    }
    assert ".pdf" in suffixes()


@pytest.mark.parametrize("name", ["rent.md~", "#rent.md#", "~$rent.md", "notes/rent.md~", " ~$rent.md"])
def test_what_an_editor_leaves_beside_a_file_never_replaces_it(tmp_path: Path, name: str) -> None:
    # Without their signs these were all called rent.md, and the old text replaced the new one.
    batch = UploadBatch(tmp_path)
    assert batch.take("notes/rent.md", b"1350 euros") is None and batch.take("rent.md", b"1350 euros") is None
    rejection = UploadBatch(tmp_path).take(name, b"900 euros")
    assert rejection is not None and (rejection.name, rejection.reason) == (name, "leftover")
    assert {(tmp_path / name).read_text() for name in uploaded_names(tmp_path)} == {"1350 euros"}


def test_names_that_differ_only_in_a_first_sign_stay_two_files(tmp_path: Path) -> None:
    for name in ("1 lease.md", "#1 lease.md", "~1 lease.md"):
        assert UploadBatch(tmp_path).take(name, name.encode()) is None
    assert uploaded_names(tmp_path) == ["#1 lease.md", "1 lease.md", "~1 lease.md"]
    assert (sanitise_name("~"), sanitise_name("~$.profile")) == ("file ~", "profile")


def test_of_two_files_of_one_name_given_together_the_second_is_refused(tmp_path: Path) -> None:
    batch = UploadBatch(tmp_path)
    assert batch.take("rent.md", b"1350 euros") is None
    for name in ("rent.md", "./rent.md"):
        rejection = batch.take(name, b"500 euros, the other flat")
        assert rejection is not None and rejection.reason == "same_name"
    assert batch.take("other/rent.md", b"500 euros, the other flat") is None
    assert (tmp_path / "rent.md").read_text() == "1350 euros"
    assert UploadBatch(tmp_path).take("rent.md", b"1400 euros") is None  # a later one is an update
    assert (tmp_path / "rent.md").read_text() == "1400 euros"


def test_an_upload_replaces_a_link_and_never_follows_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.txt").symlink_to(outside)
    stored = store_upload(folder, "../a.txt", b"theirs")
    assert stored == folder / "a.txt" and not stored.is_symlink()
    assert stored.read_text() == "theirs" and outside.read_text() == "mine"
    assert uploaded_names(folder) == ["a.txt"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("手册/zh/a.md", "手册/zh/a.md"),
        ("../../etc/passwd.txt", "etc/passwd.txt"),
        ("/etc/passwd.txt", "etc/passwd.txt"),
        ("C:\\Users\\x\\a.md", "C_/Users/x/a.md"),
        ("a/./../.../b.md", "a/b.md"),
        ("a/con/x\u202e.md", "a/file con/x.md"),
        ("/".join("123456789abc") + "/x.md", "5/6/7/8/9/a/b/c/x.md"),
        ("..", "file"),
    ],
)
def test_the_folders_of_an_upload_stay_and_lead_nowhere_else(given: str, expected: str) -> None:
    assert sanitise_path(given) == expected


def test_an_uploaded_folder_keeps_its_shape_and_goes_with_its_last_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "uploads"
    store_upload(folder, "docs/zh/a.md", b"x")
    store_upload(folder, "docs/b.md", b"x")
    (folder / "link").symlink_to(outside)
    with pytest.raises(InputError, match="link in .* is not a folder"):
        store_upload(folder, "link/c.md", b"x")
    assert list(outside.iterdir()) == []
    assert uploaded_names(folder) == ["docs/b.md", "docs/zh/a.md"]
    assert delete_uploads(folder, ["docs/zh/a.md"]) == ["docs/zh/a.md"]
    assert not (folder / "docs/zh").exists() and (folder / "docs/b.md").exists()


def test_only_files_in_the_upload_folder_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("x")
    folder = tmp_path / "uploads"
    store_upload(folder, "a.txt", b"x")
    assert delete_uploads(folder, ["../keep.txt", "a.txt", "b.txt"]) == ["a.txt"]
    assert (tmp_path / "keep.txt").exists() and uploaded_names(folder) == []


# conversations


def test_a_conversation_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path)
    conversation = store.start()
    answer = make_answer()
    conversation.turns = [
        Turn("What is the fee?", state="done", answer=answer, text=answer.text, feedback=1),
        Turn("And in May?", state="failed", error="no model"),
        Turn("still running", state="writing", text="half"),
    ]
    store.keep(conversation)
    again = ConversationStore(tmp_path).get(conversation.id)
    assert again is not None and again.title == "What is the fee?"
    assert [turn.question for turn in again.turns] == ["What is the fee?", "And in May?"]
    assert again.turns[0].answer == answer and again.turns[0].feedback == 1
    assert again.turns[1].error == "no model"
    assert store.get(conversation.id) is conversation  # open ones are shared, not read again


def test_conversations_are_found_by_what_was_said_and_can_be_deleted(tmp_path: Path) -> None:
    store = ConversationStore(tmp_path)
    for question in ("费用是多少？", "100% of what?", "Who pays?"):
        conversation = store.start()
        conversation.turns = [Turn(question, state="done", answer=make_answer())]
        store.keep(conversation)
    assert [entry.title for entry in store.entries("费用")] == ["费用是多少？"]
    assert [entry.title for entry in store.entries("100%")] == ["100% of what?"]
    assert len(store.entries("20 euros")) == 3
    store.delete(store.entries("费用")[0].id)
    assert store.entries("费用") == [] and len(store.entries()) == 2


def test_history_ends_before_the_turn_and_leaves_out_what_has_no_answer() -> None:
    first = Turn("a", state="done", answer=make_answer("A [1]."))
    failed, now, later = Turn("b", state="failed"), Turn("c"), Turn("d")
    conversation = Conversation(turns=[first, failed, now, later])
    assert conversation.history(before=now) == [("a", "A [1].")]


def test_the_export_holds_questions_answers_and_sources() -> None:
    conversation = Conversation(title="Fees *now*", turns=[Turn("What?", state="done", answer=make_answer())])
    assert conversation.to_markdown() == (
        "# Fees \\*now\\*\n\n## What?\n\nThe fee is 20 euros [1].\n\n"
        "- [1] fees.md: “The fee is 20 euros.”\n"
    )


def test_nothing_quoted_from_a_document_becomes_a_picture_or_html_in_the_export() -> None:
    # Whoever opens the export must not fetch what a document names.
    quote = "The fee\n![logo](http://evil.test/x.png) <img src=http://evil.test/y>"
    answer = replace(make_answer(), citations=(Citation(1, "fees.md", None, 0, len(quote), quote),))
    exported = Conversation(title="T", turns=[Turn("What?", state="done", answer=answer)]).to_markdown()
    line = "“The fee \\!\\[logo\\](http://evil.test/x.png) \\<img src=http://evil.test/y\\>”"
    assert exported.splitlines()[-1] == f"- [1] fees.md: {line}"


def test_titles_are_short() -> None:
    assert shorten("a  b\nc") == "a b c"
    assert len(shorten("字" * 200)) == 60


# the line


class SlowRag:
    """Writes word by word, each when it is told to; knows only its own question."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.settings = SimpleNamespace(top_k=3)
        self.base = SimpleNamespace(release=lambda: None)
        self.retriever = SimpleNamespace(search_batch=self._search)
        self.go = threading.Semaphore(0)
        self.histories: list[list[tuple[str, str]]] = []
        self.searched: list[str] = []
        self.fail = fail
        self.is_closed = False

    def _search(self, questions: list[str], k: int, *, where: Filter) -> list[Any]:
        self.searched += questions
        return [SimpleNamespace(hits=())]

    def stream(
        self, question: str, *, history: Any, retrieval: Any, stop: Any
    ) -> Iterator[str | Answer]:
        self.histories.append(list(history))
        try:
            for word in ("echo", " ", question):
                self.go.acquire()
                if self.fail:
                    raise self.fail
                yield word
            yield Answer(question, f"echo {question}", "generated", stats=GenerationStats())
        finally:
            self.is_closed = True


def _submit(desk: Desk, rag: SlowRag, question: str, conversation: Conversation) -> Turn:
    turn = Turn(question)
    conversation.turns.append(turn)
    desk.submit(Job(turn, conversation, lambda: rag, lambda kept: None))  # type: ignore[arg-type,return-value]
    return turn


def _wait(turn: Turn, *states: str) -> None:
    end = time.monotonic() + 10
    while turn.state not in states:
        assert time.monotonic() < end, f"{turn.state} instead of {states}"
        time.sleep(0.002)


def test_questions_are_answered_in_their_order_and_sessions_do_not_mix() -> None:
    desk, rag = Desk(), SlowRag()
    mine, theirs = Conversation(), Conversation()
    first = _submit(desk, rag, "one", mine)
    _wait(first, "reading")
    second = _submit(desk, rag, "two", theirs)
    third = _submit(desk, rag, "three", mine)
    assert [desk.num_before(turn) for turn in (first, second, third)] == [0, 1, 2]
    for _ in range(9):
        rag.go.release()
    _wait(third, "done")
    assert [turn.text for turn in (first, second, third)] == ["echo one", "echo two", "echo three"]
    # The third knew of the first, which had not ended when it was asked; never of the other session.
    assert rag.histories == [[], [], [("one", "echo one")]]


def test_stopping_keeps_what_was_written_and_the_next_question_goes_on() -> None:
    desk, rag, conversation = Desk(), SlowRag(), Conversation()
    first = _submit(desk, rag, "one", conversation)
    second = _submit(desk, rag, "two", conversation)
    rag.go.release()
    _wait(first, "writing")
    desk.stop(first)
    for _ in range(4):
        rag.go.release()
    _wait(second, "done")
    assert first.state == "stopped" and first.text == "echo" and first.answer is None
    assert second.text == "echo two" and rag.is_closed
    assert rag.histories == [[], []]


def test_a_question_stopped_in_the_line_is_never_searched() -> None:
    desk, rag, conversation = Desk(), SlowRag(), Conversation()
    first = _submit(desk, rag, "one", conversation)
    second = _submit(desk, rag, "two", conversation)
    desk.stop(second)
    assert second.state == "stopped"  # at once, although the first has not ended
    for _ in range(3):
        rag.go.release()
    _wait(first, "done")
    assert rag.searched == ["one"]


def test_a_question_is_stopped_while_its_model_is_loaded() -> None:
    desk, rag, conversation = Desk(), SlowRag(), Conversation()
    load = threading.Event()
    slow = Turn("one")
    conversation.turns.append(slow)

    def open_rag() -> Any:
        load.wait(10)
        return rag

    desk.submit(Job(slow, conversation, open_rag, lambda kept: None))
    _wait(slow, "loading")
    desk.stop(slow)
    _wait(slow, "stopped")  # the loading has not ended
    load.set()
    second = _submit(desk, rag, "two", conversation)
    for _ in range(3):
        rag.go.release()
    _wait(second, "done")
    assert rag.searched == ["two"]


def test_an_error_is_kept_for_the_page_and_the_line_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    desk, conversation = Desk(), Conversation()
    rags = [SlowRag(GeneratorError("no such model")), SlowRag(ZeroDivisionError("bug")), SlowRag()]
    turns = [_submit(desk, rag, str(n), conversation) for n, rag in enumerate(rags)]
    for rag in rags:
        for _ in range(3):
            rag.go.release()
    _wait(turns[2], "done")
    assert [turn.state for turn in turns] == ["failed", "failed", "done"]
    assert turns[0].error == "no such model" and turns[1].unexpected == "ZeroDivisionError"
    assert "ZeroDivisionError" in caplog.text  # with its traceback, in the terminal


def test_a_corrected_search_is_what_is_searched_for() -> None:
    desk, rag, conversation = Desk(), SlowRag(), Conversation()
    turn = Turn("And then?", search_text="fees in May")
    conversation.turns.append(turn)
    desk.submit(Job(turn, conversation, lambda: rag, lambda kept: None))  # type: ignore[arg-type,return-value]
    for _ in range(3):
        rag.go.release()
    _wait(turn, "done")
    assert rag.searched == ["fees in May"] and turn.searched == "fees in May"


def test_documents_that_disagree_are_told_with_both_sources_in_both_languages() -> None:
    chunks = [Chunk(f"{name}<b>.txt", text, 0, len(text)) for name, text in (("a", "Rent: 5 euros."), ("b", "Rent: 6 euros."))]
    first, second = (Citation(n, chunk.path, None, 0, len(chunk.text), chunk.text) for n, chunk in enumerate(chunks, 1))
    answer = Answer(
        "How much?", "Rent: 5 euros. [1]", "quoted", (first,), tuple(Hit(chunk, 1.0) for chunk in chunks),
        disagreements=(Disagreement("number", first, second, "5 euros", "6 euros"),),
    )
    turn = Turn("How much?", id="t", state="done", text=answer.text, answer=answer)
    for language, said in (("en", "The documents disagree"), ("zh", "文档说法不一")):
        found = Elements(answer_html(turn, language))  # type: ignore[arg-type]
        assert said in found.text and "5 euros" in found.text and "b<b>.txt" in found.text
        assert ("href", "#source-t-2") in found.attributes  # the source that the answer doesn't cite
        sources = sources_html(answer, "t", {chunk.path: chunk.text for chunk in chunks}, language)  # type: ignore[arg-type]
        assert sources.count("<mark") == 2 and "lr-more" not in sources
    kept = Turn.from_row("t", "How much?", answer.text, json.dumps(turn.to_dict()), None)
    assert kept.answer == answer


def test_a_turn_keeps_which_files_it_was_asked_of(tmp_path: Path) -> None:
    where = Filter(under="zh", type="pdf", since="2024-01-01")
    turn = Turn("Q", where=where, state="done")
    assert Turn.from_row(turn.id, "Q", "", json.dumps(turn.to_dict()), None).where == where
    old = {name: value for name, value in turn.to_dict().items() if name != "where"}  # kept by an earlier version
    assert Turn.from_row(turn.id, "Q", "", json.dumps(old), None).where.is_everything
    assert scope_text(where, "en") == "Only in: zh/ · pdf · from 2024-01-01"
    assert scope_text(Filter(file="<b>*"), "zh") == "仅限：&lt;b&gt;*"


@pytest.mark.parametrize(("estimated", "said"), [(True, "about 1,234"), (False, "1,234")])
def test_reckoned_numbers_of_tokens_are_said_to_be_so(estimated: bool, said: str) -> None:
    stats = GenerationStats(prompt_tokens=1234, new_tokens=9, generator="m", counts_estimated=estimated)
    turn = Turn("Q", state="done", answer=Answer("Q", "A", "generated", stats=stats))
    assert f"<dd>{said}</dd>" in cost_html(turn, "en")
    assert ("约 9 个词元" in cost_html(turn, "zh")) == estimated


# page pictures


def test_a_quote_is_found_where_spaces_and_hyphens_differ() -> None:
    assert _find_ranges("Thefeeis20euros.", "feeis20") == [(3, 10)]
    assert _find_ranges("abcdefghij-XX-klmnopqrst", "abcdefghijklmnopqrst") == [(0, 10), (14, 24)]
    assert _find_ranges("nothing of this", "something else entirely") == []


def test_a_passage_is_marked_on_its_page_and_on_no_other() -> None:
    file = next(KNOWLEDGE.glob("zh/*.pdf"))
    quote = "自回归的意思是，每个新词元都以前面所有词元为条件。"
    marked = draw_page(file, 1, (quote,))
    plain = draw_page(file, 1, ())
    assert marked.num_found == 1 and plain.num_found == 0
    assert marked.png[:8] == b"\x89PNG\r\n\x1a\n" and marked.png != plain.png
    assert draw_page(file, 3, (quote,)).num_found == 0


@pytest.mark.parametrize("left", [b"%PDF-1.7 half", b"", None])
def test_a_page_that_can_no_longer_be_drawn_is_said_to_be_so(tmp_path: Path, left: bytes | None) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(next(KNOWLEDGE.glob("en/*.pdf")).read_bytes())
    with pytest.raises(LoadError, match="page 99 of a.pdf"):  # it was longer when it was read
        draw_page(file, 99, ())
    file.unlink() if left is None else file.write_bytes(left)
    with pytest.raises(LoadError, match="page 1 of a.pdf"):
        draw_page(file, 1, ())
