"""Good inputs for every command, made by the project's own commands on a model of a few thousand
parameters: what the fuzz spoils."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tomli_w
from harness import call
from inputs import SCENES
from micro_model import write_micro_model
from PIL import Image
from test_annotate import write_depth_model
from test_folder_layouts import CAPTIONS, LAYOUTS, PAIRS
from test_sources import graph, insdet, write, write_table
from tiny_captioner import write_captioner

SHAPES = ((48, 32), (32, 32), (40, 64), (64, 48))
SUFFIXES = (".png", ".jpg", ".tiff", ".avif")
SETTINGS = {
    "model": "micro",
    "output": "new",
    "steps": 2,
    "batch": 1,
    "processes": 1,
    "seed": 3,
    "save_every": 1,
    "keep_checkpoints": 2,
    "guidance": 1.5,
    "context_weight": 0.5,
    "timeout": 600.0,
    "data": {
        "sources": ["folder=photos"],
        "tasks": "depth-to-image,own-task=2",
        "task_folders": ["own"],
        "resolution": 32,
        "weights": {"depth-to-image": 2.0},
        "recipe": {"examples": [0.5, 0.5], "hide_target": 0.25, "run_length": 4},
    },
    "adapter": {"method": "deft", "rank": 2, "p_lr_ratio": 0.1},
    "optimiser": {"lr": 1e-3, "betas": [0.9, 0.99], "warmup": 1, "max_grad_norm": 1.0},
    "logging": {"trackers": [], "norms_every": 1},
}
TASK = {
    "summary": "A task of one's own.",
    "group": "own",
    "instruction": ["From {depth} to {target}."],
    "content": "caption",
    "columns": {"depth": ["a depth map", "distances"], "target": ["a picture"]},
}
ROLES = {"phrases": {"sketch": ["a sketch"]}, "sets": {"lines": {"sketch": "sketch"}}}
THING = SETTINGS | {
    "data": {"sources": ["photos=thing"], "tasks": "subject-driven", "resolution": 32},
    "subject": {"trigger": "sks", "class_word": "fox", "class_data": "folder=listed"},
}
COMPARISON = {
    "output": "compared",
    "rank": 2,
    "seeds": [0, 1],
    "methods": ["deft", "lora"],
    "method": {"lora": {"optimiser": {"lr": 1e-3}}},
    "run": {
        "model": "micro",
        "steps": 3,
        "batch": 2,
        "processes": 1,
        "data": {"tasks": "image-to-normals,colourisation"},
        "logging": {"trackers": []},
    },
    "new": {"tasks": "image-to-normals"},
    "old": {"tasks": "depth-to-image", "grids": 2},
    "evaluate": {"grids": 3, "steps": 2},
}


def make(folder: Path) -> None:
    """Fill the new folder `folder`; every name in it is relative to it."""
    folder.mkdir()
    write_micro_model(folder / "micro")
    write_depth_model(folder / "depth-model")
    photos(folder / "photos")
    listed(folder / "listed")
    as_it_lies(folder)
    write_captioner(folder / "captioner")
    graph(folder / "graph")
    (folder / "table").mkdir()
    write_table(folder / "table", "parquet")
    insdet(folder / "insdet")
    subjects(folder)
    (folder / "own").mkdir()
    for name, value in {
        "run.toml": SETTINGS,
        "thing.toml": THING,
        "compare.toml": COMPARISON,
        "own/own-task.toml": TASK,
        "own/roles.toml": ROLES,
        "photos/depth.toml": {"meaning": "metric", "unit": "mm", "near": 0.5, "far": 8.0},
    }.items():
        (folder / name).write_text(tomli_w.dumps(value), encoding="utf-8")
    for words in (
        "tasks example depth-to-image --resolution 32 --output grids",
        (
            "infer --images-per-grid 2 --examples grids --model micro "
            "--inference-steps 1 --output made"
        ),
        "train --config run.toml --output run",
        (
            "compile --examples grids/grid.json --model micro --untrained-context "
            "--output compiled.safetensors"
        ),
        "export run --format diffusers --output lora.safetensors --no-verify",
        "export run --format kohya --output kohya.safetensors --no-verify",
        SCENES,
        "data annotate folder=listed --annotate depth=depth-model --output annotated",
        "data cache --config run.toml --output encodings",
    ):
        done = call(words.split(), folder)
        assert done.status == 0, f"vcdeft {words}: {done.said[-2000:]}"
    images(folder)


def photos(folder: Path) -> None:
    """Pictures of several formats, depth of 16 bits, masks and captions in subfolders."""
    rng = np.random.default_rng(0)
    for k, (size, suffix) in enumerate(zip(SHAPES, SUFFIXES, strict=True)):
        width, height = size
        picture = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        depth = np.linspace(500, 8000, width * height).reshape(height, width).astype(np.uint16)
        mask = np.zeros((height, width), np.uint8)
        mask[8:24, 8:24] = 255
        for role in ("target", "depth", "mask", "caption"):
            (folder / role).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize(size).save(folder / "target" / f"{k}{suffix}")
        Image.fromarray(depth).save(folder / "depth" / f"{k}.png")
        Image.fromarray(mask).save(folder / "mask" / f"{k}.png")
        (folder / "caption" / f"{k}.txt").write_text(f"photo {k} of a café\n", encoding="utf-8")


def listed(folder: Path) -> None:
    """A table of JSON lines with its pictures."""
    folder.mkdir()
    rows = []
    for k, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{k}.png")
        rows.append({"reference": f"{(k + 1) % 3}.png", "target": f"{k}.png", "caption": colour})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")


def as_it_lies(folder: Path) -> None:
    """Pairs by prefix, in a shard, and in the two tables of an imagefolder."""
    layouts = {
        "named": LAYOUTS["depth_0001"],
        "shards": LAYOUTS["tar"],
        "imagefolder": LAYOUTS["metadata.jsonl"],
        "sheet": LAYOUTS["metadata.csv"],
    }
    for name, write_layout in layouts.items():
        (folder / name).mkdir()
        write_layout(folder / name, PAIRS, CAPTIONS)


def subjects(folder: Path) -> None:
    """A DreamBooth of two subjects, a DreamBench++ of one, and photos of one thing."""
    for k in range(3):
        path = folder / "thing" / f"IMG {k}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 24), (80 * k, 40, 90)).save(path)
        write(path.with_suffix(".txt"), f"a fox, {k}\n")
    for name in ("cat/00", "cat/01", "dog/00", "dog/01"):
        path = folder / "dreambooth" / "dataset" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), "red").save(path)
    write(folder / "dreambooth/dataset/prompts_and_classes.txt", CLASSES)
    bench = folder / "dreambench/data"
    (bench / "images/animal").mkdir(parents=True)
    Image.new("RGB", (32, 24), "red").save(bench / "images/animal/00.jpg")
    write(bench / "captions/animal/00.txt", "fox\na fox at sea\na fox in snow\n")


CLASSES = """Classes

subject_name,class
cat,cat
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
]
"""


def images(folder: Path) -> None:
    """What `vcdeft eval --images` compares."""
    for name in ("left", "right"):
        (folder / name).mkdir()
        for k in range(2):
            Image.new("RGB", (32, 32), (80 * k, 40, 90)).save(folder / name / f"{k}.png")
    (folder / "prompts.json").write_text(json.dumps({"0": "a wall", "1": "a café"}))
