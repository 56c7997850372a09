"""The DEFT layer: peft's parameters and files, an arithmetic that costs what LoRA's costs.

The adapted weight (arXiv 2509.22793) is `(I - Q right^T) W + s Q R`, where (Q, right) is the
orthonormal basis of P twice (orthogonal kind, PaRa without R) or P and relu(P) (relaxed kind).
The change is `Q A` with `A = s R - right^T W`, of rank r. Once Q and A are there, a layer is a
LoRA layer: `y = W x + b + Q (A x)`.

Q and A depend on parameters alone. `Factors` makes them for all layers at the start of a forward
pass of the whole, in few large operations; each layer then reads its own, also where a block is
computed again for the backward pass. Their gradients wait for each other, and those of all P and R
are made together at the end of the backward pass.

The basis is the one of the QR decomposition whose triangular part has a positive diagonal,
because that one is continuous in P. LAPACK's signs, which peft's layer takes, jump while P is
trained, and with them what R means. In files R is written in peft's signs.

Several adapters add up: each one's A is formed from the frozen W, each change counts times its
strength (1 unless set; 0 is the base).
Axes: k layers, n tokens, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from peft.tuners.deft.layer import DeftLinear as PeftDeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visualcloze_deft.quantise import dense, is_quantised, precision_of

P_NAME, R_NAME = "deft_P.", "deft_R."
ROWS = 512  # of a weight that are cast to the adapter's precision together
CHUNK = 2**24  # numbers in a temporary matrix of several layers
SUMS_IN_FLOAT32 = ("cuda", "meta")  # devices whose bfloat16 products torch gives out in float32
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


def through_basis(grad: Tensor, q: Tensor, whiten: Tensor) -> Tensor:
    """The gradients of P from those of their bases Q (k o r): the reverse of QR (Walter and Lehmann
    2010, arXiv 1001.1654) without a gradient of the triangular part."""
    inner = -(grad.mT @ q)
    mirrored = inner.tril() + inner.tril(-1).mT
    return (grad + q @ mirrored) @ whiten.to(grad.dtype).mT


class Pass:
    """A forward pass of the whole whose layers share factors, and its backward pass.

    roots: modules whose forward opens it. depth: how many of them are running. open: whether one
    is. held: whether parameters stay as they are, see `constant_parameters`.
    """

    def __init__(self) -> None:
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.depth = 0
        self.open = self.held = False

    def __deepcopy__(self, _: Any) -> Pass:
        return Pass()  # a copy of the model makes its own factors


def in_backward() -> bool:
    """Whether autograd is running: what is computed now belongs to the pass before."""
    return bool(torch._C._current_graph_task_id() != -1)


class DeftLinear(PeftDeftLinear):  # type: ignore[misc]
    """peft's DEFT layer with this module's arithmetic. `adopt` makes them."""

    other_param_names = (
        *PeftDeftLinear.other_param_names,
        *("strengths", "_values", "_factors", "_together", "_frozen", "_merged", "_fixed"),
    )
    strengths: dict[str, float]
    _values: dict[str, Values]  # made in the pass under way
    _factors: dict[str, tuple[Tensor, Tensor]]  # Q and A that a pass made for all layers together
    _together: dict[str, None]  # the adapters whose last forward used such
    _frozen: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]]
    _original: Tensor | None  # the frozen weight while adapters are merged
    _merged: dict[str, tuple[Tensor, Tensor]]  # factors of what is merged, strength within
    _fixed: dict[str, bool]  # whether an adapter was loaded to be used, not trained
    _pass: Pass | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [] if self.disable_adapters or self.merged else self.here()
        if not names:
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        shape = y.shape
        x, y = x.to(y.dtype).reshape(-1, x.shape[-1]), y.reshape(-1, shape[-1])
        with without_autocast(x.device.type):
            for name in names:
                if self.strength(name) != 0:
                    y = self.updated(self.deft_dropout[name](x), y, name)
        return y.reshape(shape)

    def here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.deft_P]

    def strength(self, name: str) -> float:
        return self.strengths.get(name, 1.0)

    def updated(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        if self.is_frozen(name):
            q, a = self.frozen(name, y.dtype)
        else:
            self._frozen.pop(name, None)  # it is being trained
            q, a = self.trained(name)
        inside = x @ a.to(y.dtype).mT  # n r
        return torch.addmm(y, inside, q.to(y.dtype).mT, alpha=self.strength(name))

    def is_frozen(self, name: str) -> bool:
        return not any(p.requires_grad for p in self.parameters_of(name))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        return [part[name] for part in (self.deft_P, self.deft_R) if name in part]

    def trained(self, name: str) -> tuple[Tensor, Tensor]:
        """Q (o r) and A (r i) with their gradients."""
        if self._pass is not None and self._pass.open and name in self._factors:
            return self._factors[name]
        return self.apart(name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apart(self, name: str) -> tuple[Tensor, Tensor]:
        """`trained` where no pass has them ready: in layers called by themselves, under ZeRO-3,
        where a layer's parameters are whole while it runs, and in what is computed again after
        another pass has begun."""
        part, again = Part(self, name), in_backward()
        if not again:
            self._together.pop(name, None)
        if again and name in self._factors and name in self._together:
            return self._factors[name]
        sharing = self._pass is not None and (self._pass.open or again)
        if not sharing or name not in self._values:
            self._values |= {name: values_of([part])[part]}
        values = self._values[name] if sharing else self._values.pop(name)
        if again and name in self._together:  # autograd has the way to P and R from the first time
            return values.q.detach().requires_grad_(), values.a.detach().requires_grad_()
        return factors({part: values})[part]

    def end_pass(self, name: str) -> None:
        """Drop what was made for the pass under way."""
        self._factors.pop(name, None)
        if self._pass is None or not self._pass.held:
            self._values.pop(name, None)

    def is_split(self) -> bool:
        """Whether DeepSpeed's ZeRO-3 has divided its parameters among processes."""
        return any(hasattr(parameter, "ds_id") for parameter in self.parameters())

    def forget(self) -> None:
        """Drop what is kept of the parameters. Needed only where an adapter that is not trained is
        changed in a way that leaves no trace: through `.data`, or by a fused optimiser."""
        self._values.clear()
        self._factors.clear()
        self._frozen.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_factors": {}}  # torch copies no tensor that has a history

    def _apply(self, *args: Any, **kwargs: Any) -> DeftLinear:
        self.forget()  # another device or precision
        moved: DeftLinear = super()._apply(*args, **kwargs)
        return moved

    def frozen_weight(self) -> Tensor:
        """W (o i), without what is merged into it."""
        return dense(self.get_base_layer()) if self._original is None else self._original

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Q (o r) and A (r i) with W' = W + Q A at strength 1, in the adapter's precision."""
        part = Part(self, name)
        values = values_of([part], dtype=part.p.dtype)[part]
        return values.q, values.a

    def frozen(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`factors` in `dtype`, kept until a parameter or the weight changes."""
        read = (self.get_base_layer().weight, *self.parameters_of(name))
        versions = [(id(t), 0 if t.is_inference() else t._version) for t in read]
        key = (dtype, self.deft_scaling[name], *versions)
        if name not in self._frozen or self._frozen[name][0] != key:
            with torch.inference_mode(mode=False):  # they may serve outside of it, too
                q, a = self.factors(name)
                self._frozen[name] = (key, q.to(dtype), a.to(dtype))
        return self._frozen[name][1:]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones. Those loaded to be used stay frozen, where peft would
        prepare them for training."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name in self.deft_P:
            if self._fixed.get(name):
                for parameter in self.parameters_of(name):
                    parameter.requires_grad_(False)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Give an adapter its strength; diffusers' `set_adapters(names, weights)` calls this.

        Raises `ValueError` where it is merged with another one.
        """
        if adapter in self._merged and scale != self.strength(adapter):
            raise ValueError(f"adapter {adapter!r} is merged with its strength: unmerge it first")
        self.strengths[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for name in self.here():
            self.set_scale(name, self.strength(name) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets every active adapter to strength 1."""
        for name in self.here():
            self.set_scale(name, 1.0 if scale is None else self.strength(name) / scale)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self._merged:
            raise ValueError(f"adapter {adapter_name!r} is merged: unmerge it first")
        super().delete_adapter(adapter_name)

    def reset_deft_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """peft's call for a new adapter: its P, and R in this module's basis."""
        super().reset_deft_parameters(adapter_name, init_weights=False)
        if init_weights and not self.deft_P[adapter_name].is_meta:
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.start(adapter_name)

    @torch.no_grad()
    def start(self, name: str) -> None:
        """Set R so that the adapter changes nothing yet; PaRa has no R and starts removing."""
        if name in self.deft_R:
            self.deft_R[name].zero_()
            _, minus_removed = self.factors(name)
            self.deft_R[name].copy_(-minus_removed / self.deft_scaling[name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the weight (o i) at the adapter's strength, in the adapter's precision."""
        q, a = self.factors(adapter_name)
        return self.strength(adapter_name) * (q @ a)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters (all active ones) into the weight. The weight as it was stays in memory.

        As in peft, `_cached_merge_factor` has right^T W (r i) of each adapter meanwhile, of the
        weight without any.
        Raises `ValueError` where `safe_merge` and the result is not finite, or the weight is
        quantised; the weight is then as it was.
        """
        layer = self.get_base_layer()
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.deft_P]
        if not names:
            return
        if is_quantised(layer):
            raise ValueError("a quantised weight cannot take an adapter: load the base unquantised")
        original = self.frozen_weight().data
        factors = {name: self.factors(name) for name in names}
        added = {name: (q, self.strength(name) * a) for name, (q, a) in factors.items()}
        changed = original.to(self.deft_P[names[0]].dtype)
        for name, (q, a) in {**self._merged, **added}.items():
            changed = changed + q @ a
            if safe_merge and not changed.to(original.dtype).isfinite().all():  # peft's words
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        self._original = original
        layer.weight.data = changed.to(original.dtype)
        self._merged |= added
        for name, (_, a) in factors.items():
            r = Part(self, name).r
            self._cached_merge_factor[name] = -a if r is None else self.deft_scaling[name] * r - a
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        if self.merged:
            self.get_base_layer().weight.data = self._original
            self._original = None
            self._merged.clear()
            self._cached_merge_factor.clear()
            self.merged_adapters.clear()


def adopt(root: nn.Module) -> None:
    """Turn the peft DEFT layers in `root` into this module's, with the function they have now.

    Raises `ValueError` where an adapter is merged: its R means what it says of the weight without.
    """
    found = {n: m for n, m in root.named_modules() if type(m) is PeftDeftLinear}
    if merged := [name for name, module in found.items() if module.merged]:
        raise ValueError(f"{merged[0]}: an adapter is merged into it: unmerge it first")
    for module in found.values():
        if not module.fan_in_fan_out:
            module.__class__ = DeftLinear
            layer = cast(DeftLinear, module)
            layer.strengths, layer._frozen, layer._merged = {}, {}, {}
            layer._values, layer._factors, layer._together = {}, {}, {}
            layer.register_buffer("_original", None, persistent=False)
            layer._fixed = {name: layer.is_frozen(name) for name in layer.deft_P}
            layer._pass = None
            own = {f"{R_NAME}{n}": r.data for n, r in layer.deft_R.items()}
            own |= {f"{P_NAME}{n}": p.data for n, p in layer.deft_P.items()}
            change_signs(layer, own, "")
            for name, r in layer.deft_R.items():
                r.data = own[f"{R_NAME}{name}"]
            layer._register_state_dict_hook(_write_signs)
            layer.register_load_state_dict_pre_hook(_read_signs)


def layers(root: nn.Module) -> dict[str, DeftLinear]:
    """The DEFT and PaRa layers in `root` by name."""
    return {name: m for name, m in root.named_modules() if isinstance(m, DeftLinear)}


def share_factors(root: nn.Module) -> None:
    """Make Q and A of all layers in `root` together at the start of each forward of `root`.

    They serve the whole pass, also the non-reentrant recomputation of checkpointed blocks. Where
    `root` is part of another module that shares, that one's pass counts. A process that holds only
    a share of the parameters (ZeRO-3) makes them layer by layer, each when it first runs.
    """
    found = list(layers(root).values())
    shared = next((layer._pass for layer in found if layer._pass is not None), Pass())
    for layer in found:
        layer._pass = shared
    if found and root not in shared.roots:
        shared.roots.add(root)
        root.register_forward_pre_hook(_open_pass)
        root.register_forward_hook(_close_pass, always_call=True)


@contextmanager
def constant_parameters(root: nn.Module) -> Iterator[None]:
    """Inside, nothing changes the adapters in `root`: their Q and A are made once for all passes.

    For the batches of one step, and for sampling.
    """
    shared = shared_pass(root)
    if shared is None or shared.held:
        yield
        return
    _drop_factors(root)
    shared.held = True
    try:
        yield
    finally:
        shared.held = False
        _drop_factors(root)


def recomputing(
    root: nn.Module,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for a block's forward and for its recomputation, as torch's checkpoint takes them.

    In the second the pass is open as in the first: compiled blocks then run the same code twice.
    """
    return nullcontext(), _reopened(root)


@contextmanager
def _reopened(root: nn.Module) -> Iterator[None]:
    shared = shared_pass(root)
    if shared is None:
        yield
        return
    before, shared.open = shared.open, True
    try:
        yield
    finally:
        shared.open = before


def _drop_factors(root: nn.Module) -> None:
    for layer in layers(root).values():
        for name in layer.deft_P:
            layer.end_pass(name)


def shared_pass(root: nn.Module) -> Pass | None:
    """The pass that the layers in `root` share, if they do."""
    found = (m._pass for m in root.modules() if isinstance(m, DeftLinear))
    return next((one for one in found if one is not None), None)


def _close_pass(root: nn.Module, *_: Any) -> None:
    if shared := shared_pass(root):
        shared.depth = max(shared.depth - 1, 0)
        shared.open = shared.depth > 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _open_pass(root: nn.Module, _: Any) -> None:
    shared = shared_pass(root)
    if shared is None:
        return
    shared.depth += 1
    shared.open = True
    if shared.depth > 1:
        return
    found = [m for m in root.modules() if isinstance(m, DeftLinear)]
    parts = [Part(m, name) for m in found for name in m.here() if not m.is_frozen(name)]
    for part in parts:
        part.layer.end_pass(part.name)
    together = [part for part in parts if not part.layer.is_split()]
    missing = [part for part in together if part.name not in part.layer._values]
    for part, values in values_of(missing).items():
        part.layer._values[part.name] = values
    made = factors({part: part.layer._values[part.name] for part in together})
    for part in together:
        part.layer._factors[part.name] = made[part]
        part.layer._together[part.name] = None


def factors(values: Mapping[Part, Values]) -> dict[Part, tuple[Tensor, Tensor]]:
    """Q and A of each part with their gradients."""
    if not values:
        return {}
    parameters = [parameter for part in values for parameter in (part.p, part.r)]
    made = Factors.apply(list(values), list(values.values()), *parameters)
    return dict(zip(values, zip(made[::2], made[1::2], strict=True), strict=True))


def change_signs(layer: DeftLinear, tensors: dict[str, Tensor], prefix: str) -> None:
    """Turn each R in `tensors` from this module's signs into peft's, or back: the same step.

    tensors: by their names in `layer` after `prefix`.
    """
    for name, method in layer.deft_decomposition.items():
        r = f"{prefix}{R_NAME}{name}"
        p = tensors.get(f"{prefix}{P_NAME}{name}", layer.deft_P[name])
        if method == "qr" and r in tensors and p.numel() and not p.is_meta:
            triangle = torch.linalg.qr(p.detach().float().cpu()).R  # as peft's layer calls it
            signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
            tensors[r] = tensors[r] * signs.to(tensors[r])[:, None]


def _write_signs(layer: DeftLinear, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    change_signs(layer, state, prefix)


def _read_signs(layer: DeftLinear, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    layer.forget()
    change_signs(layer, state, prefix)
