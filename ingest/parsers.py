"""Parses files in worker processes, each file within limits of time and memory.

Small text files are read in this process while they are few: their loaders run no foreign code, and
starting a worker takes longer. Many of them go to the workers by the dozen. Results come in the
order of the files, and only so many are held at a time. The workers are processes of this machine,
or those of a cluster (ingest/cluster.py).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ingest.loaders import find_loader
from ingest.scan import SourceFile
from ingest.worker import chunks_from_list, document_from_dict, parse_file
from rag.document import Chunk, Document

if TYPE_CHECKING:
    from rag.embedder import Vectors

_LIGHT_TYPES = frozenset({"md", "txt"})
_LIGHT_BYTES = 2 << 20
_MANY_LIGHT_BYTES = 4 << 20  # of small text files, from which workers pay their start
_BATCH_BYTES = 512 << 10  # of small text files that a worker is asked for together
_BATCH_FILES = 64
_FILES_A_WORKER = 4  # below this a further worker does not pay its start


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may take. Beyond it the file fails and the others go on."""

    seconds: float = 120.0
    memory_mb: int = 2048
    file_mb: int = 512

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "file_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"limit {name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True, slots=True)
class Splitting:
    """How workers split and embed: with the static embedder of this name, in chunks of so many tokens."""

    embedder: str
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """A file's document, or why there is none. `seconds` is what parsing it took.

    `chunks` and `vectors` (float32, one row each) are there where the worker has made them.
    """

    source: SourceFile
    document: Document | None
    error: str | None
    seconds: float
    chunks: list[Chunk] | None = None
    vectors: Vectors | None = None


class Workers(Protocol):
    """Where files are parsed. `ask` may be called from `num_at_once` threads.

    `takes_all`: small text files too, however few they are.
    """

    num_at_once: int
    takes_all: bool

    def ask(
        self, sources: Sequence[SourceFile], splitting: Splitting | None
    ) -> list[dict[str, Any]] | str:
        """An answer for each file (as ingest/worker.py writes it), or why there are none."""
        ...

    def stop(self) -> None:
        """End what runs; `ask` is not called again."""
        ...


class ParserPool:
    """Use as a context manager: leaving it ends the workers."""

    def __init__(
        self, limits: Limits, *, splitting: Splitting | None = None, workers: Workers | None = None
    ) -> None:
        self._limits = limits
        self._splitting = splitting
        self._workers = workers or ProcessWorkers(limits)

    def __enter__(self) -> ParserPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._workers.stop()

    def parse(self, sources: Sequence[SourceFile]) -> Iterator[ParsedFile]:
        """Parse the files. Results come in the files' order."""
        takes_all = self._workers.takes_all
        jobs = _make_jobs(sources, by_dozen=takes_all or self._splitting is not None, takes_all=takes_all)
        to_workers = sum(not job.is_here for job in jobs)
        num_needed = to_workers if takes_all else -(-to_workers // _FILES_A_WORKER)
        num_threads = max(1, min(self._workers.num_at_once, num_needed))
        window = 4 * num_threads
        waiting: deque[tuple[_Job, Future[list[ParsedFile]] | None]] = deque()
        with ThreadPoolExecutor(max_workers=num_threads) as threads:
            try:
                pending = iter(jobs)
                while True:
                    while len(waiting) < window and (job := next(pending, None)) is not None:
                        future = None if job.is_here else threads.submit(self._parse_in_worker, job)
                        waiting.append((job, future))
                    if not waiting:
                        return
                    job, future = waiting.popleft()
                    yield from map(_parse_here, job.sources) if future is None else future.result()
            finally:
                # Left early: nothing that waits is begun, and what runs is ended.
                for _, future in waiting:
                    if future is not None:
                        future.cancel()
                if waiting:
                    self._workers.stop()

    def _parse_in_worker(self, job: _Job) -> list[ParsedFile]:
        (first, *others) = job.sources
        if not others and first.size > self._limits.file_mb << 20:
            reason = (
                f"it has {first.size >> 20:,} MB; files of up to {self._limits.file_mb:,} MB are "
                "read (--max-file-mb)"
            )
            return [ParsedFile(first, None, reason, 0.0)]
        began = time.perf_counter()
        answers = self._workers.ask(job.sources, self._splitting)
        if isinstance(answers, str):
            if others:  # one of them is to blame: each by itself, so that it alone fails
                return [
                    parsed for source in job.sources
                    for parsed in self._parse_in_worker(_Job((source,), is_here=False))
                ]
            return [ParsedFile(first, None, answers, time.perf_counter() - began)]
        return [
            _read_answer(source, answer) for source, answer in zip(job.sources, answers, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Job:
    """Files that are parsed together: by themselves, or small text files by the dozen."""

    sources: tuple[SourceFile, ...]
    is_here: bool  # in this process


def _make_jobs(
    sources: Sequence[SourceFile], *, by_dozen: bool, takes_all: bool
) -> list[_Job]:
    """The files in their order; small text files together where they are many and `by_dozen`.

    With `takes_all` none are left to this process.
    """
    light = [_is_light(source) for source in sources]
    are_many = sum(s.size for s, is_light in zip(sources, light) if is_light) >= _MANY_LIGHT_BYTES
    if not (takes_all or by_dozen and are_many):
        return [_Job((source,), is_light) for source, is_light in zip(sources, light)]
    jobs: list[_Job] = []
    batch: list[SourceFile] = []
    size = 0
    for source, is_light in zip(sources, light):
        if batch and not (
            is_light and size + source.size <= _BATCH_BYTES and len(batch) < _BATCH_FILES
        ):
            jobs.append(_Job(tuple(batch), is_here=False))
            batch, size = [], 0
        if is_light:
            batch.append(source)
            size += source.size
        else:
            jobs.append(_Job((source,), is_here=False))
    if batch:
        jobs.append(_Job(tuple(batch), is_here=False))
    return jobs


def _is_light(source: SourceFile) -> bool:
    loader = find_loader(source.file.name)
    return loader is not None and loader.media_type in _LIGHT_TYPES and source.size <= _LIGHT_BYTES


def _parse_here(source: SourceFile) -> ParsedFile:
    began = time.perf_counter()
    parsed = parse_file(source.file, source.path)
    seconds = time.perf_counter() - began
    if isinstance(parsed, str):
        return ParsedFile(source, None, parsed, seconds)
    return ParsedFile(source, parsed, None, seconds)


def _read_answer(source: SourceFile, answer: dict[str, Any]) -> ParsedFile:
    seconds = answer["seconds"]
    if "error" in answer:
        return ParsedFile(source, None, answer["error"], seconds)
    document = document_from_dict(answer["document"])
    if "chunks" not in answer:
        return ParsedFile(source, document, None, seconds)
    import numpy as np

    chunks = chunks_from_list(document, answer["chunks"])
    packed = np.frombuffer(base64.b64decode(answer["vectors"]), dtype="<f4")
    vectors = packed.reshape(len(chunks), -1) if chunks else packed.reshape(0, 1)
    return ParsedFile(source, document, None, seconds, chunks, vectors)


class ProcessWorkers:
    """Worker processes on this machine, started as they are needed."""

    takes_all = False

    def __init__(self, limits: Limits, *, num_at_once: int | None = None) -> None:
        self.num_at_once = num_at_once or os.cpu_count() or 1
        self._limits = limits
        self._workers: list[_Worker] = []
        self._idle: deque[_Worker] = deque()
        self._lock = threading.Lock()

    def ask(
        self, sources: Sequence[SourceFile], splitting: Splitting | None
    ) -> list[dict[str, Any]] | str:
        files = [(str(source.file), source.path) for source in sources]
        return self.ask_for(files, splitting)

    def ask_for(
        self, files: Sequence[tuple[str, str]], splitting: Splitting | None
    ) -> list[dict[str, Any]] | str:
        """`ask` for files on this machine, each with its path in the base."""
        with self._lock:
            worker = None
            while worker is None and self._idle:
                idle = self._idle.popleft()
                if idle.is_alive:
                    worker = idle
                else:  # ended by something else; this file is not to blame
                    idle.stop()
                    self._workers.remove(idle)
            if worker is None:
                worker = _Worker(self._limits)
                self._workers.append(worker)
        answers = worker.ask(files, splitting)
        with self._lock:
            if worker.is_alive:
                self._idle.append(worker)
            else:
                self._workers.remove(worker)
        return answers

    def stop(self) -> None:
        with self._lock:
            for worker in self._workers:
                worker.stop()

    def stop_idle(self) -> None:
        """End those that nothing runs in; further ones start as they are needed."""
        with self._lock:
            for worker in self._idle:
                worker.stop()
                self._workers.remove(worker)
            self._idle.clear()


class _Worker:
    """One worker process, asked by one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        project = str(Path(__file__).resolve().parent.parent)
        search = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")]))
        # Not multiprocessing: it would run the caller's own program again in the child.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ingest.worker", str(limits.memory_mb)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(
        self, files: Sequence[tuple[str, str]], splitting: Splitting | None
    ) -> list[dict[str, Any]] | str:
        """Parse files: an answer each, or why there are none.

        A worker that was too slow or crashed is dead afterwards.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "files": files,
            "splitting": None if splitting is None else asdict(splitting),
            "seconds": self._limits.seconds,
        }
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(self._limits.seconds, end)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answers: list[dict[str, Any]] = json.loads(line)
            return answers
        code = self._process.wait()
        self.stop()
        if is_late.is_set():
            return f"parsing it took longer than {self._limits.seconds:g} s (--timeout)"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return (
            f"the parser crashed on it ({how}); it may need more than "
            f"{self._limits.memory_mb:,} MB of memory (--max-memory-mb) or be damaged"
        )

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass  # what was left to write has no reader any more
