"""Who may use the page: everyone on this machine, or whoever knows the password."""

from __future__ import annotations

import hmac
import ipaddress
import threading
import time
from collections import deque

_ATTEMPTS = 5  # wrong passwords from one address within the window
_WINDOW = 300.0  # seconds
_ALL_ATTEMPTS = 50  # from all addresses together, so that many of them gain little


class PasswordGate:
    """Compares passwords in constant time and counts wrong ones. One for the whole process."""

    def __init__(self, password: str) -> None:
        self._password = password.encode()
        self._wrong: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def seconds_locked(self, address: str, *, now: float | None = None) -> float:
        """How long this address has to wait before its next attempt; 0.0 where it need not."""
        now = time.monotonic() if now is None else now
        with self._lock:
            return self._seconds_locked(address, now)

    def _seconds_locked(self, address: str, now: float) -> float:
        for times in self._wrong.values():
            while times and times[0] <= now - _WINDOW:
                times.popleft()
        self._wrong = {name: times for name, times in self._wrong.items() if times}
        own = self._wrong.get(address, deque())
        everyone = sorted(t for times in self._wrong.values() for t in times)
        waits = [0.0]
        if len(own) >= _ATTEMPTS:
            waits.append(own[-_ATTEMPTS] + _WINDOW - now)
        if len(everyone) >= _ALL_ATTEMPTS:
            waits.append(everyone[-_ALL_ATTEMPTS] + _WINDOW - now)
        return max(waits)

    def check(self, given: str, address: str, *, now: float | None = None) -> bool:
        """Whether it is the password. Counts a wrong one; always False while locked."""
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._seconds_locked(address, now) > 0:
                return False
            is_right = hmac.compare_digest(given.encode(), self._password)
            if not is_right:
                self._wrong.setdefault(address, deque()).append(now)
            return is_right


def is_local(address: str | None) -> bool:
    """Whether a server bound to this address is reached from its own machine alone.

    Unset means every interface.
    """
    if not address:
        return False
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
