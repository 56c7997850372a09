"""The measurements of bench_gpu.py: each function is one row, run in a worker process.

Weights are random and made on the device. Axes: b batch, n image tokens, l text tokens, r rank.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_infer
import diffusers
import torch
from bench_context import Inputs
from cost_model import FLUX
from diffusers import AutoencoderKL, FluxTransformer2DModel
from gpu_model import (
    CUDA,
    DEVICE,
    group_of,
    machine,
    peaks,
    random_flux,
    reset,
    start_distributed,
    timed,
)
from gpu_rows import Row
from peft import DeftConfig, LoraConfig, PeftConfig
from torch import nn
from transformers import T5Config, T5EncoderModel

from visualcloze_deft.adapters import injection
from visualcloze_deft.adapters.deft import factors, orthonormal
from visualcloze_deft.backbones import attention, attention_check, kernels
from visualcloze_deft.backbones.base import Load, Split
from visualcloze_deft.backbones.compiled import Compiling
from visualcloze_deft.backbones.flops import forward_flops, peak, training_flops
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.backbones.quantization import quantise
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import BASE
from visualcloze_deft.planning import memory
from visualcloze_deft.sampling.encoding import TokenBatch
from visualcloze_deft.training.engine import recompute, start_engine
from visualcloze_deft.training.objective import GridLoss

__all__ = ["machine"]  # is called by name, too

BFLOAT16 = torch.bfloat16
LONGEST = 25  # kernels of a step that the log names
MODELS: dict[str, dict[str, Any]] = {
    "flux": FLUX,
    "small": FLUX
    | {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
    },
}
SIZES = {"flux": (384, 512), "small": (32, 16)}  # side of a cell in pixels, text tokens
T5_XXL = {"d_model": 4096, "num_heads": 64, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


# Ceilings


def matmul(dtype: str, size: int) -> Row:
    a, b = (torch.randn(size, size, device=DEVICE).to(getattr(torch, dtype)) for _ in range(2))
    ms = timed(lambda: a @ b)["ms"]
    return {"ms": ms, "TFLOP/s": 2 * size**3 / ms / 1e9}


def bandwidth(size: int) -> Row:
    """Of the memory, by a copy of `size` bytes."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    ms = timed(lambda: a.copy_(b))["ms"]
    return {"ms": ms, "TB/s": 2 * size / ms / 1e9}


def attend(backend: str, *, tokens: int, heads: int, width: int) -> Row:
    """Attention forward and backward."""
    work = attention_check.Shapes(
        lengths=(tokens,), heads=heads, width=width, dtype=BFLOAT16, device=torch.device(DEVICE)
    )
    if lack := attention.lack(backend, work, passes="both"):
        return {"left out": lack.partition(". ")[0]}
    case = attention_check.inputs(work, tokens, layout="whole")
    kernel = attention.attend_with(backend)
    forward = timed(lambda: attention_check.results(kernel, case, passes="forward"))["ms"]
    ms = timed(lambda: attention_check.results(kernel, case, passes="both"))["ms"]
    flops = 4 * case.q.shape[0] * tokens**2 * width * heads
    return {"forward ms": forward, "ms": ms, "TFLOP/s": 3.5 * flops / ms / 1e9}


def subspace(*, outputs: int, inputs: int, rank: int) -> Row:
    """DEFT's Q^T W of a bfloat16 weight."""
    weight = torch.randn(outputs, inputs, device=DEVICE).to(BFLOAT16)
    q = torch.linalg.qr(torch.randn(outputs, rank, device=DEVICE)).Q[None]
    return timed(lambda: factors.into_subspace(q, [weight]))


def bases(*, layers: int, outputs: int, rank: int) -> Row:
    """Gram matrices and their whitening, of layers of one shape."""
    p = torch.randn(layers, outputs, rank, device=DEVICE)
    return timed(lambda: orthonormal.whitening(p.mT.double() @ p.double()))


# Training


def model_folder(place: Path, model: str) -> str:
    """A folder with FLUX.1-Fill's settings and no weights, for the memory plan."""
    parts = {
        "transformer": MODELS[model] | {"_class_name": "FluxTransformer2DModel"},
        "text_encoder_2": T5_XXL
        | {
            "vocab_size": 32128,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "gated-gelu",
        },
        "text_encoder": CLIP_L | {"vocab_size": 49408, "max_position_embeddings": 77},
        "vae": VAE,
    }
    for part, fields in parts.items():
        (place / part).mkdir()
        (place / part / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(place)


def step(
    *,
    model: str,
    method: str,
    rank: int,
    blocks: int | str,
    rows: int = 3,
    columns: int = 3,
    bits: str = "none",
    compiled: bool = False,
    backend: str = "auto",
) -> Row:
    """A training step of ours, beside its planned memory."""
    cell, text = SIZES[model]
    net = random_flux(MODELS[model], BFLOAT16)
    group = group_of(net, grids=1, rows=rows, columns=columns, cell=cell, text=text)
    tokens = len(group.latents.ids)
    with tempfile.TemporaryDirectory() as place:
        given = [f'model="{model_folder(Path(place), model)}"', f"compile={str(compiled).lower()}"]
        given += [f"adapter.method={method}", f"adapter.rank={rank}", f"quantise={bits}"]
        given += [f"gradient_checkpointing={json.dumps(blocks)}", "precision=bfloat16"]
        run = load_run(None, [*given, "zero=0", "processes=1", "batch=1"])
        try:
            planned = planned_gb(run, tokens=tokens, strip=tokens // rows, text=text)
        except UserError as error:
            return {"left out": str(error)}
    quantise(net, run.quantise, device=DEVICE)
    figures = measured(net, run, group, backend) | {"planned GB": planned}
    return figures | rates(net, tokens, text, figures)


def planned_gb(run: Run, *, tokens: int, strip: int, text: int) -> float:
    """What `vcdeft plan` says of the transformer and its training."""
    load = Load(grids=1, image=tokens, text=text, strip=strip)
    plan = memory.memory_plan(run, load, processes=1, gpu=True)
    some = run.gradient_checkpointing
    blocks = {"all": plan.blocks, "none": 0}[some] if isinstance(some, str) else some
    return (plan.parts(0, blocks).peak - plan.encoders) / 1e9


def measured(net: FluxTransformer2DModel, run: Run, group: TokenBatch, backend: str) -> Row:
    """A step through DeepSpeed's engine, as `vcdeft train` does it. backend: of attention."""
    start_distributed()
    tokens = len(group.latents.ids) + group.text.text.shape[1]
    injection.attach(net, run.adapter, seed=0)
    work = attention_check.Shapes(
        lengths=(tokens,),
        heads=net.config.num_attention_heads,
        width=net.config.attention_head_dim,
        dtype=BFLOAT16,
        device=torch.device(DEVICE),
    )
    backend = attention.decide(backend, work, passes="both").backend
    kernels.use(net, kernels.Kernels(attention=backend))
    engine = start_engine(net, run)
    net.train()
    compiling = Compiling()

    def one() -> None:
        engine.backward(engine([group]).mean())
        engine.step()

    try:
        figures = clocked(one)
    finally:
        engine.destroy()
    if run.compile:
        figures["compiling s"] = compiling.seconds
    return figures | {"attention": backend}


def clocked(one: Callable[[], None]) -> Row:
    """Time and memory of a step; out of memory is no crash."""
    reset()
    try:
        return timed(one, rounds=3, warm_up=2) | peaks() | busy(one)
    except torch.OutOfMemoryError:
        return {"left out": "out of memory"} | peaks()


def busy(one: Callable[[], None]) -> Row:
    """How long the device computes in a step, and how many kernels it is given: where this is
    much less than the step's time, the device waits for the host."""
    if not CUDA:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        one()
        torch.cuda.synchronize()
    spans = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [(e.time_range.start, e.time_range.end, e.name) for e in spans]
    found: Row = {"busy ms": union(kernels) / 1e3, "kernels": len(kernels)}
    longest: dict[str, float] = {}
    for start, end, name in kernels:
        longest[name] = longest.get(name, 0.0) + (end - start) / 1e3
    for name, ms in sorted(longest.items(), key=lambda one: -one[1])[:LONGEST]:
        print(f"{ms:9.2f} ms {name[:120]}", file=sys.stderr)
    return found


def union(spans: Sequence[tuple[float, float, str]]) -> float:
    """Length of the union of spans (start, end, name).

    >>> union([(0, 2, "a"), (1, 3, "b"), (5, 6, "c")])
    4.0
    """
    total, until = 0.0, -math.inf
    for start, end, _ in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def rates(net: FluxTransformer2DModel, tokens: int, text: int, figures: Row) -> Row:
    """Tokens per second and useful arithmetic: two passes of frozen products, and attention."""
    if "ms" not in figures:
        return {}
    seconds = figures["ms"] / 1e3
    useful = training_flops(net.config, tokens, text) / seconds
    found: Row = {"image tokens/s": tokens / seconds, "useful TFLOP/s": useful / 1e12}
    most = peak(torch.cuda.get_device_name()) if CUDA else None
    return found | ({"of the peak": useful / most} if most else {})


def peft_step(
    *, model: str, method: str, rank: int, blocks: int | str, rows: int = 3, columns: int = 3
) -> Row:
    """A step with peft's own layers under autocast, as diffusers' trainers run them, and the flash
    kernel."""
    cell, text = SIZES[model]
    net = random_flux(MODELS[model], BFLOAT16)
    group = group_of(net, grids=1, rows=rows, columns=columns, cell=cell, text=text)
    net.add_adapter(peft_config(method, rank), "default")
    injection.keep_single_precision(net)
    recompute(net, blocks)
    # torch's own choice, cuDNN, ends in an illegal memory access here (docs/gpu.md)
    kernels.use(net, kernels.Kernels(attention="flash" if CUDA else "native"))
    loss = GridLoss(net.train(), context_weight=1.0, guidance=1.0)
    trained = list(injection.trainable(net).values())
    optimiser = torch.optim.AdamW(trained, lr=1e-5, foreach=True)

    def one() -> None:
        with torch.autocast(DEVICE, BFLOAT16):
            error = loss([group]).mean()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, 2.0, foreach=True)
        optimiser.step()
        optimiser.zero_grad()

    figures = clocked(one)
    return figures | rates(net, len(group.latents.ids), text, figures)


def peft_config(method: str, rank: int) -> PeftConfig:
    if method == "lora":
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=FLUX_LAYERS)
    return DeftConfig(
        r=rank,
        target_modules=FLUX_LAYERS,
        decomposition_method="qr",
        init_weights=False,
    )


# Inference and encoders


def pipelines(*, model: str, grid: list[int], steps: int) -> Row:
    """Seconds of a picture, this project's pipeline and diffusers', the same weights."""
    options = argparse.Namespace(
        blocks=(19, 38) if model == "flux" else None,
        resolution=384 if model == "flux" else 64,
        steps=steps,
        rounds=1,
        batch=1,
    )
    bench_infer.GRIDS = (tuple(grid),)
    found = bench_infer.against_diffusers(parts_of(model), options)
    images = [one for one in found if "calls" in one]
    figures: Row = {f"{one['who']} s": one["seconds"] for one in images}
    figures |= {f"{one['who']} ratio": one["ratio"] for one in images[1:]}
    return figures | {f"{one['who']} GB": one["memory"] / 1e9 for one in images[:2]}


@torch.no_grad()
def context(*, model: str, rows: int, columns: int) -> Row:
    """A sampling step of all tokens, and one of the last cell's alone, beside their FLOPs."""
    cell, text = SIZES[model]
    net = random_flux(MODELS[model], BFLOAT16)
    if CUDA:
        attention.use(net, "flash")
    asked = Inputs(net, rows, columns, cell, text)
    full, active = timed(asked.full), timed(asked.active)
    tokens, targets = asked.noisy.shape[1], len(asked.cache.targets)
    every = sum(forward_flops(net.config, tokens, text))
    both = sum(forward_flops(net.config, tokens, text, Split(targets=targets)))
    found = {"full ms": full["ms"], "active ms": active["ms"], "ratio": full["ms"] / active["ms"]}
    return found | {"FLOP bound": every / (both - every)} | peaks()


def parts_of(model: str) -> dict[str, Any]:
    """The parts of both pipelines, on the device: the embedded base, or FLUX with random weights
    and text encoders of its widths that are small."""
    parts = dict(diffusers.VisualClozeGenerationPipeline.from_pretrained(BASE).components)
    if model == "flux":
        parts |= bench_infer.random_flux(0, 1, parts)  # of which the transformer is replaced
        parts["transformer"] = random_flux(FLUX, BFLOAT16)
        parts["tokenizer_2"].model_max_length = 512  # what diffusers' pipeline reads
    dtype = BFLOAT16 if CUDA else torch.float32
    return {
        name: part.to(DEVICE, dtype).eval() if isinstance(part, nn.Module) else part
        for name, part in parts.items()
    }


def encoders(*, model: str) -> Row:
    """T5 reading one text, and the VAE on a strip of three cells."""
    small = {"d_model": 64, "d_ff": 64, "num_layers": 1} if model == "small" else {}
    t5 = on_device(
        lambda: T5EncoderModel(
            T5Config(**T5_XXL | small, vocab_size=32128, feed_forward_proj="gated-gelu")
        )
    )
    vae = on_device(lambda: AutoencoderKL(**VAE)).to(memory_format=torch.channels_last)
    cell, text = SIZES[model]
    ids = torch.zeros(1, text, dtype=torch.long, device=DEVICE)
    strip = torch.randn(1, 3, cell, 3 * cell, device=DEVICE, dtype=BFLOAT16)
    with torch.no_grad():
        latents = vae.encode(strip).latent_dist.mode()
        figures = {
            "T5 ms": timed(lambda: t5(ids))["ms"],
            "VAE encodes ms": timed(lambda: vae.encode(strip).latent_dist.mode())["ms"],
        }
        reset()
        held = torch.cuda.memory_allocated() if CUDA else 0
        figures["VAE decodes ms"] = timed(lambda: vae.decode(latents))["ms"]
    if CUDA:
        figures["decoding GB"] = peaks()["peak GB"] - held / 1e9
    return figures


def on_device(make: Callable[[], nn.Module]) -> nn.Module:
    """A network in bfloat16 whose weights are drawn on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(BFLOAT16)
    try:
        with torch.device(DEVICE):
            return make().eval()
    finally:
        torch.set_default_dtype(before)
