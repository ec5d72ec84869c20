"""Parses files in worker processes, each file within limits of time and memory.

Small text files are read in this process: their loaders run no foreign code, and starting a worker
takes longer. Results come in the order of the files, and only so many are held at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ingest.loaders import find_loader
from ingest.scan import SourceFile
from ingest.worker import document_from_dict, parse_file
from rag.document import Document

_LIGHT_TYPES = frozenset({"md", "txt"})
_LIGHT_BYTES = 2 << 20
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
class ParsedFile:
    """A file's document, or why there is none. `seconds` is what parsing it took."""

    source: SourceFile
    document: Document | None
    error: str | None
    seconds: float


class ParserPool:
    """Use as a context manager: leaving it ends the workers."""

    def __init__(self, limits: Limits, *, num_workers: int | None = None) -> None:
        self._limits = limits
        self._num_workers = num_workers or os.cpu_count() or 1
        self._workers: list[_Worker] = []
        self._idle: deque[_Worker] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> ParserPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            for worker in self._workers:
                worker.stop()

    def parse(self, sources: Sequence[SourceFile]) -> Iterator[ParsedFile]:
        """Parse the files. Results come in the files' order."""
        heavy = sum(not _is_light(source) for source in sources)
        num_threads = max(1, min(self._num_workers, -(-heavy // _FILES_A_WORKER)))
        window = 4 * num_threads
        waiting: deque[tuple[SourceFile, Future[ParsedFile] | None]] = deque()
        with ThreadPoolExecutor(max_workers=num_threads) as threads:
            try:
                pending = iter(sources)
                while True:
                    while len(waiting) < window and (source := next(pending, None)) is not None:
                        light = _is_light(source)
                        future = None if light else threads.submit(self._parse_in_worker, source)
                        waiting.append((source, future))
                    if not waiting:
                        return
                    source, future = waiting.popleft()
                    yield self._parse_here(source) if future is None else future.result()
            finally:
                # Left early: nothing that waits is begun, and what runs is ended.
                for _, future in waiting:
                    if future is not None:
                        future.cancel()
                if waiting:
                    with self._lock:
                        for worker in self._workers:
                            worker.stop()

    def _parse_here(self, source: SourceFile) -> ParsedFile:
        began = time.perf_counter()
        return _read_answer(source, parse_file(source.file, source.path), began)

    def _parse_in_worker(self, source: SourceFile) -> ParsedFile:
        began = time.perf_counter()
        if source.size > self._limits.file_mb << 20:
            reason = (
                f"it has {source.size >> 20:,} MB; files of up to {self._limits.file_mb:,} MB are "
                "read (--max-file-mb)"
            )
            return ParsedFile(source, None, reason, 0.0)
        with self._lock:
            worker = self._idle.popleft() if self._idle else None
            if worker is None:
                worker = _Worker(self._limits)
                self._workers.append(worker)
        answer = worker.ask(source)
        with self._lock:
            if worker.is_alive:
                self._idle.append(worker)
            else:
                self._workers.remove(worker)
        return _read_answer(source, answer, began)


def _is_light(source: SourceFile) -> bool:
    loader = find_loader(source.file.name)
    return loader is not None and loader.media_type in _LIGHT_TYPES and source.size <= _LIGHT_BYTES


def _read_answer(source: SourceFile, answer: dict[str, Any], began: float) -> ParsedFile:
    seconds = time.perf_counter() - began
    if "error" in answer:
        return ParsedFile(source, None, answer["error"], seconds)
    return ParsedFile(source, document_from_dict(answer["document"]), None, seconds)


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

    def ask(self, source: SourceFile) -> dict[str, Any]:
        """Parse one file. A worker that was too slow or crashed is dead afterwards."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "file": str(source.file), "path": source.path, "seconds": self._limits.seconds,
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
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self.stop()
        if is_late.is_set():
            return {"error": f"parsing it took longer than {self._limits.seconds:g} s (--timeout)"}
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {
            "error": f"the parser crashed on it ({how}); it may need more than "
            f"{self._limits.memory_mb:,} MB of memory (--max-memory-mb) or be damaged"
        }

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
