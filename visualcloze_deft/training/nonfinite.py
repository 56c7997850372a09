"""Where numbers stop being finite: the operation and the layer, found while a step is done again.

torch's own anomaly detection looks for NaN alone, names a line of Python and not a layer, and
raises inside the backward pass, which leaves DeepSpeed's engine half way. Here the step ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from visualcloze_deft.backbones import kernels
from visualcloze_deft.backbones.kernels import Suspect

LAYER = "visualcloze_deft.layer"  # key of a node's metadata: the module whose forward pass made it
READ = "the encoding of pictures or texts"  # the operation where what the model reads is not finite


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The first operation whose result is not finite though all that it read is.

    operation: autograd's name of it, or "the forward pass". layer: the module that called it, ""
    for the whole model. suspect: the kernel that it may be.
    """

    operation: str
    layer: str = ""
    suspect: Suspect = "none"

    def __str__(self) -> str:
        layer = self.layer.removeprefix("denoiser.")
        return f"{self.operation} of {layer}" if layer else self.operation


SUM = Origin(operation="a sum of gradients that are each finite, or their norm")


@dataclass(frozen=True, kw_only=True)
class _Passed:
    """What went into an operation and came out: whether all of it is finite, on the device."""

    operation: str
    layer: str
    read: Tensor
    made: Tensor


class Trace:
    """All operations of a forward and a backward pass of `model`, in the order they were done."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.forward: list[_Passed] = []
        self.backward: list[_Passed] = []

    def origin(self, *, loss_finite: bool) -> Origin | None:
        """Where the first number that is not finite came from; None where every operation is
        finite, and a sum of gradients or their norm is too large.

        loss_finite: whether to look in the backward pass; the forward pass comes first.
        """
        if loss_finite:
            return self._first(self.backward)
        return self._first(self.forward) or Origin(operation=READ)

    def _first(self, passed: list[_Passed]) -> Origin | None:
        if not passed:
            return None
        read = torch.stack([one.read for one in passed]).tolist()
        made = torch.stack([one.made for one in passed]).tolist()
        found = (one for one, r, m in zip(passed, read, made, strict=True) if r and not m)
        first = next(found, None)
        if first is None:
            return None
        suspect = kernels.suspect(self.modules[first.layer])
        return Origin(operation=first.operation, layer=first.layer, suspect=suspect)


@contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Inside, every forward and backward pass of `model` is watched. It computes the same numbers.

    Blocks may be recomputed in the backward pass and weights may be split (ZeRO-3). Compiled blocks
    are computed operation by operation, as if they were not compiled.
    """
    trace = Trace(model)
    handles = [
        module.register_forward_hook(watching(trace, name, module is model), with_kwargs=True)
        for name, module in trace.modules.items()
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def watching(trace: Trace, name: str, whole: bool) -> Any:
    """A forward hook: notes what went through a module and names the operations that it called
    itself. Modules inside come first. Of the whole model it also has each operation watched."""

    def after(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        read, made = tensors([args, kwargs]), tensors(output)
        if not made:
            return
        if not whole:
            device = made[0].device
            passed = _Passed(
                operation="the forward pass",
                layer=name,
                read=all_finite(read, device),
                made=all_finite(made, device),
            )
            trace.forward.append(passed)
        nodes = list(between(made, read))
        for node in nodes:
            labels(node).setdefault(LAYER, name)
        if whole:
            for node in nodes:
                watch(trace, node)

    return after


def tensors(values: Any) -> list[Tensor]:
    """The tensors of a floating type in nested values; other objects are not looked into."""
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def between(made: Iterable[Tensor], read: Iterable[Tensor]) -> Iterator[Node]:
    """The nodes of the graph that lead from `read` to `made`."""
    seen = {one.grad_fn for one in read if one.grad_fn is not None}
    left = [one.grad_fn for one in made if one.grad_fn is not None]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        left += [parent for parent, _ in node.next_functions if parent is not None]


def labels(node: Node) -> dict[str, str]:
    """What stays with a node of the graph for as long as it lives."""
    return cast(dict[str, str], node.metadata)  # torch's stub takes the property for a method


def watch(trace: Trace, node: Node) -> None:
    """Have a node note whether the gradients that it reads and makes are finite."""
    operation, layer = node.name(), labels(node)[LAYER]

    def after(made: tuple[Tensor | None, ...], read: tuple[Tensor | None, ...]) -> None:
        known = [one for one in (*made, *read) if one is not None]
        if known:
            device = known[0].device
            passed = _Passed(
                operation=operation,
                layer=layer,
                read=all_finite([one for one in read if one is not None], device),
                made=all_finite([one for one in made if one is not None], device),
            )
            trace.backward.append(passed)

    node.register_hook(after)


def all_finite(values: Iterable[Tensor], device: torch.device) -> Tensor:
    """() whether all numbers are finite, without waiting for the device."""
    found = [one.detach().isfinite().all().to(device) for one in values]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device=device)
