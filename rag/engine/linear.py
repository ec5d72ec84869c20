"""Matrix products with weights that are stored the way the device reads them fastest."""

from __future__ import annotations

from functools import cache

import torch


class Linear:
    """x (tokens, in) -> (tokens, out). Weights never change."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class PackedLinear:
    """The same with weights reordered once by oneDNN (CPU, bfloat16).

    With one row `F.linear` reads them at a quarter to half of the memory's bandwidth, this at
    nearly all of it. The operators are private to PyTorch; `packs` finds out whether they work.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return result


@cache
def packs() -> bool:
    """Whether this PyTorch has oneDNN's prepacked products and they give what F.linear gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    bias = torch.randn(32, generator=generator).bfloat16()
    try:
        packed = PackedLinear(weight, bias)(x)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        # Absent, renamed or built without oneDNN: F.linear then does the work, only slower.
        return False
    expected = torch.nn.functional.linear(x, weight, bias)
    return torch.allclose(packed.float(), expected.float(), rtol=0.02, atol=0.05)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear | PackedLinear:
    """The fastest product for this device and dtype. Takes weight (out, in)."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packs():
        return PackedLinear(weight.contiguous(), bias)
    return Linear(weight.contiguous(), bias)
