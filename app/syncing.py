"""Bringing a knowledge base up to date in the background, while pages watch."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.models import ModelStore
from ingest import Progress, SyncReport, sync
from ingest.roots import META_KEY, RootTable
from rag.errors import RagError
from rag.knowledge import KnowledgeBase
from rag.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class SyncJob:
    """One run. Written by its thread, read by pages."""

    kb: str
    done: int = 0
    total: int = 0
    path: str = ""
    report: SyncReport | None = None
    error: str = ""
    unexpected: str = ""
    is_ended: bool = False
    rejected: list[tuple[str, str]] = field(default_factory=list)  # uploads: (name, reason)

    def note(self, progress: Progress) -> None:
        self.done, self.total, self.path = progress.done, progress.total, progress.path


class SyncDesk:
    """At most one run for each knowledge base."""

    def __init__(self) -> None:
        self._jobs: dict[str, SyncJob] = {}
        self._lock = threading.Lock()

    def current(self, kb: str) -> SyncJob | None:
        """The last run for this base, whether it has ended or not."""
        with self._lock:
            return self._jobs.get(_key(kb))

    def clear(self, kb: str) -> None:
        """Forget a run that has ended."""
        with self._lock:
            job = self._jobs.get(_key(kb))
            if job is not None and job.is_ended:
                del self._jobs[_key(kb)]

    def start(self, paths: Sequence[Path], settings: Settings, store: ModelStore) -> SyncJob:
        """Begin, or return the run that is going on already."""
        with self._lock:
            running = self._jobs.get(_key(settings.kb))
            if running is not None and not running.is_ended:
                return running
            job = SyncJob(settings.kb)
            self._jobs[_key(settings.kb)] = job
        threading.Thread(
            target=_run, args=(job, list(paths), settings, store), name="ingest", daemon=True
        ).start()
        return job


def _run(job: SyncJob, paths: list[Path], settings: Settings, store: ModelStore) -> None:
    try:
        job.report = sync(
            paths, settings=settings, embedder=store.embedder(settings), progress=job.note
        )
    except RagError as error:
        job.error = str(error)
    except Exception as error:  # a bug: its traceback belongs in the log, not on the page
        _log.exception("the knowledge base could not be brought up to date")
        job.unexpected = type(error).__name__
    finally:
        job.is_ended = True


def _key(kb: str) -> str:
    return str(Path(kb).resolve())


def root_table(base: KnowledgeBase) -> RootTable:
    """The folders that the base's files come from."""
    return RootTable.from_json(base.meta(META_KEY), base.folder)


def root_folders(base: KnowledgeBase) -> list[Path]:
    return [root.folder for root in root_table(base).roots]


def find_file(base: KnowledgeBase, path: str) -> Path | None:
    """The file behind a path of the base; None where it is gone, or leads out of its folder."""
    root = root_table(base).owner(path)
    if root is None:
        return None
    file = root.folder / path.removeprefix(root.prefix)
    real = Path(os.path.realpath(file))
    if not real.is_file() or not real.is_relative_to(os.path.realpath(root.folder)):
        return None
    return real
