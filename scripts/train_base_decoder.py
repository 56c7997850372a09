"""Teach the embedded base's decoder what its transformer makes: the recipe's last step.

    python scripts/train_base_decoder.py --out work/base --minutes 8

Latents that a small transformer makes differ from those of pictures: they are soft, and do not
meet at the borders of tokens. A convolutional decoder can mend that, if it has seen it. Grids
that no training grid showed are completed by the transformer, from pure noise or from the
truth hidden in much noise; the decoder learns to paint the true picture from what was made, and
goes on learning from true latents of every role. Encoder and transformer stay as they are.
Run it once, last: it replaces the decoder that it starts from.
Axes: b strip, n token, c channel, h w pixels.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from families import families
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from train_base import CELL, OPEN, Base
from train_base_bank import BUNDLES, bundle
from train_base_vae import LATENT_NOISE, LEARNING_RATE, Muon, pool, strip
from transformers import CLIPTokenizer, T5Tokenizer

from visualcloze_deft import flow, grid
from visualcloze_deft.data.scenes import Scenes
from visualcloze_deft.prompt import Prompt
from visualcloze_deft.sample import denoise

SHARDS = range(30_000, 30_007)  # far from those of the bank
GROUP = 24  # grids that the transformer completes together
TIMES = (0.5, 1.0)  # how much noise it begins with
STEPS = 8  # for a whole way from noise to picture
GENTLE = 0.3  # of the learning rate that the decoder was first trained with
BATCH = 4  # strips made, and as many true ones
HELD_OUT = 2 * GROUP


def averaged(folder: Path) -> Base:
    base = Base(folder, torch.ones(64)).eval()
    saved = load_file(folder / "base_state.safetensors")
    with torch.no_grad():
        for name, parameter in base.trained().items():
            parameter.copy_(saved[f"average.{name}"])
    return base


def settled_strips(shard: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A shard's rows of two columns whose answer is settled by what they show.

    Pixels (b 3 h w) in -1..1, what is hidden (b 1 h w), and the prompts.
    """
    torch.set_num_threads(1)
    tasks, source = families(), Scenes(size=CELL, seed=0)
    grids, prompts = [], []
    for index in range(shard * BUNDLES, (shard + 1) * BUNDLES):
        drawn, _, words = bundle(index, tasks, source)
        is_open = any(name in words["task"] for name in OPEN)
        if words["sentence"] and not is_open and len(drawn[0].widths[0]) == 2:
            grids += drawn
            prompts += [
                str(Prompt(rows=1, columns=2, task=words["sentence"], content=content))
                for content in words["content"]
            ]
    if not grids:
        return np.empty((0, 3, CELL, 2 * CELL)), np.empty((0, 1, CELL, 2 * CELL)), []
    strips, hidden = zip(*((g.strips[0], g.hidden[0]) for g in grids), strict=True)
    return torch.stack(strips).numpy(), torch.stack(hidden).numpy(), prompts


def complete(
    base: Base,
    vae: AutoencoderKL,
    tokenizers: tuple[T5Tokenizer, CLIPTokenizer],
    pixels: Tensor,
    hidden: Tensor,
    prompts: Sequence[str],
    seed: int,
) -> Tensor:
    """The latents (b c h w) of whole strips that the transformer makes."""
    t5, clip = tokenizers
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    t5_ids = t5(prompts, max_length=t5.model_max_length, **padded).input_ids
    clip_ids = clip(prompts, **padded).input_ids
    latents = grid.Latents(
        clean=grid.pack(encode(vae, pixels)),
        seen=grid.pack(encode(vae, torch.where(hidden > 0, grid.BLANK, pixels))),
        mask=grid.pack_mask(hidden),
        ids=grid.position_ids([(CELL, 2 * CELL)]),
    )
    random = torch.Generator().manual_seed(seed)
    start = TIMES[0] + (TIMES[1] - TIMES[0]) * 2 * torch.rand((), generator=random)
    start = start.clamp(max=TIMES[1])  # pure noise in one case of two
    noise = torch.randn(latents.clean.shape, generator=random)
    count = len(prompts)
    found = denoise(
        lambda x, t: base(
            latents.inputs(x), t.expand(count), torch.ones(count), latents.ids, t5_ids, clip_ids
        )[0],
        flow.interpolate(latents.clean, noise, start.expand(count)),
        torch.linspace(float(start), 0, 1 + int(np.ceil(STEPS * float(start)))),
    )
    return grid.unpack(found, [(CELL, 2 * CELL)])[0]


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.mode()  # scaled by 1, shifted by 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="of training the decoder")
    parser.add_argument("--cells", type=int, default=4_000, help="true pictures of every role")
    options = parser.parse_args()
    torch.manual_seed(0)
    base = averaged(options.out)
    vae = AutoencoderKL.from_pretrained(options.out / "vae")
    tokenizers = (
        T5Tokenizer.from_pretrained(options.out / "tokenizer_2"),
        CLIPTokenizer.from_pretrained(options.out / "tokenizer"),
    )
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        drawn = processes.map(settled_strips, SHARDS)
        parts = list(tqdm(drawn, total=len(SHARDS), desc="rendering"))
    pixels = torch.from_numpy(np.concatenate([part[0] for part in parts])).float()
    hidden = torch.from_numpy(np.concatenate([part[1] for part in parts])).float()
    prompts = [prompt for *_, part in parts for prompt in part]
    made: list[Tensor] = []
    with torch.no_grad():
        for k in tqdm(range(0, len(prompts), GROUP), desc="groups completed"):
            part = slice(k, k + GROUP)
            made.append(
                complete(base, vae, tokenizers, pixels[part], hidden[part], prompts[part], seed=k)
            )
    found = torch.cat(made)
    order = torch.from_numpy(np.random.default_rng(4).permutation(len(found)))
    found, pixels = found[order], pixels[order]
    cells = pool(options.cells, CELL)
    held = torch.from_numpy(
        np.stack([strip(cells, np.random.default_rng(k)) for k in range(HELD_OUT)])
    )
    held = held.permute(0, 3, 1, 2).float() / 127.5 - 1

    def judge() -> str:
        with torch.no_grad():
            shown = decibel(vae.decode(found[:HELD_OUT]).sample, pixels[:HELD_OUT])
            true = decibel(vae.decode(encode(vae, held)).sample, held)
        return f"strips made {shown:.2f} dB, true latents {true:.2f} dB"

    print("before:", judge())
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    kernels = [p for p in vae.decoder.parameters() if p.ndim == 4]
    others = [p for p in vae.decoder.parameters() if p.ndim != 4]
    optimisers = {
        torch.optim.AdamW(others, betas=(0.9, 0.95)): GENTLE * LEARNING_RATE,
        Muon(kernels, lr=1.0): GENTLE * 10 * LEARNING_RATE,
    }
    rng = np.random.default_rng(5)
    start, seen = time.monotonic(), 0
    bar = tqdm(total=round(options.minutes * 60), unit="s", desc="decoder")
    while (spent := (time.monotonic() - start) / 60 / options.minutes) < 1:
        for optimiser, rate in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, spent * 20 + 0.02, (1 - spent) * 1.5 + 0.01)
        chosen = torch.from_numpy(rng.integers(HELD_OUT, len(found), size=BATCH))
        others_drawn = np.stack([strip(cells, rng) for _ in range(BATCH)])
        true = torch.from_numpy(others_drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            exact = encode(vae, true)
        exact = exact + LATENT_NOISE * torch.randn_like(exact)
        decoded = vae.decode(torch.cat([found[chosen], exact])).sample
        difference = decoded - torch.cat([pixels[chosen], true])
        (difference.abs().mean() + difference.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        vae.zero_grad()
        seen += 2 * BATCH
        bar.update(int(time.monotonic() - start) - bar.n)
        bar.set_postfix(l1=f"{difference.abs().mean().item():.3f}", strips=seen, refresh=False)
    print("after:", judge())
    vae.eval().save_pretrained(options.out / "vae.part")
    shutil.rmtree(options.out / "vae")
    (options.out / "vae.part").rename(options.out / "vae")


def decibel(made: Tensor, truth: Tensor) -> float:
    return float(10 * torch.log10(4 / (made.clamp(-1, 1) - truth).square().mean()))


if __name__ == "__main__":
    main()
