"""Where keys and values live: a pool of token slots on the model's device, and the radix tree that
says which run of tokens each cached slot belongs to.

A slot holds the keys and values of one token in every layer. Slots are free, cached (owned by the
tree) or in use (owned by a running request): free + cached + in use = capacity, always. Runs are
stored as extents [start, end) of neighbouring slots, so that attention reads them without a gather.

The tree is that of SGLang's RadixAttention (Zheng et al., 2024): an edge is a run of tokens,
verified token by token; reference counts hold what running requests read; what nobody reads is
given up from the least recently used leaf's end.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

Extent = tuple[int, int]  # slots [start, end)


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many tokens the two begin with in common."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:  # the first `low` are equal, the first `high` are not
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def extents_length(extents: Sequence[Extent]) -> int:
    """Slots in all."""
    return sum(end - start for start, end in extents)


def cut_extents(extents: Sequence[Extent], length: int) -> tuple[list[Extent], list[Extent]]:
    """The first `length` slots, and the rest."""
    first: list[Extent] = []
    rest: list[Extent] = []
    for start, end in extents:
        middle = min(end, start + length)
        if middle > start:
            first.append((start, middle))
        if end > middle:
            rest.append((middle, end))
        length -= middle - start
    return first, rest


def join_extents(extents: Sequence[Extent]) -> list[Extent]:
    """The same slots in the same order, neighbours joined."""
    joined: list[Extent] = []
    for start, end in extents:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


class FreeSlots:
    """The free slots of a pool, as sorted extents that never touch one another."""

    def __init__(self, capacity: int) -> None:
        self._extents: list[Extent] = [(0, capacity)] if capacity else []
        self._capacity = capacity
        self.total = capacity

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._extents)

    @property
    def last(self) -> Extent:
        """The free slots at the pool's end."""
        if self._extents and self._extents[-1][1] == self._capacity:
            return self._extents[-1]
        return self._capacity, self._capacity

    def take(self, length: int, *, after: int | None = None) -> list[Extent]:
        """`length` slots in as few extents as can be, going on from slot `after` where that is free.

        The caller has made sure that there are enough.
        """
        assert 0 <= length <= self.total, f"{length} slots asked of {self.total} free"
        taken: list[Extent] = []
        self.total -= length
        if after is not None and length:
            at = bisect_left(self._extents, (after, after))
            if at < len(self._extents) and self._extents[at][0] == after:
                length -= self._take_from(at, length, taken)
        while length:
            sizes = [end - start for start, end in self._extents]
            fitting = [size for size in sizes if size >= length]
            # The smallest that fits keeps the large ones whole; failing that, the largest there is.
            size = min(fitting) if fitting else max(sizes)
            length -= self._take_from(sizes.index(size), length, taken)
        return taken

    def _take_from(self, at: int, length: int, taken: list[Extent]) -> int:
        start, end = self._extents[at]
        middle = min(end, start + length)
        taken.append((start, middle))
        if middle == end:
            del self._extents[at]
        else:
            self._extents[at] = (middle, end)
        return middle - start

    def give(self, extent: Extent) -> None:
        """Take slots back."""
        start, end = extent
        if start == end:
            return
        self.total += end - start
        at = bisect_left(self._extents, extent)
        assert at == len(self._extents) or end <= self._extents[at][0], "slots were freed twice"
        assert at == 0 or self._extents[at - 1][1] <= start, "slots were freed twice"
        if at < len(self._extents) and self._extents[at][0] == end:
            end = self._extents.pop(at)[1]
        if at and self._extents[at - 1][1] == start:
            start = self._extents.pop(at - 1)[0]
            at -= 1
        self._extents.insert(at, (start, end))


class Node:
    """A run of cached tokens behind its parent's, in slots [start, start + len(tokens))."""

    __slots__ = ("children", "last_used", "parent", "references", "start", "tokens")

    def __init__(self, tokens: list[int], start: int, parent: Node | None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.references = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Slots are tokens. `hit_tokens` of `asked_tokens` were found cached since the start."""

    capacity: int
    free: int
    cached: int
    in_use: int
    hit_tokens: int
    asked_tokens: int
    evicted_tokens: int
    bytes: int


class PrefixCache:
    """Slots and tree. Not thread-safe: the scheduler's loop alone touches it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = FreeSlots(capacity)
        self.root = Node([], 0, None)
        self.root.references = 1  # never evicted
        self.cached = 0
        self.evictable = 0
        self.hit_tokens = 0
        self.asked_tokens = 0
        self.evicted_tokens = 0
        self._clock = count(1)

    @property
    def in_use(self) -> int:
        return self.capacity - self.free.total - self.cached

    @property
    def available(self) -> int:
        """Slots that can be had at once: free, or cached and read by nobody."""
        return self.free.total + self.evictable

    def match_length(self, tokens: list[int]) -> int:
        """How many tokens of the beginning are cached. Changes nothing."""
        node, matched = self.root, 0
        while matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                break
            run = tokens[matched : matched + len(child.tokens)]
            shared = common_prefix(child.tokens, run)
            matched += shared
            if shared < len(child.tokens):
                break
            node = child
        return matched

    def match(self, tokens: list[int]) -> tuple[Node, list[Extent]]:
        """The deepest node of the longest cached beginning, and its slots; held until `release`.

        The caller gives only as many tokens as it may reuse.
        """
        node, extents = self._walk(tokens)
        self.acquire(node)
        self.asked_tokens += len(tokens)
        self.hit_tokens += extents_length(extents)
        return node, extents

    def insert(self, tokens: list[int], extents: list[Extent]) -> tuple[Node, list[Extent]]:
        """Hand the slots of the last tokens to the tree: `extents` hold as many tokens as the end
        of `tokens` that the caller computed itself; what is before them is cached and held.

        Where another request cached the same tokens meanwhile, its slots stay and these are freed.
        Returns the deepest node, held until `release`, and the slots of all `tokens`.
        """
        node, cached = self._walk(tokens)
        matched = extents_length(cached)
        own = extents_length(extents)
        assert matched >= len(tokens) - own, "a held beginning has left the tree"
        duplicate, fresh = cut_extents(extents, matched - (len(tokens) - own))
        for extent in duplicate:
            self.free.give(extent)
        for start, end in fresh:
            run = tokens[matched : matched + end - start]
            if node.end == start and node is not self.root and not node.children:
                node.tokens.extend(run)
            else:
                child = Node(run, start, node)
                node.children[run[0]] = child
                node = child
            node.last_used = next(self._clock)
            self.cached += len(run)
            if not node.references:
                self.evictable += len(run)
            matched += len(run)
        self.acquire(node)
        return node, join_extents([*cached, *fresh])

    def acquire(self, node: Node) -> None:
        """Hold a node and all before it."""
        now = next(self._clock)
        step: Node | None = node
        while step is not None:
            if not step.references:
                self.evictable -= len(step.tokens)
            step.references += 1
            step.last_used = now
            step = step.parent

    def release(self, node: Node) -> None:
        """Give up one hold of `match`, `insert` or `acquire`."""
        now = next(self._clock)
        step: Node | None = node
        while step is not None:
            step.references -= 1
            assert step.references >= 0, "a node was released more often than held"
            step.last_used = now
            if not step.references:
                self.evictable += len(step.tokens)
            step = step.parent

    def allocate(self, length: int, *, after: int | None = None) -> list[Extent] | None:
        """`length` slots for a request's own use, evicting what nobody holds. None: not enough."""
        if length > self.available:
            return None
        if length > self.free.total:
            self._evict(length - self.free.total)
        return self.free.take(length, after=after)

    def give_back(self, extents: Sequence[Extent]) -> None:
        """Slots of `allocate` that did not go to the tree."""
        for extent in extents:
            self.free.give(extent)

    def clear(self) -> None:
        """Forget everything cached and in use."""
        self.free = FreeSlots(self.capacity)
        self.root = Node([], 0, None)
        self.root.references = 1
        self.cached = self.evictable = 0

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _walk(self, tokens: list[int]) -> tuple[Node, list[Extent]]:
        """The longest cached beginning; a node that is left in its middle is split there."""
        node, matched, extents = self.root, 0, list[Extent]()
        while matched < len(tokens):
            child = node.children.get(tokens[matched])
            if child is None:
                break
            shared = common_prefix(child.tokens, tokens[matched : matched + len(child.tokens)])
            if shared < len(child.tokens):
                child = self._split(child, shared)
            extents.append((child.start, child.end))
            matched += shared
            node = child
        return node, join_extents(extents)

    def _split(self, node: Node, length: int) -> Node:
        """Put the first `length` tokens of a node into a new parent of it, and return that.

        The node itself stays the deeper one: who holds it keeps holding the whole run.
        """
        assert node.parent is not None
        upper = Node(node.tokens[:length], node.start, node.parent)
        upper.references, upper.last_used = node.references, node.last_used
        node.parent.children[upper.tokens[0]] = upper
        node.tokens = node.tokens[length:]
        node.start += length
        node.parent = upper
        upper.children[node.tokens[0]] = node
        return upper

    def _evict(self, length: int) -> None:
        """Free `length` cached slots, least recently used leaves first, each from its end."""
        order = count()
        leaves = [
            (node.last_used, next(order), node)
            for node in self.nodes()
            if not node.children and not node.references
        ]
        heapq.heapify(leaves)
        while length:
            _, _, node = heapq.heappop(leaves)
            cut = min(length, len(node.tokens))
            self.free.give((node.end - cut, node.end))
            self.cached -= cut
            self.evictable -= cut
            self.evicted_tokens += cut
            length -= cut
            parent = node.parent
            assert parent is not None
            if cut < len(node.tokens):
                del node.tokens[-cut:]
                continue
            del parent.children[node.tokens[0]]
            if not parent.children and not parent.references:
                heapq.heappush(leaves, (parent.last_used, next(order), parent))


class KVPool:
    """Keys and values of `capacity` token slots: one allocation for each layer and kind.

    Both are (kv heads, slots, head dim). Nothing is written at first, so that a system which hands
    out memory on first use (Linux, macOS) gives only what is used, or asked for by `touch`; no slot
    is read before it is written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | Sequence[torch.device],
        stored: torch.dtype | None = None,
    ) -> None:
        """`device` may be one for each layer. `stored` is what they are kept in where that is not
        the `dtype` they are read in."""
        self.capacity = capacity
        # oneDNN, which multiplies 16-bit numbers on a CPU, builds a kernel for every new shape, in
        # more time than many a product takes. Lengths are then rounded up to a multiple of this.
        devices = [device] * num_layers if isinstance(device, torch.device) else list(device)
        assert len(devices) == num_layers, "a device for each layer"
        self.devices: list[torch.device] = devices
        self.dtype = dtype  # of what is read
        self.padding = 64 if devices[0].type == "cpu" and dtype.itemsize == 2 else 1
        self._scratch = {of: torch.empty(0, dtype=dtype, device=of) for of in set(devices)}
        shape = (num_kv_heads, capacity, head_dim)
        kept = stored or dtype
        self._keys = [torch.empty(shape, dtype=kept, device=of) for of in devices]
        self._values = [torch.empty(shape, dtype=kept, device=of) for of in devices]

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def touch(self, start: int, end: int) -> None:
        """Have the system hand out the memory of slots [start, end), which nobody may be using."""
        for tensor in (*self._keys, *self._values):
            tensor[:, start:end] = 0

    def keys(self, layer: int, start: int, end: int) -> torch.Tensor:
        """(kv heads, end - start, head dim), a view."""
        return self._keys[layer][:, start:end]

    def values(self, layer: int, start: int, end: int) -> torch.Tensor:
        """(kv heads, end - start, head dim), a view."""
        return self._values[layer][:, start:end]

    def padded_keys(self, layer: int, start: int, end: int) -> torch.Tensor:
        """(kv heads, end - start rounded up, head dim), zeros at the end; valid until the next
        padded read. A view of the pool where nothing is rounded."""
        return self._padded(self.keys(layer, start, end))

    def padded_values(self, layer: int, start: int, end: int) -> torch.Tensor:
        """As `padded_keys`."""
        return self._padded(self.values(layer, start, end))

    def _padded(self, part: torch.Tensor) -> torch.Tensor:
        if self.padding == 1:
            return part
        # A product of a part of the pool would copy it anyway.
        copy = self._scratch_like(part)
        length = part.shape[1]
        copy[:, :length] = part
        copy[:, length:] = 0
        return copy

    def _scratch_like(self, part: torch.Tensor) -> torch.Tensor:
        """(kv heads, length rounded up, head dim), for the next padded read."""
        kv_heads, length, dim = part.shape
        padded = -(-length // self.padding) * self.padding
        size = kv_heads * padded * dim
        scratch = self._scratch[part.device]
        if scratch.numel() < size:
            scratch = self._scratch[part.device] = scratch.new_empty(size)
        return scratch[:size].view(kv_heads, padded, dim)

    def gather_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """(kv heads, n, head dim), a copy of the listed slots."""
        return self._keys[layer].index_select(1, slots)

    def gather_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """(kv heads, n, head dim), a copy of the listed slots."""
        return self._values[layer].index_select(1, slots)

    def write(
        self,
        layer: int,
        slots: torch.Tensor | Extent,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Store keys and values, each (tokens, kv heads, head dim), in an extent or listed slots."""
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        if isinstance(slots, tuple):
            start, end = slots
            self._keys[layer][:, start:end] = keys
            self._values[layer][:, start:end] = values
        else:
            self._keys[layer].index_copy_(1, slots, keys)
            self._values[layer].index_copy_(1, slots, values)
