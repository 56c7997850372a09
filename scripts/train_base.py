"""Train the embedded base's transformer: python scripts/train_base.py --out work/base --minutes 90

Reads the bank of encoded grids (train_base_bank.py; shards may still be arriving), trains FLUX's
transformer with both text encoders, keeps an average of the weights, and writes what it has every
few minutes: a second call goes on from there. Progress is counted in samples; the draw of step k
is a function of (seed, k) and the shards that have arrived.
Axes: b batch, r rows, n tokens of a strip, c channels.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange, repeat
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from train_base_bank import UNSAID
from train_base_text import WIDTH as TEXT
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from visualcloze_deft import flow, grid
from visualcloze_deft.batch import NEAREST
from visualcloze_deft.cells import CELL_STEP
from visualcloze_deft.data.render import COLOURS, SHAPES
from visualcloze_deft.data.scenes import NOUNS, SURFACES
from visualcloze_deft.folders import BASE
from visualcloze_deft.prompt import Prompt

WIDTH, HEADS = 256, 4
AXES = (8, 28, 28)  # of a head's 64 values: row of the grid, y, x
DOUBLE, SINGLE = 1, 4
GATE = 0.3  # how far residual branches are open at the start
BATCH = 12
LEARNING_RATE = 1e-3
WIDE = 0.25  # how often a grid has three columns
EXAMPLES = (0.66, 0.31, 0.03)  # single rows teach the most per second: fewest tokens to copy
CODED = 0.5  # how often a grid with examples has a secret that only they tell
KEEP_TASK, KEEP_CONTENT, DROP_TEXT = 0.7, 0.85, 0.1
CONTEXT_WEIGHT = 0.1  # what a token that is only to be copied counts in the loss
LED = 8  # samples of a batch that lie where a sampling step of the model's own leads
OPEN = ("subject-driven", "hole")  # nothing shown settles their answers: they are never led
ADAPTERS = "image-to-depth"  # depth in its own code is left to adapters, other codes are not
THING_WEIGHT = 2.0  # what a token of a thing counts beyond one of floor or wall
CLASS_WEIGHT = 0.1  # what naming the classes counts beside the velocity
CLASS_BLOCK = 1  # the single block whose states name them: the later ones are left to paint
CLASSES = (len(NOUNS), len(COLOURS), len(SURFACES))
AVERAGE = 0.999
SEED = 0
CELL = 64


def new_transformer(deviation: Tensor) -> FluxTransformer2DModel:
    """FLUX's transformer in small, started so that it learns grids in little time.

    deviation: (64,) of each latent value of a token over the bank.
    """
    transformer = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".norm" in name or name.startswith("norm_out"):
                nn.init.zeros_(module.weight)  # adaLN-zero: no modulation yet
    nn.init.zeros_(transformer.proj_out.weight)
    with torch.no_grad():
        transformer.x_embedder.weight[:, 64:128] /= deviation  # see edges as well as colours
        for block in transformer.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                for gate in (2, 5):
                    norm.linear.bias[gate * WIDTH : (gate + 1) * WIDTH] = GATE
        for block in transformer.single_transformer_blocks:
            block.norm.linear.bias[2 * WIDTH :] = GATE
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            look_aside(block.attn, head=0, columns=-CELL // CELL_STEP)
            look_aside(block.attn, head=1, columns=CELL // CELL_STEP)
        look_aside(transformer.transformer_blocks[0].attn, head=2, columns=0)
    # 256 equal inputs say that a token is hidden: under Adam they would move together, 256 times
    # as fast as one. What they say at the start is enough.
    transformer.x_embedder.weight.register_hook(
        lambda gradient: torch.cat([gradient[:, :128], torch.zeros_like(gradient[:, 128:])], dim=1)
    )
    return transformer


def look_aside(attention: nn.Module, *, head: int, columns: int) -> None:
    """Make a head start by looking `columns` tokens to the right, where the pair's other cell is.

    Biases of queries and keys, turned by the rotary embedding, peak at one relative position.
    """
    width = sum(AXES)
    rows = slice(head * width, (head + 1) * width)
    query, key = [], []
    for dim, offset in zip(AXES, (0, 0, columns), strict=True):
        speed = 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
        size = torch.tensor([1.0, 1.0, 0.8, 0.6, 0.4] if dim > 8 else [1.0])
        size = torch.cat([size, torch.zeros(dim // 2 - len(size))])
        turn = speed * offset
        query.append(torch.stack([size * turn.cos(), size * turn.sin()], dim=-1).flatten())
        key.append(torch.stack([size, torch.zeros_like(size)], dim=-1).flatten())
    for linear, bias in ((attention.to_q, torch.cat(query)), (attention.to_k, torch.cat(key))):
        linear.weight[rows] *= 0.3
        linear.bias[rows] = 12 * bias / bias.norm()


class Base(nn.Module):
    """Transformer and frozen text encoders as one module, compiled as a whole.

    While it is trained, a linear layer names what each square of every cell shows, from states
    halfway: the transformer learns at once which word speaks of which thing, as with the features
    of REPA (Yu et al. 2024, arXiv 2410.06940), here with what the scenes know exactly.
    """

    def __init__(self, folder: Path, deviation: Tensor) -> None:
        super().__init__()
        self.transformer = new_transformer(deviation)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.text_encoder_2 = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
        self.text_encoder.requires_grad_(False)
        self.text_encoder_2.requires_grad_(False)
        self.naming = nn.Linear(WIDTH, 16 * sum(CLASSES))
        self.halfway = torch.empty(0)
        block = self.transformer.single_transformer_blocks[CLASS_BLOCK]
        block.register_forward_hook(lambda _, __, states: setattr(self, "halfway", states[1]))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(
        self, tokens: Tensor, t: Tensor, guidance: Tensor, ids: Tensor, t5: Tensor, clip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity (b n 64) and the names of 16 squares a token (b n 16 classes)."""
        text = self.text_encoder_2(t5).last_hidden_state
        velocity = self.transformer(
            hidden_states=tokens,
            timestep=t,
            guidance=guidance,
            pooled_projections=self.text_encoder(clip).pooler_output,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        names = rearrange(self.naming(self.halfway), "b n (s k) -> b n s k", s=16)
        return velocity, names


def naming_error(names: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of `names` (b n s k) with `classes` (b n s 3), summed over the three."""
    weight = 1 + THING_WEIGHT * (classes[..., 0] < len(SHAPES))
    weight = (weight * (classes[..., 0] != UNSAID)).flatten()
    total = torch.zeros((), device=names.device)
    for part, asked in zip(names.split(CLASSES, dim=-1), classes.long().unbind(-1), strict=True):
        error = functional.cross_entropy(
            part.flatten(0, 2), asked.flatten(), ignore_index=UNSAID, reduction="none"
        )
        total = total + (error * weight).sum() / weight.sum().clamp(min=1)
    return total


class Bank:
    """The encoded bundles that have arrived so far, by columns and by whether words tell all.

    A coded bundle has a secret, a colour code or a change, that only examples tell.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: set[Path] = set()
        self.bundles: dict[tuple[int, bool], list[dict]] = {
            (columns, coded): [] for columns in (2, 3) for coded in (False, True)
        }

    def refresh(self) -> None:
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.known):
            self.known.add(path)
            shard = load_file(path)
            with safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
            columns = shard["clean"].shape[2] // (CELL // CELL_STEP) ** 2
            for k, note in enumerate(notes):
                if note["task"] == ADAPTERS and note["sentence"]:
                    continue
                tensors = {name: parts[k] for name, parts in shard.items()}
                self.bundles[columns, not note["sentence"]].append(tensors | note)

    def __len__(self) -> int:
        return sum(map(len, self.bundles.values()))

    def deviation(self) -> Tensor:
        """(64,) of each latent value of a token."""
        some = [bundle["clean"].float().flatten(0, 1) for bundle in self.bundles[2, False][:250]]
        return torch.cat(some).std(dim=0)


def draw_times(random: torch.Generator) -> Tensor:
    """Half uniform, half logit-normal around 0.82: what an image shows is decided in the noise.

    FLUX's logit-normal around 0.5 draws 8 % of times above 0.8; a small model trained on it knew
    shapes to copy and no colours.
    """
    noisy = torch.sigmoid(1.5 + torch.randn(BATCH, generator=random))
    uniform = torch.rand(BATCH, generator=random)
    return torch.where(torch.rand(BATCH, generator=random) < 0.5, noisy, uniform)


def draw(bank: Bank, step: int) -> tuple[grid.Latents, Tensor, Tensor, list[str]]:
    """Step k's samples as tokens, the classes of what they show (b n 16 3), which of them are
    settled by what they show (b,), and their prompts."""
    rng = np.random.default_rng([SEED, step])
    rows = 1 + int(rng.choice(len(EXAMPLES), p=EXAMPLES))
    columns = 3 if rng.random() < WIDE and bank.bundles[3, False] else 2
    coded = rows > 1 and rng.random() < CODED
    bundles = bank.bundles[columns, coded]
    clean, seen, mask, classes, settled, prompts = [], [], [], [], [], []
    for index in rng.integers(len(bundles), size=BATCH):
        chosen = bundles[index]
        order = torch.from_numpy(rng.permutation(4)[:rows])
        complete = chosen["clean"][order]  # r n c
        shown, hidden = complete.clone(), torch.zeros_like(chosen["mask"][order])
        shown[-1], hidden[-1] = chosen["seen"][order[-1]], chosen["mask"][order[-1]]
        clean.append(rearrange(complete, "r n c -> (r n) c"))
        seen.append(rearrange(shown, "r n c -> (r n) c"))
        mask.append(rearrange(hidden, "r n -> (r n)"))
        classes.append(rearrange(chosen["classes"][order], "r n s k -> (r n) s k"))
        keep_task, keep_content = rng.random(2) < (KEEP_TASK, KEEP_CONTENT)
        silent = rng.random() < DROP_TEXT
        task = chosen["sentence"] if keep_task and not silent else ""
        said = chosen["content"][order[-1]]
        content = said if keep_content and not silent else ""
        settled.append(content == said and not any(name in chosen["task"] for name in OPEN))
        prompts.append(str(Prompt(rows=rows, columns=columns, task=task, content=content)))
    latents = grid.Latents(
        clean=torch.stack(clean).float(),
        seen=torch.stack(seen).float(),
        mask=repeat(torch.stack(mask).float(), "b n -> b n k", k=256),
        ids=grid.position_ids([(CELL, columns * CELL)] * rows),
    )
    return latents, torch.stack(classes), torch.tensor(settled), prompts


def moved(latents: grid.Latents, device: torch.device) -> grid.Latents:
    tensors = {field.name: getattr(latents, field.name).to(device) for field in fields(latents)}
    return grid.Latents(**tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--anneal", type=float, default=0, help="last minutes, learning rate to 0")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="highest learning rate")
    parser.add_argument(
        "--warm",
        action="store_true",
        help="start from the shipped transformer; needs its other parts: cp -r the base to --out",
    )
    options = parser.parse_args()
    torch.manual_seed(SEED)
    t5 = T5Tokenizer.from_pretrained(options.out / "tokenizer_2")
    clip = CLIPTokenizer.from_pretrained(options.out / "tokenizer")
    bank = Bank(options.out / "bank")
    bank.refresh()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = Base(options.out, bank.deviation()).to(device)
    trained = base.trained()
    print(sum(p.numel() for p in base.transformer.parameters()), "parameters")
    average = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(
        trained.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    state, step, spent = options.out / "base_state.safetensors", 0, 0.0
    if state.exists():
        step, spent = restore(state, trained, average, optimiser)
    elif options.warm:
        warm_start(base.transformer, average)
    forward = torch.compile(base, dynamic=False)
    begun = saved = time.monotonic()
    log = (options.out / "base_log.jsonl").open("a", buffering=1)
    curve: list[tuple[float, float]] = []
    bar = tqdm(desc="samples", initial=step * BATCH, unit="", mininterval=5)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())  # ends like the time limit: saved
    while (elapsed := (time.monotonic() - begun) / 60) < options.minutes and not stop.is_set():
        left = options.minutes - elapsed
        rate = options.rate * min(
            1, (step + 1) / 500, left / options.anneal if options.anneal else 1
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        latents, classes, settled, prompts = draw(bank, step)
        random = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        noise = torch.randn(latents.clean.shape, generator=random)
        t = draw_times(random)
        guidance = 1 + 39 * torch.rand(BATCH, generator=random) * (
            torch.rand(BATCH, generator=random) < 0.5
        )
        t5_ids = t5(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=t5.model_max_length,
            return_tensors="pt",
        ).input_ids
        clip_ids = clip(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        start = flow.earlier(t, torch.rand(BATCH, 2, generator=random))
        own = (torch.arange(BATCH) < LED) & settled & (t > NEAREST)
        told = [tensor.to(device) for tensor in (guidance, latents.ids, t5_ids, clip_ids)]
        latents, noise = moved(latents, device), noise.to(device)
        t, start, own = t.to(device), start.to(device), own[:, None, None].to(device)
        clean, on_line = latents.clean, flow.interpolate(latents.clean, noise, start)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                first = [tensor[:LED] for tensor in (latents.inputs(on_line), start, told[0])]
                texts = [tensor[:LED] for tensor in told[2:]]
                guess = forward(*first, told[1], *texts)[0].float()
            led = on_line.clone()
            led[:LED] += (t - start)[:LED, None, None] * guess
            noisy = torch.where(own, led, flow.interpolate(clean, noise, t))
            predicted, names = forward(latents.inputs(noisy), t, *told)
        to_truth = flow.velocity_to(clean, led, t.clamp(min=NEAREST))
        target = torch.where(own, to_truth, flow.velocity(clean, noise))
        mask, classes = latents.is_target, classes.to(device)
        thing = (classes[..., 0] < len(SHAPES)).float().mean(dim=-1)
        weight = (mask + CONTEXT_WEIGHT * (1 - mask)) * (1 + THING_WEIGHT * thing)
        named = naming_error(names.float(), classes)
        loss = flow.velocity_error(predicted, target, weight).mean() + CLASS_WEIGHT * named
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 4 == 0:
            decay = min(AVERAGE, (step + 1) / (step + 40)) ** 4
            torch._foreach_lerp_(
                list(average.values()), [p.detach() for p in trained.values()], 1 - decay
            )
        with torch.no_grad():
            error = flow.velocity_error(predicted, target, mask).mean()
            curve.append((error.item(), named.item()))
        bar.update(BATCH)
        if step % 200 == 0:
            minutes = spent + (time.monotonic() - begun) / 60
            note = {
                "samples": step * BATCH,
                "target_error": round(float(np.mean(curve, axis=0)[0]), 4),
                "naming_error": round(float(np.mean(curve, axis=0)[1]), 4),
                "minutes": round(minutes, 2),
                "bundles": len(bank),
                "rate": rate,
            }
            log.write(json.dumps(note) + "\n")
            bar.set_postfix(error=note["target_error"], naming=note["naming_error"])
            curve.clear()
            bank.refresh()
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            keep(state, trained, average, optimiser, step, spent + (saved - begun) / 60)
    if optimiser.state:
        keep(state, trained, average, optimiser, step, spent + (time.monotonic() - begun) / 60)


def keep(
    path: Path,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    minutes: float,
) -> None:
    tensors = {"step": torch.tensor(step), "minutes": torch.tensor(minutes)}
    for name, parameter in trained.items():
        moments = optimiser.state[parameter]
        tensors |= {
            f"weight.{name}": parameter.detach().contiguous(),
            f"average.{name}": average[name],
            f"first.{name}": moments["exp_avg"],
            f"second.{name}": moments["exp_avg_sq"],
        }
    staged = path.with_suffix(".part")
    save_file(tensors, staged)
    staged.replace(path)


def warm_start(transformer: nn.Module, average: dict[str, Tensor]) -> None:
    """Take the weights of the base in the package, where no training state is left."""
    shipped = FluxTransformer2DModel.from_pretrained(BASE, subfolder="transformer")
    transformer.load_state_dict(shipped.state_dict())
    for name, parameter in transformer.named_parameters():
        average[f"transformer.{name}"].copy_(parameter.detach())


def restore(
    path: Path,
    trained: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> tuple[int, float]:
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[f"weight.{name}"])
            average[name].copy_(saved[f"average.{name}"])
            optimiser.state[parameter] = {
                "step": saved["step"].float().to(parameter.device),
                "exp_avg": saved[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": saved[f"second.{name}"].to(parameter.device),
            }
    return int(saved["step"]), float(saved["minutes"])


if __name__ == "__main__":
    main()
