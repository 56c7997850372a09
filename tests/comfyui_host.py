"""What the ComfyUI nodes need of ComfyUI, for tests without it: modules, five nodes, execution.

It is written from ComfyUI's documentation of custom nodes. None of ComfyUI's code is in it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

MODULE = "vcdeft_comfyui_nodes"
PACK = Path(__file__).parents[1] / "integrations" / "comfyui"


class Interrupted(Exception):
    """The user ended the execution."""


class Host:
    """ComfyUI's modules in `sys.modules`, and what the nodes tell them.

    told: (value, total, preview) of each update of the progress bar. stop_at: the number of updates
    after which the user interrupts.
    """

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.told: list[tuple[int, int, Any]] = []
        self.stop_at: int | None = None
        self.saved: dict[str, list[Any]] = {}
        kinds = {"diffusers": [str(base / "models" / "diffusers")]}

        def add(name: str, path: str) -> None:
            kinds.setdefault(name, []).append(path)

        modules: dict[str, dict[str, Any]] = {
            "folder_paths": {
                "models_dir": str(base / "models"),
                "add_model_folder_path": add,
                "get_folder_paths": kinds.__getitem__,
            },
            "comfy": {},
            "comfy.latent_formats": {"Flux": object},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "unload_all_models": lambda: None,
                "soft_empty_cache": lambda: None,
                "throw_exception_if_processing_interrupted": self.interrupt,
            },
            "comfy.utils": {"ProgressBar": lambda total: Bar(self, total)},
            "latent_preview": {
                "MAX_PREVIEW_RESOLUTION": 512,
                "get_previewer": lambda device, latents: object(),
            },
        }
        for name, values in modules.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
            if "." in name:
                parent, own = name.split(".")
                setattr(sys.modules[parent], own, module)

    def interrupt(self) -> None:
        if self.stop_at is not None and len(self.told) >= self.stop_at:
            self.stop_at = None
            raise Interrupted

    def nodes(self) -> dict[str, Any]:
        """The classes of the node pack, imported as ComfyUI does, and of five nodes of ComfyUI."""
        name = MODULE
        place = PACK / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            name, place, submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        for known in [one for one in sys.modules if one.partition(".")[0] == name]:
            del sys.modules[known]
        pack = importlib.util.module_from_spec(spec)
        sys.modules[name] = pack
        spec.loader.exec_module(pack)
        return {**pack.NODE_CLASS_MAPPINGS, **comfyui_nodes(self)}


class Bar:
    """`comfy.utils.ProgressBar`."""

    def __init__(self, host: Host, total: int) -> None:
        self.host, self.total = host, total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.host.told.append((value, total or self.total, preview))


def comfyui_nodes(host: Host) -> dict[str, Any]:
    """ComfyUI's own nodes that the workflows use."""

    def load(image: str) -> tuple[Tensor, Tensor]:
        pixels = np.asarray(Image.open(host.base / "input" / image).convert("RGB"), np.float32)
        return torch.from_numpy(pixels / 255)[None], torch.zeros(1, 64, 64)

    def save(images: Tensor, filename_prefix: str = "preview") -> tuple[()]:
        host.saved.setdefault(filename_prefix, []).append(images)
        return ()

    def show(source: Any) -> tuple[()]:
        host.saved.setdefault("text", []).append(source)
        return ()

    def node(
        run: Any, takes: Mapping[str, Any], gives: tuple[str, ...] = (), *, output: bool = False
    ) -> Any:
        told = {name: (kind, {}) for name, kind in takes.items()}
        contents = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": told}),
            "RETURN_TYPES": gives,
            "FUNCTION": "run",
            "OUTPUT_NODE": output,
            "run": staticmethod(run),
        }
        return type("Node", (), contents)

    files = sorted(path.name for path in (host.base / "input").glob("*"))
    pair = {"image1": "IMAGE", "image2": "IMAGE"}
    joined = lambda image1, image2: (torch.cat([image1, image2]),)  # noqa: E731
    return {
        "LoadImage": node(load, {"image": files}, ("IMAGE", "MASK")),
        "ImageBatch": node(joined, pair, ("IMAGE",)),
        "SaveImage": node(save, {"images": "IMAGE", "filename_prefix": "STRING"}, output=True),
        "PreviewImage": node(save, {"images": "IMAGE"}, output=True),
        "PreviewAny": node(show, {"source": "*"}, output=True),
    }


def declared(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (type, options) of all inputs of a node class."""
    told = node.INPUT_TYPES()
    found = {**told.get("required", {}), **told.get("optional", {})}
    return {name: (one[0], one[1] if len(one) > 1 else {}) for name, one in found.items()}


def execute(workflow: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Run a workflow in API format: node id -> the list of values of each output.

    Every value is a list, as in ComfyUI; a node runs once for each entry of its longest input.
    """
    done: dict[str, list[list[Any]]] = {}

    def outputs(number: str) -> list[list[Any]]:
        if number not in done:
            done[number] = run(workflow[number])
        return done[number]

    def run(node: Mapping[str, Any]) -> list[list[Any]]:
        kind = nodes[node["class_type"]]
        given = {
            name: outputs(value[0])[value[1]] if isinstance(value, list) else [value]
            for name, value in node["inputs"].items()
        }
        call = getattr(kind(), kind.FUNCTION)
        with torch.inference_mode():  # as in ComfyUI
            results = [
                call(**{name: values[min(k, len(values) - 1)] for name, values in given.items()})
                for k in range(max(map(len, given.values()), default=1))
            ]
        listed = getattr(kind, "OUTPUT_IS_LIST", (False,) * len(kind.RETURN_TYPES))
        return [
            [one for r in results for one in (r[k] if is_list else [r[k]])]
            for k, is_list in enumerate(listed)
        ]

    for number, node in workflow.items():
        if getattr(nodes[node["class_type"]], "OUTPUT_NODE", False):
            outputs(number)
    return done
