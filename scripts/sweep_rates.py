"""Choose each method's learning rate: python scripts/sweep_rates.py compare-scenes --seed 3

Trains every method of a comparison once per rate, on a seed that the comparison does not have. All
trainings see the same examples, noise and times. What is finished is not done again: add rates
where the best one is the lowest or highest. Nothing that the comparison asks chooses a rate:

--by loss: the training loss of the second half of the steps, step by step. For examples that never
repeat, as scenes: each was new when its loss was taken.
--by error: the velocity error on the new tasks, grid by grid. For examples that repeat; name data
that the comparison does not have:
    --by error --set 'run.data.sources=["subject=1"]' --set 'new.sources=["subject=1/views"]'
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from visualcloze_deft.comparison.compare import (
    Plan,
    measure_all,
    planned,
    prepared,
    state_of,
    train_all,
)
from visualcloze_deft.comparison.trainings import Training
from visualcloze_deft.config.comparison import load_comparison
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage import jsonl
from visualcloze_deft.training import run_folder

LAST = 0.5  # share of the steps whose loss counts: the adapter has left its start
Numbers = NDArray[np.float64]


@click.command()
@click.argument("config")
@click.option("--seed", default=3, show_default=True, help="Not one of the comparison's.")
@click.option("--rates", default="3e-4,1e-3,3e-3", show_default=True, help="With commas between.")
@click.option("--methods", default=None, help="With commas between. Default: the comparison's.")
@click.option("--by", type=click.Choice(["loss", "error"]), default="loss", show_default=True)
@click.option("--set", "more", multiple=True, metavar="NAME=VALUE", help="Of the comparison.")
@click.option("--output", type=click.Path(path_type=Path), default=None)
def main(
    config: str,
    seed: int,
    rates: str,
    methods: str | None,
    by: str,
    more: tuple[str, ...],
    output: Path | None,
) -> None:
    """Train each method of CONFIG with each rate and print the losses or errors."""
    asked = load_comparison(config)
    if seed in asked.seeds:
        raise SystemExit(f"--seed {seed} is one of the comparison's: {list(asked.seeds)}")
    root = output or Path(f"{asked.output}-rates")
    wanted = methods.split(",") if methods else list(asked.methods)
    found: dict[str, dict[str, Numbers]] = {}
    for rate in rates.split(","):
        changes = [f"seeds=[{seed}]", f'output="{root / rate}"', f"methods={json.dumps(wanted)}"]
        changes += [f"method.{name}.optimiser.lr={rate}" for name in wanted]
        plan = planned(load_comparison(config, [*more, *changes]))
        repeats = any(not name.startswith("scenes") for name in plan.trainings[0].run.data.sources)
        if by == "loss" and repeats:
            raise SystemExit(f"{config}: its examples repeat; choose --by error, of other data")
        if by == "error" and plan.comparison.new == asked.new:
            raise SystemExit(f"{config}: --by error needs --set new.sources=... of other data")
        with ExitStack() as held:
            for training in prepared(plan, held):
                try:
                    train_all(plan, [training])
                except UserError as error:  # e.g. of a rate with which the loss goes astray
                    print(f"{rate}: {error}")
        for name, figures in (losses if by == "loss" else errors)(plan):
            found.setdefault(name, {})[rate] = figures
    report(found)


def finished(plan: Plan) -> list[Training]:
    return [one for one in plan.trainings if state_of(one) == "finished"]


def losses(plan: Plan) -> Iterator[tuple[str, Numbers]]:
    for training in finished(plan):
        lines = jsonl.read_lines(training.folder / run_folder.METRICS)
        every = np.array([line["loss"] for line in lines], float)
        yield training.name, every[int(len(every) * (1 - LAST)) :]


def errors(plan: Plan) -> Iterator[tuple[str, Numbers]]:
    new = tuple(one for one in plan.asked if one.group == "new")
    measure_all(replace(plan, asked=new, trainings=tuple(finished(plan))))
    for training in finished(plan):
        measured = [plan.measured(training, one) for one in new]
        yield training.name, np.concatenate([one.errors for one in measured if one])


def report(found: dict[str, dict[str, Numbers]]) -> None:
    """Print, per training and rate, the mean and its difference to the best rate's."""
    for training, by_rate in found.items():
        best = min(by_rate, key=lambda rate: float(np.nan_to_num(by_rate[rate], nan=np.inf).mean()))
        print(f"{training}: {best}")
        for rate in sorted(by_rate, key=float):
            apart, mean = by_rate[rate] - by_rate[best], by_rate[rate].mean()
            error = apart.std(ddof=1) / np.sqrt(len(apart))
            print(f"  {rate:>6}  {mean:.4f}  {apart.mean():+.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
