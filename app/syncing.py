"""Bringing a knowledge base up to date in the background, while pages watch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.models import ModelStore
from ingest import Progress, SyncReport, sync
from ingest.roots import META_KEY, RootTable
from rag.errors import RagError
from rag.settings import Settings
from rag.store import Store

_log = logging.getLogger(__name__)


_SHOWN_FILES = 6  # of those a run has gone through, the last ones are kept for the page


@dataclass(eq=False)
class SyncJob:
    """One run. Written by its thread, read by pages.

    `rejected` are uploads that were not taken, as (name, reason).
    """

    kb: str
    paths: tuple[Path, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    done: int = 0
    total: int = 0
    last: deque[str] = field(default_factory=lambda: deque(maxlen=_SHOWN_FILES))
    report: SyncReport | None = None
    error: str = ""
    unexpected: str = ""
    is_ended: bool = False
    began: float = field(default_factory=time.monotonic)

    def note(self, progress: Progress) -> None:
        self.done, self.total = progress.done, progress.total
        if progress.path:
            self.last.append(progress.path)


class SyncDesk:
    """At most one run at a time for each knowledge base; what comes meanwhile runs after it."""

    def __init__(self) -> None:
        self._jobs: dict[str, SyncJob] = {}
        self._next: dict[str, list[SyncJob]] = {}
        self._lock = threading.Lock()

    def current(self, kb: str) -> SyncJob | None:
        """The last run for this base, whether it has ended or not."""
        with self._lock:
            return self._jobs.get(_key(kb))

    def is_busy(self, kb: str) -> bool:
        job = self.current(kb)
        return job is not None and not job.is_ended

    def start(
        self, paths: Sequence[Path], settings: Settings, store: ModelStore,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> SyncJob:
        """Begin a run, or put it behind the one that is going on."""
        key = _key(settings.kb)
        job = SyncJob(settings.kb, tuple(paths), tuple(rejected))
        with self._lock:
            running = self._jobs.get(key)
            if running is not None and not running.is_ended:
                self._next.setdefault(key, []).append(job)
                return job
            self._jobs[key] = job
        threading.Thread(
            target=self._run_all, args=(job, settings, store), name="ingest", daemon=True
        ).start()
        return job

    def _run_all(self, job: SyncJob, settings: Settings, store: ModelStore) -> None:
        while True:
            _run(job, settings, store)
            with self._lock:
                waiting = self._next.get(_key(settings.kb))
                if not waiting:
                    job.is_ended = True
                    return
                following = waiting.pop(0)
                self._jobs[_key(settings.kb)] = following
                job.is_ended = True
            job = following


def _run(job: SyncJob, settings: Settings, store: ModelStore) -> None:
    try:
        job.report = sync(
            job.paths, settings=settings, embedder=store.embedder(settings), progress=job.note
        )
    except RagError as error:
        job.error = str(error)
    except Exception as error:  # a bug: its traceback belongs in the log, not on the page
        _log.exception("the knowledge base could not be brought up to date")
        job.unexpected = type(error).__name__


def _key(kb: str) -> str:
    return str(Path(kb).resolve())


def root_table(base: Store) -> RootTable:
    """The folders that the base's files come from."""
    return RootTable.from_json(base.meta(META_KEY), base.folder)


def root_folders(base: Store) -> list[Path]:
    return [root.folder for root in root_table(base).roots]


def find_file(base: Store, path: str) -> Path | None:
    """The file behind a path of the base; None where it is gone, or leads out of its folder."""
    root = root_table(base).owner(path)
    if root is None:
        return None
    file = root.folder / path.removeprefix(root.prefix)
    real = Path(os.path.realpath(file))
    if not real.is_file() or not real.is_relative_to(os.path.realpath(root.folder)):
        return None
    return real
