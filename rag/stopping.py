"""Stop: one thread tells another to end its work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stop:
    """Set once, from any thread. Whoever works looks at `is_set`, or gives an action that wakes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []
        self.is_set = False

    def set(self) -> None:
        """Run every action. A second call runs them again: the work may only now be there to end."""
        with self._lock:
            self.is_set = True
            actions = list(self._actions)
        for action in actions:
            action()

    def then(self, action: Callable[[], None]) -> None:
        """Run `action` when it is set; at once where it is already."""
        with self._lock:
            self._actions.append(action)
            is_set = self.is_set
        if is_set:
            action()
