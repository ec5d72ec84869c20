"""Attention by the fused kernel is attention, wherever a row's slots lie."""

from __future__ import annotations

import pytest
import torch

from rag.engine.attention import Chunk, attend, plan_attention
from rag.engine.flash import FlashGroup, Run, flash_group, has_flash
from rag.engine.int8_pool import Int8KVPool
from rag.engine.kvcache import KVPool
from rag.engine.norm import rms_norm, rms_norm_heads

CPU = torch.device("cpu")
PLACES = {
    "a prompt at once": (0, [(7, 47)]),
    "behind a cached beginning beside it": (30, [(7, 77)]),
    "behind one elsewhere": (30, [(100, 130), (7, 47)]),
    "own slots in two places": (30, [(100, 130), (7, 27), (50, 70)]),
    "own slots in two places and nothing before": (0, [(7, 27), (50, 70)]),
    "behind many cached runs": (36, [(s, s + 6) for s in range(100, 190, 15)] + [(7, 47)]),
    "own slots in too many places": (0, [(s, s + 10) for s in (0, 20, 40, 60)]),
}


def filled(pool: KVPool) -> KVPool:
    generator = torch.Generator().manual_seed(0)
    capacity, dim = pool.capacity, pool.keys(0, 0, 1).shape[2]
    numbers = torch.randn(2, capacity, 2, dim, generator=generator).to(pool.dtype)
    pool.write(0, (0, capacity), numbers[0], numbers[1])
    return pool


def new_pool(dtype: torch.dtype, kind: type[KVPool] = KVPool, *, capacity: int = 200) -> KVPool:
    return filled(
        kind(num_layers=1, num_kv_heads=2, head_dim=32, capacity=capacity, dtype=dtype, device=CPU)
    )


def random_queries(count: int, dtype: torch.dtype) -> torch.Tensor:
    """(kv heads, count, heads of a group, D), scaled."""
    generator = torch.Generator().manual_seed(1)
    queries: torch.Tensor = torch.randn(2, count, 3, 32, generator=generator) * 32**-0.5
    return queries.to(dtype)


def attended(pool: KVPool, chunks: list[Chunk], *, flash: bool) -> torch.Tensor:
    plan = plan_attention(chunks, windows=[None], query_block=16, device=CPU, flash=flash)
    queries = random_queries(sum(len(chunk.tokens) for chunk in chunks), pool.dtype)
    return attend(queries, pool, 0, plan.groups[None])


def by_hand(pool: KVPool, chunk: Chunk, queries: torch.Tensor | None = None) -> torch.Tensor:
    """One softmax a token, in float64."""
    slots = [slot for start, end in chunk.extents for slot in range(start, end)]
    if queries is None:
        queries = random_queries(len(chunk.tokens), pool.dtype)
    keys, values = (
        read(0, 0, pool.capacity)[:, slots].double() for read in (pool.keys, pool.values)
    )
    rows = []
    for index in range(len(chunk.tokens)):
        seen = chunk.position + index + 1
        asked = queries[:, index].double()  # (kv heads, heads of a group, D)
        weights = (asked @ keys[:, :seen].transpose(1, 2)).softmax(-1)
        rows.append((weights @ values[:, :seen]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_sees_all_before_it_and_nothing_else(place: str, dtype: torch.dtype) -> None:
    assert has_flash(dtype)
    position, extents = PLACES[place]
    chunk = Chunk([1] * 40, position, extents)
    pool = new_pool(dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for flash in (True, False):
        found = attended(pool, [chunk], flash=flash).double()
        assert (found - by_hand(pool, chunk)).abs().max() < bound, flash


def test_runs_are_read_where_they_lie_and_only_the_own_ones_causally() -> None:
    group = flash_group(Chunk([1] * 40, 30, PLACES["own slots in two places"][1]), 5, CPU)
    assert group == FlashGroup(5, 45, (
        Run(0, 40, (100, 130), causal=False),
        Run(0, 20, (7, 27), causal=True),
        Run(20, 40, (7, 27), causal=False),
        Run(20, 40, (50, 70), causal=True),
    ))  # fmt: skip
    token = plan_attention(
        [Chunk([1], 69, [(0, 30), (50, 90)])],
        windows=[None],
        query_block=16,
        device=CPU,
        flash=True,
    )
    assert token.groups[None] == (FlashGroup(0, 1, (
        Run(0, 1, (0, 30), causal=False),
        Run(0, 1, (50, 90), causal=False),
    )),)  # fmt: skip
    assert (
        flash_group(Chunk([1] * 40, 0, PLACES["own slots in too many places"][1]), 0, CPU) is None
    )


def test_eight_bit_keys_go_through_the_same_kernel() -> None:
    pool = new_pool(torch.bfloat16, Int8KVPool)
    chunk = Chunk([1] * 40, 30, [(100, 130), (7, 47)])
    found = attended(pool, [chunk], flash=True).double()
    assert (found - by_hand(pool, chunk)).abs().max() < 0.03


ROWS = {
    "nothing in common": [Chunk([1], 50, [(0, 51)]), Chunk([1, 2], 60, [(100, 162)])],
    "a long beginning in common": [
        Chunk([1], 60, [(0, 50), (90, 101)]),
        Chunk([1, 2, 3], 9, [(180, 192)]),
        Chunk([1, 2], 51, [(0, 50), (120, 123)]),
    ],
    "the last row shorter than the others": [
        Chunk([1, 2, 3], 53, [(0, 50), (90, 96)]),
        Chunk([1, 2], 51, [(0, 50), (120, 123)]),
    ],
    "one beginning inside another": [
        Chunk([1], 50, [(0, 50), (90, 91)]),
        Chunk([1], 40, [(0, 40), (101, 102)]),
        Chunk([1, 2], 50, [(0, 52)]),
    ],
    "own slots too many to gather": [
        Chunk([1, 2], 380, [(0, 50), (200, 532)]),
        Chunk([1], 50, [(0, 50), (90, 91)]),
        Chunk([1, 2, 3], 345, [(600, 940), (100, 108)]),
    ],
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_step_each_see_their_own(case: str, dtype: torch.dtype) -> None:
    """Against each row alone, with the queries that it has in the step."""
    rows = ROWS[case]
    pool = new_pool(dtype, capacity=1000)
    plan = plan_attention(rows, windows=[None], query_block=16, device=CPU, flash=True)
    assert all(isinstance(group, FlashGroup) for group in plan.groups[None])
    count = sum(len(row.tokens) for row in rows)
    queries = random_queries(count, dtype)
    found = attend(queries, pool, 0, plan.groups[None]).double()
    at = 0
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for index in plan.order:
        length = len(rows[index].tokens)
        expected = by_hand(pool, rows[index], queries[:, at : at + length])
        assert (found[at : at + length] - expected).abs().max() < bound
        at += length


def test_what_rows_share_is_read_once() -> None:
    rows = ROWS["a long beginning in common"]
    plan = plan_attention(rows, windows=[None], query_block=16, device=CPU, flash=True)
    (group,) = plan.groups[None]
    assert plan.order == (0, 2, 1) and isinstance(group, FlashGroup)
    assert group.runs == (Run(0, 3, (0, 50), causal=False),)
    tails = group.tails
    assert tails is not None and (tails.rows, tails.length) == (3, 32)
    assert tails.slots.view(3, 32)[1].tolist() == [120, 121] + [122] * 30
    assert tails.tokens.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 5]
    seen = (tails.mask == 0).sum(-1).flatten().tolist()
    assert seen == [11, 11, 11, 2, 3, 3, 10, 11, 12]
    assert tails.picked is not None and tails.picked.tolist() == [0, 3, 4, 6, 7, 8]


def test_norms_of_many_rows_in_bfloat16_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(80, 32, 64, generator=generator) * 0.01).bfloat16()
    weight = torch.ones(64).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-4).rsqrt()
    for found, expected in (
        (rms_norm(x, weight, 1e-4), exact),
        (rms_norm_heads(x, 24, 1e-4), exact[:, :24]),
    ):
        # bfloat16 has 8 bits: half a step is at most 1 / 256 of a number.
        assert ((found.double() - expected).abs() <= expected.abs() / 256 + 1e-6).all()
