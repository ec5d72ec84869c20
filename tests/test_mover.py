"""A base moves from its folder into Milvus without a text being embedded again."""

import pytest
from fakes import WordEmbedder
from test_store import NEEDS_MILVUS, WORDS, change, put, settings_for

from ingest import sync
from rag.document import Chunk, Document
from rag.errors import KnowledgeBaseError
from rag.knowledge import FileRecord
from rag.store import create_store, open_store

pytestmark = NEEDS_MILVUS


@pytest.fixture
def source(tmp_path):
    base = create_store(settings_for("embedded", tmp_path))
    put(base, "a.txt", "apples are red", "bananas are yellow")
    put(base, "文件/b.txt", "cherries are dark")
    with base.writing():
        base.put_failure(FileRecord("broken.pdf", "h", 9, "failed", error="no text"))
        base.set_meta("roots", "[1]")
    return base


def move(source, tmp_path):
    from ingest.mover import move_to_milvus

    return move_to_milvus(source, str(tmp_path / "kb.db"))


def test_all_that_a_base_holds_is_there_after_the_move(source, tmp_path):
    calls = WORDS.calls
    report = move(source, tmp_path)
    assert (report.files, report.chunks, report.unchanged) == (3, 3, 0)
    assert WORDS.calls == calls
    target = open_store(settings_for("milvus", tmp_path))
    assert target.files() == source.files()
    assert target.meta("roots") == "[1]" and target.meta("schema") is None
    for path in ("a.txt", "文件/b.txt"):
        assert target.document(path) == source.document(path)
        assert target.chunks_of(path) == source.chunks_of(path)
    assert (target.all_vectors()[1] == source.all_vectors()[1]).all()
    terms = ["are", "red", "b"]
    assert target.term_counts(terms) == source.term_counts(terms)
    target.check_embedder(WORDS)
    assert target.check() == []
    target.close()


def test_a_second_move_carries_only_the_changes(source, tmp_path):
    move(source, tmp_path)
    put(source, "a.txt", "grapes are green")
    change(source, lambda: source.remove_file("文件/b.txt"))
    report = move(source, tmp_path)
    assert (report.files, report.chunks, report.unchanged, report.removed) == (1, 1, 1, 1)
    target = open_store(settings_for("milvus", tmp_path))
    assert target.files() == source.files()
    assert target.term_counts(["grape", "cherri", "are"]) == {"grape": 1, "cherri": 0, "are": 1}
    target.close()


def test_new_dates_are_carried_over_without_the_files(source, tmp_path):
    move(source, tmp_path)
    change(source, lambda: source.set_modified({"a.txt": 1_700_000_000.0}))
    assert (move(source, tmp_path).files, move(source, tmp_path).unchanged) == (0, 3)
    target = open_store(settings_for("milvus", tmp_path))
    assert target.files() == source.files()
    target.close()


def test_a_base_of_another_embedder_is_not_written_over(source, tmp_path):
    target = create_store(settings_for("milvus", tmp_path))
    other = WordEmbedder("other")
    with target.writing():
        target.bind_embedder(other)
        target.put_file(
            FileRecord("x.txt", "h", 1, "ok"), Document("x.txt", "kept", "txt"), [Chunk("x.txt", "kept", 0, 4)],
            other.embed_passages(["kept"]),
        )
    with pytest.raises(KnowledgeBaseError, match="#NAME"):
        move(source, tmp_path)
    assert list(target.files()) == ["x.txt"]
    target.close()


def test_a_folder_is_ingested_into_milvus_as_a_sync(tmp_path):
    """Added, then unchanged, changed, moved and deleted; the same as in the embedded store."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.txt").write_text("Apples are red.")
    (docs / "b.txt").write_text("Bananas are yellow.")
    (docs / "c.txt").write_text("Cherries are dark.")
    both = [settings_for(kind, tmp_path) for kind in ("embedded", "milvus")]
    for settings in both:
        assert sync([docs], settings=settings, embedder=WordEmbedder()).embedded == 3
        embedder = WordEmbedder()
        assert sync([docs], settings=settings, embedder=embedder).embedded == 0 and embedder.calls == 0
    (docs / "a.txt").write_text("Apples are green.")
    (docs / "b.txt").rename(docs / "d.txt")
    (docs / "c.txt").unlink()
    seen = []
    for settings in both:
        report = sync([docs], settings=settings, embedder=WordEmbedder())
        store = open_store(settings)
        chunks = {path: [(chunk.id, chunk.text) for chunk in store.chunks_of(path)] for path in store.files()}
        seen.append(({file.path: file.status for file in report.files}, chunks, store.term_counts(["are", "green"])))
        store.close()
    assert seen[0] == seen[1]
    assert seen[0][0] == {"a.txt": "changed", "d.txt": "moved", "c.txt": "deleted"}
