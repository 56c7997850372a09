"""From all P and R of a model to the factors Q and A of every layer, as one autograd node."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from visualcloze_deft.adapters.deft.deft_linear import DeftLinear
from visualcloze_deft.adapters.deft.orthonormal import bases, through_basis, whitening
from visualcloze_deft.backbones.quantization import precision_of

ROWS = 512  # of a weight that are cast to the adapter's precision together
CHUNK = 2**24  # numbers in a temporary matrix of several layers
SUMS_IN_FLOAT32 = ("cuda", "meta")  # devices whose bfloat16 products torch gives out in float32


def into_subspace(right: Tensor, weights: Iterable[Tensor]) -> list[Tensor]:
    """right^T W (r i) of several layers in the precision of `right` (k o r), whatever that of their
    weights (o i)."""
    split: Tensor | None = None
    found = []
    for one, weight in zip(right, weights, strict=True):
        if weight.dtype == one.dtype:
            found.append(one.mT @ weight)
        elif weight.dtype == torch.bfloat16 and weight.device.type in SUMS_IN_FLOAT32:
            split = in_parts(right) if split is None else split
            found.append(torch.mm(split[len(found)].mT, weight, out_dtype=one.dtype))
        else:
            parts = zip(one.split(ROWS), weight.split(ROWS), strict=True)
            found.append(torch.stack([p.mT @ rows.to(one.dtype) for p, rows in parts]).sum(dim=0))
    return added_parts(found, right.shape[-1])


def in_parts(right: Tensor) -> Tensor:
    """A float32 matrix (..., o r) as three in bfloat16 side by side (..., o 3r), whose sum it is.

    Each part holds 8 binary digits of what those before it leave, so three hold all 24. A product
    with a bfloat16 matrix, summed in float32, then errs as one in float32 does; two parts would
    err ten times as much. Tensor cores multiply three parts far faster than float32.
    """
    parts, left = [], right
    for _ in range(3):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1]
    return torch.cat(parts, dim=-1)


def added_parts(products: list[Tensor], rank: int) -> list[Tensor]:
    """Products (3r i) of what `in_parts` took apart, summed to (r i); others as they are."""
    places = [k for k, product in enumerate(products) if len(product) > rank]
    if places:
        high, middle, low = zip(*(products[k].split(rank) for k in places), strict=True)
        sums = torch._foreach_add(high, middle)
        torch._foreach_add_(sums, low)
        for k, one in zip(places, sums, strict=True):
            products[k] = one
    return products


def without_autocast(device: str) -> AbstractContextManager[object]:
    """No autocast for tensors of this kind of device; "meta" knows none.

    `torch.amp.is_autocast_available` would say it of any kind, but torch's compiler before 2.12
    breaks a graph there: every layer became a graph of its own, with a variant for each place.
    """
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@dataclass(frozen=True, kw_only=True)
class Values:
    """Q (o r) and A (r i) of one adapter of a layer, and T (r r) of its P; None where relaxed."""

    q: Tensor
    a: Tensor
    whiten: Tensor | None


@dataclass(frozen=True)
class Part:
    """One adapter of one layer."""

    layer: DeftLinear
    name: str

    @property
    def p(self) -> nn.Parameter:
        return self.layer.deft_P[self.name]

    @property
    def r(self) -> nn.Parameter | None:
        """None for PaRa, which removes and puts nothing in its place."""
        return None if self.layer.deft_para[self.name] else self.layer.deft_R[self.name]

    @property
    def scale(self) -> float:
        return self.layer.deft_scaling[self.name]

    @property
    def relaxed(self) -> bool:
        return bool(self.layer.deft_decomposition[self.name] == "relu")

    @property
    def widest(self) -> int:
        """Numbers in the larger one of its two matrices."""
        layer = self.layer
        return int(self.p.shape[1]) * max(int(layer.in_features), int(layer.out_features))

    @property
    def like(self) -> tuple[Any, ...]:
        """What parts share whose matrices P can be stacked."""
        return self.relaxed, *self.p.shape, self.p.device, self.p.dtype


T = TypeVar("T")


def alike(parts: Iterable[T], like: Iterable[Any]) -> list[list[T]]:
    """Parts in groups of those with an equal `like`, which stands in the same order."""
    groups: dict[Any, list[T]] = {}
    for part, key in zip(parts, like, strict=True):
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def in_chunks(parts: Sequence[T], values: int) -> Iterator[Sequence[T]]:
    """Parts, as many at once as keep temporary matrices of `values` numbers each within bounds."""
    count = max(CHUNK // values, 1)
    for first in range(0, len(parts), count):
        yield parts[first : first + count]


def whitenings(parts: Sequence[Part]) -> dict[Part, Tensor]:
    """T of each P; the decompositions of one rank together, however long the matrices are."""
    grams: dict[Part, Tensor] = {}
    for group in alike(parts, (part.like for part in parts)):
        for some in in_chunks(group, group[0].p.numel()):
            stack = torch.stack([part.p.detach() for part in some]).double()
            # in float64: squaring would cost float32 half of its digits
            grams |= dict(zip(some, stack.mT @ stack, strict=True))
    found: dict[Part, Tensor] = {}
    for group in alike(grams, ((g.shape, g.device) for g in grams.values())):
        found |= dict(zip(group, whitening(torch.stack([grams[p] for p in group])), strict=True))
    return found


@torch.no_grad()
def values_of(parts: Sequence[Part], *, dtype: torch.dtype | None = None) -> dict[Part, Values]:
    """Q and A of each part, in the precision of its layer's weight unless `dtype` is given."""
    known = whitenings([part for part in parts if not part.relaxed])
    found: dict[Part, Values] = {}
    for group in alike(parts, (part.like for part in parts)):
        for some in in_chunks(group, max(part.widest for part in group)):
            whiten = None if some[0].relaxed else torch.stack([known[part] for part in some])
            q = bases(torch.stack([part.p.detach() for part in some]), whiten)
            kinds = [dtype or precision_of(part.layer.get_base_layer()) for part in some]
            factors = zip(some, cast_all(q, kinds), cast_all(injected(some, q), kinds), strict=True)
            found |= {part: Values(q=one, a=a, whiten=known.get(part)) for part, one, a in factors}
    return found


def injected(parts: Sequence[Part], q: Tensor) -> list[Tensor]:
    """A = s R - right^T W (r i) of parts that are alike, whose bases are q (k o r)."""
    right = torch.relu(q) if parts[0].relaxed else q
    found = into_subspace(right, (part.layer.frozen_weight() for part in parts))
    torch._foreach_neg_(found)
    injecting = [(part, a) for part, a in zip(parts, found, strict=True) if part.r is not None]
    if injecting:
        scaled = torch._foreach_mul(
            [cast(Tensor, part.r).detach() for part, _ in injecting],
            [part.scale for part, _ in injecting],
        )
        torch._foreach_add_([a for _, a in injecting], scaled)
    return found


def cast_all(tensors: Iterable[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each tensor in its dtype; those that are not yet are cast together."""
    found = list(tensors)
    odd = [k for k, (t, dtype) in enumerate(zip(found, dtypes, strict=True)) if t.dtype != dtype]
    if odd:
        cast_ones = [torch.empty_like(found[k], dtype=dtypes[k]) for k in odd]
        torch._foreach_copy_(cast_ones, [found[k] for k in odd])
        for k, one in zip(odd, cast_ones, strict=True):
            found[k] = one
    return found


class Factors(torch.autograd.Function):
    """Q and A of each part, in the precision of its layer's weight, from the parameters of all.

    The weights are frozen. In a backward pass this comes last, when every layer has given the
    gradients of its Q and A.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Part], values: Sequence[Values], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        """values: those of `parts`; parameters: P and R of each in turn, None for PaRa's R."""
        # Weak: a graph that never runs backward must not keep the model that keeps its results.
        ctx.parts = [(weakref.ref(part.layer), part.name) for part in parts]
        ctx.whiten = [one.whiten for one in values]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters[::2])
        return tuple(t.detach() for one in values for t in (one.q, one.a))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """grads: of Q (o r) and A (r i) of each part in turn; None where its layer did not run."""
        parts = [Part(layer(), name) for layer, name in ctx.parts]
        for part in parts:
            part.layer.end_pass(part.name)
        ran = [
            Gradients(part=part, p=p, whiten=whiten, q=q, a=a)
            for part, p, whiten, q, a in zip(
                parts, ctx.saved_tensors, ctx.whiten, grads[::2], grads[1::2], strict=True
            )
            if q is not None and a is not None
        ]
        wanted_p, wanted_r = ctx.needs_input_grad[2::2], ctx.needs_input_grad[3::2]
        of_p: dict[Part, Tensor] = {}
        if any(wanted_p):
            for group in alike(ran, (one.part.like for one in ran)):
                for some in in_chunks(group, max(one.part.widest for one in group)):
                    of_p |= zip((one.part for one in some), gradients_of_p(some), strict=True)
        of_r = gradients_of_r(ran) if ran and any(wanted_r) else {}
        return (
            None,
            None,
            *(
                found
                for part, p, r in zip(parts, wanted_p, wanted_r, strict=True)
                for found in (of_p.get(part) if p else None, of_r.get(part) if r else None)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a backward pass gave for Q (o r) and A (r i) of a part, whose P and T are these."""

    part: Part
    p: Tensor
    whiten: Tensor | None
    q: Tensor
    a: Tensor


def gradients_of_p(some: Sequence[Gradients]) -> Tensor:
    """Gradients (k o r) of P, of parts that are alike."""
    p = torch.stack([one.p for one in some])
    through_a = []
    for one in some:
        weight = one.part.layer.frozen_weight()
        through_a.append(weight @ one.a.to(weight.dtype).mT)
    grad, of_right = torch.empty_like(p), torch.empty_like(p)
    torch._foreach_copy_(grad.unbind(), [one.q for one in some])
    torch._foreach_copy_(of_right.unbind(), through_a)
    if some[0].part.relaxed:
        return grad.sub_(of_right.mul_(p > 0))
    whiten = torch.stack([cast(Tensor, one.whiten) for one in some])
    # Q again: in float32 it is as large as P; by calculation an H100 needs 0.2 to 3 ms for all
    return through_basis(grad.sub_(of_right), bases(p, whiten), whiten)


def gradients_of_r(some: Sequence[Gradients]) -> dict[Part, Tensor]:
    """Gradients (r i) of R."""
    found = [torch.empty_like(one.a, dtype=one.p.dtype) for one in some]
    torch._foreach_copy_(found, [one.a for one in some])
    torch._foreach_mul_(found, [one.part.scale for one in some])
    return dict(zip((one.part for one in some), found, strict=True))


def factors(values: Mapping[Part, Values]) -> dict[Part, tuple[Tensor, Tensor]]:
    """Q and A of each part with their gradients."""
    if not values:
        return {}
    parameters = [parameter for part in values for parameter in (part.p, part.r)]
    made = Factors.apply(list(values), list(values.values()), *parameters)
    return dict(zip(values, zip(made[::2], made[1::2], strict=True), strict=True))
