"""Workflows of the ComfyUI nodes give the images of the Python API and of the command line.

Each claim is tried through `comfyui_host`, which executes workflows by the contract of custom
nodes. With VCDEFT_COMFYUI, a checkout of ComfyUI, it is tried through ComfyUI's own server, too;
VCDEFT_COMFYUI_PYTHON is the Python that has what ComfyUI and this package need.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfyui_server
import numpy as np
import pytest
from comfyui_base import WIDE, workflow, write_base
from comfyui_host import Host, Run
from PIL import Image

from visualcloze_deft import InContextPipeline
from visualcloze_deft.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
Comfyui = Host | comfyui_server.Server
Picture = Callable[[str], Image.Image]


def quick(name: str, **settings: Any) -> dict[str, Any]:
    """A shipped workflow on the micro model in few steps. settings: of its Generate node."""
    graph = workflow(name)
    node(graph, "VCDeftLoadModel")["inputs"]["model"] = "micro"
    node(graph, "VCDeftGenerate")["inputs"] |= {"steps": STEPS, **settings}
    return graph


def node(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """The only node of a kind."""
    (found,) = [one for one in graph.values() if one["class_type"] == kind]
    return found


def saved(run: Run, graph: dict[str, Any], kind: str = "SaveImage") -> list[Any]:
    """What the only node of a kind shows."""
    assert run.error == ""
    (number,) = [n for n, one in graph.items() if one["class_type"] == kind]
    return run.shown[number]


def same(some: list[Image.Image], others: list[Image.Image]) -> bool:
    """Whether pictures agree in every byte."""
    return len(some) == len(others) > 0 and all(
        np.array_equal(np.asarray(one), np.asarray(other))
        for one, other in zip(some, others, strict=True)
    )


@pytest.fixture(scope="module")
def base(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("comfyui"), micro_model)


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[comfyui_server.Server]:
    if not comfyui_server.PLACE:
        pytest.skip("VCDEFT_COMFYUI names no checkout of ComfyUI")
    with comfyui_server.serving(base) as running:
        yield running


@pytest.fixture(params=["host", "server"])
def comfyui(request: pytest.FixtureRequest, base: Path, monkeypatch: pytest.MonkeyPatch) -> Comfyui:
    if request.param == "server":
        found: Comfyui = request.getfixturevalue("server")
        return found
    return Host(base, monkeypatch)


@pytest.fixture
def picture(base: Path) -> Picture:
    return lambda name: Image.open(base / "input" / f"{name}.png")


DEPTH = [["depth_1", "photo_1"], ["depth_2", "photo_2"], ["depth_3", None]]
PAIRS = [["before_1", "after_1"], ["before_2", "after_2"]]


@pytest.mark.parametrize(
    ("name", "grids", "images", "adapter"),
    [
        (
            "depth-to-image",
            [{"rows": DEPTH, "task": "depth-to-image", "content_prompt": "a mug on a table"}],
            2,
            False,
        ),
        ("own-pairs", [{"rows": [*PAIRS, [f"before_{k}", None]]} for k in (3, 4)], 1, True),
    ],
)
def test_a_workflow_gives_the_images_of_python_and_of_the_command_line(
    name: str,
    grids: list[dict[str, Any]],
    images: int,
    adapter: bool,
    comfyui: Comfyui,
    micro_model: Path,
    tmp_path: Path,
) -> None:
    graph = quick(name)
    made = saved(comfyui.run(graph), graph)

    used = comfyui.base / "models" / "vcdeft_adapters" / "mine" if adapter else None
    named = copy.deepcopy(grids)
    for one in named:
        one["rows"] = [
            [cell and str(comfyui.base / "input" / f"{cell}.png") for cell in row]
            for row in one["rows"]
        ]
    pipe = InContextPipeline.from_pretrained(micro_model, adapter=used)
    assert same(made, pipe(named, num_images_per_prompt=images, num_inference_steps=STEPS))

    (tmp_path / "grid.json").write_text(json.dumps(named))
    words = ["--examples", tmp_path / "grid.json", "--model", micro_model]
    words += ["--images-per-grid", images, "--inference-steps", STEPS, "--output", tmp_path / "out"]
    words += ["--adapter", used] if used else []
    main(["infer", *map(str, words)])
    written = sorted(p for p in (tmp_path / "out").glob("*.png") if "sheet" not in p.name)
    assert same(made, [Image.open(path) for path in written])


def test_a_workflow_shows_the_whole_grid_and_the_columns_of_its_task(comfyui: Comfyui) -> None:
    graph = quick("depth-to-image")
    run = comfyui.run(graph)
    sheets = saved(run, graph, "PreviewImage")
    assert [one.size for one in sheets] == [(2 * 38 + 6, 3 * 38 + 12)] * 2
    assert saved(run, graph, "PreviewAny") == ["image_1: depth map\nimage_2: photo (generated)"]


def test_sizes_scales_adapters_and_own_tasks_give_the_images_of_python(
    comfyui: Comfyui, picture: Picture, micro_model: Path
) -> None:
    graph = quick("depth-to-image", images_per_grid=1, upsampling=2.0)
    for number, name in (("3", WIDE), ("5", WIDE)):
        graph[number]["inputs"]["image"] = name
    node(graph, "VCDeftChooseTask")["inputs"]["task"] = "day-to-night"
    generate = node(graph, "VCDeftGenerate")["inputs"]
    scales = {"mine": 0.5, "other": -1.0, "loras/third.safetensors": 2.0}
    for name, scale in scales.items():
        told = {"model": generate["model"], "adapter": name, "scale": scale}
        graph[name] = {"class_type": "VCDeftLoadAdapter", "inputs": told}
        generate["model"] = [name, 0]
    made = saved(comfyui.run(graph), graph)

    models = comfyui.base / "models"
    pipe = InContextPipeline.from_pretrained(
        micro_model,
        adapter={
            models / ("" if "/" in name else "vcdeft_adapters") / name: scale
            for name, scale in scales.items()
        },
        task_folders=models / "vcdeft_tasks",
    )
    names = [["depth_1", "photo_1"], ["wide", "photo_2"], ["wide", None]]
    rows = [[picture(cell) if cell else None for cell in row] for row in names]
    words = {"task": "day-to-night", "content_prompt": "a mug on a table"}
    wanted = pipe(rows=rows, upsampling=2.0, num_inference_steps=STEPS, **words)
    assert same(made, wanted)
    assert made[0].width > made[0].height


def test_progress_reaches_its_end_and_the_last_preview_is_the_image(comfyui: Comfyui) -> None:
    graph = quick("depth-to-image", images_per_grid=1, seed=1)
    run = comfyui.run(graph)
    (image,) = saved(run, graph)
    assert run.progress == [(k, STEPS) for k in range(1, STEPS + 1)]
    width, height = run.previews[-1].size
    cell = run.previews[-1].convert("RGB").crop((width // 2, 0, width, height))  # of two
    wanted = image.convert("RGB").resize(cell.size, Image.Resampling.LANCZOS)
    difference = np.asarray(cell, np.float32) - np.asarray(wanted, np.float32)
    assert np.abs(difference).mean() < 5  # ComfyUI enlarges previews, and sends a JPEG


def test_an_interrupted_run_ends_and_leaves_no_trace(comfyui: Comfyui) -> None:
    graph = quick("own-pairs", seed=2)
    before = saved(comfyui.run(graph), graph)
    long = quick("own-pairs", seed=3, steps=400)
    stopped = comfyui.run(long, stop_at=2)
    assert stopped.error == "interrupted"
    assert len(stopped.progress) < 2 * 400
    again = quick("own-pairs", seed=2, content_prompt=" ")  # the same, but not to ComfyUI
    assert same(saved(comfyui.run(again), again), before)


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("VCDeftQueryRow", {"generate": "3"}, "query row: column 3 of a grid with 2 columns"),
        ("VCDeftQueryRow", {"generate": "all"}, "generate 'all': give numbers of columns"),
        ("VCDeftLoadAdapter", {"adapter_path": "/none/here"}, "adapter /none/here"),
        ("VCDeftLoadModel", {"model_path": "/none/here"}, "/none/here"),
        ("VCDeftLoadModel", {"offload": "model"}, "offload model: there is no GPU"),
        ("VCDeftGenerate", {"resolution": 24}, "resolution 24: give a multiple of 16"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_input(
    kind: str, inputs: dict[str, Any], message: str, comfyui: Comfyui
) -> None:
    graph = quick("own-pairs")
    node(graph, kind)["inputs"] |= inputs
    error = comfyui.run(graph).error
    assert message in error
    assert "\n" not in error
