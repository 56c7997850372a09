"""What `vcdeft export` and `vcdeft import` do: adapters to and from what other tools read.

A DEFT or PaRa adapter is a LoRA with B = Q and A = s R - right^T W, so nothing is approximated.
What was written is read again, by the target's own loader where it is a dependency, and must give
the live adapter's output.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from peft import PeftModel
from torch import Tensor

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.headers import Format, date_of, header, notes_on
from visualcloze_deft.adapters.metadata import check_base, named
from visualcloze_deft.adapters.places import name_of
from visualcloze_deft.adapters.verify import (
    NOISE,
    ROUNDING,
    TOLERANCE,
    Report,
    answer,
    change_error,
    check,
    frozen,
    output_error,
    probe,
)
from visualcloze_deft.backbones import lora_files, lora_headers, lora_names, tensor_files
from visualcloze_deft.backbones.lora_names import Change
from visualcloze_deft.backbones.model_files import TINY
from visualcloze_deft.backbones.peft_files import WEIGHTS, read_metadata, weights_file
from visualcloze_deft.backbones.table import backbone_of, backbone_of_network
from visualcloze_deft.config.numbers import is_scale
from visualcloze_deft.errors import UserError, writing
from visualcloze_deft.paths import BASE
from visualcloze_deft.storage.adapter_places import CONFIG, TASKS, adapter_folder, task_folders_of
from visualcloze_deft.storage.atomic import output_folder, staged_at

FLUX_WIDTH = 3072  # diffusers' reader of kohya's names knows this width only
LARGE = 4 << 30  # bytes of weight files


def export(
    run: Path,
    output: Path,
    kind: Format,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    model: str | None = None,
    lora: str | None = None,
    verify: bool = True,
) -> Report:
    """Write the adapter of a run folder, or an adapter folder, to `output`.

    kind: "peft" and "merged" write a folder, the others a .safetensors file. scale: what the
    change counts, folded into it; 1 is the trained adapter. dtype: of the written LoRA (float32 by
    default) or merged transformer (the base's). model, lora: the base; those it was trained on
    where not named.
    Raises `UserError` where the adapter does not fit, something is in the way, or what was written
    is not the adapter; no file is left then.
    """
    if not is_scale(scale) or scale == 0:
        raise UserError(f"--scale {scale}: give a number other than 0 up to 1e6, e.g. 1")
    folder = adapter_folder(run)
    config, told = files.read_config(folder), read_metadata(folder)
    model = model or named(folder, "--model", told.get("base_model"), config) or TINY
    lora = lora or named(folder, "--model-lora", told.get("base_lora")) or None
    check_base(folder, model, lora=lora)
    if kind == "peft" and (scale, dtype) != (1.0, None):
        raise UserError("--format peft keeps P and R as they are: leave --scale and --dtype")
    backbone = backbone_of(model)
    if kind not in ("peft", "merged") and "lora-files" not in backbone.features:
        raise UserError(f"--format {kind}: not for {backbone.name}; give peft or merged")
    path = target(output, kind)
    precision = base_precision(model, backbone.denoiser)
    exported = Exported(
        path=path,
        adapter=files.read(folder),
        kind=kind,
        scale=scale,
        precision=precision,
        written=dtype or (precision if kind == "merged" else torch.float32),
        model=model,
        lora=lora,
    )
    exported.learn(verify=verify)
    report = Report(path=path, notes=notes_on(told, kind))
    with staged_at(path) as staged:
        with writing(path):
            exported.write(staged, told)
        return exported.verified(staged, report) if verify else report


@dataclass(kw_only=True)
class Exported:
    """An adapter on its way into a file. precision: the base's; written: of what is written.

    `learn` finds: shapes and changes of layers; with an adapter and without, the answers to random
    inputs; and each layer's weight times its `probe`.
    """

    path: Path
    adapter: files.StoredAdapter
    kind: Format
    scale: float
    precision: torch.dtype
    written: torch.dtype
    model: str
    lora: str | None
    shapes: lora_names.Shapes = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    answers: tuple[Tensor, Tensor] | None = None

    def base(self) -> Any:
        load = backbone_of(self.model).networks().load_denoiser
        return load(self.model, dtype=self.precision, lora=self.lora)

    def learn(self, *, verify: bool) -> None:
        """Load the base with the adapter; nothing of it stays: FLUX takes 24 GB, one at a time."""
        denoiser = self.base()
        files.load(denoiser, self.adapter)
        self.shapes = lora_names.layer_shapes(denoiser)
        self.changes = injection.changes_of(denoiser, self.scale)
        check_names(self.kind, self.changes, self.shapes)
        if not verify:
            return
        live = answer(denoiser, self.scale)
        denoiser.disable_adapters()
        self.answers = live, answer(denoiser, 1.0)
        self.weights = {
            name: frozen(denoiser, name) @ probe(name, a) for name, (a, _) in self.changes.items()
        }

    def write(self, staged: Path, told: dict[str, str]) -> None:
        """told: what the adapter's own file says."""
        config, folder = self.adapter.config, self.adapter.folder
        about = header(config, self.kind, self.scale, model=self.model, lora=self.lora)
        if self.kind == "peft":
            staged.mkdir()
            for name in (CONFIG, WEIGHTS):
                shutil.copy(folder / name, staged)
            for tasks in task_folders_of([folder]):
                shutil.copytree(tasks, staged / TASKS)
        elif self.kind == "merged":
            merge(self.base(), self.changes, self.written).save_pretrained(staged)
            tensor_files.open_to(staged)
            text = json.dumps(told | about, indent=1)
            (staged / "vcdeft.json").write_text(text, encoding="utf-8")
        else:
            cast = {
                name: (a.to(self.written), b.to(self.written))
                for name, (a, b) in self.changes.items()
            }
            check_finite(cast, self.path)
            layers = lora_names.layers_of(cast, self.kind, self.shapes)
            told = told | about
            told |= lora_headers.header(self.told(told, layers), self.kind)
            lora_names.write(
                staged,
                cast,
                self.kind,
                shapes=self.shapes,
                metadata=told,
                hashes=lora_headers.HASHES,
            )

    def told(self, about: dict[str, str], layers: Mapping[str, Change]) -> lora_headers.Told:
        """What the header says to other tools. about: the adapter's own words; layers: written."""
        folder = self.adapter.folder
        return lora_headers.Told(
            name=name_of(folder),
            base=self.model,
            date=date_of(weights_file(folder)),
            ranks=[len(a) for a, _ in layers.values()],
            about=about,
        )

    def verified(self, staged: Path, report: Report) -> Report:
        """What was written, read again. Raises `UserError` where it is not the adapter."""
        merged, written, precision = self.kind == "merged", self.written, self.precision
        reader, read, in_weights = reader_of(self.kind, self.shapes, written)
        try:
            loaded = read(staged, self.base)
            found = answer(loaded, 1.0)
        except (ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise UserError(f"export {self.path}: {reader} cannot read it: {error}") from None
        rounding = ROUNDING[written if merged else precision] if in_weights else 0
        weights_off, beyond = change_error(loaded, self.changes, self.weights, rounding)
        noise = max(NOISE[precision], NOISE[written] if merged else 0)
        assert self.answers is not None
        output_off = output_error(found, *self.answers, noise)
        report = replace(report, reader=reader, weights=weights_off, output=output_off)
        held = (written,) if merged else (written, precision)  # in what it is read
        check(report, beyond, max(TOLERANCE[one] for one in held))
        return report


def check_names(kind: Format, changes: dict[str, Change], shapes: lora_names.Shapes) -> None:
    """Raise `UserError` where kohya's names would lose a layer in diffusers."""
    outside = [name for name in changes if "transformer_blocks." not in name]
    if kind == "kohya" and outside:
        raise UserError(
            f"--format kohya: diffusers drops {outside[0]}, which lies outside the blocks, from "
            "such files; give --format diffusers or comfyui"
        )


def check_finite(changes: dict[str, Change], path: Path) -> None:
    """Raise `UserError` where a number is too large for the precision that it is written in."""
    for name, (a, b) in changes.items():
        if not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(
                f"export {path}: {name} is too large for {a.dtype}; give a smaller --scale, or "
                "--dtype float32"
            )


def base_precision(model: str, denoiser: str) -> torch.dtype:
    """float32 for a model on disk that is small in it, else bfloat16: FLUX then takes 24 GB."""
    folder = (BASE if model == TINY else Path(model)) / denoiser
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return torch.float32 if 0 < size < LARGE else torch.bfloat16


def target(output: Path, kind: Format) -> Path:
    """Where to write, checked: a folder, or a file in one."""
    path = output.absolute() if output == Path() else output  # "." has no name to stage beside
    if kind not in ("peft", "merged") and output.suffix != ".safetensors":
        path = output / "pytorch_lora_weights.safetensors"
    output_folder(path.parent)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"--output {path}: already there; name another, or remove it")
    return path


def merge(transformer: Any, changes: dict[str, Change], dtype: torch.dtype | None = None) -> Any:
    """Add `changes` in float32 to a plain denoiser's weights, which become `dtype` if given."""
    lora_names.merge(transformer, changes, dtype=dtype)
    return transformer if dtype in (None, transformer.dtype) else transformer.to(dtype)


Base = Callable[[], Any]
Reader = Callable[[Path, Base], Any]


def reader_of(
    kind: Format, shapes: lora_names.Shapes, written: torch.dtype
) -> tuple[str, Reader, bool]:
    """Who reads a written file again, by name, how, and whether the change is in weights then."""

    def through_peft(path: Path, base: Base) -> Any:
        return PeftModel.from_pretrained(base(), path).get_base_model()

    def through_diffusers(path: Path, base: Base) -> Any:
        transformer = base()
        load_lora = backbone_of_network(transformer).networks().load_lora
        assert load_lora is not None  # of a family with "lora-files"
        load_lora(path, transformer)
        return transformer

    def ourselves(path: Path, base: Base) -> Any:
        return merge(base(), lora_files.read(path, shapes=shapes))

    def as_model(path: Path, base: Base) -> Any:
        return AutoModel.from_pretrained(str(path), torch_dtype=written)

    if kind == "kohya" and shapes["single_transformer_blocks.0.proj_out"][0] == FLUX_WIDTH:
        return "diffusers", through_diffusers, False
    us = "this package"
    return {
        "peft": ("peft", through_peft, False),
        "diffusers": ("diffusers", through_diffusers, False),
        "merged": ("diffusers", as_model, True),
        "kohya": (f"{us} (diffusers reads kohya's names at FLUX's width only)", ourselves, True),
        "comfyui": (f"{us} (ComfyUI is no dependency)", ourselves, True),
    }[kind]
