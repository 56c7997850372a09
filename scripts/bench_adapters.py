"""What an adapter costs: python scripts/bench_adapters.py --output runs/bench

One linear layer at FLUX's shapes, then a transformer of FLUX's width: plain, with peft's LoRA and
DEFT, with the authors' formula (arXiv 2509.22793 as it is written: the whole adapted weight in
every forward), and with this package's layers. Variants take turns in every round and medians are
compared, because machines are noisy. On a GPU `--blocks 19 38` is FLUX.1-Fill itself with random
weights. Prints tables and writes bench.json; what that file holds already, measured in the same
way, is not measured again, so remove it after a change of the code.
Axes: n tokens, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import DeftConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from visualcloze_deft.adapters import injection, methods
from visualcloze_deft.adapters.deft import deft_linear
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.config.run_settings import Adapter

SHAPES = ((3072, 3072), (3072, 12288), (15360, 3072), (12288, 3072))  # i, o of FLUX's layers
TOKENS = 5696  # a 3 x 3 grid of 384 px cells and 512 of text
TEXT = 128  # tokens of text beside few image tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H100_BF16 = 989e12  # FLOP/s without sparsity, NVIDIA's data sheet
VARIANTS = (
    "linear",
    "peft LoRA",
    "peft DEFT qr",
    "peft DEFT relu",
    "authors' DEFT",
    "DEFT",
    "DEFT relaxed",
    "PaRa",
)
REFERENCE = "peft LoRA"
ATTACHED = {  # by this package's own settings
    "DEFT": Adapter(method="deft"),
    "DEFT relaxed": Adapter(method="deft-relaxed"),
    "PaRa": Adapter(method="para"),
    REFERENCE: Adapter(method="lora"),
}


class AuthorsDeft(nn.Module):
    """W' = (I - Q Q^T) W + Q R in full, in every forward."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.p = nn.Parameter(0.02 * torch.randn(linear.out_features, rank))
        self.r = nn.Parameter(torch.zeros(rank, linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.linalg.qr(self.p.float()).Q.to(x.dtype)  # not implemented for bfloat16
        weight = self.linear.weight
        adapted = weight - (q @ q.mT) @ weight + q @ self.r.to(x.dtype)
        return functional.linear(x, adapted, self.linear.bias)


def peft_config(variant: str, rank: int, layers: str | list[str]) -> PeftConfig:
    if variant == "peft LoRA":
        return LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    relaxed, para = variant.endswith(("relu", "relaxed")), variant == "PaRa"
    method = "relu" if relaxed else "qr"
    return DeftConfig(r=rank, target_modules=layers, decomposition_method=method, para=para)


def make(variant: str, i: int, o: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """One layer. Trained parameters are in the weight's dtype for peft's and the authors' (their
    cheapest way), in float32 for ours (the way it is trained)."""
    torch.manual_seed(0)
    linear = nn.Linear(i, o).to(DEVICE, dtype).requires_grad_(False)
    if variant == "authors' DEFT":
        return AuthorsDeft(linear, rank).to(DEVICE)
    net = nn.Sequential(linear)
    if variant == "linear":
        return net
    inject_adapter_in_model(peft_config(variant, rank, ["0"]), net, methods.NAME)
    net.to(DEVICE, dtype)
    if not variant.startswith("peft"):
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        deft_linear.adopt(net)
    return net


def train(net: nn.Module, x: Tensor, grad: Tensor) -> None:
    for parameter in net.parameters():
        parameter.grad = None
    x.grad = None
    net(x).backward(grad)


def train_checkpointed(net: nn.Module, x: Tensor, grad: Tensor) -> None:
    train(lambda_module(net), x, grad)


def lambda_module(net: nn.Module) -> nn.Module:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return found

    return Recomputed()


@torch.no_grad()
def infer(net: nn.Module, x: Tensor) -> None:
    net(x)


def seconds(work: Callable[[], None]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each; every round runs all, so noise meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if k:  # the first round warms up
                found[name].append(spent)
    return {name: statistics.median(times) for name, times in found.items()}


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """What is kept for the backward pass beside parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x)
    return sum(kept.values())


def flops(net: nn.Module, x: Tensor, grad: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        train(net, x, grad)
    return int(counter.get_total_flops())


def measure_layer(
    i: int, o: int, rank: int, dtype: torch.dtype, *, tokens: int, rounds: int, variants: list[str]
) -> list[dict[str, object]]:
    x = torch.randn(tokens, i, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, o, device=DEVICE, dtype=dtype)
    nets = {variant: make(variant, i, o, rank, dtype) for variant in variants}
    both = {v: lambda n=n: train(n, x, grad) for v, n in nets.items()}
    again = {v: lambda n=n: train_checkpointed(n, x, grad) for v, n in nets.items()}
    figures = {
        "forward+backward s": medians(both, rounds),
        "checkpointed s": medians(again, rounds),
        "saved MB": {v: saved_bytes(n, x) / 1e6 for v, n in nets.items()},
        "GFLOP": {v: flops(n, x, grad) / 1e9 for v, n in nets.items()},
    }
    for net in nets.values():
        net.requires_grad_(False)
    inference = medians({v: lambda n=n: infer(n, x) for v, n in nets.items()}, rounds)
    return [
        {
            "variant": variant,
            "inference s": inference[variant],
            **{name: values[variant] for name, values in figures.items()},
        }
        for variant in variants
    ]


def flux(blocks: tuple[int, int], dtype: torch.dtype) -> FluxTransformer2DModel:
    """FLUX.1-Fill's transformer with random weights and this many double and single blocks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return FluxTransformer2DModel(
                in_channels=384,
                out_channels=64,
                num_layers=blocks[0],
                num_single_layers=blocks[1],
                guidance_embeds=True,
            )
    finally:
        torch.set_default_dtype(before)


def step_of(
    net: FluxTransformer2DModel, device: str, dtype: torch.dtype, tokens: int
) -> Callable[[], None]:
    """A training step on random tokens: forward, backward, AdamW over the adapter."""
    optimiser = torch.optim.AdamW(
        injection.trainable(net).values(), lr=1e-5, fused=device == DEVICE
    )
    text = 512 if tokens > 2048 else TEXT
    image = tokens - text

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = net(
                hidden_states=draw(1, image, 384),
                timestep=draw(1).sigmoid(),
                guidance=torch.ones(1, device=device, dtype=dtype),
                pooled_projections=draw(1, 768),
                encoder_hidden_states=draw(1, text, 4096),
                txt_ids=torch.zeros(text, 3, device=device),
                img_ids=torch.zeros(image, 3, device=device),
                return_dict=False,
            )[0]
        output.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def transformer_step(
    variant: str, rank: int, blocks: tuple[int, int], dtype: torch.dtype, tokens: int
) -> dict[str, float]:
    """Seconds of a step with recomputed blocks (the second and third of this process), the peak
    memory of the process, and the FLOPs of the model, recomputation not counted."""
    torch.manual_seed(0)
    net = flux(blocks, dtype).requires_grad_(False)
    if variant in ATTACHED:
        injection.attach(net, ATTACHED[variant].model_copy(update={"rank": rank}), seed=0)
    else:
        net.add_adapter(peft_config(variant, rank, FLUX_LAYERS), methods.NAME)
        injection.keep_single_precision(net)
    net.enable_gradient_checkpointing()
    net.train()
    spent = medians({variant: step_of(net, DEVICE, dtype, tokens)}, 2)[variant]
    peak = (
        torch.cuda.max_memory_allocated()
        if DEVICE == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    net.disable_gradient_checkpointing()
    net.to("meta")
    with FlopCounterMode(display=False) as counter:
        step_of(net, "meta", dtype, tokens)()
    work = counter.get_total_flops()
    row = {"step s": spent, "peak GB": peak / 1e9, "TFLOP": work / 1e12}
    if DEVICE == "cuda":
        row["of the GPU's bf16 peak"] = work / spent / H100_BF16
    return row


def measure_steps(options: argparse.Namespace) -> list[dict[str, object]]:
    """`transformer_step` of every variant in processes of their own, which take turns."""
    wanted = [v for v in options.variants if v not in ("linear", "authors' DEFT")]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in wanted}
    turns = options.rounds * wanted if sum(options.blocks) else []
    for variant in tqdm(turns, desc="training steps"):
        words = [sys.executable, __file__, "--one-step", variant]
        words += ["--ranks", str(options.ranks[0]), "--dtypes", options.dtypes[-1]]
        words += ["--blocks", *map(str, options.blocks)]
        words += ["--block-tokens", str(options.block_tokens)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {"variant": v, **{name: statistics.median(r[name] for r in rows) for name in rows[0]}}
        for v, rows in found.items()
        if rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--shapes", type=int, nargs="*", default=[0, 1, 2, 3], help=str(SHAPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--blocks", type=int, nargs=2, default=[1, 1], help="double, single")
    parser.add_argument("--block-tokens", type=int, default=TOKENS if DEVICE == "cuda" else 1024)
    parser.add_argument("--report", type=Path, help="write the tables as Markdown, too")
    parser.add_argument("--one-step", help=argparse.SUPPRESS)  # a variant, in its own process
    options = parser.parse_args()
    if REFERENCE not in options.variants:
        parser.error(f"--variants: {REFERENCE!r} among them, which the others are held to")
    if options.block_tokens <= TEXT:
        parser.error(f"--block-tokens: more than {TEXT}, which are text")
    if options.one_step:
        row = transformer_step(
            options.one_step,
            options.ranks[0],
            tuple(options.blocks),
            getattr(torch, options.dtypes[0]),
            options.block_tokens,
        )
        print(json.dumps(row))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench.read(options.output / "bench.json", options)
    cases = list(itertools.product(options.dtypes, options.ranks, options.shapes))
    for dtype, rank, shape in tqdm(cases, desc="layers"):
        i, o = SHAPES[shape]
        title = f"{i} -> {o}, rank {rank}, {dtype}"
        if not set(options.variants) <= {row["variant"] for row in bench.tables.get(title, [])}:
            bench.tables[title] = measure_layer(
                i,
                o,
                rank,
                getattr(torch, dtype),
                tokens=options.tokens,
                rounds=options.rounds,
                variants=options.variants,
            )
            bench.write(options.output / "bench.json", options.report)
            tqdm.write(f"\n{bench.table(title)}")
    if sum(options.blocks):
        double, single = options.blocks
        title = (
            f"training step of {double} double and {single} single blocks of FLUX's width, rank "
            f"{options.ranks[0]}, {options.dtypes[-1]}, {options.block_tokens} tokens, blocks "
            "recomputed"
        )
        bench.tables[title] = measure_steps(options)
        print(f"\n{bench.table(title)}")
    bench.write(options.output / "bench.json", options.report)


class Bench:
    """What was measured: a table of rows, one per variant, for each case, under one `setup`."""

    def __init__(self, setup: dict[str, object]) -> None:
        self.setup = setup
        self.tables: dict[str, list[dict[str, object]]] = {}

    @classmethod
    def read(cls, path: Path, options: argparse.Namespace) -> Bench:
        """What `path` holds, if it was measured on the same machine in the same way."""
        found = cls(
            {
                "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "rounds": options.rounds,
                "tokens": options.tokens,
            }
        )
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["setup"] == found.setup:
                found.tables = before["tables"]
        return found

    def table(self, title: str) -> str:
        """Markdown: figures of the reference, ratios to it for the others."""
        rows = self.tables[title]
        columns = [name for name in rows[0] if name != "variant"]
        base = next(row for row in rows if row["variant"] == REFERENCE)
        lines = [f"**{title}**", "", f"| | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            cells = (
                f"{row[c]:.4g}" if row is base else f"{float(row[c]) / float(base[c]):.3f}x"
                for c in columns
            )
            lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Markdown: for each variant the smallest and largest ratio to the reference."""
        layers = [rows for title, rows in self.tables.items() if "->" in title]
        columns = [name for name in layers[0][0] if name != "variant"] if layers else []
        lines = [f"**One layer, all {len(layers)} cases below: smallest to largest ratio**", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for variant in VARIANTS:
            spans = []
            for column in columns:
                ratios = [
                    float(row[column]) / float(base[column])
                    for rows in layers
                    for base in rows
                    for row in rows
                    if base["variant"] == REFERENCE and row["variant"] == variant
                ]
                spans.append(f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "")
            if any(spans) and variant != REFERENCE:
                lines.append(f"| {variant} | {' | '.join(spans)} |")
        return "\n".join(lines)

    def write(self, path: Path, report: Path | None) -> None:
        """JSON, and Markdown where asked for; after every case, to lose nothing."""
        text = json.dumps({"setup": self.setup, "tables": self.tables}, indent=1)
        path.write_text(text, encoding="utf-8")
        if report is not None:
            setup = self.setup
            head = (
                "# What adapters cost\n\nWritten by `scripts/bench_adapters.py`: "
                f"{setup['tokens']} tokens, {setup['device']}, {setup['threads']} threads, torch "
                f"{setup['torch']}, medians of {setup['rounds']} rounds. peft LoRA in figures, the "
                "others as ratios to it."
            )
            parts = [head, self.summary(), *map(self.table, self.tables)]
            report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
