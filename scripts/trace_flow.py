"""Count the code that runs: python scripts/trace_flow.py

How many of our files and functions run (a) from the index of an example to its loss, (b) in
`vcdeft infer` before the pipeline is called, on the embedded base. A function counts from its
first call; bodies of classes and modules at import do not. --list names them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import visualcloze_deft
from visualcloze_deft.cli import main as vcdeft
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.sampling.encoding import encode
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.run_data import mixture_of

ROOT = Path(visualcloze_deft.__file__).parent
CELL = 32  # pixels

Ran = dict[tuple[str, str], int]


class Reached(Exception):
    """Ends a command where counting ends."""


@contextmanager
def counted() -> Iterator[Ran]:
    """Collect (file, function) of every function of ours that is called inside."""
    found: Ran = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and code.co_name[0] != "<":
            file = str(Path(code.co_filename).relative_to(ROOT))
            found.setdefault((file, code.co_qualname), len(found))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def to_the_loss() -> Ran:
    """From `PixelDataset[i]` to the velocity error of one example."""
    from visualcloze_deft.backbones.flux_fill.loading import load_models

    run = load_run("tiny", [f"data.resolution={CELL}", "data.tasks=depth-to-image"])
    models, mixture = load_models("tiny"), mixture_of(run)
    loss = GridLoss(models.transformer, context_weight=1.0, guidance=run.guidance)
    data = PixelDataset(mixture)
    with counted() as found, torch.no_grad():
        groups = encode(models, [data[0]], seed=run.seed, times=run.timestep_sampling)
        loss(groups)
    return found


def before_the_pipeline() -> Ran:
    """What `vcdeft infer` does until it asks its pipeline for images."""
    from visualcloze_deft.inference.pipeline import InContextPipeline

    def stop(*_: object, **__: object) -> None:
        sys.setprofile(None)
        raise Reached

    complete = InContextPipeline.complete
    with tempfile.TemporaryDirectory() as folder:
        grids = Path(folder, "grids")
        words = ["--resolution", str(CELL), "--output", str(grids)]
        vcdeft(["tasks", "example", "depth-to-image", *words])
        InContextPipeline.complete = stop
        try:
            with counted() as found:
                words = ["--examples", str(grids / "grid.json"), "--output", f"{folder}/made"]
                vcdeft(["infer", *words])
        except Reached:
            pass
        finally:
            InContextPipeline.complete = complete
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the functions")
    options = parser.parse_args()
    flows: dict[str, Callable[[], Ran]] = {
        "index to loss": to_the_loss,
        "infer before the pipeline": before_the_pipeline,
    }
    print("| flow | files | functions |\n|---|---|---|")
    for name, flow in flows.items():
        found = flow()
        print(f"| {name} | {len({file for file, _ in found})} | {len(found)} |", flush=True)
        if options.list:
            for file, function in sorted(found, key=lambda key: found[key]):
                print(f"    {file}: {function}")


if __name__ == "__main__":
    main()
