"""The knowledge base on disk: SQLite is the truth, the FAISS file is derived from it.

    .kb/knowledge.sqlite    files with their text, chunks, vectors (float16), full-text index
    .kb/vectors.faiss       the same vectors as a FAISS index (rag/dense_index.py), replaced in one rename
    .kb/writer.lock         held by the one process that writes

Every change is one transaction and raises the generation. A reader answers each question from one
snapshot of SQLite with vectors of the same generation, so it sees the old state or the new one,
never a mix. Triggers note which vectors changed since the FAISS file was written; a reader takes
those from SQLite, and all of them where the file is missing or damaged.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from rag.dense_index import (
    DenseIndex,
    DenseView,
    Found,
    IndexFacts,
    Overlay,
    Rows,
    build_index,
    can_be_updated,
    is_whole,
    read_index,
    updated_index,
    write_index,
)
from rag.document import Chunk, Document, Heading, Page
from rag.embedder import Embedder, Vectors
from rag.errors import KnowledgeBaseError
from rag.filter import EVERYTHING, Filter, LastChoice
from rag.terms import passage_terms

SCHEMA_VERSION = "1"
DATABASE = "knowledge.sqlite"
INDEX = "vectors.faiss"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE files (
    path TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL, status TEXT NOT NULL,
    pages INTEGER NOT NULL, chunks INTEGER NOT NULL, characters INTEGER NOT NULL,
    seconds REAL NOT NULL, pipeline TEXT NOT NULL, warnings TEXT NOT NULL, error TEXT, modified REAL
);
CREATE TABLE documents (
    path TEXT PRIMARY KEY REFERENCES files(path), text TEXT NOT NULL, media_type TEXT NOT NULL,
    title TEXT NOT NULL, pages TEXT NOT NULL, headings TEXT NOT NULL, warnings TEXT NOT NULL
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL REFERENCES files(path), text TEXT NOT NULL,
    start_char INTEGER NOT NULL, end_char INTEGER NOT NULL, page INTEGER, last_page INTEGER,
    headings TEXT NOT NULL, title TEXT NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX chunks_by_path ON chunks(path, start_char);
CREATE VIRTUAL TABLE terms USING fts5(
    place, body, tokenize = "unicode61 remove_diacritics 0 tokenchars '_'"
);
CREATE VIRTUAL TABLE term_counts USING fts5vocab('terms', 'row');
"""
# Which rows have another vector than in the FAISS file, or are gone, and since which generation.
# Made with the base, or by the first writer where the base is older than the table.
_CHANGE_LOG = """
CREATE TABLE IF NOT EXISTS vector_changes (row INTEGER PRIMARY KEY, generation INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS vector_changes_by_generation ON vector_changes(generation);
""" + "".join(
    f"""
CREATE TRIGGER IF NOT EXISTS {name} AFTER {event} ON chunks BEGIN
    INSERT OR REPLACE INTO vector_changes
    SELECT {row}.id, CAST(value AS INTEGER) + 1 FROM meta WHERE key = 'generation';
END;
"""
    for name, event, row in (
        ("chunk_added", "INSERT", "new"), ("chunk_removed", "DELETE", "old"),
        ("chunk_embedded_again", "UPDATE OF vector", "new"),
    )
)
# Bases made before files had a date get the column from their first writer, and the dates from the
# next ingest; until then none is known.
_ADD_DATES = "ALTER TABLE files ADD COLUMN modified REAL"
_FACTS = "index"  # in meta: what the FAISS file holds, as JSON
_KEPT_BY_ITSELF = (
    "schema", "generation", "embedder", "embedder_fingerprint", "dim", _FACTS,
    "index_generation", "index_digest",  # of older versions
)
_AT_ONCE = 500  # rows asked for in one statement
_READ_AT_ONCE = 20_000  # vectors in memory while an index is built
# Entries of the full-text index that one search goes through; about 40 ms of one core. A question's
# commonest terms, which say the least, are left to the comparison of the candidates.
_MOST_POSTINGS = 100_000
# A large FAISS file is written again once this share of it has changed; until then the changes are
# searched beside it.
_PENDING_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known about one ingested file.

    `pipeline` names the loader and splitter that read it, as in "pdf/3 splitter/5 tokens/320".
    """

    path: str
    sha256: str
    size: int
    status: str  # "ok" or "failed"
    pages: int = 0
    chunks: int = 0
    characters: int = 0
    seconds: float = 0.0
    pipeline: str = ""
    warnings: tuple[str, ...] = ()
    error: str | None = None
    modified: float | None = None  # when the file last was, in seconds since 1970; None where not known

    @property
    def kind(self) -> str:
        """The loader that read it: "pdf", "docx", "md", "code"; "" where that isn't known."""
        return self.pipeline.partition("/")[0]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a filter chooses: files by path, and the rows of their chunks, ascending."""

    paths: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk with its row number and the terms it is searched by."""

    row: int
    chunk: Chunk
    place_terms: tuple[str, ...]
    body_terms: tuple[str, ...]


def refuse_other_embedder(
    meta: Callable[[str], str | None], embedder: Embedder, *, advice: str
) -> None:
    """Raise KnowledgeBaseError where the base whose `meta` this is was built with another embedder."""
    fingerprint = meta("embedder_fingerprint")
    if fingerprint is not None and fingerprint != embedder.fingerprint:
        raise KnowledgeBaseError(
            f"this knowledge base was built with {meta('embedder')!r} ({meta('dim')} dimensions, "
            f"fingerprint {fingerprint}); settings name {embedder.name!r} ({embedder.dim} dimensions, "
            f"fingerprint {embedder.fingerprint}). Run: {advice}"
        )


_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_NO_WRITE_ACCESS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_NOT_OF_THE_BASE = (
    *_NO_WRITE_ACCESS, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
)


def database_error(error: sqlite3.Error, folder: str | Path) -> KnowledgeBaseError | None:
    """What SQLite's error means for the knowledge base in `folder`, and what to do; None for a bug of ours."""
    folder = Path(folder)
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF  # without the details above it
    if kind in _DAMAGED or "decode to UTF-8" in str(error):
        return _damaged(error, folder)
    log = folder / f"{DATABASE}-wal"
    if kind in _NO_WRITE_ACCESS and log.is_file() and log.stat().st_size:
        return KnowledgeBaseError(
            f"the knowledge base in {folder} can't be read without write access ({error}): the program that wrote to "
            f"it last was stopped, and what it wrote is still in {log.name}. Nothing is lost. Make the folder "
            f"writable, run once: python -m rag doctor --kb {folder}\nAfter that it may be read-only again."
        )
    if kind in _NOT_OF_THE_BASE:
        return KnowledgeBaseError(
            f"{folder / DATABASE} can't be used now: {error}. Check the room on the disk, the folder's rights, and "
            "whether another program holds it; then run this again."
        )
    return None


@contextmanager
def explained_database_errors(folder: str | Path) -> Iterator[None]:
    """Raises KnowledgeBaseError in place of SQLite's errors that `database_error` knows."""
    try:
        yield
    except sqlite3.Error as error:
        explained = database_error(error, folder)
        if explained is None:
            raise
        raise explained from error


def _damaged(error: sqlite3.Error, folder: Path) -> KnowledgeBaseError:
    return KnowledgeBaseError(
        f"{folder / DATABASE} can't be read ({error}). Restore it from a copy, or delete "
        f"the folder and run: python -m ingest FOLDER --kb {folder}"
    )


class KnowledgeBase:
    """Open with `KnowledgeBase.open(folder)`, or `.create(folder)` to make it where it is missing.

    Safe to use from several threads: each gets its own connection.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self.folder = folder
        self.read_only = read_only
        self._local = threading.local()
        self._view: DenseView | None = None
        self._index_lock = threading.Lock()
        self._lock = filelock.FileLock(str(folder / "writer.lock"), timeout=0)
        self._writing = threading.Lock()
        self._chosen: LastChoice[_Chosen] = LastChoice()

    # opening

    @classmethod
    def open(cls, folder: str | Path) -> KnowledgeBase:
        """Raises KnowledgeBaseError where there is none, or it can't be read."""
        folder = Path(folder)
        if not (folder / DATABASE).is_file():
            raise KnowledgeBaseError(
                f"there is no knowledge base in {folder}. Build one: python -m ingest FOLDER --kb {folder}"
            )
        base = cls(folder, read_only=not os.access(folder, os.W_OK))
        base._check_schema()
        return base

    @classmethod
    def create(cls, folder: str | Path) -> KnowledgeBase:
        """Open, made first where it is missing."""
        folder = Path(folder)
        if (folder / DATABASE).is_file():
            return cls.open(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KnowledgeBaseError(f"the folder {folder} can't be made: {error}") from error
        if not os.access(folder, os.W_OK):
            raise KnowledgeBaseError(f"the folder {folder} can't be written to.")
        base = cls(folder, read_only=False)
        # Made under another name and renamed, so that a crash leaves no half-made database.
        with base.writing():
            if not (folder / DATABASE).is_file():
                fresh = folder / f"{DATABASE}.new"
                for leftover in folder.glob(f"{DATABASE}.new*"):
                    leftover.unlink()
                connection = sqlite3.connect(fresh)
                connection.executescript(_SCHEMA + _CHANGE_LOG)
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)",
                    [("schema", SCHEMA_VERSION), ("generation", "0")],
                )
                connection.commit()
                connection.close()
                fresh.rename(folder / DATABASE)
        base._check_schema()
        return base

    def _check_schema(self) -> None:
        try:
            version = self.meta("schema")
        except sqlite3.DatabaseError as error:
            raise database_error(error, self.folder) or _damaged(error, self.folder) from error
        if version != SCHEMA_VERSION:
            raise KnowledgeBaseError(
                f"the knowledge base in {self.folder} has format {version}, this program reads format "
                f"{SCHEMA_VERSION}. Delete the folder and run: python -m ingest FOLDER --kb {self.folder}"
            )

    @property
    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            file = (self.folder / DATABASE).resolve()
            if self.read_only:
                # Without write access no -shm file can be made; `immutable` does without one, and
                # is right as long as nobody else writes, which a write-ahead log would show.
                wal = file.with_name(file.name + "-wal")
                options = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
                connection = sqlite3.connect(f"{file.as_uri()}?{options}", uri=True, timeout=30)
            else:
                connection = sqlite3.connect(file, timeout=30)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA foreign_keys = ON")
            connection.isolation_level = None  # transactions are opened by hand
            connection.execute("PRAGMA cache_size = -65536")
            self._local.connection = connection
        return connection

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def release(self) -> None:
        """Give back what this thread holds; others go on."""
        self.close()

    # transactions

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one writer. Raises KnowledgeBaseError naming the process that is it already."""
        if self.read_only:
            raise KnowledgeBaseError(f"the knowledge base in {self.folder} can't be written to.")
        owner = self.folder / "writer.pid"
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            pid = owner.read_text() if owner.is_file() else "unknown"
            raise KnowledgeBaseError(
                f"another process (pid {pid}) is writing to the knowledge base in {self.folder}. "
                "Wait until it has finished, then run this again."
            ) from error
        try:
            owner.write_text(str(os.getpid()))
            self._bring_up_to_date()
            yield
        finally:
            owner.unlink(missing_ok=True)
            self._lock.release()

    def _bring_up_to_date(self) -> None:
        """Give a base of an earlier version what it lacks. Where that is the change log, its FAISS file is
        then made anew."""
        if not (self.folder / DATABASE).is_file():
            return
        if not self._has_change_log():
            self._connection.executescript(f"BEGIN IMMEDIATE; {_CHANGE_LOG} COMMIT;")
        if not self._has_dates():
            self._connection.execute(_ADD_DATES)

    def _has_dates(self) -> bool:
        query = "SELECT 1 FROM pragma_table_info('files') WHERE name = 'modified'"
        return self._connection.execute(query).fetchone() is not None

    def _has_change_log(self) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE name = 'chunk_embedded_again'"
        return self._connection.execute(query).fetchone() is not None

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """One consistent state of the base, whatever is written meanwhile. Nests."""
        connection = self._connection
        if connection.in_transaction:
            yield connection
            return
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.execute("ROLLBACK")

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        if not self._lock.is_locked:
            raise KnowledgeBaseError("the knowledge base is changed only inside `with kb.writing():`.")
        connection = self._connection
        if getattr(self._local, "is_changing", False):
            yield connection  # a part of a larger change
            return
        connection.execute("BEGIN IMMEDIATE")
        self._local.is_changing = True
        try:
            yield connection
            connection.execute(
                "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'"
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            self._local.is_changing = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make all changes inside one transaction: for many small files half the work of one each."""
        with self._change():
            yield

    # what is in it

    def meta(self, key: str) -> str | None:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    @property
    def generation(self) -> int:
        return int(self.meta("generation") or 0)

    def set_meta(self, key: str, value: str) -> None:
        """Keep a value of one's own with the base."""
        with self._change() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def files(self) -> dict[str, FileRecord]:
        """Every file that was ingested or failed, by path, in path order."""
        rows = self._connection.execute("SELECT * FROM files ORDER BY path")
        return {row[0]: _file_record(row) for row in rows}

    def matching(self, where: Filter) -> tuple[str, ...]:
        """The paths of the files that `where` chooses; empty where it chooses none."""
        with self.snapshot():
            return self._choose(where).paths

    def _choose(self, where: Filter) -> _Chosen:
        """Call inside `snapshot`."""

        def choose() -> _Chosen:
            paths = where.choose(self.files())
            query = "SELECT id FROM chunks WHERE path IN (SELECT value FROM json_each(?)) ORDER BY id"
            found = self._connection.execute(query, (json.dumps(paths),)).fetchall()
            return _Chosen(tuple(paths), np.array(found, dtype=np.int64).reshape(-1))

        return self._chosen.get(self.generation, where, choose)

    def count_chunks(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def document(self, path: str) -> Document:
        """The stored text of a file with its pages and headings."""
        row = self._connection.execute("SELECT * FROM documents WHERE path = ?", (path,)).fetchone()
        if row is None:
            raise KnowledgeBaseError(f"{path} is not in the knowledge base in {self.folder}.")
        return Document(
            path=row[0], text=row[1], media_type=row[2], title=row[3],
            pages=tuple(Page(*page) for page in json.loads(row[4])),
            headings=tuple(Heading(*heading) for heading in json.loads(row[5])),
            warnings=tuple(json.loads(row[6])),
        )

    def page_at(self, path: str, offset: int) -> int | None:
        """The 1-based page of a character of a file; None where the file has no pages."""
        row = self._connection.execute("SELECT pages FROM documents WHERE path = ?", (path,)).fetchone()
        if row is None:
            return None  # removed since it was retrieved
        pages = tuple(Page(*page) for page in json.loads(row[0]))
        return Document(path=path, text="", media_type="", pages=pages).page_at(offset)

    def chunks_of(self, path: str) -> list[Chunk]:
        """The chunks of one file, in reading order."""
        rows = self._connection.execute(
            f"SELECT {_CHUNK_COLUMNS} FROM chunks WHERE path = ? ORDER BY start_char, id", (path,)
        )
        return [_chunk(row) for row in rows]

    def chunks_with_vectors(self, path: str) -> list[tuple[Chunk, Vectors]]:
        """The chunks of one file in reading order, each with its float32 (dim,)."""
        found = self._connection.execute(
            f"SELECT {_CHUNK_COLUMNS}, vector FROM chunks WHERE path = ? ORDER BY start_char, id", (path,)
        ).fetchall()
        vectors = self._unpack([row[9] for row in found])
        return [(_chunk(row), vector) for row, vector in zip(found, vectors, strict=True)]

    def own_meta(self) -> dict[str, str]:
        """What `set_meta` has kept, without what the base itself keeps of its state and embedder."""
        rows = self._connection.execute("SELECT key, value FROM meta ORDER BY key")
        return {key: value for key, value in rows if key not in _KEPT_BY_ITSELF}

    def stored_chunks(self, rows: Sequence[int]) -> dict[int, StoredChunk]:
        """Chunks by row number, with their terms. Rows that are gone are left out."""
        query = (
            f"SELECT {_CHUNK_COLUMNS}, terms.place, terms.body FROM chunks "
            "JOIN terms ON terms.rowid = chunks.id WHERE chunks.id IN ({})"
        )
        return {
            row[0]: StoredChunk(row[0], _chunk(row), tuple(row[9].split(" ")) if row[9] else (),
                                tuple(row[10].split(" ")) if row[10] else ())
            for row in self._select_rows(query, rows)
        }

    def vectors_of(self, rows: Sequence[int]) -> dict[int, Vectors]:
        """float32 (dim,) by row number. Rows that are gone are left out."""
        found = list(self._select_rows("SELECT id, vector FROM chunks WHERE id IN ({})", rows))
        vectors = self._unpack([row[1] for row in found])
        return {row[0]: vector for row, vector in zip(found, vectors, strict=True)}

    def _select_rows(self, query: str, rows: Sequence[int]) -> Iterator[Any]:
        """The query for rows by number, as many statements as it takes."""
        for begin in range(0, len(rows), _AT_ONCE):
            some = list(rows[begin : begin + _AT_ONCE])
            yield from self._connection.execute(query.format(",".join("?" * len(some))), some)

    def _unpack(self, packed: Sequence[bytes]) -> Vectors:
        """float32 (n, dim) of stored vectors."""
        flat = np.frombuffer(b"".join(packed), dtype=np.float16)
        return flat.reshape(len(packed), self.dim).astype(np.float32)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return int(self.meta("dim") or 1)

    # the embedder it belongs to

    @property
    def embedder_name(self) -> str | None:
        return self.meta("embedder")

    def bind_embedder(self, embedder: Embedder) -> None:
        """Record the embedder at first use. Raises KnowledgeBaseError where it is another one."""
        if self.meta("embedder") is None or (
            self.count_chunks() == 0 and self.meta("embedder_fingerprint") != embedder.fingerprint
        ):
            self._record_embedder(embedder)
        else:
            self.check_embedder(embedder)

    def check_embedder(self, embedder: Embedder) -> None:
        """Raise KnowledgeBaseError where the vectors stored were made by another embedder."""
        refuse_other_embedder(self.meta, embedder, advice=f"python -m ingest --reembed --kb {self.folder}")

    def _record_embedder(self, embedder: Embedder) -> None:
        with self._change() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", _embedder_meta(embedder)
            )
            connection.execute("DELETE FROM meta WHERE key = ?", (_FACTS,))  # of other dimensions

    # changing it

    def put_file(
        self, record: FileRecord, document: Document, chunks: Sequence[Chunk], vectors: Vectors
    ) -> None:
        """Store a file in one transaction, in place of what was there under its path.

        vectors: float32 (len(chunks), dim).
        """
        if len(chunks) != len(vectors):
            raise ValueError(f"{len(chunks)} chunks, {len(vectors)} vectors")
        record = replace(record, chunks=len(chunks), characters=len(document.text))
        packed = np.ascontiguousarray(vectors, dtype=np.float16)
        with self._change() as connection:
            _delete_file(connection, record.path)
            _insert_record(connection, record)
            _insert_document(connection, document)
            self._insert_chunks(connection, chunks, packed)

    def _insert_chunks(
        self, connection: sqlite3.Connection, chunks: Sequence[Chunk],
        vectors: npt.NDArray[np.float16],
    ) -> None:
        for chunk, vector in zip(chunks, vectors, strict=True):
            row = connection.execute(
                "INSERT INTO chunks (path, text, start_char, end_char, page, last_page, headings, "
                "title, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    chunk.path, _storable(chunk.text), chunk.start, chunk.end, chunk.page,
                    chunk.last_page, _dump(chunk.headings), _storable(chunk.title),
                    vector.tobytes(),
                ),
            ).lastrowid
            place = f"{chunk.place} {path_words(chunk.path)}"
            connection.execute(
                "INSERT INTO terms (rowid, place, body) VALUES (?, ?, ?)",
                (row, " ".join(passage_terms(place)), " ".join(passage_terms(chunk.text))),
            )

    def set_modified(self, dates: Mapping[str, float]) -> None:
        """Keep when each of these files was last modified, in seconds since 1970."""
        with self._change() as connection:
            connection.executemany(
                "UPDATE files SET modified = ? WHERE path = ?", [(when, path) for path, when in dates.items()]
            )

    def put_failure(self, record: FileRecord) -> None:
        """Record that a file could not be read; what it had before is removed."""
        with self._change() as connection:
            _delete_file(connection, record.path)
            _insert_record(connection, record)

    def move_file(self, old_path: str, new_path: str, record: FileRecord) -> None:
        """Give a file's stored text and vectors a new path. Nothing is embedded."""
        document = replace(self.document(old_path), path=new_path)
        rows = self._connection.execute(
            f"SELECT {_CHUNK_COLUMNS}, vector FROM chunks WHERE path = ? ORDER BY id", (old_path,)
        ).fetchall()
        chunks = [replace(_chunk(row), path=new_path) for row in rows]
        vectors = np.frombuffer(b"".join(row[9] for row in rows), dtype=np.float16)
        vectors = vectors.reshape(len(rows), -1 if rows else 0).astype(np.float32)
        with self._change() as connection:
            _delete_file(connection, old_path)
            _delete_file(connection, new_path)
            _insert_record(
                connection,
                replace(record, path=new_path, chunks=len(chunks), characters=len(document.text)),
            )
            _insert_document(connection, document)
            self._insert_chunks(connection, chunks, vectors.astype(np.float16))

    def remove_file(self, path: str) -> None:
        with self._change() as connection:
            _delete_file(connection, path)

    def reembed(
        self, embedder: Embedder, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Embed every stored chunk again, in one transaction. Returns how many there were.

        `progress` gets chunks done and chunks in all.
        """
        total = self.count_chunks()
        done = 0
        with self._change() as connection:
            last = 0
            while True:
                rows = connection.execute(
                    f"SELECT {_CHUNK_COLUMNS} FROM chunks WHERE id > ? ORDER BY id LIMIT 512", (last,)
                ).fetchall()
                if not rows:
                    break
                vectors = embedder.embed_passages([_chunk(row).indexed_text for row in rows])
                connection.executemany(
                    "UPDATE chunks SET vector = ? WHERE id = ?",
                    [
                        (vector.astype(np.float16).tobytes(), row[0])
                        for vector, row in zip(vectors, rows, strict=True)
                    ],
                )
                last = rows[-1][0]
                done += len(rows)
                progress(done, total)
            connection.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", _embedder_meta(embedder)
            )
            connection.execute("DELETE FROM meta WHERE key = ?", (_FACTS,))  # of other vectors
        return done

    # the FAISS file

    def publish(self) -> None:
        """Bring the FAISS file in step with SQLite, and put it in place in one rename."""
        facts = self.index_facts()
        with self.snapshot():
            changed = self._changed_rows(0)
            if facts is not None and self.index_state() == "current":
                return
            built = None
            if facts is not None and can_be_updated(facts, len(changed), self.count_chunks()):
                built = self._updated(facts, changed)
            if built is None:
                built = build_index(self)
        try:
            facts = write_index(built, self.folder / INDEX)
        except OSError as error:
            raise KnowledgeBaseError(
                f"the index file {self.folder / INDEX} can't be written: {error}"
            ) from error
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_FACTS, facts.dump()))
        connection.execute("DELETE FROM vector_changes")
        connection.execute("COMMIT")

    def _updated(self, facts: IndexFacts, changed: Sequence[int]) -> DenseIndex | None:
        """The index in the file with the changes in it; None where the file isn't whole."""
        target = self.folder / INDEX
        if not target.is_file() or not is_whole(target, facts):
            return None
        old = read_index(target, facts, copy=True)
        overlay = Overlay.empty(self.dim).with_changes(changed, self.vectors_of(changed))
        return None if old is None else updated_index(old, overlay)

    def check(self) -> list[str]:
        """What is inconsistent in SQLite itself; an empty list where nothing is.

        Raises KnowledgeBaseError where it is too damaged to be looked through.
        """
        try:
            return self._inconsistencies()
        except sqlite3.DatabaseError as error:
            raise database_error(error, self.folder) or _damaged(error, self.folder) from error

    def _inconsistencies(self) -> list[str]:
        problems: list[str] = []
        connection = self._connection
        for (line,) in connection.execute("PRAGMA integrity_check"):
            if line != "ok":
                problems.append(f"SQLite: {line}")
        queries = {
            "chunks without their file": "SELECT count(*) FROM chunks WHERE path NOT IN (SELECT path FROM files)",
            "chunks without search terms": "SELECT count(*) FROM chunks WHERE id NOT IN (SELECT rowid FROM terms)",
            "search terms without their chunk": "SELECT count(*) FROM terms WHERE rowid NOT IN "
            "(SELECT id FROM chunks)",
            "files whose number of chunks is wrong": "SELECT count(*) FROM files WHERE chunks != "
            "(SELECT count(*) FROM chunks WHERE chunks.path = files.path)",
        }
        for what, query in queries.items():
            count = connection.execute(query).fetchone()[0]
            if count:
                problems.append(f"{count} {what}")
        return problems

    def index_facts(self) -> IndexFacts | None:
        """What was recorded of the FAISS file; None where none was written."""
        return IndexFacts.parse(self.meta(_FACTS))

    def index_state(self) -> str:
        """"current", or what is wrong with the FAISS file: "missing", "outdated", "damaged".

        A large file is current while few vectors have changed since, which are searched beside it.
        """
        target = self.folder / INDEX
        facts = self.index_facts()
        if not target.is_file():
            return "missing"
        if facts is None:
            return "outdated"
        pending = self._connection.execute("SELECT count(*) FROM vector_changes").fetchone()[0]
        if pending > (0 if facts.kind == "flat" else _PENDING_SHARE * facts.vectors):
            return "outdated"
        return "current" if is_whole(target, facts) else "damaged"

    def _current_view(self) -> DenseView:
        """The vectors of the snapshot's generation. Call inside `snapshot`."""
        generation = self.generation
        view = self._view
        if view is not None and view.generation == generation:
            return view
        with self._index_lock:
            view = self._view
            if view is None or view.generation != generation:
                self._view = view = self._renewed(view, generation)
            return view

    def _renewed(self, view: DenseView | None, generation: int) -> DenseView:
        """The view of this generation, from an earlier one where the file is still the same."""
        facts = self.index_facts()
        is_older = view is not None and view.generation < generation
        if view is None or not is_older or view.recorded != facts or view.overlay.dim != self.dim:
            file = None if facts is None else read_index(self.folder / INDEX, facts)
            changed = self.rows().tolist() if file is None else self._changed_rows(0)
            overlay = Overlay.empty(self.dim)
            view = DenseView(generation, facts, file, overlay)
        elif not self._has_change_log():
            changed, view = self.rows().tolist(), replace(view, overlay=Overlay.empty(self.dim))
        else:
            changed = self._changed_rows(view.generation)
        overlay = view.overlay.with_changes(changed, self.vectors_of(changed))
        return replace(view, generation=generation, overlay=overlay)

    def _changed_rows(self, generation: int) -> list[int]:
        """Rows that changed after `generation`, as far as the FAISS file doesn't know."""
        query = "SELECT row FROM vector_changes WHERE generation > ?"
        return [row for (row,) in self._connection.execute(query, (generation,))]

    def rows(self) -> Rows:
        """The number of every chunk, ascending."""
        found = self._connection.execute("SELECT id FROM chunks ORDER BY id").fetchall()
        return np.array(found, dtype=np.int64).reshape(-1)

    def batches(self) -> Iterator[tuple[Rows, Vectors]]:
        """All row numbers and vectors, in parts."""
        found = self._connection.execute("SELECT id, vector FROM chunks ORDER BY id")
        while some := found.fetchmany(_READ_AT_ONCE):
            yield np.array([row[0] for row in some], np.int64), self._unpack([row[1] for row in some])

    def all_vectors(self) -> tuple[Rows, Vectors]:
        """Row numbers, ascending, and their vectors, float32 (n, dim)."""
        rows, vectors = [np.zeros(0, np.int64)], [np.zeros((0, self.dim), np.float32)]
        for some_rows, some_vectors in self.batches():
            rows.append(some_rows)
            vectors.append(some_vectors)
        return np.concatenate(rows), np.concatenate(vectors)

    # searching

    def search_dense(self, vectors: Vectors, k: int, *, where: Filter = EVERYTHING) -> Found:
        """For each question vector (n, dim) up to k (row, cosine) of the files in `where`, best first."""
        with self.snapshot():
            among = None if where.is_everything else self._choose(where).rows
            return self._current_view().search(vectors, k, self.vectors_of, among=among)

    def search_terms(
        self, terms: Sequence[str], k: int, *, place_weight: float = 1.0, where: Filter = EVERYTHING
    ) -> list[tuple[int, float]]:
        """Up to k (row, BM25), best first, of chunks of the files in `where` that hold any of the terms.

        How rare a term is counts in the whole base. In a large one the commonest terms are left out,
        as far as it takes to keep this quick.
        """
        if not terms:
            return []
        match = " OR ".join(f'"{term}"' for term in self._selective(terms))
        scope, paths = "", tuple[str, ...]()
        with self.snapshot():
            if not where.is_everything:
                scope = "AND rowid IN (SELECT id FROM chunks WHERE path IN (SELECT value FROM json_each(?)))"
                paths = (json.dumps(self._choose(where).paths),)
            rows = self._connection.execute(
                f"SELECT rowid, bm25(terms, ?, 1.0) AS cost FROM terms WHERE terms MATCH ? {scope} "
                "ORDER BY cost LIMIT ?",
                (place_weight, match, *paths, k),
            ).fetchall()
        return [(row[0], -row[1]) for row in rows]

    def _selective(self, terms: Sequence[str]) -> list[str]:
        """The rarest terms, as many as stand in _MOST_POSTINGS chunks together, at least one."""
        counts = self.term_counts(terms)
        left = _MOST_POSTINGS
        kept: set[str] = set()
        for term in sorted(counts, key=lambda term: counts[term]):
            if kept and counts[term] > left:
                break
            left -= counts[term]
            kept.add(term)
        return [term for term in terms if term in kept]

    def term_counts(self, terms: Sequence[str]) -> dict[str, int]:
        """In how many chunks each term stands."""
        counts: dict[str, int] = {}
        for term in terms:
            row = self._connection.execute(
                "SELECT doc FROM term_counts WHERE term = ?", (term,)
            ).fetchone()
            counts[term] = int(row[0]) if row else 0
        return counts

    def average_terms(self) -> float:
        """Mean number of terms a chunk."""
        # FTS5 keeps the totals itself, in the first record of its own table: the number of rows and of
        # the terms in each column. Adding up the vocabulary takes seconds where there are many chunks.
        (record,) = self._connection.execute("SELECT block FROM terms_data WHERE id = 1").fetchone()
        chunks, *terms = _varints(record) or (0,)
        return sum(terms) / max(1, chunks)


_CHUNK_COLUMNS = (
    "chunks.id, chunks.path, chunks.text, start_char, end_char, page, last_page, headings, title"
)


def _chunk(row: Sequence[Any]) -> Chunk:
    return Chunk(
        path=row[1], text=row[2], start=row[3], end=row[4], page=row[5], last_page=row[6],
        headings=tuple(json.loads(row[7])), title=row[8],
    )


def _file_record(row: Sequence[Any]) -> FileRecord:
    path, sha256, size, status, pages, chunks, characters, seconds, pipeline, warnings, error, *rest = row
    return FileRecord(
        path=path, sha256=sha256, size=size, status=status, pages=pages, chunks=chunks,
        characters=characters, seconds=seconds, pipeline=pipeline,
        warnings=tuple(json.loads(warnings)), error=error,
        modified=rest[0] if rest else None,  # a base that no writer of this version has opened yet
    )


def _insert_record(connection: sqlite3.Connection, record: FileRecord) -> None:
    connection.execute(
        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.path, record.sha256, record.size, record.status, record.pages, record.chunks,
            record.characters, record.seconds, record.pipeline, _dump(record.warnings), record.error,
            record.modified,
        ),
    )


def _insert_document(connection: sqlite3.Connection, document: Document) -> None:
    connection.execute(
        "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            document.path, _storable(document.text), document.media_type, _storable(document.title),
            json.dumps([(page.number, page.start, page.end) for page in document.pages]),
            _dump([(head.level, head.title, head.start) for head in document.headings]),
            _dump(document.warnings),
        ),
    )


def _delete_file(connection: sqlite3.Connection, path: str) -> None:
    connection.execute(
        "DELETE FROM terms WHERE rowid IN (SELECT id FROM chunks WHERE path = ?)", (path,)
    )
    connection.execute("DELETE FROM chunks WHERE path = ?", (path,))
    connection.execute("DELETE FROM documents WHERE path = ?", (path,))
    connection.execute("DELETE FROM files WHERE path = ?", (path,))


def _embedder_meta(embedder: Embedder) -> list[tuple[str, str]]:
    return [
        ("embedder", embedder.name),
        ("embedder_fingerprint", embedder.fingerprint),
        ("dim", str(embedder.dim)),
    ]


def _varints(data: bytes) -> list[int]:
    """SQLite's numbers of variable length: seven bits a byte, the highest bit says that more follow."""
    numbers, number = [], 0
    for byte in data:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    return numbers


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)


def _storable(text: str) -> str:
    """SQLite takes no lone surrogates; loaders must not produce them."""
    text.encode("utf-8")
    return text


def path_words(path: str) -> str:
    """A file's own name as words: `zh/02-词嵌入.md` -> `02 词嵌入`."""
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0].replace("-", " ").replace("_", " ")
