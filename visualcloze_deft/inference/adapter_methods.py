"""The adapters of a pipeline: loaded, scaled, exchanged and taken off, as in diffusers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.adapters.import_lora import as_adapter
from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.adapters.metadata import check_base, lora_mismatch
from visualcloze_deft.adapters.places import adapter_at, name_of
from visualcloze_deft.backbones.lora_files import changes_in
from visualcloze_deft.backbones.lora_names import Shapes, layer_shapes
from visualcloze_deft.backbones.lora_places import lora_file
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.arguments import enough_memory, names_of
from visualcloze_deft.storage.adapter_places import task_folders_of
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.task_registry.task import Task

logger = logging.getLogger(__name__)
GIVEN = "given as tensors"  # where a LoRA is from that is no file, for messages


class AdapterMethods:
    """What a pipeline with `blend`, the adapters of its transformer, can do with them."""

    blend: ActiveAdapters
    lora: str | None
    config: Any
    tasks: Mapping[str, Task]
    task_folders: list[Path]

    if TYPE_CHECKING:  # what the pipeline's other classes have

        def need(self, *parts: str) -> None: ...

    def load_adapter(self, adapter: str | Path, adapter_name: str | None = None) -> str:
        """Use an adapter beside those in use; returns its name.

        adapter: a folder in peft's format, or of the run that trained it; a LoRA file of any tool;
        or a hub id. The tasks that it was trained on are known from then on.
        adapter_name: by default that of the file or folder, or of its run.
        Raises `UserError` where the name is taken or the adapter does not fit.
        """
        self.need("transformer")
        check_name(adapter_name)
        self.blend.check_reachable()
        found = adapter_at(adapter, self._shapes)
        name = adapter_name or name_of(Path(adapter) if Path(adapter).exists() else found.folder)
        if base := self.config.get("_name_or_path"):
            check_base(found.folder, base, lora=self.lora)
            self._say_other_lora(found.folder)
        task_folders = [*self.task_folders, *task_folders_of([found.folder])]
        tasks = load_tasks(task_folders)
        self.blend.add(name, found)
        self.tasks, self.task_folders = tasks, task_folders
        return name

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
    ) -> str:
        """As diffusers: use a LoRA beside the adapters in use; returns its name.

        It is a file, a folder or hub id that holds one, or its tensors. Names of diffusers, kohya,
        ComfyUI and others are known, see `lora_files.read`. weight_name: the file in the folder or
        repository, where there are several, maybe in a folder there ("loras/mugs.safetensors").
        Raises `UserError` where the name is taken, or something in it would not be used.
        """
        place = pretrained_model_name_or_path_or_dict
        if not isinstance(place, Mapping):
            return self.load_adapter(lora_file(str(place), weight_name), adapter_name)
        self.need("transformer")
        check_name(adapter_name)
        name = adapter_name or f"default_{len(self.blend.known)}"
        self.blend.add(name, self._of_tensors(place))
        return name

    def unload_lora_weights(self) -> None:
        """Take all adapters off and forget them: the base's weights come back bit for bit."""
        self.delete_adapters(list(self.blend.known))

    def use_stored(self, adapters: Mapping[StoredAdapter, float]) -> None:
        """Use exactly these, each at its scale, under the names of their files or folders."""
        with enough_memory("merging adapters"):
            names = names_of(adapters)
            for name, one in zip(names, adapters, strict=True):
                self._say_other_lora(one.folder)
                self.blend.add(name, one, used=False)  # merged once, all together
            self.set_adapters(names, list(adapters.values()))

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float] | None = None,
    ) -> None:
        """Use exactly these, each with its scale (1 by default); none: the base alone.

        Raises `UserError` where a name is not known or given twice, or a scale is no number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        same = 1.0 if adapter_weights is None else adapter_weights
        weights = [same] * len(names) if isinstance(same, int | float) else list(same)
        if len(weights) != len(names):
            raise UserError(
                f"adapter_weights {brief(weights)}: {len(weights)} scales for {len(names)} names"
            )
        if len(set(names)) < len(names):
            raise UserError(f"adapter_names {brief(names)}: give each once, with one scale")
        self.blend.use(dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        return list(self.blend.scales)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off and forget them; the base's weights come back bit for bit."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.blend.delete(name)

    def _shapes(self) -> Shapes:
        return layer_shapes(self.blend.transformer)

    def _of_tensors(self, tensors: Mapping[str, Tensor]) -> StoredAdapter:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise UserError(f"LoRA {GIVEN}: {name} is {type(tensor).__name__}, not a tensor")
        host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        changes = changes_in(host, {}, origin=GIVEN, shapes=self._shapes())
        return as_adapter(changes, origin=Path(GIVEN))

    def _say_other_lora(self, adapter: Path) -> None:
        if line := lora_mismatch(adapter, self.lora):
            logger.warning("%s", line)


def check_name(adapter_name: object) -> None:
    """Raise `UserError` where this can be no adapter's name. None stands for the usual one."""
    if adapter_name is not None and not (isinstance(adapter_name, str) and adapter_name):
        raise UserError(f"adapter_name {brief(adapter_name)}: give text")
