"""Encodings on disk: what encoders made of their inputs, by content and by encoder.

DIR/3f/3fa9....safetensors   one encoding, under the key of its input and of the encoder

An encoding has the encoder's dtype. Its file holds a checksum: one that a crash cut short or a disk
changed is taken for absent and made again.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from visualcloze_deft.errors import UserError, writing
from visualcloze_deft.storage.atomic import atomic_write

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Used:
    """Inputs that needed no encoding, those that were encoded, and entries that were of no use.

    >>> print(Used(found=3, made=1) + Used(made=1, damaged=1))
    3 found, 2 made, 1 entries were damaged
    """

    found: int = 0
    made: int = 0
    damaged: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(
            found=self.found + other.found,
            made=self.made + other.made,
            damaged=self.damaged + other.damaged,
        )

    def __str__(self) -> str:
        damaged = f", {self.damaged} entries were damaged" if self.damaged else ""
        return f"{self.found} found, {self.made} made{damaged}"


class Encodings:
    """A folder of encodings, which processes and runs may share, also at the same time.

    used: what came of it in this process. storing: whether the disk takes entries.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet."""
        self.folder = folder
        self.storing = True
        self.used = Used()
        self._fingerprints: dict[tuple[nn.Module, torch.dtype], str] = {}

    def used_by_all(self) -> Used:
        """`used` of all processes together; each must call it."""
        return sum(gather_object([self.used]), Used())

    def through(
        self, network: nn.Module, inputs: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The encodings (b, ...) of `inputs` (b, ...) by `network`, on the CPU.

        encode: of the inputs that have no entry, each once; it is not called where all have one.
        What it makes is stored. To give the same whatever else is encoded with an input, it must
        encode them one by one.
        """
        keys = [self.key(network, one) for one in inputs]
        known = {key: self.read(key) for key in keys}
        lacking = [key for key, entry in known.items() if entry is None]
        self.used += Used(found=len(keys) - len(lacking), made=len(lacking))
        if lacking:
            made = encode(torch.stack([inputs[keys.index(key)] for key in lacking])).cpu()
            for key, encoding in zip(lacking, made, strict=True):
                known[key] = encoding
                self.write(key, encoding)
        return torch.stack([entry for key in keys if (entry := known[key]) is not None])

    def key(self, network: nn.Module, one: Tensor) -> str:
        """SHA-256 in hex of the encoder's fingerprint and of one input: dtype, shape and bytes."""
        return digest(self.name_of(network), one).hex()

    def name_of(self, network: nn.Module) -> str:
        """The fingerprint of a network, taken once: it is not to be trained. Asked for before its
        weights are offloaded, it is known afterwards."""
        known = network, next(network.parameters()).dtype
        if known not in self._fingerprints:
            self._fingerprints[known] = self.fingerprint(network)
        return self._fingerprints[known]

    def fingerprint(self, network: nn.Module) -> str:
        return fingerprint(network)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def read(self, key: str) -> Tensor | None:
        """The entry of `key`; None where it is not there, cannot be read or is damaged."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        try:
            tensors = load(content)
            encoding = tensors["encoding"]
            if bytes(tensors["sha256"].tolist()) == digest(key, encoding):
                return encoding
        except (SafetensorError, KeyError, ValueError, TypeError):
            pass
        self.used += Used(damaged=1)
        return None

    def write(self, key: str, encoding: Tensor) -> None:
        """Store an entry whole or not at all. Where the disk does not let it, say so once and store
        no more: what is found is still used.

        It is not forced to disk: what a loss of power leaves of it, the checksum tells.
        """
        if not self.storing:
            return
        encoding, path = encoding.contiguous(), self.path(key)
        checksum = torch.tensor(list(digest(key, encoding)), dtype=torch.uint8)
        content = save({"encoding": encoding, "sha256": checksum})
        try:
            with writing(self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda staged: staged.write_bytes(content))
        except UserError as error:
            self.storing = False
            tqdm.write(f"encodings {error}; going on without storing more")


class Recent(Encodings):
    """The latest encodings in memory, over those of a folder where one is given.

    A pipeline asks for the same example rows and sentences again and again.
    """

    def __init__(self, folder: Path | None = None, *, most: int = 256 << 20) -> None:
        """most: bytes that are kept in memory; what was not asked for longest goes first."""
        super().__init__(folder or Path())
        self.on_disk = folder is not None
        self.most = most
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def fingerprint(self, network: nn.Module) -> str:
        """Without a folder a name of its own: reading all weights would take seconds."""
        return super().fingerprint(network) if self.on_disk else uuid.uuid4().hex

    def read(self, key: str) -> Tensor | None:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        encoding = super().read(key) if self.on_disk else None
        if encoding is not None:
            self._hold(key, encoding)
        return encoding

    def write(self, key: str, encoding: Tensor) -> None:
        self._hold(key, encoding)
        if self.on_disk:
            super().write(key, encoding)

    def _hold(self, key: str, encoding: Tensor) -> None:
        self._held[key] = encoding.clone()  # not a view of the batch it came in
        while sum(tensor.nbytes for tensor in self._held.values()) > self.most:
            self._held.popitem(last=False)


def digest(name: str, tensor: Tensor) -> bytes:
    """SHA-256 of a name and of all that a tensor is."""
    told = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    told.update(whole.view(torch.uint8).numpy().data)
    return told.digest()


def fingerprint(network: nn.Module) -> str:
    """What tells an encoder from others: SHA-256 of its settings and of every weight in its dtype.

    All weights are read once, at the speed of SHA-256.
    """
    config: Any = network.config
    settings = dict(config) if isinstance(config, dict) else config.to_dict()
    told = hashlib.sha256(type(network).__name__.encode())
    # where it was loaded from and by what version makes no other encoder
    lasting = {n: v for n, v in settings.items() if n[0] != "_" and n != "transformers_version"}
    told.update(json.dumps(lasting, sort_keys=True, default=str).encode())
    if getattr(network, "use_tiling", False):  # of a VAE: seams change latents a little
        told.update(b"tiled")
    for name, weight in network.state_dict().items():
        told.update(digest(name, weight))
    return told.hexdigest()


def entries(folder: Path) -> Iterator[Path]:
    """The files of all encodings in a folder, whole or damaged."""
    return folder.glob(f"??/*{SUFFIX}")
