"""A base that ZeRO-3 splits as it is read, in one group of processes that torchrun starts:

torchrun --nproc-per-node 2 zero_shards.py LARGE SMALL LORA OUTPUT

Loads the model LARGE, attaches an adapter, starts the engine and predicts once; each process
writes to OUTPUT what memory that took. Loads SMALL with LORA merged and with an adapter, and
gathers its tensors.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import psutil
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.config.run_settings import Adapter, Run
from visualcloze_deft.training import zero3
from visualcloze_deft.training.engine import deepspeed_config, start_engine

NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
RUN = Run(
    zero=3,
    adapter=Adapter(rank=2),
    deepspeed={"zero_optimization": NOTHING_STAYS},
    gradient_checkpointing="none",
)
PRECISION = torch.float32


def own_memory() -> int:
    """Bytes that this process holds and no file does: pages of mapped files do not count."""
    held = psutil.Process().memory_info()
    return held.rss - held.shared


@contextmanager
def most_memory(found: dict[str, int]) -> Iterator[None]:
    """Writes to `found` the most bytes that were held inside beyond those at its start."""
    start, done = own_memory(), threading.Event()
    found["taken"] = 0

    def watch() -> None:
        while not done.wait(0.01):
            found["taken"] = max(found["taken"], own_memory() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()


def load(model: str, *, lora: str | None = None) -> FluxTransformer2DModel:
    split = zero3.splitter(deepspeed_config(RUN), PRECISION)
    transformer = load_transformer(model, dtype=PRECISION, lora=lora, split=split)
    injection.attach(transformer, RUN.adapter, seed=RUN.seed, whole=zero3.whole)
    return transformer


def inputs(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    config = transformer.config
    return {
        "inputs": torch.ones(1, 4, config.in_channels),
        "t": torch.ones(1),
        "ids": torch.zeros(4, 3),
        "text": torch.ones(1, 2, config.joint_attention_dim),
        "pooled": torch.ones(1, config.pooled_projection_dim),
    }


def main(large: str, small: str, lora: str, output: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = torch.distributed.get_rank()
    found: dict[str, int] = {}
    with most_memory(found):
        transformer = load(large)
        found["held_after_loading"] = sum(
            p.ds_tensor.nbytes for p in transformer.parameters() if not p.requires_grad
        )
        start_engine(transformer, RUN)
        with torch.no_grad():
            predict_velocity(transformer, **inputs(transformer), guidance=1.0)
    (output / f"{rank}.json").write_text(json.dumps(found))
    merged = load(small, lora=lora)
    gathered = {}
    for name, parameter in merged.named_parameters():
        with zero3.whole(parameter):
            gathered[name] = parameter.detach().clone()
    if rank == 0:
        save_file(gathered, output / "gathered.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
