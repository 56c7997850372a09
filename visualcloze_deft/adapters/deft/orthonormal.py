"""Orthonormal bases of column spaces, continuous in the columns, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ANGLE = 1e-5  # radians from the columns before it: float32 says little of a smaller one


def whitening(gram: Tensor) -> Tensor:
    """T (..., r, r) such that P T is orthonormal, for `gram` = P^T P (..., r, r) in float64.

    Upper triangular, with a positive diagonal: Cholesky QR. A column of P that is zero or lies
    within `LEAST_ANGLE` of the span of those before it is left out, a column of zeros: what it says
    is rounding, and its gradient would drown all others.
    """
    size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    size = torch.where(size == 0, 1, size)
    gram = gram / size[..., :, None] / size[..., None, :]
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    noise = 4 * gram.shape[-1] * torch.finfo(gram.dtype).eps
    lower, _ = torch.linalg.cholesky_ex(gram + noise * one)  # NaN stays NaN, no wait for the GPU
    left_out = lower.diagonal(dim1=-2, dim2=-1) < LEAST_ANGLE
    either = left_out[..., :, None] | left_out[..., None, :]
    lower, _ = torch.linalg.cholesky_ex(torch.where(either, one, gram + noise * one))
    inverse = torch.linalg.solve_triangular(lower.mT, one.expand_as(gram), upper=True)
    return inverse.masked_fill(either, 0) / size[..., :, None]


def bases(p: Tensor, whiten: Tensor | None) -> Tensor:
    """Q (k o r) of P (k o r), by float64: P itself where the kind is relaxed."""
    return p if whiten is None else (p.double() @ whiten).to(p.dtype)


def through_basis(grad: Tensor, q: Tensor, whiten: Tensor) -> Tensor:
    """The gradients of P from those of their bases Q (k o r): the reverse of QR (Walter and Lehmann
    2010, arXiv 1001.1654) without a gradient of the triangular part."""
    inner = -(grad.mT @ q)
    mirrored = inner.tril() + inner.tril(-1).mT
    return (grad + q @ mirrored) @ whiten.to(grad.dtype).mT
