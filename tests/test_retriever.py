"""Hits come from different places, and what is of one place is one hit."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import base_of

from rag.document import Chunk, Document, Page
from rag.embedder import load_embedder
from rag.errors import InputError, SettingsError
from rag.knowledge import FileRecord, KnowledgeBase
from rag.retrieval_steps import STEPS
from rag.retriever import Retriever
from rag.settings import Settings

FERRY = (
    "The ferry leaves Holm at 7 in the morning. ",
    "Bicycles travel free of charge. ",
    "The ferry back leaves the island at 6 in the evening. ",
)
OTHER = "A second ferry leaves from the northern harbour on Sundays. "


def retriever(
    folder: Path, texts: tuple[str, ...], pages: tuple[int, ...] | None, without: str = ""
) -> Retriever:
    """A base with a file of `texts` as its chunks, on `pages`, and another file."""
    embedder = load_embedder("bundled")
    base = KnowledgeBase.create(folder)
    with base.writing():
        base.bind_embedder(embedder)
        for path, parts, numbers in (("ferry.txt", texts, pages), ("other.txt", (OTHER,), None)):
            chunks, at, starts = [], 0, {}
            for number, part in zip(numbers or [None] * len(parts), parts, strict=True):
                chunks.append(Chunk(path, part, at, at + len(part), page=number, last_page=number))
                at += len(part)
                starts[number] = (starts.get(number, (at - len(part),))[0], at)
            document = Document(
                path, "".join(parts), "pdf" if numbers else "txt",
                pages=tuple(Page(n, *span) for n, span in starts.items()) if numbers else (),
            )
            vectors = embedder.embed_passages([chunk.indexed_text for chunk in chunks])
            base.put_file(FileRecord(path, path, 1, "ok"), document, chunks, vectors)
        base.publish()
    return Retriever(base, embedder, without=without)


def test_two_passages_of_one_page_are_one_hit_with_what_stands_between(tmp_path):
    hits = retriever(tmp_path / "kb", FERRY, (1, 1, 1)).retrieve("When does the ferry leave?", 3)
    assert [hit.chunk.path for hit in hits] in (["ferry.txt", "other.txt"], ["other.txt", "ferry.txt"])
    (ferry,) = (hit for hit in hits if hit.chunk.path == "ferry.txt")
    assert ferry.chunk.text == "".join(FERRY) and (ferry.chunk.start, ferry.page) == (0, 1)


def test_passages_of_different_pages_stay_different_hits(tmp_path):
    hits = retriever(tmp_path / "kb", FERRY, (1, 2, 3)).retrieve("When does the ferry leave?", 4)
    assert sorted(hit.page for hit in hits if hit.page) == [1, 2, 3]


def test_passages_far_apart_in_a_file_without_pages_stay_different_hits(tmp_path):
    far = (FERRY[0], "Tickets are sold on board. " * 40, FERRY[2])  # 1,080 characters between
    hits = retriever(tmp_path / "kb", far, None).retrieve("When does the ferry leave Holm and the island?", 3)
    starts = [hit.chunk.start for hit in hits if hit.chunk.path == "ferry.txt"]
    assert 0 in starts and len(FERRY[0]) + 1_080 in starts


@pytest.mark.parametrize("step", STEPS)
def test_every_step_can_be_left_out(tmp_path, step):
    hits = retriever(tmp_path / "kb", FERRY, (1, 2, 3), step).retrieve("When does the ferry leave Holm?", 1)
    assert hits[0].chunk.text == FERRY[0]


def test_without_joining_two_passages_of_one_page_are_two_hits(tmp_path):
    hits = retriever(tmp_path / "kb", FERRY, (1, 1, 1), "join").retrieve("When does the ferry leave?", 4)
    assert sorted(hit.chunk.text for hit in hits) == sorted((*FERRY, OTHER))


def test_without_vectors_other_words_for_the_same_are_not_found(tmp_path):
    asked = "Can I take my bike along?"
    with_vectors = retriever(tmp_path / "a", FERRY, (1, 2, 3), "close").retrieve(asked, 4)
    assert "Bicycles" in with_vectors[0].chunk.text
    assert retriever(tmp_path / "b", FERRY, (1, 2, 3), "dense").retrieve(asked, 4) == []


@pytest.mark.parametrize(("without", "says"), [("rerank", "no step rerank"), ("dense, terms", "nothing to search with")])
def test_a_step_that_does_not_exist_is_named_and_one_search_must_stay(without, says):
    with pytest.raises(SettingsError, match=says):
        Settings(retrieval_without=without)


HOUSE_RULES = (
    "The tenant of the flat in Harbour Street agrees to keep the staircase, the cellar and the yard clean, to report "
    "every defect of the heating and of the water pipes to the landlord without delay, and to pay for broken windows; "
    "{} in the flat and in the garden behind the house; the caretaker collects the waste and the office opens in the "
    "morning; deadline for the yearly statement of the costs may be told later."
)
HOUSE_RULES_ZH = (
    "第十二条 合同履行期间，房屋及附属设施发生自然损坏的，应当及时通知对方，并在约定的期限内安排维修人员上门处理，维修所需的材料费和人工费由甲方先行垫付，"
    "逾期未处理的，乙方可以自行委托第三方维修，有关费用凭票据结算，双方另有约定的从其约定，{}进场施工。"
)


def hits_of_two(tmp_path: Path, first: str, second: str, question: str) -> int:
    """How many passages come of two files that hold one text each."""
    base = base_of(tmp_path / "kb", {"a.txt": first, "b.txt": second}, load_embedder("bundled"))
    return len(Retriever(base, load_embedder("bundled")).retrieve(question, 5))


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (HOUSE_RULES, "dogs are allowed", "dogs are forbidden"), (HOUSE_RULES, "rents increase", "rents decrease"),
        (HOUSE_RULES, "keys come at nine am", "keys come at nine pm"), (HOUSE_RULES, "shows in May", "shows in June"),
        (HOUSE_RULES, "visits on Monday", "visits on Friday"), (HOUSE_RULES, "the landlord pays", "the tenant pays"),
        (HOUSE_RULES, "the landlord pays the tenant", "the tenant pays the landlord"),
        (HOUSE_RULES, "without delay keys come", "keys come"), (HOUSE_RULES, "dogs live", "dogs live not"),
        (HOUSE_RULES_ZH, "每日上午可以", "每日下午可以"), (HOUSE_RULES_ZH, "甲方可以", "乙方可以"),
        (HOUSE_RULES_ZH, "费用上涨的可以", "费用下降的可以"), (HOUSE_RULES_ZH, "每日可以", "每日不可以"),
    ],
)
def test_passages_that_say_something_else_are_both_found(tmp_path, text, first, second):
    """One word replaced among fifty used to count as a near duplicate, and one of the two was dropped."""
    assert hits_of_two(tmp_path, text.format(first), text.format(second), text.format(first)[-120:]) == 2


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (HOUSE_RULES, "dogs live", "dogs and cats live"), (HOUSE_RULES, "Dogs, live", "dogs live"),
        (HOUSE_RULES_ZH, "每日可以", "每日都可以"), (HOUSE_RULES_ZH, "每日可以", "每日，可以"),
    ],
)
def test_of_passages_that_hardly_differ_one_is_found(tmp_path, text, first, second):
    assert hits_of_two(tmp_path, text.format(first), text.format(second), text.format(first)[-120:]) == 1


def test_a_question_with_half_a_character_is_refused_with_its_number(tmp_path):
    """Bytes that a terminal can't decode used to end in a traceback of the tokenizer."""
    with pytest.raises(InputError, match=r"question 2 of 2 holds half a character \(U\+D83D, character 5\)"):
        retriever(tmp_path, FERRY, None).retrieve_batch(["whole 🙂", "half\ud83d?"], 3)
