"""The memory a run needs on each GPU, known before a weight is read: from settings and sizes alone.

What is held follows DeepSpeed 0.19's ZeRO stages; what autograd keeps of a block is counted tensor
by tensor, as diffusers' blocks, our DEFT layer and peft's LoRA leave it. The tests hold both
against real processes and real backward passes. All sizes are bytes, a GB is 10^9 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from visualcloze_deft.backbones.base import SINGLE, Activations, Backbone, Load, Seen, Sizes
from visualcloze_deft.backbones.model_files import check_quantise
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import OFFLOADED, Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.planning.machine import RESERVE, gigabytes, memory_here, usable
from visualcloze_deft.planning.outside_steps import (
    SHEET_ROWS,
    Outside,
    PixelValues,
    forward_values,
    picture_bytes,
    pixel_values,
)
from visualcloze_deft.planning.sizes import (
    adapted_layers,
    adapter_tensors,
    is_in,
    quantising_bytes,
    stored,
)
from visualcloze_deft.runtime.gpus import gpus_here, precision_on

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000 + 50_000_000  # stage3_max_live_parameters and stage3_prefetch_bucket_size
PERSISTENT = 100_000  # elements: stage3_param_persistence_threshold

Stage = Literal[0, 1, 2, 3]
ZERO: tuple[Stage, ...] = (0, 1, 2, 3)
LEAST = {
    "none": 0,
    "optimiser": 1,
    "parameters": 3,
}  # the first stage that splits what is offloaded


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a process holds at the peak of a step.

    adapter: its values and DeepSpeed's copies. gathered: of the base and the adapter, from other
    GPUs. gradients: with the buffer they are summed in. optimiser: AdamW's two moments.
    """

    base: int
    gathered: int
    adapter: int
    gradients: int
    optimiser: int
    encoders: int
    activations: int

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run needs under each ZeRO stage and number of recomputed blocks.

    size: bytes of a value of the base's precision. encoders: bytes of those that stay. moved: bytes
    of those that come only while they work.
    """

    run: Run
    backbone: Backbone
    model: Sizes
    load: Load
    processes: int
    size: int
    encoders: int
    pixels: PixelValues
    moved: Mapping[str, int]

    @cached_property
    def activations(self) -> Activations:
        settings, adapted = self.run.adapter, self.adapted
        return self.backbone.activations(self.model, settings, adapted, self.load, self.size)

    @cached_property
    def adapted(self) -> list[str]:
        """The linear layers that get an adapter."""
        return adapted_layers(self.model, self.run.adapter, self.backbone.target_modules)

    @cached_property
    def tensors(self) -> list[int]:
        return adapter_tensors(self.model, self.run.adapter, self.adapted)

    @cached_property
    def base(self) -> int:
        return stored(self.model, self.run.quantise, self.size)

    @property
    def blocks(self) -> int:
        return len(self.model.blocks)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those this base can be trained under, with the run's `offload` and `compile`."""
        whole = self.run.quantise != "none" or self.run.compile
        return tuple(s for s in ZERO if s >= LEAST[self.run.offload] and not (whole and s == 3))

    def parts(self, stage: Stage, recomputed: int) -> Parts:
        zero = OFFLOADED[self.run.offload] | self.run.deepspeed.get("zero_optimization", {})
        whole = sum(self.tensors) * SINGLE
        share = -(-whole // self.processes)
        base, gathered = self.base, 0
        if self.run.quantise != "none":  # one weight out of its bits
            gathered = max(i * o for i, o in self.model.linear.values()) * self.size
        if stage == 3:
            gathered = self.gathered(zero)
            base = 0 if _offloaded(zero, "param") else -(-base // self.processes)
        held, moments, summed = self.held(stage, zero, whole, share)
        return Parts(
            base=base,
            gathered=gathered,
            adapter=held,
            gradients=summed,
            optimiser=moments,
            encoders=self.encoders,
            activations=self.activations.peak(recomputed),
        )

    def peak(self, stage: Stage, recomputed: int) -> int:
        """The most a process holds: at the peak of a step, while it encodes or makes a sample, or
        while a layer is quantised when the others are done. Loading a base as it is takes less
        under every stage, as ZeRO-3 divides it while it is read."""
        between = self.between(stage) + self.outside.peak
        loading = self.base + quantising_bytes(self.model, self.run.quantise, self.size)
        return max(self.parts(stage, recomputed).peak, between, loading)

    def between(self, stage: Stage) -> int:
        """What stays when a step is over: gradients are gone. With the weights that ZeRO-3 gathers
        again for a sample."""
        parts = self.parts(stage, 0)
        return parts.peak - parts.gradients - parts.activations

    @cached_property
    def outside(self) -> Outside:
        """What encoding, evaluating and sampling take, see `Outside`. Where encodings are kept,
        strips are encoded one by one."""
        run, load, strip = self.run, self.load, self.load.widest
        sheet = SHEET_ROWS * strip + load.text
        tokens = max(sheet, load.tokens) if run.logging.validate_every else sheet
        values = forward_values(run.adapter.method, self.size) * self.model.width * tokens
        together = 1 if run.data.embedding_cache else load.grids
        vae, pixels = self.moved.get("vae", 0), self.pixels
        texts = [size for part, size in self.moved.items() if part != "vae"]
        return Outside(
            text=max(texts, default=0),
            encode=vae + picture_bytes(pixels.encode, together * strip, self.size),
            forward=values * self.size + sum(self.activations.factors),
            decode=vae + picture_bytes(pixels.decode, strip, self.size),
        )

    def held(
        self, stage: Stage, zero: Mapping[str, Any], whole: int, share: int
    ) -> tuple[int, int, int]:
        """Bytes of the adapter with its copies, of the moments, and of the gradients."""
        kept = 3 if self.run.ema else 2  # the moments, and the running average beside them
        if stage == 0:
            summing = min(whole, BUCKET * SINGLE) if self.processes > 1 else 0
            return whole, kept * whole, whole + summing
        bucket = int(zero.get("reduce_bucket_size", min(BUCKET, sum(self.tensors)))) * SINGLE
        if stage != 3 and zero.get("overlap_comm"):
            bucket *= 2
        values = share if stage == 3 else whole
        if _offloaded(zero, "optimizer"):
            return values, 0, bucket
        summed = whole if stage == 1 and self.run.accumulate > 1 else share
        return values + share, kept * share, summed + bucket

    def gathered(self, zero: Mapping[str, Any]) -> int:
        """What ZeRO-3 fetches for the layers at work, and the small tensors it keeps then."""
        largest = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
        small = sum(count for count in self.tensors if count < largest) * SINGLE
        small += sum(o for _, o in self.model.linear.values() if o < largest) * self.size
        live = int(zero.get("stage3_max_live_parameters", LIVE))
        first = [s for name, s in self.model.linear.items() if is_in(self.model.blocks[:1], name)]
        block = sum((inputs + 1) * outputs for inputs, outputs in first)
        return min(max(live, block) * self.size, self.base) + small

    def least(self, stage: Stage, memory: int) -> int | None:
        """The fewest blocks to recompute that fit into `memory`; None if no number does."""
        fits = (n for n in range(self.blocks + 1) if self.fits(stage, n, memory))
        return next(fits, None)

    def fits(self, stage: Stage, recomputed: int, memory: int) -> bool:
        return self.peak(stage, recomputed) <= usable(memory)

    def choose(self, memory: int, *, recompute: bool = True) -> tuple[Stage, int] | None:
        """The stage and number of recomputed blocks of `run` with "auto" filled in: the lowest
        stage that fits, then the fewest blocks. None if nothing fits.

        recompute: whether "auto" may recompute blocks.
        """
        stages = self.stages if self.run.zero == "auto" else (self.run.zero,)
        if self.run.zero == "auto" and self.processes == 1:
            stages = self.stages[:1]  # there is nothing to divide
        for stage in stages:
            blocks = self.recomputed
            if blocks is None:
                blocks = self.least(stage, memory) if recompute else 0
            if blocks is not None and self.fits(stage, blocks, memory):
                return stage, blocks
        return None

    @property
    def recomputed(self) -> int | None:
        """How many blocks the run says to recompute; None for "auto"."""
        said = self.run.gradient_checkpointing
        if isinstance(said, int):
            return said
        return {"none": 0, "all": self.blocks, "auto": None}[said]

    def smallest(self) -> tuple[Stage, int]:
        """The stage and number of recomputed blocks that need least, of those `run` leaves open."""
        stages = self.stages if self.run.zero == "auto" else (self.run.zero,)
        counts = range(self.blocks + 1) if self.recomputed is None else (self.recomputed,)
        ways = ((stage, count) for stage in stages for count in counts)
        return min(ways, key=lambda way: self.peak(*way))

    def way_out(self) -> str:
        """What to do where nothing fits."""
        stage, blocks = self.smallest()
        return (
            f"the least is about {gigabytes(self.peak(stage, blocks))} with --zero {stage} "
            f"--gradient-checkpointing {blocks}, and {RESERVE:.0%} are left free: lower --batch or "
            "--resolution, set quantise, or give both options to try it all the same"
        )

    def left_open(self) -> MemoryPlan:
        """The same with stage and recomputed blocks to be chosen."""
        run = self.run.model_copy(update={"zero": "auto", "gradient_checkpointing": "auto"})
        return replace(self, run=run)


def _offloaded(zero: Mapping[str, Any], what: str) -> bool:
    return zero.get(f"offload_{what}", {}).get("device", "none") != "none"


def memory_plan(run: Run, load: Load, *, processes: int, gpu: bool) -> MemoryPlan:
    """The plan of `run` for so many processes. gpu: what "auto" precision is on GPUs.

    Raises `UserError` where the model's settings cannot be read, or it has fewer blocks than are to
    be recomputed.
    """
    check_quantise(run.quantise, zero3=run.zero == 3)
    size = 2 if run.precision == "bfloat16" or (run.precision == "auto" and gpu) else SINGLE
    backbone = backbone_of(run.model)
    model = backbone.sizes(run.model)
    others = {part: values * size for part, values in backbone.encoders(run.model).items()}
    offloaded = run.offload_encoders and gpu
    plan = MemoryPlan(
        run=run,
        backbone=backbone,
        model=model,
        load=load,
        processes=processes,
        size=size,
        encoders=0 if offloaded else sum(others.values()),
        pixels=pixel_values(backbone.vae(run.model)),
        moved=others if offloaded else {},
    )
    check_blocks(run, model)
    return plan


def check_blocks(run: Run, model: Sizes) -> None:
    """Raise `UserError` where more blocks are to be recomputed than there are."""
    said, there = run.gradient_checkpointing, len(model.blocks)
    if isinstance(said, int) and said > there:
        raise UserError(
            f"gradient_checkpointing = {said}: the model has {there} blocks; give fewer"
        )


def plan_here(run: Run, load: Load, *, processes: int) -> MemoryPlan:
    """`memory_plan` for the machine it is called on."""
    gpus = gpus_here()
    precision = precision_on(run.precision, gpus[0] if gpus else None)
    run = run.model_copy(update={"precision": precision})
    return memory_plan(run, load, processes=processes, gpu=bool(gpus))


def load_of(run: Run, *, most: int, least: int, strip: int) -> Load:
    """What a process of `run` computes at once, where grids have `least` to `most` tokens, and rows
    up to `strip`.

    With a budget of tokens it is the number of the smallest grids, which bring most text.
    """
    grids = max(run.batch_tokens // least, 1) if run.batch_tokens else run.batch
    image = run.batch_tokens // grids if run.batch_tokens else most
    text = backbone_of(run.model).text_tokens(run.model)
    seen: Seen = "isolated" if run.context == "mixed" else run.context
    return Load(grids=grids, image=image, text=text, strip=strip, seen=seen)


def decided(run: Run, load: Load, *, processes: int) -> Run:
    """`run` with `zero` and `gradient_checkpointing` chosen where they are "auto".

    On CPU no block is recomputed. Raises `UserError` where nothing fits.
    """
    gpu = bool(gpus_here())
    if isinstance(run.gradient_checkpointing, int):
        check_blocks(run, backbone_of(run.model).sizes(run.model))
    if run.zero != "auto" and (run.gradient_checkpointing != "auto" or not gpu):
        blocks = 0 if run.gradient_checkpointing == "auto" else run.gradient_checkpointing
        chosen = run.model_copy(update={"gradient_checkpointing": blocks})
        if run.quantise != "none" and not gpu:
            check_quantised(plan_here(chosen, load, processes=processes), memory_here(processes))
        return chosen
    plan = plan_here(run, load, processes=processes)
    memory = memory_here(processes)
    way = plan.choose(memory, recompute=gpu)
    if way is None:
        raise UserError(f"nothing fits into {gigabytes(memory)} a process; {plan.way_out()}")
    return run.model_copy(update={"zero": way[0], "gradient_checkpointing": way[1]})


def check_quantised(plan: MemoryPlan, memory: int) -> None:
    """Raise `UserError` where a quantised base on a CPU is sure not to fit into `memory`.

    Its stage and number of recomputed blocks are decided. Encoders do not count, whose files may
    stay mapped; a base that is not quantised may, too, and is not looked at.
    """
    stage, blocks = plan.run.zero, plan.recomputed
    assert stage != "auto"
    assert blocks is not None
    needed = plan.peak(stage, blocks) - plan.encoders
    if needed > memory:
        raise UserError(
            f"quantise = {plan.run.quantise!r}: about {gigabytes(needed)} a process, encoders left "
            f"out, and there are {gigabytes(memory)}; lower --batch or --resolution, or raise "
            "--gradient-checkpointing; vcdeft plan shows the parts"
        )
