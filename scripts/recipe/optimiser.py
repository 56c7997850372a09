"""Muon for matrices and AdamW for the rest, in tensors alone: a step can be captured in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MOMENTUM, DECAY = 0.95, 0.01
BETAS, EPS = (0.9, 0.98), 1e-8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, five steps


def like_adamw(rows: int, columns: int) -> float:
    """An update as large as AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4)."""
    return 0.2 * math.sqrt(max(rows, columns))


def of_kernels(rows: int, columns: int) -> float:
    """Jordan et al. 2024, for convolution kernels as matrices (output channels, the rest)."""
    return 10 * max(1, rows / columns) ** 0.5


class Optimiser:
    """Steps of parameters by gradients.

    matrices: two or more axes, flattened to matrices; those of one shape are stepped together.
    scale: what the learning rate is multiplied with for a matrix of (rows, columns).
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        scale: Callable[[int, int], float],
    ) -> None:
        device = (others or matrices)[0].device
        shapes: dict[tuple[int, ...], list[int]] = {}
        for k, matrix in enumerate(matrices):
            shapes.setdefault(tuple(matrix.flatten(1).shape), []).append(k)
        self.scale = scale
        self.matrices, self.others = list(matrices), list(others)
        self.groups = list(shapes.values())
        self.momentum = [
            torch.zeros(len(ks), *shape, device=device) for shape, ks in shapes.items()
        ]
        self.first = [torch.zeros_like(p) for p in others]
        self.second = [torch.zeros_like(p) for p in others]
        self.steps = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)

    def state(self) -> dict[str, Tensor]:
        """All that changes, by name; the tensors themselves."""
        parts = {"momentum": self.momentum, "first": self.first, "second": self.second}
        named = {f"{name}.{k}": t for name, part in parts.items() for k, t in enumerate(part)}
        return named | {"steps": self.steps}

    @torch.no_grad()
    def step(self, matrices: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """One step by the gradients of the matrices and of the others, at the rate `self.rate`."""
        for ks, momentum in zip(self.groups, self.momentum, strict=True):
            gradient = torch.stack([matrices[k].flatten(1) for k in ks])
            momentum.mul_(MOMENTUM).add_(gradient)
            update = orthogonal(gradient.add(momentum, alpha=MOMENTUM))
            change = update * (self.rate * self.scale(*update.shape[1:]))
            for k, one in zip(ks, change, strict=True):
                self.matrices[k].mul_(1 - self.rate * DECAY).sub_(one.view_as(self.matrices[k]))
        if not self.others:
            return
        self.steps += 1
        torch._foreach_lerp_(self.first, list(others), 1 - BETAS[0])
        torch._foreach_mul_(self.second, BETAS[1])
        torch._foreach_addcmul_(self.second, list(others), list(others), 1 - BETAS[1])
        root = torch._foreach_div(self.second, 1 - BETAS[1] ** self.steps)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, EPS)
        changes = torch._foreach_div(self.first, root)
        torch._foreach_mul_(changes, self.rate / (1 - BETAS[0] ** self.steps))
        torch._foreach_sub_(self.others, changes)


def orthogonal(matrices: Tensor) -> Tensor:
    """(k rows columns) with singular values near 1; on a GPU in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def clip(gradients: Sequence[Tensor], most: float) -> None:
    """Scale gradients in place so that their common norm is at most `most`; a NaN makes them 0."""
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    torch._foreach_mul_(list(gradients), (most / norm).clamp(max=1.0).nan_to_num(0.0))
