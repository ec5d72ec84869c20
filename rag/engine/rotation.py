"""Rotary positions (RoPE, Su et al., arXiv 2104.09864), with all that queries and keys are
multiplied with besides: the weights of their norms, and the queries' scale."""

from __future__ import annotations

import torch

_FEW_POSITIONS = 32  # up to so many, all layers at once cost fewer calls than memory


class Rotation:
    """The tables of one step. `of(layer)` gives those of its queries and of its keys."""

    def __init__(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        weights: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """`cos` and `sin` (T, D / 2), `weights` (layers, 2, D) of queries and keys, all float32;
        one layer stands for all where all are the same."""
        # x cos + rotate_half(x) sin, where rotate_half puts the second half, negative, first.
        self._cos = torch.cat((cos, cos), -1)[:, None]  # (T, 1, D)
        self._sin = torch.cat((-sin, sin), -1)[:, None]
        self._straight = weights[:, :, None, None]  # (layers, 2, 1, 1, D)
        self._crossed = self._straight.roll(cos.shape[1], -1)
        self._dtype = dtype
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None
        if len(cos) <= _FEW_POSITIONS or len(weights) == 1:
            self._all = self._tables(slice(None))

    def __len__(self) -> int:
        return len(self._cos)

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each (2, T, 1, D), for queries and keys: what their numbers are multiplied with, and what
        the numbers half a head on."""
        if self._all is None:
            return self._tables(layer)
        straight, crossed = self._all
        layer %= len(straight)
        return straight[layer], crossed[layer]

    def _tables(self, layers: int | slice) -> tuple[torch.Tensor, torch.Tensor]:
        straight = (self._cos * self._straight[layers]).to(self._dtype)
        crossed = (self._sin * self._crossed[layers]).to(self._dtype)
        return straight, crossed


def turned(heads: torch.Tensor, straight: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
    """heads (T, n, D), turned by tables (T, 1, D)."""
    half = heads.shape[-1] // 2
    result = heads * straight
    result[..., :half].addcmul_(heads[..., half:], crossed[..., :half])
    result[..., half:].addcmul_(heads[..., :half], crossed[..., half:])
    return result
