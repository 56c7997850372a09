"""What docs/subject.md says of the embedded base: python scripts/measure_subject.py

Three ways to learn a procedural object from four pictures of it: the defaults for any pictures, the
run file `subject`, and that with prior preservation. Each is asked for new pictures of the object,
and for what the base knew. Prints a table of changes from the base with 95 % intervals, and writes
it into --output and between the marks of --report. Trainings and figures that are there are kept.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from visualcloze_deft.comparison.measure import measure
from visualcloze_deft.comparison.records import (
    Measured,
    QuerySet,
    read_measured,
    write_measured,
)
from visualcloze_deft.config.comparison import Evaluate
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.config.seeds import OTHER_SCENES
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.data.sources.scenes import PICTURES, Subject
from visualcloze_deft.data.subject import Named, Naming
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.reporting.random_effects import estimate
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training.run_data import resolution_of

NAMING = Naming(trigger="sks", class_word="cube")
SUBJECT_TASK = "subject-driven"
OTHERS = ("depth-to-image", "segmentation-to-image", "image-to-depth", "image-editing")
COLUMNS = {
    "new pictures of the object": ("new",),
    "other things, same task": (SUBJECT_TASK,),
    "other tasks": OTHERS,
}
AGAINST = {
    "`subject` against the defaults": ("subject", "defaults"),
    "with prior preservation against without": ("prior", "subject"),
}
Figures = Mapping[str, Measured]
MARKS = "<!-- subject:begin -->\n", "<!-- subject:end -->"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: a row of the table, and the words of `vcdeft train` for it."""

    title: str
    words: tuple[str, ...]
    named: bool


def arms(number: int, photos: Path, class_data: str) -> dict[str, Arm]:
    """photos: a folder with the pictures of object `number`."""
    named = [f"subject.trigger={NAMING.trigger}", f"subject.class_word={NAMING.class_word}"]
    # all four pictures are trained on: the further images are what is held out
    own = ["--config", "subject", "--data", f"photos={photos}", *sets(named)]
    own += sets(["data.validation_every=0"])
    of_class = sets([f"subject.class_data={class_data}"])
    return {
        "defaults": Arm(
            title="defaults for any pictures",
            words=("--config", "tiny-photos", "--data", f"subject={number}"),
            named=False,
        ),
        "subject": Arm(title="`subject`", words=tuple(own), named=True),
        "prior": Arm(
            title="`subject` with prior preservation", words=(*own, *of_class), named=True
        ),
    }


def sets(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def write_photos(folder: Path, number: int, size: int) -> None:
    """The four pictures of an object that are trained on, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Subject(size=size, number=number)
    for k in range(PICTURES):
        item = source.item(source.pairs.index(((k + 1) % PICTURES, k)))
        item.image("target").save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(item.texts["caption"] + "\n", encoding="utf-8")


def train(folder: Path, arm: Arm, seed: int, options: argparse.Namespace) -> None:
    """One training, if its adapter is not there yet."""
    if (folder / "adapter").is_dir():
        return
    words = [*arm.words, "--model", options.model, "--seed", str(seed), "--output", str(folder)]
    words += ["--steps", str(options.steps), "--processes", "1"]
    words += sets(["sample_grids=0", "logging.trackers=[]", f"save_every={options.steps}"])
    words += sets(options.settings)
    subprocess.run(
        [sys.executable, "-m", "visualcloze_deft", "train", *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def query_sets(run: Run, options: argparse.Namespace, naming: Naming) -> dict[str, QuerySet]:
    """What every adapter is asked, by row: new pictures of the object, the same task about other
    things, and what is not trained."""
    size, tasks = resolution_of(run), load_tasks()
    views = open_source(f"subject={options.subject}/views", size=size, seed=0)
    scenes = open_source("scenes", size=size, seed=OTHER_SCENES)
    asked = {"new": (SUBJECT_TASK, Named(views, naming), options.grids)}
    asked |= {name: (name, scenes, options.old_grids) for name in (SUBJECT_TASK, *OTHERS)}
    return {
        row: QuerySet(
            group="new" if row == "new" else "old",
            grids=grids,
            task=tasks[name],
            mixture=Mixture({name: tasks[name]}, [source], seed=0, resolution=size),
        )
        for row, (name, source, grids) in asked.items()
    }


def figures(
    pipe: InContextPipeline,
    adapter: Path | None,
    folder: Path,
    options: argparse.Namespace,
    *,
    naming: Naming,
) -> Figures:
    """The figures of an adapter, by row; those that are in `folder` already are read."""
    run = load_run("subject", [f"model={options.model}"])
    pipe.delete_adapters(pipe.get_active_adapters())
    if adapter:
        pipe.load_adapter(adapter, "measured")
    settings = Evaluate(steps=options.inference_steps)
    found = {}
    for row, one in query_sets(run, options, naming).items():
        wanted = {"grids": one.grids, "steps": settings.steps, "naming": vars(naming)}
        path = folder / f"{row}.json"
        found[row] = read_measured(path, wanted) or measure(pipe, run, one, settings)[0]
        write_measured(path, found[row], wanted)
    return found


def changes(of: Sequence[Figures], than: Sequence[Figures]) -> list[tuple[str, str]]:
    """For each column the change of PSNR [dB] and the fall of the velocity error [%], seed by seed
    and grid by grid."""
    pairs = [*zip(of, than, strict=True)]
    found = []
    for rows in COLUMNS.values():
        dB = [[np.subtract(f[r].psnr, g[r].psnr) for r in rows] for f, g in pairs]
        ratio = [[np.log(np.divide(f[r].errors, g[r].errors)) for r in rows] for f, g in pairs]
        gain, rise = (
            estimate(np.array([np.concatenate(one) for one in each])) for each in (dB, ratio)
        )
        falls = [100 * (1 - np.exp(x)) for x in (rise.mean, rise.high, rise.low)]
        found.append(
            (
                f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})",
                f"{falls[0]:+.1f} ({falls[1]:+.1f} to {falls[2]:+.1f})",
            )
        )
    return found


def table(rows: Mapping[str, list[tuple[str, str]]]) -> Iterator[str]:
    for kind, measured in enumerate(("PSNR, gain [dB]", "velocity error, fall [%]")):
        yield f"| {measured} | {' | '.join(COLUMNS)} |"
        yield f"|{'---|' * (1 + len(COLUMNS))}"
        for title, found in rows.items():
            yield f"| {title} | {' | '.join(one[kind] for one in found)} |"
        yield ""


def put(page: Path, text: str) -> None:
    begin, end = MARKS
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{page}: no marks {begin.strip()} and {end}")
    new = re.sub(f"{begin}.*{end}", lambda _: f"{begin}{text}{end}", old, flags=re.S)
    write_text(page, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--subject", type=int, default=0, help="number of the object")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="defaults,subject,prior")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--grids", type=int, default=16, help="new pictures of the object")
    parser.add_argument("--old-grids", type=int, default=6, help="of each task that the base knows")
    parser.add_argument("--inference-steps", type=int, default=8)
    parser.add_argument("--class-data", default="scenes")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--output", type=Path, default=Path("runs/measure-subject"))
    parser.add_argument("--report", type=Path, help="page with the marks of the table")
    options = parser.parse_args()
    began = time.monotonic()
    size = resolution_of(load_run("subject", [f"model={options.model}"]))
    photos = options.output.resolve() / "photos"
    write_photos(photos, options.subject, size)
    wanted = arms(options.subject, photos, options.class_data)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    chosen = {name: wanted[name] for name in options.arms.split(",")}
    runs = options.output / "runs"
    for seed in seeds:
        for name, arm in chosen.items():
            train(runs / f"{name}-s{seed}", arm, seed, options)
            print(f"{time.monotonic() - began:.0f} s: {name}, seed {seed} trained", flush=True)
    pipe = InContextPipeline.from_pretrained(options.model, merge=False)
    rows, of, ask = {}, {}, partial(figures, pipe, options=options)
    for name, arm in chosen.items():
        naming, folder = NAMING if arm.named else Naming(), options.output / "figures"
        base = ask(None, folder / f"base-{'named' if arm.named else 'plain'}", naming=naming)
        of[name] = [
            ask(runs / f"{name}-s{seed}" / "adapter", folder / f"{name}-s{seed}", naming=naming)
            for seed in seeds
        ]
        rows[arm.title] = changes(of[name], [base] * len(seeds))
        print(f"{time.monotonic() - began:.0f} s: {name} measured", flush=True)
    for title, (one, than) in AGAINST.items():
        if {one, than} <= of.keys():
            rows[title] = changes(of[one], of[than])
    text = "\n".join(table(rows))
    said = (
        "Change from the base, or from another training; above 0 is better. "
        f"{len(seeds)} seeds, {options.steps} steps of 8 grids, {options.grids} new pictures of "
        f"the object, {options.old_grids} grids of each other task, {options.inference_steps} "
        "sampling steps. In brackets the 95 % interval for other seeds and grids.\n"
    )
    print(f"{text}\n{said}")
    write_text(options.output / "table.md", f"{text}\n{said}")
    if options.report:
        put(options.report, f"\n{text}\n{said}\n")


if __name__ == "__main__":
    main()
