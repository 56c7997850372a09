"""Which of a user's own pairs a run has held out of its training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from visualcloze_deft.config.run_settings import Data, load_run
from visualcloze_deft.config.source_specs import spec_from_root
from visualcloze_deft.errors import UserError
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


def remarks_on(held_out: int | None, spec: str, every: int) -> list[str]:
    """What to say of the data of an evaluation. held_out: see `held_out_by`; every: that is asked
    of, 0 for all items."""
    if held_out is None:
        return []
    if held_out and every % held_out:
        trained = f"training left out one in {held_out}, so that it has seen some of them"
        return [f"{spec}: one item in {every} is asked, but {trained}."]
    if held_out:
        return [f"{spec}: one item in {every} is asked, those that training left out."]
    trained = "the adapter was trained on these very items, so the figures show what it remembers"
    return [f"{spec}: {trained}. Train with --validation-every 10 to hold some out."]
