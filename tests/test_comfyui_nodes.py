"""The ComfyUI nodes one by one: their contract, what each promises, and what they refuse."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from comfyui_base import TASK, WORKFLOWS, random_adapter, workflow, write_base
from comfyui_host import MODULE, PACK, Host, Nodes, declared

from visualcloze_deft.config.run_settings import Adapter, Bits
from visualcloze_deft.inference.acceleration import Offload

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


@pytest.fixture(scope="module")
def base(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("comfyui"), micro_model)


@pytest.fixture
def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(base, monkeypatch)


@pytest.fixture
def nodes(host: Host) -> Nodes:
    return host.nodes()


@pytest.fixture
def small(nodes: Nodes, micro_model: Path) -> Nodes:
    """The nodes, and a micro model."""
    return nodes | {"model": loaded(nodes, micro_model)}


def loaded(nodes: Nodes, model: Path) -> Any:
    (found,) = nodes["VCDeftLoadModel"]().load("tiny", "auto", "none", "none", str(model))
    return found


def made(small: Nodes, model: Any, **more: Any) -> torch.Tensor:
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


def test_the_choices_of_loading_are_those_of_the_package(nodes: Nodes) -> None:
    inputs = declared(nodes["VCDeftLoadModel"])
    assert tuple(inputs["quantise"][0]) == get_args(Bits)
    assert tuple(inputs["offload"][0]) == get_args(Offload)


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
    shown = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
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


# What the nodes promise


def test_progress_counts_the_steps_of_every_image_and_of_its_upsampling(
    host: Host, small: Nodes
) -> None:
    image = made(small, small["model"], images_per_grid=2, upsampling=2.0)
    assert [value for value, _, _ in host.told] == [*range(1, len(host.told) + 1)]
    assert {total for _, total, _ in host.told} == {len(host.told)}
    assert image.shape == (2, 64, 64, 3)
    shown = [preview is not None for _, _, preview in host.told]
    assert shown == [False, False, True, True, False, False] * 2  # no preview of what is enlarged


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


def test_latents_of_flux_are_drawn_by_comfyui_and_none_where_previews_are_off(
    host: Host, small: Nodes
) -> None:
    drawing = sys.modules[f"{MODULE}.previews"].drawing
    pipe = small["model"].loaded.pipe
    latent = torch.zeros(1, 16, 4, 6)
    assert drawing(pipe)(latent).size == (6 * 8, 4 * 8)  # decoded by the model's own VAE
    pipe.vae.register_to_config(scaling_factor=0.3611)
    assert drawing(pipe)(latent).size == (6, 4)
    host.previews = False
    assert drawing(pipe) is None


def test_adapters_are_exchanged_as_if_loaded_anew(
    host: Host, small: Nodes, micro_model: Path
) -> None:
    add = small["VCDeftLoadAdapter"]().add
    plain = small["model"]
    (mine,) = add(plain, "mine", 1.0)
    (weaker,) = add(plain, "mine", 0.5)
    (both,) = add(mine, "none", 0.3, str(host.base / "models" / "vcdeft_adapters" / "other"))
    wanted = [plain, mine, weaker, both, plain]
    images = [made(small, model) for model in wanted]
    for model, image in zip(wanted[1:], images[1:], strict=True):
        fresh = type(plain)(loaded=loaded(small, micro_model).loaded, adapters=model.adapters)
        assert torch.equal(made(small, fresh), image)
    assert torch.equal(images[0], images[-1])
    assert len({one.numpy().tobytes() for one in images[:4]}) == 4


def test_an_adapter_that_cannot_be_used_is_named_by_its_node(host: Host, small: Nodes) -> None:
    add = small["VCDeftLoadAdapter"]().add
    with pytest.raises(ValueError, match="adapter 'nowhere/x'"):
        add(small["model"], "none", 1.0, "nowhere/x")
    with pytest.raises(ValueError, match=r"adapter .*input"):
        add(small["model"], "none", 1.0, str(host.base / "input"))
    (once,) = add(small["model"], "mine", 1.0)
    with pytest.raises(ValueError, match="mine: it is loaded twice"):
        add(once, "mine", 0.5)


def test_new_files_of_an_adapter_are_noticed(nodes: Nodes, tmp_path: Path) -> None:
    changed = nodes["VCDeftLoadAdapter"].IS_CHANGED
    before = changed(adapter="none", adapter_path=str(tmp_path))
    assert changed(adapter="none", adapter_path=str(tmp_path)) == before
    (tmp_path / "adapter_config.json").write_text("{}")
    assert changed(adapter="none", adapter_path=str(tmp_path)) != before


def test_an_own_task_is_found_in_its_folder(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "dawn-to-dusk.toml").write_text(TASK)
    task, columns, summary = nodes["VCDeftChooseTask"]().choose(
        "depth-to-image", name="dawn-to-dusk", task_folder=f" {tmp_path} "
    )
    assert columns == "image_1: street by day\nimage_2: street by night (generated)"
    assert summary == "Night."
    assert task.folders[-1] == tmp_path


def test_a_task_of_an_adapter_is_known_while_the_adapter_is_used(
    small: Nodes, micro_model: Path, tmp_path: Path
) -> None:
    random_adapter(micro_model, tmp_path / "carrier", Adapter(rank=2), seed=5)
    (tmp_path / "carrier" / "tasks").mkdir()
    (tmp_path / "carrier" / "tasks" / "carried.toml").write_text(TASK)
    (carrying,) = small["VCDeftLoadAdapter"]().add(
        small["model"], "none", 1.0, str(tmp_path / "carrier")
    )
    task, told, _ = small["VCDeftChooseTask"]().choose("depth-to-image", name="carried")
    assert told == "carried: a task of the adapter"
    made(small, carrying, task=task)
    with pytest.raises(ValueError, match="unknown task 'carried'"):
        made(small, small["model"], task=task)


def test_the_list_of_tasks_is_that_of_the_package_and_of_the_model_folder(nodes: Nodes) -> None:
    from visualcloze_deft.task_registry.files import load_tasks

    names, _ = declared(nodes["VCDeftChooseTask"])["task"]
    assert {*names} == {*load_tasks(), "day-to-night"}


def test_a_task_that_nobody_declares_is_named(small: Nodes) -> None:
    task, _, _ = small["VCDeftChooseTask"]().choose("depth-to-image", name="dept-to-image")
    with pytest.raises(ValueError, match=r"unknown task 'dept-to-image'.*depth-to-image"):
        made(small, small["model"], task=task)


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
        back = pictures.image_of(pictures.pictures_of(batch, "image_1"))
        assert torch.equal(back, given.expand(2, 16, 16, 3))
    assert pictures.pictures_of(torch.ones(1, 8, 8, 4), "image_1")[0].mode == "RGBA"
    with pytest.raises(ValueError, match="image_1: it holds values that are not finite"):
        pictures.pictures_of(given / 0, "image_1")


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
