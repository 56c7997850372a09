"""Train the transformer: rectified flow on completed grids, with samples of its own on the way.

A step draws grids of one shape from the bank, takes a sampling step of the model's own for two
thirds of them, and learns the velocity from there to the truth. All of it is tensors of fixed
shapes: on a GPU the step of each shape is captured once as a CUDA graph and replayed. Weights are
trained in float32 and computed in bfloat16 on a GPU; a running average of them is what is kept.
Axes: b grid, n token of a grid, c channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, T5EncoderModel, T5Tokenizer

from recipe.bank import Bank, Kind, Reader
from recipe.bundles import ROWS, UNSAID, Writer, rendering, wait_for
from recipe.optimiser import Optimiser, clip, like_adamw
from recipe.stage import (
    KEPT_EVERY,
    NOTED_EVERY,
    SHOWN_EVERY,
    Plan,
    Sitting,
    keep,
    kept,
    last_note,
    refuse,
)
from recipe.text import WIDTH as TEXT
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.data.sources.renderer import COLOURS, SHAPES
from visualcloze_deft.data.sources.scenes import NOUNS, SURFACES
from visualcloze_deft.diffusion import flow, timesteps
from visualcloze_deft.grids.cell_sizes import CELL_STEP
from visualcloze_deft.sampling.denoising import denoise
from visualcloze_deft.sampling.encoding import NEAREST

STAGE = "transformer"
WIDTH, HEADS = 256, 4
AXES = (8, 28, 28)  # of a head's 64 values: row of the grid, y, x
DOUBLE, SINGLE = 1, 4
GATE = 0.3  # how far residual branches are open at the start
ODDS: dict[tuple[int, Kind], float] = {  # rows, (columns, coded)
    (1, (2, 0)): 0.30,
    (2, (2, 0)): 0.18,
    (2, (2, 1)): 0.18,
    (3, (2, 0)): 0.05,
    (3, (2, 1)): 0.06,
    (1, (3, 0)): 0.09,
    (2, (3, 0)): 0.05,
    (2, (3, 1)): 0.05,
    (3, (3, 0)): 0.02,
    (3, (3, 1)): 0.02,
}
TOKENS = 21_500  # of a step
LEAST = 4  # grids of a step
LEARNING_RATE = 1e-3  # of the largest batches; smaller ones take less, as its square root
WARM_UP = 150  # steps of a rising rate
LARGEST = 1.0  # norm of a gradient
AVERAGE = 0.998
CONTEXT_WEIGHT = 0.1  # what a token that is only to be copied counts in the loss
LED = 2 / 3  # of a step's grids lie where a sampling step of the model's own leads
THING_WEIGHT = 2.0  # what a token of a thing counts beyond one of floor or wall
PATTERN_WEIGHT = 1.0  # what stripes, spots, checkers and planks count beyond plain surfaces
CLASS_WEIGHT = 0.1  # what naming the classes counts beside the velocity
CLASS_BLOCK = 1  # the single block whose states name them: the later ones are left to paint
CLASSES = (len(NOUNS), len(COLOURS), len(SURFACES))
SHOWN, SHOWN_STEPS = 12, 10  # strips of a sheet of samples, and their steps
UNSEEN = 90_000_000  # index of the first bundle that is shown and never trained on
FIRST_PARTS = 20  # files of the bank to wait for


def new_transformer(cell: int, deviation: Tensor) -> FluxTransformer2DModel:
    """FLUX's transformer in small, started so that it learns grids in little time.

    cell: pixels of a side. deviation: (64,) of each latent value of a token over the bank.
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
            look_aside(block.attn, head=0, columns=-cell // CELL_STEP)
            look_aside(block.attn, head=1, columns=cell // CELL_STEP)
        look_aside(transformer.transformer_blocks[0].attn, head=2, columns=0)
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


def look_further(transformer: FluxTransformer2DModel, tokens: int) -> None:
    """Have the heads that look one cell aside look `tokens` further, for cells that much wider."""
    width, at = sum(AXES), sum(AXES[:2])
    half = AXES[2] // 2
    speed = 10_000 ** (-torch.arange(half) / half)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for head, sign in ((0, -1), (1, 1)):
            turn = speed * sign * tokens
            rows = slice(head * width + at, (head + 1) * width)
            for values in (block.attn.to_q.weight.data, block.attn.to_q.bias.data):
                cos, sin = (
                    f(turn).view(-1, *[1] * (values.ndim - 1)) for f in (torch.cos, torch.sin)
                )
                a, b = values[rows][0::2].clone(), values[rows][1::2].clone()
                values[rows][0::2] = a * cos - b * sin
                values[rows][1::2] = a * sin + b * cos


class Net(nn.Module):
    """The transformer, and while it is trained a linear layer that names what it shows.

    The layer names what each square of every cell shows, from states halfway: the transformer
    learns at once which word speaks of which thing, as with the features of REPA (Yu et al. 2024,
    arXiv 2410.06940), here with what the scenes know exactly.
    """

    def __init__(self, cell: int, deviation: Tensor) -> None:
        super().__init__()
        self.transformer = new_transformer(cell, deviation)
        self.naming = nn.Linear(WIDTH, 16 * sum(CLASSES))
        self.halfway = torch.empty(0)
        self.times: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        block = self.transformer.single_transformer_blocks[CLASS_BLOCK]
        block.register_forward_hook(lambda _, __, states: setattr(self, "halfway", states[1]))
        embed = self.transformer.time_text_embed
        plain = embed.forward
        # in half precision the model would round times before it takes their sines
        embed.forward = lambda _, __, pooled: plain(*self.times, pooled)

    def forward(
        self, tokens: Tensor, t: Tensor, guidance: Tensor, ids: Tensor, text: Tensor, pooled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity (b n 64) and the names of 16 squares a token (b n 16 classes)."""
        dtype = self.naming.weight.dtype
        self.times = 1000 * t, 1000 * guidance
        velocity = self.transformer(
            hidden_states=tokens.to(dtype),
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled.to(dtype),
            encoder_hidden_states=text.to(dtype),
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=ids,
            return_dict=False,
        )[0]
        return velocity, rearrange(self.naming(self.halfway), "b n (s k) -> b n s k", s=16)


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


def draw_times(size: int, device: torch.device) -> Tensor:
    """Half uniform, half logit-normal around 0.82: what an image shows is decided in the noise.

    FLUX's logit-normal around 0.5 draws 8 % of times above 0.8; a small model trained on it knew
    shapes to copy and no colours.
    """
    noisy = torch.sigmoid(1.5 + torch.randn(size, device=device))
    uniform = torch.rand(size, device=device)
    return torch.where(torch.rand(size, device=device) < 0.5, noisy, uniform)


class Trainer:
    """Weights, their average, the optimiser, and one step for each shape of grids."""

    def __init__(self, plan: Plan, net: Net, bank: Bank) -> None:
        self.plan, self.bank, self.device = plan, bank, plan.device
        self.net = net.to(self.device)
        self.names, self.weights = zip(*net.named_parameters(), strict=True)
        self.half = self.device.type == "cuda"
        self.masters = [w.detach().clone() if self.half else w.data for w in self.weights]
        if self.half:
            net.bfloat16()
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        self.average = [master.clone() for master in self.masters]
        self.fade = torch.zeros((), device=self.device)  # of the average's own part
        self.errors = torch.zeros(4, device=self.device)  # sums and counts, see `take_errors`
        self.is_matrix = [
            "_blocks." in name and name.endswith("weight") and w.ndim == 2 and ".norm" not in name
            for name, w in zip(self.names, self.weights, strict=True)
        ]
        self.optimiser = Optimiser(
            self.matrices(self.masters), self.others(self.masters), scale=like_adamw
        )
        self.ids = {
            (rows, kind[0]): packing.position_ids([(plan.cell, kind[0] * plan.cell)] * rows).to(
                self.device
            )
            for rows, kind in ODDS
        }
        self.graphs: dict[tuple[int, Kind], torch.cuda.CUDAGraph] = {}
        self.steps, self.grids = 0, 0

    def matrices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for t, is_matrix in zip(tensors, self.is_matrix, strict=True) if is_matrix]

    def others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for t, is_matrix in zip(tensors, self.is_matrix, strict=True) if not is_matrix]

    def size(self, rows: int, kind: Kind) -> int:
        """Grids of a step of this shape."""
        tokens = rows * kind[0] * self.plan.tokens**2
        return max(round(self.plan.batch * TOKENS / tokens), LEAST)

    def compute(self, rows: int, kind: Kind) -> None:
        """A whole step: drawn, led, learnt from. Only tensors of fixed shapes on the device."""
        size, device = self.size(rows, kind), self.device
        drawn = self.bank.draw(rows, kind, size)
        ids = self.ids[rows, kind[0]]
        noise, t = torch.randn_like(drawn.clean), draw_times(size, device)
        guided = torch.rand(size, device=device) < 0.5
        guidance = 1 + 39 * torch.rand(size, device=device) * guided
        start = timesteps.earlier(t, torch.rand(size, 2, device=device))
        led = max(round(LED * size), 1)
        own = (torch.arange(size, device=device) < led) & drawn.settled & (t > NEAREST)
        mask = drawn.mask[..., None].expand(-1, -1, 256)

        def inputs(x: Tensor, count: int) -> Tensor:
            return torch.cat([x[:count], drawn.seen[:count], mask[:count]], dim=-1)

        at = flow.interpolate(drawn.clean, noise, start)
        with torch.no_grad():
            few = (start, guidance)
            guess, _ = self.net(
                inputs(at, led),
                *(part[:led] for part in few),
                ids,
                drawn.text[:led],
                drawn.pooled[:led],
            )
            at[:led] += (t - start)[:led, None, None] * guess.float()
        is_own = own[:, None, None]
        noisy = torch.where(is_own, at, flow.interpolate(drawn.clean, noise, t))
        predicted, names = self.net(inputs(noisy, size), t, guidance, ids, drawn.text, drawn.pooled)
        target = torch.where(
            is_own,
            flow.velocity_to(drawn.clean, at, t.clamp(min=NEAREST)),
            flow.velocity(drawn.clean, noise),
        )
        weight = weights_of(drawn.mask, drawn.classes, unsettled=own & drawn.fresh)
        error = flow.velocity_error(predicted, target, weight).mean()
        named = naming_error(names.float(), drawn.classes)
        (error + CLASS_WEIGHT * named).backward()
        with torch.no_grad():
            every = flow.velocity_error(predicted, target, drawn.mask)
            sums = [(every * ~own).sum(), (~own).sum(), named, torch.ones_like(named)]
            self.errors += torch.stack(sums)
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        gradients = [weight.grad for weight in self.weights]
        torch._foreach_copy_(self.gradients, gradients)
        torch._foreach_zero_(gradients)
        # 256 equal inputs say that a token is hidden: their weights would move together, 256 times
        # as fast as one. What they say at the start is enough.
        self.gradients[self.names.index("transformer.x_embedder.weight")][:, 128:] = 0
        clip(self.gradients, LARGEST)
        self.optimiser.step(self.matrices(self.gradients), self.others(self.gradients))
        gaps = torch._foreach_sub(self.masters, self.average)
        torch._foreach_mul_(gaps, 1 - self.fade)
        torch._foreach_add_(self.average, gaps)
        if self.half:
            torch._foreach_copy_(list(self.weights), self.masters)

    def step(self, rows: int, kind: Kind, rate: float) -> None:
        """One step at a part `rate` (0..1) of the learning rate."""
        warm = min(1.0, (self.steps + 1) / WARM_UP)
        largest = LEARNING_RATE * self.plan.batch**0.5
        self.optimiser.rate.fill_(largest * rate * warm)
        self.fade.fill_(min(AVERAGE, (self.steps + 1) / (self.steps + 20)))
        if (rows, kind) in self.graphs:
            self.graphs[rows, kind].replay()
        else:
            self.compute(rows, kind)
        self.steps += 1
        self.grids += self.size(rows, kind)

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, by name; the tensors themselves."""
        masters = zip(self.names, self.masters, strict=True)
        averages = zip(self.names, self.average, strict=True)
        return {
            **{f"weight.{name}": tensor for name, tensor in masters},
            **{f"average.{name}": tensor for name, tensor in averages},
            **{f"optimiser.{name}": tensor for name, tensor in self.optimiser.state().items()},
            "errors": self.errors,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        if self.half:
            torch._foreach_copy_(list(self.weights), self.masters)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Steps inside leave no trace."""
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        try:
            yield
        finally:
            self.restore(before)

    def capture(self) -> None:
        """Make each shape's step a CUDA graph. Kernels of cuDNN's attention are kept out: their
        backward pass is wrong for one of FLUX's layouts (docs/gpu.md)."""
        torch.backends.cuda.enable_cudnn_sdp(False)
        pool: Any = None
        with self.unchanged():
            for rows, kind in ODDS:
                beside = torch.cuda.Stream()
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    self.compute(rows, kind)
                    self.compute(rows, kind)
                torch.cuda.current_stream().wait_stream(beside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.compute(rows, kind)
                pool = pool or graph.pool()
                self.graphs[rows, kind] = graph

    def take_errors(self) -> dict[str, float]:
        """Mean errors since the last call: of the velocity on hidden tokens of grids on the
        straight line, and of naming."""
        velocity, lines, named, steps = self.errors.tolist()
        self.errors.zero_()
        return {
            "target_error": round(velocity / max(lines, 1), 4),
            "naming_error": round(named / max(steps, 1), 4),
        }


def weights_of(mask: Tensor, classes: Tensor, *, unsettled: Tensor) -> Tensor:
    """What each token counts (b n). unsettled: (b), grids in which nothing tells how the pattern
    of a thing is turned; a step of the model's own cannot know it, and would be taught the mean."""
    thing = classes[..., 0] < len(SHAPES)
    patterned = (classes[..., 2] > 0) & (classes[..., 2] < len(SURFACES))
    worth = 1 + THING_WEIGHT * thing.float().mean(-1) + PATTERN_WEIGHT * patterned.float().mean(-1)
    weight = (mask + CONTEXT_WEIGHT * (1 - mask)) * worth
    unknown = (thing & patterned).any(dim=-1) & unsettled[:, None] & (mask > 0)
    return torch.where(unknown, 0.0, weight)


# Samples


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Grids of one row of two columns. pixels: (b 3 h w) in -1..1. hidden: (b 2). text, pooled: as
    of `Draw`, of prompts that say all there is to say."""

    pixels: Tensor
    hidden: Tensor
    text: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, at: slice) -> Strips:
        return Strips(**{name: tensor[at] for name, tensor in vars(self).items()})


@torch.no_grad()
def strips_of(plan: Plan, bank: Bank, count: int, first: int) -> Strips:
    """`count` strips that no part of the bank holds, whose answers are settled."""
    writer, found = Writer(plan), []
    index = first
    while len(found) < count:
        made = writer.rows(index)
        index += 1
        if made is not None and made[0] == 2 and not made[1]["open"] and not made[1]["coded"]:
            rows = made[1]
            found += [
                (rows["strips"][last], rows["hidden"][last], rows["t5"][last], rows["clip"][last])
                for last in range(ROWS)
                if rows["said"][last]
            ]
    pixels, hidden, t5, clip_ids = (
        torch.from_numpy(np.stack(part)).to(plan.device)
        for part in zip(*found[:count], strict=True)
    )
    return Strips(
        pixels=pixels.float() / 127.5 - 1,
        hidden=hidden,
        text=bank.t5(t5.long()).last_hidden_state,
        pooled=bank.clip(clip_ids.long()).pooler_output,
    )


@torch.no_grad()
def complete(
    plan: Plan, net: Net, bank: Bank, strips: Strips, *, start: float, steps: int
) -> Tensor:
    """Latents (b 16 h w) of `strips` that the transformer completes, from so much noise on."""
    size = len(strips)
    clean = bank.encode(strips.pixels)
    side = plan.tokens
    column = torch.arange(2 * side * side, device=plan.device) % (2 * side) // side
    mask = strips.hidden[:, column].float()
    seen = torch.where(mask[..., None] > 0, bank.blank, clean)
    hidden = mask[..., None].expand(-1, -1, 256)
    ids = packing.position_ids([(plan.cell, 2 * plan.cell)]).to(plan.device)
    draw = torch.Generator(plan.device).manual_seed(plan.seed)
    noise = torch.randn(clean.shape, device=plan.device, generator=draw)
    one = torch.ones(size, device=plan.device)
    found = denoise(
        lambda x, t: net(
            torch.cat([x, seen, hidden], dim=-1),
            t.to(plan.device) * one,
            one,
            ids,
            strips.text,
            strips.pooled,
        )[0],
        flow.interpolate(clean, noise, start * one),
        torch.linspace(start, 0, 1 + steps),
    )
    return packing.unpack(found, [(plan.cell, 2 * plan.cell)])[0]


def show(path: Path, strips: Tensor, truth: Tensor) -> None:
    """A sheet: what was made above what is true, strip for strip (b 3 h w in -1..1)."""
    path.parent.mkdir(exist_ok=True)
    pairs = torch.cat([strips.float().cpu().clamp(-1, 1), truth.cpu()], dim=2)
    sheet = rearrange(pairs, "(b a) c h w -> (b h) (a w) c", a=3 if len(pairs) % 3 == 0 else 1)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(path)


# The stage


def averaged(plan: Plan) -> Net:
    """The transformer with its averaged weights, in float32."""
    found = kept(plan, STAGE)
    if found is None:
        refuse(f"{plan.state(STAGE)} is not there; run the stage {STAGE} first")
    net = Net(plan.cell, torch.ones(64))
    net.load_state_dict(of_average(found[0]))
    return net.to(plan.device).eval().requires_grad_(False)


def of_average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "average."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def open_bank(plan: Plan) -> Bank:
    """An empty bank with the output's VAE and text encoders."""

    def frozen(part: Any, name: str) -> Any:
        return part.from_pretrained(plan.output / name).float().to(plan.device).eval()

    length = T5Tokenizer.from_pretrained(plan.output / "tokenizer_2").model_max_length
    encoders = frozen(T5EncoderModel, "text_encoder_2"), frozen(CLIPTextModel, "text_encoder")
    bank = Bank(plan, frozen(AutoencoderKL, "vae"), *encoders, length)
    for part in (bank.vae, bank.t5, bank.clip):
        part.requires_grad_(False)
    return bank


def first_net(plan: Plan, bank: Bank) -> Net:
    """From `output/start`, another base's transformer, where that is there; else from nothing."""
    start = plan.output / "start"
    some = [data["clean"][: max(min(bank.seen[kind], 250), 1)] for kind, data in bank.data.items()]
    deviation = torch.cat([one.float().flatten(0, 2) for one in some]).std(dim=0)
    net = Net(plan.cell, deviation.clamp(min=1e-3).cpu())
    if start.is_dir():
        other = FluxTransformer2DModel.from_pretrained(start, torch_dtype=torch.float32)
        net.transformer.load_state_dict(other.state_dict())
        cell = int((start / "cell").read_text())
        look_further(net.transformer, (plan.cell - cell) // CELL_STEP)
    return net


def make(plan: Plan) -> None:
    """Train for the plan's minutes, from where the last sitting ended."""
    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False  # the encoder lives on differences of large constants
    bank = open_bank(plan)
    before, earlier = kept(plan, STAGE), last_note(plan, STAGE)
    with rendering(plan):
        wait_for(plan, FIRST_PARTS)
        bank.refresh()
        trainer = Trainer(plan, first_net(plan, bank), bank)
        if before is not None:
            trainer.restore(before[0])
            trainer.steps, trainer.grids = before[1]["steps"], before[1]["grids"]
            torch.manual_seed(plan.seed + trainer.steps)
        if trainer.half:
            trainer.capture()
        train(plan, trainer, minutes=float(earlier.get("minutes", 0)))


def train(plan: Plan, trainer: Trainer, *, minutes: float) -> None:
    """The loop of one sitting. minutes: of the sittings before."""
    bank, shown = trainer.bank, Net(plan.cell, torch.ones(64)).to(plan.device).eval()
    strips = strips_of(plan, bank, SHOWN, UNSEEN)
    reader, sitting = Reader(bank), Sitting(plan, STAGE)
    shapes, odds = list(ODDS), np.array(list(ODDS.values()))

    def note() -> None:
        if not trainer.errors[-1]:  # no step since the last line
            return
        facts = {"samples": trainer.grids, **trainer.take_errors(), "steps": trainer.steps}
        spent = round(minutes + sitting.spent / 60, 2)
        sitting.note(facts | {"minutes": spent, "bundles": len(bank)})
        if not np.isfinite(facts["target_error"]):
            refuse(f"the error is not finite; {plan.state(STAGE)} is the state before")

    def save() -> None:
        keep(plan, STAGE, trainer.state(), {"steps": trainer.steps, "grids": trainer.grids})

    def look() -> None:
        tensors = of_average(trainer.state())
        shown.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        latents = complete(plan, shown, bank, strips, start=1.0, steps=SHOWN_STEPS)
        made = bank.vae.decode(latents).sample
        show(plan.output / "samples" / f"{trainer.grids:010d}.png", made, strips.pixels)

    reader.start()
    try:
        for _ in sitting:
            rng = np.random.default_rng([plan.seed, trainer.steps])
            rows, kind = shapes[rng.choice(len(shapes), p=odds / odds.sum())]
            if not bank.seen[kind]:
                rows, kind = shapes[0]
            trainer.step(rows, kind, sitting.rate)
            if sitting.due("noted", NOTED_EVERY):
                reader.check()
                note()
            if sitting.due("saved", KEPT_EVERY):
                save()
            if sitting.due("shown", SHOWN_EVERY):
                look()
        note()
        save()
        look()
    finally:
        reader.stop()
