"""The ComfyUI nodes: their contract, the shipped workflows, and what the nodes promise.

With COMFYUI_PATH, a checkout of ComfyUI, its own server runs the workflows too; COMFYUI_PYTHON is
the interpreter that has ComfyUI's and this package's dependencies, by default the one of the tests.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_host import MODULE, PACK, Host, Interrupted, declared, execute
from PIL import Image

import visualcloze_deft
from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Adapter

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(visualcloze_deft.__file__).parents[1]
WORKFLOWS = {
    path.name.removesuffix(".api.json"): path for path in PACK.glob("workflows/*.api.json")
}
STEPS = 4
Nodes = dict[str, Any]


def workflow(name: str) -> dict[str, Any]:
    return json.loads(WORKFLOWS[name].read_text())


def of_kind(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    """The inputs of the only node of a kind."""
    (found,) = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
    return found


def random_adapter(model: Path | str, folder: Path, seed: int) -> Path:
    transformer = load_models(str(model)).transformer
    injection.attach(transformer, Adapter(rank=2), seed=seed)
    random = torch.Generator().manual_seed(seed)
    for parameter in injection.trainable(transformer).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    folder.mkdir(parents=True)
    files.save(transformer, folder, base="micro")
    return folder


@pytest.fixture(scope="module")
def base(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory of ComfyUI with a model, two adapters and the workflows' pictures."""
    folder = tmp_path_factory.mktemp("comfyui")
    for number, name in enumerate(("mine", "other")):
        random_adapter(micro_model, folder / "models" / "vcdeft_adapters" / name, number)
    (folder / "models" / "diffusers").mkdir()
    (folder / "models" / "diffusers" / "micro").symlink_to(micro_model)
    write_pictures(folder / "input")
    return folder


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in WORKFLOWS:
        for node in workflow(name).values():
            if node["class_type"] == "LoadImage":
                pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((48, 48)).save(folder / node["inputs"]["image"])


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(base, monkeypatch)


@pytest.fixture
def nodes(host: Host) -> Nodes:
    return host.nodes()


@pytest.fixture
def small(nodes: Nodes, micro_model: Path) -> Nodes:
    """The nodes, and a micro model in few steps."""
    return nodes | {"model": loaded(nodes, micro_model)}


def loaded(nodes: Nodes, model: Path) -> Any:
    (found,) = nodes["VCDeftLoadModel"]().load("tiny", "auto", "none", "none", str(model))
    return found


def picture(host: Host, name: str) -> Image.Image:
    return Image.open(host.base / "input" / f"{name}.png")


def made(small: Nodes, host: Host, model: Any, **more: Any) -> torch.Tensor:
    """The images of a grid of one example and one query."""
    load = small["LoadImage"].run
    images = {k: load(f"{name}.png")[0] for k, name in enumerate(("depth_1", "photo_1"), 1)}
    (rows,) = small["VCDeftExampleRows"]().add(image_1=images[1], image_2=images[2])
    (query,) = small["VCDeftQueryRow"]().ask("", image_1=load("depth_2.png")[0])
    usual = {"content_prompt": "", "seed": 3, "steps": STEPS, "guidance": 30.0}
    with torch.inference_mode():
        listed, _ = small["VCDeftGenerate"]().generate(
            model, query, examples=rows, **{**usual, "images_per_grid": 1, **more}
        )
    (images_made,) = listed
    return images_made


def as_images(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).float() / 255


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether images agree but for the 8 bits of a file."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 0.5 / 255 + 1e-6)


# The contract of custom nodes


def test_every_node_keeps_the_contract_of_custom_nodes(nodes: Nodes) -> None:
    ours = {name: node for name, node in nodes.items() if name.startswith("VCDeft")}
    given = {kind for node in ours.values() for kind in node.RETURN_TYPES}
    assert len(ours) == 6
    for node in ours.values():
        assert node.CATEGORY == "visualcloze_deft"
        assert node.DESCRIPTION
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name, (kind, options) in declared(node).items():
            assert takes_all or name in parameters
            assert options["tooltip"]
            assert isinstance(kind, list | str)
            assert not str(kind).startswith("VCDEFT") or kind in given
            if "min" in options:
                assert options["min"] <= options["default"] <= options["max"]
        for name in node.INPUT_TYPES().get("optional", {}):
            assert takes_all or parameters[name].default is not inspect.Parameter.empty


def test_every_node_has_a_title(nodes: Nodes) -> None:
    pack = sys.modules[MODULE]
    assert pack.NODE_DISPLAY_NAME_MAPPINGS.keys() == pack.NODE_CLASS_MAPPINGS.keys()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_gives_each_input_what_it_takes(name: str, nodes: Nodes) -> None:
    graph = workflow(name)
    for node in graph.values():
        kind = nodes[node["class_type"]]
        inputs = declared(kind)
        assert node["inputs"].keys() <= inputs.keys()
        assert kind.INPUT_TYPES().get("required", {}).keys() <= node["inputs"].keys()
        for key, value in node["inputs"].items():
            wanted = inputs[key][0]
            if isinstance(value, list):
                source = nodes[graph[value[0]]["class_type"]]
                assert wanted in ("*", source.RETURN_TYPES[value[1]])
            elif isinstance(wanted, list):
                assert value in wanted
            else:
                assert isinstance(value, {"STRING": str, "INT": int, "FLOAT": float}[wanted])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_file_for_the_browser_holds_the_same_workflow(name: str, nodes: Nodes) -> None:
    shown = json.loads((PACK / "workflows" / f"{name}.json").read_text())
    assert in_api_format(shown, nodes) == {
        number: {key: node[key] for key in ("class_type", "inputs")}
        for number, node in workflow(name).items()
    }


def in_api_format(shown: dict[str, Any], nodes: Nodes) -> dict[str, Any]:
    """A workflow as the browser saves it, in API format."""
    links = {number: [str(source), slot] for number, source, slot, *_ in shown["links"]}
    found = {}
    for node in shown["nodes"]:
        kind = nodes[node["type"]]
        values = iter(node.get("widgets_values", ()))
        inputs = {one["name"]: links[one["link"]] for one in node["inputs"] if one.get("link")}
        for name, (wanted, options) in declared(kind).items():
            if isinstance(wanted, list) or wanted in ("STRING", "INT", "FLOAT"):
                inputs[name] = next(values)
            if options.get("control_after_generate"):
                next(values)  # what the browser does with the seed afterwards
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return found


# The workflows


def test_depth_to_image_gives_what_the_pipeline_gives(
    host: Host, nodes: Nodes, micro_model: Path
) -> None:
    graph = workflow("depth-to-image")
    of_kind(graph, "VCDeftLoadModel")["model"] = "micro"
    of_kind(graph, "VCDeftGenerate")["steps"] = STEPS
    execute(graph, nodes)
    names = (("depth_1", "photo_1"), ("depth_2", "photo_2"))
    rows = [
        *([picture(host, one) for one in row] for row in names),
        [picture(host, "depth_3"), None],
    ]
    told = {"task": "depth-to-image", "content_prompt": "a mug on a table"}
    pipe = InContextPipeline.from_pretrained(micro_model)
    images = pipe(rows=rows, num_images_per_prompt=2, num_inference_steps=STEPS, **told)
    (batch,) = host.saved["depth-to-image"]
    assert batch.shape == (2, 32, 32, 3)
    assert batch.dtype == torch.float32
    assert same(batch, as_images(images))
    (sheets,) = host.saved["preview"]
    assert sheets.shape == (2, 3 * 38 + 12, 2 * 38 + 6, 3)
    assert host.saved["text"] == ["image_1: depth map\nimage_2: photo (generated)"]


def test_own_pairs_with_an_adapter_give_what_the_pipeline_gives(
    host: Host, nodes: Nodes, micro_model: Path
) -> None:
    graph = workflow("own-pairs")
    of_kind(graph, "VCDeftLoadModel")["model"] = "micro"
    of_kind(graph, "VCDeftGenerate")["steps"] = STEPS
    execute(graph, nodes)
    pipe = InContextPipeline.from_pretrained(
        micro_model, adapter=host.base / "models" / "vcdeft_adapters" / "mine"
    )
    examples = [[picture(host, f"{one}_{k}") for one in ("before", "after")] for k in (1, 2)]
    grids = [{"rows": [*examples, [picture(host, f"before_{k}"), None]]} for k in (3, 4)]
    (batch,) = host.saved["own-pairs"]
    assert same(batch, as_images(pipe(grids, num_inference_steps=STEPS)))


# What the nodes promise


def test_progress_reaches_its_end_and_the_last_preview_is_the_image(
    host: Host, small: Nodes
) -> None:
    image = made(small, host, small["model"], images_per_grid=2, upsampling=2.0)
    assert [value for value, _, _ in host.told] == [*range(1, len(host.told) + 1)]
    assert {total for _, total, _ in host.told} == {len(host.told)}
    assert image.shape == (2, 64, 64, 3)
    host.told.clear()
    image = made(small, host, small["model"])
    shown = [told[2] for told in host.told]
    assert [one is not None for one in shown] == [False, False, True, True]
    last = as_images([shown[-1][1]])  # the row of two cells
    assert same(image, last[:, :, 32:])


def test_the_preview_knows_where_a_straight_path_ends(nodes: Nodes) -> None:
    previews = sys.modules[f"{MODULE}.previews"]
    clean, noise = torch.randn(2, 1, 4, 8)
    times, estimate = [1.0, 0.9, 0.6, 0.5, 0.0], previews.CleanEstimate()
    found = [
        estimate.after_step(now, (1 - then) * clean + then * noise) for now, then in pairwise(times)
    ]
    assert found[:2] == [None, None]
    for one in found[2:]:
        torch.testing.assert_close(one, clean)


def test_an_interrupted_generation_leaves_no_trace(host: Host, small: Nodes) -> None:
    before = made(small, host, small["model"])
    host.told.clear()
    host.stop_at = 2
    with pytest.raises(Interrupted):
        made(small, host, small["model"])
    assert len(host.told) == 2
    assert torch.equal(made(small, host, small["model"]), before)


def test_adapters_are_exchanged_as_if_loaded_anew(
    host: Host, small: Nodes, micro_model: Path
) -> None:
    add = small["VCDeftLoadAdapter"]().add
    plain = small["model"]
    (mine,) = add(plain, "mine", 1.0)
    (weaker,) = add(plain, "mine", 0.5)
    (both,) = add(mine, "none", 0.3, str(host.base / "models" / "vcdeft_adapters" / "other"))
    wanted = [plain, mine, weaker, both, plain]
    images = [made(small, host, model) for model in wanted]
    for model, image in zip(wanted[1:], images[1:], strict=True):
        fresh = type(plain)(loaded=loaded(small, micro_model).loaded, adapters=model.adapters)
        assert same(made(small, host, fresh), image)
    assert torch.equal(images[0], images[-1])
    assert len({one.numpy().tobytes() for one in images[:4]}) == 4


def test_an_adapter_that_is_not_there_is_named(host: Host, small: Nodes) -> None:
    add = small["VCDeftLoadAdapter"]().add
    with pytest.raises(ValueError, match="adapter nowhere: no such folder"):
        add(small["model"], "none", 1.0, "nowhere")
    (once,) = add(small["model"], "mine", 1.0)
    with pytest.raises(ValueError, match="mine: it is loaded twice"):
        add(once, "mine", 0.5)
    (spoiled,) = add(small["model"], "none", 1.0, str(host.base / "input"))
    with pytest.raises(ValueError, match=r"adapter .*input"):
        made(small, host, spoiled)
    made(small, host, small["model"])  # the model still works


def test_new_files_of_an_adapter_are_noticed(nodes: Nodes, tmp_path: Path) -> None:
    changed = nodes["VCDeftLoadAdapter"].IS_CHANGED
    before = changed(adapter="none", adapter_path=str(tmp_path))
    assert changed(adapter="none", adapter_path=str(tmp_path)) == before
    (tmp_path / "adapter_config.json").write_text("{}")
    assert changed(adapter="none", adapter_path=str(tmp_path)) != before


def test_an_own_task_is_found_in_its_folder(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "day-to-night.toml").write_text(
        'summary = "Night."\ngroup = "light"\ncontent = ""\n'
        'instruction = "From the {day} to the {target}."\n'
        '[columns]\nday = "street by day"\ntarget = "street by night"\n'
    )
    task, columns, summary = nodes["VCDeftChooseTask"]().choose(
        "depth-to-image", name="day-to-night", task_folder=str(tmp_path)
    )
    assert columns == "image_1: street by day\nimage_2: street by night (generated)"
    assert summary == "Night."
    assert task.known["day-to-night"].roles == ("day", "target")


def test_the_list_of_tasks_is_that_of_the_package(nodes: Nodes) -> None:
    from visualcloze_deft.task_registry.files import load_tasks

    names, _ = declared(nodes["VCDeftChooseTask"])["task"]
    assert names == [*load_tasks()]


def test_a_task_that_nobody_declares_is_named(host: Host, small: Nodes) -> None:
    task, told, _ = small["VCDeftChooseTask"]().choose("depth-to-image", name="dept-to-image")
    assert told == "dept-to-image: a task of the adapter"
    with pytest.raises(ValueError, match="unknown task 'dept-to-image'"):
        made(small, host, small["model"], task=task)


def image(height: int = 32, *, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, height, 32, 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"columns \[\]: connect them from image_1"),
        ({"image_1": image(), "image_3": image()}, r"columns \[1, 3\]: connect them from image_1"),
        ({"image_1": image(batch=3), "image_2": image(batch=2)}, "image_2 has 2 images"),
        ({"image_1": image(), "examples": (("a", "b"),)}, "1 columns here and 2 in the rows above"),
    ],
)
def test_rows_that_are_none_are_named(nodes: Nodes, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nodes["VCDeftExampleRows"]().add(**columns)


def test_a_batch_gives_a_row_for_each_image(nodes: Nodes) -> None:
    add = nodes["VCDeftExampleRows"]().add
    (rows,) = add(image_1=image(batch=3), image_2=image(64), image_3=None)
    (more,) = add(examples=rows, image_1=image(), image_2=image())
    assert [[one.size for one in row] for row in more] == [
        *[[(32, 32), (32, 64)]] * 3,
        [(32, 32)] * 2,
    ]


def test_a_query_names_its_holes(nodes: Nodes) -> None:
    ask = nodes["VCDeftQueryRow"]().ask

    def holes(text: str, columns: int, **images: torch.Tensor) -> list[list[bool]]:
        (query,) = ask(text, **images)
        return [[one is None for one in row] for row in query.rows(columns)]

    assert holes("", 3, image_1=image()) == [[False, True, True]]
    assert holes("1, 3", 3, image_2=image(batch=2), image_3=image()) == [[True, False, True]] * 2
    assert holes("", 2) == [[True, True]]
    with pytest.raises(ValueError, match="column 2 has no image and is not generated"):
        holes("3", 3, image_1=image())
    with pytest.raises(ValueError, match="column 3 of a grid with 2 columns"):
        holes("", 2, image_3=image())
    with pytest.raises(ValueError, match="generate 'all': give numbers"):
        holes("all", 2, image_1=image())


def test_an_image_survives_the_way_to_a_picture_and_back(nodes: Nodes) -> None:
    pictures = sys.modules[f"{MODULE}.pictures"]
    given = torch.arange(256).float().reshape(1, 16, 16, 1) / 255
    for channels in (1, 3):
        batch = given.expand(2, 16, 16, channels)
        back = pictures.image_of(pictures.pictures_of(batch))
        assert torch.equal(back, given.expand(2, 16, 16, 3))
    assert pictures.pictures_of(torch.ones(1, 8, 8, 4))[0].mode == "RGBA"


# Without the package


def test_importing_the_nodes_imports_nothing_of_the_package() -> None:
    for path in PACK.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            assert "visualcloze_deft" not in ast.unparse(statement).partition("import")[2] or (
                not isinstance(statement, ast.Import | ast.ImportFrom)
            )


def test_without_the_package_the_nodes_say_how_to_install_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = [one for one in sys.path if not (Path(one or ".") / "visualcloze_deft").is_dir()]
    for name in [one for one in sys.modules if one.partition(".")[0] == "visualcloze_deft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(sys, "meta_path", [o for o in sys.meta_path if "editable" not in repr(o)])
    nodes = host.nodes()
    assert "-m pip install visualcloze-deft" in caplog.text
    for node in nodes.values():
        node.INPUT_TYPES()
    with pytest.raises(ModuleNotFoundError, match=r"not installed .*-m pip install"):
        nodes["VCDeftLoadModel"]().load("tiny", "auto", "none", "none")


# In ComfyUI itself


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """ComfyUI's server on a free port, with the nodes and the built-in model; its folder."""
    place = os.environ.get("COMFYUI_PATH")
    if not place:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    folder = tmp_path_factory.mktemp("comfyui-server")
    random_adapter("tiny", folder / "models" / "vcdeft_adapters" / "mine", 0)
    write_pictures(folder / "input")
    shutil.copytree(PACK, folder / "custom_nodes" / "visualcloze_deft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"main.py --cpu --disable-auto-launch --listen 127.0.0.1 --port {port}".split()
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), *words, "--base-directory", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("w") as log:
        running = subprocess.Popen(
            command, cwd=place, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until_answered(address, running, folder / "log.txt")
        yield address, folder
    finally:
        running.terminate()
        running.wait()


def until_answered(address: str, running: subprocess.Popen[Any], log: Path) -> None:
    for _ in range(120):
        assert running.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/queue").close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())


def finished(address: str, graph: dict[str, Any]) -> dict[str, Any]:
    """The history of a workflow, run by the server."""
    body = json.dumps({"prompt": graph}).encode()
    with urllib.request.urlopen(f"{address}/prompt", data=body) as answer:
        number = json.load(answer)["prompt_id"]
    for _ in range(240):
        with urllib.request.urlopen(f"{address}/history/{number}") as answer:
            if history := json.load(answer):
                return history[number]
        time.sleep(0.5)
    raise AssertionError("the workflow did not end")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfyui_runs_the_workflow(name: str, server: tuple[str, Path]) -> None:
    address, folder = server
    graph = workflow(name)
    of_kind(graph, "VCDeftGenerate")["steps"] = 2
    history = finished(address, graph)
    assert history["status"]["status_str"] == "success", history["status"]
    saved = sorted((folder / "output").glob(f"{name}_*.png"))
    assert [Image.open(path).size for path in saved] == [(128, 128)] * 2


def test_comfyui_shows_a_mistake_in_one_line(server: tuple[str, Path]) -> None:
    address, _ = server
    graph = workflow("own-pairs")
    of_kind(graph, "VCDeftQueryRow")["generate"] = "3"
    status = finished(address, graph)["status"]
    assert status["status_str"] == "error"
    (told,) = [message[1] for message in status["messages"] if message[0] == "execution_error"]
    assert told["exception_message"].strip() == "query row: column 3 of a grid with 2 columns"
