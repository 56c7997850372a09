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
scale (1 unless set; 0 is the base).
Axes: k layers, n tokens, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.deft.layer import DeftLinear as PeftDeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from visualcloze_deft.adapters.deft.factors import (
    Part,
    Values,
    factors,
    values_of,
    without_autocast,
)
from visualcloze_deft.backbones.quantization import dense, is_quantised

P_NAME, R_NAME = "deft_P.", "deft_R."


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
        *("scales", "_values", "_factors", "_together", "_frozen", "_merged", "_fixed"),
    )
    scales: dict[str, float]
    _values: dict[str, Values]  # made in the pass under way
    _factors: dict[str, tuple[Tensor, Tensor]]  # Q and A that a pass made for all layers together
    _together: dict[str, None]  # the adapters whose last forward used such
    _frozen: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]]
    _original: Tensor | None  # the frozen weight while adapters are merged
    _merged: dict[str, tuple[Tensor, Tensor]]  # factors of what is merged, scale within
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
                if self.scale_of(name) != 0:
                    y = self.updated(self.deft_dropout[name](x), y, name)
        return y.reshape(shape)

    def here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.deft_P]

    def scale_of(self, name: str) -> float:
        return self.scales.get(name, 1.0)

    def updated(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        if self.is_frozen(name):
            q, a = self.frozen(name, y.dtype)
        else:
            self._frozen.pop(name, None)  # it is being trained
            q, a = self.trained(name)
        inside = x @ a.to(y.dtype).mT  # n r
        return torch.addmm(y, inside, q.to(y.dtype).mT, alpha=self.scale_of(name))

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
        """Q (o r) and A (r i) with W' = W + Q A at scale 1, in the adapter's precision."""
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
        """Give an adapter its scale; diffusers' `set_adapters(names, weights)` calls this.

        Raises `ValueError` where it is merged with another one.
        """
        if adapter in self._merged and scale != self.scale_of(adapter):
            raise ValueError(f"adapter {adapter!r} is merged with its scale: unmerge it first")
        self.scales[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for name in self.here():
            self.set_scale(name, self.scale_of(name) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None sets every active adapter to scale 1."""
        for name in self.here():
            self.set_scale(name, 1.0 if scale is None else self.scale_of(name) / scale)

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
        """The change of the weight (o i) at the adapter's scale, in the adapter's precision."""
        q, a = self.factors(adapter_name)
        return self.scale_of(adapter_name) * (q @ a)

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
        added = {name: (q, self.scale_of(name) * a) for name, (q, a) in factors.items()}
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
            layer.scales, layer._frozen, layer._merged = {}, {}, {}
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
