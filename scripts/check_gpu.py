"""Is what this project computes on a GPU right? At most three minutes on one card:

    python scripts/check_gpu.py --output runs/check
    python scripts/check_gpu.py --small --output /tmp/check    # the same code on a CPU

Kernels and gradients are compared with float32 on the same device. Then the main command trains.
"FAULT" is a wrong result of what the project uses by itself, and the exit status is then 1. "noted"
is one of a kernel that `attention = "auto"` does not take. The rows lie in rows.jsonl as soon as
they are known, the most telling first; `--table` prints them again as Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from gpu_rows import Case, options, run

BACKENDS = ("auto", "native", "cudnn", "flash", "efficient", "math")
METHODS = ("deft", "lora", "deft-relaxed", "para")
ORDERS = ("part, whole", "whole, part")  # of the layouts of the gradient of attention's output
GRIDS = ((1, 1, 2), (8, 1, 2), (3, 2, 2), (8, 2, 3), (2, 3, 3))  # grids, rows, columns
LAYERS = ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360))  # outputs, inputs
KERNELS, MODELS, COMMAND = "attention", "gradients", "command"
DENSE = "dense"  # in the names of checks with `attention.dense_gradients`


def case(section: str, name: str, work: str, **given: Any) -> Case:
    """A check is required unless a backend is named that training does not take by itself.

    Checks of cuDNN with dense gradients share a process: where other checks of cuDNN ran, torch
    keeps graphs that read all gradients with other strides.
    """
    return Case(
        section=section,
        name=name,
        work=work,
        given=given,
        required=given.get("backend", "auto") == "auto",
        limit=100 if section == COMMAND else 40,
        process=DENSE if DENSE in name else "",
    )


def layouts(backend: str, order: str, *, heads: int, width: int, tokens: int, batch: int) -> Case:
    name = f"{backend}: gradient {order}, {batch} x {tokens:,} x {heads} x {width}"
    size = {"heads": heads, "width": width, "tokens": tokens, "batch": batch}
    return case(KERNELS, name, "layouts", backend=backend, order=order, **size)


def gradients(model: str, method: str, backend: str, **more: Any) -> Case:
    said = {name: value for name, value in more.items() if name != DENSE}
    name = ", ".join([model, method, backend, *(f"{name} {value}" for name, value in said.items())])
    name += f", {DENSE}" if more.get(DENSE) else ""
    return case(MODELS, name, "gradients", model=model, method=method, backend=backend, **more)


def command(backend: str, *, small: bool) -> Case:
    name = f"vcdeft train --tasks all --zero 2 --attention {backend}"
    more = ["--batch", "1", "--set", "batch_tokens=0", "--processes", "1"] if small else []
    more += ["--set", "logging.trackers=[]"]
    return case(COMMAND, name, "command", backend=backend, steps=2 if small else 8, more=more)


def first(wide: str, *, small: bool) -> Iterator[Case]:
    """What tells most: the suspected kernel, both models with and without it, the main command."""
    flux = {"heads": 2 if small else 24, "width": 128, "tokens": 192 if small else 5696}
    grid = {"rows": 3, "columns": 3}
    for backend in ("cudnn", "flash", "native"):
        yield layouts(backend, ORDERS[0], heads=4, width=64, tokens=168, batch=2)
    yield from dense(wide, flux, small=small)
    for method, backend in product(("deft", "lora"), ("native", "auto", "cudnn")):
        yield gradients("tiny", method, backend, grids=8)
    yield command("auto", small=small)
    for method, backend in product(("deft", "lora"), ("auto", "cudnn")):
        yield gradients(wide, method, backend, **grid, blocks="all")
    for backend, order in product(("flash", "cudnn"), ORDERS):
        yield layouts(backend, order, **flux, batch=1)
    yield command("native", small=small)


def dense(wide: str, flux: dict[str, int], *, small: bool) -> Iterator[Case]:
    """Is cuDNN right where all gradients of its output are dense, as training makes them for it?"""
    some = (72, 168) if small else (72, 128, 168, 184, 296, 616)
    for size in (flux, *({"heads": 4, "width": 64, "tokens": tokens} for tokens in some)):
        name = f"cudnn, {DENSE}: the test of 'auto', {size['tokens']:,} tokens"
        yield case(KERNELS, name, "self_test", backend="cudnn", **size)
    for method in METHODS[:2]:
        yield gradients("tiny", method, "cudnn", grids=8, dense=True)
        for blocks in ("all", "none"):
            yield gradients(wide, method, "cudnn", rows=3, columns=3, blocks=blocks, dense=True)
    for grids, rows, columns in GRIDS:
        size = {"grids": grids, "rows": rows, "columns": columns}
        yield gradients("tiny", "deft", "cudnn", **size, dense=True)


def kernels(*, small: bool) -> Iterator[Case]:
    """Every kernel by itself, at FLUX's shapes and strides."""
    rows, heads = (192, 2) if small else (5696, 24)
    for kind, weight, stride in product(
        ("RMSNorm", "LayerNorm"), ("none", "frozen", "trained"), ("whole", "part")
    ):
        size = {"rows": rows * heads, "width": 128}
        if kind == "LayerNorm":
            size = {"rows": rows, "width": 128 * heads}
        name = f"{kind} backward, weight {weight}, input {stride}"
        yield case("norms", name, "norm", kind=kind, weight=weight, stride=stride, **size)
    for outputs, inputs in ((64, 64),) if small else LAYERS:
        size = {"outputs": outputs, "inputs": inputs}
        yield case("products", f"Q^T W, {outputs} x {inputs}", "subspace", **size, rank=16)
        yield case("products", f"LoRA, {outputs} x {inputs}", "lora_layer", **size, tokens=rows)
    size = {"layers": 4 if small else 342, "outputs": 64 if small else 3072, "rank": 16}
    yield case("products", "bases of stacked layers", "whitening", **size)
    yield case("products", "copies between precisions", "copies")
    for backend in BACKENDS[1:]:
        flux = {"heads": heads, "width": 128, "tokens": rows}
        if backend != "cudnn":  # see `dense`
            name = f"{backend}: the test of 'auto'"
            yield case(KERNELS, name, "self_test", backend=backend, **flux)
        yield case(
            KERNELS, f"{backend}: many lengths", "lengths", backend=backend, heads=4, width=64
        )
        yield case(KERNELS, f"{backend}: small sums", "small_sums", backend=backend)
        for order in ORDERS:
            yield layouts(backend, order, heads=4, width=64, tokens=232, batch=2)
            yield layouts(backend, order, **flux, batch=1)


def models(wide: str) -> Iterator[Case]:
    """Gradients of every method, backend, grid, stage and choice of recomputation."""
    for zero, method in product((0, 1, 2, 3), METHODS[:2]):
        yield gradients("tiny", method, "auto", grids=8, zero=zero)
    for method in METHODS:
        for grids, rows, columns in GRIDS:
            yield gradients("tiny", method, "auto", grids=grids, rows=rows, columns=columns)
        yield gradients("tiny", method, "auto", grids=3, blocks="all")
    for method, blocks in product(METHODS, ("none", "all")):
        yield gradients(wide, method, "auto", rows=3, columns=3, blocks=blocks)
    for backend, method in product(BACKENDS[1:], METHODS[:2]):
        for blocks in ("none", "all"):
            yield gradients(wide, method, backend, rows=3, columns=3, blocks=blocks)
        for grids, rows, columns in GRIDS:
            yield gradients("tiny", method, backend, grids=grids, rows=rows, columns=columns)


def cases(*, small: bool) -> list[Case]:
    """All checks, the most telling first, each once."""
    wide = "narrow" if small else "wide"
    start = [case("machine", "card and versions", "machine")]
    if not small:
        start.append(case("machine", "GPU", "device"))
    every = [*start, *first(wide, small=small), *kernels(small=small), *models(wide)]
    first_of: dict[str, Case] = {}
    for one in every:
        first_of.setdefault(one.name, one)
    return list(first_of.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__, minutes=3, output="runs/check")
    asked = parser.parse_args(arguments)
    return run(cases(small=asked.small), "gpu_checks", asked)


if __name__ == "__main__":
    sys.exit(main())
