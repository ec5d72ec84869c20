"""A call in a thread of its own, which a process that ends does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Begins at once. `is_over` is set at the end; another may set it to stop waiting."""

    def __init__(self, call: Callable[[], Result], *, name: str) -> None:
        self.is_over = threading.Event()
        self._call = call
        self._done: list[Result] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._done.append(self._call())
        except Exception as error:  # raised again by `result`
            self._error = error
        self.is_over.set()

    def wait(self) -> Result:
        """Wait until the thread has ended, then `result`. Ctrl-C breaks the waiting off, not the call."""
        self._thread.join()
        return self.result()

    def result(self) -> Result:
        """What the call gave; raises what it raised. Ask once it is over."""
        if self._error is not None:
            raise self._error
        return self._done[0]
