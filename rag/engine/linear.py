"""Matrix products with weights that are stored the way the device reads them fastest."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from rag.errors import GeneratorError


class Linear:
    """x (tokens, in) -> (tokens, out). Weights never change."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product and `other`, which has its shape."""
        return other + self(x)


class PackedLinear:
    """The same with weights reordered once by oneDNN (CPU, bfloat16).

    With one row `F.linear` reads them at a quarter to half of the memory's bandwidth, this at
    nearly all of it. The operators are private to PyTorch; `packs` finds out whether they work.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._pointwise(x, "none")

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """SiLU of the product, rounded once."""
        return self._pointwise(x, "swish")

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product and `other`, which has its shape, rounded once."""
        return self._with(x, other, "add")

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product, number by number multiplied with `other`, rounded once."""
        return self._with(x, other, "mul")

    def _pointwise(self, x: torch.Tensor, behind: str) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, behind, [], ""
        )
        return result

    def _with(self, x: torch.Tensor, other: torch.Tensor, behind: str) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, behind
        )
        return result


class Int8Linear:
    """The same with weights in 8 bits and one scale for each output: half the memory of bfloat16.

    Weights are rounded to the nearest of 255 steps; the scale is a number of the compute dtype, so
    that it adds no error of its own. Few rows go through PyTorch's packed product where there is
    one (CPU, bfloat16); more are multiplied with the weights turned back, one matrix at a time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        largest = weight.abs().amax(1, keepdim=True).float().clamp_min(1e-12)
        # Rounded up, or the largest weight would fall outside of the 127 steps.
        scale = (largest * (1.01 / 127)).to(weight.dtype)
        self._weight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for begin in range(0, len(weight), _ROWS_AT_ONCE):  # no second copy in float32
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            steps = weight[rows].float() / scale[rows].float()
            self._weight[rows] = steps.round_().clamp_(-127, 127)
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

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product and `other`, which has its shape."""
        return other + self(x)


_ROWS_AT_ONCE = 4096  # of a matrix that is being rounded
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


class Int4Linear:
    """The same with weights in 4 bits: a step and a lowest value for every INT4_GROUP weights of an
    output, 5 bits a weight in all where these two are 16-bit numbers.

    Stored as PyTorch's CPU product reads it with AVX512: (outputs / 64, inputs, 32), two outputs
    that are 32 apart in a byte. Few rows go through that product where it is there and reads it so
    (bfloat16); more, and all on other devices, are multiplied with the weights turned back, one
    matrix at a time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._outputs, inputs = weight.shape
        if inputs % INT4_GROUP:
            raise GeneratorError(
                f"4-bit weights come in groups of {INT4_GROUP}, and a matrix of this model has "
                f"{inputs} inputs. Choose dtype int8 or bfloat16."
            )
        blocks = -(-self._outputs // 64)
        self._packed = weight.new_empty((blocks, inputs, 32), dtype=torch.uint8)
        # (groups, outputs, 2): step, and what the eighth of the 16 values stands for.
        self._steps = weight.new_zeros((inputs // INT4_GROUP, blocks * 64, 2))
        for block in range(0, blocks, _ROWS_AT_ONCE // 64):
            rows = slice(block * 64, block * 64 + _ROWS_AT_ONCE)
            self._round(weight[rows], block)
        self._bias = bias
        fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self._has_product = fits and has_int4_product()

    def _round(self, weight: torch.Tensor, block: int) -> None:
        """Store some rows, which begin at outputs `block` * 64."""
        grouped = weight.float().view(len(weight), -1, INT4_GROUP)
        levels, step, middle = _in_16_levels(grouped, weight.dtype)
        at = slice(block * 64, block * 64 + len(weight))
        self._steps[:, at] = torch.stack((step, middle), -1).transpose(0, 1)
        flat = torch.nn.functional.pad(levels.flatten(1), (0, 0, 0, -len(weight) % 64))
        halves = flat.view(-1, 2, 32, flat.shape[1]).permute(0, 1, 3, 2)  # (blocks, 2, inputs, 32)
        packed = halves[:, 0] | (halves[:, 1] << 4)
        self._packed[block : block + len(packed)] = packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._has_product and x.shape[0] <= _INT4_ROWS:
            flat = self._packed.view(self._packed.shape[0] * 64, -1)
            result = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), flat, INT4_GROUP, self._steps
            )
        else:
            result = x @ self.turned_back()
        wanted: torch.Tensor = result[:, : self._outputs]
        return wanted if self._bias is None else wanted + self._bias

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The product and `other`, which has its shape."""
        return other + self(x)

    def turned_back(self) -> torch.Tensor:
        """(inputs, outputs rounded up to 64)."""
        blocks, inputs, _ = self._packed.shape
        dtype = self._steps.dtype
        levels = torch.empty(inputs, blocks, 2, 32, dtype=dtype, device=self._packed.device)
        packed = self._packed.transpose(0, 1)
        levels[:, :, 0].copy_((packed & 15).view(torch.int8).sub_(8))
        levels[:, :, 1].copy_((packed >> 4).view(torch.int8).sub_(8))
        step, middle = self._steps.unbind(-1)
        grouped = levels.view(-1, INT4_GROUP, blocks * 64)
        weight = torch.addcmul(middle.contiguous()[:, None], grouped, step.contiguous()[:, None])
        return weight.view(inputs, blocks * 64)


INT4_GROUP = 32
_INT4_ROWS = 32  # above, turning the weights back costs less than the packed product's arithmetic
# Shares of a group's range that the 16 values are spread over: its ends are rare.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)


def _in_16_levels(
    grouped: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups (outputs, groups, weights of a group), float32 -> levels 0 to 15 (uint8) with step and
    middle (outputs, groups), so that a weight is about (level - 8) * step + middle.

    Of several spreads each group takes the one with the smallest squared error. Step and middle
    are rounded to `dtype` before the levels are chosen, so that this adds no error of its own.
    """
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    best: tuple[torch.Tensor, ...] | None = None
    for share in _SHARES:
        step = ((high - low) * (share / 15)).clamp_min(1e-8).to(dtype).float()
        middle = ((high + low) / 2 + step / 2).to(dtype).float()
        levels = ((grouped - middle) / step).round_().clamp_(-8, 7)
        error = (levels * step + middle - grouped).square_().sum(-1, keepdim=True)
        found = (error, levels, step, middle)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
    assert best is not None
    _, levels, step, middle = best
    return (levels + 8).to(torch.uint8), step[..., 0].to(dtype), middle[..., 0].to(dtype)


@cache
def has_int4_product() -> bool:
    """Whether this PyTorch's private 4-bit product is there, reads the layout that is written here
    (others with AVX2 or without either), and is right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, generator=generator).bfloat16()
    linear = Int4Linear.__new__(Int4Linear)
    linear._packed = torch.randint(0, 256, (2, 64, 32), generator=generator).to(torch.uint8)
    linear._steps = torch.rand(64 // INT4_GROUP, 128, 2, generator=generator).bfloat16()
    try:
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, linear._packed.view(128, -1), INT4_GROUP, linear._steps
        )
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    expected = x.float() @ linear.turned_back().float()
    return torch.allclose(found.float(), expected, rtol=0.02, atol=0.5)


@cache
def packs() -> bool:
    """Whether this PyTorch has oneDNN's prepacked products and they give what F.linear gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    weight = torch.randn(32, 64, generator=generator).bfloat16()
    bias = torch.randn(32, generator=generator).bfloat16()
    other = torch.randn(3, 32, generator=generator).bfloat16()
    try:
        linear = PackedLinear(weight, bias)
        packed, silu = linear(x), linear.silu(x)
        summed, multiplied = linear.plus(x, other), linear.times(x, other)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        # Absent, renamed or built without oneDNN: F.linear then does the work, only slower.
        return False
    expected = torch.nn.functional.linear(x, weight, bias).float()
    pairs = (
        (packed, expected),
        (silu, torch.nn.functional.silu(expected)),
        (summed, expected + other),
        (multiplied, expected * other),
    )
    return all(
        torch.allclose(found.float(), right, rtol=0.02, atol=0.05) for found, right in pairs
    )


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `make_linear` stores a weight that keeps its bits as PackedLinear."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and packs()


Product = Linear | PackedLinear | Int8Linear | Int4Linear
Bits = Literal[8, 4]


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, bits: Bits | None = None
) -> Product:
    """The fastest product for this device and dtype. Takes weight (out, in); `bits` stores it in
    fewer than it has."""
    if bits is not None:
        return (Int8Linear if bits == 8 else Int4Linear)(weight, bias)
    if is_packed(weight):
        return PackedLinear(weight.contiguous(), bias)
    return Linear(weight.contiguous(), bias)


class MergedGate:
    """SiLU(gate) x up, both out of one product."""

    def __init__(self, both: Product) -> None:
        """`both` gives gate and up behind one another."""
        self.products = (both,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.products[0](x).chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)


class FusedGate:
    """The same by two products that do the rest to their sums before they write them."""

    def __init__(self, gate: PackedLinear, up: PackedLinear) -> None:
        self.products = (gate, up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.products
        return up.times(x, gate.silu(x))


Gate = MergedGate | FusedGate
