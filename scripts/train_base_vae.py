"""Train the embedded base's VAE: python scripts/train_base_vae.py --out work/base --minutes 8

A diffusers `AutoencoderKL` with FLUX's geometry (x8, 16 channels) and small widths. The encoder is
not trained but computed: the 16 principal components of 8 x 8 pixel patches, each to the power
`SPREAD` of its deviation, so that an error in latents is nearly an error in pixels, which a small
transformer learns in much less time (docs/lab-log.md). The decoder is trained on strips of two
cells: scenes in all their roles, recoloured at random, and smooth noise pictures.
Resumable: a second call goes on from --out/vae_state.safetensors. Progress is counted in strips.
Axes: b strip, c channel, h w pixels, d pixel values of a patch, k latent channel.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from visualcloze_deft.data.derive import blurred, gray
from visualcloze_deft.data.scenes import Scenes

WIDTHS = (16, 48, 48, 48)
SIDE, CHANNELS = 8, 16  # of the patch that one latent stands for
SPREAD = 0.75  # 1: latents as unequal as pixels; 0: all of variance 1
ROLES = (
    "target target target reference before depth normal segmentation canny view hole mask".split()
)
LATENT_NOISE = 0.05  # added in training, so that the decoder forgives a generator's small errors
LEARNING_RATE = 4e-3  # AdamW on norms and biases; kernels take Muon at ten times this
BATCH = 4  # many small steps: in equal time 4 beat 8, and Muon beat AdamW (docs/lab-log.md)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024) for convolution kernels.

    torch.optim.Muon takes matrices only; a kernel is one with rows = output channels.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for kernel in group["params"]:
                state = self.state.setdefault(kernel, {})
                momentum = state.setdefault("momentum", torch.zeros_like(kernel))
                momentum.mul_(0.95).add_(kernel.grad)
                update = kernel.grad.add(momentum, alpha=0.95).flatten(1)
                rows, columns = update.shape
                x = update / (update.norm() + 1e-7)
                x = x.T if rows > columns else x
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if rows > columns else x
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                kernel.add_(x.reshape(kernel.shape), alpha=-rate)


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):  # residual branches start at zero: faster in equal time
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


def components(cells: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean patch (d,) and projection (k d) to latents whose mean variance is 1; d is (c i j)."""
    rng = np.random.default_rng(3)
    strips = np.stack([strip(cells, rng) for _ in range(1500)])
    patches = rearrange(
        torch.from_numpy(strips).double() / 127.5 - 1,
        "b (h i) (w j) c -> (b h w) (c i j)",
        i=SIDE,
        j=SIDE,
    )
    variance, vectors = torch.linalg.eigh(torch.cov(patches.T))
    variance, vectors = variance.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
    kept = 1 - (patches.var(dim=0).sum() - variance.sum()) / patches.var(dim=0).sum()
    print(f"{CHANNELS} components hold {kept:.4f} of the variance:", variance)
    latents = variance ** (SPREAD / 2)  # their deviations
    projection = vectors * latents / variance.sqrt() / latents.square().mean().sqrt()
    return patches.mean(dim=0), projection.T


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, mean: Tensor, projection: Tensor) -> None:
    """Make the encoder exactly z = projection (patch - mean).

    Its residual branches are zero; three stride-2 convolutions gather 2 x 2 pixels each. The last
    group norm and SiLU are passed by pairs: silu(x) - silu(-x) = x, the mean of a pair is 0, and
    a constant pair in each group, large against the data, makes the group's deviation a constant.
    """
    encoder = vae.encoder
    for conv in encoder.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.zeros_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
    shortcuts = [block.resnets[0].conv_shortcut for block in encoder.down_blocks[:3]]
    for conv in (encoder.conv_in, *(s for s in shortcuts if s is not None)):
        middle = conv.kernel_size[0] // 2
        for c in range(min(conv.in_channels, conv.out_channels)):
            conv.weight[c, c, middle, middle] = 1
    for level in (0, 1):  # channel (c, u, v) of the output: pixel (u, v) of channel c
        conv = encoder.down_blocks[level].downsamplers[0].conv
        for c in range(3 * 4**level):
            for u, v in np.ndindex(2, 2):
                conv.weight[4 * c + 2 * u + v, c, u, v] = 1
    # the last one projects: its input channels are (c, i2, j2, i1, j1), its taps (i3, j3)
    last = encoder.down_blocks[2].downsamplers[0].conv
    taps = rearrange(
        projection.float(),
        "k (c i3 i2 i1 j3 j2 j1) -> k (c i1 j1 i2 j2) i3 j3",
        c=3,
        i1=2,
        i2=2,
        i3=2,
        j1=2,
        j2=2,
        j3=2,
    )
    offset = -(projection @ mean).float()
    constant, groups = 256.0, 8
    width = WIDTHS[-1] // groups  # a group: two latents as pairs, and the constant pair
    deviation = (2 * constant**2 / width) ** 0.5
    encoder.conv_norm_out.weight.fill_(1.0)
    encoder.conv_norm_out.bias.zero_()
    for k in range(CHANNELS):
        for sign, slot in ((1, 0), (-1, 1)):
            channel = k // 2 * width + k % 2 * 2 + slot
            last.weight[channel, :, :2, :2] = sign * taps[k]
            last.bias[channel] = sign * offset[k]
            encoder.conv_out.weight[k, channel, 1, 1] = sign * deviation
    for group in range(groups):
        last.bias[group * width + 4] = constant
        last.bias[group * width + 5] = -constant
    encoder.conv_out.bias[CHANNELS:] = -8.0  # log variance


def pool(count: int, size: int) -> np.ndarray:
    """`count` training cells, (count, size, size, 3) bytes."""
    source = Scenes(size=size, seed=0)
    rng = np.random.default_rng(7)
    cells = []
    for i in tqdm(range(count // 4), desc="rendering"):
        item = source.item(10_000_000 + i)
        for role in rng.choice(ROLES, 4, replace=False):
            picture = item.image(str(role))
            if role == "target" and rng.random() < 0.3:
                picture = (gray, blurred)[rng.integers(2)](picture)
            cells.append(np.array(picture))
    return np.stack(cells)


def noise_cell(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth random picture with the 1/f spectrum of photographs."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = 1 / size
    white = rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))
    picture = np.fft.irfft2(white / f ** rng.uniform(1.0, 1.6), s=(size, size))
    picture = np.einsum("cd,dhw->hwc", rng.normal(size=(3, 3)) + np.eye(3), picture)
    picture = picture / (picture.std() + 1e-6) * rng.uniform(30, 70) + rng.uniform(60, 190)
    return np.clip(picture, 0, 255).astype(np.uint8)


def recolour(cell: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.25:
        cell = cell[..., rng.permutation(3)]
    if rng.random() < 0.15:
        cell = 255 - cell
    if rng.random() < 0.5:
        cell = cell[:, ::-1]
    return cell


def strip(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = cells.shape[1]
    joined = []
    for _ in range(2):
        kind = rng.random()
        if kind < 0.08:
            joined.append(np.zeros((size, size, 3), np.uint8))
        elif kind < 0.14:
            joined.append(noise_cell(rng, size))
        else:
            joined.append(recolour(cells[rng.integers(len(cells))], rng))
    return np.concatenate(joined, axis=1)


def keep(vae: AutoencoderKL, path: Path, seen: int) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    save_file({**tensors, "strips_seen": torch.tensor(seen)}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--cells", type=int, default=8_000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    state = options.out / "vae_state.safetensors"
    seen = 0
    if state.exists():
        saved = load_file(state)
        seen = int(saved.pop("strips_seen"))
        vae.load_state_dict(saved)
    cells = pool(options.cells, 64)
    if not state.exists():
        set_encoder(vae, *components(cells))
    vae.encoder.requires_grad_(False)
    rng = np.random.default_rng([1, seen])
    kernels = [p for p in vae.decoder.parameters() if p.ndim == 4]
    others = [p for p in vae.decoder.parameters() if p.ndim != 4]
    optimisers = {
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95)): LEARNING_RATE,
        Muon(kernels, lr=10 * LEARNING_RATE): 10 * LEARNING_RATE,
    }
    start = saved = time.monotonic()
    bar = tqdm(total=round(options.minutes * 60), unit="s", desc="vae")
    while (spent := (time.monotonic() - start) / 60 / options.minutes) < 1:
        for optimiser, rate in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, spent * 40 + 0.02, (1 - spent) * 2 + 0.01)
        batch = np.stack([strip(cells, rng) for _ in range(BATCH)])
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        error = (decoded.float() - pixels).abs().mean()
        square = (decoded.float() - pixels).square().mean()
        (error + square).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        vae.zero_grad()
        seen += BATCH
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            keep(vae, state, seen)
        bar.update(int(time.monotonic() - start) - bar.n)
        bar.set_postfix(l1=f"{error.item():.3f}", mse=f"{square.item():.4f}", strips=seen)
    keep(vae, state, seen)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    vae.save_pretrained(options.out / "vae")


if __name__ == "__main__":
    main()
