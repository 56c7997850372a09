"""What each ZeRO stage costs: seconds a step and memory a process, stages taking turns.

python scripts/bench_zero.py --model tiny --batch 2 --steps 12 --rounds 3
python scripts/bench_zero.py --model FOLDER --stages 2,3 -- --set KEY=VALUE ...

Seconds: the median of a run's steps after the first two; then the median, and the least and most,
over rounds. Memory: the most that a process held of its own until then (Linux: anonymous pages;
files that are mapped do not count), the larger of its processes; the median over rounds.
What follows `--` goes to `vcdeft train`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from visualcloze_deft.training.run_folder import METRICS

WARM_UP = 2  # steps that are not counted


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run: seconds of its median step, bytes of its largest process."""

    seconds: float
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("more", nargs="*")
    asked = parser.parse_args()
    if asked.steps <= WARM_UP:
        parser.error(f"--steps: more than {WARM_UP}, which are not counted")
    stages = asked.stages.split(",")
    costs: dict[str, list[Cost]] = {stage: [] for stage in stages}
    for _ in range(asked.rounds):
        for stage in stages:
            words = ["--zero", stage, "--model", asked.model, "--batch", str(asked.batch)]
            words += ["--steps", str(2 * asked.steps), "--processes", str(asked.processes)]
            costs[stage].append(cost(words + asked.more, steps=asked.steps))
            print(stage, costs[stage][-1], file=sys.stderr, flush=True)
    print("| stage | seconds a step (least to most) | memory a process, MB |\n|---|---|---|")
    for stage, found in costs.items():
        seconds = [one.seconds for one in found]
        middle, memory = statistics.median(seconds), statistics.median(one.memory for one in found)
        shown = f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        print(f"| {stage} | {shown} | {memory / 1e6:.0f} |")


def cost(words: list[str], *, steps: int) -> Cost:
    """Train `steps` steps in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "visualcloze_deft", "train", "--output", folder, *words]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        most: dict[int, int] = {}
        metrics = Path(folder) / METRICS
        while run.poll() is None and len(steps_of(metrics)) < steps:
            for process in psutil.Process(run.pid).children(recursive=True):
                most[process.pid] = max(most.get(process.pid, 0), own_memory(process))
            time.sleep(0.05)
        if run.poll() is None:
            run.terminate()  # without the sheet at the end
        elif run.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {run.returncode}")
        run.wait()
        seconds = steps_of(metrics)[WARM_UP:]
    return Cost(seconds=statistics.median(seconds), memory=max(most.values()))


def steps_of(metrics: Path) -> list[float]:
    """Seconds of the steps that a run has written down so far."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
    return [json.loads(line)["seconds"] for line in lines]


def own_memory(process: psutil.Process) -> int:
    """Bytes of a process that no file holds; 0 once it has ended."""
    try:
        held = process.memory_info()
    except psutil.Error:
        return 0
    return held.rss - held.shared


if __name__ == "__main__":
    main()
