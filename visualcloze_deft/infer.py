"""What `vcdeft infer` does: grids in, images, contact sheets and their recipe out.

OUTPUT/NAME.png          (NAME-2.png: of column 2, NAME-seed7.png: of seed 7, where several)
OUTPUT/NAME-sheet.png    the whole grid
OUTPUT/NAME.json         all that made them, written last: a grid that has one is finished

Any number of processes, also of other machines on one file system, may work on one list: each
locks the grid that it makes.
"""

from __future__ import annotations

import glob
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import torch
from tqdm import tqdm

from visualcloze_deft import adapters, lorafile, speed
from visualcloze_deft.attention import AUTO, NATIVE
from visualcloze_deft.cells import CELL_STEP, Cells, grid_cells, strip_shapes
from visualcloze_deft.claims import CLAIMS, Claims
from visualcloze_deft.digests import digest
from visualcloze_deft.errors import UserError
from visualcloze_deft.gridfile import Entry, Request, read_entries
from visualcloze_deft.launch import check_processes, prepared
from visualcloze_deft.modelfolder import (
    CONFIG,
    WEIGHTS,
    Bits,
    check_base,
    check_folder,
    check_quantise,
    fingerprint,
    folder_of,
    index_of,
    lora_file,
    other_lora,
    resolution_of,
    told_by,
)
from visualcloze_deft.models import default_dtype, load_tokenizers, text_length
from visualcloze_deft.output import check_foreign, output_folder, whole, whole_text
from visualcloze_deft.pipeline import (
    Answer,
    InContextPipeline,
    NotFinite,
    check_attention,
    one_of,
)
from visualcloze_deft.prompt import ClipText, Prompt, clip_text, fits, unread
from visualcloze_deft.registry import Task, load_tasks
from visualcloze_deft.sheet import draw_grid, text_of, told_by_image
from visualcloze_deft.signals import LAUNCHER, Asked, exit_status, handled
from visualcloze_deft.textfile import read_object
from visualcloze_deft.upsample import Upsampling

VERSIONS = ("visualcloze-deft", "torch", "diffusers", "transformers", "peft")
SHEET = "-sheet.png"  # how the names of contact sheets end
NOT_COMPARED = (
    "images",
    "device",
    "dtype",
    "versions",
    "rows",
    "task",
    "adapters",
    "model",
    "model_lora",
    "batch",
    "of_seed",
    "attention_used",
    "attention_check",
)
SINCE = "VCDEFT_SINCE"  # when --overwrite was asked for, for the processes that share its list
WAY_OUT = "give --overwrite, or another --output"
WAIT = 0.5  # seconds between two looks at what other processes make
MANY = 20  # grids from which on reading their pictures gets a bar


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How grids are completed: what `vcdeft infer` is told beside the grids. None: as the adapter
    was trained, or as the model says."""

    model: str
    lora: str | None = None
    adapters: Mapping[Path, float]
    quantise: Bits = "none"
    clip_text: ClipText | None = None
    cells: Cells | None = None
    seed: int | None = None
    images: int = 1
    steps: int
    guidance: float
    resolution: int | None = None
    upsampling: Upsampling | None = None
    task_folders: tuple[str, ...] = ()
    batch: int = 1
    encodings: Path | None = None
    offload: speed.Offload = "none"
    cache: str | None = None
    attention: str = AUTO
    vae_tiling: bool = False
    compile_blocks: bool = False


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One grid that was read and found good. shape: (height, width) of its strips; names: of its
    images; steps: calls of the transformer; prompts: its own, then those of upsampling; record: see
    `record_of`."""

    entry: Entry
    shape: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    steps: int
    prompts: tuple[Prompt | str, ...]
    record: dict[str, Any]

    @property
    def images(self) -> int:
        """How many samples go through the transformer; each may have several targets."""
        seeds = self.record["seed"]
        return len(seeds) if isinstance(seeds, list) else 1

    @property
    def tokens(self) -> int:
        return sum(h * w for h, w in self.shape) // CELL_STEP**2


def infer(
    examples: Path,
    output: Path,
    settings: Settings,
    *,
    processes: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    arguments: Sequence[str] = (),
) -> list[Path]:
    """Complete every grid of `examples` that is not finished in `output`; returns the images
    written.

    processes: 0 is one for each GPU, as far as there are grids, or one. arguments: the command
    line, with which further processes are started. overwrite: make anew what was there before.
    """
    check(settings)
    check_processes(processes)
    if not dry_run:
        folder_of(settings.model)  # whose fingerprint the records hold
    since = float(os.environ.get(SINCE, time.time())) if overwrite else 0.0
    tasks = load_tasks(map(Path, settings.task_folders))
    shared = shared_of(settings)
    entries = read_entries(examples)
    plans = planned(entries, tasks, settings, shared)
    check_output(output)
    output_folder(output)
    check_inputs_stay(examples, output, plans)
    waiting = [plan for plan in plans if not finished(output, plan, since=since)]
    if not prepared():
        for line in (
            *unread_words(waiting, settings.model, shared["clip_text"]),
            *other_bases(settings),
            *(described(plans, waiting, shared) if dry_run else ()),
        ):
            tqdm.write(line)
        if len(waiting) < len(plans) and not dry_run:
            tqdm.write(f"{len(plans) - len(waiting)} of {len(plans)} grids are finished already")
    if dry_run:
        return []
    count = processes or max(min(torch.cuda.device_count(), len(waiting)), 1)
    if count > 1 and not prepared():
        share(output, waiting, arguments, count, since=since)
    elif waiting:
        work(output, waiting, tasks, settings, since=since)
    return [output / name for plan in waiting for name in plan.names if (output / name).is_file()]


def check(settings: Settings) -> None:
    """Raise `UserError` for what can be known to be wrong before anything is loaded."""
    if not math.isfinite(settings.guidance):
        raise UserError(f"--guidance {settings.guidance}: give a number, e.g. 30")
    if settings.resolution is not None and settings.resolution % CELL_STEP:
        raise UserError(f"--resolution {settings.resolution}: give a multiple of {CELL_STEP}")
    check_folder(settings.model)
    check_quantise(settings.quantise)
    speed.check(
        offload=settings.offload,
        cache=settings.cache,
        attention=settings.attention,
        quantise=settings.quantise,
        batch=settings.batch,
    )
    if not torch.cuda.is_available():  # on a GPU each process that generates tries it
        dtype = default_dtype("cpu")
        check_attention(settings.attention, settings.model, device="cpu", dtype=dtype)
    if settings.lora is not None:
        lorafile.changes_of(settings.model, settings.lora)  # read whole, or refused
    for folder in settings.adapters:
        adapters.read_config(folder)
        adapters.read_weights(folder)
        check_base(folder, settings.model, lora=settings.lora)


def shared_of(settings: Settings) -> dict[str, Any]:
    """What the records of all grids say: what made them."""
    told = index_of(settings.model)
    for folder in list(settings.adapters)[:1]:
        told |= told_by(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "model": settings.model,
        "model_lora": settings.lora,
        "adapters": [
            {"path": str(folder.absolute()), "strength": strength}
            for folder, strength in settings.adapters.items()
        ],
        **hashes_of(settings),
        "dtype": str(default_dtype(device)).removeprefix("torch."),
        "device": device,
        "quantise": settings.quantise,
        "clip_text": settings.clip_text or one_of(told.get("clip_text"), get_args(ClipText)),
        "cells": settings.cells or one_of(told.get("cells"), get_args(Cells)),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "cache": settings.cache,
        # null for "auto", as in records of before it; what it came to is not compared
        "attention": None if settings.attention == AUTO else settings.attention,
        "vae_tiling": settings.vae_tiling,
        "compile": settings.compile_blocks,
        "batch": settings.batch,
        "resolution": settings.resolution or resolution_of(settings.model),
        "versions": {name: version(name) for name in VERSIONS},
    }


def hashes_of(settings: Settings) -> dict[str, Any]:
    """What tells the weights that make the images from others under the same names."""
    return {
        "model_fingerprint": fingerprint(settings.model) or settings.model,
        "model_lora_sha256": settings.lora and digest(lora_file(settings.lora)),
        "adapters_sha256": [
            [digest(folder / WEIGHTS), strength] for folder, strength in settings.adapters.items()
        ],
        "adapters_config_sha256": [digest(folder / CONFIG) for folder in settings.adapters],
    }


def check_unchanged(settings: Settings, record: Mapping[str, Any]) -> None:
    """Raise `UserError` where what was loaded is not what a record planned before says."""
    for key, value in hashes_of(settings).items():
        if record[key] != value:
            raise UserError(
                f"{key} is {shortly(value)}, and was {shortly(record[key])} when this command "
                "began: a file was replaced; give the command again"
            )


def planned(
    entries: Sequence[Entry],
    tasks: Mapping[str, Task],
    settings: Settings,
    shared: Mapping[str, Any],
) -> list[Planned]:
    """Every grid read once: a mistake in the last one is found before the first one is made."""
    plans = []
    few = len(entries) < MANY or prepared()
    for entry in tqdm(entries, desc="checking grids", unit="grid", disable=few):
        asked = requested(entry, tasks, settings)
        shape = strip_shapes(asked.sizes, shared["resolution"], shared["cells"])
        last = grid_cells(asked.sizes, shared["resolution"], shared["cells"])[-1]
        cells = [last[column] for column in asked.targets]
        ways = [(how, *cell) for how, cell in zip(asked.upsampling, cells, strict=False) if how]
        with entry.errors():
            for how, width, height in ways:
                how.size(width, height)
        steps = settings.steps + sum(how.steps(settings.steps) for how, *_ in ways)
        plans.append(
            Planned(
                entry=entry,
                shape=shape,
                names=image_names(entry.name, asked),
                steps=steps * len(asked.seeds),
                prompts=(asked.prompt, *(how.prompt for how, *_ in ways if how.prompt)),
                record=record_of(asked, shared),
            )
        )
    return plans


def requested(entry: Entry, tasks: Mapping[str, Task], settings: Settings) -> Request:
    return entry.request(
        tasks, seed=settings.seed, images=settings.images, upsampling=settings.upsampling
    )


def record_of(asked: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """All that is needed to make the images of a grid again. Its keys are those of a grid file,
    too."""
    return {**record_of_grid(asked), **shared}


def record_of_grid(asked: Request) -> dict[str, Any]:
    """What a record says of a grid alone, its pictures as they were read."""
    return {
        "prompt": str(asked.prompt),
        "task": asked.task,
        "task_prompt": asked.task_prompt,
        "content_prompt": asked.content_prompt,
        "rows": [[path and str(path) for path in row] for row in asked.paths],
        "rows_sha256": [list(row) for row in asked.digests],
        "seed": asked.seeds[0] if len(asked.seeds) == 1 else list(asked.seeds),
        "upsampling": [how and asdict(how) for how in asked.upsampling] or None,
    }


def image_names(name: str, asked: Request) -> tuple[str, ...]:
    """File names of the images of a grid, in the order of `Completed`."""
    return tuple(
        name
        + (f"-seed{seed}" if len(asked.seeds) > 1 else "")
        + (f"-{column + 1}" if len(asked.targets) > 1 else "")
        + ".png"
        for seed in asked.seeds
        for column in asked.targets
    )


def check_output(output: Path) -> None:
    """Raise `UserError` where the folder holds what no list of grids leaves, e.g. a project. Files
    in the place of results are looked at one by one: see `finished`."""
    if not (output / CLAIMS).is_file():
        check_foreign(output, ("*.png", "*.json", "*.jsonl"), what="results of vcdeft")


def check_inputs_stay(examples: Path, output: Path, plans: Sequence[Planned]) -> None:
    """Raise `UserError` where a result would be written over what it is made from."""
    read = {
        Path(path).resolve()
        for plan in plans
        for row in plan.record["rows"]
        for path in row
        if path
    }
    read.add(examples.resolve())
    read |= {path.resolve() for path in examples.glob("*.json")} if examples.is_dir() else set()
    for plan in plans:
        for name in files_of(plan):
            if (output / name).resolve() in read and not is_record(output / name):
                raise UserError(
                    f"{output / name}: is read here, and would be written over; give another "
                    "--output"
                )


def files_of(plan: Planned) -> tuple[str, ...]:
    """The names of all files that are made of a grid, the record last."""
    return (*plan.names, f"{plan.entry.name}{SHEET}", f"{plan.entry.name}.json")


def is_record(path: Path) -> bool:
    try:
        return read_record(path) is not None
    except UserError:
        return False


def finished(output: Path, plan: Planned, *, since: float) -> bool:
    """Whether a grid's record and images are there. Raises `UserError` where something else is in
    their place.

    since: when overwriting was asked for, 0 where it was not: what is older is then not there.
    """
    path = output / f"{plan.entry.name}.json"
    if since:
        return path.is_file() and path.stat().st_mtime >= since
    before = read_record(path)
    now = compared(plan.record)
    if before is None:
        for name in files_of(plan):
            if (output / name).exists() and compared(told_by_image(output / name)) != now:
                raise UserError(
                    f"{output / name}: already there, not made by this command; {WAY_OUT}"
                )
        return False
    found = compared(before)
    for key, value in now.items():
        if found.get(key) != value:
            raise UserError(
                f"{path}: made with {key} {shortly(found.get(key))}, asked for is "
                f"{shortly(value)}; {WAY_OUT}"
            )
    return all((output / name).is_file() for name in plan.names)


def compared(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record says that images are the same, as it is after JSON."""
    kept = {key: value for key, value in record.items() if key not in NOT_COMPARED}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a finished grid; None where there is none. Raises `UserError` where the file is
    something else."""
    if not path.exists():
        return None
    try:
        found = read_object(path, "no record")
    except UserError:
        found = {}
    if "rows_sha256" not in found:
        raise UserError(f"{path}: already there and no record of vcdeft; {WAY_OUT}")
    return found


def shortly(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def described(
    plans: Sequence[Planned], waiting: Sequence[Planned], shared: Mapping[str, Any]
) -> list[str]:
    """What a run would do."""
    lines = []
    for plan in plans:
        strips = ", ".join(f"{w}x{h}" for h, w in plan.shape)
        state = "to do" if plan in waiting else "finished"
        lines.append(
            f"{plan.entry.name}  {plan.record['task'] or '-':24} rows of {strips}  "
            f"{plan.tokens} tokens  {', '.join(plan.names)}  {state}"
        )
    steps = sum(plan.steps for plan in waiting)
    lines.append(
        f"{len(waiting)} of {len(plans)} grids to do, {steps} calls of the transformer, "
        f"{shared['model']} in {shared['dtype']} on {shared['device']}"
    )
    return lines


def unread_words(plans: Sequence[Planned], model: str, order: ClipText) -> list[str]:
    """A line for every grid and encoder whose text is cut, with the words that are not read."""
    clip, t5 = load_tokenizers(model)
    lines = []
    for plan in plans:
        for prompt in plan.prompts:
            own = isinstance(prompt, str)  # of an upsampling
            for_clip = prompt if isinstance(prompt, str) else clip_text(prompt, fits(clip), order)
            cut = {
                "T5": unread(t5, str(prompt), text_length(t5)),
                "CLIP": unread(clip, for_clip, clip.model_max_length),
            }
            lines += [
                f"grid {plan.entry.name}: {encoder} does not read the end of its "
                f"{'upsampling prompt' if own else 'text'}: {words}"
                for encoder, words in cut.items()
                if words
            ]
    return lines


def other_bases(settings: Settings) -> list[str]:
    """A line for every adapter that was trained on a base with another LoRA merged."""
    found = [other_lora(folder, settings.lora) for folder in settings.adapters]
    return [f"{line}; see --lora" for line in found if line]


def work(
    output: Path,
    waiting: Sequence[Planned],
    tasks: Mapping[str, Task],
    settings: Settings,
    *,
    since: float,
) -> None:
    """Make what nobody else makes, grids of one shape together; then wait for what others make, and
    make what they leave undone when they end."""
    if all(finished(output, plan, since=since) for plan in waiting):  # by others, meanwhile
        return
    pipe, claims = load(settings), Claims(output)
    check_unchanged(settings, waiting[0].record)
    if pipe.attention.line:
        tqdm.write(pipe.attention.line)
    used = {
        "attention_used": pipe.attention.backend,
        "attention_check": pipe.attention.line,
    }
    left, theirs = list(waiting), list[Planned]()
    said = False
    with tqdm(total=sum(plan.steps for plan in left), desc="generating", unit="step") as bar:

        def step(_: Any, __: int, ___: Any, told: dict[str, Any]) -> dict[str, Any]:
            bar.update(len(told["latents"]))
            return told

        while left or theirs:
            if not left:
                if not said:
                    tqdm.write(f"waiting for what other processes make, {len(theirs)} grids")
                said = True
                time.sleep(WAIT)
                left, theirs = theirs, []
            chunk: list[Planned] = []
            images = 0
            for plan in [plan for plan in left if plan.shape == left[0].shape]:
                if chunk and images + plan.images > settings.batch:
                    break
                left.remove(plan)
                if not claims.take(plan.entry.name):
                    theirs.append(plan)
                elif finished(output, plan, since=since):  # by another, meanwhile
                    bar.update(plan.steps)
                    claims.release(plan.entry.name)
                else:
                    clear_parts(output, plan)
                    chunk.append(plan)
                    images += plan.images
            if not chunk:
                continue
            before = bar.n
            asked = [requested(plan.entry, tasks, settings) for plan in chunk]
            try:
                made = pipe.complete(
                    asked,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    resolution=settings.resolution,
                    batch_size=settings.batch,
                    callback_on_step_end=step,
                )
            except NotFinite as error:
                raise UserError(f"{chunk[error.grid].entry.where}: {error.why}") from None
            bar.update(before + sum(plan.steps for plan in chunk) - bar.n)
            for number, (plan, one) in enumerate(zip(chunk, asked, strict=True)):
                answers = [answer for answer in made.answers if answer.grid == number]
                record = plan.record | record_of_grid(one) | used
                write(output, replace(plan, record=record), one, answers)
                claims.release(plan.entry.name)


def load(settings: Settings) -> InContextPipeline:
    """The pipeline that `settings` describe."""
    offloaded = settings.offload != "none"
    pipe = InContextPipeline.from_pretrained(
        settings.model,
        adapter=settings.adapters,
        lora=settings.lora,
        device="cpu" if offloaded else None,
        torch_dtype=default_dtype("cuda" if torch.cuda.is_available() else "cpu"),
        quantise=settings.quantise,
        clip_text=settings.clip_text,
        cells=settings.cells,
        encodings=settings.encodings,
        task_folders=settings.task_folders,
        attention=NATIVE if offloaded else settings.attention,
    )
    speed.enable(
        pipe,
        offload=settings.offload,
        cache=settings.cache,
        attention=settings.attention if offloaded else None,
        vae_tiling=settings.vae_tiling,
        compile_blocks=settings.compile_blocks,
    )
    pipe.blend.settle()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def share(
    output: Path,
    waiting: Sequence[Planned],
    arguments: Sequence[str],
    count: int,
    *,
    since: float,
) -> None:
    """Run this command in `count` processes, each on a GPU of its own where there are any.

    Ctrl-C and SIGTERM end them, too, and so does whatever ends this one. Raises `UserError` where
    grids are not made, because so many of them failed.
    """
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "visualcloze_deft", *arguments]
    started = []
    for rank in range(count):
        own = {LAUNCHER: str(os.getpid()), "TQDM_DISABLE": "1", SINCE: str(since)}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = visible_gpus(gpus)[rank]
        else:
            own["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))
        started.append(subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL))
    asked = Asked()

    def pass_on(number: int, _: FrameType | None) -> None:
        again = asked.twice(number)
        for process in started:
            process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    with (
        handled(pass_on),
        tqdm(total=len(waiting), desc=f"{count} processes", unit="grid") as bar,
    ):
        while any(process.poll() is None for process in started):
            time.sleep(0.2)
            bar.update(sum(done(output, plan, since) for plan in waiting) - bar.n)
        bar.update(sum(done(output, plan, since) for plan in waiting) - bar.n)
    if asked:
        raise SystemExit(exit_status(asked.signal))
    failed = sum(process.returncode != 0 for process in started)
    if unmade := sum(not done(output, plan, since) for plan in waiting):
        raise UserError(
            f"{failed} of {count} processes failed, {unmade} grids are not made; the same "
            f"command {'without --overwrite ' if since else ''}goes on with them"
        )
    if failed:
        tqdm.write(f"{failed} of {count} processes failed; the others have made their grids")


def visible_gpus(count: int) -> list[str]:
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return told.split(",") if told else [str(number) for number in range(count)]


def done(output: Path, plan: Planned, since: float) -> bool:
    """Whether a process has written the record."""
    path = output / f"{plan.entry.name}.json"
    return path.is_file() and path.stat().st_mtime >= since


def clear_parts(output: Path, plan: Planned) -> None:
    """Remove what a process that was killed has left of a grid."""
    for name in files_of(plan):
        for part in output.glob(f".{glob.escape(name)}.*.part"):
            part.unlink(missing_ok=True)


def write(output: Path, plan: Planned, asked: Request, answers: Sequence[Answer]) -> None:
    """One grid's files, each whole or not at all, the record last."""
    (output / f"{plan.entry.name}.json").unlink(missing_ok=True)  # of what is overwritten
    images = [image for answer in answers for image in answer.images]
    seeds = [answer.seed for answer in answers for _ in answer.images]
    for name, image, seed in zip(plan.names, images, seeds, strict=True):
        told = text_of(plan.record | {"of_seed": seed})
        whole(output / name, partial(image.save, format="PNG", pnginfo=told))
    title = " ".join(part for part in (asked.task_prompt, asked.content_prompt) if part)
    rows = [*asked.rows[:-1], *(answer.row for answer in answers)]
    first = len(asked.rows) - 1
    marks = [(first + k, column) for k in range(len(answers)) for column in asked.targets]
    sheet = draw_grid(rows, title=title, made=marks, cell=192)
    *_, sheet_name, record_name = files_of(plan)
    whole(output / sheet_name, partial(sheet.save, format="PNG", pnginfo=text_of(plan.record)))
    text = json.dumps({"images": list(plan.names), **plan.record}, indent=1)
    whole_text(output / record_name, text)
