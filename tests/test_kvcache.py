"""Slots are never lost or given twice, and the tree finds what a dictionary would."""

from __future__ import annotations

import random

import pytest
import torch

from rag.engine.kvcache import (
    FreeSlots,
    KVPool,
    Node,
    PrefixCache,
    common_prefix,
    cut_extents,
    extents_length,
    join_extents,
)


def slots_of(extents: list[tuple[int, int]]) -> list[int]:
    return [slot for start, end in extents for slot in range(start, end)]


def cache_tokens(cache: PrefixCache, tokens: list[int]) -> list[int]:
    """Put tokens into the tree as a request would, and let go of them. Returns their slots."""
    node, extents = cache.match(tokens)
    own = cache.allocate(len(tokens) - extents_length(extents))
    assert own is not None
    deeper, extents = cache.insert(tokens, own)
    cache.release(node)
    cache.release(deeper)
    return slots_of(extents)


def test_common_prefix_finds_the_first_difference() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 3
    for at in range(9):
        changed = list(range(9))
        changed[at] = -1
        assert common_prefix(list(range(9)), changed) == at


def test_extents_cut_and_join_keep_their_slots() -> None:
    extents = [(3, 6), (6, 8), (1, 2)]
    assert join_extents(extents) == [(3, 8), (1, 2)]
    assert cut_extents(extents, 4) == ([(3, 6), (6, 7)], [(7, 8), (1, 2)])
    assert cut_extents(extents, 0) == ([], extents)


def test_slots_go_on_where_asked_then_fit_best() -> None:
    free = FreeSlots(100)
    assert free.take(10) == [(0, 10)]
    assert free.take(30) == [(10, 40)]
    free.give((0, 10))
    assert free.take(5, after=40) == [(40, 45)]
    assert free.take(8) == [(0, 8)]  # the hole of 10 fits better than the 55 at the end
    assert free.take(56) == [(45, 100), (8, 9)]
    with pytest.raises(AssertionError, match="freed twice"):
        free.give((0, 9))
        free.give((3, 4))


def test_the_free_slots_at_the_end_of_a_pool() -> None:
    free = FreeSlots(100)
    assert free.last == (0, 100)
    free.take(40)
    assert free.last == (40, 100)
    free.give((10, 20))
    assert free.last == (40, 100)
    free.take(60)
    assert list(free) == [(10, 20)] and free.last == (100, 100)
    free.take(10)
    assert free.last == (100, 100)
    free.give((90, 100))
    assert free.last == (90, 100)


def test_a_cached_beginning_is_found_and_its_slots_are_its_own() -> None:
    cache = PrefixCache(32)
    slots = cache_tokens(cache, [1, 2, 3, 4, 5])
    assert slots == [0, 1, 2, 3, 4]
    assert cache.match_length([1, 2, 3, 9]) == 3
    node, extents = cache.match([1, 2, 3, 9])
    assert (node.tokens, slots_of(extents)) == ([1, 2, 3], [0, 1, 2])
    assert (cache.cached, cache.evictable, cache.in_use) == (5, 2, 0)
    cache.release(node)
    assert cache.match_length([2]) == 0
    # A turn that goes on is stored as one longer run, in neighbouring slots.
    assert cache_tokens(cache, [1, 2, 3, 4, 5, 6, 7]) == [0, 1, 2, 3, 4, 5, 6]


def test_what_two_requests_computed_at_once_is_kept_once() -> None:
    cache = PrefixCache(32)
    first, second = cache.allocate(4), cache.allocate(6)
    assert first is not None and second is not None
    cache.insert([1, 2, 3, 4], first)
    _, extents = cache.insert([1, 2, 3, 4, 5, 6], second)
    assert slots_of(extents) == [0, 1, 2, 3, 8, 9]
    assert (cache.cached, cache.in_use, cache.free.total) == (6, 0, 26)


def test_the_least_recently_used_goes_first_and_what_is_held_stays() -> None:
    cache = PrefixCache(12)
    cache_tokens(cache, [1, 1, 1, 1])
    cache_tokens(cache, [2, 2, 2, 2])
    cache_tokens(cache, [3, 3, 3, 3])
    held, _ = cache.match([2, 2, 2, 2])
    cache.release(cache.match([1, 1, 1, 1])[0])
    assert cache.available == 8
    assert cache.allocate(9) is None
    taken = cache.allocate(6)  # all four 3s, then two 1s from their end
    assert taken is not None
    assert cache.match_length([3]) == 0
    assert cache.match_length([1, 1, 1, 1]) == 2
    assert cache.match_length([2, 2, 2, 2]) == 4
    assert cache.evicted_tokens == 6
    cache.release(held)
    cache.give_back(taken)
    assert cache.available == 12


def check(cache: PrefixCache, own: list[int]) -> None:
    """Every slot belongs to exactly one owner; counters equal what is there."""
    nodes = list(cache.nodes())
    cached = [slot for node in nodes for slot in range(node.start, node.end)]
    free = slots_of(list(cache.free))
    assert sorted(cached + free + own) == list(range(cache.capacity))
    assert (cache.cached, cache.in_use) == (len(cached), len(own))
    assert cache.free.total == len(free)
    assert cache.evictable == sum(len(node.tokens) for node in nodes if not node.references)
    for node in nodes:
        assert node.tokens and node.parent is not None
        assert node.parent.children[node.tokens[0]] is node
        assert node.parent is cache.root or node.parent.references >= node.references


def test_ten_thousand_random_operations_agree_with_a_dictionary() -> None:
    """The dictionary: for every slot, the whole token run that led to what is stored in it."""
    rng = random.Random(4)
    cache = PrefixCache(96)
    content: dict[int, tuple[int, ...]] = {}
    running: list[tuple[Node, list[int], list[tuple[int, int]]]] = []
    own: list[int] = []
    for operation in range(10_000):
        if running and rng.random() < 0.5:
            node, tokens, extents = running.pop(rng.randrange(len(running)))
            own = [slot for slot in own if slot not in set(slots_of(extents))]
            if rng.random() < 0.3:  # cancelled: nothing is kept
                cache.give_back(extents)
            else:  # finished, maybe before it used all it had asked for
                used = rng.randint(0, extents_length(extents))
                before = len(tokens) - extents_length(extents)
                kept, unused = cut_extents(extents, used)
                cache.give_back(unused)
                tokens = tokens[: before + used]
                for slot, length in zip(
                    slots_of(kept), range(before + 1, before + used + 1), strict=True
                ):
                    content[slot] = tuple(tokens[:length])
                deeper, _ = cache.insert(tokens, kept)
                cache.release(deeper)
            cache.release(node)
        else:
            tokens = [rng.randint(0, 2) for _ in range(rng.randint(1, 24))]
            expected = cache.match_length(tokens)
            node, extents = cache.match(tokens)
            found = slots_of(extents)
            assert len(found) == expected
            for length, slot in enumerate(found, 1):
                assert content[slot] == tuple(tokens[:length])
            after = found[-1] + 1 if found and rng.random() < 0.7 else None
            taken = cache.allocate(len(tokens) - len(found), after=after)
            if taken is None:
                assert len(tokens) - len(found) > cache.available
                cache.release(node)
            else:
                own += slots_of(taken)
                running.append((node, tokens, taken))
        if operation % 10 == 0:
            check(cache, own)
    for node, _, extents in running:
        cache.give_back(extents)
        cache.release(node)
    check(cache, [])
    assert cache.available == cache.capacity
    assert cache.evicted_tokens > 1000 and cache.hit_tokens > 1000  # the test went where it should


def test_the_pool_gives_back_what_was_written() -> None:
    pool = KVPool(
        num_layers=2, num_kv_heads=2, head_dim=4, capacity=40,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    pool.write(1, (10, 13), keys, values)
    pool.write(1, torch.tensor([20, 5, 6]), keys, values)
    assert torch.equal(pool.keys(1, 10, 13), keys.transpose(0, 1))
    assert torch.equal(pool.values(1, 10, 13), values.transpose(0, 1))
    assert torch.equal(pool.keys(1, 5, 7), keys[1:].transpose(0, 1))
    assert torch.equal(pool.gather_values(1, torch.tensor([6, 20])), values[[2, 0]].transpose(0, 1))
    assert pool.bytes == 2 * 2 * 2 * 4 * 40 * 4
