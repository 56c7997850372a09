"""Make the VAE: a computed encoder, and a decoder that is trained.

A diffusers `AutoencoderKL` with FLUX's geometry (x8, 16 channels) and small widths. The encoder is
not trained but computed: the 16 principal components of 8 x 8 pixel patches, each to the power
`SPREAD` of its deviation, so that an error in latents is nearly an error in pixels, which a small
transformer learns in much less time (docs/lab-log.md). The decoder is trained on strips of two
cells: scenes in all their roles, recoloured at random, and smooth noise pictures.
Axes: b strip, c channel, h w pixels, d pixel values of a patch, k latent channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from recipe.optimiser import Optimiser, clip, of_kernels
from recipe.stage import KEPT_EVERY, NOTED_EVERY, Plan, Sitting, keep, kept
from visualcloze_deft.data.degrade import blurred, gray
from visualcloze_deft.data.sources.scenes import Scenes

STAGE = "vae"

WIDTHS = (16, 48, 48, 48)
SIDE, CHANNELS = 8, 16  # of the patch that one latent stands for
SPREAD = 0.75  # 1: latents as unequal as pixels; 0: all of variance 1
ROLES = (
    "target target target reference before depth normal segmentation canny view hole mask".split()
)
LATENT_NOISE = 0.05  # added in training, so that the decoder forgives a generator's small errors
LEARNING_RATE = 4e-3  # in equal time Muon on kernels beat AdamW (docs/lab-log.md)
LARGEST = 1.0  # norm of a gradient
BATCH, BATCH_ON_GPU = 4, 64  # on a CPU many small steps: in equal time 4 beat 8
CELLS, CELLS_A_MINUTE = 8_000, 3_000  # pictures: at most, and of a minute that is trained
FIRST = 10_000_000  # index of the first scene


def new_vae(cell: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=cell,
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


def pool(plan: Plan, count: int) -> np.ndarray:
    """About `count` training cells, (count, size, size, 3) bytes, rendered by all processes."""
    each = -(-count // (4 * plan.processes))
    firsts = [FIRST + k * each for k in range(plan.processes)]
    with ProcessPoolExecutor(plan.processes, get_context("spawn")) as processes:
        parts = processes.map(some_cells, [plan.cell] * len(firsts), firsts, [each] * len(firsts))
        return np.concatenate(list(tqdm(parts, total=len(firsts), desc="rendering")))


def some_cells(size: int, first: int, scenes: int) -> np.ndarray:
    """Four pictures of each scene, in different roles."""
    torch.set_num_threads(1)
    source, rng = Scenes(size=size, seed=0), np.random.default_rng([7, first])
    cells = []
    for index in range(first, first + scenes):
        item = source.item(index)
        for role in rng.choice(ROLES, 4, replace=False):
            picture = item.image(str(role))
            if role == "target" and rng.random() < 0.3:
                picture = (gray, blurred)[rng.integers(2)](picture, rng)
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


def strips(cells: np.ndarray, rng: np.random.Generator, size: int) -> Tensor:
    """`size` strips, (b 3 h w) in -1..1."""
    drawn = np.stack([strip(cells, rng) for _ in range(size)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


class Decoder:
    """A VAE whose decoder learns from pairs of latents and pixels."""

    def __init__(self, vae: AutoencoderKL, rate: float) -> None:
        self.vae = vae.requires_grad_(False).to(memory_format=torch.channels_last)
        vae.decoder.requires_grad_(True)
        kernels = [p for p in vae.decoder.parameters() if p.ndim == 4]
        others = [p for p in vae.decoder.parameters() if p.ndim != 4]
        self.parts = kernels, others
        self.optimiser = Optimiser(
            [p.data for p in kernels], [p.data for p in others], scale=of_kernels
        )
        self.rate = rate

    def step(self, latents: Tensor, pixels: Tensor, rate: float) -> Tensor:
        """One step at a part `rate` of the learning rate; the mean absolute error."""
        cuda = latents.device.type == "cuda"
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=cuda):
            decoded = self.vae.decode(latents.to(memory_format=torch.channels_last)).sample
        difference = decoded.float() - pixels
        (difference.abs().mean() + difference.square().mean()).backward()
        gradients: list[Sequence[Tensor]] = [[p.grad for p in part] for part in self.parts]
        clip([*gradients[0], *gradients[1]], LARGEST)
        self.optimiser.rate.fill_(self.rate * rate)
        self.optimiser.step(*gradients)
        self.vae.zero_grad()
        return difference.detach().abs().mean()


def finish(plan: Plan, vae: AutoencoderKL) -> None:
    """Put the VAE into the output's folder."""
    whole = vae.to(memory_format=torch.contiguous_format).cpu().float().eval()
    whole.save_pretrained(plan.output / "vae")


def make(plan: Plan) -> None:
    """Train the decoder for the plan's minutes, from where the last sitting ended."""
    torch.manual_seed(plan.seed)
    torch.backends.cudnn.allow_tf32 = False  # the encoder lives on differences of large constants
    cells = pool(plan, min(CELLS, max(round(CELLS_A_MINUTE * plan.minutes[STAGE]), 64)))
    vae, before, seen = new_vae(plan.cell), kept(plan, STAGE), 0
    if before is None:
        set_encoder(vae, *components(cells))
    else:
        vae.load_state_dict(before[0])
        seen = before[1]["strips"]
    decoder = Decoder(vae.to(plan.device), LEARNING_RATE)
    size = BATCH_ON_GPU if plan.device.type == "cuda" else BATCH
    rng, sitting = np.random.default_rng([1, seen]), Sitting(plan, STAGE)
    for spent in sitting:
        pixels = strips(cells, rng, size).to(plan.device)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        error = decoder.step(noisy, pixels, min(1, spent * 40 + 0.02, (1 - spent) * 2 + 0.01))
        seen += size
        if sitting.due("noted", NOTED_EVERY):
            sitting.note({"strips": seen, "error": round(error.item(), 4)})
        if sitting.due("saved", KEPT_EVERY):
            keep(plan, STAGE, vae.state_dict(), {"strips": seen})
    keep(plan, STAGE, vae.state_dict(), {"strips": seen})
    finish(plan, vae)
