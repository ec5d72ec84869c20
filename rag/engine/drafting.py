"""Prompt lookup: propose what followed the last tokens where they stood before.

Answers copy names, numbers and whole phrases out of the passages, so the continuation is often
already in the prompt (Saxena, "Prompt Lookup Decoding", 2023). A proposal costs a dictionary
look-up; verifying it costs little more than one token, and the result never changes.
"""

from __future__ import annotations

MAX_DRAFT = 12
_RUNS = (3, 2)  # lengths of the run that must recur, tried in this order
_REST = 6  # tokens without drafting after drafts kept failing


class Drafter:
    """Proposes continuations of one request's tokens and learns how long a proposal pays."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}  # run -> position behind its last occurrence
        self._indexed = 0
        self._length = 4
        self._failures = 0
        self._rest_until = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` tokens that may follow `tokens`; empty where nothing suggests itself."""
        self._index(tokens)
        limit = min(limit, self._length)
        if limit < 1 or len(tokens) < self._rest_until:
            return []
        for length in _RUNS:
            at = self._seen.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if at is not None:
                return _copy(tokens, at, limit)
        return []

    def learn(self, proposed: int, accepted: int, num_tokens: int) -> None:
        """Tell how many of the proposed tokens were right, and how many tokens there are now."""
        if not proposed:
            return
        if accepted == proposed:
            self._length = min(MAX_DRAFT, 2 * self._length)
        else:
            self._length = max(2, accepted + 1)
        self._failures = 0 if accepted else self._failures + 1
        if self._failures >= 2:
            self._rest_until = num_tokens + _REST
            self._failures = 0

    def _index(self, tokens: list[int]) -> None:
        # A run that ends at the last token is what is looked up: it enters with the next token.
        for end in range(max(1, self._indexed), len(tokens)):
            for length in _RUNS:
                if end >= length:
                    self._seen[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens))


def _copy(tokens: list[int], at: int, limit: int) -> list[int]:
    """The `limit` tokens from `at` on, going on in the copy itself where it reaches the end.

    Like an overlapping copy of LZ77: what stands only just behind is taken to repeat.
    """
    distance = len(tokens) - at
    copied = tokens[at : at + limit]
    while len(copied) < limit:
        copied.append(copied[-distance])
    return copied
