"""A memory plan as a table, a few lines and JSON; and how fast an earlier run was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from visualcloze_deft.backbones.base import Load
from visualcloze_deft.config.overrides import flat
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.config.sameness import MAY_DIFFER, differences
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.planning.machine import RESERVE, gigabytes, memory_here, parse_memory
from visualcloze_deft.planning.memory import (
    MemoryPlan,
    Parts,
    Stage,
    load_of,
    memory_plan,
    plan_here,
)
from visualcloze_deft.runtime.launch import CPU_PROCESSES
from visualcloze_deft.storage.jsonl import StepLine, read_lines
from visualcloze_deft.training import deepspeed_settings
from visualcloze_deft.training.preparation import load_in
from visualcloze_deft.training.run_data import mixture_of, resolution_of
from visualcloze_deft.training.run_folder import METRICS, SETTINGS

TIMED = 100  # last steps of an earlier run whose median counts


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Steps an hour of an earlier run, and the settings in which it was another run."""

    folder: Path
    steps_per_hour: float
    other: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One stage and number of recomputed blocks."""

    stage: Stage
    recomputed: int
    parts: Parts
    peak: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The plan of `vcdeft plan`. memory: bytes of a GPU."""

    plan: MemoryPlan
    memory: int
    rate: Rate | None

    @property
    def ways(self) -> list[Way]:
        """Each stage without recomputed blocks, with the fewest that fit, and with all."""
        plan = self.plan
        return [
            way(plan, stage, count, self.memory)
            for stage in plan.stages
            for count in sorted({0, plan.least(stage, self.memory) or 0, plan.blocks})
        ]

    @property
    def chosen(self) -> Way | None:
        """What "auto" would choose."""
        found = self.plan.left_open().choose(self.memory)
        return None if found is None else way(self.plan, *found, self.memory)

    def as_table(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        plan, run, load = self.plan, self.plan.run, self.plan.load
        yield (
            f"model    {run.model}: {plan.model.parameters / 1e9:.3g} B parameters, "
            f"{plan.blocks} blocks"
        )
        yield (
            f"load     {load.grids} x ({load.image} + {load.text} text) tokens a process, "
            f"{plan.processes} processes"
        )
        yield (
            f"adapter  {run.adapter.method}, rank {run.adapter.rank}: "
            f"{sum(plan.tensors) / 1e6:.1f} M values trained"
        )
        yield f"memory   {gigabytes(self.memory)} a process, {RESERVE:.0%} of it left free"
        yield ""
        names = [*Parts.__dataclass_fields__, "peak"]
        yield f"{'zero':>4} {'blocks':>6} " + " ".join(f"{name[:10]:>10}" for name in names)
        for one in self.ways:
            sizes = [*vars(one.parts).values(), one.peak]
            yield (
                f"{one.stage:>4} {one.recomputed:>6} "
                + " ".join(f"{size / 1e9:>10.3f}" for size in sizes)
                + ("  fits" if one.fits else "")
            )
        yield "GB of each process at its peak; blocks: how many are recomputed in the backward pass"
        yield ""
        if found := self.chosen:
            options = f"--zero {found.stage} --gradient-checkpointing {found.recomputed}"
            yield f"choose   {options}: about {gigabytes(found.peak)}"
        else:
            yield f"choose   nothing fits; {plan.left_open().way_out()}"
        yield samples_line(plan, found.stage if found else plan.left_open().smallest()[0])
        if self.rate:
            yield from self.rate_lines(self.rate)

    def rate_lines(self, rate: Rate) -> Iterator[str]:
        hours = self.plan.run.steps / rate.steps_per_hour
        yield (
            f"rate     {rate.folder}: {rate.steps_per_hour:.0f} steps an hour; at that rate "
            f"{self.plan.run.steps} steps take {hours:.1f} hours"
        )
        if rate.other:
            yield f"         it had other settings, though: {', '.join(rate.other)}"

    def as_json(self) -> dict[str, Any]:
        plan = self.plan

        def one(found: Way) -> dict[str, Any]:
            return {
                "zero": found.stage,
                "gradient_checkpointing": found.recomputed,
                "parts": vars(found.parts),
                "between": plan.between(found.stage),
                "peak": found.peak,
                "fits": found.fits,
            }

        return {
            "model": plan.run.model,
            "parameters": plan.model.parameters,
            "trained": sum(plan.tensors),
            "blocks": plan.blocks,
            "processes": plan.processes,
            "load": vars(plan.load),
            "memory": self.memory,
            "reserve": RESERVE,
            "outside": vars(plan.outside) | {"peak": plan.outside.peak},
            "ways": [one(found) for found in self.ways],
            "chosen": one(self.chosen) if self.chosen else None,
            "steps_per_hour": self.rate.steps_per_hour if self.rate else None,
        }


def way(plan: MemoryPlan, stage: Stage, recomputed: int, memory: int) -> Way:
    return Way(
        stage=stage,
        recomputed=recomputed,
        parts=plan.parts(stage, recomputed),
        peak=plan.peak(stage, recomputed),
        fits=plan.fits(stage, recomputed, memory),
    )


def memory_report_of(
    run: Run, *, memory: str | None, grid: str | None, before: Path | None
) -> MemoryReport:
    """What `vcdeft plan` says of `run`.

    memory: of a GPU, e.g. "80GB"; without, what is here. grid: "3x3", the largest; without, that of
    the data. before: an earlier run's folder.
    """
    import torch

    deepspeed_settings.check(run)
    processes = run.processes or torch.cuda.device_count() or CPU_PROCESSES
    load = load_in(run, mixture_of(run)) if grid is None else load_of_grid(run, grid)
    if memory is None:
        plan, size = plan_here(run, load, processes=processes), memory_here(processes)
    else:
        plan, size = memory_plan(run, load, processes=processes, gpu=True), parse_memory(memory)
    rate = None if before is None else rate_of(before, run)
    return MemoryReport(plan=plan, memory=size, rate=rate)


def load_of_grid(run: Run, grid: str) -> Load:
    """The load of grids of one shape, "ROWSxCOLUMNS", in square cells."""
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", grid)
    if not found:
        raise UserError(f"--grid {grid!r}: expected ROWSxCOLUMNS, e.g. 3x3")
    strip = int(found[2]) * (resolution_of(run) // CELL_STEP) ** 2
    tokens = int(found[1]) * strip
    return load_of(run, most=tokens, least=tokens, strip=strip)


def rate_of(folder: Path, run: Run) -> Rate:
    """How fast the run in `folder` was: the median of its last steps."""
    lines = read_lines(folder / METRICS, StepLine)[-TIMED:]
    if not lines:
        raise UserError(f"--run {folder}: no steps in {METRICS}; name a folder of 'vcdeft train'")
    seconds = median(line["seconds"] for line in lines)
    before, now = (flat(r.model_dump(mode="json")) for r in (load_run(str(folder / SETTINGS)), run))
    other = sorted(one.name for one in differences(before, now, free=MAY_DIFFER["plan --run"]))
    return Rate(folder=folder, steps_per_hour=3600 / max(seconds, 1e-4), other=tuple(other))


def samples_line(plan: MemoryPlan, stage: Stage) -> str:
    """What encoding, sampling and decoding take between steps."""
    named = {name: size for name, size in vars(plan.outside).items() if size}
    return (
        f"samples  about {gigabytes(plan.outside.peak)} beside {gigabytes(plan.between(stage))} "
        "that stay: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in named.items())
    )


def in_short(plan: MemoryPlan, memory: int) -> list[str]:
    """Three lines for the head of a run whose stage and number of blocks are decided."""
    stage, blocks = plan.run.zero, plan.recomputed
    assert stage != "auto"
    assert blocks is not None
    parts = plan.parts(stage, blocks)
    named = {name: size for name, size in vars(parts).items() if size}
    return [
        f"memory   about {gigabytes(plan.peak(stage, blocks))} of {gigabytes(memory)} a process: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in named.items()),
        f"         {blocks} of {plan.blocks} blocks recomputed; vcdeft plan shows other ways",
        samples_line(plan, stage),
    ]
