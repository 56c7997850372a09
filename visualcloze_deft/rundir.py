"""A run folder that describes itself, and the checks that come before anything expensive."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field

from visualcloze_deft import deepspeed_settings, lorafile
from visualcloze_deft.checkpoint import Progress, newest, told
from visualcloze_deft.data.annotate import annotated, check_places
from visualcloze_deft.data.item import Part, Source, units_of
from visualcloze_deft.data.mixture import Able, Mixture
from visualcloze_deft.data.sources import open_source
from visualcloze_deft.digests import digest_of
from visualcloze_deft.errors import UserError, nearest
from visualcloze_deft.gpus import check_alike, gpus_here, precision_on
from visualcloze_deft.memory import LEAST, Load, decided, load_of
from visualcloze_deft.modelfolder import (
    LORA_DIGEST,
    check_base,
    check_folder,
    check_quantise,
    check_start,
    fingerprint,
    lora_file,
)
from visualcloze_deft.modelfolder import resolution_of as model_resolution
from visualcloze_deft.modelsettings import SettingsFile, checked
from visualcloze_deft.output import LOCK, check_foreign, only_writer, whole_text
from visualcloze_deft.plan import Plan
from visualcloze_deft.registry import Task, load_tasks, matching, select
from visualcloze_deft.runlines import read_lines as read_lines
from visualcloze_deft.runlines import step_of
from visualcloze_deft.settings import Run, load_run, setting_names, write_run
from visualcloze_deft.textfile import read_text
from visualcloze_deft.tomlfile import read_toml

SETTINGS, VERSIONS, TASKS = "settings.toml", "versions.json", "tasks"
INDEX = "index"  # folder of the sources' indexes
ENCODINGS = "encodings"  # folder of what strips and texts were encoded to
METRICS, SKIPPED = "metrics.jsonl", "skipped.jsonl"  # a line a step; a line an unreadable item
EVALUATION = "evaluation.jsonl"  # a line each time held-out grids are looked at
WRITING = ".writing"  # the lock of the process that trains, within its launcher's
BEFORE_A_RUN = (LOCK, WRITING, INDEX, ENCODINGS, f".{VERSIONS}.*.part")
"""What a run folder may hold that has no `VERSIONS` yet, which is written before all the rest."""
OTHER_SCENES = 1_000_003  # added to the seed: scenes that training does not draw
FREE_ON_RESUME = {
    "output",
    "steps",
    "batch",
    "accumulate",
    "processes",
    "zero",
    "checkpoint_blocks",
    "attention",
    "offload",
    "save_every",
    "keep",
    "compile",
    "timeout",
    "not_finite_at_most",
    "sheet_every",
    "data.workers",
    "data.skip_at_most",
    "data.encodings",
    "offload_encoders",
}
"""Settings that may change when a run goes on: they leave the examples of every step as they were.

Another `steps` stretches a cosine schedule and the "auto" warm-up of a run of less than 500 steps,
so the learning rate goes on from where the new one is.
"""
DECIDED = ("zero", "checkpoint_blocks")  # settings that `prepare` chooses where they are "auto"
DIVIDED = ("batch", "batch_tokens")  # settings that it may divide anew among processes
FIXED = ("model", "adapter.", "seed", "ema")  # what may never change: it is in the checkpoint
MISSING = "not installed"
PACKAGES = [
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "visualcloze-deft",
]


def mixture_of(run: Run, *, held_out: bool = False, cache: Path | None = None) -> Mixture:
    """The run's tasks over its sources: those of a weight above 0, and of "all" and patterns those
    that the sources can serve.

    held_out: over the items that `data.hold_out` keeps out of training, if it keeps any. cache: a
    folder for the sources' indexes.
    """
    sources = sources_of(run, held_out=held_out, cache=cache)
    weights, tasks = tasks_of(run)
    if tasks and (held_out or leaves_out(run.data.tasks)):
        tasks = {n: t for n, t in tasks.items() if any(len(Able(s, t.roles)) for s in sources)}
        if not tasks:
            raise UserError(
                f"no task can be made from {', '.join(run.data.sources)}: "
                + "; ".join(f"{s.name} has the roles {', '.join(sorted(s.roles))}" for s in sources)
            )
    return Mixture(
        tasks,
        sources,
        seed=run.seed,
        resolution=resolution_of(run),
        cells=run.data.cells,
        recipe=run.data.recipe,
        weights=weights,
    )


def held_out_of(run: Run, *, cache: Path | None = None) -> Mixture:
    """The mixture over what is never trained on: the items that `data.hold_out` keeps or, of scenes
    alone, which have no end, those of another seed. Raises `UserError` where there is nothing."""
    if run.data.hold_out:
        return mixture_of(run, held_out=True, cache=cache)
    finite = [spec for spec in run.data.sources if spec.partition("=")[0] != "scenes"]
    if finite:
        raise UserError(
            f"watch.evaluate_every = {run.watch.evaluate_every}: nothing of {finite[0]} is held "
            "out; set data.hold_out, e.g. to 10, or watch.evaluate_every to 0"
        )
    return mixture_of(run.model_copy(update={"seed": run.seed + OTHER_SCENES}), cache=cache)


def plan_of(run: Run, mixture: Mixture, *, processes: int) -> Plan:
    """How the run's examples are dealt. Raises `UserError` where not every grid fits."""
    if 0 < run.batch_tokens < mixture.most_tokens:
        raise UserError(
            f"batch_tokens = {run.batch_tokens}: grids of this run have up to "
            f"{mixture.most_tokens} tokens; give that many or more"
        )
    return Plan(
        world=processes,
        accumulate=run.accumulate,
        batch=run.batch,
        budget=run.batch_tokens,
        tokens_of=mixture.tokens,
    )


def tasks_of(run: Run) -> tuple[dict[str, float], dict[str, Task]]:
    """The weights of all that the run names, and the tasks of a weight above 0."""
    known = load_tasks(Path(folder) for folder in run.data.task_folders)
    weights = weights_of(run, known)
    return weights, {name: known[name] for name, weight in weights.items() if weight > 0}


def sources_of(run: Run, *, held_out: bool, cache: Path | None = None) -> list[Source]:
    """The run's sources, with what is annotated: the items that `data.hold_out` leaves to training,
    or those it keeps. cache: a folder for their indexes."""
    check_places(run.data.annotate)
    size, every = resolution_of(run), run.data.hold_out
    opened = [open_source(spec, size=size, seed=run.seed, cache=cache) for spec in run.data.sources]
    sources = annotated(opened, run.data.annotate)
    for source in sources if every else ():
        if not len(Part(source, every=every, held_out=True)):
            units = units_of(source)
            of = "" if units is None else f" of {max(units) + 1} units"
            raise UserError(
                f"data.hold_out = {every}: {source.name} has {len(source)} items{of}; "
                "give a smaller one"
            )
    return [Part(s, every=every, held_out=held_out) for s in sources] if every else sources


def leaves_out(tasks: str) -> bool:
    """Whether tasks without data are left out and not refused: "all" or a pattern was asked for."""
    return any(part.strip() == "all" or "*" in part for part in tasks.split(","))


def weights_of(run: Run, known: Mapping[str, Task]) -> dict[str, float]:
    """How often each task of the run is drawn, relative to the others.

    Where two keys of `data.weights` name one task the later counts; a group or pattern there does
    not weigh what `data.tasks` names by its own name.
    """
    named = {part.partition("=")[0].strip() for part in run.data.tasks.split(",")}
    given: dict[str, float] = {}
    for key, weight in run.data.weights.items():
        names = matching(known, key)
        if not names:
            raise UserError(f"data.weights names {key!r}; {nearest(key, known)}")
        given |= {name: weight for name in names if name == key or name not in named}
    return {n: said * given.get(n, 1.0) for n, said in select(known, run.data.tasks).items()}


def resolution_of(run: Run) -> int:
    """The cell side the run trains at."""
    return model_resolution(run.model) if run.data.resolution == "model" else run.data.resolution


def encodings_folder(run: Run) -> Path | None:
    """Where the run keeps encodings, if it does. Raises `UserError` where that is no folder."""
    if not run.data.encodings:
        return None
    own = run.data.encodings == "run"
    folder = Path(run.output) / ENCODINGS if own else Path(run.data.encodings)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"data.encodings {folder}: no folder; give one, or a path yet free")
    return folder


@contextmanager
def own(output: Path) -> Iterator[None]:
    """Within, the run folder `output` is this process's alone: from the first look at what it holds
    to the end of the run, so that no other can prepare it, or train in it, between.

    Raises `UserError` where it holds anything but a run, before anything is written, or is
    another's. A run that is refused within leaves no folder where there was none.
    """
    check_output(output)
    fresh = not output.exists()
    with only_writer(output), unmade(output, fresh=fresh):
        with only_writer(output, name=WRITING):  # processes of a launcher that was killed are gone
            check_output(output)
        yield


def check_output(output: Path) -> None:
    """Raise `UserError` where the folder `output` holds anything but a run of vcdeft."""
    if not is_run(output):
        check_foreign(output, BEFORE_A_RUN, what="run of vcdeft")


def is_run(output: Path) -> bool:
    """Whether `describe` has written into the folder `output`, or a run has saved something there
    and lost its versions since."""
    try:
        if saved_anything(output):
            return {"output", "model", "adapter"} <= {*read_toml(output / SETTINGS)}
        return "visualcloze-deft" in recorded(output)
    except (OSError, ValueError, TypeError):
        return False


def prepare(
    run: Run,
    *,
    processes: int,
    resume: bool,
    allowed: Collection[str] = (),
    divide: bool = False,
) -> Mixture:
    """Check what can be told without weights, then create or verify the run folder, which must be
    this process's `own`.

    allowed: settings that may differ from those of the run that is resumed. divide: whether its
    batch is divided anew among the processes.
    """
    check_settings(run)
    check_alike(gpus_here()[:processes])
    check_folder(run.model)
    check_attention(run)
    check_quantise(run.quantise, zero3=run.zero == 3)
    encodings_folder(run)
    if run.model_lora is not None:
        lorafile.changes_of(run.model, run.model_lora)  # read whole, or refused
    if run.adapter.start is not None and not resume:
        folder, wanted = Path(run.adapter.start), run.adapter
        if (wanted.alpha, wanted.layers) != (None, "flux"):
            raise UserError("adapter.start keeps its own scale and layers: leave alpha and layers")
        check_start(folder, wanted.method, wanted.rank, run.model_lora)
        check_base(folder, run.model, lora=run.model_lora)
    output = Path(run.output)
    if not resume and saved_anything(output):
        raise UserError(
            f"output {output} holds another run; go on with --resume or choose another --output"
        )
    if divide:
        run = divided(run, processes=processes)
    mixture = mixture_of(run, cache=output / INDEX)
    plan = plan_of(run, mixture, processes=processes)
    if run.watch.evaluate_every:
        held_out_of(run, cache=output / INDEX)
    items = sum(len(source) for source in mixture.sources)
    if items < processes:
        raise UserError(
            f"{processes} processes for {items} items in {', '.join(run.data.sources)}; "
            "name more data or fewer --processes"
        )
    chosen = decided(to_plan(run), load_in(run, mixture), processes=processes)
    run = run.model_copy(update={name: getattr(chosen, name) for name in DECIDED})
    check_offload(run)  # whose stage may have been chosen just now
    if resume:
        start = newest(output / "checkpoints")[0]
        check_resumed(run, start.progress, plan, allowed)
        check_base(start.folder, run.model, lora=run.model_lora)
        if not any(name.startswith("data.") for name in allowed):
            check_tasks(mixture, output / TASKS)
    describe(run, mixture, output)
    return mixture


def check_settings(run: Run) -> None:
    """Raise `UserError` where settings do not go together, cannot be written down, or a tracker's
    package is missing."""
    for name, value in flat(run.model_dump(mode="json")).items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{name} = {value}: a name that is not UTF-8; rename it") from None
    if run.optimiser.warmup_of(run.steps) > run.steps:
        raise UserError(
            f"optimiser.warmup = {run.optimiser.warmup}: longer than the {run.steps} steps of the "
            'run; give less, or "auto"'
        )
    deepspeed_settings.check(run)
    for gpu in gpus_here():
        precision_on(run.precision, gpu)
    if run.compile and run.zero == 3:
        raise UserError("compile is not for ZeRO-3, which gathers weights inside a block; --zero 2")
    for name in run.watch.trackers:
        if _version(name) == MISSING:
            raise UserError(
                f"watch.trackers names {name}, whose package is not installed; 'pip install {name}'"
                " or take it out"
            )


def check_attention(run: Run) -> None:
    """Raise `UserError` where the backend of attention is unknown or, on a CPU, cannot be used.

    A GPU is left to the processes that compute: here it would take memory as long as they run.
    """
    if run.attention == "auto":
        return
    import torch  # and what follows takes seconds, which most runs need not wait here

    from visualcloze_deft import attention
    from visualcloze_deft.kernels import shapes_in

    attention.check_known(run.attention)
    if not torch.cuda.is_available():
        shapes = shapes_in(run, image_tokens=(), device=torch.device("cpu"))
        attention.require(run.attention, shapes, passes="both")


def load_in(run: Run, mixture: Mixture) -> Load:
    """The most a process computes at once on the run's examples."""
    return load_of(
        run, most=mixture.most_tokens, least=mixture.least_tokens, strip=mixture.widest_strip
    )


def to_plan(run: Run) -> Run:
    """`run` as its memory is planned: an adapter that it started from lies in its own checkpoint,
    once there is one, whatever became of the first folder."""
    saved = sorted((Path(run.output) / "checkpoints").glob("step-*"))
    if run.adapter.start is None or not saved:
        return run
    adapter = run.adapter.model_copy(update={"start": str(saved[-1])})
    return run.model_copy(update={"adapter": adapter})


def as_decided(run: Run) -> Run:
    """`run` with what its folder says was chosen where settings left it open, or divided."""
    kept = load_run(str(Path(run.output) / SETTINGS))
    return run.model_copy(update={name: getattr(kept, name) for name in (*DECIDED, *DIVIDED)})


def check_offload(run: Run) -> None:
    """Raise `UserError` where the run's ZeRO stage splits nothing that could be offloaded."""
    least = LEAST[run.offload]
    if run.zero != "auto" and run.zero < least:
        raise UserError(f"offload {run.offload!r} with --zero {run.zero}: give --zero {least}")


@contextmanager
def unmade(output: Path, *, fresh: bool) -> Iterator[None]:
    """What is refused before it has written anything leaves no folder behind where there was none.

    fresh: whether there was none. What another process wrote there meanwhile stays.
    """
    try:
        yield
    except UserError:
        if fresh and output.is_dir() and {*os.listdir(output)} <= {LOCK, WRITING, INDEX}:
            shutil.rmtree(output, ignore_errors=True)
        raise


def saved_anything(output: Path) -> bool:
    """Whether a run in `output` came as far as a checkpoint or an adapter."""
    return (output / "adapter").exists() or any((output / "checkpoints").glob("step-*"))


def check_resumed(run: Run, progress: Progress, plan: Plan, allowed: Collection[str]) -> None:
    """Raise `UserError` unless the run goes on as what it was, with the next examples, but for the
    settings `allowed` to change."""
    known = setting_names()
    for name in allowed:
        if name not in known:
            raise UserError(f"--allow-change {name!r}: no such setting; {nearest(name, known)}")
        if name.startswith(FIXED):
            raise UserError(
                f"--allow-change {name}: what was trained so far is for one model, adapter and "
                "order of examples; start another --output, with adapter.start to go on from it"
            )
    before = flat(load_run(str(Path(run.output) / SETTINGS)).model_dump(mode="json"))
    now = flat(run.model_dump(mode="json"))
    may = ("deepspeed.", "watch.", *(f"{name}." for name in allowed))
    for name in sorted({*before, *now} - FREE_ON_RESUME - {*allowed}):
        if before.get(name) != now.get(name) and not name.startswith(may):
            raise UserError(
                f"--resume: {name} was {before.get(name)!r}, now it is {now.get(name)!r}; leave "
                f"it as it was, start another --output, or say --allow-change {parent(name)}"
            )
    if (plan.size, run.seed) != (progress.global_batch, progress.seed):
        what = "tokens" if run.batch_tokens else "grids"
        raise UserError(
            f"--resume: the run takes {progress.global_batch} {what} a step with seed "
            f"{progress.seed}; now it would take {plan.size} with seed {run.seed}. Choose --batch, "
            "--processes and accumulate so that their product stays"
        )
    if run.steps < progress.step:
        raise UserError(f"--resume: the run is at step {progress.step}, --steps is {run.steps}")


def parent(name: str) -> str:
    """The setting that a dotted name belongs to: an entry of a table goes by the table's name."""
    known = setting_names()
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def divided(run: Run, *, processes: int) -> Run:
    """A run that goes on with `processes` processes: as many grids or tokens a step as before.

    Raises `UserError` where they cannot be divided so.
    """
    progress = newest(Path(run.output) / "checkpoints")[0].progress
    name = "batch_tokens" if run.batch_tokens else "batch"
    each, rest = divmod(progress.global_batch, processes * run.accumulate)
    if rest:
        raise UserError(
            f"--resume: {progress.global_batch} {name} a step cannot be divided among {processes} "
            f"processes x {run.accumulate} accumulated batches; choose another --processes or "
            "accumulate"
        )
    return run.model_copy(update={name: each})


def check_tasks(mixture: Mixture, before: Path) -> None:
    """Raise `UserError` unless the tasks and what their files say are what the run began with."""
    if odd := sorted(set(mixture.tasks) ^ {path.stem for path in before.glob("*.toml")}):
        raise UserError(
            f"--resume: the run began with other tasks; {odd[0]} is there only before or only now. "
            f"Name those in {before} with --tasks, or start another --output"
        )
    for name, task in mixture.tasks.items():
        kept = before / f"{name}.toml"
        if read_toml(kept) != task.as_file():
            raise UserError(
                f"--resume: task {name} of {task.path} has changed since the run began ({kept}); "
                "put it back or start another --output"
            )


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name.

    >>> flat({"a": 1, "b": {"c": 2}})
    {'a': 1, 'b.c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def describe(run: Run, mixture: Mixture, output: Path) -> None:
    """Write settings, tasks, the mixture's proportions and versions into the run folder.

    Each task becomes a file of its own, whatever family declares it. The versions come first: they
    tell that the folder is a run's, in which the rest may be replaced.
    """
    proportions = dict(zip(mixture.tasks, mixture.proportions.tolist(), strict=True))
    facts = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "task_proportions": proportions,
    }
    output.mkdir(parents=True, exist_ok=True)
    whole_text(output / VERSIONS, json.dumps(facts, indent=1))
    tasks = output / TASKS
    shutil.rmtree(tasks, ignore_errors=True)
    tasks.mkdir()
    for name, task in mixture.tasks.items():
        whole_text(tasks / f"{name}.toml", tomli_w.dumps(task.as_file()))
    write_run(run, output / SETTINGS)


class VersionsFile(SettingsFile):
    """What is read again of `VERSIONS`."""

    attention: str = ""
    attention_check: str = ""
    not_finite: Mapping[str, str] = Field(default_factory=dict)
    norms: str = ""


def record(output: Path, facts: Mapping[str, object]) -> None:
    """Put `facts`, known only once the run has started, beside the versions in its folder."""
    path = output / VERSIONS
    with told(path):
        whole_text(path, json.dumps(recorded(output) | dict(facts), indent=1))


def recorded(output: Path) -> dict[str, Any]:
    """Versions of packages, and what `record` put beside them; {} where there is no such file."""
    path = output / VERSIONS
    return checked(path, VersionsFile, "no versions of a run") if path.is_file() else {}


def base_of(run: Run) -> dict[str, str]:
    """What an adapter says of the base that it was trained on: to be asked when that is loaded, as
    its files may be replaced later."""
    return {
        "base_model": run.model,
        "base_fingerprint": fingerprint(run.model),
        "base_lora": run.model_lora or "",
        LORA_DIGEST: digest_of(lora_file(run.model_lora)) if run.model_lora else "",
    }


def adapter_metadata(
    run: Run, step: int, *, attention: str, base: Mapping[str, str]
) -> dict[str, str]:
    """What the adapter file says of itself (safetensors metadata: text values only). An adapter
    that training started from keeps its own scale and layers, which its settings file tells.
    attention: the backend that it was trained with last. base: see `base_of`."""
    alpha, layers = run.adapter.alpha, run.adapter.layers
    if run.adapter.start is not None:
        alpha, layers = None, f"those of {run.adapter.start}"
    return {
        "visualcloze_deft": _version("visualcloze-deft"),
        "method": run.adapter.method,
        "rank": str(run.adapter.rank),
        "alpha": str(alpha or ""),
        "layers": layers,
        "dropout": str(run.adapter.dropout),
        "quantise": run.quantise,
        "attention": attention,
        "clip_text": run.clip_text,
        "cells": run.data.cells,
        **base,
        "step": str(step),
        "tasks": run.data.tasks,
    }


def append_line(path: Path, fields: Mapping[str, object]) -> None:
    """One more line of JSON, in which a number that is not finite is null."""
    text = json.dumps(finite(fields), ensure_ascii=False, allow_nan=False)
    with told(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text + "\n")


def finite(value: object) -> object:
    """`value` with None for what JSON has no number for.

    >>> finite({"a": [1.5, float("nan")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_lines_until(output: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again."""
    for path in (output / METRICS, output / SKIPPED, output / EVALUATION):
        if path.exists():
            lines = read_text(path).split("\n")
            kept = "".join(f"{line}\n" for line in lines if step_of(line) <= step)
            whole_text(path, kept)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
