"""Everything that can be wrong with a run, checked before anything expensive; settings decided."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from visualcloze_deft.adapters.metadata import check_base, check_start
from visualcloze_deft.backbones import lora_files
from visualcloze_deft.backbones.base import Backbone, Feature, Load
from visualcloze_deft.backbones.model_files import check_quantise
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.overrides import flat
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.planning.memory import LEAST, decided, load_of
from visualcloze_deft.runtime.gpus import check_alike, gpus_here, precision_on
from visualcloze_deft.storage.adapter_places import TASKS
from visualcloze_deft.storage.step_names import by_step
from visualcloze_deft.training import deepspeed_settings
from visualcloze_deft.training.batch_schedule import BatchSchedule
from visualcloze_deft.training.checkpoint import newest
from visualcloze_deft.training.resume import (
    DECIDED,
    DIVIDED,
    check_items,
    check_resumed,
    check_tasks,
    divided,
)
from visualcloze_deft.training.run_data import held_out_of, mixture_of
from visualcloze_deft.training.run_folder import (
    INDEX,
    MISSING,
    SETTINGS,
    _version,
    describe,
    encodings_folder,
    saved_anything,
)
from visualcloze_deft.training.subject import check_subject


def plan_of(run: Run, mixture: Mixture, *, processes: int) -> BatchSchedule:
    """How the run's examples are dealt. Raises `UserError` where not every grid fits."""
    if 0 < run.batch_tokens < mixture.most_tokens:
        raise UserError(
            f"batch_tokens = {run.batch_tokens}: grids of this run have up to "
            f"{mixture.most_tokens} tokens; give that many or more"
        )
    return BatchSchedule(
        world=processes,
        accumulate=run.accumulate,
        batch=run.batch,
        budget=run.batch_tokens,
        tokens_of=mixture.tokens,
    )


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
    backbone = backbone_of(run.model)
    backbone.check(run.model)
    check_features(run, backbone)
    check_attention(run)
    check_quantise(run.quantise, zero3=run.zero == 3)
    encodings_folder(run)
    if run.model_lora is not None:
        lora_files.changes_of(run.model, run.model_lora)  # read whole, or refused
    if run.adapter.init_from is not None and not resume:
        folder, wanted = Path(run.adapter.init_from), run.adapter
        if (wanted.alpha, wanted.target_modules) != (None, "default"):
            raise UserError(
                "adapter.init_from keeps its own scale and layers: leave alpha and target_modules"
            )
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
    check_layout(mixture, backbone)
    plan = plan_of(run, mixture, processes=processes)
    if run.logging.validate_every:
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
            check_items(mixture, output)
    describe(run, mixture, output)
    return mixture


def check_features(run: Run, backbone: Backbone) -> None:
    """Raise `UserError` where a setting needs what the model's family does not have."""
    asked: tuple[tuple[Feature, str, bool], ...] = (
        ("lora-files", "model_lora", run.model_lora is not None),
        ("quantised", "quantise", run.quantise != "none"),
        ("scheduled-sampling", "scheduled_sampling", run.scheduled_sampling > 0),
        ("context-cache", "context", run.context != "full"),
    )
    for feature, setting, used in asked:
        if used and feature not in backbone.features:
            raise UserError(f"{setting}: not for models of {backbone.name}; leave it out")


def check_layout(mixture: Mixture, backbone: Backbone) -> None:
    """Raise `UserError` where a model's family cannot make the grids of a task."""
    counts = [rows for rows, weight in enumerate(mixture.recipe.examples, 1) if weight]
    for name, task in (pair for one in mixture.whole for pair in one.tasks.items()):
        for rows in counts:
            columns, targets = len(task.roles), len(task.targets)
            if why := backbone.refuses(rows, columns, targets):
                raise UserError(
                    f"task {name}, {rows} x {columns}: not for models of {backbone.name}: {why}; "
                    "see --tasks and data.recipe.examples"
                )


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
    deepspeed_settings.check_installed()
    deepspeed_settings.check(run)
    check_subject(run)
    for gpu in gpus_here():
        precision_on(run.precision, gpu)
    if run.compile and run.zero == 3:
        raise UserError("compile is not for ZeRO-3, which gathers weights inside a block; --zero 2")
    for name in run.logging.trackers:
        if _version(name) == MISSING:
            raise UserError(
                f"logging.trackers names {name}, whose package is not installed; "
                f"'pip install {name}' or take it out"
            )


def check_attention(run: Run) -> None:
    """Raise `UserError` where the backend of attention is unknown or, on a CPU, cannot be used.

    A GPU is left to the processes that compute: here it would take memory as long as they run.
    """
    if run.attention == "auto":
        return
    import torch  # and what follows takes seconds, which most runs need not wait here

    from visualcloze_deft.backbones import attention
    from visualcloze_deft.backbones.kernels import shapes_in

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
    saved = by_step(Path(run.output) / "checkpoints")
    if run.adapter.init_from is None or not saved:
        return run
    adapter = run.adapter.model_copy(update={"init_from": str(saved[-1])})
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
