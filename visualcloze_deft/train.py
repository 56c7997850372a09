"""The training loop: one adapter for all tasks, under DeepSpeed, on one process or many.

Step s of a run sees examples s * G .. (s + 1) * G - 1 (G: grids of all processes and
accumulated batches), whatever the number of processes. Axes: b batch, n tokens.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from accelerate import PartialState
from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from diffusers import FluxTransformer2DModel
from peft.tuners.deft.layer import DeftLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from visualcloze_deft import adapters, checkpoint, flow, rundir
from visualcloze_deft.batch import Drawn, Draws, Group, encode
from visualcloze_deft.checkpoint import Checkpoint, Progress
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.models import Models, load_models
from visualcloze_deft.preview import sample_sheet
from visualcloze_deft.settings import Optimiser, Run


class GridLoss(nn.Module):
    """The transformer with its loss: one call takes a whole batch of groups, as engines like it."""

    def __init__(
        self, transformer: FluxTransformer2DModel, *, context_weight: float, guidance: float
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.context_weight = context_weight
        self.guidance = guidance

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """(b,) the loss of each sample, group after group."""
        return torch.cat([self.errors(group) for group in groups])

    def errors(self, group: Group) -> Tensor:
        latents, dtype = group.latents, self.transformer.dtype
        noisy = flow.interpolate(latents.clean, group.noise, group.t)
        predicted = self.transformer(
            hidden_states=latents.inputs(noisy).to(dtype),
            timestep=group.t.to(dtype),
            guidance=torch.full_like(group.t, self.guidance),
            pooled_projections=group.pooled,
            encoder_hidden_states=group.text,
            txt_ids=torch.zeros(group.text.shape[1], 3, device=noisy.device),
            img_ids=latents.ids,
            return_dict=False,
        )[0]
        weight = latents.is_target + self.context_weight * (1 - latents.is_target)
        return flow.velocity_error(predicted, flow.velocity(latents.clean, group.noise), weight)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which examples this process sees: its rank of `world`, `batch` at a time."""

    rank: int
    world: int
    batch: int
    accumulate: int

    @property
    def global_batch(self) -> int:
        return self.world * self.batch * self.accumulate

    def indices(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """One list of example indices per batch of this process."""
        for step in range(first_step, last_step):
            for part in range(self.accumulate):
                start = step * self.global_batch + (part * self.world + self.rank) * self.batch
                yield list(range(start, start + self.batch))


def learning_rate_factor(step: int, steps: int, settings: Optimiser) -> float:
    """Linear warm-up, then constant or a cosine down to zero at the last step.

    >>> from visualcloze_deft.settings import Optimiser
    >>> [round(learning_rate_factor(s, 100, Optimiser(warmup=10)), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(steps - settings.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * done))


def train(run: Run, *, resume: bool, prepared: bool) -> None:
    """Train as `run` says, in every process of the launched group. Files land in `run.output`.

    prepared: whether the launcher has checked everything and made the run folder.
    """
    quiet()
    cpu = not torch.cuda.is_available()
    process = PartialState(cpu=cpu)
    deepspeed.init_distributed(dist_backend=process.backend, verbose=False)
    output = Path(run.output)
    share = Share(
        rank=process.process_index,
        world=process.num_processes,
        batch=run.batch,
        accumulate=run.accumulate,
    )
    if share.rank == 0 and not prepared:
        rundir.prepare(run, processes=share.world, resume=resume)
    process.wait_for_everyone()
    mixture = rundir.mixture_of(run)
    models = load_models(
        run.model,
        dtype=base_dtype(run, cpu=cpu),
        device=str(process.device),
        lora=run.model_lora,
    )
    start = latest(output, share) if resume else None
    if start is None:
        adapters.attach(models.transformer, run.adapter, seed=run.seed)
    else:
        adapters.load(models.transformer, start.folder, trainable=True)
    engine = start_engine(models.transformer, run)
    if start is not None:
        restore_moments(engine, start)
    first = start.progress.step if start else 0
    loop = Loop(run=run, models=models, engine=engine, share=share, output=output)
    if share.rank == 0:
        rundir.keep_metrics_until(output, first)
        loop.writer = SummaryWriter(output / "tensorboard", purge_step=first + 1)
    loop.run_steps(mixture, first)
    loop.finish(mixture)
    process.wait_for_everyone()
    process.destroy_process_group()


def quiet() -> None:
    """Keep the libraries' own bars and deprecation notices out of the training output."""
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")


def base_dtype(run: Run, *, cpu: bool) -> torch.dtype:
    if run.precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[run.precision]
    return torch.float32 if cpu or not torch.cuda.is_bf16_supported() else torch.bfloat16


def latest(output: Path, share: Share) -> Checkpoint:
    """The newest good checkpoint; the same answer in every process."""
    found, warnings = checkpoint.newest(output / "checkpoints")
    if share.rank == 0:
        for line in warnings:
            tqdm.write(line)
    return found


def start_engine(transformer: FluxTransformer2DModel, run: Run) -> Any:
    """DeepSpeed's engine around the transformer and AdamW over the adapter."""
    if run.checkpointing:
        transformer.enable_gradient_checkpointing()
    if run.zero == 3:
        register_external(transformer)
    module = GridLoss(transformer, context_weight=run.context_weight, guidance=run.guidance)
    settings = run.optimiser
    optimiser = torch.optim.AdamW(
        adapters.parameter_groups(transformer, run.adapter, lr=settings.lr),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    for group in optimiser.param_groups:
        group["full_lr"] = group["lr"]
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        model_parameters=adapters.trainable(transformer).values(),
        config=deepspeed_config(run),
        dist_init_required=False,
    )
    return engine


def register_external(transformer: nn.Module) -> None:
    """Let ZeRO-3 know that peft's DEFT layers read their base layer's weight and bias themselves.

    Without this DeepSpeed frees the bias before the layer adds it (peft 0.21, DeepSpeed 0.19).
    """
    for layer in transformer.modules():
        if isinstance(layer, DeftLayer):
            for parameter in layer.get_base_layer().parameters():
                register_external_parameter(layer, parameter)


def deepspeed_config(run: Run) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": run.batch,
        "gradient_accumulation_steps": run.accumulate,
        "gradient_clipping": run.optimiser.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": run.zero},
        "steps_per_print": 10**9,
    }


def torch_optimiser(engine: Any) -> torch.optim.Optimizer:
    """The AdamW inside: ZeRO wraps it, stage 0 does not."""
    zero = engine.zero_optimization_stage() > 0
    inner: torch.optim.Optimizer = engine.optimizer.optimizer if zero else engine.optimizer
    return inner


def link_moments(engine: Any) -> None:
    """Show DeepSpeed where each parameter's moments lie in the flat optimiser state.

    ZeRO-1 and -2 do so by themselves after the first group's first step, which leaves the later
    groups unlinked (DeepSpeed 0.19).
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


def gather_moments(engine: Any) -> dict[str, Tensor]:
    """The whole optimiser state by parameter name; every process must call it."""
    link_moments(engine)
    stage0 = engine.zero_optimization_stage() == 0
    found = {}
    for name, parameter in adapters.trainable(engine.module.transformer).items():
        for kind in MOMENT_NAMES:
            if stage0:
                moment = torch_optimiser(engine).state[parameter][kind]
            else:
                moment = safe_get_full_optimizer_state(parameter, kind)
            found[f"{kind}.{name}"] = moment.detach().cpu().clone()
    return found


def gather_adapter(engine: Any) -> dict[str, Tensor]:
    """The adapter's float32 tensors under peft's file names; every process must call it."""
    transformer = engine.module.transformer
    if engine.zero_optimization_stage() == 0:
        return adapters.state(transformer)
    return {
        adapters.file_name(name): safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for name, parameter in adapters.trainable(transformer).items()
    }


def restore_moments(engine: Any, start: Checkpoint) -> None:
    """Put back what `gather_moments` found, under any ZeRO stage and number of processes."""
    saved = start.moments()
    optimiser = torch_optimiser(engine)
    steps = torch.tensor(float(start.progress.step))
    for group in optimiser.param_groups:
        for flat in group["params"]:
            optimiser.state[flat] = {
                "step": steps.clone(),
                **{kind: torch.zeros_like(flat) for kind in MOMENT_NAMES},
            }
    link_moments(engine)
    stage0 = engine.zero_optimization_stage() == 0
    for name, parameter in adapters.trainable(engine.module.transformer).items():
        for kind in MOMENT_NAMES:
            value = saved[f"{kind}.{name}"]
            if stage0:
                optimiser.state[parameter][kind].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)


class Loop:
    """The steps of one process, and what it writes as rank 0."""

    def __init__(
        self, *, run: Run, models: Models, engine: Any, share: Share, output: Path
    ) -> None:
        self.run = run
        self.models = models
        self.engine = engine
        self.share = share
        self.output = output
        self.resolution = rundir.resolution_of(run)
        self.writer: SummaryWriter | None = None

    def run_steps(self, mixture: Mixture, first: int) -> None:
        run, share = self.run, self.share
        loader = DataLoader(
            Draws(mixture, self.resolution),
            batch_sampler=list(share.indices(first, run.steps)),
            collate_fn=_as_list,
            num_workers=run.data.workers,
        )
        batches = iter(loader)
        bar = tqdm(
            desc="training",
            total=run.steps,
            initial=first,
            unit="step",
            disable=share.rank != 0,
            smoothing=0.05,
            mininterval=1.0,
        )
        for step in range(first, run.steps):
            factor = learning_rate_factor(step, run.steps, run.optimiser)
            for group in torch_optimiser(self.engine).param_groups:
                group["lr"] = group["full_lr"] * factor
            began = time.monotonic()
            losses: dict[int, tuple[str, float]] = {}
            for _ in range(run.accumulate):
                losses |= self.backward(next(batches))
                self.engine.step()
            self.record(step + 1, losses, factor, time.monotonic() - began, bar)
            done = step + 1
            if done % run.save_every == 0 or done == run.steps:
                self.save(done)
            if run.sheet_every and done % run.sheet_every == 0 and done < run.steps:
                self.sheet(mixture, done)
        bar.close()

    def backward(self, drawn: Sequence[Drawn]) -> dict[int, tuple[str, float]]:
        """Gradients of one batch; task and loss by example index."""
        groups = encode(self.models, drawn, seed=self.run.seed)
        errors = self.engine(groups)
        self.engine.backward(errors.mean())
        order = [index for group in groups for index in group.indices]
        tasks = [task for group in groups for task in group.tasks]
        return {
            index: (task, error)
            for index, task, error in zip(order, tasks, errors.tolist(), strict=True)
        }

    def record(
        self,
        step: int,
        losses: dict[int, tuple[str, float]],
        factor: float,
        seconds: float,
        bar: Any,
    ) -> None:
        everyone: list[dict[int, tuple[str, float]]] = [{}] * self.share.world
        torch.distributed.all_gather_object(everyone, losses)
        if self.share.rank != 0:
            return
        merged = {index: pair for part in everyone for index, pair in part.items()}
        by_task: dict[str, list[float]] = {}
        for _, (task, error) in sorted(merged.items()):
            by_task.setdefault(task, []).append(error)
        loss = sum(error for _, error in merged.values()) / len(merged)
        means = {task: sum(found) / len(found) for task, found in sorted(by_task.items())}
        line = {
            "step": step,
            "examples": step * self.share.global_batch,
            "loss": loss,
            "lr": self.run.optimiser.lr * factor,
            "seconds": round(seconds, 4),
            "tasks": means,
        }
        with (self.output / rundir.METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        assert self.writer is not None
        curves = {"loss": loss, "lr": self.run.optimiser.lr * factor}
        curves |= {f"task/{task}": mean for task, mean in means.items()}
        for name, value in curves.items():
            self.writer.add_scalar(name, value, step)
        bar.update(1)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def save(self, step: int) -> None:
        moments, tensors = gather_moments(self.engine), gather_adapter(self.engine)
        if self.share.rank == 0:
            progress = Progress(
                step=step,
                examples=step * self.share.global_batch,
                seed=self.run.seed,
                global_batch=self.share.global_batch,
            )
            checkpoint.save(
                self.output / "checkpoints",
                progress,
                moments,
                lambda folder: self.write_adapter(folder, tensors, step),
            )
            if step == self.run.steps:
                staging = self.output / ".adapter.part"
                staging.mkdir(exist_ok=True)
                self.write_adapter(staging, tensors, step)
                checkpoint.publish(staging, self.output / "adapter")
        torch.distributed.barrier()

    def write_adapter(self, folder: Path, tensors: dict[str, Tensor], step: int) -> None:
        adapters.save(
            self.models.transformer,
            folder,
            base=self.run.model,
            tensors=tensors,
            metadata=rundir.adapter_metadata(self.run, step),
        )

    def sheet(self, mixture: Mixture, step: int) -> None:
        """A picture of what the adapter makes; every process samples, rank 0 writes."""
        self.models.transformer.eval()
        page = sample_sheet(self.models, mixture, resolution=self.resolution)
        self.models.transformer.train()
        if self.share.rank == 0:
            folder = self.output / "sheets"
            folder.mkdir(exist_ok=True)
            page.save(folder / f"step-{step:06d}.png")

    def finish(self, mixture: Mixture) -> None:
        self.sheet(mixture, self.run.steps)
        if self.writer is not None:
            self.writer.close()


def _as_list(drawn: list[Drawn]) -> list[Drawn]:
    return drawn
