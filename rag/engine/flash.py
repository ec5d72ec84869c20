"""Attention of a prompt's tokens by PyTorch's fused kernel for CPUs, run of slots by run of slots.

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
class FlashGroup:
    """Tokens [begin, end) of the step, one row's, and what they look at."""

    begin: int
    end: int
    runs: tuple[Run, ...]


def flash_group(chunk: Chunk, begin: int, device: torch.device) -> FlashGroup | None:
    """The group of a chunk whose tokens stand in the step from `begin` on. None where its own slots
    lie in too many places."""
    count = len(chunk.tokens)
    # One token sees its own slot like all others.
    before, own = cut_extents(chunk.extents, chunk.position + (count == 1))
    if len(own) > _MOST_OWN_RUNS:
        return None
    runs: list[Run] = []
    if len(before) > _MOST_RUNS:
        listed = torch.cat([torch.arange(start, end) for start, end in before])
        runs.append(Run(0, count, listed.to(device), causal=False))
    else:
        runs.extend(Run(0, count, extent, causal=False) for extent in before)
    at = 0
    for start, end in own:
        done = at + end - start
        runs.append(Run(at, done, (start, end), causal=True))
        if done < count:
            runs.append(Run(done, count, (start, end), causal=False))
        at = done
    return FlashGroup(begin, begin + count, tuple(runs))


def attend_flash(
    queries: torch.Tensor, pool: KVPool, layer: int, runs: Sequence[Run]
) -> torch.Tensor:
    """Attention output for queries (kv heads, tokens, heads of a group, head dim), scaled already.

    Returns (tokens, heads, head dim), contiguous.
    """
    kv_heads, count, heads, dim = queries.shape
    asked = queries.transpose(1, 2).reshape(1, kv_heads * heads, count, dim)  # a view as a rule
    mixed, total = queries.new_empty(0), queries.new_empty(0)
    for index, run in enumerate(runs):
        if isinstance(run.slots, tuple):
            keys, values = pool.keys(layer, *run.slots), pool.values(layer, *run.slots)
        else:
            keys, values = pool.gather_keys(layer, run.slots), pool.gather_values(layer, run.slots)
        part = asked[:, :, run.begin : run.end]
        found, log_sum = _kernel(part, keys[None], values[None], causal=run.causal)
        found, log_sum = found[0].transpose(0, 1), log_sum[0].transpose(0, 1)
        if not index and run.end - run.begin == count:
            mixed, total = found, log_sum  # (tokens, heads, D), (tokens, heads)
            continue
        if not index:
            mixed = queries.new_zeros(count, kv_heads * heads, dim)
            total = log_sum.new_full((count, kv_heads * heads), float("-inf"))
        rows = slice(run.begin, run.end)
        share = torch.sigmoid(log_sum - total[rows])
        mixed[rows].lerp_(found, share.to(found.dtype)[..., None])
        if index + 1 < len(runs):
            total[rows] = torch.logaddexp(total[rows], log_sum)
    return mixed


def _kernel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, heads, tokens, D) over (1, kv heads, n, D) -> the same as the queries, lying token by
    token, and log-sums (1, heads, tokens) in float32."""
    found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, scale=1.0
    )
    return found, log_sum


@cache
def has_flash(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's kernel, which is private to it, is there and right: grouped heads, a
    causal run beside one that is not, log-sums."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 4, 40, 32, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1, 2, 40, 32, generator=generator).to(dtype)
    try:
        found, log_sum = _kernel(queries, keys, values, causal=True)
        _, over_all = _kernel(queries, keys, values, causal=False)
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
    )
