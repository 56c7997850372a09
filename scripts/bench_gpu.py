"""What does this project cost on a GPU? At most eight minutes on one card of 80 GB:

    python scripts/bench_gpu.py --output runs/bench-gpu
    python scripts/bench_gpu.py --small --output /tmp/bench    # the same code on a CPU

Weights are random and made on the device; nothing is downloaded. Every configuration has a process
of its own. The rows lie in rows.jsonl as soon as they are known, the most important first: what is
there after 200 seconds is already useful. `--table` prints them again as Markdown; with `--paper`
also what cost_model.py says of each training step on an H100, which takes a CPU some minutes.

Columns: launch ms is the time until the host has launched a step. Useful TFLOP/s count two passes
of the frozen products and attention, as flops.training_flops does. planned GB is what `vcdeft plan`
says without encoders.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from gpu_rows import Case, Row, options, read, run, tables

BACKENDS = ("flash", "efficient", "math", "native", "cudnn")  # last those that may crash
KERNELS = "kernels"  # the process of all that is quick
PRECISIONS = ("bfloat16", "float32", "float64")
LAYERS = ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360))  # outputs, inputs


def case(section: str, name: str, work: str, *, process: str = "", **given: Any) -> Case:
    """process: of measurements that share one; others have their own."""
    return Case(
        section=section,
        name=name,
        work=work,
        given=given,
        limit=150,
        process=process or f"{section} {name}",
    )


def ceilings(*, small: bool) -> Iterator[Case]:
    size = 256 if small else 8192
    for dtype in PRECISIONS:
        n = size if dtype == "bfloat16" else size // 2
        yield case("ceilings", f"matmul {dtype}", "matmul", process=KERNELS, dtype=dtype, size=n)
    yield case("ceilings", "memory", "bandwidth", process=KERNELS, size=2**20 * size // 16)


def attention(*, small: bool) -> Iterator[Case]:
    tokens, heads = (64, 2) if small else (5696, 24)
    for name in BACKENDS:
        size = {"tokens": tokens, "heads": heads, "width": 128}
        yield case("attention", name, "attend", process=KERNELS, backend=name, **size)


def factors(*, small: bool) -> Iterator[Case]:
    """What DEFT computes beside the frozen products."""
    for rank in (4,) if small else (64, 256):
        for outputs, inputs in ((64, 64),) if small else LAYERS:
            name = f"Q^T W, {outputs} x {inputs}, rank {rank}"
            size = {"outputs": outputs, "inputs": inputs, "rank": rank}
            yield case("factors", name, "subspace", process=KERNELS, **size)
        for layers, outputs in ((4, 64),) if small else ((342, 3072), (76, 12288)):
            name = f"bases of {layers} layers of {outputs}, rank {rank}"
            size = {"layers": layers, "outputs": outputs, "rank": rank}
            yield case("factors", name, "bases", process=KERNELS, **size)


def step(model: str, method: str, blocks: int | str, **more: Any) -> Case:
    """A training step of ours."""
    given = {"rank": 4 if model == "small" else 64} | more
    said = ", ".join(f"{name} {value}" for name, value in more.items())
    name = f"{method}, {blocks} recomputed" + (f", {said}" if said else "")
    return case("training", name, "step", model=model, method=method, blocks=blocks, **given)


def peft_step(model: str, method: str, blocks: int | str, **more: Any) -> Case:
    given = {"rank": 4 if model == "small" else 64} | more
    said = ", ".join(f"{name} {value}" for name, value in more.items())
    name = f"peft's {method}, autocast, {blocks} recomputed" + (f", {said}" if said else "")
    return case("training", name, "peft_step", model=model, method=method, blocks=blocks, **given)


def main_steps(model: str) -> Iterator[Case]:
    for method, blocks in product(("deft", "lora"), ("all", "none")):
        yield step(model, method, blocks)
    yield step(model, "deft", "all", backend="native" if model == "small" else "cudnn")
    yield peft_step(model, "lora", "all")
    yield peft_step(model, "deft", "all")
    for method in ("deft", "lora"):
        yield step(model, method, "all", rank=8 if model == "small" else 256)


def further_steps(model: str) -> Iterator[Case]:
    pair = {"rows": 1, "columns": 2}
    for method in ("deft-relaxed", "para"):
        yield step(model, method, "all")
    for method in ("deft", "lora"):
        yield step(model, method, "none", **pair)
        yield peft_step(model, method, "none", **pair)
    for bits in ("fp8", "int8", "nf4"):
        yield step(model, "deft", "all", bits=bits)
    yield peft_step(model, "lora", "none")


def pipelines(model: str) -> Iterator[Case]:
    for side in (2, 3):
        name = f"{side}x{side}, both pipelines"
        yield case("inference", name, "pipelines", model=model, grid=[side, side], steps=4)


def contexts(model: str) -> Iterator[Case]:
    for rows, columns in ((3, 3), (2, 2)):
        name = f"{rows}x{columns}, all tokens and targets alone"
        yield case("context", name, "context", model=model, rows=rows, columns=columns)


def cases(*, small: bool) -> list[Case]:
    """All measurements, the most important first."""
    model = "small" if small else "flux"
    return [
        case("machine", "card and versions", "machine", process=KERNELS),
        *ceilings(small=small),
        *factors(small=small),
        *attention(small=small),
        *main_steps(model),
        *pipelines(model),
        *contexts(model),
        *further_steps(model),
        case("encoders", "T5-XXL and VAE", "encoders", model=model),
        step(model, "deft", "all", compiled=True),
        step(model, "deft", "none", compiled=True),
    ]


def with_paper(rows: Sequence[Row]) -> list[Row]:
    """Rows whose full-size training steps also have their milliseconds by cost_model.py."""
    from cost_model import step_cost

    from visualcloze_deft.config.run_settings import Adapter

    steps = {one.name: one.given for one in cases(small=False) if one.work == "step"}
    found = []
    for row in rows:
        given = steps.get(row["name"], {"rows": 1})
        if "ms" in row and not {"rows", "bits", "compiled", "backend"} & set(given):
            adapter = Adapter(method=given["method"], rank=given["rank"])
            row = row | {"paper ms": 1e3 * step_cost(adapter, blocks=given["blocks"]).seconds()}
        found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__, minutes=8, output="runs/bench-gpu")
    parser.add_argument("--paper", action="store_true", help="with --table: add the cost model")
    asked = parser.parse_args(arguments)
    if asked.table and asked.paper:
        print(tables(with_paper(read(asked.output))))
        return 0
    return run(cases(small=asked.small), "gpu_measures", asked)


if __name__ == "__main__":
    sys.exit(main())
