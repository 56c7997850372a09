"""Pipelines written to folders and pushed to the hub, as diffusers does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.backbones import tensor_files
from visualcloze_deft.backbones.model_files import on_hub
from visualcloze_deft.backbones.quantization import is_quantised
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.hub import HUB_ID
from visualcloze_deft.storage.hub_upload import uploading

ORIGIN = "_name_or_path"  # a key of diffusers' and transformers' settings files
CARD_FILE = "README.md"
TAGS = ["visualcloze", "flux", "in-context", "image-to-image"]
CARD = """
# {name}

This pipeline completes grids of images: rows of examples, and a last row whose missing images it
generates. It is FLUX.1-Fill used in [VisualCloze](https://arxiv.org/abs/2504.07960)'s way{base}.
{adapters}

```python
from visualcloze_deft import InContextPipeline

pipe = InContextPipeline.from_pretrained("{repo}")
images = pipe(rows=[["example.png", "its-target.png"], ["query.png", None]])
```

`VisualClozePipeline` of diffusers reads the same files. The weights have the licence of their base.
"""


class SavingMethods:
    """What a pipeline with `blend`, the adapters of its transformer, writes of itself."""

    blend: ActiveAdapters
    transformer: Any
    config: Any

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> None:
        """As diffusers; merged adapters are then part of the weights, and paths of this machine
        are left out. The arguments of `push_to_hub` go with it; repo_id: by default the folder's.

        Raises `UserError` where the blocks are quantised, adapters stand beside the weights, or a
        file is in the way.
        """
        self._check_saved("save_pretrained", options)
        folder = Path(save_directory)
        if folder.is_file():
            raise UserError(f"save_directory {folder}: a file; name a folder")
        super().save_pretrained(folder, **options)  # type: ignore[misc]
        tensor_files.open_to(folder)
        without_places(folder)
        if push_to_hub:
            self._upload(
                folder,
                repo_id or folder.absolute().name,
                message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """As diffusers: save into a repository of the hub; returns the address of the commit.

        A new repository gets a model card, the card of one that is there stays. options: those of
        `save_pretrained`. Raises `UserError` before the repository is made where the pipeline
        cannot be saved, and where the hub refuses.
        """
        self._check_saved("push_to_hub", options)
        with TemporaryDirectory() as place:
            self.save_pretrained(place, **options)
            return self._upload(
                Path(place),
                repo_id,
                message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        message: str | None,
        private: bool | None,
        token: str | None,
        create_pr: bool,
    ) -> str:
        hub = HfApi(token=token)
        with uploading(f"push_to_hub {repo_id!r}"):
            repo = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not hub.file_exists(repo, CARD_FILE):
                self.card(repo).save(folder / CARD_FILE)
            made = hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
            )
        return str(made)

    def card(self, repo: str) -> ModelCard:
        """The model card of this pipeline in the repository `repo`."""
        base = self.config.get(ORIGIN) or ""
        base = base if HUB_ID.fullmatch(base) and on_hub(base) else ""
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="image-to-image",
            base_model=base.partition("@")[0] or None,
            tags=TAGS,
        )
        scales = [f"{name} (scale {scale:g})" for name, scale in self.blend.scales.items()]
        text = CARD.format(
            name=repo.rpartition("/")[2],
            repo=repo,
            base=f", from `{base}`" if base else "",
            adapters=f"Merged into its weights: {', '.join(scales)}." if scales else "",
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")

    def _check_saved(self, what: str, options: Mapping[str, Any]) -> None:
        """Raise `UserError` where the pipeline cannot be written. what: the method called."""
        if options.get("safe_serialization") is False:
            raise UserError(f"{what}: safe_serialization=False; weights are safetensors alone")
        layers = self.transformer.modules() if self.transformer is not None else ()
        if any(is_quantised(m) for m in layers if isinstance(m, torch.nn.Linear)):
            raise UserError(f"{what}: a quantised base is not saved; load it unquantised")
        if any(self.blend.scales.values()) and not self.blend.merge:
            raise UserError(f"{what}: adapters stand beside the weights; load with merge")


def without_places(folder: Path) -> None:
    """Leave out of the settings files in `folder` where on this machine parts were read from."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        told = json.loads(text)
        place = told.get(ORIGIN) if isinstance(told, dict) else None
        if place and (Path(place).is_absolute() or Path(place).exists()):
            del told[ORIGIN]
            path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
