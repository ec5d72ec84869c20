"""Decoding at a few fixed sizes, so that a GPU can replay a step as one CUDA graph.

A step of one token a row is padded to the next of BATCHES rows and LENGTHS slots a row, and then
has the shapes of every other step of that size. Padded rows write to, and padded columns read from,
a scratch slot that no request ever owns. Larger steps, drafts and prompts take the usual forward.

This has not been run on a GPU yet. What is tested, on a CPU, is all but the capture itself: which
size is chosen, that padding changes nothing, that only the rows' own slots and the scratch slot are
written. On CUDA each size is therefore compared with the usual forward before it is used, and where
it differs or can't be captured, graphs are given up with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rag.engine.attention import Chunk
from rag.engine.kvcache import KVPool

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# Each row gathers its own copy of what it reads; beyond this, shared beginnings are better read
# once by the usual forward.
MOST_SLOTS = 65_536


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """Tensors of one size. B rows, L slots a row."""

    ids: torch.Tensor  # (B,)
    positions: torch.Tensor  # (B,), float32, for RoPE
    written: torch.Tensor  # (B,) slots of the new tokens
    table: torch.Tensor  # (B, L) slots in the order of the row's tokens
    lengths: torch.Tensor  # (B,) how many of them are the row's

    def copy_(self, other: PaddedStep) -> None:
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.positions, self.written, self.table, self.lengths


def padded_size(chunks: Sequence[Chunk]) -> tuple[int, int] | None:
    """(rows, slots a row) that the step is padded to; None where it takes the usual forward."""
    if not chunks or any(len(chunk.tokens) != 1 or chunk.num_logits != 1 for chunk in chunks):
        return None
    longest = max(chunk.position for chunk in chunks) + 1
    rows = next((size for size in BATCHES if size >= len(chunks)), None)
    length = next((size for size in LENGTHS if size >= longest), None)
    if rows is None or length is None or rows * length > MOST_SLOTS:
        return None
    return rows, length


def pad_step(
    chunks: Sequence[Chunk], size: tuple[int, int], scratch: int, device: torch.device
) -> PaddedStep:
    """The step as tensors of `size`, filled up with the `scratch` slot."""
    rows, length = size
    table = torch.full((rows, length), scratch)
    lengths = [chunk.position + 1 for chunk in chunks]
    for row, chunk in enumerate(chunks):
        listed = torch.cat([torch.arange(start, end) for start, end in chunk.extents])
        table[row, : lengths[row]] = listed[: lengths[row]]
    empty = rows - len(chunks)
    written = [int(table[row, length - 1]) for row, length in enumerate(lengths)]
    places = [float(chunk.position + chunk.turn) for chunk in chunks]
    return PaddedStep(
        torch.tensor([chunk.tokens[0] for chunk in chunks] + [0] * empty, device=device),
        torch.tensor(places + [0.0] * empty, device=device),
        torch.tensor(written + [scratch] * empty, device=device),
        table.to(device),
        torch.tensor(lengths + [1] * empty, device=device),
    )


def attend_padded(
    queries: torch.Tensor, pool: KVPool, layer: int, step: PaddedStep
) -> torch.Tensor:
    """queries (kv heads, B, heads of a group, D), scaled already -> the same shape."""
    kv_heads, rows, heads, dim = queries.shape
    length = step.table.shape[1]
    slots = step.table.flatten()
    keys = pool.gather_keys(layer, slots).view(kv_heads * rows, length, dim)
    values = pool.gather_values(layer, slots).view(kv_heads * rows, length, dim)
    scores = torch.bmm(queries.reshape(kv_heads * rows, heads, dim), keys.transpose(1, 2))
    hidden = torch.arange(length, device=slots.device)[None] >= step.lengths[:, None]  # (B, L)
    scores = scores.view(kv_heads, rows, heads, length)
    scores = scores.masked_fill(hidden[None, :, None], float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).view(kv_heads * rows, heads, length), values)
    return mixed.view(queries.shape)


Forward = Callable[[PaddedStep, KVPool], torch.Tensor]


class DecodeGraphs:
    """Steps of `forward` over one pool, whose last slot is the scratch slot.

    With `capture` (CUDA) each size is captured once and replayed; without, `forward` is called.
    """

    def __init__(self, forward: Forward, pool: KVPool, *, capture: bool) -> None:
        self._forward = forward
        self._pool = pool
        self._capture = capture
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, PaddedStep, torch.Tensor]]
        self._graphs = {}
        self.scratch = pool.capacity - 1
        self.given_up = False
        one = torch.zeros(1, *pool.keys(0, 0, 1).shape[::2], dtype=pool.dtype)
        for layer, device in enumerate(pool.devices):
            # It is read behind a mask, and nothing times infinity would not be nothing.
            pool.write(layer, (self.scratch, self.scratch + 1), one.to(device), one.to(device))

    def run(
        self, chunks: Sequence[Chunk], usual: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """Logits (rows, vocabulary) of a decoding step; None where it takes the usual forward."""
        size = None if self.given_up else padded_size(chunks)
        if size is None:
            return None
        step = pad_step(chunks, size, self.scratch, self._pool.devices[0])
        if not self._capture:
            return self._forward(step, self._pool)[: len(chunks)]
        if size in self._graphs:
            return self._replay(size, step)[: len(chunks)]
        return self._first(size, step, usual())

    def _replay(self, size: tuple[int, int], step: PaddedStep) -> torch.Tensor:
        graph, inputs, logits = self._graphs[size]
        inputs.copy_(step)
        graph.replay()
        return logits.clone()  # the next replay writes over it

    def _first(
        self, size: tuple[int, int], step: PaddedStep, expected: torch.Tensor
    ) -> torch.Tensor:
        """Capture a size and compare; the answer is that of the usual forward."""
        try:
            for _ in range(2):  # libraries make their workspaces ready outside of the capture
                self._forward(step, self._pool)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._forward(step, self._pool)
            self._graphs[size] = (graph, step, logits)
            found = self._replay(size, step)[: len(expected)]
            problem = None if agree(found, expected) else "its logits differ"
        except RuntimeError as error:
            problem = str(error)
        if problem is not None:
            self.given_up = True
            self._graphs.clear()
            warnings.warn(
                f"decoding goes on without CUDA graphs: {size[0]} rows of {size[1]} slots could not "
                f"be replayed ({problem}). Answers are not affected.",
                stacklevel=2,
            )
        return expected


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways of computing the same logits differ by rounding only."""
    return bool((found - expected).abs().max() <= 0.05 * expected.abs().max())
