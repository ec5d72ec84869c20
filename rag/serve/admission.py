"""How many answers are written at once, and how many may wait. For one event loop's thread."""

from __future__ import annotations

import asyncio
import math
from collections import deque

_LONGEST_RETRY = 60  # seconds; more is a guess that helps nobody


class TurnedAway(Exception):
    """No place. `retry_after` is in whole seconds."""

    def __init__(self, message: str, *, retry_after: int, closing: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.closing = closing


class Admission:
    """First come, first served. Who finds the queue full is sent away with a time to come back."""

    def __init__(self, *, running: int, waiting: int) -> None:
        self._limit = running
        self._seats = waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._seconds = 2.0  # a request's usual time; a first guess, then what was measured
        self.running = 0
        self.closing = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self) -> None:
        """Wait for a place; it is kept until `leave`. Raises TurnedAway."""
        if self.closing:
            raise self._closed()
        if self.running < self._limit:
            self.running += 1
            return
        if len(self._queue) >= self._seats:
            raise TurnedAway(
                f"{self.running} requests run and {len(self._queue)} wait: the queue is full.",
                retry_after=self._retry_after(),
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place in self._queue:
                self._queue.remove(place)
            elif place.done() and not place.cancelled() and place.exception() is None:
                self._pass_on()  # given a place in the same moment: nobody would leave it
            raise

    def leave(self, seconds: float) -> None:
        """Give the place back after `seconds` of work."""
        self._seconds += 0.2 * (seconds - self._seconds)
        self._pass_on()

    def close(self) -> None:
        """Send away who waits and who comes from now on; who runs may end."""
        self.closing = True
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_exception(self._closed())

    def _pass_on(self) -> None:
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def _retry_after(self) -> int:
        expected = self._seconds * (len(self._queue) + 1) / self._limit
        return max(1, min(_LONGEST_RETRY, math.ceil(expected)))

    @staticmethod
    def _closed() -> TurnedAway:
        return TurnedAway("the server is shutting down.", retry_after=10, closing=True)
