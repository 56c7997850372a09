"""Golden values of the whole tool: python scripts/golden.py --output golden.json

Runs every command on the embedded base with fixed seeds and writes digests of what they make:
losses and adapters of 20 steps under ZeRO 0, 2 and 3, images, exports, the figures of an
evaluation and of a comparison. A second call with --against golden.json says what differs, and ends
with status 1 where something does. A change of the code that should change no result is held to
the values of the commit before it, on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

CELL = 64  # pixels: what is compared is the code, not the pictures
METHODS = ("deft", "para", "lora")
FORMATS = ("peft", "diffusers", "comfyui", "kohya", "merged")
COMPARISON = """
output = "{output}"
rank = 4
seeds = [0, 1]
methods = ["deft", "lora"]
[run]
model = "tiny"
steps = 3
batch = 2
processes = 1
[run.data]
tasks = "image-to-normals,colourisation"
resolution = {cell}
[run.logging]
trackers = []
[new]
tasks = "image-to-normals,colourisation"
[old]
tasks = "depth-to-image"
[evaluate]
grids = 3
steps = 2
"""

Found = dict[str, Any]


def vcdeft(*words: object) -> None:
    """Run a command; its output is shown where it fails."""
    command = [sys.executable, "-m", "visualcloze_deft", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def tensors(path: Path) -> str:
    """A digest of names, shapes, types and bytes of a safetensors file or of a folder of them;
    metadata left out."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name).contiguous()
                found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def pictures(folder: Path) -> Found:
    """A digest of the pixels of every image that a command wrote."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            np.asarray(Image.open(path).convert("RGB")).tobytes()
        ).hexdigest()[:16]
        for path in sorted(folder.rglob("*.png"))
    }


# What is recorded, each in a folder of its own below `place`


def train(output: Path, method: str, zero: int, steps: int, cell: int) -> Iterator[tuple[str, Any]]:
    words = ["--steps", steps, "--batch", 2, "--processes", 1, "--resolution", cell]
    words += ["--tasks", "all", "--zero", zero, "--method", method, "--output", output]
    vcdeft("train", *words)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    yield f"{output.name}: losses", [line["loss"] for line in lines if "loss" in line]
    yield f"{output.name}: adapter", tensors(output / "adapter")


def trainings(place: Path) -> Iterator[tuple[str, Any]]:
    runs = [*(("deft", zero) for zero in (0, 2, 3)), *((method, 0) for method in METHODS[1:])]
    for method, zero in runs:
        yield from train(place / f"{method}-zero{zero}", method, zero, 20, CELL)


def small(place: Path) -> Iterator[tuple[str, Any]]:
    """One training and its export, to try the script itself."""
    yield from train(place / "deft-zero0", "deft", 0, 1, 32)
    output = place / "export.safetensors"
    words = ["--format", "diffusers", "--no-verify", "--output", output]
    vcdeft("export", place / "deft-zero0", *words)
    yield "export", tensors(output)


def images(place: Path) -> Iterator[tuple[str, Any]]:
    grids = place / "grids"
    vcdeft(
        "tasks", "example", "depth-to-image,image-editing", "--resolution", CELL, "--output", grids
    )
    deft, lora = place / "deft-zero0/adapter", place / "lora-zero0/adapter"
    ways: dict[str, Sequence[object]] = {
        "base": (),
        "adapter": ("--adapter", deft),
        "two adapters": ("--adapter", f"{deft}=0.5", "--adapter", f"{lora}=0.7"),
        "upsampled": ("--adapter", deft, "--upsample", 2),
        "fp8": ("--adapter", deft, "--quantise", "fp8"),
        "cached steps": ("--cache", "first-block=0.1"),
        "batch": ("--batch", 2, "--images-per-grid", 2),
    }
    for name, more in ways.items():
        output = place / f"images {name}"
        words = ["--examples", grids / "grid.json", "--inference-steps", 8, "--resolution", CELL]
        vcdeft("infer", *words, *more, "--output", output)
        yield f"images: {name}", pictures(output)


def exports(place: Path) -> Iterator[tuple[str, Any]]:
    for method in METHODS:
        for kind in FORMATS:
            suffix = "" if kind in ("peft", "merged") else ".safetensors"
            output = place / f"export-{method}-{kind}{suffix}"
            words = ["--format", kind, "--output", output]
            vcdeft("export", place / f"{method}-zero0", *words)
            yield f"export: {method} {kind}", tensors(output)


def evaluation(place: Path) -> Iterator[tuple[str, Any]]:
    output = place / "evaluation"
    words = [
        "--suite",
        "scenes",
        "--limit",
        2,
        "--inference-steps",
        4,
        "--batch",
        4,
        "--encoder",
        "none",
    ]
    vcdeft("eval", place / "deft-zero0/adapter", *words, "--against-base", "--output", output)
    yield "evaluation: table", (output / "table.csv").read_text("utf-8")


def comparison(place: Path) -> Iterator[tuple[str, Any]]:
    output, path = place / "comparison", place / "comparison.toml"
    path.write_text(COMPARISON.format(output=output, cell=CELL), encoding="utf-8")
    vcdeft("compare", path)
    for table in sorted(output.glob("*.csv")):
        yield f"comparison: {table.name}", table.read_text("utf-8")


PARTS: tuple[Callable[[Path], Iterator[tuple[str, Any]]], ...] = (
    trainings,
    images,
    exports,
    evaluation,
    comparison,
)


def differences(found: Found, before: Found) -> list[str]:
    """A line for every value that is not as it was, or that only one side has."""
    return [
        f"{name}:\n  before {before.get(name)}\n  now    {found.get(name)}"
        for name in sorted(found.keys() | before.keys())
        if found.get(name) != before.get(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the values")
    parser.add_argument("--against", type=Path, help="values of another commit")
    parser.add_argument(
        "--only", choices=[part.__name__ for part in PARTS], action="append", help="repeatable"
    )
    parser.add_argument("--place", type=Path, help="keep what the commands wrote here")
    parser.add_argument("--small", action="store_true", help="one training and one export")
    options = parser.parse_args()
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        place = options.place or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for part in (small,) if options.small else PARTS:
            if options.only and part.__name__ not in options.only:
                continue
            for name, value in part(place):
                print(name, flush=True)
                found[name] = value
                options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.against:
        before = json.loads(options.against.read_text("utf-8"))
        if options.only:
            before = {name: value for name, value in before.items() if name in found}
        lines = differences(found, before)
        print("\n".join(lines) or f"all {len(found)} values as before")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
