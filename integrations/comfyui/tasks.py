"""The node that chooses a task: a shipped one, one of the user's, or one of an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host, package

NOT_INSTALLED = "visualcloze_deft is not installed"


@dataclass(frozen=True, kw_only=True)
class ChosenTask:
    """The words of a grid. name: of a task in `folders`, or of one that an adapter brings.
    instruction: a sentence in place of the task's."""

    name: str
    folders: tuple[Path, ...]
    instruction: str


def folders_of(folder: str = "") -> tuple[Path, ...]:
    """The folders of the user's task files: models/vcdeft_tasks, and `folder`."""
    return (*host.places(host.TASKS), *([Path(folder.strip())] if folder.strip() else []))


def known_tasks(folders: Iterable[Path]) -> dict[str, Any]:
    """The shipped tasks and those in `folders`, by name."""
    from visualcloze_deft.task_registry.files import load_tasks

    return dict(load_tasks(folders))


def tasks_with(task: ChosenTask | None, pipe: Any) -> dict[str, Any]:
    """The shipped tasks, those of the node, and those that the pipeline's adapters bring."""
    return known_tasks([*(task.folders if task else ()), *pipe.task_folders])


def task_names() -> list[str]:
    """The names in the dropdown. Files of the user's that cannot be read are logged."""
    if package.missing():
        return [NOT_INSTALLED]
    try:
        return [*known_tasks(folders_of())]
    except ValueError as error:  # at execution it is an error; here it would remove the node
        logging.warning("visualcloze_deft: %s", error)
        return [*known_tasks(())]


def described(task: Any) -> str:
    """One line for each column: its socket, its phrase, and whether the task generates it."""
    lines = [
        f"image_{k}: {phrases[0]}{' (generated)' if role in task.targets else ''}"
        for k, (role, phrases) in enumerate(task.columns.items(), 1)
    ]
    return "\n".join(lines)


class ChooseTask:
    """A task by its name: its sentence, and the meaning of each column."""

    CATEGORY = host.CATEGORY
    DESCRIPTION = (
        "The task of a grid. The output columns says what belongs into each column. Own task files "
        "lie in models/vcdeft_tasks or in task_folder."
    )
    FUNCTION = "choose"
    RETURN_TYPES = ("VCDEFT_TASK", "STRING", "STRING")
    RETURN_NAMES = ("task", "columns", "summary")
    OUTPUT_TOOLTIPS = (
        "The task, for VisualCloze Generate.",
        "What belongs into each column, one line for each.",
        "What the task does.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"task": (task_names(), {"tooltip": "A registered task."})},
            "optional": {
                "name": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "A name in place of the dropdown's: of a task in task_folder, "
                        "or of one that the adapter brings.",
                    },
                ),
                "task_folder": (
                    "STRING",
                    {"default": "", "tooltip": "A folder of your own task files (TOML)."},
                ),
                "instruction": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "A sentence in place of the task's, e.g. From the sketch "
                        "[IMAGE1] to the photo [IMAGE2].",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, task_folder: str = "", **_: object) -> str:
        return " ".join(map(host.stamp, folders_of(task_folder)))

    def choose(
        self, task: str, name: str = "", task_folder: str = "", instruction: str = ""
    ) -> tuple[ChosenTask, str, str]:
        package.require()
        folders, chosen = folders_of(task_folder), name.strip() or task
        told = known_tasks(folders).get(chosen)
        return (
            ChosenTask(name=chosen, folders=folders, instruction=instruction.strip()),
            described(told) if told else f"{chosen}: a task of the adapter",
            told.summary if told else "",
        )
