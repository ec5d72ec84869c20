"""Attention of many rows at once over a pool of slots, each shared run of slots read once.

A row's context is a list of extents of the pool, in the order of its tokens. Rows that go through
the same extent (one document, many questions) multiply with its keys together; every score lands
in the column of its position, so that one softmax over a row sees exactly what it would see alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rag.engine.kvcache import Extent, KVPool, cut_extents, extents_length

SHORT_CHUNK = 24  # chunks up to this many tokens share one group: decoding rows, with drafts
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one row that a forward computes.

    `extents` are the slots of every token from position 0 to the end of the chunk; the keys and
    values of all before `position` are there already. Logits are wanted behind the last
    `num_logits` tokens.
    """

    tokens: Sequence[int]
    position: int
    extents: Sequence[Extent]
    num_logits: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [begin, end) of the group attend to slots [slot, slot + length), whose scores go to
    columns [column, column + length)."""

    begin: int
    end: int
    column: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens [begin, end) of the step, whose scores share one matrix of `width` columns.

    `mask` (tokens, 1, width - mask_from) is True where a token must not look; None: it may look
    everywhere.
    """

    begin: int
    end: int
    width: int
    parts: tuple[Part, ...]
    mask: torch.Tensor | None
    mask_from: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`order` in which the chunks stand in the step, and groups for each sliding window in use."""

    order: tuple[int, ...]
    groups: dict[int | None, tuple[Group, ...]]


def plan_attention(
    chunks: Sequence[Chunk],
    *,
    windows: Sequence[int | None],
    query_block: int,
    device: torch.device,
) -> Plan:
    """What each token looks at. Computed once a step and used by every layer.

    `windows` are the distinct sliding windows of the layers (None: full attention). Long chunks are
    taken in blocks of `query_block` tokens, which bounds the matrix of scores and skips most of
    what causality forbids.
    """
    short = [index for index, chunk in enumerate(chunks) if len(chunk.tokens) <= SHORT_CHUNK]
    long = [index for index, chunk in enumerate(chunks) if len(chunk.tokens) > SHORT_CHUNK]
    tree = _SharedRuns([chunks[index] for index in short])
    order = (*(short[index] for index in tree.order), *long)
    groups: dict[int | None, tuple[Group, ...]] = {}
    for window in dict.fromkeys(windows):
        found: list[Group] = []
        begin = 0
        if short:
            rows = [chunks[short[index]] for index in tree.order]
            found.append(_group(0, rows, tree.parts, window, device))
            begin = found[-1].end
        for index in long:
            chunk = chunks[index]
            for start in range(0, len(chunk.tokens), query_block):
                block = _block(chunk, start, query_block)
                alone = _SharedRuns([block])
                found.append(_group(begin, [block], alone.parts, window, device))
                begin += len(block.tokens)
        groups[window] = tuple(found)
    return Plan(order, groups)


def _block(chunk: Chunk, start: int, length: int) -> Chunk:
    tokens = chunk.tokens[start : start + length]
    seen, _ = cut_extents(chunk.extents, chunk.position + start + len(tokens))
    return Chunk(tokens, chunk.position + start, seen)


class _SharedRuns:
    """Rows in an order in which those that share a run of slots stand together, and those runs."""

    def __init__(self, rows: Sequence[Chunk]) -> None:
        self._rows = rows
        self.order: list[int] = []
        self.parts: list[Part] = []  # over tokens of the rows in that order
        self._tokens = 0
        self._visit([(index, list(row.extents)) for index, row in enumerate(rows)], 0)

    def _visit(self, rows: list[tuple[int, list[Extent]]], column: int) -> None:
        by_slot: dict[int, list[tuple[int, list[Extent]]]] = {}
        for index, extents in rows:
            if extents:
                by_slot.setdefault(extents[0][0], []).append((index, extents))
            else:
                self.order.append(index)
                self._tokens += len(self._rows[index].tokens)
        for slot, sharing in by_slot.items():
            length = min(extents[0][1] for _, extents in sharing) - slot
            begin = self._tokens
            # The part stands before those of the runs behind it, though its rows are counted first.
            at = len(self.parts)
            rest = [(index, cut_extents(extents, length)[1]) for index, extents in sharing]
            self._visit(rest, column + length)
            self.parts.insert(at, Part(begin, self._tokens, column, slot, length))


def _group(
    begin: int,
    rows: Sequence[Chunk],
    parts: Sequence[Part],
    window: int | None,
    device: torch.device,
) -> Group:
    """One group for `rows`, which stand in the step from token `begin` on."""
    positions = [row.position + index for row in rows for index in range(len(row.tokens))]
    width = max(extents_length(row.extents) for row in rows)
    first = 0
    if window is not None:
        first = max(0, min(positions) - window + 1)
    kept = [clipped for part in parts if (clipped := _clip(part, first)) is not None]
    mask, mask_from = None, width
    slides = window is not None and max(positions) - window + 1 > first
    if min(positions) + 1 < width or slides:
        mask_from = first if slides else min(positions) + 1
        columns = torch.arange(mask_from, width)
        rows_at = torch.tensor(positions)[:, None]
        mask = columns > rows_at
        if window is not None:
            mask |= columns <= rows_at - window
        mask = mask[:, None].to(device)
        mask_from -= first
    return Group(begin, begin + len(positions), width - first, tuple(kept), mask, mask_from)


def _clip(part: Part, first: int) -> Part | None:
    """The part without columns before `first`, which becomes column 0."""
    cut = max(0, first - part.column)
    if cut >= part.length:
        return None
    return Part(part.begin, part.end, part.column + cut - first, part.slot + cut, part.length - cut)


def attend(
    queries: torch.Tensor, pool: KVPool, layer: int, groups: Sequence[Group]
) -> torch.Tensor:
    """Attention output for queries (kv heads, tokens, heads of a group, head dim), scaled already.

    Returns the same shape.
    """
    kv_heads, _, heads, dim = queries.shape
    out = torch.empty_like(queries)
    for group in groups:
        asked = queries[:, group.begin : group.end].reshape(kv_heads, -1, dim)
        written = out[:, group.begin : group.end]
        if len(group.parts) == 1 and group.parts[0].length == group.width:
            part = group.parts[0]
            end = part.slot + part.length
            scores = torch.bmm(asked, pool.keys(layer, part.slot, end))
            probabilities = _masked_softmax(scores, group, heads)
            mixed = torch.bmm(probabilities, pool.values(layer, part.slot, end))
            written.copy_(mixed.view(kv_heads, -1, heads, dim))
            continue
        # Columns that no part writes lie behind a row's end, and the mask covers them.
        scores = asked.new_empty(kv_heads, asked.shape[1], group.width)
        for part in group.parts:
            begin, end = part.begin * heads, part.end * heads
            keys = pool.keys(layer, part.slot, part.slot + part.length)
            scores[:, begin:end, part.column : part.column + part.length] = torch.bmm(
                asked[:, begin:end], keys
            )
        probabilities = _masked_softmax(scores, group, heads)
        sums = torch.zeros(kv_heads, asked.shape[1], dim, dtype=torch.float32, device=asked.device)
        for part in group.parts:
            begin, end = part.begin * heads, part.end * heads
            sums[:, begin:end] += torch.bmm(
                probabilities[:, begin:end, part.column : part.column + part.length],
                pool.values(layer, part.slot, part.slot + part.length),
            )
        written.copy_(sums.view(kv_heads, -1, heads, dim))
    return out


def _masked_softmax(scores: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    if group.mask is not None:
        by_token = scores.view(scores.shape[0], -1, heads, scores.shape[2])
        by_token[..., group.mask_from :].masked_fill_(group.mask, _NEVER)
    return scores.softmax(-1)
