"""The DEFT layer: peft's parameters and files, an arithmetic that costs what LoRA's costs.

The adapted weight (arXiv 2509.22793) is `(I - Q right^T) W + s Q R`, where (Q, right) is the
orthonormal basis of P twice (orthogonal kind, PaRa without R) or P and relu(P) (relaxed kind).
The change is `Q A` with `A = s R - right^T W`, of rank r: a layer is `y = W x + b + Q (A x)`, and
for training keeps x and A x, as LoRA does.

The basis is the one of the QR decomposition whose triangular part has a positive diagonal,
because that one is continuous in P. LAPACK's signs, which peft's layer takes, jump while P is
trained, and with them what R means. In files R is written in peft's signs.

Several adapters add up: each one's A is formed from the frozen W, each change counts times its
strength (1 unless set; 0 is the base).
Axes: n tokens, o outputs, i inputs, r rank.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.deft.layer import DeftLinear as PeftDeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visualcloze_deft.quantise import dense, is_quantised

P_NAME, R_NAME = "deft_P.", "deft_R."
ROWS = 512  # of a weight that are cast to the adapter's precision together
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


def gram_of(p: Tensor) -> Tensor:
    """P^T P in float64: squaring would cost float32 half of its digits."""
    double = p.detach().double()
    return double.mT @ double


def into_subspace(right: Tensor, weight: Tensor) -> Tensor:
    """right^T W (r i) in the precision of `right` (o r), whatever that of `weight` (o i)."""
    if weight.dtype == right.dtype:
        return right.mT @ weight
    parts = zip(right.split(ROWS), weight.split(ROWS), strict=True)
    return torch.stack([part.mT @ rows.to(right.dtype) for part, rows in parts]).sum(dim=0)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """No autocast for tensors of this kind of device; "meta" knows none."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


class LowRankUpdate(torch.autograd.Function):
    """y + strength x A^T Q^T with gradients for x, y, P and R; W is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        layer: nn.Linear,
        p: Tensor,
        r: Tensor | None,
        whiten: Tensor | None,
        scale: float,
        strength: float,
    ) -> Tensor:
        """x (n i), y (n o), whiten (r r) or None for the relaxed kind, r None for PaRa."""
        q, a = factors_of(dense(layer), p, r, whiten, scale)
        a, q = (strength * a).to(x.dtype), q.to(x.dtype)
        inside = x @ a.mT  # n r
        ctx.save_for_backward(x, inside, a, p, whiten)
        ctx.layer, ctx.scale, ctx.strength = layer, scale, strength
        return torch.addmm(y, inside, q.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inside, a, p, whiten = ctx.saved_tensors
        q = basis(p, whiten)
        grad_inside = grad @ q.to(grad.dtype)
        grad_x = grad_inside @ a if ctx.needs_input_grad[0] else None
        grad_a = ctx.strength * (grad_inside.mT @ x)  # r i
        grad_r = ctx.scale * grad_a.to(p.dtype) if ctx.needs_input_grad[4] else None
        grad_p = None
        if ctx.needs_input_grad[3]:
            weight = dense(ctx.layer)
            grad_right = -(weight @ grad_a.to(weight.dtype).mT).to(p.dtype)  # o r
            grad_q = (grad.mT @ inside).to(p.dtype)
            if whiten is None:
                grad_p = grad_q + grad_right * (p > 0)
            else:
                grad_p = through_basis(grad_q + grad_right, q, whiten)
        return grad_x, grad, None, grad_p, grad_r, None, None, None


def basis(p: Tensor, whiten: Tensor | None) -> Tensor:
    """Q (o r): P itself where the kind is relaxed."""
    return p if whiten is None else (p.double() @ whiten).to(p.dtype)


def factors_of(
    weight: Tensor, p: Tensor, r: Tensor | None, whiten: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Q (o r) and A (r i) of the change Q A."""
    q = basis(p, whiten)
    removed = into_subspace(torch.relu(q) if whiten is None else q, weight)
    return q, -removed if r is None else scale * r - removed


def through_basis(grad: Tensor, q: Tensor, whiten: Tensor) -> Tensor:
    """The gradient of P from that of its basis Q (o r): the reverse of QR (Walter and Lehmann 2010,
    arXiv 1001.1654) without a gradient of the triangular part."""
    inner = -(grad.mT @ q)
    mirrored = inner.tril() + inner.tril(-1).mT
    return (grad + q @ mirrored) @ whiten.to(grad.dtype).mT


@dataclass
class Pass:
    """Whether a forward pass of the whole that shares bases is under way."""

    open: bool = False


def in_backward() -> bool:
    """Whether autograd is running: what is computed now belongs to the pass before."""
    return bool(torch._C._current_graph_task_id() != -1)


class DeftLinear(PeftDeftLinear):  # type: ignore[misc]
    """peft's DEFT layer with this module's arithmetic. `adopt` makes them."""

    other_param_names = (
        *PeftDeftLinear.other_param_names,
        *("strengths", "_whitening", "_frozen", "_merged", "_fixed"),
    )
    strengths: dict[str, float]
    _whitening: dict[str, Tensor]  # of the pass that `_pass` is in
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
            return torch.addmm(y, x @ a.mT, q.mT, alpha=self.strength(name))
        self._frozen.pop(name, None)  # it is being trained
        changed: Tensor = LowRankUpdate.apply(
            x,
            y,
            self.get_base_layer(),
            self.deft_P[name],
            None if self.deft_para[name] else self.deft_R[name],
            self.whiten(name),
            self.deft_scaling[name],
            self.strength(name),
        )
        return changed

    def is_frozen(self, name: str) -> bool:
        return not any(p.requires_grad for p in self.parameters_of(name))

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        return [part[name] for part in (self.deft_P, self.deft_R) if name in part]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def whiten(self, name: str) -> Tensor | None:
        """T of P; None for the relaxed kind. Where bases are shared, once in a forward pass of the
        whole and its backward pass."""
        if self.deft_decomposition[name] == "relu":
            return None
        shared = self._pass is not None and (self._pass.open or in_backward())
        whiten = self._whitening.get(name) if shared else None
        if whiten is None:
            whiten = whitening(gram_of(self.deft_P[name]))
            if shared:
                self._whitening[name] = whiten
        return whiten

    def forget(self) -> None:
        """Drop what is kept of the parameters. Needed only where an adapter that is not trained is
        changed in a way that leaves no trace: through `.data`, or by a fused optimiser."""
        self._whitening.clear()
        self._frozen.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> DeftLinear:
        self.forget()  # another device or precision
        moved: DeftLinear = super()._apply(*args, **kwargs)
        return moved

    def frozen_weight(self) -> Tensor:
        """W (o i), without what is merged into it."""
        return dense(self.get_base_layer()) if self._original is None else self._original

    @torch.no_grad()
    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Q (o r) and A (r i) with W' = W + Q A at strength 1, in the adapter's precision."""
        p = self.deft_P[name]
        return factors_of(
            self.frozen_weight(),
            p,
            None if self.deft_para[name] else self.deft_R[name],
            None if self.deft_decomposition[name] == "relu" else whitening(gram_of(p)),
            self.deft_scaling[name],
        )

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
        for q, a in {**self._merged, **added}.values():
            changed = changed + q @ a
        changed = changed.to(original.dtype)
        if safe_merge and not changed.isfinite().all():
            raise ValueError(f"merging {', '.join(names)}: the weights would not be finite")
        self._original = original
        layer.weight.data = changed
        self._merged |= added
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight back, bit for bit."""
        if self.merged:
            self.get_base_layer().weight.data = self._original
            self._original = None
            self._merged.clear()
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
            layer.strengths, layer._whitening, layer._frozen, layer._merged = {}, {}, {}, {}
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


def share_bases(root: nn.Module) -> None:
    """Compute what the bases need at the start of each forward of `root`, many layers at once.

    It then serves the whole pass, the recomputation of checkpointed blocks too. Where a process
    holds only a share of P (ZeRO-3), each layer computes its own when it first runs.
    """
    found = layers(root).values()
    shared = next((layer._pass for layer in found if layer._pass is not None), None)
    if found and shared is None:
        shared = Pass()
        root.register_forward_pre_hook(_renew_bases)
        root.register_forward_hook(_end_pass, always_call=True)
    for layer in found:
        layer._pass = shared


def _end_pass(root: nn.Module, *_: Any) -> None:
    for layer in layers(root).values():
        if layer._pass is not None:
            layer._pass.open = False


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _renew_bases(root: nn.Module, _: Any) -> None:
    by_rank: dict[tuple[int, torch.device], list[tuple[DeftLinear, str]]] = defaultdict(list)
    for layer in layers(root).values():
        if layer._pass is not None:
            layer._pass.open = True
        for name in layer.here():
            p = layer.deft_P[name]
            layer._whitening.pop(name, None)
            if layer.deft_decomposition[name] == "qr" and p.requires_grad and p.numel():
                by_rank[p.shape[1], p.device].append((layer, name))
    for group in by_rank.values():
        shared = whitening(torch.stack([gram_of(layer.deft_P[name]) for layer, name in group]))
        for (layer, name), one in zip(group, shared, strict=True):
            layer._whitening[name] = one


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
