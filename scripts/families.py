"""The eleven families that the embedded base, its demo and its evaluation are about."""

from __future__ import annotations

from visualcloze_deft.registry import Task, load_tasks

FAMILIES = (
    "canny-to-image",
    "depth-to-image",
    "segmentation-to-image",
    "image-to-depth",
    "image-to-normals",
    "image-editing",
    "novel-view",
    "object-insertion",
    "colourisation",
    "deblurring",
    "subject-driven",
)


def families() -> dict[str, Task]:
    known = load_tasks()
    return {name: known[name] for name in FAMILIES}
