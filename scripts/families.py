"""The eleven families that the embedded base, its demo and its evaluation are about."""

from __future__ import annotations

from visualcloze_deft.evaluation.suites import FAMILIES
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.task import Task


def families() -> dict[str, Task]:
    known = load_tasks()
    return {name: known[name] for name in FAMILIES}
