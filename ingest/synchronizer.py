"""Brings a knowledge base in step with folders and files: load -> split -> embed -> store.

A file is known by its path in the base and its content's hash. New and changed files are parsed,
moved ones keep their vectors, deleted ones leave the base, unchanged ones cost a hash. Each file is
stored whole; whatever stops a run, the base holds some files of the old state and some of the
new one, each of them whole, and the next run goes on from there.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ingest.loaders import find_loader
from ingest.ocr import can_be_read_now
from ingest.parsers import Limits, ParsedFile, ParserPool, Splitting, Workers
from ingest.report import FileResult, Status, SyncReport, find_twins
from ingest.roots import META_KEY, Root, RootTable, Scope
from ingest.scan import IGNORE_FILE, ScanResult, SourceFile, hash_files, scan
from ingest.splitter import VERSION as SPLITTER_VERSION
from ingest.splitter import split_document
from rag.document import Chunk, Document
from rag.embedder import Embedder, StaticEmbedder, Vectors, load_embedder
from rag.errors import EmbedderError, InputError, KnowledgeBaseError
from rag.knowledge import FileRecord, explained_database_errors
from rag.settings import Settings
from rag.store import Store, create_store, find_store

if TYPE_CHECKING:
    from ingest.cluster import Cluster

_BATCH_CHUNKS = 512  # embedded together, of as many files as it takes
_BATCH_CHARACTERS = 4_000_000  # held in memory before they are stored
_SPECIAL_TOKENS = 4  # a model adds some to every text, within its own maximum
_BUDGET_KEY = "chunk_budget"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `done` of `total` files (or chunks, when embedding again)."""

    done: int
    total: int
    path: str


ProgressCallback = Callable[[Progress], None]


def _ignore(progress: Progress) -> None:
    return None


def sync(
    paths: Sequence[str | Path] = ("knowledge",), *, kb: str | Path | None = None,
    settings: Settings | None = None, embedder: Embedder | None = None,
    progress: ProgressCallback = _ignore, limits: Limits | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
    reembed: bool = False, prune: bool = False, dry_run: bool = False,
    scheduler: str | None = None,
) -> SyncReport:
    """Make the base in folder `kb` hold what `paths` hold now, and say what was done.

    Only what lies in `paths` can be deleted from the base, and with `prune` what came from folders
    that are gone. `embedder` is used instead of the one that the settings name. With `scheduler`, the
    address of a Dask scheduler, files are parsed, split and embedded by its workers. Raises InputError
    for a path that doesn't exist, KnowledgeBaseError where another process writes or the base belongs
    to another embedder, ClusterError where the workers are not there or run another program.
    """
    if settings is None:
        settings = Settings.load(kb=None if kb is None else str(kb))
    elif kb is not None:
        settings = replace(settings, kb=str(kb))
    run = _Run(
        settings, [Path(path) for path in paths], embedder=embedder, progress=progress,
        limits=limits or Limits(), include=tuple(include), exclude=tuple(exclude), prune=prune,
        scheduler=scheduler,
    )
    return run.preview() if dry_run else run.apply(reembed=reembed)


@dataclass(frozen=True, slots=True)
class _Task:
    """A file to be stored anew. `is_text_known`: its text is in the base, only splitting changed."""

    source: SourceFile
    sha256: str
    status: Status
    pipeline: str
    is_text_known: bool = False


@dataclass(frozen=True, slots=True)
class _Plan:
    """What has to be done."""

    roots: RootTable
    tasks: tuple[_Task, ...]
    moves: tuple[tuple[str, _Task], ...]  # (path before, task)
    deleted: tuple[str, ...]
    unchanged: tuple[str, ...]
    scan: ScanResult
    vanished: dict[Root, int]  # folders that are gone, and how many files the base has of them


class _Run:
    """One run of `sync`."""

    def __init__(
        self, settings: Settings, paths: list[Path], *, embedder: Embedder | None,
        progress: ProgressCallback, limits: Limits, include: tuple[str, ...],
        exclude: tuple[str, ...], prune: bool, scheduler: str | None,
    ) -> None:
        self._settings = settings
        self._paths = paths
        self._given_embedder = embedder
        self._is_named = embedder is None  # in the settings, so that a worker finds it too
        self._progress = progress
        self._limits = limits
        self._include = include
        self._exclude = exclude
        self._prune = prune
        self._scheduler = scheduler
        self._cluster: Cluster | None = None
        self._began = time.perf_counter()
        self._results: dict[str, FileResult] = {}
        self._notes: list[str] = []
        self._embedded = 0
        for path in paths:
            if not path.exists():
                raise InputError(f"{path} does not exist. Give a file or a folder to ingest.")

    # entry points

    def preview(self) -> SyncReport:
        """What `apply` would do, by hashes alone."""
        base = find_store(self._settings)
        known = base.files() if base else {}
        plan = self._make_plan(known, base.meta(META_KEY) if base else None)
        for task in plan.tasks:
            self._note(FileResult(task.source.path, task.status))
        for old, task in plan.moves:
            self._note(FileResult(task.source.path, "moved", moved_from=old))
        self._note_rest(plan, known)
        return self._report(sum(record.chunks for record in known.values()), is_dry_run=True)

    def apply(self, *, reembed: bool) -> SyncReport:
        if self._scheduler is None:
            return self._apply_to_base(reembed=reembed)
        if reembed:
            raise InputError("--reembed reads no files and works in this process only. Leave --scheduler out.")
        if not self._is_named:
            raise InputError("a scheduler's workers find the embedder by its name; give it in the settings.")
        from ingest.cluster import Cluster

        # First of all, so that nothing is written where the workers are not as they should be.
        with Cluster(self._scheduler, self._settings) as self._cluster:
            return self._apply_to_base(reembed=False)

    def _apply_to_base(self, *, reembed: bool) -> SyncReport:
        base = create_store(self._settings)
        with explained_database_errors(base.folder):
            try:
                return self._apply(base, reembed=reembed)
            except sqlite3.OperationalError as error:  # the disk is full, a quota, a file is locked
                raise KnowledgeBaseError(
                    f"the knowledge base in {base.folder} can't be written: {error}. What was stored "
                    "before is whole; make room or check the folder's rights, and run this again."
                ) from error

    def _apply(self, base: Store, *, reembed: bool) -> SyncReport:
        with base.writing():
            if reembed:
                self._reembed(base)
            elif base.embedder_name not in (None, self._embedder_name):
                base.check_embedder(self._embedder)
            known = base.files()
            plan = self._make_plan(known, base.meta(META_KEY))
            generation = base.generation
            try:
                self._carry_out(plan, base, known)
            finally:
                # Also when stopped half-way: what was stored can be searched.
                if base.generation != generation or base.index_state() != "current":
                    base.publish()
            self._note_rest(plan, known if base.generation == generation else base.files())
            return self._report(base.count_chunks())

    # planning

    def _make_plan(self, known: dict[str, FileRecord], roots_text: str | None) -> _Plan:
        kb = Path(self._settings.kb)
        before = RootTable.from_json(roots_text, kb).follow_renamed(self._paths, list(known))
        roots, scopes = before.add(self._paths, known, kb=kb)
        found = scan(scopes, roots, kb=kb, include=self._include, exclude=self._exclude)
        max_bytes = self._limits.file_mb << 20
        hashes = hash_files(list(found.sources.values()), max_bytes=max_bytes)
        gone = _find_gone(known, found, before, roots, scopes)
        self._note_unwanted(known, found)
        vanished = roots.vanished(known)
        if self._prune:
            gone.update(path for paths in vanished.values() for path in paths)
            roots, vanished = roots.without(vanished), {}
        movable = {
            (known[path].sha256, known[path].pipeline): path
            for path in sorted(gone, reverse=True)
            if known[path].status == "ok"
        }
        tasks: list[_Task] = []
        moves: list[tuple[str, _Task]] = []
        unchanged: list[str] = []
        for path, source in found.sources.items():
            pipeline = self._pipeline(source)
            record = known.get(path)
            task = _Task(source, hashes[path], "added" if record is None else "changed", pipeline)
            is_same = record is not None and record.sha256 == task.sha256 != ""
            if record is not None and is_same and record.status == "ok":
                is_unread = can_be_read_now(record.warnings, self._limits.seconds)
                if record.pipeline == pipeline and not is_unread:
                    unchanged.append(path)
                else:
                    is_known = _loader_part(record.pipeline) == _loader_part(pipeline)
                    tasks.append(replace(task, is_text_known=is_known and not is_unread))
            elif record is None and (old := movable.pop((task.sha256, pipeline), None)):
                moves.append((old, replace(task, status="moved")))
                gone.discard(old)
            else:
                if record is not None and record.status == "failed":
                    task = replace(task, status="added")
                tasks.append(task)
        return _Plan(
            roots, tuple(tasks), tuple(moves), tuple(sorted(gone)), tuple(unchanged), found,
            {root: len(paths) for root, paths in vanished.items()},
        )

    def _pipeline(self, source: SourceFile) -> str:
        """What a stored file was made with; where it differs, the file is made again."""
        loader = find_loader(source.file.name)
        assert loader is not None, "scan() returns only files with a loader"
        return (
            f"{loader.media_type}/{loader.version} "
            f"splitter/{SPLITTER_VERSION} tokens/{self._settings.chunk_tokens}"
        )

    # doing

    def _carry_out(self, plan: _Plan, base: Store, known: dict[str, FileRecord]) -> None:
        roots_text = plan.roots.to_json(Path(self._settings.kb))
        if base.meta(META_KEY) != roots_text:
            base.set_meta(META_KEY, roots_text)
        for old, task in plan.moves:
            record = replace(known[old], path=task.source.path, modified=task.source.modified)
            base.move_file(old, task.source.path, record)
            self._note(
                FileResult(
                    task.source.path, "moved", record.pages, record.chunks, record.warnings,
                    moved_from=old,
                )
            )
        for path in plan.deleted:
            base.remove_file(path)
        # Of files whose content is the same: touched since, or from before dates were kept.
        dates = {path: plan.scan.sources[path].modified for path in plan.unchanged}
        dates = {path: when for path, when in dates.items() if known[path].modified != when}
        if dates:
            base.set_modified(dates)
        if not plan.tasks:
            return
        base.bind_embedder(self._embedder)
        self._keep_budget(base)
        total = len(plan.tasks)
        batch: list[_Prepared] = []
        self._progress(Progress(0, total, ""))
        for done, (task, parsed) in enumerate(self._load(plan.tasks, base), 1):
            prepared = self._prepare(task, parsed, base)
            if prepared is not None:
                batch.append(prepared)
            if (
                sum(len(item.chunks) for item in batch) >= _BATCH_CHUNKS
                or sum(len(item.document.text) for item in batch) >= _BATCH_CHARACTERS
            ):
                self._store(batch, base)
                batch = []
            self._progress(Progress(done, total, task.source.path))
        self._store(batch, base)

    def _load(
        self, tasks: Sequence[_Task], base: Store
    ) -> Iterator[tuple[_Task, ParsedFile]]:
        """Documents from the base where only the splitting changed, else from the files."""
        by_path = {task.source.path: task for task in tasks if not task.is_text_known}
        for task in tasks:
            if task.is_text_known:
                document = base.document(task.source.path)
                yield task, ParsedFile(task.source, document, None, 0.0)
        workers: Workers | None = None
        if self._cluster is not None:
            workers = self._cluster.workers(
                self._limits, chunk_tokens=self._chunk_budget, is_static=isinstance(self._embedder, StaticEmbedder)
            )
        with ParserPool(self._limits, splitting=self._splitting, workers=workers) as pool:
            for parsed in pool.parse([task.source for task in by_path.values()]):
                yield by_path[parsed.source.path], parsed

    def _prepare(self, task: _Task, parsed: ParsedFile, base: Store) -> _Prepared | None:
        """Split a document; a file without one is recorded as failed."""
        record = FileRecord(
            path=task.source.path, sha256=task.sha256, size=task.source.size, status="ok",
            seconds=round(parsed.seconds, 4), pipeline=task.pipeline, modified=task.source.modified,
        )
        document, error = parsed.document, parsed.error
        chunks: list[Chunk] = parsed.chunks or []
        began = time.perf_counter()
        if document is not None and parsed.chunks is None:
            try:
                chunks = split_document(
                    document, self._embedder.count_tokens, chunk_tokens=self._chunk_budget
                )
            except Exception as bug:  # must not stop the files behind this one
                error = f"splitting it failed ({type(bug).__name__}: {bug}); please report this"
        if document is None or error is not None:
            base.put_failure(replace(record, status="failed", error=error))
            self._note(FileResult(task.source.path, "failed", error=error))
            return None
        warnings = (*document.warnings, *self._check_lengths(chunks))
        record = replace(
            record, pages=len(document.pages), warnings=warnings,
            seconds=round(record.seconds + time.perf_counter() - began, 4),
        )
        return _Prepared(task, record, document, chunks, parsed.vectors)

    def _check_lengths(self, chunks: Sequence[Chunk]) -> Iterator[str]:
        limit = self._embedder.max_tokens
        if limit is None or not chunks:
            return
        counts = self._embedder.count_tokens([chunk.indexed_text for chunk in chunks])
        longer = sum(count > limit for count in counts)
        if longer:
            yield (
                f"{longer} of {len(chunks)} chunks are longer than the {limit} tokens the embedder "
                "reads; their ends are found by words only"
            )

    def _store(self, batch: Sequence[_Prepared], base: Store) -> None:
        if not batch:
            return
        rest = [item for item in batch if item.vectors is None]
        texts = [chunk.indexed_text for item in rest for chunk in item.chunks]
        if texts:
            vectors = self._embedder.embed_passages(texts)
        else:
            vectors = np.zeros((0, self._embedder.dim), dtype=np.float32)
        start = 0
        with base.together():
            for item in batch:
                if item.vectors is None:
                    end = start + len(item.chunks)
                    own, start = vectors[start:end], end
                else:
                    own = item.vectors
                base.put_file(item.record, item.document, item.chunks, own)
        for item in batch:
            self._embedded += len(item.chunks)
            self._note(
                FileResult(
                    item.record.path, item.task.status, item.record.pages, len(item.chunks),
                    item.record.warnings, seconds=item.record.seconds,
                )
            )

    # the embedder

    @property
    def _embedder_name(self) -> str:
        given = self._given_embedder
        return given.name if given is not None else self._settings.embedder

    @property
    def _embedder(self) -> Embedder:
        """Loaded at first need: a run without changes needs none."""
        if self._given_embedder is None:
            self._given_embedder = load_embedder(
                self._settings.embedder, device=self._settings.device
            )
        return self._given_embedder

    @property
    def _splitting(self) -> Splitting | None:
        """What the workers need to split and embed; None where that takes more than a table."""
        if not self._is_named or not isinstance(self._embedder, StaticEmbedder):
            return None
        return Splitting(self._settings.embedder, self._chunk_budget)

    @property
    def _chunk_budget(self) -> int:
        """Tokens a chunk: the setting's, or less where the embedder reads less."""
        limit = self._embedder.max_tokens
        if limit is None:
            return self._settings.chunk_tokens
        if limit - _SPECIAL_TOKENS < 16:
            raise EmbedderError(
                f"the embedder {self._embedder.name!r} reads only {limit} tokens, too few for a "
                "passage. Choose another one."
            )
        return min(self._settings.chunk_tokens, limit - _SPECIAL_TOKENS)

    def _keep_budget(self, base: Store) -> None:
        if base.meta(_BUDGET_KEY) != str(self._chunk_budget):
            base.set_meta(_BUDGET_KEY, str(self._chunk_budget))

    def _reembed(self, base: Store) -> None:
        """Embed what is stored anew. No file is read; texts are split again if the limit changed."""
        if base.meta("embedder_fingerprint") == self._embedder.fingerprint:
            return
        total = base.count_chunks()

        def tell(done: int, of: int) -> None:
            self._progress(Progress(done, of, f"embedding with {self._embedder.name}"))

        if total and base.meta(_BUDGET_KEY) not in (None, str(self._chunk_budget)):
            # First the vectors, so that the base belongs to one embedder, then the new chunks.
            base.reembed(self._embedder, tell)
            for path, record in base.files().items():
                if record.status != "ok":
                    continue
                document = base.document(path)
                chunks = split_document(
                    document, self._embedder.count_tokens, chunk_tokens=self._chunk_budget
                )
                vectors = self._embedder.embed_passages([chunk.indexed_text for chunk in chunks])
                base.put_file(record, document, chunks, vectors)
            total = base.count_chunks()
        else:
            base.reembed(self._embedder, tell)
        self._embedded += total
        self._keep_budget(base)

    # reporting

    def _note_unwanted(self, known: Iterable[str], found: ScanResult) -> None:
        num_files = len(found.unwanted.intersection(known))
        if num_files:
            self._notes.append(
                f"{num_files:,} files that --include or --exclude leave out stay in the base as they "
                f"are. To delete them from it, name them in {IGNORE_FILE}."
            )

    def _note(self, result: FileResult) -> None:
        self._results[result.path] = result

    def _note_rest(self, plan: _Plan, known: dict[str, FileRecord]) -> None:
        """What no step has reported: deleted, unchanged and skipped files; twins."""
        for path in plan.deleted:
            self._note(FileResult(path, "deleted"))
        for path in plan.unchanged:
            record = known[path]
            self._note(
                FileResult(path, "unchanged", record.pages, record.chunks, record.warnings)
            )
        for root, num_files in plan.vanished.items():
            self._notes.append(
                f"the base still holds {num_files:,} files of {root.folder}, which isn't there any "
                "more. Run with --prune to delete them from it."
            )
        for skipped in plan.scan.skipped:
            if skipped.path not in self._results:
                self._note(FileResult(skipped.path, "skipped", error=skipped.reason))
        for path, first in find_twins(list(known.values())).items():
            result = self._results.get(path)
            if result is not None and result.status in ("added", "changed"):
                warning = f"same content as {first}"
                self._note(replace(result, warnings=(*result.warnings, warning)))

    def _report(self, chunks: int, *, is_dry_run: bool = False) -> SyncReport:
        return SyncReport(
            files=tuple(self._results[path] for path in sorted(self._results)),
            kb=self._settings.kb, chunks=chunks, embedded=self._embedded,
            seconds=time.perf_counter() - self._began, is_dry_run=is_dry_run,
            notes=tuple(self._notes),
        )


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A file that was split and waits to be embedded and stored."""

    task: _Task
    record: FileRecord
    document: Document
    chunks: list[Chunk]
    vectors: Vectors | None  # where a worker has embedded it


def _find_gone(
    known: Iterable[str], found: ScanResult, before: RootTable, after: RootTable,
    scopes: Sequence[Scope],
) -> set[str]:
    """Paths in the base whose file is no longer there, as far as the scopes can tell."""
    kept = set(found.sources)
    gone: set[str] = set()
    absorbed: set[Root] = set(before.roots) - set(after.roots)
    for path in known:
        if path in kept or path in found.unwanted or found.hides(path):
            continue
        owner = before.owner(path)
        if owner is None or owner in absorbed:
            gone.add(path)  # its folder is now part of another root, under other paths
        elif any(scope.root == owner and scope.covers(path) for scope in scopes):
            gone.add(path)
    return gone


def _loader_part(pipeline: str) -> str:
    return pipeline.split(" ", 1)[0]
