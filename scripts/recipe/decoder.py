"""Adapt the VAE's decoder to what the transformer makes of latents, the last step of the recipe.

Grids that no training grid showed are completed by the transformer, from pure noise or from the
truth hidden in much noise; the decoder learns to paint the true picture from what was made, and
goes on learning from true latents of every role. Encoder and transformer stay as they are.
Axes: b strip, c channel, h w pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from recipe.stage import KEPT_EVERY, NOTED_EVERY, Plan, Sitting, keep, kept
from recipe.transformer import (
    SHOWN,
    UNSEEN,
    averaged,
    complete,
    open_bank,
    show,
    strips_of,
)
from recipe.vae import LATENT_NOISE, LEARNING_RATE, Decoder, finish, pool, strips

STAGE = "decoder"
GROUP, GROUP_ON_GPU = 16, 64  # strips that the transformer completes together
STRIPS, STRIPS_A_MINUTE = 6_000, 600  # at most, and of a minute that is trained
HELD_OUT = 1 / 8  # of the strips, to judge by
STEPS = 8  # for a whole way from noise to picture
GENTLE = 0.3  # of the learning rate that the decoder was first trained with
BATCH, BATCH_ON_GPU = 4, 32  # strips made, and as many true ones
MADE = UNSEEN + 1_000_000  # index of the first bundle to complete


def made_strips(plan: Plan) -> tuple[Tensor, Tensor]:
    """Latents that the transformer makes (b 16 h w), and the true pixels (b 3 h w)."""
    net, bank = averaged(plan), open_bank(plan)
    group = GROUP_ON_GPU if plan.device.type == "cuda" else GROUP
    wanted = min(STRIPS, max(round(STRIPS_A_MINUTE * plan.minutes[STAGE]), 2 * group))
    every = strips_of(plan, bank, wanted, MADE)
    rng = np.random.default_rng(plan.seed)
    found = []
    for at in tqdm(range(0, wanted, group), desc="completing"):
        start = float(min(1.0, 0.5 + rng.random()))  # pure noise in one case of two
        part = every.part(slice(at, at + group))
        steps = math.ceil(STEPS * start)
        found.append(complete(plan, net, bank, part, start=start, steps=steps))
    return torch.cat(found), every.pixels


def decibel(made: Tensor, truth: Tensor) -> float:
    return float(10 * torch.log10(4 / (made.clamp(-1, 1) - truth).square().mean()))


@torch.no_grad()
def judged(vae: AutoencoderKL, latents: Tensor, truth: Tensor) -> float:
    """PSNR in dB of pictures painted from latents that the transformer made."""
    return round(decibel(vae.decode(latents).sample.float(), truth), 3)


def make(plan: Plan) -> None:
    """Adapt the decoder for the plan's minutes, from where the last sitting ended."""
    torch.manual_seed(plan.seed)
    torch.backends.cudnn.allow_tf32 = False  # the encoder lives on differences of large constants
    vae = AutoencoderKL.from_pretrained(plan.output / "vae").float().to(plan.device)
    before, seen = kept(plan, STAGE), 0
    if before is not None:
        vae.load_state_dict(before[0])
        seen = before[1]["strips"]
    found, truth = made_strips(plan)
    held = max(int(HELD_OUT * len(found)), 1)
    cells = pool(plan, len(found))
    decoder = Decoder(vae, GENTLE * LEARNING_RATE)
    size = BATCH_ON_GPU if plan.device.type == "cuda" else BATCH
    rng, sitting = np.random.default_rng([5, seen]), Sitting(plan, STAGE)
    first = judged(vae, found[:held], truth[:held])
    for spent in sitting:
        true = strips(cells, rng, size).to(plan.device)
        with torch.no_grad():
            exact = vae.encode(true).latent_dist.mode()
        exact = exact + LATENT_NOISE * torch.randn_like(exact)
        chosen = torch.from_numpy(rng.integers(held, len(found), size=size)).to(plan.device)
        decoder.step(
            torch.cat([found[chosen], exact]),
            torch.cat([truth[chosen], true]),
            min(1, spent * 20 + 0.02, (1 - spent) * 1.5 + 0.01),
        )
        seen += 2 * size
        if sitting.due("noted", NOTED_EVERY):
            now = judged(vae, found[:held], truth[:held])
            sitting.note({"strips": seen, "before_db": first, "now_db": now})
        if sitting.due("saved", KEPT_EVERY):
            keep(plan, STAGE, vae.state_dict(), {"strips": seen})
    sitting.note(
        {"strips": seen, "before_db": first, "now_db": judged(vae, found[:held], truth[:held])}
    )
    keep(plan, STAGE, vae.state_dict(), {"strips": seen})
    with torch.no_grad():
        painted = vae.decode(found[:SHOWN]).sample
    show(plan.output / "samples" / "decoder.png", painted, truth[:SHOWN])
    finish(plan, vae)
