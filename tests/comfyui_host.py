"""What the ComfyUI nodes need of ComfyUI, for tests without it: modules, five nodes, execution.

It is written from ComfyUI's documentation of custom nodes. None of ComfyUI's code is in it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
Graph = Mapping[str, Any]  # a workflow in API format
Nodes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """An execution of a workflow.

    shown: node number -> the pictures or texts of an output node. progress: (value, total) of each
    update of the bar. previews: the pictures among these. error: the line of a node that failed;
    "interrupted" where the user ended it; "" where all went well.
    """

    shown: Mapping[str, list[Any]]
    progress: list[tuple[int, int]]
    previews: list[Image.Image]
    error: str


class Interrupted(Exception):
    """The user ended the execution."""


class Host:
    """ComfyUI's modules in `sys.modules`, and what the nodes tell them.

    told: (value, total, preview) of each update of the progress bar. stop_at: the number of updates
    after which the user interrupts. previews: whether the user wants any.
    """

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = base
        self.told: list[tuple[int, int, Any]] = []
        self.stop_at: int | None = None
        self.previews = True
        self.known: Nodes = {}
        self.cache: dict[str, list[list[Any]]] = {}
        kinds = {name: [str(base / "models" / name)] for name in ("diffusers", "loras")}

        def add(name: str, path: str) -> None:
            kinds.setdefault(name, []).append(path)

        modules: dict[str, dict[str, Any]] = {
            "folder_paths": {
                "models_dir": str(base / "models"),
                "add_model_folder_path": add,
                "get_folder_paths": kinds.__getitem__,
                "get_filename_list": lambda name: sorted(
                    path.name for path in (base / "models" / name).glob("*") if path.is_file()
                ),
                "get_full_path": lambda name, file: str(base / "models" / name / file),
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
                "get_previewer": lambda device, latents: Previewer() if self.previews else None,
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

    def nodes(self) -> Nodes:
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
        return {**pack.NODE_CLASS_MAPPINGS, **comfyui_nodes(self.base)}

    def run(self, graph: Graph, *, stop_at: int | None = None) -> Run:
        """Execute a workflow; a node whose inputs are those of an earlier run is not run again."""
        self.told.clear()
        self.stop_at = stop_at
        self.known = self.known or self.nodes()
        shown: dict[str, list[Any]] = {}
        error = ""
        try:
            for number, node in graph.items():
                if getattr(self.known[node["class_type"]], "OUTPUT_NODE", False):
                    (shown[number],) = self.outputs(graph, number)
        except Interrupted:
            error = "interrupted"
        except Exception as failed:  # as ComfyUI does
            error = str(failed)
        return Run(
            shown=shown,
            progress=[(value, total) for value, total, _ in self.told],
            previews=[preview[1] for _, _, preview in self.told if preview],
            error=error,
        )

    def outputs(self, graph: Graph, number: str) -> list[list[Any]]:
        """The list of values of each output of a node.

        Every value is a list, as in ComfyUI; a node runs once for each entry of its longest input.
        """
        key = signature(graph, number)
        if key in self.cache:
            return self.cache[key]
        kind = self.known[graph[number]["class_type"]]
        given = {
            name: self.outputs(graph, value[0])[value[1]] if isinstance(value, list) else [value]
            for name, value in graph[number]["inputs"].items()
        }
        call = getattr(kind(), kind.FUNCTION)
        with torch.inference_mode():  # as in ComfyUI
            results = [
                call(**{name: values[min(k, len(values) - 1)] for name, values in given.items()})
                for k in range(max(map(len, given.values()), default=1))
            ]
        listed = getattr(kind, "OUTPUT_IS_LIST", (False,) * len(kind.RETURN_TYPES))
        self.cache[key] = [
            [one for r in results for one in (r[k] if is_list else [r[k]])]
            for k, is_list in enumerate(listed)
        ]
        return self.cache[key]


def signature(graph: Graph, number: str) -> str:
    """A node's kind and inputs, and those of the nodes before it, as text."""
    inputs = {
        name: [signature(graph, value[0]), value[1]] if isinstance(value, list) else value
        for name, value in graph[number]["inputs"].items()
    }
    return json.dumps([graph[number]["class_type"], inputs])


class Previewer:
    """What `latent_preview.get_previewer` gives: it draws latents (1, c, h, w) in h x w pixels."""

    def decode_latent_to_preview_image(self, kind: str, latent: Tensor) -> tuple[Any, ...]:
        pixels = (latent[0, :3].movedim(0, -1).clamp(0, 1) * 255).to(torch.uint8)
        return kind, Image.fromarray(pixels.numpy()), 512


class Bar:
    """`comfy.utils.ProgressBar`."""

    def __init__(self, host: Host, total: int) -> None:
        self.host, self.total = host, total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.host.told.append((value, total or self.total, preview))


def comfyui_nodes(base: Path) -> Nodes:
    """ComfyUI's own nodes that the workflows use. Output nodes give a list of what they show."""

    def load(image: str) -> tuple[Tensor, Tensor]:
        pixels = np.asarray(Image.open(base / "input" / image).convert("RGB"), np.float32)
        return torch.from_numpy(pixels / 255)[None], torch.zeros(1, 64, 64)

    def save(images: Tensor, **_: str) -> tuple[list[Image.Image]]:
        return ([Image.fromarray(one) for one in (255 * images).to(torch.uint8).numpy()],)

    def show(source: Any) -> tuple[list[str]]:
        return ([str(source)],)

    def node(run: Any, takes: Mapping[str, Any], gives: tuple[str, ...] = ()) -> Any:
        told = {name: (kind, {}) for name, kind in takes.items()}
        contents = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": told}),
            "RETURN_TYPES": gives,
            "OUTPUT_NODE": not gives,
            "OUTPUT_IS_LIST": (False,) * len(gives) or (True,),
            "FUNCTION": "run",
            "run": staticmethod(run),
        }
        return type("Node", (), contents)

    files = sorted(path.name for path in (base / "input").glob("*"))
    pair = {"image1": "IMAGE", "image2": "IMAGE"}
    joined = lambda image1, image2: (torch.cat([image1, image2]),)  # noqa: E731
    return {
        "LoadImage": node(load, {"image": files}, ("IMAGE", "MASK")),
        "ImageBatch": node(joined, pair, ("IMAGE",)),
        "SaveImage": node(save, {"images": "IMAGE", "filename_prefix": "STRING"}),
        "PreviewImage": node(save, {"images": "IMAGE"}),
        "PreviewAny": node(show, {"source": "*"}),
    }


def declared(node: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> (type, options) of all inputs of a node class."""
    told = node.INPUT_TYPES()
    found = {**told.get("required", {}), **told.get("optional", {})}
    return {name: (one[0], one[1] if len(one) > 1 else {}) for name, one in found.items()}
