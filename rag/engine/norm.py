"""Root mean square norms (Zhang and Sennrich, arXiv 1910.07467) in as few passes as PyTorch has."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_MANY = 2**17  # numbers from which on passes over memory cost more than calls


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean of x² + eps) x weight over the last dimension, in x's dtype."""
    if not _takes_two_passes(x):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _scaled(x, _mean_squares(x), eps).mul_(weight)


def rms_norm_heads(x: torch.Tensor, count: int, eps: float) -> torch.Tensor:
    """The first `count` heads of x (tokens, heads, D), each divided by its root mean square."""
    wanted = x[:, :count]
    if not _takes_two_passes(x):
        return F.rms_norm(wanted, wanted.shape[-1:], None, eps)
    # The kernel wants x whole; what it does to the other heads is thrown away.
    mean_squares = torch.ones(x.shape[:2], device=x.device)
    mean_squares[:, :count] = _mean_squares(wanted)
    return _scaled(x, mean_squares, eps)[:, :count]


def _takes_two_passes(x: torch.Tensor) -> bool:
    """F.rms_norm on a CPU is made of seven operators, in float32 where x has 16 bits."""
    many = x.numel() >= _MANY and x.is_contiguous()
    return bool(many and x.device.type == "cpu" and x.dtype == torch.bfloat16)


def _mean_squares(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (...), float32, nothing rounded on the way."""
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms.square_().div_(x.shape[-1])


def _scaled(x: torch.Tensor, mean_squares: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row of x (..., D) / sqrt(its mean square + eps), rounded once.

    That is what batch normalisation does to a channel with mean 0 and this variance.
    """
    variances = mean_squares.flatten()
    found: torch.Tensor = torch.native_batch_norm(
        x.view(1, -1, x.shape[-1]), None, None, torch.zeros_like(variances), variances,
        False, 0.0, eps,
    )[0]  # fmt: skip
    return found.view(x.shape)
