"""What the stages share: where files lie, how long they run, states that survive a kill."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

KEPT_EVERY = 60.0  # seconds between two states
SHOWN_EVERY = 180.0  # seconds between two sheets of samples
NOTED_EVERY = 10.0  # seconds between two lines of the log
FORMAT = 1  # of states: raise it where what a state means changes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One base in the making.

    output: its folder. cell: side of a cell in pixels, a multiple of 16. minutes: of each stage's
    training. processes: how many render. bundles: how many the transformer learns from. batch: part
    of the largest batch sizes, for machines without a GPU. seed: of everything drawn.
    """

    output: Path
    cell: int
    minutes: Mapping[str, float]
    anneal: float
    processes: int
    bundles: int
    batch: float
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def bank(self) -> Path:
        return self.output / "bank"

    @property
    def tokens(self) -> int:
        """Tokens along a cell's side."""
        return self.cell // 16

    def state(self, stage: str) -> Path:
        return self.output / f"{stage}_state.safetensors"

    def log(self, stage: str) -> Path:
        return self.output / f"{stage}_log.jsonl"


def refuse(message: str) -> NoReturn:
    """End with one line on stderr and status 2."""
    print(f"train_base: {message}", file=sys.stderr)
    raise SystemExit(2)


def keep(
    plan: Plan, stage: str, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]
) -> None:
    """Save a state; where that fails the one before stays as it was, and the stage ends."""
    path = plan.state(stage)
    staged = path.with_suffix(".part")
    told = {"format": FORMAT, "stage": stage, "cell": plan.cell, "progress": dict(progress)}
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, staged, {"recipe": json.dumps(told)})
        staged.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            staged.unlink()
        refuse(f"{path} cannot be written ({error}); the state before it is whole")


def kept(plan: Plan, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and progress of a stage that was begun; None where there are none."""
    path = plan.state(stage)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["recipe"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError):
        refuse(f"{path} is not a state of this recipe; move it away to begin the stage anew")
    for name, here in {"format": FORMAT, "stage": stage, "cell": plan.cell}.items():
        if told[name] != here:
            refuse(
                f"{path} has {name} {told[name]}, this run {here}; give another --output, or move "
                "the state away"
            )
    return tensors, told["progress"]


class Sitting:
    """The seconds of a stage's training in this sitting, with a bar, and when to save and to show.

    SIGTERM and Ctrl-C end a sitting as its time does: saved.
    """

    def __init__(self, plan: Plan, stage: str) -> None:
        self.seconds = 60 * plan.minutes[stage]
        self.anneal = 60 * min(plan.anneal, plan.minutes[stage])
        self.stage = stage
        self.began = self.noted = self.saved = self.shown = time.monotonic()
        self.stop = threading.Event()
        self.path = plan.log(stage)

    def __iter__(self) -> Iterator[float]:
        """The part of the sitting that is over, 0..1, until it is."""
        before = {s: signal.signal(s, self.ended) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tqdm(total=round(self.seconds), unit="s", desc=self.stage, mininterval=1) as bar:
                self.bar = bar
                while (spent := self.spent) < self.seconds and not self.stop.is_set():
                    bar.update(int(spent) - bar.n)
                    yield spent / self.seconds
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def ended(self, *_: object) -> None:
        self.stop.set()

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """What is left of the learning rate: 1, and towards 0 in the last `anneal` seconds."""
        left = max(self.seconds - self.spent, 0)
        return min(1.0, left / self.anneal) if self.anneal else 1.0

    def due(self, which: str, every: float) -> bool:
        """Whether this ("noted", "saved" or "shown") was last due `every` seconds ago."""
        now = time.monotonic()
        if now - getattr(self, which) < every:
            return False
        setattr(self, which, now)
        return True

    def note(self, facts: Mapping[str, Any]) -> None:
        """A line of the stage's log, shown at the bar too."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(facts)) + "\n")
        self.bar.set_postfix(facts, refresh=False)


def last_note(plan: Plan, stage: str) -> dict[str, Any]:
    """The last line of a stage's log; empty where there is none."""
    path = plan.log(stage)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}
