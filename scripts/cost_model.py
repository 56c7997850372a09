"""What a training step of FLUX.1-Fill should cost on an H100: python scripts/cost_model.py

The step itself (transformer, adapter, loss and its gradients) runs on torch's meta device, where
tensors have a shape and a type but no values. Every operation on the way is counted: arithmetic by
precision, bytes read and written, launches. An operation then takes as long as the slowest of
these on the card. No GPU is needed; scripts/bench_gpu.py measures the same steps on one.

Not counted: the optimiser, clipping and the encoders, which cost the same for every method.
Axes: n tokens, r rank.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from living import tensors_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents, position_ids
from visualcloze_deft.config.run_settings import Adapter
from visualcloze_deft.sampling.encoding import TokenBatch
from visualcloze_deft.training.engine import recompute
from visualcloze_deft.training.objective import GridLoss

FLUX: dict[str, Any] = {
    "in_channels": 384,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
CELL, TEXT = 384, 512  # pixels of a square cell's side; T5 tokens
TOGETHER = 64  # tensors that one launch of a torch._foreach operation takes
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card does per second. attention: operations, forward and backward pass together."""

    bfloat16: float
    float32: float
    float64: float
    attention: float
    memory: float
    shortest: float
    column: float
    launch: float

    def arithmetic(self, dtype: torch.dtype) -> float:
        return {torch.bfloat16: self.bfloat16, torch.float64: self.float64}.get(dtype, self.float32)


H100 = Card(
    bfloat16=785e12,
    float32=51e12,
    float64=60e12,
    attention=273e12,  # torch's flash kernel; cuDNN's did 483e12
    memory=0.85 * 3.35e12,
    shortest=2.5e-6,
    column=5e-6,
    launch=5e-6,
)
"""Products of matrices and attention as measured on one H100 80GB (torch 2.11). Memory: the data
sheet's 3.35 TB/s, of which 85 % are assumed. Assumed as well: the seconds of a kernel that does
next to nothing (shortest), of one column of a batched decomposition or triangular solution, whose
columns wait for each other (column), and of the host for each operation (launch)."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: arithmetic in `dtype`, bytes moved, launches."""

    name: str
    dtype: torch.dtype
    flops: float
    bytes: float
    launches: int = 1
    columns: int = 0

    def seconds(self, card: Card) -> float:
        rate = card.attention if self.name == "attention" else card.arithmetic(self.dtype)
        least = self.launches * card.shortest + self.columns * card.column
        return max(self.flops / rate, self.bytes / card.memory, least)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """All operations of one step. useful: what of their arithmetic a frozen model cannot do
    without: two passes of its products, and attention."""

    operations: tuple[Operation, ...]

    def seconds(self, card: Card = H100) -> float:
        """Of the card, which is never waited for: `host` must be less."""
        return sum(operation.seconds(card) for operation in self.operations)

    def host(self, card: Card = H100) -> float:
        """Seconds of the host to launch everything."""
        return card.launch * sum(operation.launches for operation in self.operations)

    @property
    def launches(self) -> int:
        return sum(operation.launches for operation in self.operations)

    def flops(self, dtype: torch.dtype) -> float:
        return sum(o.flops for o in self.operations if o.dtype == dtype)

    def by_name(self, card: Card = H100) -> dict[str, float]:
        """Seconds of each kind of operation, most first."""
        found: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            found[operation.name] += operation.seconds(card)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class Counter(TorchDispatchMode):
    """Writes down every operation that makes or changes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not touches_nothing(func):
            self.operations.append(counted(func, args, kwargs or {}, result))
        return result


def touches_nothing(func: Any) -> bool:
    """Whether an operation moves nothing: it looks at a tensor in another shape, or makes
    one that has no values yet."""
    name = func.overloadpacket.__name__
    return name.startswith("empty") or name in ("detach", "_unsafe_view", "new_empty")


def counted(func: Any, args: Any, kwargs: Any, result: Any) -> Operation:
    packet, name = func.overloadpacket, func.overloadpacket.__name__
    given, made = tensors_in((args, kwargs)), tensors_in(result)
    moved = {id(t): t.numel() * t.element_size() for t in (*given, *made)}
    first = (given or made)[0]
    flops, columns = 0.0, 0
    if packet in (ATTENTION, ATTENTION_BACKWARD):
        b, heads, n, width = given[0].shape if packet is ATTENTION else given[1].shape
        name, flops = "attention", (4 if packet is ATTENTION else 10) * b * heads * n**2 * width
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=result)
    elif name.startswith("linalg"):
        flops, columns = first.numel() * first.shape[-1] / 3, first.shape[-1]
    launches = math.ceil(len(made or given) / TOGETHER) if name.startswith("_foreach") else 1
    return Operation(
        name=name,
        dtype=first.dtype,
        flops=float(flops),
        bytes=float(sum(moved.values())),
        launches=launches,
        columns=columns,
    )


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention that keeps no weights, as on a GPU, on the meta device too, where torch's own is
    made of products. A mode of torch's would not reach what the backward pass computes again."""
    before = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda query, key, value, **_: ATTENTION(
        query, key, value
    )[0]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = before


def step_cost(
    adapter: Adapter,
    *,
    config: dict[str, Any] = FLUX,
    rows: int = 3,
    columns: int = 3,
    blocks: int | str = "all",
    lora: torch.dtype = torch.float32,
) -> Cost:
    """The cost of one grid's forward and backward pass in bfloat16.

    blocks: how many are recomputed. lora: precision of LoRA's own products. peft's is float32;
    bfloat16 is what autocast makes of it, without the casts.
    """
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # of `to`, which leaves nothing behind
    with torch.device("meta"):
        net = FluxTransformer2DModel(**config, axes_dims_rope=(16, 56, 56)).to(torch.bfloat16)
        injection.attach(net.train(), adapter, seed=0)
        if adapter.method == "lora":
            for parameter in injection.trainable(net).values():
                parameter.data = parameter.data.to(lora)
        recompute(net, blocks)
        loss = GridLoss(net, context_weight=1.0, guidance=1.0)
        batch = [group_of(net, rows=rows, columns=columns)]
        with flash_attention(), Counter() as counter:
            loss(batch).mean().backward()
    return Cost(operations=tuple(counter.operations))


def group_of(net: FluxTransformer2DModel, *, rows: int, columns: int) -> TokenBatch:
    """A grid of square cells as the transformer reads it, without values."""
    n, config = rows * columns * (CELL // 16) ** 2, net.config
    half = {"dtype": torch.bfloat16, "device": "meta"}
    t = torch.empty(1, device="meta")
    return TokenBatch(
        indices=(0,),
        latents=Latents(
            clean=torch.empty(1, n, 64, **half),
            seen=torch.empty(1, n, 64, **half),
            mask=torch.empty(1, n, 256, **half),
            ids=position_ids(((CELL, columns * CELL),) * rows).to("meta"),
        ),
        noise=torch.empty(1, n, 64, **half),
        t=t,
        start=t,
        text=FluxText(
            torch.empty(1, TEXT, config.joint_attention_dim, **half),
            torch.empty(1, config.pooled_projection_dim, **half),
        ),
    )


METHODS: dict[str, tuple[str, torch.dtype]] = {
    "LoRA in bfloat16": ("lora", torch.bfloat16),
    "LoRA in float32": ("lora", torch.float32),
    "DEFT": ("deft", torch.float32),
    "DEFT relaxed": ("deft-relaxed", torch.float32),
    "PaRa": ("para", torch.float32),
}
"""Name -> method, and the precision of LoRA's own products."""


def table(costs: dict[str, dict[str, Cost]]) -> str:
    """Milliseconds of each method in each case, and their ratio to the first method's; Markdown."""
    cases = list(next(iter(costs.values())))
    lines = [f"| ms a step | {' | '.join(cases)} |", f"|---|{'---|' * len(cases)}"]
    first = next(iter(costs.values()))
    for name, by_case in costs.items():
        cells = [
            f"{1e3 * cost.seconds():.0f} ({cost.seconds() / first[case].seconds():.2f})"
            for case, cost in by_case.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--kinds", action="store_true", help="milliseconds by kind of operation")
    options = parser.parse_args()
    config = dict(FLUX)
    if options.blocks:
        config |= zip(("num_layers", "num_single_layers"), options.blocks, strict=True)
    cases = {
        f"rank {rank}, {blocks} recomputed": (rank, blocks)
        for rank in options.ranks
        for blocks in ("all", "none")
    }
    costs: dict[str, dict[str, Cost]] = {}
    for name, (method, precision) in METHODS.items():
        costs[name] = {
            case: step_cost(
                Adapter.model_validate({"method": method, "rank": rank}),
                rows=options.rows,
                columns=options.columns,
                config=config,
                blocks=blocks,
                lora=precision,
            )
            for case, (rank, blocks) in cases.items()
        }
    print(table(costs))
    for name, by_case in costs.items():
        for case, cost in by_case.items():
            print(
                f"\n{name}, {case}: {cost.launches:,} launches, {1e3 * cost.host():.0f} ms of the "
                f"host; TFLOP: {cost.flops(torch.bfloat16) / 1e12:.1f} in bfloat16, "
                f"{cost.flops(torch.float32) / 1e12:.2f} in float32, "
                f"{cost.flops(torch.float64) / 1e12:.2f} in float64"
            )
            for kind, seconds in list(cost.by_name().items())[: 15 if options.kinds else 0]:
                print(f"    {kind:44s} {1e3 * seconds:8.2f} ms")


if __name__ == "__main__":
    main()
