"""Attention of many rows at once over a pool of slots, each shared run of slots read once.

A row's context is a list of extents of the pool, in the order of its tokens. Rows that go through
the same extent (one document, many questions) multiply with its keys together. What a row has for
itself is short as a rule, and gathered for all rows into one product. All scores of a row stand
side by side, so that one softmax sees exactly what it would see if the row were alone. Long pieces
of prompts go through PyTorch's fused kernel where there is one (`flash`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rag.engine.flash import FlashGroup, Run, attend_flash, flash_group, flash_tails, own_runs
from rag.engine.kvcache import Extent, KVPool, cut_extents, extents_length

SHORT_CHUNK = 24  # chunks up to this many tokens share one group: decoding rows, with drafts
LONGEST_TAIL = 320  # a row's own slots beyond this many are read in place, not gathered
_TAIL_STEP = 32  # tails are padded to a multiple of this: fewer shapes, see KVPool.padding
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one row that a forward computes.

    `extents` are the slots of every token from position 0 to the end of the chunk; the keys and
    values of all before `position` are there already. Logits are wanted behind the last
    `num_logits` tokens. `turn` is added to a token's position for RoPE, where passages were laid
    beside one another instead of behind.
    """

    tokens: Sequence[int]
    position: int
    extents: Sequence[Extent]
    num_logits: int = 1
    turn: int = 0


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
class Tails:
    """Slots that rows have for themselves, gathered: `slots` (rows * length), each row padded with
    a slot of its own. Their scores go to the last `length` columns.

    `tokens` (rows, most tokens of a row) are each row's tokens in the group, padded by repeating
    the last; None where every row has one token.
    """

    slots: torch.Tensor
    length: int
    rows: int
    tokens: torch.Tensor | None


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
    tails: Tails | None
    mask: torch.Tensor | None
    mask_from: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`order` in which the chunks stand in the step, and groups for each sliding window in use."""

    order: tuple[int, ...]
    groups: dict[int | None, tuple[Group | FlashGroup, ...]]


def plan_attention(
    chunks: Sequence[Chunk],
    *,
    windows: Sequence[int | None],
    query_block: int,
    device: torch.device,
    flash: bool = False,
) -> Plan:
    """What each token looks at. Computed once a step and used by every layer.

    `windows` are the distinct sliding windows of the layers (None: full attention). Long chunks are
    taken in blocks of `query_block` tokens, which bounds the matrix of scores and skips most of
    what causality forbids. With `flash` (a CPU whose kernel `has_flash`, no softcap) they are taken
    whole, and so are the short ones' shared and long parts.
    """
    short = [index for index, chunk in enumerate(chunks) if len(chunk.tokens) <= SHORT_CHUNK]
    long = [index for index, chunk in enumerate(chunks) if len(chunk.tokens) > SHORT_CHUNK]
    runs = _SharedRuns([chunks[index] for index in short])
    order = (*(short[index] for index in runs.order), *long)
    groups: dict[int | None, tuple[Group | FlashGroup, ...]] = {}
    for window in dict.fromkeys(windows):
        found: list[Group | FlashGroup] = []
        begin = 0
        if short:
            rows = [chunks[short[index]] for index in runs.order]
            if flash and window is None:
                found.append(_flash_rows(rows, runs, device))
            else:
                found.append(_group(0, rows, runs, window, device))
            begin = found[-1].end
        for index in long:
            chunk = chunks[index]
            whole = flash_group(chunk, begin, device) if flash and window is None else None
            if whole is not None:
                found.append(whole)
                begin = whole.end
                continue
            for start in range(0, len(chunk.tokens), query_block):
                block = _block(chunk, start, query_block)
                found.append(_group(begin, [block], _SharedRuns([block]), window, device))
                begin += len(block.tokens)
        groups[window] = tuple(found)
    return Plan(order, groups)


def _block(chunk: Chunk, start: int, length: int) -> Chunk:
    tokens = chunk.tokens[start : start + length]
    seen, _ = cut_extents(chunk.extents, chunk.position + start + len(tokens))
    return Chunk(tokens, chunk.position + start, seen)


class _SharedRuns:
    """Rows in an order in which those that share a run of slots stand together, and those runs.

    `parts` are over tokens of the rows in that order. Of a row's own last slots, `tails` holds
    those that are to be gathered: extents, by place in the order.
    """

    def __init__(self, rows: Sequence[Chunk]) -> None:
        self._rows = rows
        self.order: list[int] = []
        self.parts: list[Part] = []
        self.tails: list[list[Extent]] = []
        self._tokens = 0
        self._visit([(index, list(row.extents)) for index, row in enumerate(rows)], 0)

    def _visit(self, rows: list[tuple[int, list[Extent]]], column: int) -> None:
        if len(rows) == 1:
            self._place(*rows[0], column)
            return
        by_slot: dict[int, list[tuple[int, list[Extent]]]] = {}
        for index, extents in rows:
            assert extents, "two rows can't write the same slot"
            by_slot.setdefault(extents[0][0], []).append((index, extents))
        for slot, sharing in by_slot.items():
            if len(sharing) == 1:
                self._place(*sharing[0], column)
                continue
            length = min(extents[0][1] for _, extents in sharing) - slot
            begin = self._tokens
            at = len(self.parts)
            rest = [(index, cut_extents(extents, length)[1]) for index, extents in sharing]
            self._visit(rest, column + length)
            self.parts.insert(at, Part(begin, self._tokens, column, slot, length))

    def _place(self, index: int, extents: list[Extent], column: int) -> None:
        """A row whose remaining slots are its own."""
        self.order.append(index)
        begin = self._tokens
        self._tokens += len(self._rows[index].tokens)
        if len(self._rows) > 1 and extents_length(extents) <= LONGEST_TAIL:
            self.tails.append(extents)
            return
        self.tails.append([])
        for start, end in extents:
            self.parts.append(Part(begin, self._tokens, column, start, end - start))
            column += end - start


def _group(
    begin: int,
    rows: Sequence[Chunk],
    runs: _SharedRuns,
    window: int | None,
    device: torch.device,
) -> Group:
    """One group for `rows`, in the order of `runs`, which stand in the step from token `begin`."""
    count = sum(len(row.tokens) for row in rows)
    own = [extents_length(tail) for tail in runs.tails]
    in_place = [extents_length(row.extents) - tail for row, tail in zip(rows, own, strict=True)]
    first = 0
    if window is not None:
        first = max(0, min(row.position for row in rows) - window + 1)
    parts = tuple(kept for part in runs.parts if (kept := _clip(part, first)) is not None)
    shared_width = max(0, max(in_place) - first)
    tails = _gather(rows, runs.tails, device) if any(own) else None
    width = shared_width + (tails.length if tails else 0)
    mask, mask_from = _mask(rows, in_place, first, shared_width, width, window)
    on_device = None if mask is None else mask.to(device)
    return Group(begin, begin + count, width, parts, tails, on_device, mask_from)


def _flash_rows(rows: Sequence[Chunk], runs: _SharedRuns, device: torch.device) -> FlashGroup:
    """One group for `rows`, in the order of `runs`, which are the first of the step."""
    begins: dict[int, Chunk] = {}
    count = 0
    for row in rows:
        begins[count] = row
        count += len(row.tokens)
    found: list[Run] = []
    for part in runs.parts:
        row = begins[part.begin]
        extent = (part.slot, part.slot + part.length)
        if part.end > part.begin + len(row.tokens):  # shared, and so before all these tokens
            found.append(Run(part.begin, part.end, extent, causal=False))
            continue
        # One token sees its own slot like all others.
        seen = max(0, row.position + (len(row.tokens) == 1) - part.column)
        (before, own) = cut_extents([extent], seen)
        found.extend(Run(part.begin, part.end, of, causal=False) for of in before)
        for of in own:
            at = max(part.column, row.position) - row.position
            found += own_runs(part.begin, part.end, at, of)
    return FlashGroup(0, count, tuple(found), flash_tails(rows, runs.tails, _TAIL_STEP, device))


def _gather(
    rows: Sequence[Chunk], tails: Sequence[Sequence[Extent]], device: torch.device
) -> Tails:
    length = -(-max(extents_length(tail) for tail in tails) // _TAIL_STEP) * _TAIL_STEP
    slots: list[int] = []
    for row, tail in zip(rows, tails, strict=True):
        own = [slot for start, end in tail for slot in range(start, end)]
        # Padding with a slot of the row itself: nothing of another request can leak in.
        slots += own + [row.extents[-1][1] - 1] * (length - len(own))
    most = max(len(row.tokens) for row in rows)
    tokens = None
    if most > 1:
        listed: list[list[int]] = []
        at = 0
        for row in rows:
            last = at + len(row.tokens) - 1
            listed.append([min(at + n, last) for n in range(most)])
            at = last + 1
        tokens = torch.tensor(listed, device=device)
    return Tails(torch.tensor(slots, device=device), length, len(rows), tokens)


def _mask(
    rows: Sequence[Chunk],
    in_place: Sequence[int],
    first: int,
    shared_width: int,
    width: int,
    window: int | None,
) -> tuple[torch.Tensor | None, int]:
    """(tokens, 1, width - mask_from) and mask_from, the first column that any token must not see.

    Column c < shared_width holds position first + c for rows that have as many slots in place;
    behind it, column by column, stand the positions of each row's gathered slots.
    """
    if len(rows) == 1 and len(rows[0].tokens) == 1 and first + width == rows[0].position + 1:
        return None, width  # one token that sees all there is: the common case of one stream
    counts = torch.tensor([len(row.tokens) for row in rows])
    held = torch.tensor(in_place).repeat_interleave(counts)[:, None]
    at = torch.cat([torch.arange(row.position, row.position + len(row.tokens)) for row in rows])
    at = at[:, None]
    columns = torch.arange(width)[None]
    in_tail = columns >= shared_width
    position = torch.where(in_tail, held + columns - shared_width, first + columns)
    hidden = (position > at) | (~in_tail & (position >= held))
    if window is not None:
        hidden |= position <= at - window
    found = hidden.any(0).nonzero()
    if not len(found):
        return None, width
    mask_from = int(found[0])
    return hidden[:, None, mask_from:].contiguous(), mask_from


def _clip(part: Part, first: int) -> Part | None:
    """The part without columns before `first`, which becomes column 0."""
    cut = max(0, first - part.column)
    if cut >= part.length:
        return None
    return Part(part.begin, part.end, part.column + cut - first, part.slot + cut, part.length - cut)


def attend(
    queries: torch.Tensor,
    pool: KVPool,
    layer: int,
    groups: Sequence[Group | FlashGroup],
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention output for queries (kv heads, tokens, heads of a group, head dim), scaled already.

    With `softcap` scores are bent to softcap x tanh(score / softcap). Returns (tokens, heads x head
    dim).
    """
    kv_heads, count, heads, dim = queries.shape
    if len(groups) == 1 and isinstance(groups[0], FlashGroup):
        return attend_flash(queries, pool, layer, groups[0]).reshape(count, -1)
    flat = queries.new_empty(count, kv_heads * heads * dim)
    out = flat.view(count, kv_heads, heads, dim).transpose(0, 1)
    for group in groups:
        asked = queries[:, group.begin : group.end]
        written = out[:, group.begin : group.end]
        if isinstance(group, FlashGroup):
            assert softcap is None, "the fused kernel bends no scores"
            found = attend_flash(asked, pool, layer, group)
            flat[group.begin : group.end] = found.flatten(1)
        elif len(group.parts) == 1 and group.parts[0].length == group.width:
            written.copy_(_attend_one(asked, pool, layer, group, softcap))
        else:
            written.copy_(_attend_many(asked, pool, layer, group, softcap))
    return flat


def _attend_one(
    queries: torch.Tensor, pool: KVPool, layer: int, group: Group, softcap: float | None
) -> torch.Tensor:
    """All tokens of the group read the same slots."""
    part = group.parts[0]
    end = part.slot + part.length
    scores = _scores(queries, pool.padded_keys(layer, part.slot, end))
    if scores.shape[-1] > part.length:
        scores[..., part.length :] = _NEVER
    probabilities = _masked_softmax(scores, group, softcap).flatten(1, 2)
    values = pool.padded_values(layer, part.slot, end)
    return torch.bmm(probabilities, values).view(queries.shape)


def _attend_many(
    queries: torch.Tensor, pool: KVPool, layer: int, group: Group, softcap: float | None
) -> torch.Tensor:
    """Parts and tails beside one another in one matrix of scores."""
    kv_heads, count, heads, _ = queries.shape
    # Columns that nobody writes are covered by the mask.
    scores = queries.new_empty(kv_heads, count, heads, group.width)
    for part in group.parts:
        keys = pool.padded_keys(layer, part.slot, part.slot + part.length)
        columns = slice(part.column, part.column + part.length)
        found = _scores(queries[:, part.begin : part.end], keys)
        scores[:, part.begin : part.end, :, columns] = found[..., : part.length]
    if group.tails is not None:
        _write_tail_scores(scores, queries, pool, layer, group.tails)
    probabilities = _masked_softmax(scores, group, softcap)
    # Sums of several products: rounded once, at the end.
    mixed = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for part in group.parts:
        values = pool.padded_values(layer, part.slot, part.slot + part.length)
        columns = slice(part.column, part.column + part.length)
        weights = probabilities[:, part.begin : part.end, :, columns].flatten(1, 2)
        weights = torch.nn.functional.pad(weights, (0, values.shape[1] - part.length))
        product = torch.bmm(weights, values)
        mixed[:, part.begin : part.end] += product.view(kv_heads, -1, heads, product.shape[-1])
    if group.tails is not None:
        _add_tail_values(mixed, probabilities, pool, layer, group.tails)
    return mixed


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(kv heads, tokens, heads, D) x (kv heads, n, D) -> (kv heads, tokens, heads, n)."""
    kv_heads, count, heads, dim = queries.shape
    flat = queries.reshape(kv_heads, -1, dim)
    if flat.shape[1] <= 64 and keys.dtype != torch.float32:
        # Few queries: with the keys as the left factor oneDNN reads them in the order they lie in.
        found = torch.bmm(keys, flat.transpose(1, 2)).transpose(1, 2)
    else:
        found = torch.bmm(flat, keys.transpose(1, 2))
    return found.reshape(kv_heads, count, heads, -1)


def _write_tail_scores(
    scores: torch.Tensor, queries: torch.Tensor, pool: KVPool, layer: int, tails: Tails
) -> None:
    kv_heads, _, heads, dim = queries.shape
    keys = pool.gather_keys(layer, tails.slots).view(kv_heads * tails.rows, tails.length, dim)
    asked = queries if tails.tokens is None else queries[:, tails.tokens]
    asked = asked.reshape(kv_heads * tails.rows, -1, dim)  # (kv heads * rows, tokens * heads, D)
    found = torch.bmm(keys, asked.transpose(1, 2)).transpose(1, 2)
    columns = scores[..., scores.shape[-1] - tails.length :]
    if tails.tokens is None:
        columns.copy_(found.view(kv_heads, tails.rows, heads, tails.length))
    else:
        by_token = found.reshape(kv_heads, -1, heads, tails.length)
        # A padded token is written twice with the same numbers.
        columns.index_copy_(1, tails.tokens.flatten(), by_token)


def _add_tail_values(
    mixed: torch.Tensor,
    probabilities: torch.Tensor,
    pool: KVPool,
    layer: int,
    tails: Tails,
) -> None:
    kv_heads, _, heads, dim = mixed.shape
    values = pool.gather_values(layer, tails.slots).view(kv_heads * tails.rows, tails.length, dim)
    columns = probabilities[..., probabilities.shape[-1] - tails.length :]
    weights = columns if tails.tokens is None else columns[:, tails.tokens]
    weights = weights.reshape(kv_heads * tails.rows, -1, tails.length)
    found = torch.bmm(weights, values).view(kv_heads, -1, heads, dim)
    if tails.tokens is None:
        mixed += found
    else:
        at = tails.tokens.flatten()
        by_token = torch.empty_like(mixed).index_copy_(1, at, found.float())
        mixed += by_token


def _masked_softmax(scores: torch.Tensor, group: Group, softcap: float | None) -> torch.Tensor:
    """Over the last dimension of (kv heads, tokens, heads, width); changes `scores`."""
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if group.mask is not None:
        scores[..., group.mask_from : group.width].masked_fill_(group.mask, _NEVER)
    return scores.softmax(-1)
