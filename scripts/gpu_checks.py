"""The checks of check_gpu.py: each function is one row, run in a worker process.

A check compares a kernel or a gradient with float32 or float64 on the same device. Inputs lie
between NaN in memory, and NaN is left in the memory that results get: a kernel that reads more than
its inputs then shows it and does not crash.

Axes: b batch, n tokens, h heads, d width of a head.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cost_model import FLUX
from deepspeed.utils import safe_get_full_grad
from diffusers import FluxTransformer2DModel
from gpu_model import (
    ALONE,
    CUDA,
    DEVICE,
    group_of,
    leave_nan,
    machine,
    random_flux,
    start_distributed,
    wait,
)
from gpu_rows import LENGTH, Row, last_line
from torch import Tensor, nn
from torch.nn import functional

from visualcloze_deft.adapters import injection
from visualcloze_deft.adapters.deft import factors, orthonormal
from visualcloze_deft.backbones import attention, attention_check
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.training.engine import recompute, start_engine
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.run_folder import METRICS

__all__ = ["machine"]  # is called by name, too

BFLOAT16 = torch.bfloat16
RANK = 16
KERNEL_BOUND = 0.03  # relative error of one bfloat16 kernel: rounding alone gives 0.005
MODEL_BOUND = 0.25  # of all gradients of a bfloat16 model; 0.14 was seen for two cells on a CPU
FEW = {"num_layers": 2, "num_single_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "wide": FLUX | FEW,
    "narrow": FLUX | FEW | {"num_attention_heads": 2, "joint_attention_dim": 64},
}
SIZES = {"tiny": (64, 40), "wide": (384, 512), "narrow": (32, 16)}  # cell in pixels, text tokens
WIDER = 5  # times h d: the row of which a single block's attention output is a part
ANOTHER = 32  # tokens more, so that torch does not reuse the graph that it built before


def judged(found: Tensor, right: Tensor) -> dict[str, Any]:
    """The values that are not finite, and the relative error."""
    error = float((found.double() - right.double()).norm() / right.double().norm())
    return {"not finite": int((~found.isfinite()).sum()), "error": round(error, 5)}


def fault_in(rows: dict[str, dict[str, Any]], bound: float) -> str:
    """The first of several results that is wrong; "" where none is."""
    for name, row in rows.items():
        if row["not finite"]:
            return f"{name}: {row['not finite']:,} values are not finite"
        if not row["error"] <= bound:
            return f"{name}: error {row['error']:.3f}"
    return ""


def verdict(rows: dict[str, dict[str, Any]], bound: float = KERNEL_BOUND) -> Row:
    """The worst figures of several results, and the fault."""
    wait()
    return {
        "not finite": sum(row["not finite"] for row in rows.values()),
        "error": max(row["error"] for row in rows.values()),
        "fault": fault_in(rows, bound),
    }


def amid_nan(values: Tensor, *, times: int = 1) -> Tensor:
    """`values` in memory with `times` as many NaN behind and as many before."""
    size = values.numel()
    memory = values.new_full(((2 * times + 1) * size,), math.nan)
    return memory[times * size : (times + 1) * size].view(values.shape).copy_(values)


def draw_for(seed: int) -> Callable[..., Tensor]:
    """Normal bfloat16 numbers."""
    draw = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE).to(BFLOAT16)

    return normal


# Attention


def shapes(tokens: int, *, heads: int, width: int) -> attention_check.Shapes:
    return attention_check.Shapes(
        lengths=(tokens,),
        heads=heads,
        width=width,
        dtype=BFLOAT16,
        device=torch.device(DEVICE),
    )


def missing(backend: str, *, heads: int, width: int) -> str | None:
    """Why this machine lacks a backend; None where it has it."""
    if backend == attention.AUTO:
        return None
    lack = attention.lack(backend, shapes(128, heads=heads, width=width), passes="both")
    return lack and lack.partition(". ")[0]


def attention_gradients(backend: str, qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k, v; each, as `gradient`, (b n h d)."""
    leaves = [part.detach().requires_grad_() for part in qkv]
    output = attention.attend_with(backend)(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def compared(backend: str, qkv: list[Tensor], gradient: Tensor) -> dict[str, dict[str, Any]]:
    """The output and gradients of a backend against plain attention in float32, head by head."""
    leave_nan()
    found = attention_gradients(backend, qkv, gradient)
    heads = [
        attention_gradients(
            "math",
            [part[:, :, k : k + 1].float() for part in qkv],
            gradient[:, :, k : k + 1].float(),
        )
        for k in range(gradient.shape[2])
    ]
    right = [torch.cat(parts, dim=2) for parts in zip(*heads, strict=True)]
    names = ("output", "dq", "dk", "dv")
    return {n: judged(f, r) for n, f, r in zip(names, found, right, strict=True)}


def layouts(backend: str, order: str, *, tokens: int, heads: int, width: int, batch: int) -> Row:
    """Attention forward and backward for two layouts of the output's gradient, one after another.

    order: "part, whole" as in FLUX's backward pass: single blocks join attention's output with the
    feed-forward layer's, so its gradient is a part of wider rows; in double blocks it is whole.
    Before pytorch#191576, torch kept cuDNN's graph of the first and gave it the second.
    """
    if lack := missing(backend, heads=heads, width=width):
        return {"left out": lack}
    tokens += ANOTHER * (order == "whole, part")
    normal = draw_for(tokens)
    qkv = [amid_nan(normal(batch, tokens, heads, width)) for _ in range(3)]
    wide = normal(batch, tokens, WIDER * heads * width)
    gradients = {
        "whole": amid_nan(normal(batch, tokens, heads, width), times=WIDER),
        "part": wide[..., : heads * width].unflatten(-1, (heads, width)),
    }
    rows = {}
    for layout in order.split(", "):
        for name, one in compared(backend, qkv, gradients[layout]).items():
            rows[f"{name} {layout}"] = one
    return verdict(rows)


def lengths(backend: str, *, heads: int, width: int) -> Row:
    """Attention for lengths beside the tiles of 64 and 128 tokens."""
    if lack := missing(backend, heads=heads, width=width):
        return {"left out": lack}
    rows = {}
    for n in (64, 72, 88, 104, 120, 128, 136, 152, 184, 192, 232, 296):
        normal = draw_for(n)
        qkv = [amid_nan(normal(2, n, heads, width)) for _ in range(3)]
        gradient = amid_nan(normal(2, n, heads, width))
        for name, one in compared(backend, qkv, gradient).items():
            rows[f"{name} at {n} tokens"] = one
    return verdict(rows)


def small_sums(backend: str) -> Row:
    """Attention whose logsumexp is below -88.7 at 64 more than a multiple of 128 tokens
    (pytorch#196678)."""
    if lack := missing(backend, heads=1, width=64):
        return {"left out": lack}
    found = 0
    for n in (64, 104, 192, 704):
        normal = draw_for(n)
        q, k, v = (scale * normal(1, n, 1, 64) for scale in (0.1, 0.1, 1))
        q[..., 0], k[..., 0] = 1.0, -120 * 8.0
        results = attention_gradients(backend, [q, k, v], normal(1, n, 1, 64))
        found += sum(int((~one.isfinite()).sum()) for one in results)
    return {"not finite": found, "fault": "values are not finite" if found else ""}


def self_test(backend: str, *, tokens: int, heads: int, width: int) -> Row:
    """What `attention = "auto"` finds of a backend before training."""
    if lack := missing(backend, heads=heads, width=width):
        return {"left out": lack}
    work = shapes(tokens, heads=heads, width=width)
    fault = attention_check.fault_of(attention.attend_as_used(backend), work, passes="both")
    return {"fault": fault or ""}


# Other kernels


def norm(kind: str, weight: str, stride: str, *, rows: int, width: int) -> Row:
    """torch's fused RMSNorm or LayerNorm in bfloat16, backward, against float32.

    weight: "none", "frozen" or "trained". stride: "whole" or "part" of wider rows.
    """
    normal = draw_for(rows)
    x = amid_nan(normal(rows, width * (3 if stride == "part" else 1)))[:, :width]
    gradient = amid_nan(normal(rows, width))
    scale = None if weight == "none" else amid_nan(1 + normal(width).abs())
    leave_nan()
    trained = weight == "trained"
    found = norm_gradients(kind, x, scale, gradient, trained=trained)
    wide = None if scale is None else scale.float()
    right = norm_gradients(kind, x.float(), wide, gradient.float(), trained=trained)
    names = ("dx", "dw")
    return verdict({n: judged(f, r) for n, f, r in zip(names, found, right, strict=False)})


def norm_gradients(
    kind: str, x: Tensor, weight: Tensor | None, gradient: Tensor, *, trained: bool
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    inputs = [x]
    if weight is not None and trained:
        weight = weight.detach().requires_grad_()
        inputs.append(weight)
    shape = (x.shape[-1],)
    if kind == "RMSNorm":
        output = functional.rms_norm(x, shape, weight, 1e-6)
    else:
        output = functional.layer_norm(x, shape, weight, None, 1e-6)
    return list(torch.autograd.grad(output, inputs, gradient))


def whitening(*, layers: int, outputs: int, rank: int) -> Row:
    """The bases of many DEFT layers: decompositions in float64, stacked as in a step."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    p = torch.randn(layers, outputs, rank, dtype=torch.float64, device=DEVICE, generator=draw)
    leave_nan()
    q = p @ orthonormal.whitening(p.mT @ p)
    one = torch.eye(rank, dtype=q.dtype, device=DEVICE)
    return verdict({"Q^T Q": judged(q.mT @ q, one.expand_as(q.mT @ q))}, bound=1e-9)


def subspace(*, outputs: int, inputs: int, rank: int) -> Row:
    """DEFT's Q^T W of a bfloat16 weight against float64."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    q = torch.linalg.qr(torch.randn(outputs, rank, device=DEVICE, generator=draw)).Q
    weight = amid_nan(torch.randn(outputs, inputs, device=DEVICE, generator=draw).to(BFLOAT16))
    leave_nan()
    (found,) = factors.into_subspace(q[None], [weight])
    return verdict({"Q^T W": judged(found, q.double().mT @ weight.double())}, bound=1e-5)


def copies() -> Row:
    """torch._foreach_copy_ from bfloat16, also transposed, into float32."""
    normal = draw_for(0)
    sources = [normal(16, n) for n in (64, 257, 3072)] + [normal(3072, 16).mT]
    into = [torch.full(source.shape, math.nan, device=DEVICE) for source in sources]
    torch._foreach_copy_(into, sources)
    rows = {str(k): judged(a, b) for k, (a, b) in enumerate(zip(into, sources, strict=True))}
    return verdict(rows, bound=0)


def lora_layer(*, tokens: int, inputs: int, outputs: int) -> Row:
    """A float32 LoRA on a frozen bfloat16 layer: products alone, no attention."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, device=DEVICE, dtype=BFLOAT16).requires_grad_(False)
    a = torch.randn(RANK, inputs, device=DEVICE).div(math.sqrt(inputs)).requires_grad_()
    b = torch.randn(outputs, RANK, device=DEVICE).div(4).requires_grad_()
    normal = draw_for(tokens)
    x, gradient = amid_nan(normal(tokens, inputs)).requires_grad_(), normal(tokens, outputs)
    leave_nan()
    y = (base(x) + x.float() @ a.mT @ b.mT).to(BFLOAT16)
    found = torch.autograd.grad(y, (x, a, b), gradient)
    wide, x64 = gradient.double(), x.double()
    through = wide @ b.double()
    right = (
        wide @ base.weight.double() + through @ a.double(),
        through.mT @ x64,
        wide.mT @ (x64 @ a.double().mT),
    )
    names = ("dx", "dA", "dB")
    return verdict({n: judged(f, r) for n, f, r in zip(names, found, right, strict=True)})


# Whole models


def gradients(
    *,
    model: str,
    method: str,
    backend: str,
    grids: int = 1,
    rows: int = 2,
    columns: int = 2,
    zero: int | None = None,
    blocks: str = "none",
    dense: bool = False,
) -> Row:
    """The gradients of an adapter on a bfloat16 model against those of float32 and plain attention.

    zero: DeepSpeed's stage; None: without DeepSpeed. dense: see `attention.dense_gradients`, which
    training adds where cuDNN may run; without it "cudnn" and "native" show the kernel as it is.
    """
    grid = {"model": model, "method": method, "grids": grids, "rows": rows, "columns": columns}
    net = base(model, BFLOAT16)
    heads, width = net.config.num_attention_heads, net.config.attention_head_dim
    if lack := missing(backend, heads=heads, width=width):
        return {"left out": lack}
    right = reference(**grid)
    found = found_gradients(net, **grid, backend=backend, zero=zero, blocks=blocks, dense=dense)
    row: Row = compared_gradients(found, right)
    if row["not finite"] and zero is None:
        net = base(model, BFLOAT16)
        with torch.autograd.set_detect_anomaly(True):
            try:
                found_gradients(net, **grid, backend=backend, zero=zero, blocks=blocks, dense=dense)
            except RuntimeError as error:
                row["made by"] = str(error)[:LENGTH]
    return row


def compared_gradients(found: dict[str, Tensor], right: dict[str, Tensor]) -> Row:
    """Errors of all gradients, and of each kind of block."""
    assert found.keys() == right.keys()
    bad = {kind_of(name) for name, one in found.items() if not one.isfinite().all()}
    kinds = dict.fromkeys(map(kind_of, found))
    row: Row = {"not finite": sum(not bool(one.isfinite().all()) for one in found.values())}
    row |= {"of": len(found), "error": round(error_of(found, right, list(found)), 5)}
    for kind in kinds:
        some = [name for name in found if kind_of(name) == kind]
        row[kind] = round(error_of(found, right, some), 5)
    if bad:
        row["fault"] = f"gradients are not finite in {' and '.join(sorted(bad))}"
    elif row["error"] > MODEL_BOUND:
        row["fault"] = f"error {row['error']:.3f}"
    return row


def error_of(found: dict[str, Tensor], right: dict[str, Tensor], names: list[str]) -> float:
    off = sum(float((found[name] - right[name]).square().sum()) for name in names)
    whole = sum(float(right[name].square().sum()) for name in names)
    return math.sqrt(off / whole) if math.isfinite(off) else math.inf


def kind_of(name: str) -> str:
    if "single_transformer_blocks" in name:
        return "single"
    return "double" if "transformer_blocks" in name else "other"


def base(model: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The embedded base, or a random model of FLUX's width: bfloat16 weights in any precision."""
    if model == "tiny":
        net = load_transformer("tiny", dtype=BFLOAT16).to(DEVICE).requires_grad_(False)
    else:
        net = random_flux(MODELS[model], BFLOAT16)
    return net.to(dtype)


@cache
def reference(*, model: str, method: str, grids: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Gradients in float32 with plain attention."""
    return found_gradients(
        base(model, torch.float32),
        model=model,
        method=method,
        grids=grids,
        rows=rows,
        columns=columns,
        backend="math",
    )


def found_gradients(
    net: FluxTransformer2DModel,
    *,
    model: str,
    method: str,
    backend: str,
    grids: int,
    rows: int,
    columns: int,
    zero: int | None = None,
    blocks: str = "none",
    dense: bool = False,
) -> dict[str, Tensor]:
    """The gradient of each trained parameter, in float32 on the CPU."""
    cell, text = SIZES[model]
    run = run_of(method, batch=grids, zero=zero or 0, blocks=blocks, dtype=net.dtype)
    injection.attach(net, run.adapter, seed=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in injection.trainable(net).items():
            if "lora_B" in name:  # zero at first, and then A has no gradient
                parameter.normal_(std=0.02)
    batch = group_of(net, grids=grids, rows=rows, columns=columns, cell=cell, text=text)
    use_attention(net, backend, tokens=len(batch.latents.ids) + text)
    if dense:
        attention.dense_gradients(net)
    net.train()
    leave_nan()
    if zero is None:
        recompute(net, run.gradient_checkpointing)
        GridLoss(net, context_weight=run.context_weight, guidance=run.guidance)(
            [batch]
        ).mean().backward()
        found = {n: p.grad for n, p in injection.trainable(net).items() if p.grad is not None}
        return {name: one.detach().float().cpu() for name, one in found.items()}
    return gradients_of_engine(net, run, batch)


def gradients_of_engine(net: FluxTransformer2DModel, run: Run, batch: Any) -> dict[str, Tensor]:
    start_distributed()
    engine = start_engine(net, run)
    try:
        engine.backward(engine([batch]).mean())
        found = {n: safe_get_full_grad(p) for n, p in injection.trainable(net).items()}
        return {n: one.detach().float().cpu() for n, one in found.items() if one is not None}
    finally:
        engine.destroy()


def run_of(method: str, *, batch: int, zero: int, blocks: str, dtype: torch.dtype) -> Run:
    precision = "float32" if dtype == torch.float32 else "bfloat16"
    given = [f"zero={zero}", "processes=1", f"batch={batch}", f"precision={precision}"]
    given += [
        "context_weight=0.1",
        f"adapter.rank={RANK}",
        f"adapter.method={method}",
        f'gradient_checkpointing="{blocks}"',
    ]
    return load_run(None, given)


def use_attention(net: FluxTransformer2DModel, backend: str, *, tokens: int) -> None:
    """Have `net` attend with a backend, of "auto" with that which training takes."""
    heads, width = net.config.num_attention_heads, net.config.attention_head_dim
    work = shapes(tokens, heads=heads, width=width)
    attention.switch(net, attention.decide(backend, work, passes="both").backend)


def command(backend: str, *, steps: int, more: list[str]) -> Row:
    """`vcdeft train --tasks all --zero 2`, as a user starts it."""
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place) / "run", Path(place) / "errors"
        words = ["train", "--tasks", "all", "--zero", "2", "--steps", str(steps), *more]
        words += ["--attention", backend, "--output", str(output)]
        with errors.open("wb") as file:
            status = subprocess.run(
                [sys.executable, "-m", "visualcloze_deft", *words],
                stdout=file,
                stderr=file,
                env=without_group(),
            ).returncode
        metrics = output / METRICS
        lines = metrics.read_text("utf-8").splitlines() if metrics.is_file() else []
        losses = [json.loads(line)["loss"] for line in lines]
        fault = f"exit {status}: {last_line(errors)}" if status else ""
        chose = [line for line in errors.read_text("utf-8").splitlines() if "attention:" in line]
    if not fault and (len(losses) != steps or not all(map(math.isfinite, losses))):
        fault = f"{len(losses)} of {steps} losses, {losses[-1:]}"
    row: Row = {"losses": len(losses), "last loss": losses[-1] if losses else math.nan}
    return row | {"said": chose[-1][-LENGTH:] if chose else "", "fault": fault[:LENGTH]}


def without_group() -> dict[str, str]:
    """The environment without the group of one that `start_distributed` makes: `vcdeft train` would
    take this process for its launcher."""
    return {name: value for name, value in os.environ.items() if name not in ALONE}


def device() -> Row:
    """Fails where there is no GPU: everything after it would be measured on a CPU."""
    return {"fault": "" if CUDA else "torch sees no GPU"}
