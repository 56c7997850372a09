"""Samples while a run trains: the same grids from the same noise each time, beside the base's.

RUN/sheets/step-NNNNNN.png      a sheet; that of step 0 shows the base
RUN/sheets/base/TASK-K-C.png    what the base makes of grid K of a task, cell C: made once, also for
                                a run that is resumed

Nothing here draws from a process's generators, so that a run trains alike with and without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from visualcloze_deft.adapters.injection import without_adapter
from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.data.example import Example
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.queries import query_of
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting.contact_sheet import image_metadata, metadata_text
from visualcloze_deft.sampling.context import FULL, Context
from visualcloze_deft.sampling.room import NoRoom, Room, put_back, short_of_memory
from visualcloze_deft.storage.atomic import atomic_write, write_png
from visualcloze_deft.storage.step_names import step_name
from visualcloze_deft.task_registry.task import Task
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.engine import published
from visualcloze_deft.training.metrics_log import from_first, gathered
from visualcloze_deft.training.sample_sheets import STEPS, Made, Sample, answer, sheet_of
from visualcloze_deft.training.step import first_said

BASE = "base"
AT_MOST = 4  # grids of one task
TRIES = 4  # grids drawn for each that is shown, where items come again

Doing = Callable[[str], None]
Answers = list[Made | None]
"""What was made of each grid, None where memory is too small."""


def grids_shown(mixture: Mixture, count: int) -> list[Example]:
    """At most `count` grids of the tasks drawn most often, up to `AT_MOST` of a task, none of which
    asks for the same item twice."""
    heaviest = {*np.argsort(-mixture.proportions, kind="stable")[:count].tolist()}
    tasks = [task for place, task in enumerate(mixture.tasks.values()) if place in heaviest]
    each = min(count // len(tasks), AT_MOST) if tasks else 0
    return [one for task in tasks for one in different(mixture, task, each)]


def different(mixture: Mixture, task: Task, count: int) -> list[Example]:
    """Up to `count` grids of a task with different queries."""
    found: dict[str, Example] = {}
    for index in range(TRIES * count):
        one = query_of(mixture, task, index=index)
        found.setdefault(one.keys[-1], one)
        if len(found) == count:
            break
    return [*found.values()]


class BasePictures:
    """The base's answers in a folder, each with the record of what it was made from."""

    def __init__(self, folder: Path, run: Run, base: Mapping[str, str]) -> None:
        """base: see `run_folder.base_of`."""
        self.folder = folder
        fields = "model model_lora quantise precision clip_text guidance seed".split()
        told = {name: getattr(run, name) for name in fields} | dict(base)
        self.about = {**told, "resolution": run.data.resolution, "cells": run.data.cells}

    def record(self, example: Example) -> dict[str, Any]:
        seen = hashlib.sha256(b"".join(cell.tobytes() for row in example.complete for cell in row))
        asked = {"keys": example.keys, "prompt": str(example.prompt), "steps": STEPS}
        asked["pixels"] = seen.hexdigest()
        record: dict[str, Any] = json.loads(json.dumps(self.about | asked))
        return record

    def places(self, example: Example) -> list[Path]:
        name = f"{example.task}-{example.index}"
        return [self.folder / f"{name}-{c}.png" for c in range(sum(example.hidden))]

    def kept(self, example: Example) -> Made | None:
        """What was kept; None where nothing was, or it was made from something else."""
        record, places = self.record(example), self.places(example)
        if any(image_metadata(path) != record for path in places):
            return None
        with suppress(UserError):  # spoiled: it is made again
            return [read_image(path) for path in places]
        return None

    def keep(self, example: Example, made: Made) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        told = metadata_text(self.record(example))
        for path, picture in zip(self.places(example), made, strict=True):
            atomic_write(path, partial(picture.save, format="PNG", pnginfo=told))


class SampleSheets:
    """The sheets of a run: the processes share its grids, and the first one draws and writes."""

    def __init__(
        self,
        run: Run,
        models: Models,
        engine: Any,
        shown: Mixture,
        *,
        base: Mapping[str, str],
        rank: int,
        world: int,
    ) -> None:
        """shown: what samples are made of. base: see `run_folder.base_of`."""
        self.run = run
        self.models = models
        self.engine = engine
        self.shown = shown
        self.rank = rank
        self.world = world
        self.folder = Path(run.output) / run_folder.SHEETS
        self.base = BasePictures(self.folder / BASE, run, base)

    def write(self, step: int, doing: Doing) -> None:
        """The sheet of a step. Grids that memory is too small for are left out, in all processes,
        and training goes on. doing: told what is made."""
        examples = grids_shown(self.shown, self.run.sample_grids)
        if not examples:
            return
        room = Room(
            self.models,
            split=self.run.zero == 3 and self.world > 1,
            agree=lambda failure: first_said(failure, self.world),
        )
        with published(self.engine, averaged=self.run.ema > 0 and step > 0), put_back(room):
            made = self.answers(examples, room, step, doing)
        if self.rank == 0:
            self.draw(examples, made, room, step)

    def answers(
        self, examples: Sequence[Example], room: Room, step: int, doing: Doing
    ) -> dict[str, Answers]:
        """What each column of the sheet shows of the examples."""
        with self.as_base():
            found = {BASE: self.of_base(examples, room, f"sheet of step {step}: base", doing)}
        if step or self.adapter_differs_at_start:
            what = f"sheet of step {step}: adapter"
            own = Context(seen="full" if self.run.context == "mixed" else self.run.context)
            found["adapter"] = self.made_of(examples, room, what, doing, context=own)
        return found

    @property
    def adapter_differs_at_start(self) -> bool:
        """Of a run that starts from an adapter, and of PaRa, which removes from the first step."""
        adapter = self.run.adapter
        return adapter.init_from is not None or METHODS[adapter.method].factors == ("P",)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside, the denoiser computes as the base, and compiles nothing for this one time."""
        with ExitStack() as held:
            held.enter_context(without_adapter(self.engine.module.denoiser))
            if self.run.compile:
                held.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def of_base(self, examples: Sequence[Example], room: Room, what: str, doing: Doing) -> Answers:
        """The base's answers: those that were kept, the others made and kept."""
        found = from_first(
            lambda: [self.base.kept(one) for one in examples], rank=self.rank, world=self.world
        )
        missing = [k for k, made in enumerate(found) if made is None]
        answers = self.made_of([examples[k] for k in missing], room, what, doing)
        for k, made in zip(missing, answers, strict=True):
            found[k] = made
            if made is not None and self.rank == 0:
                self.base.keep(examples[k], made)
        return found

    def made_of(
        self,
        examples: Sequence[Example],
        room: Room,
        what: str,
        doing: Doing,
        *,
        context: Context = FULL,
    ) -> Answers:
        """What the model makes of the examples, which the processes share."""
        found: Answers = []
        for first in range(0, len(examples), self.world):
            some = examples[first : first + self.world]
            tasks = ", ".join(dict.fromkeys(one.task for one in some))
            doing(f"{what}, grid {first + 1} of {len(examples)}, {tasks}")
            found += self.shared(some, room, context)
        return found

    def shared(self, examples: Sequence[Example], room: Room, context: Context) -> Answers:
        """Each process makes one of the examples. Where one has no memory for its own, all make
        each in turn, so that no other is left out."""
        own = self.tried(examples[min(self.rank, len(examples) - 1)], room, context)
        if own is None:  # in all processes
            return [self.tried(o, room, context) for o in examples] if len(examples) > 1 else [None]
        return [*gathered(own, self.world)[: len(examples)]]

    def tried(self, example: Example, room: Room, context: Context) -> Made | None:
        try:
            return answer(self.models, example, room, context=context)
        except NoRoom:
            return None

    def draw(
        self,
        examples: Sequence[Example],
        made: Mapping[str, Answers],
        room: Room,
        step: int,
    ) -> None:
        """Write the sheet of the grids of which anything was made, and say which are left out."""
        samples = []
        for k, example in enumerate(examples):
            own = {label: answers[k] for label, answers in made.items()}
            roles = self.shown.tasks[example.task].roles
            samples.append(Sample(example=example, roles=roles, made=own))
        newest = [*made.values()][-1]
        lacking = {one.task for one, found in zip(examples, newest, strict=True) if found is None}
        if room.made:
            tqdm.write(f"sheet of step {step}: {short_of_memory(sorted(lacking))}")
        drawn = [one for one, found in zip(samples, newest, strict=True) if found is not None]
        if drawn:
            self.folder.mkdir(exist_ok=True)
            write_png(
                self.folder / f"{step_name(step)}.png", sheet_of(drawn, title=f"Step {step:,}")
            )
