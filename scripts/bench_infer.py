"""What an image costs: python scripts/bench_infer.py --output runs/bench-infer

This package's pipeline and diffusers' VisualClozeGenerationPipeline take turns at the same grids,
weights, steps and seeds, in one process; medians are compared, because machines are noisy.

1. Grids of 2x2, 3x3 and 4x3: the first image and a further seed of the same grid. Seconds, seconds
   outside the transformer, peak memory over what was held before, calls of each network.
2. A mixed list, which diffusers makes one by one.
3. Memory of one call of the transformer at FLUX's width for 2x2, 3x3 and 4x4 grids of 384 px.
4. diffusers' step caches, and compiled blocks: time, and what they change of the image.

On a GPU `--blocks 19 38` is FLUX.1-Fill's transformer and VAE with random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from living import Living
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from visualcloze_deft import InContextPipeline
from visualcloze_deft.backbones.embedding_cache import Recent
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.model import predict
from visualcloze_deft.backbones.flux_fill.packing import FluxText
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.inference import acceleration
from visualcloze_deft.paths import BASE

CUDA = torch.cuda.is_available()
GRIDS = ((2, 2), (3, 3), (4, 3))
ROLES = ("depth", "normal", "target")
NETWORKS = ("transformer", "encoder", "decoder", "text_encoder", "text_encoder_2")
TASK, CONTENT = "From the depth map to the photo.", "a red cone"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call: seconds in all and outside the transformer, bytes at the peak beyond those held
    before, calls of each network."""

    seconds: float
    outside: float
    memory: int
    calls: dict[str, int]


class Watch:
    """Counts and times the networks of one pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.inside = 0.0
        self.began = 0.0
        parts = {"encoder": pipe.vae.encoder, "decoder": pipe.vae.decoder}
        for name in NETWORKS:
            network = parts.get(name) or getattr(pipe, name)
            network.register_forward_hook(lambda *_, n=name: self.calls.update([n]))
        pipe.transformer.register_forward_pre_hook(lambda *_: self.enter())
        pipe.transformer.register_forward_hook(lambda *_: self.leave())

    def enter(self) -> None:
        self.began = now()

    def leave(self) -> None:
        self.inside += now() - self.began

    def cost(self, work: Callable[[], Any]) -> Cost:
        self.calls.clear()
        self.inside = 0.0
        held = reset_peak()
        began = now()
        work()
        took = now() - began
        return Cost(
            seconds=took,
            outside=took - self.inside,
            memory=peak() - held,
            calls=dict(self.calls),
        )


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> int:
    """Bytes held now, from which on the peak counts."""
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return int(torch.cuda.max_memory_allocated()) if CUDA else status("VmHWM")


def status(name: str) -> int:
    found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def rows_of(rows: int, columns: int, size: int) -> list[list[Image.Image | None]]:
    source = Scenes(size=size, seed=11)
    names = ROLES[-columns:]
    found: list[list[Image.Image | None]] = [
        [source.item(k).image(role) for role in names] for k in range(rows)
    ]
    found[-1][-1] = None
    return found


def components(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that both pipelines use."""
    pipe = diffusers.VisualClozeGenerationPipeline.from_pretrained(BASE)
    parts = dict(pipe.components)
    if options.blocks:
        parts |= random_flux(*options.blocks, parts)
    device = "cuda" if CUDA else "cpu"
    dtype = torch.bfloat16 if CUDA else torch.float32
    return {
        name: part.to(device, dtype).eval() if isinstance(part, torch.nn.Module) else part
        for name, part in parts.items()
    }


def random_flux(double: int, single: int, parts: dict[str, Any]) -> dict[str, Any]:
    """FLUX.1-Fill's transformer and VAE with random weights; text encoders of its widths, small."""
    with torch.device("cuda" if CUDA else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
        transformer = diffusers.FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=double,
            num_single_layers=single,
            guidance_embeds=True,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextConfig(
            vocab_size=len(parts["tokenizer"]),
            hidden_size=768,
            intermediate_size=64,
            num_hidden_layers=1,
            eos_token_id=parts["tokenizer"].eos_token_id,
        )
        t5 = T5Config(
            vocab_size=len(parts["tokenizer_2"]), d_model=4096, d_ff=64, num_layers=1, num_heads=1
        )
        found = {
            "transformer": transformer,
            "vae": vae,
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
        }
    torch.set_default_dtype(torch.float32)
    return found


def ours_of(parts: dict[str, Any], resolution: int) -> InContextPipeline:
    pipe = InContextPipeline(**parts, resolution=resolution)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def against_diffusers(parts: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    resolution = options.resolution
    pipe = ours_of(parts, resolution)
    theirs = diffusers.VisualClozeGenerationPipeline(**parts, resolution=resolution)
    theirs.set_progress_bar_config(disable=True)
    length = theirs.tokenizer_2.model_max_length if not options.blocks else 512
    watch = Watch(pipe)  # both run the same networks

    def made_by_them(rows: Any, seed: int) -> None:
        theirs(
            task_prompt=TASK,
            content_prompt=CONTENT,
            image=rows,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=min(length, 512),
        )

    def made_by_us(rows: Any, seed: int) -> None:
        pipe(
            rows=rows,
            task_prompt=TASK,
            content_prompt=CONTENT,
            seed=seed,
            num_inference_steps=options.steps,
        )

    found = []
    for shape in GRIDS:
        rows = rows_of(*shape, resolution)
        costs: dict[str, list[Cost]] = {"diffusers": [], "first image": [], "further seed": []}
        for number in range(options.rounds + 1):
            pipe.encodings = Recent()
            turn = {
                "diffusers": watch.cost(lambda r=rows, n=number: made_by_them(r, n)),
                "first image": watch.cost(lambda r=rows, n=number: made_by_us(r, n)),
                "further seed": watch.cost(lambda r=rows, n=number: made_by_us(r, n + 100)),
            }
            if number:  # after one to warm up
                for name, cost in turn.items():
                    costs[name].append(cost)
        base = costs["diffusers"]
        for name, several in costs.items():
            middle = {
                key: statistics.median(asdict(one)[key] for one in several)
                for key in ("seconds", "outside", "memory")
            }
            ratio = statistics.median(
                one.seconds / other.seconds for one, other in zip(several, base, strict=True)
            )
            found.append(
                {
                    "grid": "x".join(map(str, shape)),
                    "who": name,
                    **middle,
                    "ratio": ratio,
                    "calls": several[-1].calls,
                }
            )
    several = [rows_of(*shape, resolution) for shape in GRIDS for _ in range(2)]
    lists: dict[str, list[float]] = {"diffusers": [], "ours": []}
    for number in range(options.rounds + 1):
        pipe.encodings = Recent()
        began = now()
        for rows in several:
            made_by_them(rows, number)
        middle_of = now()
        asked = [
            {"rows": rows, "task_prompt": TASK, "content_prompt": CONTENT, "seed": number + k}
            for k, rows in enumerate(several)
        ]
        pipe(asked, num_inference_steps=options.steps, batch_size=options.batch)
        if number:
            lists["diffusers"].append(middle_of - began)
            lists["ours"].append(now() - middle_of)
    ratio = statistics.median(o / d for o, d in zip(lists["ours"], lists["diffusers"], strict=True))
    for name, times in lists.items():
        found.append(
            {
                "grid": f"list of {len(several)}",
                "who": name,
                "seconds": statistics.median(times),
                "ratio": ratio if name == "ours" else 1.0,
            }
        )
    return found


@torch.no_grad()
def memory_of_tokens(double: int = 1, single: int = 1) -> list[dict[str, Any]]:
    """Of one call of the transformer of FLUX's width in bfloat16, with tensors that are none: only
    their sizes are real. More blocks take no more, one runs after the other."""
    found = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            transformer = diffusers.FluxTransformer2DModel(
                in_channels=384,
                out_channels=64,
                num_layers=double,
                num_single_layers=single,
                guidance_embeds=True,
            )
            text = FluxText(torch.empty(1, 512, 4096), torch.empty(1, 768))
            for side in (2, 3, 4):
                shape = ((384, 384 * side),) * side
                n = len(packing.position_ids(shape))
                latents = packing.Latents(
                    clean=torch.empty(1, n, 64),
                    seen=torch.empty(1, n, 64),
                    mask=torch.empty(1, n, 256),
                    ids=torch.empty(n, 3),
                )
                noisy, t = torch.empty(1, n, 64), torch.empty(1)
                with Living() as living:
                    predict(transformer, latents, noisy, t, text=text, guidance=30.0)
                found.append({"grid": f"{side}x{side}", "tokens": n, "memory": living.most})
    finally:
        torch.set_default_dtype(before)
    return found


def options_of_diffusers(
    parts: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    pipe = ours_of(parts, options.resolution)
    blocks: Counter[str] = Counter()
    for block in [
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
    ]:
        block.attn.register_forward_hook(lambda *_: blocks.update(["block"]))
    count = len(pipe.transformer.transformer_blocks) + len(
        pipe.transformer.single_transformer_blocks
    )
    rows = rows_of(3, 3, options.resolution)

    def made() -> np.ndarray:
        (image,) = pipe(
            rows=rows,
            task_prompt=TASK,
            content_prompt=CONTENT,
            num_inference_steps=options.cached_steps,
        )
        return np.asarray(image).astype(float)

    plain = made()
    found = []
    for cache in options.caches:
        off, on, ran = [], [], 0
        for _ in range(options.rounds):
            began = now()
            made()
            off.append(now() - began)
            acceleration.enable(pipe, cache=cache)
            blocks.clear()
            began = now()
            image = made()
            on.append(now() - began)
            ran = blocks["block"]
            pipe.transformer.disable_cache()
        error = ((image - plain) ** 2).mean()
        found.append(
            {
                "what": cache,
                "ratio": statistics.median(a / b for a, b in zip(on, off, strict=True)),
                "blocks": ran / (count * options.cached_steps),
                "psnr": float("inf") if error == 0 else 10 * np.log10(255**2 / error),
            }
        )
    if options.compile:
        off, on = [], []
        for _ in range(options.rounds):
            began = now()
            made()
            off.append(now() - began)
        acceleration.enable(pipe, compile_blocks=True)
        made()
        for _ in range(options.rounds):
            began = now()
            image = made()
            on.append(now() - began)
        error = ((image - plain) ** 2).mean()
        found.append(
            {
                "what": "compile",
                "ratio": statistics.median(on) / statistics.median(off),
                "blocks": 1.0,
                "psnr": float("inf") if error == 0 else 10 * np.log10(255**2 / error),
            }
        )
    return found


def table(found: dict[str, Any], options: argparse.Namespace) -> str:
    lines = [
        "| grid | who | seconds | ratio | outside the transformer, s | peak memory, MB | calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["images"]:
        if "calls" not in one:
            lines.append(
                f"| {one['grid']} | {one['who']} | {one['seconds']:.2f} | {one['ratio']:.2f} "
                "| | | |"
            )
            continue
        calls = ", ".join(f"{one['calls'].get(n, 0)} {n}" for n in NETWORKS)
        lines.append(
            f"| {one['grid']} | {one['who']} | {one['seconds']:.2f} | {one['ratio']:.2f} "
            f"| {one['outside']:.3f} | {one['memory'] / 1e6:.0f} | {calls} |"
        )
    lines += [
        "",
        "| grid at 384 px | tokens | MB of one call | kB a token, text's too |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {one['grid']} | {one['tokens']} | {one['memory'] / 1e6:.0f} "
        f"| {one['memory'] / 1e3 / (one['tokens'] + 512):.1f} |"
        for one in found["memory"]
    ]
    lines += [
        "",
        "| option | time | share of blocks that run | PSNR to the image without, dB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {one['what']} | {one['ratio']:.2f} | {one['blocks']:.2f} | {one['psnr']:.1f} |"
        for one in found["options"]
    ]
    lines.append(
        f"\n{found['device']}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{options.steps} steps ({options.cached_steps} with caches), cells of "
        f"{options.resolution} px, batch of {options.batch} in the list, medians of "
        f"{options.rounds} rounds."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--resolution", type=int, help="default: 64, with --blocks 384")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cached-steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too")
    parser.add_argument(
        "--caches",
        nargs="*",
        default=["first-block=0.05", "first-block=0.1", "first-block=0.2", "taylorseer=3"],
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench-infer"))
    parser.add_argument("--report", type=Path, help="file that gets the tables between its marks")
    options = parser.parse_args()
    options.resolution = options.resolution or (384 if options.blocks else 64)
    options.output.mkdir(parents=True, exist_ok=True)
    parts = components(options)
    found = {
        "device": torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU",
        "images": against_diffusers(parts, options),
        "memory": memory_of_tokens(),
        "options": options_of_diffusers(parts, options),
    }
    text = table(found, options)
    print(text)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    (options.output / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.report:
        marked = f"<!-- bench:begin -->\n{text}<!-- bench:end -->"
        old = options.report.read_text(encoding="utf-8")
        new = re.sub(r"<!-- bench:begin -->.*<!-- bench:end -->", lambda _: marked, old, flags=re.S)
        options.report.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
