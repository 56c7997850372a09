"""The trainings of a comparison: every method at a rank or a number of trained values, per seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualcloze_deft.backbones.base import Sizes
from visualcloze_deft.backbones.lora_places import check_lora
from visualcloze_deft.backbones.model_files import check_quantise
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.comparison import OWN, OWNED, Comparison, Match
from visualcloze_deft.config.overrides import deep_merge, find_config, flat
from visualcloze_deft.config.run_settings import Adapter, Method, Run, parse_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.planning.sizes import adapted_layers, adapter_tensors
from visualcloze_deft.storage.toml_files import read_toml

RUNS = "runs"  # the folder of all trainings


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training. matches: in which comparisons it counts, of a run that both share once.

    parameters: values that are trained.
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


def trainings(comparison: Comparison) -> list[Training]:
    """All trainings, seed by seed. Raises `UserError` where settings are wrong or a rank is larger
    than a layer."""
    shared = shared_fields(comparison)
    runs = {
        method: method_run(comparison, shared, method, rank=comparison.rank)
        for method in comparison.methods
    }
    first = runs[comparison.methods[0]]
    backbone = backbone_of(first.model)
    backbone.check(first.model)
    if "pipeline" not in backbone.features:
        raise UserError(f"model {first.model!r}: compare has no pipeline for {backbone.name} yet")
    check_quantise(first.quantise, zero3=first.zero == 3)
    if first.model_lora is not None:
        check_lora(first.model_lora)
    model, default = backbone.sizes(first.model), backbone.target_modules
    budget = trained(model, first.adapter, default)
    wanted: dict[tuple[Method, int], list[Match]] = {}
    for match in comparison.match:
        for method, run in runs.items():
            rank = (
                comparison.rank if match == "rank" else matched(model, run.adapter, default, budget)
            )
            wanted.setdefault((method, rank), []).append(match)
    found = []
    for (method, rank), matches in wanted.items():
        run = method_run(comparison, shared, method, rank=rank)
        check_rank(model, run.adapter, default)
        for seed in comparison.seeds:
            output = Path(comparison.output) / RUNS / f"{method}-r{rank}-s{seed}"
            found.append(
                Training(
                    method=method,
                    rank=rank,
                    seed=seed,
                    matches=tuple(matches),
                    parameters=trained(model, run.adapter, default),
                    run=run.model_copy(update={"seed": seed, "output": str(output)}),
                )
            )
    return sorted(found, key=lambda one: comparison.seeds.index(one.seed))


def shared_fields(comparison: Comparison) -> dict[str, Any]:
    """The settings of a run that all trainings share. Sheets of their own they have where asked."""
    for name in flat(comparison.run):
        if name in OWNED:
            raise UserError(f"run.{name} is decided by {OWNED[name]!r}; set that one")
    base = read_toml(find_config(comparison.base)) if comparison.base else {}
    return deep_merge({"sample_grids": 0}, deep_merge(base, comparison.run))


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
    run = parse_run(deep_merge(deep_merge(shared, own), decided), where=f"run of {method}")
    if run.adapter.init_from is not None:
        raise UserError(f"adapter.init_from = {run.adapter.init_from!r}: every method starts anew")
    return run


def trained(model: Sizes, adapter: Adapter, default: str) -> int:
    """How many values an adapter trains. default: the family's layers."""
    return sum(adapter_tensors(model, adapter, adapted_layers(model, adapter, default)))


def matched(model: Sizes, adapter: Adapter, default: str, budget: int) -> int:
    """The rank with which an adapter of this kind trains nearest to `budget` values."""
    each = trained(model, adapter, default) // adapter.rank  # the same for any rank
    lower = max(budget // each, 1) if each else 1
    return min((lower, lower + 1), key=lambda rank: abs(rank * each - budget))


def check_rank(model: Sizes, adapter: Adapter, default: str) -> None:
    """Raise `UserError` where the rank is larger than a layer, or no layer gets an adapter."""
    names = adapted_layers(model, adapter, default)
    if not names:
        raise UserError(
            f"adapter.target_modules {adapter.target_modules!r} matches no layer of the model"
        )
    least = min(names, key=lambda name: min(model.linear[name]))
    if adapter.rank > min(model.linear[least]):
        raise UserError(
            f"{adapter.method} would have rank {adapter.rank}: larger than {least}, which has "
            f"{model.linear[least][0]} inputs and {model.linear[least][1]} outputs; give a smaller "
            "rank"
        )
