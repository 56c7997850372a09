"""Which of a user's own pairs a run has held out of its training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from visualcloze_deft.config.run_settings import Data, load_run
from visualcloze_deft.config.source_specs import spec_from_root
from visualcloze_deft.data.base import unit_numbers
from visualcloze_deft.errors import UserError
from visualcloze_deft.evaluation.suite_queries import Row, spread
from visualcloze_deft.storage.adapter_places import run_folder_of
from visualcloze_deft.training.run_folder import SETTINGS


def training_data(adapters: Iterable[Path]) -> list[Data]:
    """What the runs were trained on that adapters lie in; adapters elsewhere do not say."""
    found = []
    for adapter in adapters:
        settings = run_folder_of(adapter) / SETTINGS
        if settings.is_file():
            try:
                found.append(load_run(str(settings)).data)
            except UserError:  # of another version: the adapter is of use without it
                continue
    return found


def held_out_by(adapters: Iterable[Path], spec: str) -> int | None:
    """The `validation_every` of the run that an adapter lies in, where it was trained on the data
    `spec` (NAME=PATH); 0 where that run holds nothing out, None where no run was trained on it.
    Of several runs, the one whose items all of them hold out."""
    given = spec_from_root(spec)
    found = [data.validation_every for data in training_data(adapters) if given in data.sources]
    return math.lcm(*found) if found else None


def remarks_on(held_out: int | None, spec: str, every: int, rows: Sequence[Row]) -> list[str]:
    """What to say of the data of an evaluation. held_out: see `held_out_by`; every: that is asked
    of, 0 for all items."""
    if held_out is None:
        return []
    trained, asked = trained_on(held_out, rows)
    if not trained:
        return [f"{spec}: one item in {every} is asked, those that training left out."]
    seen = (
        f"{trained} of {asked} items were trained on, so that their figures show what the adapter "
        "remembers"
    )
    if held_out:
        kept = f"training held out one in {held_out}, which are asked without --validation-every"
        return [f"{spec}: {seen}; {kept}."]
    return [f"{spec}: {seen}. Train with --validation-every 10 to hold some out."]


def trained_on(held_out: int, rows: Iterable[Row]) -> tuple[int, int]:
    """How many of the items that `rows` ask for were trained on, and how many they ask for."""
    units: dict[int, int] = {}  # of each item
    for row in rows:
        if row.items:
            numbers = unit_numbers(row.items.source)
            asked = [row.items.index(spread(k, row.items, row.count)) for k in range(row.count)]
            units |= {index: int(numbers[index]) for index in asked}
    kept = sum(unit % held_out == held_out - 1 for unit in units.values()) if held_out else 0
    return len(units) - kept, len(units)
