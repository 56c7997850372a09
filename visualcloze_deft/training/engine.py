"""DeepSpeed around the adapter's parameters, and its state by parameter name.

What is gathered here does not depend on the ZeRO stage or the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import (
    GatheredParameters,
    register_external_parameter,
)
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visualcloze_deft.adapters import injection, methods
from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.backbones.compiled import compile_blocks
from visualcloze_deft.backbones.table import blocks_of
from visualcloze_deft.config.overrides import deep_merge
from visualcloze_deft.config.run_settings import OFFLOADED, Run
from visualcloze_deft.diffusion.flow import FLOW
from visualcloze_deft.diffusion.process import Process
from visualcloze_deft.planning.memory import BUCKET
from visualcloze_deft.training.checkpoint import Checkpoint
from visualcloze_deft.training.objective import GridLoss

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")  # torch AdamW's
AVERAGE = "average"  # ours, in the same place


def start_engine(denoiser: nn.Module, run: Run, *, process: Process = FLOW) -> Any:
    """DeepSpeed's engine around the denoiser and AdamW over the adapter. process: the model's."""
    recompute(denoiser, run.gradient_checkpointing)
    if run.zero == 3:
        register_for_zero3(denoiser)
    if run.compile:
        compile_blocks(denoiser)
    module = GridLoss(
        denoiser,
        context_weight=run.context_weight,
        guidance=run.guidance,
        scheduled_sampling=run.scheduled_sampling > 0,
        process=process,
    )
    deft_linear.share_factors(module)  # over all its calls of the denoiser, one for each grid shape
    settings = run.optimiser
    optimiser = (torch.optim.AdamW if run.zero else ClippedAdamW)(
        injection.parameter_groups(denoiser, run.adapter, lr=settings.lr),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    if isinstance(optimiser, ClippedAdamW):
        optimiser.clip = settings.max_grad_norm
    for group in optimiser.param_groups:
        group["full_lr"] = group["lr"]
    trained = injection.trainable(denoiser).values()
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimiser,
        model_parameters=trained,
        config=deepspeed_config(run, values=sum(parameter.numel() for parameter in trained)),
        dist_init_required=False,
    )
    start_moments(engine, steps=0)
    return engine


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient's norm, and leaves everything as it is where that is not
    finite, as ZeRO does.

    For stage 0, where every process holds the whole gradient and so all of them find the same.
    DeepSpeed there walks all gradients one by one to clip them, and again to find what is not
    finite: hundreds of small calls, each of which a GPU waits for.
    """

    clip = math.inf
    overflow = False  # under these two names DeepSpeed asks whether a step was applied, and
    _global_grad_norm: Tensor | None = None  # for the norm before clipping

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm, self.overflow = norm, not bool(norm.isfinite())
        if self.overflow:
            return None
        torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return super().step(closure)


def recompute(denoiser: Any, blocks: int | str) -> None:
    """Recompute the first `blocks` blocks ("all", "none") in the backward pass.

    The first, because their turn in it comes when all others have given back what they kept.
    """
    every = blocks_of(denoiser)
    chosen = {"all": every, "none": []}[blocks] if isinstance(blocks, str) else every[:blocks]
    again = set(chosen)

    def call(block: nn.Module, *inputs: Any) -> Any:
        if block not in again:
            return block(*inputs)
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: deft_linear.recomputing(denoiser),
        )

    denoiser.enable_gradient_checkpointing(call)


def register_for_zero3(root: nn.Module) -> None:
    """Tell ZeRO-3 what each DEFT layer in `root` reads without calling the module that holds it."""
    for layer in deft_linear.layers(root).values():
        for parameter in layer.parameters():
            register_external_parameter(layer, parameter)


def deepspeed_config(run: Run, *, values: int = BUCKET) -> dict[str, Any]:
    """DeepSpeed's settings for training so many values: its buffer for gradients, which is 2 GB
    where nothing is said, holds no more than they need."""
    ours = {
        "train_micro_batch_size_per_gpu": run.batch,
        "gradient_accumulation_steps": run.accumulate,
        "gradient_clipping": run.optimiser.max_grad_norm if run.zero else 0.0,  # see `ClippedAdamW`
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": run.zero, "reduce_bucket_size": min(BUCKET, values)}
        | OFFLOADED[run.offload],
        "steps_per_print": 10**9,
    }
    return deep_merge(ours, run.deepspeed)


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


def gather_moments(engine: Any) -> dict[str, Tensor]:
    """The whole optimiser state by parameter name; every process must call it."""
    return gather_kinds(engine, MOMENT_NAMES)


def gather_average(engine: Any) -> dict[str, Tensor]:
    """The running average of what is trained, as `gather_moments` names it."""
    return gather_kinds(engine, (AVERAGE,))


def gather_kinds(engine: Any, kinds: Sequence[str]) -> dict[str, Tensor]:
    link_moments(engine)
    stage0 = engine.zero_optimization_stage() == 0
    found = {}
    for name, parameter in injection.trainable(engine.module.denoiser).items():
        for kind in kinds:
            if stage0:
                state = torch_optimiser(engine).state[parameter][kind]
            else:
                state = safe_get_full_optimizer_state(parameter, kind)
            found[f"{kind}.{name}"] = state.detach().cpu().clone()
    return found


def gather_adapter(engine: Any) -> dict[str, Tensor]:
    """The adapter's float32 tensors under peft's file names; every process must call it."""
    denoiser = engine.module.denoiser
    if engine.zero_optimization_stage() == 0:
        return injection.state(denoiser)
    whole = {
        name: safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for name, parameter in injection.trainable(denoiser).items()
    }
    return injection.state_of(denoiser, whole)


def adapter_of_average(engine: Any) -> dict[str, Tensor]:
    """`gather_adapter`, of the running average. Averaged is what is trained, in this process's
    signs: in peft's, R could change its sign from step to step."""
    return injection.state_of(engine.module.denoiser, by_parameter(gather_average(engine)))


def by_parameter(average: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{AVERAGE}."): tensor for name, tensor in average.items()}


@torch.no_grad()
def average(engine: Any, decay: float) -> None:
    """Move the running average of what is trained, this process's share, towards what it is now.

    It begins as what the first step leaves, and lies beside AdamW's moments, so that it is
    gathered and put back as they are. decay: how much of it stays.
    """
    for flat in stepped_tensors(engine):
        state = torch_optimiser(engine).state[flat]
        if AVERAGE in state:
            state[AVERAGE].lerp_(flat, 1 - decay)
        else:
            state[AVERAGE] = flat.detach().clone()


@contextmanager
def published(engine: Any, *, averaged: bool) -> Iterator[None]:
    """Inside, the denoiser is as it would be published: not in training, and where `averaged`
    with the running average. Afterwards all is as it was, bit for bit. Every process must enter.
    """
    training = [module for module in engine.module.modules() if module.training]
    trained = whole_parameters(engine) if averaged else {}
    if averaged:
        put_parameters(engine, by_parameter(gather_average(engine)))
    engine.module.eval()
    with deft_linear.constant_parameters(engine.module):
        yield
    for module in training:
        module.training = True
    if averaged:
        put_parameters(engine, trained)


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    """What the denoiser computes with, by name; every process must call it."""
    named = injection.trainable(engine.module.denoiser)
    with GatheredParameters(list(named.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in named.items()}


def put_parameters(engine: Any, values: dict[str, Tensor]) -> None:
    """Compute with `values` and leave what is stepped alone; every process must call it."""
    named = injection.trainable(engine.module.denoiser)
    with GatheredParameters(list(named.values()), modifier_rank=0), torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(values[name])


def adapter_norms(engine: Any) -> dict[str, float]:
    """Frobenius norms of P and R, or of A and B, mean over layers; every process must call it."""
    named = injection.trainable(engine.module.denoiser)
    norms: dict[str, list[float]] = {}
    with GatheredParameters(list(named.values())):
        for name, parameter in named.items():
            norms.setdefault(methods.kind(name), []).append(parameter.norm().item())
    return {kind: sum(found) / len(found) for kind, found in sorted(norms.items())}


def stepped_tensors(engine: Any) -> list[Tensor]:
    """What the AdamW inside steps: parameters (stage 0) or DeepSpeed's flat shares of them."""
    if engine.zero_optimization_stage() == 3:  # its groups are empty between steps
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in torch_optimiser(engine).param_groups for flat in group["params"]]


def start_moments(engine: Any, *, steps: int, kinds: Sequence[str] = MOMENT_NAMES) -> None:
    """AdamW's state after `steps` steps, with moments of zero: AdamW itself would make it in the
    first step, which may be one that is skipped. kinds: names of what is kept of each parameter."""
    for flat in stepped_tensors(engine):
        torch_optimiser(engine).state[flat] = {
            "step": torch.tensor(float(steps)),
            **{kind: torch.zeros_like(flat) for kind in kinds},
        }


def restore_moments(engine: Any, start: Checkpoint) -> None:
    """Put back what `gather_moments` and `gather_average` found, under any ZeRO stage and number of
    processes."""
    saved = start.moments() | start.average()
    kinds = sorted({name.partition(".")[0] for name in saved})
    optimiser = torch_optimiser(engine)
    start_moments(engine, steps=start.progress.step - start.progress.not_finite, kinds=kinds)
    link_moments(engine)
    stage0 = engine.zero_optimization_stage() == 0
    for name, parameter in injection.trainable(engine.module.denoiser).items():
        for kind in kinds:
            value = saved[f"{kind}.{name}"]
            if stage0:
                optimiser.state[parameter][kind].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)
