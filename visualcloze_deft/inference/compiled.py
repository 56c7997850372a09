"""Examples of a task, run once: a safetensors file that answers queries in their place.

The file holds the keys and values of the examples in every layer, see `base.Part`, and their
pictures. Its header says what they were computed with: another model, adapter or resolution is
refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from visualcloze_deft.backbones import tensor_files
from visualcloze_deft.backbones.base import Part
from visualcloze_deft.config.sameness import differences
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import opened
from visualcloze_deft.inference.fingerprints import NAMED, as_named
from visualcloze_deft.storage.atomic import atomic_write
from visualcloze_deft.storage.tensor_headers import read_texts

Storage = Literal["model", "fp8", "int8"]
LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
KINDS: Mapping[Storage, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
SCALE_BYTES = 4
SCALE = ".scale"  # after the names of tensors in 8 bits
ABOUT, ABOUT_HASH, HASH = "vcdeft_compiled", "vcdeft_compiled_sha256", "sha256"  # header texts
COMPARED = (*NAMED, "quantise", "clip_text", "cells", "resolution", "guidance")
"""Of `Compiled.made_with`: what answers must have in common with it."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """rows: the pictures of the examples. targets: the columns that a query asks for unless it says
    others. made_with: see `COMPARED`, and the names of model and adapters. key: of the examples,
    see `example_parts.key_of`. part: None where it is not read yet."""

    rows: tuple[tuple[Image.Image, ...], ...]
    task: str | None
    task_prompt: str
    targets: tuple[int, ...]
    made_with: Mapping[str, Any]
    key: str
    part: Part | None

    def save(self, path: str | Path, *, storage: Storage = "model") -> float:
        """Write the file; returns how far keys and values in it are off, as a share of their root
        mean square. storage: "model", their own precision; "fp8" or "int8", with a scale for each
        head of each token. Raises `UserError` where the file cannot be written."""
        if storage not in get_args(Storage):
            raise UserError(f"storage {storage!r}: give one of {', '.join(get_args(Storage))}")
        if self.part is None:
            raise UserError("compiled examples in use: save what compile_examples() gave")
        tensors: dict[str, Tensor] = {}
        off, size = 0.0, 0.0
        for layer, pair in self.part.items():
            for name, tensor in zip(("keys", "values"), pair, strict=True):
                kept = tensor.contiguous().cpu()
                if storage == "model":
                    tensors[f"{layer}.{name}"] = kept
                    continue
                stored, exact = reduced(kept, KINDS[storage]), kept.float()
                tensors |= {f"{layer}.{name}{more}": one for more, one in stored.items()}
                off += float((restored(stored) - exact).square().sum())
                size += float(exact.square().sum())
        pictures = {f"picture.{r}.{c}": image for r, c, image in self._pictures()}
        tensors |= {name: as_bytes(image) for name, image in pictures.items()}
        about = json.dumps(
            {
                "format": FORMAT,
                "task": self.task,
                "task_prompt": self.task_prompt,
                "targets": self.targets,
                "rows": len(self.rows),
                "columns": len(self.rows[0]),
                "layers": list(self.part),
                "dtype": str(next(iter(self.part.values()))[0].dtype).removeprefix("torch."),
                "storage": storage,
                "key": self.key,
                "made_with": dict(self.made_with),
            }
        )
        texts = {ABOUT: about, ABOUT_HASH: hashlib.sha256(about.encode()).hexdigest()}
        place = Path(path)
        atomic_write(
            place, lambda staged: tensor_files.save(tensors, staged, texts, hashes={HASH: ""})
        )
        return (off / size) ** 0.5 if size else 0.0

    def _pictures(self) -> list[tuple[int, int, Image.Image]]:
        return [(r, c, image) for r, row in enumerate(self.rows) for c, image in enumerate(row)]

    def before(
        self, rows: Sequence[Sequence[Any]], keys: Mapping[str, Any]
    ) -> tuple[list[Sequence[Any]], dict[str, Any]]:
        """A query row below these examples, and the keys of its grid with their task. Raises
        `UserError` where it brings other rows, or says another task."""
        if len(rows) != 1:
            raise UserError(
                f"{len(rows)} rows: the examples are compiled; give the query row alone"
            )
        own = {"task": self.task, "task_prompt": self.task_prompt}
        for name, value in own.items():
            if keys.get(name) not in (None, value):
                raise UserError(
                    f"{name} {keys[name]!r}: the compiled examples have {value!r}; leave it out"
                )
        return [*self.rows, *rows], {**keys, **own}

    def check_made_with(self, other: Mapping[str, Any], *, where: str) -> None:
        """Raise `UserError` where a model is another than the one that computed this."""
        mine = {name: self.made_with.get(name) for name in COMPARED}
        theirs = {name: other.get(name) for name in COMPARED}
        for one in differences(mine, theirs):
            name = NAMED.get(one.name, one.name)
            was, now = self.made_with.get(name), other.get(name)
            if was == now:  # another file of the same name
                raise UserError(
                    f"{where}: {name} {as_named(now)} has changed since; compile the examples anew"
                )
            raise UserError(
                f"{where}: compiled with {name} {as_named(was)}, asked for is {as_named(now)}; "
                "give the same, or compile the examples anew"
            )


def reduced(tensor: Tensor, kind: torch.dtype) -> dict[str, Tensor]:
    """(..., d) in 8 bits, and the (..., 1) scale of each last axis."""
    exact, most = tensor.float(), LARGEST[kind]
    scale = exact.abs().amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    scale /= most
    small = exact / scale
    return {"": (small.round() if kind == torch.int8 else small).to(kind), SCALE: scale}


def restored(stored: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `reduced`, in float32."""
    whole = stored[""].float()
    return whole * stored[SCALE] if SCALE in stored else whole


def as_bytes(image: Image.Image) -> Tensor:
    """A picture as the bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())


def is_compiled(path: Path) -> bool:
    """Whether a file says that it is one of compiled examples, whole or not."""
    return ABOUT in read_texts(path)


def read_compiled(path: Path, *, whole: bool = True) -> Compiled:
    """A file that `Compiled.save` wrote. whole: also its keys and values.

    Raises `UserError` where it is none, damaged or truncated.
    """
    texts = read_texts(path)
    about, found = texts.get(ABOUT), texts.get(HASH, "")
    if about is None:
        raise UserError(f"{path}: no compiled examples of vcdeft; write them with 'vcdeft compile'")
    if hashlib.sha256(about.encode()).hexdigest() != texts.get(ABOUT_HASH):
        raise UserError(damaged(path))
    if tensor_files.content_hash(path) != found:
        raise UserError(damaged(path))
    try:
        says = json.loads(about)
        if says["format"] != FORMAT:
            raise UserError(f"{path}: of another version of vcdeft; compile the examples anew")
        names = [[f"picture.{r}.{c}" for c in range(says["columns"])] for r in range(says["rows"])]
        tensors = load_file(path) if whole else some_of(path, [n for row in names for n in row])
        rows = tuple(tuple(as_picture(tensors[name], path) for name in row) for row in names)
        part = part_of(tensors, says["layers"], says["dtype"]) if whole else None
        return Compiled(
            rows=rows,
            task=says["task"],
            task_prompt=says["task_prompt"],
            targets=tuple(says["targets"]),
            made_with=says["made_with"],
            key=says["key"],
            part=part,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{damaged(path)} ({error})") from None


def damaged(path: Path) -> str:
    return f"{path}: damaged; compile the examples anew"


def some_of(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def as_picture(png: Tensor, path: Path) -> Image.Image:
    """The inverse of `as_bytes`."""
    with opened(path, png.numpy().tobytes()) as image:
        return image.convert("RGB")


def part_of(tensors: Mapping[str, Tensor], layers: Sequence[str], dtype: str) -> Part:
    """The keys and values in a file, in the precision that they were computed in."""

    def whole(name: str) -> Tensor:
        stored = {more: tensors[name + more] for more in ("", SCALE) if name + more in tensors}
        return restored(stored).to(getattr(torch, dtype))

    return {layer: (whole(f"{layer}.keys"), whole(f"{layer}.values")) for layer in layers}
