"""Where adapters lie: in a folder of their own, or in the run folder that they were trained in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from visualcloze_deft.storage.step_names import by_step

CONFIG = "adapter_config.json"  # peft's settings file, which every adapter folder has
ADAPTER, CHECKPOINTS, TASKS = "adapter", "checkpoints", "tasks"  # in a run folder


def adapter_folder(place: Path) -> Path:
    """The adapter folder that a path means: itself, or of a run folder its `adapter`, and before
    there is one its newest checkpoint. Any other path is returned as it is."""
    if (place / CONFIG).is_file():
        return place
    if (place / ADAPTER / CONFIG).is_file():
        return place / ADAPTER
    saved = checkpoints(place)
    return saved[-1] if saved else place


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that hold an adapter, the newest last."""
    return [path for path in by_step(run / CHECKPOINTS) if (path / CONFIG).is_file()]


def run_folder_of(adapter: Path) -> Path:
    """The run folder that an adapter folder would lie in, as `adapter` or as a checkpoint."""
    above = adapter.absolute().parent
    return above.parent if above.name == CHECKPOINTS else above


def task_folders_of(adapters: Iterable[Path]) -> list[Path]:
    """The folders of the task files that adapters were trained on; not every adapter has one.

    A finished adapter holds them itself; those of a checkpoint stand in its run folder.
    """
    found = []
    for adapter in adapters:
        of_checkpoint = adapter.absolute().parent.name == CHECKPOINTS
        places = [adapter, run_folder_of(adapter)] if of_checkpoint else [adapter]
        found += [place / TASKS for place in places if (place / TASKS).is_dir()][:1]
    return found


def is_of_adapter(task_folder: Path) -> bool:
    """Whether task files lie in an adapter folder, or in a run folder, and not in a user's own."""
    above = task_folder.absolute().parent
    return task_folder.absolute().name == TASKS and (
        (above / CONFIG).is_file() or (above / CHECKPOINTS).is_dir()
    )
