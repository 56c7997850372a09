"""What `vcdeft infer` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visualcloze_deft.adapters.contexts import context_of, known_to
from visualcloze_deft.backbones.attention import AUTO
from visualcloze_deft.backbones.base import Seen
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.inference import acceleration
from visualcloze_deft.inference.upsampling import Upsampling
from visualcloze_deft.storage.adapter_places import task_folders_of


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How grids are completed: what `vcdeft infer` is told beside the grids. None: as the adapter
    was trained, or as the model says."""

    model: str
    lora: str | None = None
    adapters: Mapping[Path, float]
    quantise: Bits = "none"
    clip_text: ClipText | None = None
    cells: Cells | None = None
    seed: int | None = None
    images: int = 1
    steps: int
    guidance: float
    resolution: int | None = None
    upsampling: Upsampling | None = None
    task_folders: tuple[str, ...] = ()
    batch: int = 1
    encodings: Path | None = None
    offload: acceleration.Offload = "none"
    cache: str | None = None
    context: str | None = None
    untrained_context: bool = False
    context_cache: int | None = None
    compiled: Path | None = None
    attention: str = AUTO
    vae_tiling: bool = False
    compile_blocks: bool = False

    @property
    def seen(self) -> Seen:
        """What known cells see: as it is asked for, or as the adapters were trained."""
        known = {adapter: known_to(adapter) for adapter in self.adapters}
        return context_of(known, self.asked_context, untrained=self.untrained_context)

    @property
    def asked_context(self) -> str | None:
        """What known cells are to see: compiled examples leave one answer."""
        return self.context or ("causal" if self.compiled else None)

    @property
    def all_task_folders(self) -> tuple[Path, ...]:
        """The folders of the user's own tasks, and of those that the adapters were trained on."""
        return (*map(Path, self.task_folders), *task_folders_of(self.adapters))
