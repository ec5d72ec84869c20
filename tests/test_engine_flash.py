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


def new_pool(dtype: torch.dtype, kind: type[KVPool] = KVPool) -> KVPool:
    return filled(
        kind(num_layers=1, num_kv_heads=2, head_dim=32, capacity=200, dtype=dtype, device=CPU)
    )


def attended(pool: KVPool, chunks: list[Chunk], *, flash: bool) -> torch.Tensor:
    plan = plan_attention(chunks, windows=[None], query_block=16, device=CPU, flash=flash)
    count = sum(len(chunk.tokens) for chunk in chunks)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, count, 3, 32, generator=generator).to(pool.dtype) * 32**-0.5
    return attend(queries, pool, 0, plan.groups[None])


def by_hand(pool: KVPool, chunk: Chunk) -> torch.Tensor:
    """One softmax a token, in float64."""
    slots = [slot for start, end in chunk.extents for slot in range(start, end)]
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, len(chunk.tokens), 3, 32, generator=generator).to(pool.dtype)
    keys, values = pool.keys(0, 0, 200)[:, slots].double(), pool.values(0, 0, 200)[:, slots]
    rows = []
    for index in range(len(chunk.tokens)):
        seen = chunk.position + index + 1
        asked = queries[:, index].double() * 32**-0.5  # (kv heads, heads of a group, D)
        weights = (asked @ keys[:, :seen].transpose(1, 2)).softmax(-1)
        rows.append((weights @ values[:, :seen].double()).flatten())
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
    token = flash_group(Chunk([1], 69, [(0, 30), (50, 90)]), 0, CPU)
    assert token is not None
    assert [run.slots for run in token.runs] == [(0, 30), (50, 90)]
    assert flash_group(Chunk([1] * 40, 0, PLACES["own slots in too many places"][1]), 0, CPU) is None


def test_eight_bit_keys_go_through_the_same_kernel() -> None:
    pool = new_pool(torch.bfloat16, Int8KVPool)
    chunk = Chunk([1] * 40, 30, [(100, 130), (7, 47)])
    found = attended(pool, [chunk], flash=True).double()
    assert (found - by_hand(pool, chunk)).abs().max() < 0.03


def test_rows_with_nothing_in_common_are_attended_one_by_one() -> None:
    rows = [Chunk([1], 50, [(0, 51)]), Chunk([1, 2], 60, [(100, 162)])]
    plan = plan_attention(rows, windows=[None], query_block=16, device=CPU, flash=True)
    assert [type(group) for group in plan.groups[None]] == [FlashGroup, FlashGroup]
    pool = new_pool(torch.float32)
    together = attended(pool, rows, flash=True)
    torch.testing.assert_close(together, attended(pool, rows, flash=False))
    shared = [Chunk([1], 50, [(0, 51)]), Chunk([1], 40, [(0, 40), (60, 61)])]
    plan = plan_attention(shared, windows=[None], query_block=16, device=CPU, flash=True)
    (group,) = plan.groups[None]
    assert not isinstance(group, FlashGroup) and group.parts[0].length == 40  # read once for both


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
