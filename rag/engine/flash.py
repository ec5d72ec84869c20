"""Attention by PyTorch's fused kernel for CPUs, run of slots by run of slots.

Each run of neighbouring slots is one call, which gives its own softmax and the logarithm of the sum
under it; by these, results over several runs are put together exactly (FlashAttention, Dao et al.,
arXiv 2205.14135; put together as in Flash-Decoding and vLLM's cascade attention). Nothing of the
size of all scores is ever written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from rag.engine.kvcache import Extent, KVPool, cut_extents

if TYPE_CHECKING:
    from rag.engine.attention import Chunk

_MOST_RUNS = 4  # cached runs beyond so many are gathered: each run is a call, and a merge
_MOST_OWN_RUNS = 3
_MOST_FOLDED = 32  # tokens; measured: 8 tokens over 2,000 slots 0.84 ms folded, 1.34 not; 72 alike


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [begin, end) of a chunk look at `slots`: all of them, or where `causal` the first at
    the first, the second at two, and so on. Listed slots are gathered, an extent is read in place.
    """

    begin: int
    end: int
    slots: Extent | torch.Tensor
    causal: bool


@dataclass(frozen=True, slots=True)
class FlashTails:
    """What `rows` rows have for themselves, gathered to one length and attended in one call.

    `slots` (rows * length); `tokens` (rows * most tokens of a row) of the group, a row's last one
    repeated; `mask` (rows, 1, most, length), float32, minus infinity where a token must not look.
    Of the results, `picked` go to the tokens `targets`; None: each to its place.
    """

    rows: int
    length: int
    slots: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    picked: torch.Tensor | None
    targets: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class FlashGroup:
    """Tokens [begin, end) of the step, and what they look at."""

    begin: int
    end: int
    runs: tuple[Run, ...]
    tails: FlashTails | None = None


def flash_group(chunk: Chunk, begin: int, device: torch.device) -> FlashGroup | None:
    """The group of a chunk whose tokens stand in the step from `begin` on. None where its own slots
    lie in too many places."""
    count = len(chunk.tokens)
    before, own = cut_extents(chunk.extents, chunk.position)
    if len(own) > _MOST_OWN_RUNS:
        return None
    runs: list[Run] = []
    if len(before) > _MOST_RUNS:
        listed = torch.cat([torch.arange(start, end) for start, end in before])
        runs.append(Run(0, count, listed.to(device), causal=False))
    else:
        runs.extend(Run(0, count, extent, causal=False) for extent in before)
    at = 0
    for extent in own:
        runs += own_runs(0, count, at, extent)
        at += extent[1] - extent[0]
    return FlashGroup(begin, begin + count, tuple(runs))


def own_runs(begin: int, end: int, at: int, extent: Extent) -> list[Run]:
    """What a row's tokens [begin, end) look at in the slots of its own tokens from `at` on."""
    done = at + extent[1] - extent[0]
    runs = [Run(begin + at, begin + done, extent, causal=True)]
    if begin + done < end:
        runs.append(Run(begin + done, end, extent, causal=False))
    return runs


def flash_tails(
    rows: Sequence[Chunk], tails: Sequence[Sequence[Extent]], step: int, device: torch.device
) -> FlashTails | None:
    """Of rows that stand behind one another in a group, the last slots `tails`. None: there are
    none. Lengths are rounded up to a multiple of `step`."""
    owns = [[slot for start, end in tail for slot in range(start, end)] for tail in tails]
    with_tail = [index for index, own in enumerate(owns) if own]
    if not with_tail:
        return None
    counts = [len(row.tokens) for row in rows]
    begins = [sum(counts[:index]) for index in range(len(rows))]
    most = max(counts[index] for index in with_tail)
    length = -(-max(len(owns[index]) for index in with_tail) // step) * step
    slots: list[int] = []
    tokens: list[int] = []
    seen: list[int] = []  # slots that each token may look at
    picked: list[int] = []
    targets: list[int] = []
    for place, index in enumerate(with_tail):
        own, count = owns[index], counts[index]
        # Padding with a slot of the row itself: nothing of another request can leak in.
        slots += own + [own[-1]] * (length - len(own))
        targets += range(begins[index], begins[index] + count)
        picked += range(place * most, place * most + count)
        for n in range(most):
            n = min(n, count - 1)
            tokens.append(begins[index] + n)
            seen.append(len(own) - count + n + 1)
    hidden = torch.arange(length)[None] >= torch.tensor(seen)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    all_in_order = tokens == targets == list(range(sum(counts)))
    return FlashTails(
        len(with_tail),
        length,
        torch.tensor(slots, device=device),
        torch.tensor(tokens, device=device),
        mask.view(len(with_tail), 1, most, length).to(device),
        None if all_in_order else torch.tensor(picked, device=device),
        None if all_in_order else torch.tensor(targets, device=device),
    )


def attend_flash(
    queries: torch.Tensor, pool: KVPool, layer: int, group: FlashGroup
) -> torch.Tensor:
    """Attention output for queries (kv heads, tokens, heads of a group, head dim), scaled already.

    Returns (tokens, heads, head dim).
    """
    kv_heads, count, heads, dim = queries.shape
    asked = queries.transpose(1, 2).reshape(1, kv_heads * heads, count, dim)  # a view as a rule
    mixed: torch.Tensor | None = None
    total: torch.Tensor | None = None
    for run in group.runs:
        if isinstance(run.slots, tuple):
            keys, values = pool.keys(layer, *run.slots), pool.values(layer, *run.slots)
        else:
            keys, values = pool.gather_keys(layer, run.slots), pool.gather_values(layer, run.slots)
        part = asked[:, :, run.begin : run.end]
        found, log_sum = _attend_run(part, keys, values, causal=run.causal)
        if mixed is None and run.end - run.begin == count:
            mixed, total = found, log_sum  # (tokens, heads, D), (tokens, heads)
            continue
        if mixed is None or total is None:
            mixed, total = _nothing(queries)
        rows = slice(run.begin, run.end)
        _merge(mixed[rows], total[rows], found, log_sum)
    if group.tails is not None:
        found, log_sum = _attend_tails(asked, pool, layer, group.tails)
        if mixed is None or total is None:
            if group.tails.targets is None:
                return found
            mixed, total = _nothing(queries)
        if group.tails.targets is None:
            _merge(mixed, total, found, log_sum)
        else:
            at = group.tails.targets
            before, sums = mixed[at], total[at]
            _merge(before, sums, found, log_sum)
            mixed.index_copy_(0, at, before)
    assert mixed is not None, "every token looks at something"
    return mixed


def _attend_run(
    asked: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """asked (1, heads, tokens, D) over (kv heads, n, D) -> (tokens, heads, D), (tokens, heads)."""
    _, heads, count, dim = asked.shape
    if causal or not 1 < count <= _MOST_FOLDED:
        found, log_sum = _kernel(asked, keys[None], values[None], causal=causal)
        return found[0].transpose(0, 1), log_sum[0].transpose(0, 1)
    # The heads of a group as further tokens: keys are then read once for all of them.
    folded = asked.reshape(1, len(keys), -1, dim)
    found, log_sum = _kernel(folded, keys[None], values[None], causal=False)
    found = found[0].reshape(heads, count, dim).transpose(0, 1)
    return found, log_sum[0].reshape(heads, count).transpose(0, 1)


def _nothing(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What has looked at no slot yet: (tokens, heads, D), and log-sums (tokens, heads)."""
    kv_heads, count, heads, dim = queries.shape
    mixed = queries.new_zeros(count, kv_heads * heads, dim)
    return mixed, mixed.new_full(mixed.shape[:2], float("-inf"), dtype=torch.float32)


def _merge(
    mixed: torch.Tensor, total: torch.Tensor, found: torch.Tensor, log_sum: torch.Tensor
) -> None:
    """Put what was found in further slots to what was found before, in place."""
    share = torch.sigmoid(log_sum - total)
    mixed.lerp_(found, share.to(found.dtype)[..., None])
    torch.logaddexp(total, log_sum, out=total)


def _attend_tails(
    asked: torch.Tensor, pool: KVPool, layer: int, tails: FlashTails
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over each row's own slots, for asked (1, heads, tokens, D): (n, heads, D), (n, heads)."""
    heads, dim = asked.shape[1], asked.shape[3]
    by_token = asked[0].transpose(0, 1)  # (tokens, heads, D)
    if tails.targets is not None:
        by_token = by_token[tails.tokens]
    queries = by_token.reshape(tails.rows, -1, heads, dim).transpose(1, 2)
    keys, values = (
        read(layer, tails.slots).unflatten(1, (tails.rows, tails.length)).transpose(0, 1)
        for read in (pool.gather_keys, pool.gather_values)
    )  # (rows, kv heads, length, D)
    found, log_sum = _kernel(queries, keys, values, causal=False, mask=tails.mask)
    found, log_sum = found.transpose(1, 2).flatten(0, 1), log_sum.transpose(1, 2).flatten(0, 1)
    if tails.picked is None:
        return found, log_sum
    return found[tails.picked], log_sum[tails.picked]


def _kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, heads, tokens, D) over (rows, kv heads, n, D) -> the same as the queries, lying token
    by token, and log-sums (rows, heads, tokens) in float32. `mask` (rows, 1, tokens, n) is added to
    the scores."""
    found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, attn_mask=mask, scale=1.0
    )
    return found, log_sum


@cache
def has_flash(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's kernel, which is private to it, is there and right: grouped heads, a
    causal run beside one that is not, a mask, log-sums."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 40, 32, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1, 2, 40, 32, generator=generator).to(dtype)
    try:
        found, log_sum = _kernel(queries, keys, values, causal=True)
        _, over_all = _kernel(queries, keys, values, causal=False)
        hidden = torch.zeros(1, 1, 40, 40)
        hidden[:, :, :, 30:] = float("-inf")
        _, over_some = _kernel(queries, keys, values, causal=False, mask=hidden)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    scores = queries.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3)
    masked = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))
    expected = masked.softmax(-1) @ values.double().repeat_interleave(2, 1)
    off = 1e-4 if dtype == torch.float32 else 0.05
    return (
        torch.allclose(found.double(), expected, atol=off)
        and torch.allclose(log_sum.double(), masked.logsumexp(-1), atol=off)
        and torch.allclose(over_all.double(), scores.logsumexp(-1), atol=off)
        and torch.allclose(over_some.double(), scores[..., :30].logsumexp(-1), atol=off)
    )
