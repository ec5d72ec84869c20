"""One answer, written in a thread of its own; what it writes comes to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from typing import Any

from rag.serve.admission import Admission
from rag.stopping import Stop


class Job:
    """Holds a place of the admission until its thread is done, whether anybody still listens or not.

    `stop` ends it early. What it writes is bounded by the longest answer, so that a client who
    reads slowly holds that much memory and no place.
    """

    def __init__(self, admission: Admission, stop: Stop) -> None:
        self._admission = admission
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._began = time.perf_counter()

    @classmethod
    async def start(
        cls, work: Callable[[Stop], Iterator[Any]], *, admission: Admission, executor: Executor, stop: Stop
    ) -> Job:
        """Wait for a place, then begin. Raises TurnedAway where there is none."""
        await admission.enter()
        job = cls(admission, stop)  # no await from here on: a place that is taken is given back
        try:
            executor.submit(job._run, work)
        except RuntimeError:  # the executor was shut down
            admission.leave(0.0)
            raise
        return job

    async def items(self) -> AsyncIterator[Any]:
        """What the work yields. Raises what it raises."""
        while True:
            kind, item = await self._items.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item

    def _run(self, work: Callable[[Stop], Iterator[Any]]) -> None:
        try:
            if not self._stop.is_set:
                for item in work(self._stop):
                    self._put("item", item)
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)
        finally:
            self._loop.call_soon_threadsafe(self._admission.leave, time.perf_counter() - self._began)

    def _put(self, kind: str, item: Any) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, (kind, item))
