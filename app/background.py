"""A call in a thread of its own, for which nobody has to wait."""

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
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._done.append(self._call())
        except Exception as error:  # raised again by `result`
            self._error = error
        self.is_over.set()

    def result(self) -> Result:
        """What the call gave; raises what it raised. Ask once it is over."""
        if self._error is not None:
            raise self._error
        return self._done[0]
