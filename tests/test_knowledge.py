import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import WordEmbedder

from rag.document import Chunk, Document, Page
from rag.errors import InputError, KnowledgeBaseError
from rag.filter import Filter
from rag.knowledge import FileRecord, KnowledgeBase, database_error

EMBEDDER = WordEmbedder()


def put(base: KnowledgeBase, path: str, *texts: str) -> None:
    """Store a file whose chunks are `texts`, a line each."""
    text = "\n".join(texts)
    chunks, start = [], 0
    for part in texts:
        chunks.append(Chunk(path, part, start, start + len(part)))
        start += len(part) + 1
    vectors = EMBEDDER.embed_passages([chunk.indexed_text for chunk in chunks])
    with base.writing():
        base.bind_embedder(EMBEDDER)
        base.put_file(FileRecord(path, "hash", len(text), "ok"), Document(path, text, "txt"), chunks, vectors)


@pytest.fixture
def base(tmp_path):
    base = KnowledgeBase.create(tmp_path / "知识 库")
    put(base, "a.txt", "apples are red", "bananas are yellow")
    put(base, "b.txt", "cherries are dark")
    with base.writing():
        base.publish()
    return base


def found(base: KnowledgeBase, text: str, k: int = 1) -> list[str]:
    rows = [row for row, _ in base.search_dense(EMBEDDER.embed_questions([text]), k)[0]]
    stored = base.stored_chunks(rows)
    return [stored[row].chunk.text for row in rows]


def test_what_is_stored_comes_back(base):
    assert list(base.files()) == ["a.txt", "b.txt"]
    assert base.files()["a.txt"].chunks == 2
    assert base.document("a.txt").text == "apples are red\nbananas are yellow"
    assert [chunk.text for chunk in base.chunks_of("a.txt")] == ["apples are red", "bananas are yellow"]
    assert found(base, "yellow bananas") == ["bananas are yellow"]
    assert [row for row, _ in base.search_terms(["cherri"], 5)] == [3]


def test_a_file_put_again_replaces_what_it_had(base):
    put(base, "a.txt", "grapes are green")
    assert base.count_chunks() == 2
    assert found(base, "bananas are yellow") != ["bananas are yellow"]
    assert base.search_terms(["banana"], 5) == []


def test_a_moved_file_keeps_its_text_and_vectors(base):
    before = base.all_vectors()[1]
    calls = EMBEDDER.calls
    with base.writing():
        base.move_file("a.txt", "folder/c.txt", base.files()["a.txt"])
    assert EMBEDDER.calls == calls
    assert list(base.files()) == ["b.txt", "folder/c.txt"]
    assert [chunk.path for chunk in base.chunks_of("folder/c.txt")] == ["folder/c.txt"] * 2
    assert np.array_equal(np.sort(base.all_vectors()[1], axis=0), np.sort(before, axis=0))


def test_a_failed_file_leaves_nothing_to_be_found(base):
    with base.writing():
        base.put_failure(FileRecord("a.txt", "hash2", 5, "failed", error="broken"))
    assert base.files()["a.txt"].error == "broken"
    assert base.count_chunks() == 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "outdated"])
def test_a_damaged_index_file_changes_no_answer(base, damage):
    file = base.folder / "vectors.faiss"
    expected = found(base, "apples red", 3)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "garbage":
        file.write_bytes(b"not an index")
    else:
        put(base, "d.txt", "dates are brown and dry")
    again = KnowledgeBase.open(base.folder)
    assert again.index_state() == {"truncated": "damaged", "garbage": "damaged"}.get(damage, damage)
    assert found(again, "apples red", 3)[0] == expected[0]
    if damage == "outdated":
        assert found(again, "dates brown dry") == ["dates are brown and dry"]
    with again.writing():
        again.publish()
    assert again.index_state() == "current"


def test_another_embedder_is_refused_with_what_to_do(base):
    with pytest.raises(KnowledgeBaseError, match="--reembed"):
        base.check_embedder(WordEmbedder("other"))


def test_reembedding_binds_the_new_embedder(base):
    other = WordEmbedder("other")
    with base.writing():
        assert base.reembed(other) == 3
        base.publish()
    base.check_embedder(other)
    assert found(base, "yellow bananas") == ["bananas are yellow"]


def test_a_second_writer_is_told_who_writes(base):
    script = (
        "import sys; from rag.knowledge import KnowledgeBase\n"
        "base = KnowledgeBase.open(sys.argv[1])\n"
        "with base.writing():\n    print('in', flush=True); sys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(base.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(KnowledgeBaseError, match=f"pid {other.pid}"), base.writing():
        pass
    other.communicate("\n")
    with base.writing():
        pass


def test_a_reader_sees_one_state_while_another_connection_writes(base):
    """A question searches vectors first and terms later; a file deleted in between must not tear it."""
    with base.snapshot():
        assert base.count_chunks() == 3
        writer = threading.Thread(target=lambda: _remove(base))
        writer.start()
        writer.join()
        assert base.count_chunks() == 3
        assert found(base, "apples red") == ["apples are red"]
    assert base.count_chunks() == 1


def _remove(base: KnowledgeBase) -> None:
    with base.writing():
        base.remove_file("a.txt")


def test_a_change_that_fails_half_way_leaves_everything_as_it_was(base):
    chunk = Chunk("a.txt", "new", 0, 3)
    with pytest.raises(UnicodeEncodeError), base.writing():
        base.put_file(
            FileRecord("a.txt", "x", 1, "ok"), Document("a.txt", "\ud800", "txt"), [chunk],
            EMBEDDER.embed_passages(["new"]),
        )
    assert base.count_chunks() == 3
    assert base.check() == []


def test_a_base_from_before_dates_is_read_and_given_them_by_its_next_writer(base):
    base._connection.execute("ALTER TABLE files DROP COLUMN modified")
    base.close()
    old = KnowledgeBase.open(base.folder)
    assert old.files()["a.txt"].modified is None and old.matching(Filter(under="a.txt")) == ("a.txt",)
    with pytest.raises(InputError, match="have no date yet"):
        old.matching(Filter(until="2030-01-01"))
    with old.writing():
        old.set_modified(dict.fromkeys(old.files(), 1_700_000_000.0))
    assert old.matching(Filter(until="2030-01-01")) == tuple(old.files())


def test_pages_are_found_by_offset(base):
    text = "page one.page two."
    document = Document("p.pdf", text, "pdf", pages=(Page(1, 0, 9), Page(2, 9, 18)))
    with base.writing():
        base.put_file(FileRecord("p.pdf", "h", 1, "ok"), document, [], np.zeros((0, 64), np.float32))
    assert [base.page_at("p.pdf", at) for at in (0, 8, 9, 17)] == [1, 1, 2, 2]
    assert base.page_at("a.txt", 0) is None


def test_a_missing_base_says_how_to_build_one(tmp_path):
    with pytest.raises(KnowledgeBaseError, match="python -m ingest"):
        KnowledgeBase.open(tmp_path)


def test_a_file_that_is_no_database_is_reported(tmp_path):
    (tmp_path / "knowledge.sqlite").write_text("this is not a database, it is a text of some length")
    with pytest.raises(KnowledgeBaseError, match="can't be read"):
        KnowledgeBase.open(tmp_path)


def damaged(base):
    """A base whose pages behind the first are overwritten, as by a bad disk: it opens, and little more."""
    base.close()
    file = base.folder / "knowledge.sqlite"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    return KnowledgeBase(base.folder, read_only=False)


def test_a_damaged_database_says_what_to_do(base):
    with pytest.raises(KnowledgeBaseError, match="Restore it from a copy, or delete the folder and run"):
        damaged(base).check()


def test_only_errors_of_the_database_file_are_explained(base):
    connection = sqlite3.connect(base.folder / "knowledge.sqlite")
    with pytest.raises(sqlite3.Error) as bug:
        connection.execute("SELECT nothing FROM nowhere")
    assert database_error(bug.value, base.folder) is None
    connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.Error) as full:
        connection.execute("CREATE TABLE more AS SELECT hex(zeroblob(1000000))")
    assert "Check the room on the disk" in str(database_error(full.value, base.folder))


READ_WITHOUT_RIGHTS = """
import os, sys
from rag.errors import KnowledgeBaseError
from rag.knowledge import KnowledgeBase
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(KnowledgeBase.open(sys.argv[1]).count_chunks())
except KnowledgeBaseError as error:
    print(error)
"""


def test_a_whole_base_whose_writer_was_killed_is_not_to_be_deleted_where_it_cannot_be_written():
    """Its log has not been taken over yet, for which SQLite must write: the advice was to delete the base."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        base = KnowledgeBase.create(Path(parent) / "kb")
        put(base, "a.txt", "apples are red")
        copy = Path(parent) / "copy"
        copy.mkdir()
        for name in ("knowledge.sqlite", "knowledge.sqlite-wal"):  # as it lies there while nobody has closed it
            shutil.copy(base.folder / name, copy / name)
        assert (copy / "knowledge.sqlite-wal").stat().st_size
        copy.chmod(0o555)
        read = [sys.executable, "-c", READ_WITHOUT_RIGHTS, str(copy)]
        said = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        assert "Nothing is lost. Make the folder writable" in said and "delete" not in said
        copy.chmod(0o755)
        again = KnowledgeBase.open(copy)
        assert again.count_chunks() == 1
        again.close()
        copy.chmod(0o555)
        assert subprocess.run(read, capture_output=True, text=True, check=True).stdout == "1\n"
        copy.chmod(0o755)


def test_inconsistent_tables_are_found(base):
    connection = sqlite3.connect(base.folder / "knowledge.sqlite")
    connection.execute("DELETE FROM chunks WHERE id = 1")
    connection.commit()
    assert KnowledgeBase.open(base.folder).check() == [
        "1 search terms without their chunk", "1 files whose number of chunks is wrong"
    ]


def test_a_search_that_would_read_too_much_leaves_the_commonest_terms_out(base, monkeypatch):
    """"are" stands in all three chunks, "red" in one."""
    assert sorted(row for row, _ in base.search_terms(["are", "red"], 5)) == [1, 2, 3]
    monkeypatch.setattr("rag.knowledge._MOST_POSTINGS", 3)
    assert [row for row, _ in base.search_terms(["are", "red"], 5)] == [1]
    monkeypatch.setattr("rag.knowledge._MOST_POSTINGS", 1)
    assert sorted(row for row, _ in base.search_terms(["are"], 5)) == [1, 2, 3]
