"""The knowledge base in Milvus: a file (Milvus Lite), a server or a cluster, by the URI alone.

    NAME_chunks_N   a row a chunk: text and place, dense vector, sparse vector of its terms
    NAME_records    files, their documents in parts, what is kept with the base (a key each)
    NAME_terms      in how many chunks each term stands

NAME is what follows `#` in the URI, "rag" without. Terms are our own (rag/terms.py), each a dimension
of the sparse vector by its hash, so that nothing depends on the analyzers and the BM25 of a Milvus
version. The sparse search brings candidates up; their BM25 is then computed here as SQLite does.

Milvus has no transactions. A file's record is written after its chunks and names their rows, and
what it had before is removed last: whoever stops in between leaves rows that no record names, which
the next writer removes. A reader may for a moment see both states of the one file that is replaced.

Milvus Lite is for trying this out: it builds its index of terms anew with the first question of every
process, which takes 24 s of a core at 100,000 chunks, and one process at a time opens a file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from rag.dense_index import Found, IndexFacts, Rows
from rag.document import Chunk, Document, Heading, Page
from rag.embedder import Embedder, Vectors
from rag.errors import KnowledgeBaseError
from rag.filter import EVERYTHING, Filter, LastChoice
from rag.knowledge import FileRecord, StoredChunk, path_words, refuse_other_embedder
from rag.terms import passage_terms

try:
    from grpc import RpcError
    from pymilvus import DataType, MilvusClient, MilvusException
except ImportError as error:  # pragma: no cover
    raise KnowledgeBaseError(
        "store is 'milvus', but pymilvus is not installed. Run: pip install 'local-rag[milvus]'"
    ) from error

# It logs every refused call with its stack before it raises the exception that says the same.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
logging.getLogger("grpc._server").setLevel(logging.CRITICAL)  # the same, of the server inside Milvus Lite

FORMAT = "1"
_PART = 16_000  # characters of a document in one record, of 4 bytes at most: Milvus holds 65,535 in a field
_MOST_BYTES = 65_535
_AT_ONCE = 1_000  # rows written or asked for in one call
_TERMS_AT_ONCE = 5_000
_K1, _B = 1.2, 0.75  # as FTS5 has them
# The sparse vectors are made for this many terms a chunk, because a stored vector can't follow the
# mean of a growing base. Candidates are this many times those asked for, and then scored exactly.
_USUAL_TERMS, _CANDIDATES = 200.0, 4
_LEASE = 600.0  # seconds that a writer on another machine is waited for after its last sign of life
_UNPLAIN = re.compile(r"""["'\\%\x00-\x1f]""")
_CHUNK_FIELDS = ["path", "text", "place"]


@dataclass(frozen=True, slots=True)
class _State:
    """Changes with every write. `is_counted`: the counts of terms agree with the chunks."""

    generation: int = 0
    next_row: int = 1
    num_terms: int = 0
    chunks_collection: str = ""
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class _Stored:
    """A file's record with where its chunks and its document are."""

    record: FileRecord
    first_row: int = 0
    num_parts: int = 0

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.record.chunks)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a filter chooses: files by path, and the condition on rows; None: no row."""

    paths: tuple[str, ...]
    condition: str | None


_File = tuple[FileRecord, Document, Sequence[Chunk], Vectors]


class _Calls:
    """The client, whose failures become KnowledgeBaseErrors."""

    def __init__(self, client: MilvusClient, uri: str) -> None:
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)

        def checked(*arguments: Any, **options: Any) -> Any:
            try:
                return call(*arguments, **options)
            except (MilvusException, RpcError) as error:
                raise KnowledgeBaseError(
                    f"Milvus at {self._uri} failed to {name.replace('_', ' ')}: {error}. What was stored "
                    "before is there; see to the server, then run this again."
                ) from error

        return checked


class MilvusStore:
    """A knowledge base in Milvus, with the methods of rag.store.Store.

    `folder` is on this machine and holds the lock of its writer. A token for the server is taken
    from the environment variable MILVUS_TOKEN.
    """

    def __init__(self, uri: str, folder: str | Path) -> None:
        self.uri, _, name = uri.partition("#")
        self.name = name or "rag"
        self.folder = Path(folder)
        self.read_only = False
        is_server = "://" in self.uri
        if not is_server:
            if not self.uri.endswith(".db"):
                raise KnowledgeBaseError(
                    f"milvus_uri is {self.uri!r}; it must be a file whose name ends in .db, or a server "
                    "as in http://localhost:19530."
                )
            Path(self.uri).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._dense_index = "AUTOINDEX" if is_server else "FLAT"
        try:
            client = MilvusClient(self.uri, token=os.environ.get("MILVUS_TOKEN", ""))
        except Exception as error:  # pymilvus raises several kinds, grpc its own
            hint = "Is the server running?" if is_server else (
                "A Milvus file is opened by one process at a time, and needs: pip install milvus-lite"
            )
            raise KnowledgeBaseError(f"{self.uri} can't be opened: {error}. {hint}") from error
        self._client: Any = _Calls(client, self.uri)
        self._local = threading.local()
        self._lock: filelock.FileLock | None = None
        self._writer_key = f"{socket.gethostname()} pid {os.getpid()} {id(self)}"
        self._lease_until = 0.0
        self._num_chunks = (-1, 0)  # of which generation, how many
        self._chosen: LastChoice[_Chosen] = LastChoice()
        self._gathered: list[_File] | None = None  # files put inside `together`
        self._counted: Counter[int] = Counter()  # changes of term counts that aren't stored yet

    # opening

    @classmethod
    def find(cls, uri: str, *, folder: str | Path) -> MilvusStore | None:
        """The base of this name; None where none has been made."""
        store = cls(uri, folder)
        if not store._client.has_collection(store._records):
            return None
        # A server keeps collections loaded, a file opened anew doesn't.
        store._client.load_collection(store._records)
        version = store.meta("format")
        if version is None:
            return None  # its making was stopped; `create` goes on
        if version != FORMAT:
            raise KnowledgeBaseError(
                f"the knowledge base {store.name!r} in {store.uri} has format {version}, this program "
                f"reads format {FORMAT}. Ingest into another name: {store.uri}#NAME"
            )
        for collection in (store._terms, store._state().chunks_collection):
            if collection:
                store._client.load_collection(collection)
        return store

    @classmethod
    def open(cls, uri: str, *, folder: str | Path) -> MilvusStore:
        """Raises KnowledgeBaseError where there is none, or it can't be reached."""
        store = cls.find(uri, folder=folder)
        if store is None:
            raise KnowledgeBaseError(
                f"there is no knowledge base in {uri}. Build one: python -m ingest FOLDER with "
                "RAG_STORE=milvus, or move one there: python -m ingest --copy-to-milvus URI"
            )
        return store

    @classmethod
    def create(cls, uri: str, *, folder: str | Path) -> MilvusStore:
        """Open, made first where it is missing."""
        found = cls.find(uri, folder=folder)
        if found is not None:
            return found
        store = cls(uri, folder)
        for collection, key in ((store._records, "text"), (store._terms, "number")):
            if not store._client.has_collection(collection):
                store._make_plain_collection(collection, key)
        store._put_records({"state": json.dumps(asdict(_State())), "meta:format": FORMAT})
        return store

    @property
    def _records(self) -> str:
        return f"{self.name}_records"

    @property
    def _terms(self) -> str:
        return f"{self.name}_terms"

    def _make_plain_collection(self, name: str, kind: str) -> None:
        schema = MilvusClient.create_schema(auto_id=False)
        if kind == "text":
            schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_MOST_BYTES)
            schema.add_field("body", DataType.VARCHAR, max_length=_MOST_BYTES)
        else:
            schema.add_field("key", DataType.INT64, is_primary=True)
            schema.add_field("count", DataType.INT64)
        schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)  # Milvus wants a vector everywhere
        index = MilvusClient.prepare_index_params()
        index.add_index("unused", index_type=self._dense_index, metric_type="IP")
        self._create(name, schema, index)

    def _make_chunks_collection(self, name: str, dim: int) -> None:
        if self._client.has_collection(name):
            self._client.drop_collection(name)
        schema = MilvusClient.create_schema(auto_id=False)
        schema.add_field("row", DataType.INT64, is_primary=True)
        for field in _CHUNK_FIELDS:
            schema.add_field(field, DataType.VARCHAR, max_length=_MOST_BYTES)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        index = MilvusClient.prepare_index_params()
        index.add_index("dense", index_type=self._dense_index, metric_type="IP")
        index.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
        self._create(name, schema, index)

    def _create(self, name: str, schema: Any, index: Any) -> None:
        self._client.create_collection(name, schema=schema, consistency_level="Strong")
        # Nothing is in it yet, so that there is nothing to wait half a second for.
        self._client.create_index(name, index, sync=False)
        self._client.load_collection(name)

    def close(self) -> None:
        self._client.close()

    def release(self) -> None:
        """Threads share the one client, so that there is nothing to give back."""

    # records: a key, a text

    def _get_records(self, keys: Sequence[str]) -> dict[str, str]:
        asked = {_plain(key): key for key in keys}
        ids = list(asked)
        found: dict[str, str] = {}
        for begin in range(0, len(ids), _AT_ONCE):
            rows = self._client.get(
                self._records, ids=ids[begin : begin + _AT_ONCE], output_fields=["key", "body"]
            )
            found.update((asked[row["key"]], row["body"]) for row in rows)
        return found

    def _put_records(self, records: Mapping[str, str]) -> None:
        rows = []
        for key, body in records.items():
            if len(body.encode()) > _MOST_BYTES or len(key.encode()) > _MOST_BYTES:
                raise KnowledgeBaseError(
                    f"{key[:200]} takes {len(body.encode()):,} bytes; Milvus holds {_MOST_BYTES:,} in a field."
                )
            rows.append({"key": _plain(key), "body": body, "unused": [0.0, 0.0]})
        for begin in range(0, len(rows), _AT_ONCE):
            self._client.upsert(self._records, rows[begin : begin + _AT_ONCE])

    def _delete_records(self, keys: Sequence[str]) -> None:
        self._delete(self._records, [_plain(key) for key in keys])

    def _delete(self, collection: str, ids: Sequence[int] | Sequence[str]) -> None:
        for begin in range(0, len(ids), _AT_ONCE):
            self._client.delete(collection, ids=list(ids[begin : begin + _AT_ONCE]))

    def _state(self) -> _State:
        """Read once in a snapshot, so that one question sees one generation."""
        held: _State | None = getattr(self._local, "state", None)
        return held or _State(**json.loads(self._get_records(["state"])["state"]))

    # one writer

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer. Raises KnowledgeBaseError naming the process that is it already."""
        if self._lock is not None:
            raise KnowledgeBaseError("this process is writing to the knowledge base already.")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(self.folder / f"milvus-{self.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise KnowledgeBaseError(
                f"another process is writing to the knowledge base {self.name!r} in {self.uri} "
                f"({self._get_records(['writer']).get('writer', 'unknown')}). Wait until it has finished."
            ) from error
        self._lock = lock
        try:
            self._take_lease()
            if not self._state().is_counted:
                self._repair()
            yield
            self._store_counts()
        finally:
            self._delete_records(["writer"])
            self._lock = None
            self._counted.clear()
            lock.release()

    def _take_lease(self) -> None:
        """Tell writers on other machines that this one writes."""
        held = json.loads(self._get_records(["writer"]).get("writer", "{}"))
        mine = self._writer_key.rsplit(" ", 1)[0].split(" pid ")[0]
        if held and held["until"] > time.time() and held["host"] != mine:
            raise KnowledgeBaseError(
                f"{held['who']} is writing to the knowledge base {self.name!r} in {self.uri}. Wait until it "
                f"has finished; if it has died, this works again in {held['until'] - time.time():.0f} s."
            )
        self._lease_until = time.time() + _LEASE
        lease = {"who": self._writer_key, "host": mine, "until": self._lease_until}
        self._put_records({"writer": json.dumps(lease)})

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One generation for all that is asked inside. Nests."""
        if getattr(self._local, "state", None) is not None:
            yield
            return
        self._local.state = self._state()
        try:
            yield
        finally:
            self._local.state = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Store the files that are put inside in few calls, at the end."""
        self._gathered = []
        try:
            yield
            self._put_gathered()
        finally:
            self._gathered = None

    def _put_gathered(self) -> None:
        files, self._gathered = self._gathered, None
        if files:
            self.put_files(files)

    def _begin_change(self, new_rows: int = 0) -> _State:
        """Raise the generation and reserve rows, before anything is written."""
        if self._lock is None:
            raise KnowledgeBaseError("the knowledge base is changed only inside `with store.writing():`.")
        self._put_gathered()  # changes are made in the order they came
        if time.time() > self._lease_until - _LEASE / 2:
            self._take_lease()
        state = self._state()
        self._put_state(
            replace(
                state, generation=state.generation + 1, next_row=state.next_row + new_rows,
                is_counted=False,
            )
        )
        return state

    def _put_state(self, state: _State) -> None:
        self._put_records({"state": json.dumps(asdict(state))})

    # what is in it

    def meta(self, key: str) -> str | None:
        return self._get_records([f"meta:{key}"]).get(f"meta:{key}")

    def set_meta(self, key: str, value: str) -> None:
        self._begin_change()
        self._put_records({f"meta:{key}": value})

    @property
    def generation(self) -> int:
        return self._state().generation

    @property
    def dim(self) -> int:
        return int(self.meta("dim") or 1)

    def files(self) -> dict[str, FileRecord]:
        """Every file that was ingested or failed, by path, in path order."""
        return {path: stored.record for path, stored in self._all_files().items()}

    def _all_files(self) -> dict[str, _Stored]:
        pages = self._client.query_iterator(
            self._records, batch_size=_AT_ONCE, filter=_under("key", "file:"), output_fields=["body"]
        )
        found = []
        while rows := pages.next():
            found += [_parse_stored(row["body"]) for row in rows]
        pages.close()
        found.sort(key=lambda stored: stored.record.path)
        return {stored.record.path: stored for stored in found}

    def _find(self, path: str) -> _Stored | None:
        body = self._get_records([f"file:{path}"]).get(f"file:{path}")
        return None if body is None else _parse_stored(body)

    def count_chunks(self) -> int:
        state = self._state()
        if not state.chunks_collection:
            return 0
        # Milvus Lite counts 100,000 rows in 50 ms, and a question needs the number three times.
        generation, count = self._num_chunks
        if generation != state.generation:
            rows = self._client.query(
                state.chunks_collection, filter="", output_fields=["count(*)"]
            )
            count = int(rows[0]["count(*)"])
            self._num_chunks = state.generation, count
        return count

    def document(self, path: str) -> Document:
        """The stored text of a file with its pages and headings."""
        stored = self._find(path)
        if stored is None or not stored.num_parts:
            raise KnowledgeBaseError(f"{path} is not in the knowledge base {self.name!r} in {self.uri}.")
        keys = _part_keys(stored)
        parts = self._get_records(keys)
        if len(parts) < len(keys):  # replaced since its record was read
            return self.document(path)
        return _parse_document(path, "".join(parts[key] for key in keys))

    def page_at(self, path: str, offset: int) -> int | None:
        """The 1-based page of a character of a file; None where the file has no pages."""
        return self.document(path).page_at(offset) if self._find(path) else None

    def chunks_of(self, path: str) -> list[Chunk]:
        """The chunks of one file, in reading order."""
        stored = self._find(path)
        found = self._get_chunks(stored.rows, _CHUNK_FIELDS) if stored else []
        chunks = [(row["row"], _chunk(row)) for row in found]
        return [chunk for _, chunk in sorted(chunks, key=lambda one: (one[1].start, one[0]))]

    def _get_chunks(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        chunks = self._state().chunks_collection
        found: list[dict[str, Any]] = []
        for begin in range(0, len(rows), _AT_ONCE):
            ids = [int(row) for row in rows[begin : begin + _AT_ONCE]]
            found += self._client.get(chunks, ids=ids, output_fields=["row", *fields])
        return sorted(found, key=lambda row: int(row["row"]))

    def stored_chunks(self, rows: Sequence[int]) -> dict[int, StoredChunk]:
        """Chunks by row number, with their terms. Rows that are gone are left out."""
        return {row["row"]: _stored_chunk(row) for row in self._get_chunks(rows, _CHUNK_FIELDS)}

    def vectors_of(self, rows: Sequence[int]) -> dict[int, Vectors]:
        """float32 (dim,) by row number. Rows that are gone are left out."""
        return {
            row["row"]: np.asarray(row["dense"], dtype=np.float32)
            for row in self._get_chunks(rows, ["dense"])
        }

    def all_vectors(self) -> tuple[Rows, Vectors]:
        """Row numbers, ascending, and their vectors, float32 (n, dim)."""
        rows = [row for stored in self._all_files().values() for row in stored.rows]
        found = self.vectors_of(sorted(rows))
        vectors = np.array(list(found.values()), dtype=np.float32)
        return np.array(list(found), dtype=np.int64), vectors.reshape(len(found), self.dim)

    # searching

    def matching(self, where: Filter) -> tuple[str, ...]:
        """The paths of the files that `where` chooses; empty where it chooses none."""
        with self.snapshot():
            return self._choose(where).paths

    def _choose(self, where: Filter) -> _Chosen:
        """Call inside `snapshot`."""

        def choose() -> _Chosen:
            stored = self._all_files()
            paths = where.choose({path: one.record for path, one in stored.items()})
            return _Chosen(tuple(paths), _among([stored[path].rows for path in paths]))

        return self._chosen.get(self.generation, where, choose)

    def search_dense(self, vectors: Vectors, k: int, *, where: Filter = EVERYTHING) -> Found:
        """For each question vector (n, dim) up to k (row, cosine) of the files in `where`, best first."""
        with self.snapshot():
            return self._search_dense(vectors, k, where)

    def _search_dense(self, vectors: Vectors, k: int, where: Filter) -> Found:
        chunks = self._state().chunks_collection
        condition = "" if where.is_everything else self._choose(where).condition
        if not chunks or condition is None:
            return [[] for _ in vectors]
        found = self._client.search(
            chunks, data=[vector.tolist() for vector in vectors], anns_field="dense", limit=k,
            filter=condition,
        )
        pairs = [[(int(hit["row"]), float(hit["distance"])) for hit in hits] for hits in found]
        return [sorted(some, key=lambda pair: (-pair[1], pair[0])) for some in pairs]

    def search_terms(
        self, terms: Sequence[str], k: int, *, place_weight: float = 1.0, where: Filter = EVERYTHING
    ) -> list[tuple[int, float]]:
        """Up to k (row, BM25), best first, of chunks of the files in `where` that hold any of the terms."""
        with self.snapshot():
            return self._search_terms(terms, k, place_weight, where)

    def _search_terms(
        self, terms: Sequence[str], k: int, place_weight: float, where: Filter
    ) -> list[tuple[int, float]]:
        chunks = self._state().chunks_collection
        total = self.count_chunks()
        condition = "" if where.is_everything else self._choose(where).condition
        if not terms or not total or condition is None:
            return []
        weights = {
            term: max(1e-6, math.log((total - count + 0.5) / (count + 0.5)))
            for term, count in self.term_counts(terms).items()
        }
        query = {_term_id(term): weight for term, weight in weights.items()}
        hits = self._client.search(
            chunks, data=[query], anns_field="sparse", limit=_CANDIDATES * k,
            filter=condition, output_fields=_CHUNK_FIELDS,
        )[0]
        average = self.average_terms()
        scored = []
        for hit in hits:
            stored = _stored_chunk({**hit["entity"], "row": hit["row"]})
            scored.append((stored.row, _bm25(stored, weights, average, place_weight)))
        scored.sort(key=lambda pair: (-pair[1], pair[0]))
        return scored[:k]

    def term_counts(self, terms: Sequence[str]) -> dict[str, int]:
        """In how many chunks each term stands."""
        counts = self._get_counts([_term_id(term) for term in terms])
        return {term: counts.get(_term_id(term), 0) for term in terms}

    def _get_counts(self, ids: Sequence[int]) -> dict[int, int]:
        counts: dict[int, int] = {}
        for begin in range(0, len(ids), _TERMS_AT_ONCE):
            found = self._client.get(
                self._terms, ids=list(ids[begin : begin + _TERMS_AT_ONCE]), output_fields=["key", "count"]
            )
            counts.update((row["key"], row["count"]) for row in found)
        return counts

    def average_terms(self) -> float:
        """Mean number of terms a chunk."""
        return self._state().num_terms / max(1, self.count_chunks())

    # the embedder it belongs to

    @property
    def embedder_name(self) -> str | None:
        return self.meta("embedder")

    def bind_embedder(self, embedder: Embedder) -> None:
        """Record the embedder at first use. Raises KnowledgeBaseError where it is another one."""
        if self.meta("embedder_fingerprint") == embedder.fingerprint:
            return
        if self.meta("embedder") is not None and self.count_chunks():
            self.check_embedder(embedder)
        self.bind_vectors(embedder.name, embedder.fingerprint, embedder.dim)

    def bind_vectors(self, name: str, fingerprint: str, dim: int) -> None:
        """Make the collection of chunks, empty, for vectors of this embedder."""
        state = self._begin_change()
        chunks = self._next_collection(state)
        self._make_chunks_collection(chunks, dim)
        self._switch(chunks, name, fingerprint, dim)

    def _next_collection(self, state: _State) -> str:
        return f"{self.name}_chunks_{state.generation + 1}"

    def _switch(self, chunks: str, name: str, fingerprint: str, dim: int) -> None:
        """From now on `chunks` is the collection of chunks; the one before is dropped."""
        state = self._state()
        self._put_records({
            "meta:embedder": name, "meta:embedder_fingerprint": fingerprint, "meta:dim": str(dim),
            "state": json.dumps(asdict(replace(state, chunks_collection=chunks))),
        })
        if state.chunks_collection:
            self._client.drop_collection(state.chunks_collection)

    def check_embedder(self, embedder: Embedder) -> None:
        """Raise KnowledgeBaseError where the vectors stored were made by another embedder."""
        refuse_other_embedder(self.meta, embedder, advice="python -m ingest --reembed")

    # changing it

    def put_file(
        self, record: FileRecord, document: Document, chunks: Sequence[Chunk], vectors: Vectors
    ) -> None:
        """Store a file in place of what was there under its path. vectors: float32 (chunks, dim)."""
        if self._gathered is not None:
            if any(record.path == other.path for other, *_ in self._gathered):
                raise ValueError(f"{record.path} is put twice inside `together`")
            self._gathered.append((record, document, chunks, vectors))
            return
        self.put_files([(record, document, chunks, vectors)])

    def put_files(self, files: Sequence[_File]) -> None:
        """`put_file` for several, in few calls."""
        rows: list[dict[str, Any]] = []
        records: dict[str, str] = {}
        parts: dict[str, str] = {}
        state = self._begin_change(sum(len(chunks) for _, _, chunks, _ in files))
        row = state.next_row
        for record, document, chunks, vectors in files:
            if len(chunks) != len(vectors):
                raise ValueError(f"{len(chunks)} chunks, {len(vectors)} vectors")
            text = _dump_document(document)
            record = replace(record, chunks=len(chunks), characters=len(document.text))
            stored = _Stored(record, row, -(-len(text) // _PART))
            for at, key in enumerate(_part_keys(stored)):
                parts[key] = text[at * _PART : (at + 1) * _PART]
            records[f"file:{record.path}"] = _dump_stored(stored)
            packed = np.asarray(vectors, dtype=np.float16).astype(np.float32)  # as SQLite keeps them
            for chunk, vector in zip(chunks, packed, strict=True):
                rows.append(self._chunk_row(row, chunk, vector))
                row += 1
        before = [_parse_stored(body) for body in self._get_records(list(records)).values()]
        self._put_records(parts)
        for begin in range(0, len(rows), _AT_ONCE):
            self._client.insert(state.chunks_collection, rows[begin : begin + _AT_ONCE])
        self._put_records(records)  # from here on they are what the base holds
        for old in before:
            self._remove_contents(old)

    def _chunk_row(self, row: int, chunk: Chunk, vector: Vectors) -> dict[str, Any]:
        place = json.dumps(
            [chunk.start, chunk.end, chunk.page, chunk.last_page, chunk.headings, chunk.title],
            ensure_ascii=False,
        )
        for text in (chunk.text, place):
            if len(text.encode()) > _MOST_BYTES:
                raise KnowledgeBaseError(
                    f"a chunk of {chunk.path} takes {len(text.encode()):,} bytes; Milvus holds "
                    f"{_MOST_BYTES:,} in a field. Ingest with a smaller --chunk-tokens."
                )
        stored = _stored_chunk({"row": row, "path": chunk.path, "text": chunk.text, "place": place})
        counts = Counter((*stored.body_terms, *stored.place_terms))
        self._count(counts, 1)
        length = sum(counts.values())
        norm = _K1 * (1 - _B + _B * length / _USUAL_TERMS)
        sparse = {_term_id(term): count * (_K1 + 1) / (count + norm) for term, count in counts.items()}
        return {
            "row": row, "path": chunk.path, "text": chunk.text, "place": place,
            "dense": vector.tolist(), "sparse": sparse or {_NO_TERM: 1e-6},
        }

    def _count(self, terms: Counter[str], sign: int) -> None:
        for term in terms:
            self._counted[_term_id(term)] += sign
        self._counted[_NO_TERM] += sign * sum(terms.values())

    def _remove_contents(self, old: _Stored) -> None:
        """Delete the chunks and the document that a file's earlier record names."""
        found = self._get_chunks(old.rows, _CHUNK_FIELDS)
        for row in found:
            stored = _stored_chunk(row)
            self._count(Counter((*stored.body_terms, *stored.place_terms)), -1)
        if found:
            self._delete(self._state().chunks_collection, [row["row"] for row in found])
        self._delete_records(_part_keys(old))

    def set_modified(self, dates: Mapping[str, float]) -> None:
        """Keep when each of these files was last modified, in seconds since 1970."""
        self._begin_change()
        found = [_parse_stored(body) for body in self._get_records([f"file:{path}" for path in dates]).values()]
        self._put_records({
            f"file:{one.record.path}": _dump_stored(
                replace(one, record=replace(one.record, modified=dates[one.record.path]))
            )
            for one in found
        })

    def put_failure(self, record: FileRecord) -> None:
        """Record that a file could not be read; what it had before is removed."""
        self._begin_change()
        old = self._find(record.path)
        self._put_records({f"file:{record.path}": _dump_stored(_Stored(replace(record, chunks=0)))})
        if old is not None:
            self._remove_contents(old)

    def move_file(self, old_path: str, new_path: str, record: FileRecord) -> None:
        """Give a file's stored text and vectors a new path. Nothing is embedded."""
        old = self._find(old_path)
        if old is None:
            raise KnowledgeBaseError(f"{old_path} is not in the knowledge base {self.name!r} in {self.uri}.")
        found = self._get_chunks(old.rows, [*_CHUNK_FIELDS, "dense"])
        chunks = [replace(_chunk(row), path=new_path) for row in found]
        vectors = np.array([row["dense"] for row in found], np.float32).reshape(len(found), self.dim)
        document = replace(self.document(old_path), path=new_path)
        self.put_file(replace(record, path=new_path), document, chunks, vectors)
        self.remove_file(old_path)

    def remove_file(self, path: str) -> None:
        old = self._find(path)
        if old is None:
            return
        self._begin_change()
        self._delete_records([f"file:{path}"])
        self._remove_contents(old)

    def reembed(
        self, embedder: Embedder, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Embed every stored chunk again, into a new collection that then takes the old one's place."""
        total, done = self.count_chunks(), 0
        state = self._begin_change()
        fresh = self._next_collection(state)
        self._make_chunks_collection(fresh, embedder.dim)
        for stored in self._all_files().values():
            for begin in range(0, len(stored.rows), 512):
                found = self._get_chunks(stored.rows[begin : begin + 512], [*_CHUNK_FIELDS, "sparse"])
                vectors = embedder.embed_passages([_chunk(row).indexed_text for row in found])
                packed = vectors.astype(np.float16).astype(np.float32)
                rows = [{**row, "dense": vector.tolist()} for row, vector in zip(found, packed, strict=True)]
                if rows:
                    self._client.insert(fresh, rows)
                done += len(rows)
                progress(done, total)
        self._switch(fresh, embedder.name, embedder.fingerprint, embedder.dim)
        return done

    # what is derived: the counts of terms

    def publish(self) -> None:
        """Store the counts of terms, so that they agree with the chunks, and let Milvus index what is new."""
        self._store_counts()
        # What hasn't been flushed is searched row by row.
        for collection in (self._records, self._terms, self._state().chunks_collection):
            if collection:
                self._client.flush(collection)

    def _store_counts(self) -> None:
        total = self._counted.pop(_NO_TERM, 0)
        changed = {key: change for key, change in self._counted.items() if change}
        before = self._get_counts(list(changed))
        rows = [
            {"key": key, "count": before.get(key, 0) + change, "unused": [0.0, 0.0]}
            for key, change in changed.items()
        ]
        for begin in range(0, len(rows), _TERMS_AT_ONCE):
            self._client.upsert(self._terms, rows[begin : begin + _TERMS_AT_ONCE])
        self._delete(self._terms, [key for key in changed if before.get(key, 0) + changed[key] == 0])
        self._counted.clear()
        state = self._state()
        if total or not state.is_counted:
            # Another generation, because readers keep such figures as long as one lasts.
            self._put_state(
                replace(
                    state, generation=state.generation + 1, num_terms=state.num_terms + total,
                    is_counted=True,
                )
            )

    def _repair(self) -> None:
        """After a writer that was stopped: drop what no record names, and count the terms anew."""
        named = {row for stored in self._all_files().values() for row in stored.rows}
        chunks = self._state().chunks_collection
        self._delete(chunks, [row for row in self._rows() if row not in named])
        self._client.drop_collection(self._terms)
        self._make_plain_collection(self._terms, "number")
        self._put_state(replace(self._state(), num_terms=0))
        self._counted.clear()
        numbers = sorted(named)
        for begin in range(0, len(numbers), _AT_ONCE):
            for stored in self.stored_chunks(numbers[begin : begin + _AT_ONCE]).values():
                self._count(Counter((*stored.body_terms, *stored.place_terms)), 1)
        self._store_counts()

    def _rows(self) -> list[int]:
        """The number of every chunk that is stored, named by a record or not."""
        chunks = self._state().chunks_collection
        if not chunks:
            return []
        pages = self._client.query_iterator(chunks, batch_size=_AT_ONCE, output_fields=["row"])
        rows: list[int] = []
        while page := pages.next():
            rows += [int(row["row"]) for row in page]
        pages.close()
        return rows

    def check(self) -> list[str]:
        """What is inconsistent; an empty list where nothing is."""
        named = {row for stored in self._all_files().values() for row in stored.rows}
        there = set(self._rows())
        problems = []
        if there - named:
            problems.append(f"{len(there - named)} chunks without their file")
        if named - there:
            problems.append(f"{len(named - there)} chunks of files are missing")
        return problems

    def index_state(self) -> str:
        """"current", or "outdated" where a stopped writer left terms uncounted."""
        return "current" if self._state().is_counted else "outdated"

    def index_facts(self) -> IndexFacts | None:
        """None: Milvus keeps its own indexes."""
        return None


_NO_TERM = 0  # no term has this number; in the sparse vectors of chunks without any


def _term_id(term: str) -> int:
    """A dimension for a term, 1 to 2**32 - 2; two terms of 300,000 share one about ten times."""
    return 1 + zlib.crc32(term.encode()) % (2**32 - 2)


def _bm25(
    stored: StoredChunk, weights: Mapping[str, float], average: float, place_weight: float
) -> float:
    """As SQLite's FTS5 computes it, with a weight for terms in the place."""
    body, place = Counter(stored.body_terms), Counter(stored.place_terms)
    length = len(stored.body_terms) + len(stored.place_terms)
    norm = _K1 * (1 - _B + _B * length / max(average, 1e-9))
    score = 0.0
    for term, weight in weights.items():
        count = body[term] + place_weight * place[term]
        score += weight * count * (_K1 + 1) / (count + norm)
    return score


def _under(field: str, prefix: str) -> str:
    """A filter for values that begin with `prefix`; none for an empty one."""
    if not prefix:
        return ""
    first = json.dumps(prefix, ensure_ascii=False)
    last = json.dumps(prefix + "\U0010ffff", ensure_ascii=False)
    return f"{field} >= {first} and {field} < {last}"


def _among(rows: Sequence[range]) -> str | None:
    """A filter for these rows; None where there are none. Files stored one after the other become one range."""
    spans: list[list[int]] = []
    for each in sorted(rows, key=lambda each: each.start):
        if not len(each):
            continue
        if spans and spans[-1][1] == each.start:
            spans[-1][1] = each.stop
        else:
            spans.append([each.start, each.stop])
    return " or ".join(f"(row >= {start} and row < {stop})" for start, stop in spans) or None


def _plain(key: str) -> str:
    """A key without what pymilvus would have to quote in a filter, and doesn't."""
    return _UNPLAIN.sub(lambda match: f"%{ord(match[0]):02x}", key)


def _chunk(row: Mapping[str, Any]) -> Chunk:
    start, end, page, last_page, headings, title = json.loads(row["place"])
    return Chunk(
        path=row["path"], text=row["text"], start=start, end=end, page=page, last_page=last_page,
        headings=tuple(headings), title=title,
    )


def _stored_chunk(row: Mapping[str, Any]) -> StoredChunk:
    """A chunk with its terms, which its text and place give again."""
    chunk = _chunk(row)
    place = passage_terms(f"{chunk.place} {path_words(chunk.path)}")
    return StoredChunk(row["row"], chunk, tuple(place), tuple(passage_terms(chunk.text)))


def _part_keys(stored: _Stored) -> list[str]:
    return [
        f"text:{stored.record.path}:{stored.first_row}:{part}" for part in range(stored.num_parts)
    ]


def _dump_stored(stored: _Stored) -> str:
    return json.dumps(asdict(stored), ensure_ascii=False)


def _parse_stored(body: str) -> _Stored:
    values = json.loads(body)
    record = values.pop("record")
    record["warnings"] = tuple(record["warnings"])
    return _Stored(FileRecord(**record), **values)


def _dump_document(document: Document) -> str:
    return json.dumps([
        document.text, document.media_type, document.title,
        [(page.number, page.start, page.end) for page in document.pages],
        [(head.level, head.title, head.start) for head in document.headings], document.warnings,
    ], ensure_ascii=False)


def _parse_document(path: str, body: str) -> Document:
    text, media_type, title, pages, headings, warnings = json.loads(body)
    return Document(
        path=path, text=text, media_type=media_type, title=title,
        pages=tuple(Page(*page) for page in pages),
        headings=tuple(Heading(*heading) for heading in headings), warnings=tuple(warnings),
    )
