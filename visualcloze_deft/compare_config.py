"""What `vcdeft compare` is asked: its settings, and the trainings that they come to.

Everything here is known without weights: which method is trained at which rank follows from the
sizes of the layers that get an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import AfterValidator, Field, ValidationError

from visualcloze_deft.errors import UserError, nearest
from visualcloze_deft.memory import adapted_layers, adapter_tensors
from visualcloze_deft.modelfolder import check_folder, check_lora, check_quantise
from visualcloze_deft.modelsize import Flux, flux, settings_of
from visualcloze_deft.output import whole_text
from visualcloze_deft.rundir import OTHER_SCENES, flat
from visualcloze_deft.settings import (
    LARGEST,
    Adapter,
    Positive,
    Run,
    Section,
    find_config,
    over,
    parse_run,
    put,
    setting_names,
    without_secrets,
)
from visualcloze_deft.textfile import brief
from visualcloze_deft.tomlfile import read_toml

Method = Literal["deft", "deft-relaxed", "para", "lora"]
Match = Literal["rank", "parameters"]

RUNS = "runs"  # the folder of all trainings
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
    """Data of its own, never trained on; without, what the run holds out (`data.hold_out`, or
    scenes of another seed)."""
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
    old: Group
    """What the base knows and is not trained: retention is measured on it."""
    evaluate: Evaluate = Evaluate()

    @property
    def groups(self) -> dict[str, Group]:
        return {"new": self.new, "old": self.old}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training. matches: in which comparisons it counts, of a run that both share once.

    parameters: values that are trained; budget: how many the first method trains, per match.
    """

    method: Method
    rank: int
    seed: int
    matches: tuple[Match, ...]
    parameters: int
    run: Run

    @property
    def name(self) -> str:
        return f"{self.method}-r{self.rank}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.run.output)


def load_comparison(file: str, overrides: Sequence[str] = ()) -> Comparison:
    """A comparison file (a path, or the name of a shipped one) with `a.b=value` on top."""
    fields = read_toml(find_config(file, "comparison"))
    for override in overrides:
        put(fields, override)
    try:
        return Comparison.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] == "extra_forbidden":
            known = [*setting_names(Comparison), *Comparison.model_fields]
            raise UserError(
                f"{file}: unknown setting {place!r}; {nearest(place, set(known))}"
            ) from None
        if first["type"] == "missing":
            raise UserError(f"{file}: {place} is missing") from None
        said = first["msg"].removeprefix("Value error, ").lower()
        raise UserError(f"{file}: {place} = {brief(first['input'])}: {said}") from None


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write all settings of a comparison but secrets in TOML."""
    fields = without_secrets(comparison.model_dump(mode="json"))
    whole_text(path, tomli_w.dumps(fields))


def trainings(comparison: Comparison) -> list[Training]:
    """All trainings, seed by seed. Raises `UserError` where settings are wrong or a rank is larger
    than a layer."""
    shared = shared_fields(comparison)
    runs = {
        method: method_run(comparison, shared, method, rank=comparison.rank)
        for method in comparison.methods
    }
    first = runs[comparison.methods[0]]
    check_folder(first.model)
    check_quantise(first.quantise, zero3=first.zero == 3)
    if first.model_lora is not None:
        check_lora(first.model_lora)
    model = flux(settings_of(first.model, "transformer"))
    budget = trained(model, first.adapter)
    wanted: dict[tuple[Method, int], list[Match]] = {}
    for match in comparison.match:
        for method, run in runs.items():
            rank = comparison.rank if match == "rank" else matched(model, run.adapter, budget)
            wanted.setdefault((method, rank), []).append(match)
    found = []
    for (method, rank), matches in wanted.items():
        run = method_run(comparison, shared, method, rank=rank)
        check_rank(model, run.adapter)
        for seed in comparison.seeds:
            output = Path(comparison.output) / RUNS / f"{method}-r{rank}-s{seed}"
            found.append(
                Training(
                    method=method,
                    rank=rank,
                    seed=seed,
                    matches=tuple(matches),
                    parameters=trained(model, run.adapter),
                    run=run.model_copy(update={"seed": seed, "output": str(output)}),
                )
            )
    return sorted(found, key=lambda one: comparison.seeds.index(one.seed))


def shared_fields(comparison: Comparison) -> dict[str, Any]:
    """The settings of a run that all trainings share."""
    for name in flat(comparison.run):
        if name in OWNED:
            raise UserError(f"run.{name} is decided by {OWNED[name]!r}; set that one")
    base = read_toml(find_config(comparison.base)) if comparison.base else {}
    return over(base, comparison.run)


def method_run(
    comparison: Comparison, shared: Mapping[str, Any], method: Method, *, rank: int
) -> Run:
    """The run of one method at `rank`, before its seed and output are set."""
    for section in ("adapter", "optimiser"):
        if not isinstance(shared.get(section, {}), Mapping):
            raise UserError(
                f"run.{section} = {shared[section]!r}: expected a table of settings, e.g. "
                f"run.{section}.{'layers' if section == 'adapter' else 'lr'}"
            )
    own = comparison.method.get(method, {})
    for name in flat(own):
        if name in OWNED:
            raise UserError(f"method.{method}.{name} is decided by {OWNED[name]!r}; set that one")
        if not name.startswith(OWN):
            raise UserError(
                f"method.{method}.{name}: methods differ in settings of optimiser and adapter "
                "alone, or what they are trained on would; set run." + name
            )
    decided = {"adapter": {"method": method, "rank": rank}}
    run = parse_run(over(over(shared, own), decided), where=f"run of {method}")
    if run.adapter.start is not None:
        raise UserError(f"adapter.start = {run.adapter.start!r}: every method starts anew")
    return run


def trained(model: Flux, adapter: Adapter) -> int:
    """How many values an adapter trains."""
    return sum(adapter_tensors(model, adapter))


def matched(model: Flux, adapter: Adapter, budget: int) -> int:
    """The rank with which an adapter of this kind trains nearest to `budget` values."""
    each = trained(model, adapter) // adapter.rank  # a rank costs the same whatever their number
    lower = max(budget // each, 1) if each else 1
    return min((lower, lower + 1), key=lambda rank: abs(rank * each - budget))


def check_rank(model: Flux, adapter: Adapter) -> None:
    """Raise `UserError` where the rank is larger than a layer, or no layer gets an adapter."""
    names = adapted_layers(model, adapter)
    if not names:
        raise UserError(f"adapter.layers {adapter.layers!r} matches no layer of the model")
    least = min(names, key=lambda name: min(model.linear[name]))
    if adapter.rank > min(model.linear[least]):
        raise UserError(
            f"{adapter.method} would have rank {adapter.rank}: larger than {least}, which has "
            f"{model.linear[least][0]} inputs and {model.linear[least][1]} outputs; give a smaller "
            "rank"
        )
