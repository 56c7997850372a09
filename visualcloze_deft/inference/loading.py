"""Pipelines loaded from a folder or the hub, with diffusers' arguments and with adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from visualcloze_deft.adapters.files import StoredAdapter
from visualcloze_deft.adapters.metadata import check_base
from visualcloze_deft.backbones.attention import AUTO
from visualcloze_deft.backbones.flux_fill.loading import Dtype, dtype_for, load_models
from visualcloze_deft.backbones.lora_places import check_lora
from visualcloze_deft.backbones.model_files import TINY, index_of, pinned
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.inference.arguments import (
    PARTS,
    Adapters,
    check_attention,
    check_words,
    device_of,
    enough_memory,
    folders_of,
    here,
    known_or_default,
    left_out,
    stored_adapters,
)
from visualcloze_deft.storage.adapter_places import task_folders_of

logger = logging.getLogger(__name__)


class LoadingMethods:
    """How a pipeline of FLUX.1-Fill's parts, with adapters, comes to be."""

    lora: str | None
    quantise: Bits
    register_to_config: Any

    if TYPE_CHECKING:  # what the pipeline's other classes have

        def set_attention(self, attention: str) -> None: ...

        def use_stored(self, adapters: Mapping[StoredAdapter, float]) -> None: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = TINY,
        *,
        adapter: Adapters | None = None,
        lora: str | Path | None = None,
        device: str | None = None,
        dtype: Dtype | None = None,
        torch_dtype: Dtype | None = None,
        device_map: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        use_safetensors: bool | None = None,
        quantise: Bits = "none",
        clip_text: ClipText | None = None,
        cells: Cells | None = None,
        encodings: str | Path | None = None,
        task_folders: str | Path | Sequence[str | Path] = (),
        merge: bool = True,
        attention: str = AUTO,
        resolution: int | None = None,
        **parts: Any,
    ) -> Self:
        """The model "tiny", a diffusers folder or a hub id of FLUX.1-Fill's layout.

        adapter: a folder in peft's format, e.g. RUN/adapter, or several with their scales. lora:
        a FLUX LoRA merged into the base first, for good. device, dtype: a GPU in bfloat16 where
        there is one, else CPU in float32; "cpu" before offloading is enabled.
        As in diffusers: dtype (or torch_dtype) by part, {"transformer": ..., "default": ...};
        variant, revision and token; device_map, the name of a device; parts (`transformer=...`),
        which are moved to the device and not read; None for a part leaves it out, and so does a
        folder that was saved without it; other arguments are ignored with a warning.
        use_safetensors=False is refused: pickles are never read.
        resolution: instead of the folder's.
        quantise: keep the frozen blocks in "int8", "nf4" (bitsandbytes) or "fp8". clip_text, cells:
        where None, as the (first) adapter was trained, else as the folder says, else "fit" and
        "row". attention: see `set_attention`. The others: see `__init__`.
        Raises `UserError` where something is missing or does not fit.
        """
        dtype = dtype or torch_dtype
        check_words(
            quantise=quantise,
            cells=cells,
            clip_text=clip_text,
            resolution=resolution,
            dtype=dtype,
        )
        named = pinned(str(pretrained_model_name_or_path), revision)
        assert named is not None
        name = here(named, token)
        if use_safetensors is False:
            raise UserError("use_safetensors=False: weights are read from safetensors files alone")
        if unknown := sorted(set(parts) - set(PARTS)):
            logger.warning("Arguments %s are not expected by %s: ignored", unknown, cls.__name__)
        device = device_of(device, device_map)
        dtype = dtype or default_dtype(device)
        given = left_out(name) | {part: value for part, value in parts.items() if part in PARTS}
        whole = given.get("transformer", True) is not None
        if whole:
            of_transformer = dtype_for("transformer", dtype)
            check_attention(attention, name, device=device, dtype=of_transformer)
        elif lora is not None or adapter is not None:
            given_name = "lora" if adapter is None else "adapter"
            raise UserError(f"{given_name} changes the transformer, and transformer is None")
        lora = None if lora is None else str(lora)
        if lora is not None:
            check_lora(lora)
        wanted, folders = stored_adapters(adapter, name), folders_of(task_folders)
        for one in wanted:
            check_base(one.folder, name, lora=lora)
        told = index_of(name) | (read_metadata(next(iter(wanted)).folder) if wanted else {})
        with enough_memory(f"loading {name}"):
            models = load_models(
                name,
                dtype=dtype,
                device=device,
                lora=lora,
                bits=quantise,
                variant=variant,
                given=given,
            )
        pipe = cls(  # type: ignore[call-arg]
            **{part: getattr(models, part) for part in PARTS},
            resolution=resolution or models.resolution,
            cells=cells or known_or_default(told.get("cells"), get_args(Cells)),
            clip_text=clip_text or known_or_default(told.get("clip_text"), get_args(ClipText)),
            encodings=encodings,
            task_folders=[*folders, *task_folders_of(one.folder for one in wanted)],
            merge=merge,
        )
        pipe.register_to_config(_name_or_path=named)
        pipe.lora, pipe.quantise = lora, quantise
        if whole:
            pipe.set_attention(attention)
        pipe.use_stored(wanted)
        return pipe
