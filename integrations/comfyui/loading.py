"""Nodes that load the model and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import host, package

if TYPE_CHECKING:
    from visualcloze_deft.config.run_settings import Bits
    from visualcloze_deft.inference.acceleration import Offload

TINY = "tiny"
NONE = "none"
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTISE = (NONE, "int8", "nf4", "fp8")
OFFLOAD = (NONE, "model", "group", "sequential")
BY_LAYERS = ("group", "sequential")  # adapters cannot be changed under these


@dataclass(frozen=True, kw_only=True)
class UsedAdapter:
    """An adapter's folder or LoRA file, a digest of it, and its scale."""

    folder: Path
    stamp: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is loaded, see `InContextPipeline.from_pretrained`."""

    model: str
    dtype: str
    quantise: Bits
    offload: Offload

    def check(self) -> None:
        """Raise `UserError` where this machine cannot do it, before any weight is read."""
        from visualcloze_deft.inference import acceleration

        acceleration.check(offload=self.offload, quantise=self.quantise)

    def load(
        self, adapters: tuple[UsedAdapter, ...] = (), parts: Mapping[str, Any] | None = None
    ) -> Any:
        """The pipeline, its weights read. parts: networks that are there already are not read."""
        from visualcloze_deft import InContextPipeline
        from visualcloze_deft.backbones.attention import AUTO, NATIVE
        from visualcloze_deft.backbones.precision import default_dtype

        place, offloaded = host.device(), self.offload != NONE
        told = {one.folder: one.scale for one in adapters}
        own = {"quantise": self.quantise} if parts is None else parts
        return InContextPipeline.from_pretrained(
            self.model,
            adapter=told or None,
            device="cpu" if offloaded else place,
            dtype=default_dtype(place) if self.dtype == AUTO else getattr(torch, self.dtype),
            attention=NATIVE if offloaded else AUTO,  # enabling offloading chooses it
            **own,
        )


class LoadedModel:
    """The pipeline of one node, with the adapters that were used last."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pipe: Any = settings.load()
        self.adapters: tuple[UsedAdapter, ...] = ()
        self.offloaded = False

    def pipeline(self, adapters: tuple[UsedAdapter, ...]) -> Any:
        """The pipeline with exactly these adapters. Weights are read again only where layers are
        offloaded and the adapters change."""
        from visualcloze_deft.inference import acceleration

        if self.pipe is None or adapters != self.adapters:
            self._exchange(adapters)
        if self.settings.offload != NONE and not self.offloaded:
            acceleration.enable(self.pipe, offload=self.settings.offload, attention="auto")
            self.offloaded = True
        return self.pipe

    def _exchange(self, adapters: tuple[UsedAdapter, ...]) -> None:
        by_layers = self.offloaded and self.settings.offload in BY_LAYERS
        if self.pipe is None or by_layers:
            self.pipe, self.offloaded = None, False  # its memory is free before the next one's
            self.pipe = self.settings.load(adapters)
        elif _files(adapters) == _files(self.adapters):
            self.pipe.set_adapters(self.pipe.get_active_adapters(), [a.scale for a in adapters])
        else:
            self.pipe.set_adapters([])
            self.pipe.remove_all_hooks()
            self.adapters, self.offloaded = (), False
            self.pipe = self.settings.load(adapters, self.pipe.components)
        self.adapters = adapters


def _files(adapters: tuple[UsedAdapter, ...]) -> list[tuple[Path, str]]:
    return [(one.folder, one.stamp) for one in adapters]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What travels between nodes: a loaded model and the adapters to use with it."""

    loaded: LoadedModel
    adapters: tuple[UsedAdapter, ...] = ()


class LoadModel:
    """FLUX.1-Fill, or another model of its layout."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Loads FLUX.1-Fill or a model of its layout: the small built-in one, a diffusers folder in "
        "models/diffusers, any folder, or a hub id."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("VCDEFT_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, for VisualCloze Load Adapter or VisualCloze Generate.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        found = host.folders_with("model_index.json", host.MODELS)
        return {
            "required": {
                "model": (
                    [TINY, *found],
                    {"tooltip": "tiny is built in, for a try. Others lie in models/diffusers."},
                ),
                "dtype": ([*DTYPES], {"tooltip": "auto: bfloat16 on a GPU, float32 on a CPU."}),
                "quantise": (
                    [*QUANTISE],
                    {"tooltip": "Stores the blocks in fewer bits. int8, nf4 need bitsandbytes."},
                ),
                "offload": (
                    [*OFFLOAD],
                    {
                        "tooltip": "model: one network on the GPU at a time. group, sequential: "
                        "single layers, least memory and slowest."
                    },
                ),
            },
            "optional": {
                "model_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "A diffusers folder or a hub id in place of the dropdown's, "
                        "e.g. black-forest-labs/FLUX.1-Fill-dev.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model: str, model_path: str = "", **_: object) -> str:
        return host.stamp(Path(chosen_model(model, model_path)))

    def load(
        self, model: str, dtype: str, quantise: Bits, offload: Offload, model_path: str = ""
    ) -> tuple[Model]:
        package.require()
        name = chosen_model(model, model_path)
        settings = Settings(model=name, dtype=dtype, quantise=quantise, offload=offload)
        settings.check()
        host.make_room()
        with torch.inference_mode(False):  # ComfyUI's; weights must be normal tensors
            return (Model(loaded=LoadedModel(settings)),)


def chosen_model(model: str, model_path: str) -> str:
    """The given path or hub id, or else the folder of the dropdown's name."""
    found = host.folders_with("model_index.json", host.MODELS)
    return model_path.strip() or str(found.get(model, model))


class LoadAdapter:
    """An adapter beside those that the model has already."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "Adds a DEFT, PaRa or LoRA adapter with its scale. Several in a chain are added up. "
        "Adapters are folders in models/vcdeft_adapters, FLUX LoRA files in models/loras, or what "
        "adapter_path names."
    )
    FUNCTION = "add"
    RETURN_TYPES = ("VCDEFT_MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with the adapter.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("VCDEFT_MODEL", {"tooltip": "A loaded model, with or without adapters."}),
                "adapter": (
                    [NONE, *known_adapters()],
                    {"tooltip": "In models/vcdeft_adapters, or a LoRA file in models/loras."},
                ),
                "scale": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.05,
                        "tooltip": "0 is the base model, 1 the adapter as it was trained.",
                    },
                ),
            },
            "optional": {
                "adapter_path": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "An adapter, run folder, LoRA file or hub id in place of the "
                        "dropdown's.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, adapter_path: str = "", **_: object) -> str:
        return host.stamp(Path(chosen_adapter(adapter, adapter_path)))

    def add(self, model: Model, adapter: str, scale: float, adapter_path: str = "") -> tuple[Model]:
        place = chosen_adapter(adapter, adapter_path)
        if place == NONE:
            return (model,)
        package.require()
        folder = checked_adapter(place, model.loaded.settings.model)
        if any(one.folder == folder for one in model.adapters):
            raise ValueError(f"adapter {folder}: it is loaded twice; keep one node of it")
        new = UsedAdapter(folder=folder, stamp=host.stamp(folder), scale=scale)
        return (replace(model, adapters=(*model.adapters, new)),)


def known_adapters() -> dict[str, Path]:
    """The adapters in ComfyUI's model folders by the names of the dropdown."""
    return host.folders_with("adapter_config.json", host.ADAPTERS) | host.lora_files()


def chosen_adapter(adapter: str, adapter_path: str) -> str:
    """The given place, or else that of the dropdown's name."""
    return adapter_path.strip() or str(known_adapters().get(adapter, adapter))


def checked_adapter(place: str, model: str) -> Path:
    """The folder or LoRA file of an adapter, which is read to see that it is whole.

    Raises `UserError` where there is none, or it is of another base than `model`.
    """
    from visualcloze_deft.adapters.metadata import check_base
    from visualcloze_deft.inference.arguments import stored_adapters

    (stored,) = stored_adapters(place, model)
    check_base(stored.folder, model, lora=None)
    return stored.folder
