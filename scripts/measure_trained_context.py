"""What a trained context costs in quality: python scripts/measure_trained_context.py RUN ...

Each RUN is a folder of `vcdeft train`, of the same recipe but for context, steps and seed. Its
adapter answers held-out grids of the eleven families, in every context that it knows. Prints PSNR
to the truth, and how far each mode is from a full one of as many steps, with 95 % intervals, and
writes it into --output and between the marks of --report. Answers that are there are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from evaluate_scenes import examples_of
from measure_context import published

from visualcloze_deft.adapters.contexts import known_to
from visualcloze_deft.backbones.base import Seen
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import ContextMode, load_run
from visualcloze_deft.data.example import Example
from visualcloze_deft.evaluation.metrics.fidelity import psnr
from visualcloze_deft.evaluation.suite_queries import GridSettings
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.reporting.random_effects import estimate
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.sampling.examples import complete_examples, truths_of
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.training.run_folder import SETTINGS

MARKS = "<!-- trained:begin -->\n", "<!-- trained:end -->"
BATCH = 8
Scores = Mapping[str, Sequence[float]]  # by family, grid by grid


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an adapter was trained, and the context that it is run with."""

    trained: ContextMode
    steps: int
    run: Seen

    def __str__(self) -> str:
        return self.trained if self.trained == self.run else f"{self.trained}, run {self.run}"


def scores_of(
    folder: Path, seen: Seen, asked: Mapping[str, Sequence[Example]], steps: int
) -> Scores:
    model = load_run(str(folder / SETTINGS)).model
    pipe = InContextPipeline.from_pretrained(model, adapter=folder / "adapter")
    found = {}
    for name, examples in asked.items():
        with torch.no_grad():
            made = complete_examples(
                pipe.models, examples, steps=steps, batch=BATCH, context=Context(seen=seen)
            )
        found[name] = [
            psnr(images[0], truths_of(example)[0])
            for images, example in zip(made, examples, strict=True)
        ]
    return found


def measured(options: argparse.Namespace) -> dict[tuple[Way, int], Scores]:
    """By way and seed."""
    model = load_run(str(options.runs[0] / SETTINGS)).model
    side = backbone_of(model).resolution(model)
    making = GridSettings(data={}, limit=options.scenes, rows=2, resolution=side)
    asked, found = examples_of(making), {}
    for folder in options.runs:
        run = load_run(str(folder / SETTINGS))
        for seen in dict.fromkeys([*known_to(folder / "adapter"), *options.also]):
            kept = options.output / f"{folder.name}-{seen}.json"
            if not kept.is_file():
                scores = scores_of(folder, seen, asked, options.steps)
                write_text(kept, json.dumps(scores))
            way = Way(trained=run.context, steps=run.steps, run=seen)
            found[way, run.seed] = json.loads(kept.read_text())
            print(f"{kept.name}: {np.mean(every(found[way, run.seed])):.2f} dB", flush=True)
    return found


def every(scores: Scores) -> list[float]:
    return [value for of_family in scores.values() for value in of_family]


def table(found: Mapping[tuple[Way, int], Scores]) -> list[str]:
    """A column for each way, a row for each family."""
    ways = list(dict.fromkeys(way for way, _ in found))
    families = list(next(iter(found.values())))
    columns = [column(way, found, families) for way in ways]
    heads = [f"{way}, {way.steps} steps" for way in ways]
    names = [*families, "mean", "to full (95 %)", "seeds"]
    lines = [f"| trained with | {' | '.join(heads)} |", f"|---|{'---|' * len(ways)}"]
    rows = zip(names, *columns, strict=True)
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def column(way: Way, found: Mapping[tuple[Way, int], Scores], families: Sequence[str]) -> list[str]:
    own = {seed: scores for (other, seed), scores in found.items() if other == way}
    means = [np.mean([np.mean(scores[f]) for scores in own.values()]) for f in families]
    full = replace(way, trained="full", run="full")
    pairs = [(own[seed], found[full, seed]) for seed in own if (full, seed) in found]
    apart = ""
    if pairs and way != full:
        gap = estimate(np.subtract(*([every(pair[k]) for pair in pairs] for k in (0, 1))))
        apart = f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
    values = [f"{value:.1f}" for value in means]
    return [*values, f"{np.mean(means):.2f}", apart, str(len(own))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=64, help="grids of each family")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--also", nargs="*", default=[], help="contexts to run every adapter in, trained so or not"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/trained-context"))
    parser.add_argument("--report", type=Path, help="a page with the marks")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    note = (
        f"The demo's recipe on the embedded base. PSNR in dB to the truth of {options.scenes} "
        f"held-out grids of each family, one example, {options.steps} sampling steps."
    )
    published(table(measured(options)), note, options, MARKS)


if __name__ == "__main__":
    main()
