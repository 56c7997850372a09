"""Adapters in use: several on one base, each with a scale, exchanged without loading it again.

Every kind is a change B A of a layer's weight W (o i), see `injection.changes_of`; changes add up:
W' = W + sum of scale_k B_k A_k. Merged, which is the default, that stands in the weights and
costs nothing; beside them, for a quantised base, a layer adds (x A^T) B^T to its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.contexts import known_to
from visualcloze_deft.backbones.base import Seen
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.peft_files import settings_file, weights_file
from visualcloze_deft.backbones.quantization import is_quantised
from visualcloze_deft.config.numbers import is_scale
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.storage.hashing import digest_of


class Hashes(NamedTuple):
    """SHA-256 of an adapter's files. config: None of a LoRA file, which has none."""

    weights: str
    config: str | None


def hashes_of_files(folder: Path) -> Hashes:
    config = settings_file(folder)
    return Hashes(digest_of(weights_file(folder)), digest_of(config) if config else None)


class ActiveAdapters:
    """The adapters of one transformer. scales: of those in use, by name. places: the folder, or
    LoRA file, of each that was added. hashes: of its files then, None where it came from none.
    contexts: those that each was trained with.

    While adapters are merged, the weights of their layers as they were rest in the host's memory:
    taking adapters off gives them back bit for bit.
    """

    def __init__(self, transformer: Any, *, merge: bool = True) -> None:
        """merge: False leaves the weights alone, as a quantised base does anyway."""
        self.transformer = transformer
        self.merge = merge
        self.scales: dict[str, float] = {}
        self.places: dict[str, Path] = {}
        self.hashes: dict[str, Hashes | None] = {}
        self.contexts: dict[str, tuple[Seen, ...]] = {}
        self.known: dict[str, dict[str, Change]] = {}
        self._originals: dict[str, Tensor] = {}
        self._beside: list[tuple[nn.Module, RemovableHandle]] = []
        self._settled = False

    def settle(self) -> None:
        """Keep what is used now for good: the memory that exchanging it takes is given back."""
        self._originals.clear()
        self.known.clear()
        self._settled = True

    def add(self, name: str, adapter: Path | files.StoredAdapter, *, used: bool = True) -> None:
        """Use an adapter, or the one in a folder, beside those in use at scale 1, or not yet.

        Raises `UserError` where the name is taken or the adapter does not fit.
        """
        if name in self.known:
            raise UserError(
                f"adapter {name!r}: there is one of this name already; give another adapter_name, "
                "or delete that one first"
            )
        self.check_reachable()
        place = adapter if isinstance(adapter, Path) else adapter.folder
        contexts = known_to(place)
        hashes = hashes_of_files(place) if weights_file(place).is_file() else None
        wanted = dict(self.scales)
        self.use({})
        try:
            files.load(self.transformer, adapter)
            self.known[name] = {
                layer: (a.cpu(), b.cpu())
                for layer, (a, b) in injection.changes_of(self.transformer).items()
            }
            injection.detach(self.transformer)
            self.places[name], self.contexts[name] = place, contexts
            self.hashes[name] = hashes
            if used:
                wanted[name] = 1.0
        finally:
            self.use(wanted)

    def delete(self, name: str) -> None:
        self._check_known(name)
        self.use({other: s for other, s in self.scales.items() if other != name})
        del self.known[name], self.places[name], self.contexts[name], self.hashes[name]

    def use(self, scales: Mapping[str, float]) -> None:
        """Use exactly these, each at its scale: 0 is the base, 1 the adapter as trained.

        Raises `UserError` where a name is not known or a scale is no finite number.
        """
        for name, scale in scales.items():
            self._check_known(name)
            if not is_scale(scale):
                raise UserError(f"adapter {name!r}: scale {scale}: give a number up to 1e6, e.g. 1")
        if dict(scales) == self.scales:
            return
        self.check_reachable()
        self._take_off()
        layers: dict[str, list[Change]] = {}
        for name, scale in scales.items():
            for layer, (a, b) in self.known[name].items():
                if scale:
                    layers.setdefault(layer, []).append((scale * a, b))
        for layer, changes in layers.items():
            self._put_on(layer, changes)
        self.scales = dict(scales)

    @torch.no_grad()
    def _put_on(self, name: str, changes: list[Change]) -> None:
        layer = self.transformer.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if self.merge and not is_quantised(layer):
            weight = layer.weight.data
            changed = weight.float()
            for a, b in changes:
                changed = changed + (b.to(weight.device) @ a.to(weight.device))
            self._originals[name] = weight.cpu()
            layer.weight.data = changed.to(weight.dtype)
            return
        place = layer.weight.device
        dtype = layer.bias.dtype if layer.bias is not None else self.transformer.dtype
        down = torch.cat([a for a, _ in changes]).to(place, dtype)
        up = torch.cat([b for _, b in changes], dim=1).to(place, dtype)
        layer.register_buffer("change_down", down, persistent=False)  # to be moved with the layer
        layer.register_buffer("change_up", up, persistent=False)
        self._beside.append((layer, layer.register_forward_hook(_add_change)))

    def _take_off(self) -> None:
        for name, original in self._originals.items():
            weight = self.transformer.get_submodule(name).weight
            weight.data = original.to(weight.device, weight.dtype)
        self._originals.clear()
        for layer, handle in self._beside:
            handle.remove()
            del layer.change_down, layer.change_up
        self._beside.clear()
        self.scales = {}

    def _check_known(self, name: str) -> None:
        if name not in self.known:
            known = suggestion(name, self.known) if self.known else "none is loaded"
            raise UserError(f"adapter {name!r}: none of this name; {known}")

    def check_reachable(self) -> None:
        """Raise `UserError` where weights are settled, or offloaded so that they cannot be read."""
        if self._settled:
            raise UserError("the adapters are settled: load the model again to exchange them")
        if any(p.is_meta for p in self.transformer.parameters()) or any(
            "group_offloading" in module._diffusers_hook.hooks
            for module in self.transformer.modules()
            if hasattr(module, "_diffusers_hook")
        ):
            raise UserError(
                "adapters cannot be changed while layers are offloaded: call remove_all_hooks() "
                "(of groups: load the model again), change them, then enable offloading"
            )
        for name, module in self.transformer.named_modules():
            if isinstance(module, AttentionModuleMixin) and module.fused_projections:
                raise UserError(
                    f"adapters cannot be changed while {name} has fused projections, which stand "
                    "beside the weights they change: call transformer.unfuse_qkv_projections()"
                )
            if (
                isinstance(module, nn.Linear)
                and module.weight.dtype.itemsize == 1
                and (hasattr(module, "_diffusers_hook"))
            ):
                raise UserError(
                    f"adapters cannot be changed in {name}, which layerwise casting keeps in 8 "
                    "bits: load the model again, change them, then enable it"
                )


def _add_change(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    place = inputs[0].device  # hooks that offload the layer may have taken them away already
    down, up = layer.change_down.to(place), layer.change_up.to(place)
    inside = nn.functional.linear(inputs[0].to(down.dtype), down)
    changed: Tensor = output + nn.functional.linear(inside, up).to(output.dtype)
    return changed
