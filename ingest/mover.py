"""Moves a knowledge base from its folder into Milvus: texts, vectors and records as they are.

Nothing is parsed, split or embedded again. It can be stopped and run again, and goes on; run after
the base has changed, it carries the changes over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rag.document import Chunk, Document
from rag.embedder import Vectors
from rag.errors import KnowledgeBaseError
from rag.knowledge import FileRecord, KnowledgeBase
from rag.milvus_store import MilvusStore

_BATCH_CHUNKS = 4_000  # written together, of as many files as it takes
_BATCH_CHARACTERS = 8_000_000


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What was moved. `files` and `chunks` are those written now, `unchanged` files were there."""

    files: int
    chunks: int
    unchanged: int
    removed: int
    seconds: float

    def describe(self) -> str:
        return (
            f"{self.files:,} files with {self.chunks:,} chunks moved, {self.unchanged:,} files were there "
            f"already, {self.removed:,} removed, nothing embedded; {self.seconds:.1f} s"
        )


def move_to_milvus(
    source: KnowledgeBase, uri: str, *,
    progress: Callable[[int, int, str], None] = lambda done, total, path: None,
) -> MoveReport:
    """Make the base in Milvus hold what `source` holds. `progress` gets files done, in all, and a path.

    Raises KnowledgeBaseError where the base there belongs to another embedder.
    """
    began = time.perf_counter()
    target = MilvusStore.create(uri, folder=source.folder)
    with source.snapshot(), target.writing():
        _bind(source, target)
        files, there = source.files(), target.files()
        gone = [path for path in there if path not in files]
        for path in gone:
            target.remove_file(path)
        held = {path: replace(record, modified=files[path].modified) for path, record in there.items() if path in files}
        dates = {
            path: when for path, record in files.items()
            if held.get(path) == record != there[path] and (when := record.modified) is not None
        }
        if dates:
            target.set_modified(dates)
        fresh = [record for path, record in files.items() if held.get(path) != record]
        chunks = 0
        for batch in _batches(source, fresh):
            target.put_files(batch)
            chunks += sum(len(some) for _, _, some, _ in batch)
            progress(fresh.index(batch[-1][0]) + 1, len(fresh), batch[-1][0].path)
        for record in fresh:
            if record.status != "ok":
                target.put_failure(record)
        # Last, because a base whose folders are known is taken for a whole one.
        for key, value in source.own_meta().items():
            if target.meta(key) != value:
                target.set_meta(key, value)
        target.publish()
    counted, expected = target.count_chunks(), source.count_chunks()
    if counted != expected:
        raise KnowledgeBaseError(
            f"{uri} holds {counted:,} chunks after the move, the base in {source.folder} {expected:,}. "
            "Was it changed meanwhile? Run this again."
        )
    seconds = time.perf_counter() - began
    return MoveReport(len(fresh), chunks, len(files) - len(fresh), len(gone), seconds)


def _bind(source: KnowledgeBase, target: MilvusStore) -> None:
    name, fingerprint = source.embedder_name, source.meta("embedder_fingerprint")
    if name is None or fingerprint is None:
        return  # nothing has been embedded yet
    held = target.meta("embedder_fingerprint")
    if held is None or (held != fingerprint and not target.count_chunks()):
        target.bind_vectors(name, fingerprint, source.dim)
    elif held != fingerprint:
        raise KnowledgeBaseError(
            f"the knowledge base in {target.uri} was built with {target.embedder_name!r} (fingerprint "
            f"{held}), the one in {source.folder} with {name!r} ({fingerprint}). Move it to another name: "
            f"{target.uri}#NAME"
        )


_File = tuple[FileRecord, Document, Sequence[Chunk], Vectors]


def _batches(source: KnowledgeBase, records: Sequence[FileRecord]) -> Iterator[list[_File]]:
    batch: list[_File] = []
    for record in records:
        if record.status != "ok":
            continue
        stored = source.chunks_with_vectors(record.path)
        vectors = np.array([vector for _, vector in stored], np.float32).reshape(len(stored), source.dim)
        batch.append((record, source.document(record.path), [chunk for chunk, _ in stored], vectors))
        if (
            sum(len(chunks) for _, _, chunks, _ in batch) >= _BATCH_CHUNKS
            or sum(len(document.text) for _, document, _, _ in batch) >= _BATCH_CHARACTERS
        ):
            yield batch
            batch = []
    if batch:
        yield batch
