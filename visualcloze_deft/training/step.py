"""A step of training, and what becomes of it where its gradient is not finite.

Every process of a run takes the same steps with the same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.backbones import attention, kernels
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.base import Seen, Split
from visualcloze_deft.backbones.kernels import Kernels, Suspect
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.grids.grid import Grid
from visualcloze_deft.sampling.encoding import NEAREST, PixelExample, TokenBatch
from visualcloze_deft.training import run_folder
from visualcloze_deft.training.checkpoint import Progress
from visualcloze_deft.training.metrics_log import ExampleLoss, gathered
from visualcloze_deft.training.nonfinite import SUM, traced

FINITE, NOT_FINITE = "finite", "not finite"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One of the batches of a process whose gradients a step sums, in pixels and encoded.

    Under ZeRO-3 some groups may be fillers, see `loop.Loop.encoded`.
    """

    drawn: Sequence[PixelExample]
    groups: Sequence[TokenBatch]

    @property
    def indices(self) -> list[int]:
        """Of the examples, in the order of the losses."""
        return [index for group in self.groups if not group.filler for index in group.indices]

    def split(self, errors: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the examples, and those of fillers. errors: of all groups, in order."""
        parts = errors.split([len(group.indices) for group in self.groups])
        kinds: tuple[list[Tensor], list[Tensor]] = ([], [errors[:0]])
        for group, part in zip(self.groups, parts, strict=True):
            kinds[group.filler].append(part)
        own, fillers = map(torch.cat, kinds)
        return own, fillers


def seen_in(
    step: Sequence[Batch], errors: Sequence[float], *, scheduled_sampling: float = 0.0
) -> dict[int, ExampleLoss]:
    """What became of the examples of a step, by index; errors: their losses, batch after batch.
    scheduled_sampling: the run's."""
    error_of = dict(zip((i for batch in step for i in batch.indices), errors, strict=True))
    groups = [group for batch in step for group in batch.groups if not group.filler]
    tokens_of = {i: group.noise.shape[1] for group in groups for i in group.indices}
    seen_by = {i: group.seen for group in groups for i in group.indices}
    weight_of = exact_weights(groups, scheduled_sampling) if scheduled_sampling else {}
    return {
        one.index: ExampleLoss(
            task=one.task,
            error=error_of[one.index],
            tokens=tokens_of[one.index],
            items=len(one.grid.strips),
            skipped=one.skipped,
            exact=weight_of.get(one.index, 1.0),
            split=split_of(one.grid, tokens_of[one.index], seen_by[one.index]),
        )
        for batch in step
        for one in batch.drawn
    }


def split_of(built: Grid, tokens: int, seen: Seen) -> Split | None:
    """The tokens of a grid whose context is computed once; None where all are together."""
    if seen == "full":
        return None
    pixels = sum(height * width for height, width in built.shape)
    last, hidden = built.strips[-1][0].numel(), int(built.hidden[-1].sum())
    query = tokens * (last - hidden) // pixels if seen == "causal" else None
    return Split(targets=tokens * hidden // pixels, query=query)


def exact_weights(groups: Sequence[TokenBatch], scheduled_sampling: float) -> dict[int, float]:
    """By index, how much each sample counts in the loss without scheduled samples: 0 for those.

    Times below `NEAREST` have no scheduled samples, so the others there count less: weighted, the
    times are as training draws them.
    """
    found = {}
    for group in groups:
        for index, t, start in zip(
            group.indices, group.t.tolist(), group.start.tolist(), strict=True
        ):
            alone = 1 - scheduled_sampling if t > NEAREST else 1.0
            found[index] = 0.0 if start > t else alone and 1 / alone
    return found


def first_said(text: str | None, world: int) -> str | None:
    """The first text that a process gives, in order of ranks; every process must call it."""
    return next((said for said in gathered(text, world) if said is not None), None)


def kernels_at_start(
    run: Run, shapes: Shapes, before: Progress | None, *, rank: int, world: int
) -> Kernels:
    """The kernels that a run begins with, the same in every process; its folder records them.

    before: where the run stood that is resumed. It goes on with its own kernels, unless the setting
    now names another backend of attention. Raises `UserError`, see `attention.decide`.
    """
    wanted, norms, own = run.attention, Kernels().norms, ""
    if before is not None:
        norms, own = before.norms, before.attention
        if own and wanted == before.attention_setting != attention.AUTO:
            wanted = own
    choice = attention.decide(
        wanted, shapes, passes="both", before=own, shared=lambda fault: first_said(fault, world)
    )
    chosen = Kernels(attention=choice.backend, norms=norms)
    if rank == 0:
        if choice.line:
            tqdm.write(choice.line)
        explained = before.explained if before else {}
        facts = {**asdict(chosen), "attention_check": choice.line, "not_finite": explained}
        run_folder.record(Path(run.output), facts)
    return chosen


class Stepper:
    """Takes the steps of a run in this process, with other kernels where those in use fail.

    kernels: those in use. explained: kernels and whether the loss was finite -> where the first
    such gradient that was not finite came from.
    """

    def __init__(
        self,
        engine: Any,
        run: Run,
        *,
        rank: int,
        world: int,
        shapes: Shapes,
        chosen: Kernels,
        explained: Mapping[str, str],
    ) -> None:
        """shapes: of attention, to test other kernels. chosen: what the transformer uses."""
        self.engine = engine
        self.run = run
        self.rank = rank
        self.world = world
        self.shapes = shapes
        self.kernels = chosen
        self.explained = dict(explained)
        self.number = 0

    def take(self, step: Sequence[Batch], share: float, *, number: int) -> list[Tensor]:
        """Take step `number`, the first is 1; each example's gradient counts `share`.

        Returns the losses of each batch, on the device. Whether the step changed anything,
        `engine.was_step_applied` says, the same in every process.
        """
        self.number = number
        errors = self.compute(step, share)
        return errors if self.engine.was_step_applied() else self.explain(step, share, errors)

    def compute(self, step: Sequence[Batch], share: float) -> list[Tensor]:
        """Both passes of each batch, then the optimiser, which leaves everything as it is where the
        gradient is not finite. The same step computed again draws the same dropout. Nothing waits
        for the device before the optimiser does.
        """
        dropout = (self.run.seed * 1_000_003 + self.number - 1) * self.world + self.rank
        torch.manual_seed(dropout % 2**63)
        found = []
        with deft_linear.constant_parameters(
            self.engine.module
        ):  # until the last batch's engine.step
            for batch in step:
                errors, fillers = batch.split(self.engine(batch.groups))
                self.engine.backward(share * errors.sum() + 0 * fillers.sum())
                self.engine.step()
                found.append(errors.detach())
        return found

    def explain(self, step: Sequence[Batch], share: float, errors: list[Tensor]) -> list[Tensor]:
        """Take a step again whose gradient was not finite: watched, then with other kernels where
        one of those in use may be at fault. Returns the losses.

        Where the gradient is finite the step is taken, and the run goes on with those kernels.
        Of each kind, with a finite loss or without, it is done for the first such step alone.
        """
        lost = None if torch.cat(errors).isfinite().all() else NOT_FINITE
        kind = f"{self.kernels}, loss {self.first_said(lost) or FINITE}"
        if kind in self.explained:
            return errors
        with traced(self.engine.module) as trace:
            errors = self.compute(step, share)
        if self.engine.was_step_applied():
            how = "again and not compiled" if self.run.compile else "again"
            self.say(f"gradient not finite; computed {how}, it is")
            return errors
        own = trace.origin(loss_finite=bool(torch.cat(errors).isfinite().all()))
        everyone = gathered(own, self.world)
        origin = next((one for one in everyone if one is not None), SUM)
        dtype = str(self.shapes.dtype).removeprefix("torch.")
        self.explained[kind] = f"{origin} ({dtype}, {kind})"
        errors = self.mend(step, share, errors, suspect=origin.suspect, after=self.explained[kind])
        if self.rank == 0:
            facts = {**asdict(self.kernels), "not_finite": self.explained}
            run_folder.record(Path(self.run.output), facts)
        return errors

    def mend(
        self,
        step: Sequence[Batch],
        share: float,
        errors: list[Tensor],
        *,
        suspect: Suspect,
        after: str,
    ) -> list[Tensor]:
        """Take a step with each of the kernels that may replace the suspected one, until its
        gradient is finite. Where it never is, all stays as it was. Returns the losses: of an
        example, the first that is finite."""
        tried = []
        for other in kernels.remedies(self.kernels, suspect, self.shapes, shared=self.first_said):
            kernels.use(self.engine.module.denoiser, other)
            tried.append(str(other))
            again = self.compute(step, share)
            if self.engine.was_step_applied():
                self.say(
                    f"gradient not finite after {after}; with {other} it is: the run goes on so"
                )
                self.kernels = other
                return again
            errors = [torch.where(e.isfinite(), e, a) for e, a in zip(errors, again, strict=True)]
        if tried:
            kernels.use(self.engine.module.denoiser, self.kernels)
        self.say(f"gradient not finite after {after}{''.join(f', nor with {t}' for t in tried)}")
        return errors

    def origin(self, *, loss_finite: bool) -> str:
        """Where the first gradient that was not finite came from, of steps with such a loss."""
        kind = f"{self.kernels}, loss {FINITE if loss_finite else NOT_FINITE}"
        return self.explained.get(kind, "an operation that was not found")

    def first_said(self, text: str | None) -> str | None:
        return first_said(text, self.world)

    def say(self, text: str) -> None:
        """A line on the step that is being taken."""
        if self.rank == 0:
            tqdm.write(f"step {self.number}: {text}")
