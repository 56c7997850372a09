"""The model card of a run: front matter for the hub, then what a reader needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData

from visualcloze_deft.publishing.facts import RunFacts, settings_of
from visualcloze_deft.publishing.figures import Figures
from visualcloze_deft.reporting import tables
from visualcloze_deft.reporting.numbers import three_digits
from visualcloze_deft.storage.step_names import step_of
from visualcloze_deft.task_registry.task import Task
from visualcloze_deft.training.subject import naming_of

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LISTED = 12  # tasks that have a row each; also those of a group that are named
SHARE = "share of the examples"


def card_of(
    facts: RunFacts,
    figures: Sequence[Figures],
    *,
    repo: str,
    formats: Sequence[str],
    picture: str | None,
    files: Mapping[str, str],
) -> str:
    """The text of README.md. picture: the path of its sample sheet in the repository. files: what
    each file there is, by path."""
    made = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = made.from_string(TEMPLATE.read_text(encoding="utf-8"))
    example = max(facts.tasks, key=lambda task: (facts.share([task]), task.name))
    head, losses = validation_of(facts)
    return template.render(
        facts=facts,
        figures=figures,
        repo=repo,
        formats=formats,
        picture=picture,
        picture_step=step_of(facts.sheet) if facts.sheet else None,
        front_matter=front_matter(facts),
        title=repo.split("/")[1],
        name=repo.split("/")[1],
        base_id=facts.base.hub or "PATH_OF_THE_BASE",
        base_link=link_of(facts),
        tasks=tables.markdown(*task_table(facts)),
        validation=tables.markdown(head, losses) if losses else "",
        example=example,
        subject=naming_of(facts.run).name,
        grid=grid_of(example),
        rows=[", ".join(cells) for cells in python_rows(example)],
        prompt=json.dumps(example.sentence(), ensure_ascii=False),
        settings=tables.markdown(["setting", "value"], settings_of(facts)),
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        files=tables.markdown(["file", "content"], [(f"`{name}`", w) for name, w in files.items()]),
    )


def front_matter(facts: RunFacts) -> str:
    """The YAML that the hub reads."""
    base, licence = facts.base, facts.base.licence
    told = ModelCardData(
        base_model=base.hub,
        license=licence.identifier,
        license_name=licence.name,
        license_link=licence.link,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["visualcloze", "in-context", "lora", facts.run.adapter.method, *sorted(facts.groups)],
    )
    if base.hub:
        told["base_model_relation"] = "adapter"
    return told.to_yaml()


def link_of(facts: RunFacts) -> str:
    if facts.base.hub:
        return f"[{facts.base.hub}](https://huggingface.co/{facts.base.hub})"
    return facts.base.words


def task_table(facts: RunFacts) -> tuple[list[str], list[tuple[str, str, str]]]:
    """What each task does and how often it was drawn; of many tasks, the groups."""
    if len(facts.tasks) > LISTED:
        return ["group", "tasks", SHARE], group_rows(facts)
    tasks = [task for group in facts.groups.values() for task in group]
    rows = [(f"`{task.name}`", task.summary, share_text(facts, [task])) for task in tasks]
    return ["task", "what it does", SHARE], rows


def group_rows(facts: RunFacts) -> list[tuple[str, str, str]]:
    rows = []
    for group, tasks in facts.groups.items():
        names = ", ".join(f"`{task.name}`" for task in tasks[:LISTED])
        more = f" and {len(tasks) - LISTED} more" if len(tasks) > LISTED else ""
        rows.append((group, names + more, share_text(facts, tasks)))
    return rows


def share_text(facts: RunFacts, tasks: Sequence[Task]) -> str:
    return f"{facts.share(tasks):.0%}" if facts.shares else tables.NONE


def validation_of(facts: RunFacts) -> tuple[list[str], list[list[str]]]:
    """The first and the last validation loss, of all tasks and of each."""
    if not facts.validation:
        return [], []
    steps = [line["step"] for line in facts.validation]
    names = sorted({name for line in facts.validation for name in line["tasks"]})
    losses = {"all": [line["loss"] for line in facts.validation]}
    losses |= {name: [line["tasks"].get(name) for line in facts.validation] for name in names}
    head = ["tasks", *(f"after {step} steps" for step in steps)]
    return head, [[name, *map(loss_text, values)] for name, values in losses.items()]


def loss_text(loss: float | None) -> str:
    return tables.NONE if loss is None else three_digits(loss)


def grid_of(task: Task) -> str:
    """A grid file for a task, with names of files that say what they are."""
    lines = ",\n          ".join(json.dumps(row) for row in file_rows(task))
    content = ',\n "content_prompt": "what the image shows"' if task.content else ""
    return f'{{"task": "{task.name}",\n "rows": [{lines}]{content}}}'


def file_rows(task: Task) -> list[list[str | None]]:
    """Two rows of names of files, the targets of the second None."""
    shown = [f"example-{role}.png" for role in task.roles]
    asked = [None if role in task.targets else f"query-{role}.png" for role in task.roles]
    return [list(shown), list(asked)]


def python_rows(task: Task) -> list[list[str]]:
    """`file_rows` in Python, as diffusers takes them."""
    return [
        ["None" if name is None else f'load_image("{name}")' for name in row]
        for row in file_rows(task)
    ]
