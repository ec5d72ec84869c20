"""Keys and values of passages, for use in other prompts than the one they were computed in.

That is an approximation: a passage's keys know what stood before it. Nothing of this is ever on
unless asked for, and what is laid into a prompt from here never enters the exact tree. To make
good a part of the loss, the first tokens of each passage, which bind it to what stands before, are
computed anew in their new place (EPIC, Hu et al., arXiv 2410.15332), and everything behind the
passages is. Choosing these tokens by how far their keys are from the stored ones (CacheBlend,
arXiv 2405.16444) was no better on the bundled reader: benchmarks/selection.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHORTEST = 16  # passages of fewer tokens are computed like everything else
_SHARE = 0.15  # of a passage that is computed anew, its first tokens
_FEWEST = 8


def num_recomputed(length: int) -> int:
    """How many of a passage's first tokens are computed in their new place."""
    return max(_FEWEST, math.ceil(length * _SHARE))


@dataclass(frozen=True, slots=True)
class StoredPassage:
    """Keys and values (layers, kv heads, tokens, head dim); keys turned for `position` on."""

    position: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Splice:
    """Tokens [start, end) of a prompt whose keys come from a passage that begins at `passage`."""

    passage: int
    start: int
    end: int
    stored: StoredPassage


class PassageStore:
    """At most `capacity` tokens, the least recently used passages given up first. Not thread-safe:
    the scheduler's loop alone touches it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._passages: OrderedDict[tuple[int, ...], StoredPassage] = OrderedDict()

    def __contains__(self, tokens: tuple[int, ...]) -> bool:
        return tokens in self._passages

    def find(self, tokens: tuple[int, ...]) -> StoredPassage | None:
        found = self._passages.get(tokens)
        if found is not None:
            self._passages.move_to_end(tokens)
        return found

    def keep(self, tokens: tuple[int, ...], passage: StoredPassage) -> None:
        """Store a passage that is not stored yet; one that is longer than all there is, is not."""
        if tokens in self._passages or len(tokens) > self.capacity:
            return
        self._passages[tokens] = passage
        self.size += len(tokens)
        while self.size > self.capacity:
            given_up, _ = self._passages.popitem(last=False)
            self.size -= len(given_up)

    def splices(
        self, tokens: Sequence[int], spans: Sequence[tuple[int, int]], first: int
    ) -> list[Splice]:
        """What of `tokens` can be laid in from here, from token `first` on: before it, all is
        there already."""
        found: list[Splice] = []
        for start, end in spans:
            begin = max(first, start + num_recomputed(end - start))
            if begin >= end or end - start < SHORTEST:
                continue
            stored = self.find(tuple(tokens[start:end]))
            if stored is not None:
                found.append(Splice(start, begin, end, stored))
        return found
