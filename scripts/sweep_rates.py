"""Choose each method's learning rate: python scripts/sweep_rates.py compare-scenes --seed 3

Trains every method of a comparison once per rate, on a seed that the comparison does not have, and
compares the training loss of the second half of the steps. Where examples never repeat, as with
scenes, each was new when its loss was taken, so nothing that the comparison asks chooses a rate.
All trainings see the same examples, noise and times, so losses are compared step by step. What is
finished is not done again: add rates where the best one is the lowest or highest.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from visualcloze_deft.compare import planned, prepared, train_all
from visualcloze_deft.compare_config import load_comparison
from visualcloze_deft.errors import UserError

LAST = 0.5  # share of the steps whose loss counts: the adapter has left its start


@click.command()
@click.argument("config")
@click.option("--seed", default=3, show_default=True, help="Not one of the comparison's.")
@click.option("--rates", default="3e-4,1e-3,3e-3", show_default=True, help="With commas between.")
@click.option("--methods", default=None, help="With commas between. Default: the comparison's.")
@click.option("--steps", type=int, default=None, help="Default: the comparison's.")
@click.option("--output", type=click.Path(path_type=Path), default=None)
def main(
    config: str, seed: int, rates: str, methods: str | None, steps: int | None, output: Path | None
) -> None:
    """Train each method of CONFIG with each rate and print the losses."""
    asked = load_comparison(config)
    if seed in asked.seeds:
        raise SystemExit(f"--seed {seed} is one of the comparison's: {list(asked.seeds)}")
    root = output or Path(f"{asked.output}-rates")
    wanted = methods.split(",") if methods else list(asked.methods)
    for rate in rates.split(","):
        changes = [f"seeds=[{seed}]", f'output="{root / rate}"', f"methods={json.dumps(wanted)}"]
        changes += [f"method.{name}.optimiser.lr={rate}" for name in wanted]
        changes += [f"run.steps={steps}"] if steps else []
        plan = planned(load_comparison(config, changes))
        if any(not name.startswith("scenes") for name in plan.trainings[0].run.data.sources):
            raise SystemExit(f"{config}: its examples repeat, so training losses choose no rate")
        for training in prepared(plan):
            try:
                train_all(plan, [training])
            except UserError as error:
                print(f"{rate}: {error}")
    report(root)


def report(root: Path) -> None:
    """Print, per training and rate, the loss and its difference to the best rate's."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in root.glob("*/runs/*/metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        losses = np.array([line["loss"] for line in lines], float)  # null, a loss astray: nan
        losses = np.nan_to_num(losses, nan=np.inf)
        found.setdefault(file.parent.name, {})[file.parts[len(root.parts)]] = losses
    for training, every in sorted(found.items()):
        longest = max(map(len, every.values()))
        by_rate = {
            rate: losses[int(longest * (1 - LAST)) :]
            for rate, losses in every.items()
            if len(losses) == longest  # the others are not finished, or were given up
        }
        best = min(by_rate, key=lambda rate: float(by_rate[rate].mean()))
        print(f"{training}: {best}")
        for rate in sorted(by_rate, key=float):
            apart, loss = by_rate[rate] - by_rate[best], by_rate[rate].mean()
            error = apart.std(ddof=1) / np.sqrt(len(apart))
            print(f"  {rate:>6}  loss {loss:.4f}  {apart.mean():+.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
