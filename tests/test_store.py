"""What every store promises: the same tests on SQLite with FAISS, and on Milvus (Milvus Lite, really)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import WordEmbedder

from rag.document import Chunk, Document, Heading, Page
from rag.errors import InputError, KnowledgeBaseError, SettingsError
from rag.filter import EVERYTHING, Filter
from rag.knowledge import FileRecord
from rag.retriever import Retriever
from rag.settings import Settings
from rag.store import Store, create_store, find_store, open_store

WORDS = WordEmbedder()
HAS_MILVUS = all(importlib.util.find_spec(name) for name in ("pymilvus", "milvus_lite"))
NEEDS_MILVUS = pytest.mark.skipif(
    not HAS_MILVUS, reason="pymilvus and milvus-lite are not installed: pip install -e '.[milvus]'"
)


def settings_for(kind: str, folder) -> Settings:
    if kind == "embedded":
        return Settings(kb=str(folder / "知识 库"))
    return Settings(kb=str(folder / "kb"), store="milvus", milvus_uri=str(folder / "kb.db"))


@pytest.fixture(params=["embedded", pytest.param("milvus", marks=NEEDS_MILVUS)])
def settings(request, tmp_path) -> Settings:
    return settings_for(request.param, tmp_path)


@pytest.fixture
def empty(settings):
    store = create_store(settings)
    yield store
    store.close()


@pytest.fixture
def store(empty):
    put(empty, "a.txt", "apples are red", "bananas are yellow")
    put(empty, "b.txt", "cherries are dark")
    return empty


def put(store: Store, path: str, *texts: str, title: str = "") -> None:
    """Store a file whose chunks are `texts`, a line each."""
    text = "\n".join(texts)
    chunks, start = [], 0
    for part in texts:
        chunks.append(Chunk(path, part, start, start + len(part), title=title))
        start += len(part) + 1
    vectors = WORDS.embed_passages([chunk.indexed_text for chunk in chunks])
    with store.writing():
        store.bind_embedder(WORDS)
        store.put_file(FileRecord(path, "hash", len(text), "ok"), Document(path, text, "txt"), chunks, vectors)
        store.publish()


def change(store: Store, action: Callable[[], object]) -> None:
    with store.writing():
        action()
        store.publish()


def nearest(store: Store, text: str, k: int = 1, where: Filter = EVERYTHING) -> list[str]:
    rows = [row for row, _ in store.search_dense(WORDS.embed_questions([text]), k, where=where)[0]]
    stored = store.stored_chunks(rows)
    return [stored[row].chunk.text for row in rows]


def by_terms(store: Store, *terms: str, k: int = 9, where: Filter = EVERYTHING) -> list[str]:
    rows = [row for row, _ in store.search_terms(terms, k, where=where)]
    stored = store.stored_chunks(rows)
    return [stored[row].chunk.text for row in rows]


# what is stored


def test_files_come_back_in_the_order_of_their_paths(store):
    put(store, "Z.txt", "first of all")
    assert list(store.files()) == ["Z.txt", "a.txt", "b.txt"]


def test_a_files_record_comes_back_whole(store):
    record = FileRecord(
        "报告 \"q\" \\ 1%_.pdf", "abc", 123, "ok", pages=1, chunks=1, characters=5, seconds=0.25,
        pipeline="pdf/1", warnings=("eins", "二"), modified=1_700_000_000.25,
    )
    document = Document(record.path, "short", "pdf", pages=(Page(1, 0, 5),))
    change(store, lambda: store.put_file(
        record, document, [Chunk(record.path, "short", 0, 5)], WORDS.embed_passages(["short"])
    ))
    assert store.files()[record.path] == record


def test_counts_of_chunks_and_characters_are_the_stores_own(store):
    assert store.count_chunks() == 3
    record = store.files()["a.txt"]
    assert (record.chunks, record.characters) == (2, len("apples are red\nbananas are yellow"))


def test_a_document_comes_back_with_pages_and_headings(store):
    document = Document(
        "p.pdf", "page one.第二页。", "pdf", title="T", pages=(Page(1, 0, 9), Page(2, 9, 13)),
        headings=(Heading(1, "甲 \"x\"", 0),), warnings=("w",),
    )
    record = FileRecord("p.pdf", "h", 1, "ok", warnings=("w",))
    change(store, lambda: store.put_file(record, document, [], np.zeros((0, 64), np.float32)))
    assert store.document("p.pdf") == document
    assert [store.page_at("p.pdf", at) for at in (0, 8, 9, 12)] == [1, 1, 2, 2]


def test_a_long_document_comes_back_whole(store):
    """Longer than a field of Milvus holds, with characters of one to four bytes and quotes."""
    text = 'a"é中\U00020000\\' * 15_000
    change(store, lambda: store.put_file(
        FileRecord("long.txt", "h", 1, "ok"), Document("long.txt", text, "txt"), [], np.zeros((0, 64), np.float32)
    ))
    assert store.document("long.txt").text == text


def test_an_unknown_document_is_an_error_and_has_no_pages(store):
    with pytest.raises(KnowledgeBaseError, match="c.txt is not in the knowledge base"):
        store.document("c.txt")
    assert store.page_at("c.txt", 0) is None


def test_a_chunk_comes_back_with_its_place_and_terms(store):
    chunk = Chunk("d.md", "Running dogs 狗狗", 4, 16, 1, 2, ("Head", "头"), "Title")
    change(store, lambda: store.put_file(
        FileRecord("d.md", "h", 1, "ok"), Document("d.md", "....Running dogs 狗狗", "md"), [chunk],
        WORDS.embed_passages([chunk.indexed_text]),
    ))
    assert store.chunks_of("d.md") == [chunk]
    (row,) = [row for row, _ in store.search_terms(["狗狗"], 5)]
    stored = store.stored_chunks([row])[row]
    assert stored.chunk == chunk
    assert stored.body_terms == ("run", "dog", "狗狗")
    assert stored.place_terms == ("titl", "head", "头", "d")


def test_chunks_of_a_file_come_in_reading_order(store):
    assert [chunk.text for chunk in store.chunks_of("a.txt")] == ["apples are red", "bananas are yellow"]
    assert store.chunks_of("nowhere.txt") == []


def test_a_chunk_without_a_single_term_can_be_stored(store):
    put(store, "-.txt", "!!! ???")
    assert [chunk.text for chunk in store.chunks_of("-.txt")] == ["!!! ???"]


def test_vectors_are_kept_in_half_precision(store):
    rows, vectors = store.all_vectors()
    expected = WORDS.embed_passages(["apples are red", "bananas are yellow", "cherries are dark"])
    assert np.array_equal(vectors, expected.astype(np.float16).astype(np.float32))
    some = store.vectors_of([int(rows[2]), 999])
    assert list(some) == [rows[2]] and np.array_equal(some[int(rows[2])], vectors[2])


def test_rows_that_are_gone_are_left_out(store):
    assert store.stored_chunks([999]) == {}
    assert store.stored_chunks([]) == {} and store.vectors_of([]) == {}


def test_values_kept_with_the_base_come_back(store):
    assert store.meta("roots") is None
    change(store, lambda: store.set_meta("roots", '{"甲": "\\"x"}'))
    assert store.meta("roots") == '{"甲": "\\"x"}'


# searching


def test_an_empty_base_finds_nothing(empty):
    assert empty.count_chunks() == 0
    assert empty.search_dense(WORDS.embed_questions(["red"]), 3) == [[]]
    assert empty.search_terms(["red"], 3) == []
    assert empty.term_counts(["red"]) == {"red": 0}
    assert empty.average_terms() == 0.0


def test_the_nearest_chunk_has_the_cosine_of_its_vector(store):
    ((row, score),) = store.search_dense(WORDS.embed_questions(["yellow bananas"]), 1)[0]
    assert store.stored_chunks([row])[row].chunk.text == "bananas are yellow"
    # Two of its three words, in three different boxes: 2 / (sqrt 2 * sqrt 3).
    assert score == pytest.approx(2 / 6**0.5, abs=1e-3)


def test_several_questions_are_searched_together(store):
    found = store.search_dense(WORDS.embed_questions(["red apples", "dark cherries"]), 2)
    assert [store.stored_chunks([some[0][0]])[some[0][0]].chunk.text for some in found] == [
        "apples are red", "cherries are dark"
    ]
    assert [len(some) for some in found] == [2, 2]


def test_more_than_there_is_gives_all_there_is(store):
    assert len(nearest(store, "red", 50)) == 3
    assert len(by_terms(store, "are", k=50)) == 3


def test_terms_find_the_chunks_that_hold_any_of_them(store):
    assert by_terms(store, "cherri") == ["cherries are dark"]
    assert sorted(by_terms(store, "red", "dark")) == ["apples are red", "cherries are dark"]
    assert by_terms(store, "nowhere") == [] and by_terms(store) == []


def test_a_rarer_term_weighs_more(store):
    put(store, "c.txt", *(f"plain number{at}" for at in range(8)), "rare thing")
    assert by_terms(store, "plain", "rare", k=1) == ["rare thing"]


def test_bm25_is_the_textbook_value(store):
    """Terms a chunk: its three words and its file's name. N = 3, n = 1, each as long as the mean."""
    ((_, score),) = store.search_terms(["banana"], 5)
    idf = np.log((3 - 1 + 0.5) / (1 + 0.5))
    assert score == pytest.approx(idf * 1 * 2.2 / (1 + 1.2), rel=1e-6)


def test_the_place_is_searched_and_can_weigh_more(store):
    put(store, "guide.txt", "nothing else here", title="Cherries")
    assert sorted(by_terms(store, "cherri")) == ["cherries are dark", "nothing else here"]
    heavy = [row for row, _ in store.search_terms(["cherri"], 5, place_weight=5.0)]
    assert store.stored_chunks(heavy)[heavy[0]].chunk.text == "nothing else here"


def test_terms_are_counted_by_chunks(store):
    assert store.term_counts(["are", "red", "none"]) == {"are": 3, "red": 1, "none": 0}
    # Three words and the file's name in each.
    assert store.average_terms() == 4.0


def test_counts_follow_what_is_replaced_and_removed(store):
    put(store, "a.txt", "grapes are green and small")
    assert store.term_counts(["are", "red", "grape"]) == {"are": 2, "red": 0, "grape": 1}
    assert store.average_terms() == pytest.approx((6 + 4) / 2)
    change(store, lambda: store.remove_file("a.txt"))
    assert store.term_counts(["are", "grape"]) == {"are": 1, "grape": 0}
    assert store.average_terms() == 4.0


def test_a_search_can_be_kept_to_a_folder(store):
    put(store, "法律/一\"50%_.txt", "apples are red too")
    put(store, "法律 旧/二.txt", "apples were red once")
    for where in (Filter(under="法律/"), Filter(under="法律"), Filter(file='*50%_*'), Filter(under='法律/一"50%_.txt')):
        assert nearest(store, "apples red", 9, where) == ["apples are red too"]
        assert by_terms(store, "appl", where=where) == ["apples are red too"]
        assert store.matching(where) == ('法律/一"50%_.txt',)
    assert len(nearest(store, "apples red", 9, Filter(under=["法律", "法律 旧"]))) == 2
    nowhere = Filter(under="none/")
    assert (nearest(store, "apples red", 9, nowhere), by_terms(store, "appl", where=nowhere)) == ([], [])
    assert store.matching(nowhere) == ()


def test_a_narrow_search_still_finds_as_many_as_are_asked_for(store):
    """Forty nearer chunks elsewhere must not push out the two of the folder that is asked for."""
    put(store, "far/one.txt", "apples in the shed", "nothing of that kind")
    put(store, "near.txt", *[f"red apples {number}" for number in range(40)])
    assert nearest(store, "red apples", 2, Filter(under="far")) == ["apples in the shed", "nothing of that kind"]
    assert by_terms(store, "appl", k=1, where=Filter(under="far")) == ["apples in the shed"]


def test_a_search_follows_what_is_moved_into_and_out_of_its_folder(store):
    where = Filter(under="new")
    assert nearest(store, "apples red", 9, where) == []
    change(store, lambda: store.move_file("a.txt", "new/a.txt", store.files()["a.txt"]))
    assert nearest(store, "apples red", 1, where) == ["apples are red"]
    change(store, lambda: store.remove_file("new/a.txt"))
    assert nearest(store, "apples red", 9, where) == []


def test_a_search_can_be_kept_to_days(store):
    noon = {"a.txt": 1_700_000_000.0, "b.txt": 1_720_000_000.0}  # 14 November 2023 and 3 July 2024, wherever
    with pytest.raises(InputError, match="2 of 2 files .* no date .*python -m ingest"):
        store.matching(Filter(since="2023-11-13"))
    change(store, lambda: store.set_modified(noon))
    assert {path: record.modified for path, record in store.files().items()} == noon
    assert store.matching(Filter(since="2023-11-13", until="2023-11-16")) == ("a.txt",)
    assert nearest(store, "apples red", 9, Filter(since="2024-07-01")) == ["cherries are dark"]
    assert store.check() == []


# changing it


def test_a_file_put_again_replaces_what_it_had(store):
    put(store, "a.txt", "grapes are green")
    assert store.count_chunks() == 2
    assert by_terms(store, "banana") == [] and by_terms(store, "grape") == ["grapes are green"]
    assert store.document("a.txt").text == "grapes are green"
    assert store.check() == []


def test_files_put_together_are_all_there_afterwards(store):
    """One of them in place of a file that was there."""
    with store.writing():
        with store.together():
            for path in ("b.txt", "c.txt", "d.txt"):
                text = f"all new in {path[0]}x"
                store.put_file(
                    FileRecord(path, "h", 1, "ok"), Document(path, text, "txt"),
                    [Chunk(path, text, 0, len(text))], WORDS.embed_passages([text]),
                )
        store.publish()
    assert list(store.files()) == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert store.count_chunks() == 5
    assert store.term_counts(["new", "cherri"]) == {"new": 3, "cherri": 0}
    assert by_terms(store, "cx") == ["all new in cx"]


def test_a_removed_file_leaves_nothing(store):
    change(store, lambda: store.remove_file("a.txt"))
    assert list(store.files()) == ["b.txt"]
    assert nearest(store, "apples red", 9) == ["cherries are dark"]
    change(store, lambda: store.remove_file("never there"))
    assert store.check() == []


def test_a_failed_file_leaves_nothing_to_be_found(store):
    change(store, lambda: store.put_failure(FileRecord("a.txt", "hash2", 5, "failed", error="broken")))
    assert store.files()["a.txt"].error == "broken"
    assert store.count_chunks() == 1
    put(store, "a.txt", "apples are back")
    assert store.files()["a.txt"].status == "ok"


def test_a_moved_file_keeps_its_text_and_vectors(store):
    before = np.sort(store.all_vectors()[1], axis=0)
    calls = WORDS.calls
    change(store, lambda: store.move_file("a.txt", "folder/c.txt", store.files()["a.txt"]))
    assert WORDS.calls == calls
    assert list(store.files()) == ["b.txt", "folder/c.txt"]
    assert [chunk.path for chunk in store.chunks_of("folder/c.txt")] == ["folder/c.txt"] * 2
    assert store.document("folder/c.txt").text == "apples are red\nbananas are yellow"
    assert np.array_equal(np.sort(store.all_vectors()[1], axis=0), before)
    assert sorted(by_terms(store, "c")) == ["apples are red", "bananas are yellow"]


def test_every_change_raises_the_generation(store):
    seen = [store.generation]
    for action in (lambda: store.set_meta("x", "1"), lambda: store.remove_file("a.txt"),
                   lambda: store.put_failure(FileRecord("f", "h", 1, "failed"))):
        change(store, action)
        seen.append(store.generation)
    assert seen == sorted(set(seen))


def test_changes_need_the_writers_lock(store):
    with pytest.raises(KnowledgeBaseError, match="inside `with"):
        store.remove_file("a.txt")
    assert store.count_chunks() == 3


def test_a_change_that_fails_half_way_leaves_what_was_there(store):
    chunk = Chunk("a.txt", "new", 0, 3)
    with pytest.raises(UnicodeEncodeError), store.writing():
        store.put_file(
            FileRecord("a.txt", "x", 1, "ok"), Document("a.txt", "\ud800", "txt"), [chunk],
            WORDS.embed_passages(["new"]),
        )
    change(store, lambda: None)
    assert store.document("a.txt").text == "apples are red\nbananas are yellow"
    assert store.term_counts(["are", "new"]) == {"are": 3, "new": 0}
    assert store.check() == [] and store.index_state() == "current"


# the embedder


def test_another_embedder_is_refused_with_what_to_do(store):
    with pytest.raises(KnowledgeBaseError, match="--reembed"):
        store.check_embedder(WordEmbedder("other"))
    with pytest.raises(KnowledgeBaseError, match="--reembed"), store.writing():
        store.bind_embedder(WordEmbedder("other"))


def test_reembedding_binds_the_new_embedder_and_keeps_the_rest(store):
    other, seen = WordEmbedder("other"), []
    change(store, lambda: store.reembed(other, lambda done, total: seen.append((done, total))))
    assert other.calls == 3 and seen[-1] == (3, 3)
    store.check_embedder(other)
    assert nearest(store, "yellow bananas") == ["bananas are yellow"]
    assert by_terms(store, "cherri") == ["cherries are dark"]
    assert list(store.files()) == ["a.txt", "b.txt"]


# opening


def test_a_base_opened_again_holds_the_same(settings, store):
    before = store.files()
    store.close()
    again = open_store(settings)
    assert again.files() == before
    assert nearest(again, "yellow bananas") == ["bananas are yellow"]
    assert by_terms(again, "cherri") == ["cherries are dark"]
    again.close()


def test_another_process_finds_what_one_has_stored(settings, store):
    """Milvus Lite, opened anew, has its collections to load first."""
    store.close()
    script = (
        "import sys; from rag.settings import Settings; from rag.store import open_store\n"
        "store = open_store(Settings(kb=sys.argv[1], store=sys.argv[2], milvus_uri=sys.argv[3]))\n"
        "print(*store.files(), store.count_chunks(), store.term_counts(['are']),\n"
        "      [row for row, _ in store.search_terms(['cherri'], 5)])\n"
    )
    if settings.store == "milvus":  # this process still holds the file
        script = script.replace("sys.argv[3]", "sys.argv[3].replace('kb.db', 'copy.db')")
        folder = Path(settings.milvus_uri)
        shutil.copytree(folder, folder.with_name("copy.db"), ignore=shutil.ignore_patterns("LOCK"))
    done = subprocess.run(
        [sys.executable, "-c", script, settings.kb, settings.store, settings.milvus_uri],
        capture_output=True, text=True, check=False,
    )
    assert done.stdout.startswith("a.txt b.txt 3 {'are': 3} ["), done.stderr
    assert len(done.stdout.split("[")[1].split(",")) == 1


def test_a_missing_base_says_how_to_build_one(settings):
    assert find_store(settings) is None
    with pytest.raises(KnowledgeBaseError, match="python -m ingest"):
        open_store(settings)


# both together


@NEEDS_MILVUS
def test_both_stores_retrieve_the_same(tmp_path):
    """Rare and common terms, equal chunks, both languages: the same hits with the same scores."""
    stores = [create_store(settings_for(kind, tmp_path)) for kind in ("embedded", "milvus")]
    chance = np.random.default_rng(0)
    words = [f"{stem}{ending}" for stem in ("al", "ber", "con", "der", "eff") for ending in ("ta", "mo", "ri")]
    words += ["合同", "价款", "义务", "的"]
    files = [[" ".join(chance.choice(words, size=12)) for _ in range(4)] for _ in range(30)]
    for store in stores:
        for number, texts in enumerate(files):
            put(store, f"{number:02d}.txt", *texts)
    retrievers = [Retriever(store, WORDS) for store in stores]
    for question in ["alta conri 合同", "berri derta effmo alta", "价款 义务 conmo", "的 alri"]:
        first, second = (
            [(hit.chunk.id, round(hit.score, 4)) for hit in retriever.retrieve(question, 6)]
            for retriever in retrievers
        )
        assert len(first) >= 4 and first == second
    for store in stores:
        store.close()


@NEEDS_MILVUS
def test_what_a_stopped_writer_left_is_removed_and_counted_again(tmp_path):
    """As after a kill between a file's chunks and its record: rows that nothing names."""
    settings = settings_for("milvus", tmp_path)
    store = create_store(settings)
    put(store, "a.txt", "apples are red")
    with store.writing():
        state = store._begin_change(1)
        row = store._chunk_row(state.next_row, Chunk("x.txt", "apples left over", 0, 5), WORDS.embed_passages(["x"])[0])
        store._client.insert(state.chunks_collection, [row])
        store._counted.clear()
        store._store_counts = lambda: None  # what a killed process doesn't do
    store.close()
    again = open_store(settings)
    assert again.index_state() == "outdated" and again.check() == ["1 chunks without their file"]
    change(again, lambda: None)
    assert again.check() == [] and again.index_state() == "current"
    assert again.count_chunks() == 1 and again.term_counts(["appl", "left"]) == {"appl": 1, "left": 0}
    again.close()


@NEEDS_MILVUS
def test_bases_of_different_names_share_a_file(tmp_path):
    uri = str(tmp_path / "kb.db")
    first, second = (
        create_store(Settings(kb=str(tmp_path), store="milvus", milvus_uri=f"{uri}#{name}")) for name in ("one", "two")
    )
    put(first, "a.txt", "apples are red")
    put(second, "b.txt", "bananas are yellow")
    assert list(first.files()) == ["a.txt"] and list(second.files()) == ["b.txt"]
    first.close()


@NEEDS_MILVUS
def test_a_name_that_is_neither_file_nor_server_is_refused(tmp_path):
    with pytest.raises(KnowledgeBaseError, match=r"ends in \.db"):
        create_store(Settings(store="milvus", milvus_uri=str(tmp_path / "kb")))


def test_a_uri_without_the_store_is_refused_and_the_store_without_a_uri():
    for values in ({"store": "milvus"}, {"milvus_uri": "kb.db"}, {"store": "sqlite"}):
        with pytest.raises(SettingsError, match="store"):
            Settings(**values)
