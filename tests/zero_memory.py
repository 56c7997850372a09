"""What each process really holds under every ZeRO stage, in one group of processes.

The embedded base in bfloat16 with a DEFT adapter takes a step and a backward pass under each stage;
rank 0 writes the bytes of all tensors then alive to OUTPUT as JSON.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import deepspeed
import torch

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.sampling.encoding import TokenBatch
from visualcloze_deft.training.engine import start_engine

LARGEST = 1000  # values of a tensor that ZeRO-3 keeps whole


def run_under(stage: int) -> Run:
    small = f"deepspeed.zero_optimization.stage3_param_persistence_threshold={LARGEST}"
    words = ["precision=bfloat16", "adapter.rank=16", "gradient_checkpointing=none"]
    return load_run(None, [f"zero={stage}", *words, small])


def alive() -> dict[int, int]:
    """Bytes by storage."""
    gc.collect()
    tensors = [
        thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    ]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


def group() -> TokenBatch:
    clean = torch.randn(1, 16, 64, dtype=torch.bfloat16)
    ids = torch.ones(16, 3)
    mask = torch.ones(1, 16, 256, dtype=torch.bfloat16)
    return TokenBatch(
        indices=(0,),
        latents=packing.Latents(clean=clean, seen=clean, mask=mask, ids=ids),
        noise=torch.randn(1, 16, 64, dtype=torch.bfloat16),
        t=torch.tensor([0.5]),
        start=torch.tensor([0.5]),
        text=packing.FluxText(
            torch.randn(1, 8, 64, dtype=torch.bfloat16), torch.randn(1, 64, dtype=torch.bfloat16)
        ),
    )


def held(stage: int) -> int:
    """Bytes that training under `stage` has added when gradients are there and moments, too."""
    before = alive()
    run = run_under(stage)
    transformer = load_transformer("tiny", dtype=torch.bfloat16)
    injection.attach(transformer, run.adapter, seed=0)
    engine = start_engine(transformer, run)
    for _ in range(2):
        loss = engine([group()]).sum()
        engine.backward(loss)
        del loss
        found = sum(size for key, size in alive().items() if key not in before)
        engine.step()
    engine.destroy()
    return found


def main(output: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    sizes = {stage: held(stage) for stage in (0, 1, 2, 3)}
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(sizes), encoding="utf-8")
    torch.distributed.destroy_process_group()
