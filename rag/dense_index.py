"""The vectors as FAISS searches them: derived from the knowledge base, kept in one file beside it.

Up to FLAT_LIMIT vectors the search is exact, over half-precision numbers mapped from the file.
Above, every two dimensions are told by four bits (product quantization, searched in full by FAISS'
fast scan), and the candidates it brings up are scored again from the stored vectors. Measured with
`python benchmarks/index.py` on sentence vectors of 256 dimensions and real questions, that found
more of the true ten nearest in less time, and was built sooner, than an inverted file or a graph
(HNSW), both with scalar quantization: questions lie far from the passages that answer them, so that
lists and graphs have to be searched widely.

What is stored after the file was written is searched beside it, exactly (`Overlay`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from rag.embedder import Vectors

Rows = npt.NDArray[np.int64]
Found = list[list[tuple[int, float]]]
Kind = Literal["flat", "pq", "sq8"]

# Exact search of 256 dimensions takes 2.4 ms for 100,000 vectors on one core and grows with them.
FLAT_LIMIT = 200_000
# An approximate index whose sample shows less is not kept; 8 bits a dimension then take its place.
LEAST_RECALL = 0.95
_RESCORED = 4  # candidates scored again for each one asked for ...
_LEAST_RESCORED = 100  # ... and never fewer
_FEW = 20_000  # rows that are all compared exactly where codes can't be searched among them
_SAMPLE = 200  # vectors that stand in for questions when recall is measured
_TRAINED_ON = 65_536
_GROWN = 2.0  # built anew, not added to, once it holds this many times what it was built from
_DEAD = -1  # the row number of a vector that was taken out, as FAISS marks the lack of one
_EDGE = 8 << 20  # bytes at both ends that are checked before a file is mapped; smaller ones are in full


class VectorSource(Protocol):
    """Where an index is made from. Row numbers ascend, vectors are float32 (n, dim)."""

    @property
    def dim(self) -> int: ...
    def rows(self) -> Rows: ...
    def vectors_of(self, rows: Sequence[int]) -> dict[int, Vectors]: ...
    def batches(self) -> Iterator[tuple[Rows, Vectors]]: ...


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """What is known about the file. `recall` is recall@10 against exact search, at building."""

    kind: Kind
    vectors: int
    built_from: int  # vectors when it was last built, not only added to
    recall: float
    sample: int  # vectors that recall was measured with
    seconds: float  # of building or adding to it
    dead: int = 0  # vectors in it that stand for nothing any more
    size: int = 0  # bytes
    digest: str = ""  # of the whole file
    edges: str = ""  # of its beginning and end

    @classmethod
    def parse(cls, text: str | None) -> IndexFacts | None:
        return cls(**json.loads(text)) if text else None

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def describe(self) -> str:
        """One line for people."""
        kinds = {
            "flat": "exact", "pq": "4 bits for two dimensions, candidates re-scored exactly",
            "sq8": "8 bits a dimension, candidates re-scored exactly",
        }
        text = f"{self.vectors:,} vectors, {self.size / 1e6:.1f} MB, {kinds[self.kind]}"
        if self.kind == "flat":
            return text
        return f"{text}; recall@10 against exact search {self.recall:.3f} ({self.sample} of its own vectors)"


@dataclass(frozen=True, slots=True)
class DenseIndex:
    """A FAISS index whose ids are row numbers, and what is known about it."""

    index: Any
    facts: IndexFacts

    def search(
        self, vectors: Vectors, k: int, hidden: frozenset[int], among: Rows | None = None
    ) -> tuple[Vectors, Rows]:
        """(scores, rows), (n, k or more) each, best first, row -1 where there is none.

        Rows in `hidden` are left out: what they stand for has changed since; so are those that aren't
        in `among`, where that is given.
        """
        total = self.index.ntotal
        left_out = np.fromiter(hidden, np.int64, len(hidden))
        if among is not None and self.facts.kind != "pq":
            wanted = min(k, len(among))
            chosen: Any = {"sel": _selector(np.setdiff1d(among, left_out))}
            with _few_threads(len(vectors)):
                found: tuple[Vectors, Rows] = self.index.search(
                    np.ascontiguousarray(vectors), max(1, wanted), params=faiss.SearchParameters(**chosen)
                )
            return found
        # Fast scan takes no selector: more are asked for, until enough of them are right.
        gone = len(hidden) + self.facts.dead
        share = 1.0 if among is None else len(among) / max(1, total)
        wanted = min(total, int(k / max(share, 1e-3)) + min(gone, k))
        while True:
            with _few_threads(len(vectors)):
                scores, rows = self.index.search(np.ascontiguousarray(vectors), max(1, wanted))
            if not gone and among is None:
                return scores, rows
            dropped = (rows == _DEAD) | np.isin(rows, left_out)
            if among is not None:
                dropped |= ~np.isin(rows, among)
            if wanted == total or (wanted - dropped.sum(axis=1)).min() >= k:
                rows[dropped] = _DEAD
                return scores, rows
            wanted = min(total, 4 * wanted)

    @property
    def is_exact(self) -> bool:
        return self.facts.kind == "flat"


@dataclass(frozen=True, slots=True)
class Overlay:
    """What changed since the file was written: `rows` with their vectors now; `hidden` also those gone."""

    rows: Rows
    vectors: Vectors
    hidden: frozenset[int]

    @classmethod
    def empty(cls, dim: int) -> Overlay:
        return cls(np.zeros(0, np.int64), np.zeros((0, dim), np.float32), frozenset())

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def with_changes(self, changed: Sequence[int], current: dict[int, Vectors]) -> Overlay:
        """The overlay after `changed` rows got the vectors in `current`, or none."""
        if not changed:
            return self
        kept = ~np.isin(self.rows, np.array(changed, dtype=np.int64))
        rows = np.fromiter(current, np.int64, len(current))
        fresh = np.array(list(current.values()), np.float32).reshape(len(rows), self.dim)
        return Overlay(
            np.concatenate([self.rows[kept], rows]), np.concatenate([self.vectors[kept], fresh]),
            self.hidden.union(changed),
        )


@dataclass(frozen=True, slots=True)
class DenseView:
    """All vectors of one generation: the index file, where there is one, under an overlay."""

    generation: int
    recorded: IndexFacts | None  # of the file, whether it could be read or not
    file: DenseIndex | None
    overlay: Overlay

    def search(
        self, vectors: Vectors, k: int, stored: Callable[[Sequence[int]], dict[int, Vectors]], *,
        among: Rows | None = None,
    ) -> Found:
        """For each vector up to k (row, cosine), best first; equal ones by row.

        `stored` gives vectors by row, for scoring candidates again. `among`: only these rows, ascending.
        """
        found: list[dict[int, float]] = [{} for _ in vectors]
        if among is not None and not len(among):
            return [[] for _ in vectors]
        if self.file is not None and self.file.index.ntotal:
            exact = self.file.is_exact
            count = k if exact else max(_LEAST_RESCORED, _RESCORED * k)
            if among is not None and self.file.facts.kind == "pq" and len(among) <= _FEW:
                hidden = np.fromiter(self.overlay.hidden, np.int64, len(self.overlay.hidden))
                rows = np.tile(np.setdiff1d(among, hidden), (len(vectors), 1))
                found = _scored_again(rows, vectors, stored)
            else:
                scores, rows = self.file.search(vectors, count, self.overlay.hidden, among)
                found = _pairs(rows, scores) if exact else _scored_again(rows, vectors, stored)
        changed = np.arange(len(self.overlay.rows))
        if among is not None:
            changed = changed[np.isin(self.overlay.rows, among)]
        if len(changed):
            scores = vectors @ self.overlay.vectors[changed].T  # (questions, changed)
            best = _best_columns(scores, k)
            for held, row, columns in zip(found, scores, best, strict=True):
                held.update(zip(
                    self.overlay.rows[changed[columns]].tolist(), row[columns].tolist(), strict=True
                ))
        return [sorted(held.items(), key=lambda item: (-item[1], item[0]))[:k] for held in found]


def _selector(rows: Rows) -> Any:
    """FAISS's selector of these ids."""
    mask = np.zeros(int(rows[-1]) + 1 if len(rows) else 1, dtype=bool)
    mask[rows] = True
    bitmap: Any = np.packbits(mask, bitorder="little")
    make: Any = faiss.IDSelectorBitmap  # its Python side takes the array whole
    return make(bitmap)


def _pairs(rows: Rows, scores: Vectors) -> list[dict[int, float]]:
    return [
        {row: score for row, score in zip(some, values, strict=True) if row >= 0}
        for some, values in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def _scored_again(
    rows: Rows, vectors: Vectors, stored: Callable[[Sequence[int]], dict[int, Vectors]]
) -> list[dict[int, float]]:
    known = stored(np.unique(rows[rows >= 0]).tolist())
    result = []
    for some, vector in zip(rows.tolist(), vectors, strict=True):
        here = [row for row in some if row in known]
        matrix = np.array([known[row] for row in here], np.float32).reshape(len(here), len(vector))
        result.append(dict(zip(here, (matrix @ vector).tolist(), strict=True)))
    return result


def _best_columns(scores: Vectors, k: int) -> Rows:
    if scores.shape[1] <= k:
        return np.tile(np.arange(scores.shape[1]), (len(scores), 1))
    best: Rows = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return best


@contextmanager
def _few_threads(questions: int) -> Iterator[None]:
    """Search for a few questions on one thread.

    Below 20 rows FAISS uses no matrix product; waking its threads then costs ten times the search
    itself (18 ms against 1.6 at 38,000 vectors of 256 on 2 cores).
    """
    if questions >= 20:
        yield
        return
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


# building


def build_index(source: VectorSource, *, flat_limit: int = FLAT_LIMIT) -> DenseIndex:
    """An index of all vectors of `source`: exact, or the most compressed whose recall will do."""
    rows = source.rows()
    if len(rows) <= flat_limit:
        return _build("flat", source, rows)
    # Codes of four bits stand for two dimensions each.
    built = _build("pq", source, rows) if source.dim % 2 == 0 else None
    if built is None or built.facts.recall < LEAST_RECALL:
        built = _build("sq8", source, rows)
    return built


def _build(kind: Kind, source: VectorSource, rows: Rows) -> DenseIndex:
    began = time.perf_counter()
    index = faiss.IndexIDMap(_empty_index(kind, source.dim))
    chance = np.random.default_rng(0)  # the same vectors give the same index
    sample: dict[int, Vectors] = {}
    if kind != "flat":
        chosen = np.sort(chance.choice(rows, min(len(rows), _TRAINED_ON), replace=False))
        training = source.vectors_of(chosen.tolist())
        index.train(np.stack(list(training.values())))
        sample = {row: training[row] for row in chance.permutation(chosen)[:_SAMPLE].tolist()}
        del training
    nearest = _Nearest(np.array(list(sample.values()), np.float32).reshape(-1, source.dim))
    for some, vectors in source.batches():
        index.add_with_ids(vectors, some)
        if sample:
            nearest.see(some, vectors)
    recall = _recall(index, sample, nearest.rows, source) if sample else 1.0
    facts = IndexFacts(
        kind, int(index.ntotal), int(index.ntotal), recall, len(sample),
        round(time.perf_counter() - began, 2),
    )
    return DenseIndex(index, facts)


def _empty_index(kind: Kind, dim: int) -> Any:
    product = faiss.METRIC_INNER_PRODUCT
    if kind == "pq":
        return faiss.IndexPQFastScan(dim, dim // 2, 4, product)
    quantizer = faiss.ScalarQuantizer.QT_8bit if kind == "sq8" else faiss.ScalarQuantizer.QT_fp16
    return faiss.IndexScalarQuantizer(dim, quantizer, product)


class _Nearest:
    """The 11 nearest of some vectors, themselves among them, gathered batch by batch."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.rows: Rows = np.full((len(vectors), 11), -1, dtype=np.int64)
        self._scores = np.full((len(vectors), 11), -np.inf, dtype=np.float32)

    def see(self, rows: Rows, vectors: Vectors) -> None:
        scores = self.vectors @ vectors.T
        best = _best_columns(scores, 11)
        scores = np.concatenate([self._scores, np.take_along_axis(scores, best, 1)], axis=1)
        seen = np.concatenate([self.rows, rows[best]], axis=1)
        best = _best_columns(scores, 11)
        self._scores = np.take_along_axis(scores, best, 1)
        self.rows = np.take_along_axis(seen, best, 1)


def _recall(index: Any, sample: dict[int, Vectors], nearest: Rows, source: VectorSource) -> float:
    """Share of the true ten nearest among the ten found, a vector's finding itself left out."""
    view = DenseView(
        0, None, DenseIndex(index, IndexFacts("pq", 0, 0, 0.0, 0, 0.0)), Overlay.empty(source.dim)
    )
    vectors = np.stack(list(sample.values()))
    shares = []
    for row, true, got in zip(sample, nearest, view.search(vectors, 11, source.vectors_of), strict=True):
        others = set(true.tolist()) - {row, -1}
        shares.append(len(others & {found for found, _ in got}) / max(1, len(others)))
    return round(float(np.mean(shares)), 4)


def can_be_updated(facts: IndexFacts, changed: int, total: int, *, flat_limit: int = FLAT_LIMIT) -> bool:
    """Whether adding to the index is right: neither is most of it new, nor its kind due to change."""
    if (facts.kind == "flat") != (total <= flat_limit):
        return False
    if facts.kind == "flat":
        return changed <= total // 2
    return changed + facts.dead <= total // 4 and total <= _GROWN * facts.built_from


def updated_index(old: DenseIndex, overlay: Overlay) -> DenseIndex:
    """The index with the overlay's changes in it. `old` must not be mapped (`read_index(copy=True)`)."""
    began = time.perf_counter()
    index = old.index
    hidden = np.fromiter(overlay.hidden, np.int64, len(overlay.hidden))
    if old.is_exact:
        index.remove_ids(hidden)
    else:
        # FAISS 1.15 leaves the codes of a removed vector in fast scan's last block, and mixes them
        # into those of the next one added (a test has it): so they stay, and only lose their number.
        rows = faiss.vector_to_array(index.id_map)
        rows[np.isin(rows, hidden)] = _DEAD
        faiss.copy_array_to_vector(rows, index.id_map)
    if len(overlay.rows):
        index.add_with_ids(overlay.vectors, overlay.rows)
    dead = int((faiss.vector_to_array(index.id_map) == _DEAD).sum())
    seconds = round(time.perf_counter() - began, 2)
    return DenseIndex(
        index, replace(old.facts, vectors=int(index.ntotal) - dead, dead=dead, seconds=seconds)
    )


# the file


def write_index(built: DenseIndex, target: Path) -> IndexFacts:
    """Put the index at `target` in one rename. Raises OSError where it can't be written."""
    fresh = target.with_name(f"{target.name}.new")
    try:
        with open(fresh, "wb") as out:
            out.write(faiss.serialize_index(built.index).data)
            out.flush()
            os.fsync(out.fileno())
        facts = replace(
            built.facts, size=fresh.stat().st_size, digest=_digest(fresh), edges=_edges(fresh)
        )
        fresh.replace(target)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return facts


def read_index(target: Path, facts: IndexFacts, *, copy: bool = False) -> DenseIndex | None:
    """The index in the file, None where the file isn't the one that `facts` tell of.

    A large file is mapped after a look at its size and both ends; `is_whole` looks at all of it.
    With `copy` nothing is mapped, so that the index can be added to.
    """
    if not target.is_file() or target.stat().st_size != facts.size or _edges(target) != facts.edges:
        return None
    if copy or os.name == "nt":  # FAISS opens no file whose name isn't in Windows' code page
        return DenseIndex(faiss.deserialize_index(np.fromfile(target, dtype=np.uint8)), facts)
    return DenseIndex(faiss.read_index(str(target), faiss.IO_FLAG_MMAP_IFC), facts)


def is_whole(target: Path, facts: IndexFacts) -> bool:
    """Whether every byte of the file is as it was written."""
    return target.stat().st_size == facts.size and _digest(target) == facts.digest


def _digest(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _edges(file: Path) -> str:
    with open(file, "rb") as data:
        first = data.read(_EDGE)
        data.seek(max(0, file.stat().st_size - _EDGE))
        return hashlib.blake2b(first + data.read(_EDGE), digest_size=16).hexdigest()
