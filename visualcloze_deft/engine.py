"""DeepSpeed around the adapter's parameters, and its state by parameter name.

What is gathered here does not depend on the ZeRO stage or the number of processes.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from visualcloze_deft import adapters, deft
from visualcloze_deft.checkpoint import Checkpoint
from visualcloze_deft.loss import GridLoss
from visualcloze_deft.settings import Run

MOMENT_NAMES = ("exp_avg", "exp_avg_sq")  # torch AdamW's
ON_CPU = {"device": "cpu"}
OFFLOADED: dict[str, dict[str, Any]] = {
    "none": {},
    "optimiser": {"offload_optimizer": ON_CPU},
    "parameters": {"offload_optimizer": ON_CPU, "offload_param": ON_CPU},
}  # DeepSpeed's settings for our `offload`


def start_engine(transformer: FluxTransformer2DModel, run: Run) -> Any:
    """DeepSpeed's engine around the transformer and AdamW over the adapter."""
    if run.checkpointing:
        transformer.enable_gradient_checkpointing()
    if run.zero == 3:
        register_for_zero3(transformer)
    module = GridLoss(
        transformer,
        context_weight=run.context_weight,
        guidance=run.guidance,
        rollout=run.rollout > 0,
    )
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


def register_for_zero3(root: nn.Module) -> None:
    """Tell ZeRO-3 what each DEFT layer in `root` reads without calling the module that holds it."""
    for layer in deft.layers(root).values():
        for parameter in layer.parameters():
            register_external_parameter(layer, parameter)


def deepspeed_config(run: Run) -> dict[str, Any]:
    ours = {
        "train_micro_batch_size_per_gpu": run.batch,
        "gradient_accumulation_steps": run.accumulate,
        "gradient_clipping": run.optimiser.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": run.zero} | OFFLOADED[run.offload],
        "steps_per_print": 10**9,
    }
    return over(ours, run.deepspeed)


def over(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `more` on top, section by section.

    >>> over({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": 4})
    {'a': {'b': 1, 'c': 3}, 'd': 4}
    """
    found = settings | more
    for name, section in settings.items():
        if isinstance(section, dict) and isinstance(more.get(name), dict):
            found[name] = over(section, more[name])
    return found


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
    whole = {
        name: safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for name, parameter in adapters.trainable(transformer).items()
    }
    return adapters.state_of(transformer, whole)


def stepped_tensors(engine: Any) -> list[Tensor]:
    """What the AdamW inside steps: parameters (stage 0) or DeepSpeed's flat shares of them."""
    if engine.zero_optimization_stage() == 3:  # its groups are empty between steps
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in torch_optimiser(engine).param_groups for flat in group["params"]]


def restore_moments(engine: Any, start: Checkpoint) -> None:
    """Put back what `gather_moments` found, under any ZeRO stage and number of processes."""
    saved = start.moments()
    optimiser = torch_optimiser(engine)
    steps = torch.tensor(float(start.progress.step))
    for flat in stepped_tensors(engine):
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
