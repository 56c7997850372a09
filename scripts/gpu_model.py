"""What the checks and measurements on a GPU compute with: random models, grids, clocks.

Axes: b batch, n image tokens, l text tokens.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import deepspeed
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents, position_ids
from visualcloze_deft.sampling.encoding import TokenBatch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
AXES = (16, 56, 56)
PACKAGES = ("diffusers", "transformers", "peft", "deepspeed", "accelerate")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
NAN_SIZES = (2**28, 2**26, *[2**18] * 64, *[2**16] * 64, *[2**10] * 64)  # float32 values


def machine() -> dict[str, Any]:
    """The card and the versions."""
    found: dict[str, Any] = {"card": torch.cuda.get_device_name() if CUDA else "CPU"}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        found |= {"GB": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found | {"torch": torch.__version__} | {name: version(name) for name in PACKAGES}


@cache
def start_distributed() -> None:
    """One process of a group of one, as DeepSpeed's engine needs it."""
    os.environ.update(ALONE)
    deepspeed.utils.logger.setLevel("WARNING")
    if not CUDA:  # building it needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if CUDA else "gloo"
    store = torch.distributed.HashStore()  # no port that another process could have
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def random_flux(config: dict[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A frozen transformer whose random weights are made on the device, as if it were trained."""
    with torch.device("meta"):
        net = FluxTransformer2DModel(**config, axes_dims_rope=AXES).to(dtype)
    net = net.to_empty(device=DEVICE)
    draw = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5 / math.sqrt(parameter.shape[1]), generator=draw)
        else:
            parameter.data.fill_(1.0 if "norm" in name else 0.0)
    net.pos_embed = type(net.pos_embed)(theta=10000, axes_dim=AXES)  # has no weights to fill
    return net.eval().requires_grad_(False)


def group_of(
    net: FluxTransformer2DModel, *, grids: int, rows: int, columns: int, cell: int, text: int
) -> TokenBatch:
    """`grids` random grids of square cells. cell: pixels of a side. text: T5 tokens."""
    n, config = rows * columns * (cell // 16) ** 2, net.config
    draw = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(grids, *shape, device=DEVICE, generator=draw)

    target = torch.zeros(grids, n, 256, device=DEVICE)
    target[:, -(cell // 16) :] = 1
    t = torch.rand(grids, device=DEVICE, generator=draw)
    return TokenBatch(
        indices=tuple(range(grids)),
        latents=Latents(
            clean=normal(n, 64),
            seen=normal(n, 64),
            mask=target,
            ids=position_ids(((cell, columns * cell),) * rows).to(DEVICE),
        ),
        noise=normal(n, 64),
        t=t,
        start=t,
        text=FluxText(
            normal(text, config.joint_attention_dim).bfloat16().to(net.dtype),
            normal(config.pooled_projection_dim).bfloat16().to(net.dtype),
        ),
    )


def leave_nan() -> None:
    """Leave NaN in the memory that the next tensors will get, on a GPU: a kernel that reads more
    than its inputs then shows it."""
    if CUDA:
        blocks = [torch.full((size,), math.nan, device=DEVICE) for size in NAN_SIZES]
        del blocks


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def reset() -> None:
    """From here on `peaks` counts."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """The most memory since `reset`, in GB; nothing on a CPU."""
    if not CUDA:
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"peak GB": allocated / 1e9, "reserved GB": reserved / 1e9}


def timed(work: Callable[[], object], *, rounds: int = 5, warm_up: int = 2) -> dict[str, float]:
    """Milliseconds until all is done, and until the host has launched all: medians."""
    done, launched = [], []
    for number in range(warm_up + rounds):
        wait()
        began = time.perf_counter()
        work()
        returned = time.perf_counter()
        wait()
        if number >= warm_up:
            done.append(1e3 * (time.perf_counter() - began))
            launched.append(1e3 * (returned - began))
    return {"ms": statistics.median(done), "launch ms": statistics.median(launched)}
