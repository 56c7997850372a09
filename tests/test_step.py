"""A step as one process takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_watch import group  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.kernels import Kernels, shapes_in
from visualcloze_deft.config.run_settings import load_run
from visualcloze_deft.sampling.encoding import encode
from visualcloze_deft.training import run_data
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.engine import start_engine
from visualcloze_deft.training.step import Batch, Stepper, seen_in

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # operations that read a number


class Waiting(TorchDispatchMode):
    """Notes the operations for which the host waits for a device, and other words in between."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.events.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("method", ["deft", "lora"])
def test_a_step_waits_for_the_device_at_its_end_alone(
    micro_model: Path, monkeypatch: pytest.MonkeyPatch, method: str, zero: int
) -> None:
    """Not between the passes of its batches; blocks are computed again in the backward pass."""
    fields = [f"model={micro_model}", "adapter.rank=4", f"adapter.method={method}", f"zero={zero}"]
    run = load_run(None, [*fields, "gradient_checkpointing=all", "accumulate=2"])
    models = load_models(run.model)
    injection.attach(models.transformer, run.adapter, seed=0)
    draws = PixelDataset(run_data.mixture_of(run))
    drawn = [[draws[0], draws[1]], [draws[2], draws[3]]]
    step = [Batch(drawn=part, groups=encode(models, part, seed=0)) for part in drawn]
    engine = start_engine(models.transformer, run)
    shapes = shapes_in(run, image_tokens=(), device=models.device)
    stepper = Stepper(engine, run, rank=0, world=1, shapes=shapes, chosen=Kernels(), explained={})
    stepper.take(step, 0.5, number=1)  # what is made once
    original = engine.step

    def watched() -> None:
        waiting.events.append("step")
        original()

    monkeypatch.setattr(engine, "step", watched)
    with Waiting() as waiting:
        errors = stepper.take(step, 0.5, number=2)
    events = waiting.events
    last = len(events) - 1 - events[::-1].index("step")
    assert set(events[:last]) == {"step"}  # of the first batch
    assert set(events[last + 1 :]) == {"_local_scalar_dense"}  # whether the gradient is finite
    assert engine.was_step_applied()
    seen = seen_in(step, torch.cat(errors).tolist())
    assert sorted(seen) == [0, 1, 2, 3]


def test_checkpoints_of_before_kernels_were_chosen_can_be_read() -> None:
    before = Progress(**{"step": 1, "examples": 2, "seed": 0, "global_batch": 2})
    assert (before.attention, before.norms, before.explained) == ("", "fused", {})
