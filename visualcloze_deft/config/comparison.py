"""The file of a comparison: TOML and overrides -> one frozen `Comparison`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import AfterValidator, Field, ValidationError

from visualcloze_deft.config.numbers import LARGEST, Count, Positive
from visualcloze_deft.config.overrides import apply_override, find_config
from visualcloze_deft.config.run_settings import Method, Section, setting_names
from visualcloze_deft.config.secrets import without_secrets
from visualcloze_deft.config.seeds import OTHER_SCENES
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.storage.toml_files import read_toml

Match = Literal["rank", "parameters"]
SEED = 0  # of all that is asked: the same grids and noise whatever was trained
OWNED = {
    "output": "output",
    "seed": "seeds",
    "adapter.method": "methods",
    "adapter.rank": "rank",
}  # settings of a run that one of a comparison decides
OWN = ("optimiser.", "adapter.")  # what a method may have of its own: the examples stay the same


def _all_different(given: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(given)) < len(given):
        raise ValueError("one stands there twice")
    return given


def _of_scenes_not_asked(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if SEED + OTHER_SCENES in seeds:
        raise ValueError(f"{SEED + OTHER_SCENES} is the seed of the scenes that are asked")
    return _all_different(seeds)


def _none_or_several(grids: int) -> int:
    if not (grids == 0 or 2 <= grids <= LARGEST):
        raise ValueError("give two or more, or 0 for evaluate.grids")
    return grids


class Group(Section):
    """Tasks that are asked before and after training."""

    tasks: str
    """Names, groups and patterns, as `data.tasks` of a run."""
    sources: tuple[str, ...] = ()
    """Data of its own, never trained on; without, what the run holds out (`data.validation_every`,
    or scenes of another seed)."""
    grids: Annotated[int, AfterValidator(_none_or_several)] = 0
    """Held-out grids of each task, two at least; 0: `evaluate.grids`."""


class Evaluate(Section):
    """How each task is asked."""

    grids: Annotated[int, Field(ge=2, le=LARGEST)] = 24
    """Held-out grids of each task, the same for every adapter, with one in-context example."""
    steps: Positive = 8
    """Sampling steps of the pictures whose PSNR is measured."""
    batch: Positive = 8
    """Grids that are generated together."""
    samples: Count = 3
    """Grids of each task that the contact sheet shows, with the first seed's answers; 0: none."""


class Comparison(Section):
    """Everything `vcdeft compare` needs."""

    output: str
    base: str = ""
    """A run file of `vcdeft train`, or the name of a shipped one, that all trainings share."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Settings of `vcdeft train` over that file, for all methods."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1), AfterValidator(_all_different)] = (
        get_args(Method)
    )
    """The first one sets the number of parameters that the others are matched to."""
    method: dict[Method, dict[str, Any]] = Field(default_factory=dict)
    """Method -> settings of its own: those of `optimiser` and `adapter`, e.g. its learning rate;
    without, it takes those that all share."""
    match: Annotated[tuple[Match, ...], Field(min_length=1), AfterValidator(_all_different)] = (
        get_args(Match)
    )
    """"rank": every method has `rank`; "parameters": the first one has, each other the rank with
    which it trains nearest to as many values."""
    rank: Positive = 32
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**63)], ...],
        Field(min_length=1),
        AfterValidator(_of_scenes_not_asked),
    ] = (0, 1, 2)
    """Of the examples and of the adapter's start: a seed gives every method the same examples in
    the same order, with the same noise."""
    new: Group
    """What is to be learned: gain is measured on it."""
    old: Group | None = None
    """What the base knows and is not trained: retention is measured on it. Without, gain alone."""
    evaluate: Evaluate = Evaluate()

    @property
    def groups(self) -> dict[str, Group]:
        return {"new": self.new} | ({"old": self.old} if self.old else {})


def load_comparison(file: str, overrides: Sequence[str] = ()) -> Comparison:
    """A comparison file (a path, or the name of a shipped one) with `a.b=value` on top."""
    fields = read_toml(find_config(file, "comparison"))
    for override in overrides:
        apply_override(fields, override)
    try:
        return Comparison.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "extra_forbidden":
            known = [*setting_names(Comparison), *Comparison.model_fields]
            raise UserError(
                f"{file}: unknown setting {place!r}; {suggestion(place, set(known))}"
            ) from None
        if first["type"] == "missing":
            raise UserError(f"{file}: {place} is missing") from None
        said = first["msg"].removeprefix("Value error, ").lower()
        raise UserError(f"{file}: {place} = {brief(first['input'])}: {said}") from None


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write all settings of a comparison but secrets in TOML."""
    fields = without_secrets(comparison.model_dump(mode="json", exclude_none=True))
    write_text(path, tomli_w.dumps(fields))
