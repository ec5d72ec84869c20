"""The FAISS file: exact while small, compressed above, and never out of step with SQLite."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import faiss
import numpy as np
import pytest
from fakes import WordEmbedder

from rag import dense_index, knowledge
from rag.dense_index import DenseView, Overlay, build_index, can_be_updated, read_index, write_index
from rag.document import Chunk, Document
from rag.knowledge import FileRecord, KnowledgeBase

DIM = 32


@pytest.fixture(autouse=True)
def one_thread():
    """Waking FAISS' threads for so few vectors costs more than all the rest of these tests."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


class ArraySource:
    """Vectors in memory under row numbers 10, 11, 12 ..."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors.astype(np.float16).astype(np.float32)
        self.dim = vectors.shape[1]

    def rows(self) -> np.ndarray:
        return np.arange(len(self.vectors)) + 10

    def vectors_of(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        return {row: self.vectors[row - 10] for row in rows}

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(self.vectors), 1000):
            yield self.rows()[begin : begin + 1000], self.vectors[begin : begin + 1000]


def unit_rows(count: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact(source: ArraySource, questions: np.ndarray, k: int) -> list[list[int]]:
    return [(np.argsort(-(source.vectors @ one), kind="stable")[:k] + 10).tolist() for one in questions]


def search(built, source, questions, k, overlay=None, among=None):
    view = DenseView(1, built.facts, built, overlay or Overlay.empty(source.dim))
    return view.search(questions, k, source.vectors_of, among=among)


def test_up_to_the_limit_search_is_exact():
    source = ArraySource(unit_rows(500))
    built = build_index(source, flat_limit=500)
    questions = unit_rows(30, seed=1)
    found = search(built, source, questions, 5)
    assert built.facts.kind == "flat" and built.facts.recall == 1.0
    assert [[row for row, _ in some] for some in found] == exact(source, questions, 5)


@pytest.mark.parametrize(("dim", "kind"), [(DIM, "pq"), (DIM - 1, "sq8")])
def test_above_it_scores_are_exact_and_recall_is_measured(dim, kind):
    """Codes of two dimensions need an even number of them."""
    source = ArraySource(unit_rows(3000, dim))
    built = build_index(source, flat_limit=2999)
    questions = unit_rows(50, dim, seed=1)
    found = search(built, source, questions, 10)
    assert built.facts.kind == kind and built.facts.sample == 200
    for question, some in zip(questions, found, strict=True):
        for row, score in some:
            assert score == pytest.approx(float(source.vectors[row - 10] @ question), abs=1e-6)
    held = [len({row for row, _ in some} & set(true)) for some, true in zip(found, exact(source, questions, 10), strict=True)]
    assert sum(held) / 500 > 0.9
    assert built.facts.recall > 0.9


def test_where_four_bits_lose_too_much_eight_are_used():
    """All vectors differ in their last decimals only, which codes of four bits can't tell."""
    vectors = np.ones((2000, DIM), np.float32) + 0.02 * unit_rows(2000)
    source = ArraySource(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert build_index(source, flat_limit=100).facts.kind == "sq8"


def test_a_changed_row_is_found_by_what_it_holds_now():
    source = ArraySource(np.eye(DIM, dtype=np.float32))
    built = build_index(source)
    # Row 10 moves to where row 11 is, row 12 is gone, row 99 is new.
    now = {10: source.vectors[1], 99: source.vectors[5]}
    overlay = Overlay.empty(DIM).with_changes([10, 12, 99], now)
    found = search(built, source, np.eye(DIM, dtype=np.float32)[[0, 1, 2, 5]], 2, overlay)
    assert [dict(some).get(10, 0.0) for some in found] == [0.0, 1.0, 0.0, 0.0]
    assert all(12 not in dict(some) for some in found)
    assert found[1] == [(10, 1.0), (11, 1.0)]
    assert found[3] == [(15, 1.0), (99, 1.0)]


def test_hidden_rows_leave_room_for_the_next_best():
    """Even where nearly all the best have been deleted since the file was written."""
    source = ArraySource(unit_rows(400))
    built = build_index(source)
    question = unit_rows(1, seed=1)
    order = exact(source, question, 400)[0]
    overlay = Overlay.empty(DIM).with_changes(order[:390], {})
    assert [row for row, _ in search(built, source, question, 5, overlay)[0]] == order[390:395]


@pytest.mark.parametrize("flat_limit", [10_000, 100])
def test_an_index_added_to_finds_what_a_new_one_finds(tmp_path, flat_limit):
    before, after = unit_rows(2000), unit_rows(2300)
    after[:2000] = before
    after[5] = -before[5]
    # More are taken out than fast scan's block of 32 holds, so that new ones come where they stood.
    source, later = ArraySource(before), ArraySource(after)
    built = build_index(source, flat_limit=flat_limit)
    facts = write_index(built, tmp_path / "vectors.faiss")
    copy = read_index(tmp_path / "vectors.faiss", facts, copy=True)
    changed = [15, *range(1950, 2310)]
    updated = dense_index.updated_index(copy, Overlay.empty(DIM).with_changes(changed, later.vectors_of(changed)))
    assert updated.facts.vectors == 2300
    questions = np.concatenate([after[[5, 2299]], after[1930:2100]])
    found = [[row for row, _ in some] for some in search(updated, later, questions, 1)]
    assert found == exact(later, questions, 1)


@pytest.mark.parametrize("few", [0, 100_000])  # rows that are compared exactly in place of their codes
@pytest.mark.parametrize(("dim", "limit", "kind"), [(DIM, 3000, "flat"), (DIM, 0, "pq"), (DIM - 1, 0, "sq8")])
@pytest.mark.parametrize("share", [3, 60, 2500])
def test_among_some_rows_the_best_of_them_are_found(dim, limit, kind, few, share, monkeypatch):
    """However few they are, and whatever has changed since the file was written."""
    monkeypatch.setattr(dense_index, "_FEW", few)
    source = ArraySource(unit_rows(3000, dim))
    built = build_index(source, flat_limit=limit)
    assert built.facts.kind == kind
    among = np.sort(np.random.default_rng(2).choice(source.rows(), share, replace=False))
    changed = [int(among[0]), 10, 11]  # the first has another vector now, the others may be gone
    overlay = Overlay.empty(dim).with_changes(changed, {changed[0]: -source.vectors[changed[0] - 10]})
    questions = unit_rows(20, dim, seed=1)
    truth = source.vectors.copy()
    truth[changed[0] - 10] *= -1
    live = [row for row in among if row == changed[0] or row not in changed]
    expected = [sorted(live, key=lambda row: -float(truth[row - 10] @ one))[:5] for one in questions]
    found = search(built, source, questions, 5, overlay, among)
    assert all(len(some) == min(5, len(live)) for some in found)
    got = [[row for row, _ in some] for some in found]
    if kind == "flat" or (kind == "pq" and few):
        assert got == expected
    else:  # codes: nearly all of them
        assert sum(len(set(a) & set(b)) for a, b in zip(got, expected)) >= 0.95 * sum(map(len, expected))
    assert search(built, source, questions, 5, overlay, np.zeros(0, np.int64)) == [[] for _ in questions]


def test_an_index_is_made_anew_when_most_of_it_changed_or_it_outgrew_its_kind():
    facts = build_index(ArraySource(unit_rows(100))).facts
    assert can_be_updated(facts, 50, 100) and not can_be_updated(facts, 51, 100)
    assert not can_be_updated(facts, 1, 101, flat_limit=100)
    assert not can_be_updated(replace(facts, kind="pq", built_from=1000, dead=400), 101, 2000, flat_limit=100)
    coded = replace(facts, kind="pq", built_from=1000)
    assert can_be_updated(coded, 500, 2000, flat_limit=100)
    assert not can_be_updated(coded, 501, 2000, flat_limit=100)
    assert not can_be_updated(coded, 1, 2001, flat_limit=100)
    assert not can_be_updated(coded, 1, 90, flat_limit=100)


def test_a_file_that_is_not_the_one_recorded_is_not_read(tmp_path):
    source = ArraySource(unit_rows(100))
    file = tmp_path / "索引 vectors.faiss"
    facts = write_index(build_index(source), file)
    assert read_index(file, facts) is not None
    assert not file.with_name(file.name + ".new").exists()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert read_index(file, facts) is None
    file.unlink()
    assert read_index(file, facts) is None


# in the knowledge base

class TextEmbedder(WordEmbedder):
    """Every text has a direction of its own; only the same text comes near it."""

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        seeds = [int.from_bytes(hashlib.md5(text.encode()).digest()[:4]) for text in texts]
        return np.concatenate([np.zeros((0, 64), np.float32), *(unit_rows(1, 64, seed) for seed in seeds)])


TEXTS = TextEmbedder()


def put(base: KnowledgeBase, path: str, *texts: str) -> None:
    chunks = [Chunk(path, text, 100 * at, 100 * at + len(text)) for at, text in enumerate(texts)]
    with base.writing():
        base.bind_embedder(TEXTS)
        vectors = TEXTS.embed_passages([chunk.indexed_text for chunk in chunks])
        base.put_file(FileRecord(path, "hash", 1, "ok"), Document(path, "text", "txt"), chunks, vectors)


def best(base: KnowledgeBase, text: str) -> tuple[str, float]:
    """The chunk nearest to a text, and their cosine."""
    row, score = base.search_dense(TEXTS.embed_questions([text]), 1)[0][0]
    return base.stored_chunks([row])[row].chunk.text, round(score, 3)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A base whose 700 vectors are more than exact search is meant for."""
    monkeypatch.setattr(dense_index, "FLAT_LIMIT", 200)
    monkeypatch.setattr(
        knowledge, "build_index", lambda source: build_index(source, flat_limit=200)
    )
    monkeypatch.setattr(
        knowledge, "can_be_updated", lambda *about: can_be_updated(*about, flat_limit=200)
    )
    base = KnowledgeBase.create(tmp_path / "kb")
    put(base, "many.txt", *(f"word{number} thing{number * 7} item{number * 13}" for number in range(700)))
    with base.writing():
        base.publish()
    return base


def test_a_large_base_gets_a_compressed_file_with_its_recall(large):
    facts = large.index_facts()
    assert (facts.kind, facts.vectors, facts.sample) == ("pq", 700, 200)
    assert facts.recall >= 0.95 and "recall@10" in facts.describe()
    assert large.index_state() == "current"
    assert best(large, "word7 thing49 item91") == ("word7 thing49 item91", 1.0)


def test_few_changes_of_a_large_base_write_no_file_and_are_found(large):
    file = large.folder / "vectors.faiss"
    written = file.stat().st_mtime_ns
    put(large, "one.txt", "zebras cross slowly here")
    with large.writing():
        large.publish()
    assert file.stat().st_mtime_ns == written
    assert large.index_state() == "current"
    for reader in (large, KnowledgeBase.open(large.folder)):
        assert best(reader, "zebras cross slowly here") == ("zebras cross slowly here", 1.0)


def test_many_changes_are_added_to_the_file(large):
    put(large, "more.txt", *(f"beast{number} roams field{number}" for number in range(20)))
    assert large.index_state() == "outdated"
    with large.writing():
        large.publish()
    facts = large.index_facts()
    assert large.index_state() == "current"
    assert (facts.vectors, facts.built_from) == (720, 700)
    assert best(KnowledgeBase.open(large.folder), "beast3 roams field3") == ("beast3 roams field3", 1.0)


def test_a_row_number_used_again_gives_the_new_chunk(tmp_path):
    """SQLite gives the number of a deleted last row to the next one; the file still has the old vector."""
    base = KnowledgeBase.create(tmp_path / "kb")
    put(base, "a.txt", "apples are red")
    put(base, "b.txt", "bananas are yellow")
    with base.writing():
        base.publish()
    reader = KnowledgeBase.open(base.folder)
    assert best(reader, "bananas are yellow") == ("bananas are yellow", 1.0)
    put(base, "b.txt", "dates hang high above")
    assert base.rows().tolist() == [1, 2]
    assert best(reader, "dates hang high above") == ("dates hang high above", 1.0)
    assert best(reader, "bananas are yellow")[0] != "bananas are yellow"
    assert best(KnowledgeBase.open(base.folder), "dates hang high above")[1] == 1.0


def test_a_reader_follows_a_writer_that_publishes_nothing(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb")
    reader = KnowledgeBase.open(base.folder)
    assert reader.search_dense(np.zeros((1, 64), np.float32), 3) == [[]]
    for number in range(5):
        put(base, f"{number}.txt", f"number{number} stands here")
        assert best(reader, f"number{number} stands here")[0] == f"number{number} stands here"
    with base.writing():
        base.remove_file("4.txt")
    assert best(reader, "number4 stands here")[0] != "number4 stands here"


def test_a_base_from_before_the_change_log_is_read_and_then_given_one(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb")
    put(base, "a.txt", "apples are red")
    connection = base._connection
    for name in ("chunk_added", "chunk_removed", "chunk_embedded_again"):
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute("DROP TABLE vector_changes")
    (base.folder / "vectors.faiss").write_bytes(b"an index of the older kind")
    reader = KnowledgeBase.open(base.folder)
    assert reader.index_state() == "outdated"
    assert best(reader, "apples are red") == ("apples are red", 1.0)
    put(base, "b.txt", "bananas are yellow")
    assert best(reader, "bananas are yellow") == ("bananas are yellow", 1.0)
    with base.writing():
        base.publish()
    assert base.index_state() == "current"
    assert best(KnowledgeBase.open(base.folder), "apples are red") == ("apples are red", 1.0)


def test_average_terms_is_what_the_vocabulary_adds_up_to(tmp_path):
    base = KnowledgeBase.create(tmp_path / "kb")
    assert base.average_terms() == 0.0
    put(base, "a.txt", "apples are red", "bananas")
    put(base, "b.txt", *(f"word{number} again" for number in range(200)))
    # The file's name is a term of each of its chunks: 3 + 1, 1 + 1, and 200 times 2 + 1.
    assert base.average_terms() == pytest.approx((4 + 2 + 600) / 202)
    with base.writing():
        base.remove_file("b.txt")
    assert base.average_terms() == pytest.approx(3.0)
