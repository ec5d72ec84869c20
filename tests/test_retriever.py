"""Hits come from different places, and what is of one place is one hit."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag.document import Chunk, Document, Page
from rag.embedder import load_embedder
from rag.errors import SettingsError
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
