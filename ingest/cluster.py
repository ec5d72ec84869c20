"""Parses, splits and embeds on the workers of a Dask cluster (https://distributed.dask.org).

The difference to one machine is only where `ask` runs: the same worker process (ingest/worker.py),
with the same limits, is started by each Dask worker on its own machine. A file's bytes travel with
its task, so the machines share no disk. What a lost worker had begun, the scheduler gives to
another one. Here are one reader of the files and one writer of the base.

Whoever reaches a Dask scheduler can run programs on its workers: it belongs into a network of one's
own, or behind TLS (tls:// and Dask's own configuration).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any, Protocol

from ingest.ocr import find_tesseract
from ingest.parsers import Limits, ProcessWorkers, Splitting
from ingest.scan import SourceFile
from rag.errors import ClusterError, InputError
from rag.settings import Settings

_CONNECT_SECONDS = 10.0
_FIRST_WORKER_SECONDS = 20.0  # for workers that are just being started
_NO_WORKER_SECONDS = 60.0  # without any worker, until the run is given up
_LOOK_SECONDS = 1.0  # between two looks at what becomes of a task
_MOST_AT_ONCE = 64  # tasks; one writer keeps no more workers busy
_BYTES_AT_ONCE = 256 << 20  # of files that are on their way; a larger one goes alone
# Other releases of these find other text in a file, or cut and count it otherwise.
_PACKAGES = (
    "pypdfium2", "lxml", "python-docx", "python-pptx", "openpyxl", "charset-normalizer",
    "langchain-text-splitters", "tokenizers",
)  # fmt: skip

_Answers = list[dict[str, Any]] | str
_File = tuple[str, bytes]  # path in the base, content


# on the workers ---------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def describe_program(embedder: str) -> dict[str, str]:
    """What must be the same on all machines for the result to be: code, embedder, OCR, packages."""
    from rag.embedder import load_embedder

    project = Path(__file__).resolve().parent.parent
    files = sorted((project / "ingest").rglob("*.py"))
    files += [project / "rag" / name for name in ("document.py", "embedder.py", "simplified.py", "sentences.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(project).as_posix().encode() + file.read_bytes().replace(b"\r\n", b"\n"))
    tesseract = find_tesseract()
    facts = {
        "program": digest.hexdigest()[:16], "embedder": load_embedder(embedder).fingerprint,
        "tesseract": tesseract.languages if tesseract else "missing",
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "missing"
    return facts


def find_difference(here: dict[str, str], there: dict[str, str]) -> str | None:
    """What differs on a worker, in words; None where nothing does."""
    found = [
        f"{name} {there.get(name, 'missing')} (here {value})"
        for name, value in here.items() if there.get(name) != value
    ]
    return ", ".join(found) or None


_POOLS: dict[Limits, ProcessWorkers] = {}
_POOLS_LOCK = threading.Lock()


def answer_task(
    files: Sequence[_File], splitting: Splitting, limits: Limits, facts: dict[str, str], is_static: bool
) -> _Answers:
    """Runs on a Dask worker: parse files within the limits, split, embed.

    Where the embedder takes more than a table, that is done here and not in the limited process.
    Raises ClusterError where this machine's program is another one.
    """
    difference = find_difference(facts, describe_program(splitting.embedder))
    if difference is not None:
        raise ClusterError(_other_program(difference))
    with _POOLS_LOCK:
        pool = _POOLS.setdefault(limits, ProcessWorkers(limits))
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        placed: list[tuple[str, str]] = []
        for number, (path, content) in enumerate(files):
            file = Path(folder) / f"{number}{PurePath(path).suffix}"
            file.write_bytes(content)
            placed.append((str(file), path))
        answers = pool.ask_for(placed, splitting if is_static else None)
    if isinstance(answers, str) or is_static:
        return answers
    return [answer | _embed(answer, splitting) for answer in answers]


def _embed(answer: dict[str, Any], splitting: Splitting) -> dict[str, Any]:
    from ingest.worker import document_from_dict, split_and_embed

    if "error" in answer:
        return {}
    fields = {"embedder": splitting.embedder, "chunk_tokens": splitting.chunk_tokens}
    return split_and_embed(document_from_dict(answer["document"]), fields)


def end_idle_processes() -> None:
    """Runs on a Dask worker: what parsed for this run needs no memory any more."""
    with _POOLS_LOCK:
        for pool in _POOLS.values():
            pool.stop_idle()


def _other_program(difference: str) -> str:
    return (
        f"a worker runs another program than this one: {difference}. The result would depend on which "
        "worker read a file. Install the same state there (pip install -c constraints.txt -e '.[dask]') "
        "with the same embedder, and start the worker again."
    )


# here -------------------------------------------------------------------------------------------


class TaskFuture(Protocol):
    """What Dask's futures and those of concurrent.futures have in common.

    Not Dask's executor (Client.get_executor): where the connection breaks while a result comes in,
    its futures never end.
    """

    def result(self) -> Any: ...
    def done(self) -> bool: ...
    def cancel(self) -> Any: ...
    def add_done_callback(self, call: Callable[[Any], object], /) -> Any: ...


class ClusterWorkers:
    """The workers as `ingest.parsers.ParserPool` asks them, each task a future."""

    takes_all = True

    def __init__(
        self, submit: Callable[..., TaskFuture], limits: Limits, *, facts: dict[str, str], splitting: Splitting,
        is_static: bool, num_at_once: int, count_workers: Callable[[], int],
    ) -> None:
        """`submit` is a Client's or an Executor's; `count_workers` says how many there are now, or raises ClusterError where the scheduler is gone."""
        self.num_at_once = num_at_once
        self._submit = submit
        self._limits = limits
        self._facts = facts
        self._splitting = splitting
        self._is_static = is_static
        self._count_workers = count_workers
        self._bytes = _ByteBudget(_BYTES_AT_ONCE)
        self._alone = threading.Lock()
        self._is_stopped = threading.Event()

    def ask(self, sources: Sequence[SourceFile], splitting: Splitting | None) -> _Answers:
        """An answer for each file, or why there are none. Raises ClusterError where nobody can answer."""
        with self._bytes.taken(sum(source.size for source in sources)):
            try:
                files = [(source.path, source.file.read_bytes()) for source in sources]
            except OSError as error:
                return f"it can't be read: {error.strerror or error}"
            answers = self._ask_once(files)
            if answers is not None:
                return answers
            if len(files) > 1:
                return "workers were lost while they read it"  # each will be asked for by itself
            # Perhaps a file beside it was to blame. One suspect at a time, so that the guilty one is found.
            with self._alone:
                answers = self._ask_once(files)
        if answers is not None:
            return answers
        return (
            "every worker that read it was lost, twice as often as the scheduler allows (see the workers' "
            "logs; most often their machine ran out of memory)"
        )

    def _ask_once(self, files: Sequence[_File]) -> _Answers | None:
        """The answers; None where the scheduler gave up because workers were lost over it."""
        from distributed import KilledWorker

        if self._is_stopped.is_set():
            raise CancelledError
        future = self._submit(
            answer_task, files, self._splitting, self._limits, self._facts, self._is_static
        )
        self._wait(future)
        try:
            answers: _Answers = future.result()
            return answers
        except KilledWorker:
            return None
        except (CancelledError, OSError, ImportError) as error:
            self._count_workers()  # says so where the connection is the cause
            if isinstance(error, CancelledError):
                raise ClusterError(
                    "the scheduler dropped a task, as when it is started again. What was stored stays; run this again."
                ) from error
            raise ClusterError(f"a task failed on a worker ({type(error).__name__}: {error}).") from error

    def _wait(self, future: TaskFuture) -> None:
        """Until the task is done. Raises CancelledError when stopped, ClusterError where nobody works on it."""
        is_done = threading.Event()
        future.add_done_callback(lambda _: is_done.set())
        lonely_since: float | None = None
        while not (is_done.wait(_LOOK_SECONDS) or future.done()):
            if self._is_stopped.is_set():
                future.cancel()
                raise CancelledError
            if self._count_workers():
                lonely_since = None
            elif lonely_since is None:
                lonely_since = time.monotonic()
            elif time.monotonic() - lonely_since > _NO_WORKER_SECONDS:
                future.cancel()
                raise ClusterError(
                    f"the scheduler has had no worker for {_NO_WORKER_SECONDS:g} s. What was stored stays; "
                    "start workers (dask worker ADDRESS) and run this again."
                )

    def stop(self) -> None:
        self._is_stopped.set()


class _ByteBudget:
    """Lets through what fits beside what is already on its way; what never would goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        size = min(size, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + size <= self._most)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


class Cluster:
    """A scheduler's workers, found to run this very program. Use as a context manager."""

    def __init__(self, address: str, settings: Settings) -> None:
        """Raises InputError for an address that is none or without the package distributed; ClusterError
        where no scheduler or no worker answers, or a worker runs another program."""
        try:
            import dask
            from distributed import Client
        except ModuleNotFoundError as error:
            raise InputError(
                f"--scheduler needs the package {error.name}: pip install 'local-rag[dask]'"
            ) from error
        self.address = address
        self._embedder = _portable_name(settings.embedder)
        # What its client would log with a traceback (a lost connection) is told by our own errors.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        # Bytes travel in the tasks on purpose.
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"})
        try:
            self._client: Any = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except ValueError as error:
            raise InputError(f"{address!r} is no scheduler's address ({error}). Write tcp://host:8786.") from error
        except OSError as error:
            raise ClusterError(
                f"no Dask scheduler answers at {address} within {_CONNECT_SECONDS:g} s ({error}). Start one: "
                "dask scheduler; and on each machine: dask worker " + address
            ) from error
        try:
            self._facts = self._check_workers()
        except BaseException:
            self._client.close()
            raise

    def _check_workers(self) -> dict[str, str]:
        here = describe_program(self._embedder)
        try:
            self._client.wait_for_workers(1, timeout=_FIRST_WORKER_SECONDS)
        except TimeoutError as error:
            raise ClusterError(
                f"the scheduler at {self.address} has no worker after {_FIRST_WORKER_SECONDS:g} s. Start one on each "
                f"machine: dask worker {self.address}"
            ) from error
        found = self._client.run(describe_program, self._embedder, on_error="return")
        for worker, facts in found.items():
            if isinstance(facts, ModuleNotFoundError):
                raise ClusterError(
                    f"the worker {worker} lacks this program ({facts}). Install it there: "
                    "pip install -c constraints.txt -e '.[dask]', and start the worker again."
                ) from facts
            if isinstance(facts, Exception):
                raise ClusterError(f"the worker {worker} can't work with this program: {facts}") from facts
            difference = find_difference(here, facts)
            if difference is not None:
                raise ClusterError(f"{worker}: {_other_program(difference)}")
        return here

    def workers(self, limits: Limits, *, chunk_tokens: int, is_static: bool) -> ClusterWorkers:
        """What a ParserPool asks. Twice as many tasks as threads are on their way, so that none waits."""
        threads = sum(self._client.nthreads().values())
        return ClusterWorkers(
            partial(self._client.submit, pure=False), limits, facts=self._facts,
            splitting=Splitting(self._embedder, chunk_tokens), is_static=is_static,
            num_at_once=max(4, min(_MOST_AT_ONCE, 2 * threads)), count_workers=self._count_workers,
        )

    def _count_workers(self) -> int:
        if self._client.status != "running":
            raise ClusterError(
                f"the connection to the scheduler at {self.address} is lost ({self._client.status}). What was stored "
                "stays; run this again once it is back."
            )
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client.status == "running":
            self._client.run(end_idle_processes, on_error="ignore")
        self._client.close()


def _portable_name(embedder: str) -> str:
    """A folder by its whole path: the workers were started elsewhere."""
    folder = Path(embedder).expanduser()
    return str(folder.resolve()) if embedder != "bundled" and folder.is_dir() else embedder
