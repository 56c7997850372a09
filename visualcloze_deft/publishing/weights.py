"""The tensors of a publication: the adapter and its exports, their headers without local names."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from visualcloze_deft.adapters.export import export
from visualcloze_deft.backbones.model_files import public_name
from visualcloze_deft.backbones.peft_files import WEIGHTS, adapter_settings, read_metadata
from visualcloze_deft.errors import writing
from visualcloze_deft.publishing.facts import RunFacts
from visualcloze_deft.storage.adapter_places import ADAPTER, CONFIG, TASKS
from visualcloze_deft.storage.tensor_headers import copy_with_texts, read_texts

if TYPE_CHECKING:
    from visualcloze_deft.publishing.publish import Format, PublishRequest

STARTED = "those of "  # how an adapter's header begins to name the one that it started from


def copy_adapter(facts: RunFacts, folder: Path) -> list[str]:
    """The adapter's settings, tensors and task files, in `folder`/adapter. Returns remarks on what
    else lies in the run's adapter folder and stays there."""
    source, target = facts.adapter, folder / ADAPTER
    with writing(target):
        target.mkdir()
        settings = adapter_settings(source) | {"base_model_name_or_path": facts.base.name}
        (target / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        texts = public_texts(read_metadata(source), facts)
        copy_with_texts(source / WEIGHTS, target / WEIGHTS, texts)
        (target / TASKS).mkdir()
        for task in facts.tasks:
            shutil.copyfile(task.path, target / TASKS / task.path.name)
    others = {path.name for path in source.iterdir()} - {CONFIG, WEIGHTS, TASKS}
    return [f"left out {', '.join(sorted(others))} of {source}"] if others else []


def export_to(path: Path, kind: Format, asked: PublishRequest, facts: RunFacts) -> list[str]:
    """Export the adapter to the file `path`, verified. Returns what the reader must know."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vcdeft-export-", dir=path.parent) as name:
        exported = Path(name) / "lora.safetensors"
        report = export(
            facts.folder,
            exported,
            kind,
            dtype=getattr(torch, asked.dtype) if asked.dtype else None,
            model=asked.model,
            lora=asked.lora,
        )
        with writing(path):
            copy_with_texts(exported, path, public_texts(read_texts(exported), facts))
    return list(report.notes)


def public_texts(texts: Mapping[str, str], facts: RunFacts) -> dict[str, str]:
    """A header's texts with public names of base, LoRA and adapters for their places here."""
    found = dict(texts)
    if "base_model" in texts:
        found["base_model"] = facts.base.name
    if "base_lora" in texts:
        found["base_lora"] = facts.lora
    if (layers := texts.get("layers", "")).startswith(STARTED):
        found["layers"] = STARTED + public_name(layers.removeprefix(STARTED))
    return found
