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


class Int8Linear:
    """The same with weights in 8 bits and one scale for each output: half the memory of bfloat16.

    Weights are rounded to the nearest of 255 steps; the scale is a number of the compute dtype, so
    that it adds no error of its own. Few rows go through PyTorch's packed product where there is
    one (CPU, bfloat16); more are multiplied with the weights turned back, one matrix at a time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        largest = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12)
        # Rounded up, or the largest weight would fall outside of the 127 steps.
        scale = (largest * (1.01 / 127)).to(weight.dtype)
        self._weight = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        self._scale = scale[:, 0]
        self._bias = bias
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self._packed = fits and has_int8_product()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed and x.shape[0] <= _INT8_ROWS:
            result = torch._weight_int8pack_mm(x, self._weight, self._scale)
        else:
            result = torch.nn.functional.linear(x, self._weight.to(x.dtype)) * self._scale
        return result if self._bias is None else result + self._bias


_INT8_ROWS = 4  # above, turning the weights back costs less than the packed product's arithmetic


@cache
def has_int8_product() -> bool:
    """Whether this PyTorch's private 8-bit product is there and right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, generator=generator).bfloat16()
    weight = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = torch.full((32,), 0.0078125, dtype=torch.bfloat16)
    try:
        found = torch._weight_int8pack_mm(x, weight, scale)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    expected = (x.float() @ weight.float().T) * scale.float()
    return torch.allclose(found.float(), expected, rtol=0.02, atol=0.05)


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


Product = Linear | PackedLinear | Int8Linear


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False
) -> Product:
    """The fastest product for this device and dtype. Takes weight (out, in)."""
    if int8:
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packs():
        return PackedLinear(weight.contiguous(), bias)
    return Linear(weight.contiguous(), bias)
