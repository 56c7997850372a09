"""Where memory runs out: how it shows, and how a sample is tried again while a run trains."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from visualcloze_deft.backbones.base import Encoders
from visualcloze_deft.errors import UserError

SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
TILE = 256  # pixels a side: the VAE then needs a seventh of its memory for three cells of 384

T = TypeVar("T")


class NoRoom(Exception):
    """A call ran out of memory twice, in this process or another; all processes raise it."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of a GPU or of the computer."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in SIGNS)


def short_of_memory(left_out: Sequence[str]) -> str:
    """What to say of a sheet that room was made for, and of the tasks that it lacks all the same.

    >>> short_of_memory(["depth-to-image"])
    'no memory for depth-to-image, also in tiles; left out, vcdeft plan shows what samples take'
    """
    if not left_out:
        return "memory ran out; made with the encoders in main memory and the VAE in tiles"
    return (
        f"no memory for {', '.join(left_out)}, also in tiles; left out, vcdeft plan shows what "
        "samples take"
    )


class Room:
    """Calls that may run out of memory, each tried twice.

    All processes make the same calls in the same order and agree after each whether it succeeded:
    none goes on alone. Under ZeRO-3 a call of the transformer gathers its weights from all
    processes, which would wait for one that fails inside: such a call is not tried again, and the
    failure ends the run.
    """

    def __init__(
        self,
        models: Encoders,
        *,
        split: bool = False,
        agree: Callable[[str | None], str | None] = lambda failure: failure,
    ) -> None:
        """split: whether the transformer's weights lie with several processes. agree: told what
        failed here, returns what failed first in any process."""
        self.models = models
        self.split = split
        self.agree = agree
        self.made = False

    def attempt(self, call: Callable[[], T], *, transformer: bool = False) -> T:
        """What `call` returns; where it runs out of memory, once more with room made for it.

        transformer: whether it calls the transformer. Raises `NoRoom` where it fails again.
        """
        if transformer and self.split:
            return self.undivided(call)
        for _ in range(2):
            found, failure = self.tried(call)
            failure = self.agree(failure)
            if failure is None:
                return found[0]
            found.clear()
            self.make()
        raise NoRoom(failure)

    def tried(self, call: Callable[[], T]) -> tuple[list[T], str | None]:
        """The one result, or none and what failed. Tensors of the frames that failed are free when
        this returns, as the error is."""
        try:
            return [call()], None
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return [], str(error).partition("\n")[0] or type(error).__name__

    def undivided(self, call: Callable[[], T]) -> T:
        found, failure = self.tried(call)
        if failure is not None:
            raise UserError(
                f"out of memory while sampling under --zero 3, where processes wait for each other "
                f"({failure}): go on with --resume and less of --batch, or with "
                "offload_encoders=true; vcdeft plan shows what samples take"
            )
        return found[0]

    def make(self) -> None:
        """Move the encoders to main memory, from where each comes while it works, let the VAE work
        in tiles, and give back what the allocator keeps."""
        self.made = True
        for network in self.models.frozen:
            network.to("cpu")
        vae = self.models.vae
        vae.enable_tiling()
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
        gc.collect()
        if self.models.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def put_back(room: Room) -> Iterator[Room]:
    """Afterwards the encoders lie where they lay, and the VAE works as it did."""
    vae = room.models.vae
    places = [next(network.parameters()).device for network in room.models.frozen]
    tiles = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
    try:
        yield room
    finally:
        for network, place in zip(room.models.frozen, places, strict=True):
            network.to(place)
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = tiles
