"""What a run leaves in its folder beside its metrics and samples: checkpoints, adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from visualcloze_deft.adapters import files
from visualcloze_deft.backbones.base import Models
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.adapter_places import TASKS
from visualcloze_deft.training import checkpoint, run_folder
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.engine import (
    adapter_of_average,
    gather_adapter,
    gather_average,
    gather_moments,
)


class RunOutputs:
    """Every process calls each method, as weights are gathered from all; the first one writes."""

    def __init__(self, run: Run, models: Models, engine: Any, *, rank: int) -> None:
        self.run = run
        self.models = models
        self.engine = engine
        self.first = rank == 0
        self.output = Path(run.output)
        self.base = run_folder.base_of(run)

    def save(self, progress: Progress) -> str | None:
        """A checkpoint. Returns why it cannot be written, None where it is."""
        moments, tensors = gather_moments(self.engine), gather_adapter(self.engine)
        averaged = gather_average(self.engine) if self.run.ema else None
        if not self.first:
            return None
        try:
            saved = checkpoint.save(
                self.output / "checkpoints",
                progress,
                moments,
                lambda folder: self.write_adapter(
                    folder, tensors, step=progress.step, attention=progress.attention
                ),
                keep=self.run.keep_checkpoints,
                average=averaged,
            )
        except UserError as error:
            return str(error)
        if warning := checkpoint.short_of_room(self.output, checkpoint.size(saved)):
            tqdm.write(warning)
        return None

    def write_adapter(
        self, folder: Path, tensors: dict[str, Tensor], *, step: int, attention: str
    ) -> None:
        told = run_folder.adapter_metadata(self.run, step, attention=attention, base=self.base)
        files.save(
            self.models.denoiser, folder, base=self.run.model, tensors=tensors, metadata=told
        )

    def publish(self, *, attention: str) -> None:
        """The adapter of the last step, and with an average that one, too, each whole or not at
        all."""
        if self.run.ema:
            self.put("adapter-last", gather_adapter(self.engine), attention)
            self.put("adapter", adapter_of_average(self.engine), attention)
        else:
            self.put("adapter", gather_adapter(self.engine), attention)

    def put(self, name: str, tensors: dict[str, Tensor], attention: str) -> None:
        """The adapter folder `name`, with the files of the tasks that it was trained on."""
        if not self.first:
            return

        def fill(folder: Path) -> None:
            self.write_adapter(folder, tensors, step=self.run.steps, attention=attention)
            shutil.copytree(self.output / TASKS, folder / TASKS)

        with checkpoint.disk_errors(self.output):
            checkpoint.replace(self.output / name, fill)
