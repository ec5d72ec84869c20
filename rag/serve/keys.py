"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rag.errors import InputError

KEYS_VARIABLE = "RAG_SERVE_KEYS"
_SHORTEST = 16  # characters; `python -c "import secrets; print(secrets.token_urlsafe())"` has 43


@dataclass(frozen=True, slots=True)
class Keys:
    """Bearer keys by the name of their owner. Only their SHA-256 is kept."""

    digests: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def read(cls, file: Path | None, environ: Mapping[str, str]) -> Keys:
        """From a file with `NAME KEY` in each line, and from RAG_SERVE_KEYS with `NAME:KEY,NAME:KEY`.

        Raises InputError for a line of another form, a short key, or a name that is there twice.
        No message shows a key.
        """
        pairs: list[tuple[str, str, str]] = []  # name, key, where it stood
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"the keys in {file} can't be read: {error}") from error
            for number, line in enumerate(lines, 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    name, _, key = line.strip().partition(" ")
                    pairs.append((name, key.strip(), f"{file}, line {number}"))
        for number, part in enumerate(filter(str.strip, environ.get(KEYS_VARIABLE, "").split(",")), 1):
            name, _, key = part.strip().partition(":")
            pairs.append((name, key.strip(), f"{KEYS_VARIABLE}, entry {number}"))
        seen: set[str] = set()
        for name, key, where in pairs:
            if not name or len(key) < _SHORTEST or not key.isascii() or any(map(str.isspace, key)):
                raise InputError(
                    f"{where}: a name and a key of at least {_SHORTEST} ASCII characters without "
                    "spaces are wanted. Make a key: python -c \"import secrets; print(secrets.token_urlsafe())\""
                )
            if name in seen:
                raise InputError(f"{where}: the name {name!r} is there twice.")
            seen.add(name)
        if file is not None and not pairs:
            raise InputError(f"{file} holds no keys. Put `NAME KEY` in each line.")
        return cls(tuple((name, _digest(key)) for name, key, _ in pairs))

    def owner(self, given: str) -> str | None:
        """Whose key it is. Takes as long for a wrong one as for a right one."""
        digest = _digest(given)
        found = None
        for name, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class RateLimit:
    """At most `per_minute` requests at once for each owner, coming back at that rate. 0 is none."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # owner: requests left, at what time

    def take(self, owner: str) -> float:
        """Seconds until the next request of this owner may come; 0.0 where this one may."""
        if self._per_minute == 0:
            return 0.0
        now = self._clock()
        left, at = self._left.get(owner, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - at) * self._per_minute / 60)
        allowed = left >= 1.0
        self._left[owner] = (left - allowed, now)
        return 0.0 if allowed else (1.0 - left) * 60 / self._per_minute
