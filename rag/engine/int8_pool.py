"""Keys and values in 8 bits: a pool that holds nearly twice the tokens in the same memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rag.engine.kvcache import Extent, KVPool


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the scales are stored in. float16 could not hold the scale of a small key."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class Int8KVPool(KVPool):
    """KVPool that stores each token's key and value of each head as 8-bit numbers and a scale.

    What is written is rounded once to the nearest of 255 steps; every read, the writing step's own
    included, sees the rounded numbers, so that a cached prompt still gives what a fresh one gives.
    Reads are turned back, a run of slots at a time, into the scratch that 16-bit reads on a CPU
    are copied to as well.
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
    ) -> None:
        super().__init__(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            capacity=capacity,
            dtype=dtype,
            device=device,
            stored=torch.int8,
        )
        shape = (num_kv_heads, capacity, 1)
        kept = scale_dtype(dtype)
        self._key_scales = [torch.empty(shape, dtype=kept, device=of) for of in self.devices]
        self._value_scales = [torch.empty(shape, dtype=kept, device=of) for of in self.devices]

    @property
    def bytes(self) -> int:
        scales = (*self._key_scales, *self._value_scales)
        return super().bytes + sum(tensor.nbytes for tensor in scales)

    def keys(self, layer: int, start: int, end: int) -> torch.Tensor:
        """(kv heads, end - start, head dim), a copy."""
        part, scales = self._keys[layer][:, start:end], self._key_scales[layer][:, start:end]
        return (part * scales).to(self.dtype)

    def values(self, layer: int, start: int, end: int) -> torch.Tensor:
        """(kv heads, end - start, head dim), a copy."""
        part, scales = self._values[layer][:, start:end], self._value_scales[layer][:, start:end]
        return (part * scales).to(self.dtype)

    def padded_keys(self, layer: int, start: int, end: int) -> torch.Tensor:
        part, scales = self._keys[layer][:, start:end], self._key_scales[layer][:, start:end]
        return self._turned_back(part, scales)

    def padded_values(self, layer: int, start: int, end: int) -> torch.Tensor:
        part, scales = self._values[layer][:, start:end], self._value_scales[layer][:, start:end]
        return self._turned_back(part, scales)

    def _turned_back(self, part: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        copy = self._scratch_like(part)
        length = part.shape[1]
        torch.mul(part, scales, out=copy[:, :length])
        copy[:, length:] = 0
        return copy

    def gather_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        found = self._keys[layer].index_select(1, slots)
        return (found * self._key_scales[layer].index_select(1, slots)).to(self.dtype)

    def gather_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        found = self._values[layer].index_select(1, slots)
        return (found * self._value_scales[layer].index_select(1, slots)).to(self.dtype)

    def write(
        self,
        layer: int,
        slots: torch.Tensor | Extent,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        for stored, scales, new in (
            (self._keys[layer], self._key_scales[layer], keys),
            (self._values[layer], self._value_scales[layer], values),
        ):
            rounded, scale = _rounded(new.transpose(0, 1), scales.dtype)
            if isinstance(slots, tuple):
                start, end = slots
                stored[:, start:end] = rounded
                scales[:, start:end] = scale
            else:
                stored.index_copy_(1, slots, rounded)
                scales.index_copy_(1, slots, scale)


def _rounded(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., dim) -> the same in 8 bits, and scales (..., 1) of `dtype`."""
    numbers = numbers.float()
    # Rounded to its own dtype before it is used, so that it adds no error of its own. NaN goes on
    # into the scale: what was no number must not become one.
    scale = (numbers.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127).to(dtype)
    return (numbers / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale
