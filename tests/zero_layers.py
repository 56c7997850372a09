"""Adapter layers under every ZeRO stage, in one group of processes.

Layers with and without bias, blocks recomputed or not, two accumulated batches, optimiser and
parameters offloaded or not. Writes losses and the trained adapter of each way to OUTPUT. With
MEMORY "full of NaN", so is the memory of every tensor that is made without values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from peft import DeftConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.training.engine import ClippedAdamW, deepspeed_config, register_for_zero3

KINDS: dict[str, dict[str, Any]] = {
    "deft": {"decomposition_method": "qr"},
    "deft-relaxed": {"decomposition_method": "relu"},
    "para": {"decomposition_method": "qr", "para": True},
    "lora": {"lora_alpha": 4, "init_lora_weights": False},
}
STEPS, ACCUMULATED, BATCH = 3, 2, 4
SPLIT_ALL = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
ON_CPU = {"device": "cpu"}
WAYS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": ON_CPU},
    "zero3": {"stage": 3},
    "zero3-split": {"stage": 3, **SPLIT_ALL},
    "zero3-offload": {
        "stage": 3,
        "offload_optimizer": ON_CPU,
        "offload_param": ON_CPU,
        **SPLIT_ALL,
    },
}


class Net(nn.Module):
    """Two blocks of a layer with bias and one without, and the loss of a random target."""

    def __init__(self, kind: str, *, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))
            for _ in range(2)
        )
        self.recompute = recompute
        self.requires_grad_(False)
        config = LoraConfig if kind == "lora" else DeftConfig
        config = config(r=4, target_modules=r"blocks\.\d\.(0|2)", **KINDS[kind])
        inject_adapter_in_model(config, self, "default")
        deft_linear.adopt(self)
        deft_linear.share_factors(self)

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return (x - wanted).square().mean()


def examples(world: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the batches: each of `BATCH` examples over all ranks."""
    for number in range(STEPS * ACCUMULATED):
        drawn = torch.randn(2, BATCH, 24, generator=torch.Generator().manual_seed(number))
        x, wanted = drawn.chunk(world, dim=1)[rank]
        yield x, wanted


def optimiser_of(net: Net, kind: type[torch.optim.AdamW] = torch.optim.AdamW) -> Any:
    return kind([p for p in net.parameters() if p.requires_grad], lr=0.01)


def train(kind: str, way: dict[str, Any], *, recompute: bool) -> dict[str, Tensor]:
    """Losses of this rank's batches and the trained parameters, under DeepSpeed."""
    net = Net(kind, recompute=recompute)
    if way["stage"] == 3:
        register_for_zero3(net)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    stage, more = way["stage"], {k: v for k, v in way.items() if k != "stage"}
    run = Run(
        zero=stage,
        batch=BATCH // world,
        accumulate=ACCUMULATED,
        deepspeed={"zero_optimization": more},
    )
    optimiser = optimiser_of(net, torch.optim.AdamW if stage else ClippedAdamW)
    optimiser.clip = run.optimiser.max_grad_norm
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimiser,
        config=deepspeed_config(run, values=sum(p.numel() for p in net.parameters())),
        dist_init_required=False,
    )
    losses = []
    for x, wanted in examples(world, rank):
        loss = engine(x, wanted)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    found = {
        name: (safe_get_full_fp32_param(p) if stage else p).detach().clone()
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }
    engine.destroy()
    mean = torch.stack(losses)
    torch.distributed.all_reduce(mean)
    return {"losses": mean / world, **found}


def main(output: str, memory: str = "fresh") -> None:
    torch.use_deterministic_algorithms(memory == "full of NaN", warn_only=True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for kind, way, recompute in itertools.product(KINDS, WAYS, (True, False)):
        found = train(kind, WAYS[way], recompute=recompute)
        if torch.distributed.get_rank() == 0:
            save_file(found, Path(output) / f"{kind}.{way}.{recompute}.safetensors")
    torch.distributed.destroy_process_group()
