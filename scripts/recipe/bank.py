"""The bundles that the transformer learns from, encoded and on its device.

Parts that processes render are read by a thread, and on a GPU encoded on a stream of its own: the
training loop reads no file and waits for none.
Axes: k bundle, r row, q column, n token of a strip, v variant of the text, c channel, b grid.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from recipe.bundles import MOST_ROWS, ROWS, VARIANTS, read
from recipe.stage import Plan
from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.grids import grid

ROOM = {(2, 0): 0.41, (2, 1): 0.24, (3, 0): 0.22, (3, 1): 0.13}  # columns, coded: of all bundles
PAUSE = 0.1  # seconds between two looks at the folder

Kind = tuple[int, int]
"""Columns, and 1 where a secret is told by examples alone."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Grids of one shape. clean, seen: (b n 64). mask: (b n), 1 where hidden. classes: (b n 16 3).
    settled: (b), whether what is shown and said tells the answer. fresh: (b), see `Writer`. text:
    (b tokens width). pooled: (b width)."""

    clean: Tensor
    seen: Tensor
    mask: Tensor
    classes: Tensor
    settled: Tensor
    fresh: Tensor
    text: Tensor
    pooled: Tensor


class Bank:
    """As many bundles of each kind as there is room for; then new ones take the places of old."""

    def __init__(
        self, plan: Plan, vae: AutoencoderKL, t5: T5EncoderModel, clip: CLIPTextModel, length: int
    ) -> None:
        self.plan, self.vae, self.t5, self.clip = plan, vae, t5, clip
        self.device = plan.device
        self.known: set[str] = set()
        self.data: dict[Kind, dict[str, Tensor]] = {}
        self.count: dict[Kind, Tensor] = {}  # on the device, so that a captured step reads it
        self.seen = dict.fromkeys(ROOM, 0)  # how many have come, also those that have gone
        side, width = plan.tokens, t5.config.d_model
        for (columns, coded), share in ROOM.items():
            room = max(round(share * plan.bundles), ROWS)
            n, v = side * columns * side, len(VARIANTS)
            shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                "clean": ((ROWS, n, 64), torch.half),
                "hidden": ((ROWS, columns), torch.bool),
                "classes": ((ROWS, n, 16, 3), torch.uint8),
                "said": ((v,), torch.bool),
                "open": ((), torch.bool),
                "fresh": ((ROWS,), torch.bool),
                "text": ((v, length, width), torch.half),
                "pooled": ((v, width), torch.half),
            }
            self.data[columns, coded] = {
                name: torch.zeros(room, *shape, dtype=dtype, device=self.device)
                for name, (shape, dtype) in shapes.items()
            }
            self.count[columns, coded] = torch.ones((), device=self.device)
        with torch.no_grad():
            blank = torch.full((1, 3, plan.cell, 2 * plan.cell), grid.BLANK, device=self.device)
            self.blank = self.encode(blank)[0, 0].clone()

    def encode(self, pixels: Tensor) -> Tensor:
        """(b 3 h w) in -1..1 to tokens (b n 64)."""
        latents = self.vae.encode(pixels).latent_dist.mode()
        return packing.pack(
            (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        )

    def __len__(self) -> int:
        return sum(self.seen.values())

    @torch.no_grad()
    def add(self, part: dict[str, Tensor]) -> None:
        strips = part["strips"].to(self.device)
        bundles, columns = len(strips), part["hidden"].shape[-1]
        shape = (bundles, len(VARIANTS))
        t5, clip = (part[name].to(self.device).long().flatten(0, 1) for name in ("t5", "clip"))
        found = {name: part[name].to(self.device) for name in ("hidden", "classes", "said")}
        found |= {name: part[name].to(self.device) for name in ("open", "fresh")}
        found["clean"] = self.encode(strips.flatten(0, 1).float() / 127.5 - 1).unflatten(
            0, (bundles, ROWS)
        )
        found["text"] = self.t5(t5).last_hidden_state.unflatten(0, shape)
        found["pooled"] = self.clip(clip).pooler_output.unflatten(0, shape)
        for coded in (0, 1):
            kind = (columns, coded)
            room = len(self.data[kind]["clean"])
            chosen = torch.nonzero(part["coded"] == bool(coded)).flatten()[:room]
            if len(chosen):
                places = (self.seen[kind] + torch.arange(len(chosen))) % room
                places, chosen = places.to(self.device), chosen.to(self.device)
                for name, into in self.data[kind].items():
                    into[places] = found[name][chosen].to(into.dtype)
                self.seen[kind] += len(chosen)
                self.count[kind].fill_(min(self.seen[kind], room))

    def refresh(self) -> int:
        """Take in the parts that have arrived; how many."""
        fresh = sorted(
            path for path in self.plan.bank.glob("[0-9]*.npz") if path.name not in self.known
        )
        for path in fresh:
            self.known.add(path.name)
            self.add(read(path))
        return len(fresh)

    def draw(self, rows: int, kind: Kind, size: int) -> Draw:
        """`size` grids of `rows` rows, drawn on the device: nothing of it waits for the host."""
        data, device, side = self.data[kind], self.device, self.plan.tokens
        columns = kind[0]
        pick = (torch.rand(size, device=device) * self.count[kind]).long()
        order = torch.rand(size, ROWS, device=device).argsort(dim=1)[:, :rows]
        last = order[:, -1]
        clean = data["clean"][pick[:, None], order].float()
        column = torch.arange(side * columns * side, device=device) % (side * columns) // side
        mask = torch.zeros(clean.shape[:3], device=device)
        mask[:, -1] = data["hidden"][pick, last][:, column].float()
        variant = (rows - 1) * ROWS + last
        return Draw(
            clean=clean.flatten(1, 2),
            seen=torch.where(mask[..., None] > 0, self.blank, clean).flatten(1, 2),
            mask=mask.flatten(1, 2),
            classes=data["classes"][pick[:, None], order].flatten(1, 2),
            settled=data["said"][pick, variant] & ~data["open"][pick],
            fresh=data["fresh"][pick, last],
            text=data["text"][pick, variant],
            pooled=data["pooled"][pick, variant],
        )


class Reader(threading.Thread):
    """Calls `Bank.refresh` beside the training loop until `stop` is called."""

    def __init__(self, bank: Bank) -> None:
        super().__init__(daemon=True)
        self.bank = bank
        self.stopped = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        cuda = self.bank.device.type == "cuda"
        beside: AbstractContextManager[object] = nullcontext()
        if cuda:
            beside = torch.cuda.stream(torch.cuda.Stream())
        try:
            with beside:
                while not self.stopped.wait(PAUSE):
                    self.bank.refresh()
        except BaseException as error:  # said by the loop, see `check`
            self.error = error

    def check(self) -> None:
        """Raise what ended the thread."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self.stopped.set()
        self.join()


assert len(VARIANTS) == MOST_ROWS * ROWS
