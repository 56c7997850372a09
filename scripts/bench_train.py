"""What a training step costs: python scripts/bench_train.py --output runs/bench-train

This package's engine (DeepSpeed, DEFT and LoRA) and a minimal loop of accelerate and peft's LoRA,
written below as diffusers' example trainers do it, take turns at the same grids on the same model,
in one process; medians are compared, because machines are noisy. Prints a table with the time of
each part and writes bench.json. On a GPU `--blocks 19 38` is FLUX.1-Fill's transformer with random
weights on a 3 x 3 grid of 384 px (tokens and text random too, nothing encoded) and reports model
FLOP utilisation for each --gradient-checkpointing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.nn import functional
from tqdm import tqdm

from visualcloze_deft.adapters import files, injection, methods
from visualcloze_deft.backbones.flops import peak as device_peak
from visualcloze_deft.backbones.flops import training_flops
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models, predict
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents, position_ids
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.diffusion import flow
from visualcloze_deft.sampling.encoding import PixelExample, TokenBatch, encode
from visualcloze_deft.training import checkpoint, run_data
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.engine import gather_adapter, gather_moments, start_engine

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PARTS = ("encode", "forward", "backward", "optimiser")
BASE = ["zero=0", "processes=1"]
CELL, ROWS, COLUMNS, TEXT = 384, 3, 3, 512  # of the measurement at FLUX's size
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]  # of diffusers' FLUX LoRA trainer


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Times:
    """Seconds of each part, step by step."""

    of: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        began = now()
        yield
        self.of[part].append(now() - began)

    def steps(self) -> list[float]:
        return [sum(parts) for parts in zip(*(of for of in self.of.values() if of), strict=True)]


Step = Callable[[Any, Times], None]


def engine_step(run: Run, models: Models) -> tuple[Step, Any]:
    """One step of this package: what `loop.Loop.take_step` does with a batch."""
    injection.attach(models.transformer, run.adapter, seed=run.seed)
    engine = start_engine(models.transformer, run)

    def step(batch: Any, times: Times) -> None:
        groups = batch
        if not isinstance(batch[0], TokenBatch):
            with times.measured("encode"):
                groups = encode(models, batch, seed=run.seed, times=run.timestep_sampling)
        with times.measured("forward"):
            loss = engine(groups).mean()
        with times.measured("backward"):
            engine.backward(loss)
        with times.measured("optimiser"):
            engine.step()

    return step, engine


def minimal_step(run: Run, models: Models) -> Step:
    """One step of a plain loop: accelerate, peft's LoRA on the layers `run` adapts, torch AdamW."""
    accelerator = Accelerator(cpu=not CUDA)
    transformer = models.transformer.requires_grad_(False)
    layers = methods.layers(run.adapter, FLUX_LAYERS)
    config = LoraConfig(r=run.adapter.rank, lora_alpha=run.adapter.rank, target_modules=layers)
    transformer.add_adapter(config)
    trained = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimiser = torch.optim.AdamW(trained, lr=run.optimiser.lr)
    transformer, optimiser = accelerator.prepare(transformer, optimiser)
    transformer = accelerator.unwrap_model(transformer)  # alone, it needs no data parallelism

    def inputs(batch: Any) -> tuple[Latents, FluxText]:
        if isinstance(batch[0], TokenBatch):
            return batch[0].latents, batch[0].text
        text = models.encode_text([one.prompt for one in batch])
        return models.encode_grids([one.grid for one in batch], clean=True), text

    def step(batch: Any, times: Times) -> None:
        if isinstance(batch[0], TokenBatch):
            latents, text = inputs(batch)
        else:
            with times.measured("encode"):
                latents, text = inputs(batch)
        with times.measured("forward"):
            clean = latents.clean
            noise = torch.randn_like(clean)
            t = torch.sigmoid(torch.randn(len(clean), device=clean.device))
            noisy = flow.interpolate(clean, noise, t)
            predicted = predict(transformer, latents, noisy, t, text=text, guidance=run.guidance)
            loss = functional.mse_loss(predicted.float(), (noise - clean).float())
        with times.measured("backward"):
            accelerator.backward(loss)
        with times.measured("optimiser"):
            accelerator.clip_grad_norm_(trained, run.optimiser.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()

    return step


def drawn_batches(run: Run, count: int) -> tuple[list[list[PixelExample]], float]:
    """Batches of one grid shape each, and the median seconds to draw one."""
    draws, batches, seconds, index = PixelDataset(run_data.mixture_of(run)), [], [], 0
    while len(batches) < count:
        began, by_shape = time.perf_counter(), {}
        for one in (draws[k] for k in range(index, index + run.batch)):
            by_shape.setdefault(one.grid.shape, []).append(one)
        seconds.append(time.perf_counter() - began)
        index += run.batch
        batches += [same for same in by_shape.values() if len(same) == run.batch]
    return batches[:count], statistics.median(seconds)


def random_batch(transformer: FluxTransformer2DModel, batch: int) -> list[TokenBatch]:
    """One group of 3 x 3 grids whose tokens and text are noise."""
    side = CELL // 16
    shape = ((side, COLUMNS * side),) * ROWS
    tokens = ROWS * COLUMNS * side * side

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(batch, *sizes, device=DEVICE, dtype=transformer.dtype)

    latents = Latents(
        clean=noise(tokens, 64),
        seen=noise(tokens, 64),
        mask=torch.zeros(batch, tokens, 256, device=DEVICE, dtype=transformer.dtype),
        ids=position_ids(shape).to(DEVICE),
    )
    t = torch.full((batch,), 0.5, device=DEVICE)
    config = transformer.config
    return [
        TokenBatch(
            indices=tuple(range(batch)),
            latents=latents,
            noise=noise(tokens, 64),
            t=t,
            start=t,
            text=FluxText(
                noise(TEXT, config.joint_attention_dim), noise(config.pooled_projection_dim)
            ),
        )
    ]


def flux(blocks: Sequence[int]) -> FluxTransformer2DModel:
    """FLUX.1-Fill's transformer with random weights, made on the device in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        made = FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=blocks[0],
            num_single_layers=blocks[1],
            guidance_embeds=True,
        )
    torch.set_default_dtype(torch.float32)
    return made


def peak_memory() -> float:
    """GB: of the GPU since the last reset, or the resident set of this process so far."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def saving(run: Run, models: Models, engine: Any) -> float:
    """Seconds of a checkpoint."""
    with tempfile.TemporaryDirectory() as place:
        began = now()
        tensors = gather_adapter(engine)
        progress = checkpoint.Progress(step=1, examples=1, seed=0, global_batch=1)
        checkpoint.save(
            Path(place) / "checkpoints",
            progress,
            gather_moments(engine),
            lambda at: files.save(models.transformer, at, base=run.model, tensors=tensors),
            keep=1,
        )
        return now() - began


def take_turns(
    steps: dict[str, Step], batches: Sequence[Any], warmup: int
) -> dict[str, tuple[Times, float]]:
    """Times of each variant and its peak memory (meaningful on GPUs, where it is reset)."""
    times, peaks = {name: Times() for name in steps}, dict.fromkeys(steps, 0.0)
    for number, batch in enumerate(tqdm(batches, unit="round")):
        for name, step in steps.items():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            step(batch, times[name] if number >= warmup else Times())
            peaks[name] = max(peaks[name], peak_memory())
    return {name: (times[name], peaks[name]) for name in steps}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.blocks:
        return measure_flux(options)
    base = [*BASE, f"batch={options.batch}", "gradient_checkpointing=none"]
    run = load_run(None, [*base, f"adapter.rank={options.rank}", f"data.tasks={options.tasks}"])
    batches, drawing = drawn_batches(run, options.rounds + options.warmup)
    steps: dict[str, Step] = {}
    save = 0.0
    models = load_models(options.model)
    for method in ("deft", "lora"):
        own = copy.deepcopy(models)
        adapted = run.model_copy(
            update={"adapter": run.adapter.model_copy(update={"method": method})}
        )
        steps[f"vcdeft {method}"], engine = engine_step(adapted, own)
        save = saving(adapted, own, engine) if method == "deft" else save
    steps["accelerate + peft LoRA"] = minimal_step(run, copy.deepcopy(models))
    rows = []
    tokens = sum(h * w // 16**2 for h, w in batches[0][0].grid.shape)  # 16 pixels a token
    for name, (times, _) in take_turns(steps, batches, options.warmup).items():
        step = statistics.median(times.steps())
        parts = {part: statistics.median(of) for part, of in times.of.items()}
        row = {"variant": name, "data": drawing, **parts, "step": step}
        row |= {"examples/s": options.batch / step, "tokens/s": options.batch * tokens / step}
        rows.append(row | ({"save": save} if name == "vcdeft deft" else {}))
    return rows


def measure_flux(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Full FLUX geometry on a GPU, one variant after the other: no two fit at once."""
    rows = []
    half = sum(options.blocks) // 2
    for variant in ("vcdeft deft", "vcdeft lora", "accelerate + peft LoRA"):
        plain = variant.startswith("accelerate")
        for blocks in ("none", "all") if plain else ("none", half, "all"):
            row: dict[str, Any] = {"variant": variant, "recomputed": blocks}
            try:
                row |= measure_blocks(options, variant, blocks)
            except torch.cuda.OutOfMemoryError:
                row["step"] = "out of memory"
            rows.append(row)
            torch.cuda.empty_cache()
    return rows


def measure_blocks(
    options: argparse.Namespace, variant: str, blocks: str | int
) -> dict[str, float]:
    """Seconds of a step, peak GB and model FLOP utilisation of one variant."""
    transformer = flux(options.blocks)
    models: Any = argparse.Namespace(transformer=transformer, device=DEVICE)
    method = "deft" if variant.endswith("deft") else "lora"
    adapter = [f"adapter.method={method}", f"adapter.rank={options.rank}"]
    run = load_run(
        None, [*BASE, f"batch={options.batch}", f"gradient_checkpointing={blocks}", *adapter]
    )
    if variant.startswith("accelerate"):
        if blocks == "all":
            transformer.enable_gradient_checkpointing()
        step = minimal_step(run, models)
    else:
        step = engine_step(run, models)[0]
    batch = random_batch(transformer, options.batch)
    rounds = [batch] * (options.rounds + options.warmup)
    times, peak = take_turns({variant: step}, rounds, options.warmup)[variant]
    seconds = statistics.median(times.steps())
    tokens = batch[0].latents.clean.shape[1]
    needed = options.batch * training_flops(transformer.config, tokens, TEXT)
    found = {"step": seconds, "GB": peak}
    most = device_peak(torch.cuda.get_device_name())
    return found | ({"MFU": needed / seconds / most} if most else {})


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    for row in rows:
        lines.append([shown(row.get(name)) for name in names])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", default="depth-to-image,image-editing")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs=2, help="double and single: FLUX, on a GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-train"))
    options = parser.parse_args()
    if not CUDA:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ.update(alone | {"MASTER_PORT": "29577"})
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if CUDA else "gloo", verbose=False)
    rows = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (options.output / "bench.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
