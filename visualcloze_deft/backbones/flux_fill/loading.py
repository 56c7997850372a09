"""FLUX.1-Fill read from a diffusers folder or the hub, checked, in the wanted precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from visualcloze_deft.backbones import lora_files, lora_names
from visualcloze_deft.backbones.embedding_cache import Encodings
from visualcloze_deft.backbones.flux_fill.checks import (
    _NETWORKS,
    built,
    check_grids,
    check_latents,
    check_scheduler,
    check_weights,
    load_part,
    without_bars,
)
from visualcloze_deft.backbones.flux_fill.files import (
    TOKENIZERS,
    check_folder,
    component_config,
    resolution_of,
)
from visualcloze_deft.backbones.flux_fill.model import (
    CLIP_TOKENS,
    NONE,
    SPARE,
    Encoders,
    Models,
    vae_dtype,
)
from visualcloze_deft.backbones.layered_loading import load_quantised
from visualcloze_deft.backbones.model_files import TINY, check_quantise, folder_of, weight_files
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.prompt import ClipText

Split = Callable[[nn.Module], None]  # leaves this process its share of a module's weights
Dtype = torch.dtype | Mapping[str, torch.dtype]  # of all parts, or by part, "default" of the others


def load_models(
    name: str,
    *,
    dtype: Dtype = torch.float32,
    device: str = "cpu",
    lora: str | None = None,
    bits: Bits = "none",
    clip_text: ClipText = "fit",
    rest: str | None = None,
    encodings: Encodings | None = None,
    split: Split | None = None,
    variant: str | None = None,
    given: Mapping[str, Any] = NONE,
) -> Models:
    """`name`: "tiny", a diffusers folder, or a hub id of FLUX.1-Fill's layout.

    `lora`: a FLUX LoRA file, folder or hub id merged into the transformer (VisualCloze's own), see
    `lora_files.read`.
    `bits`: what the weights of its blocks are kept in. `clip_text`, `rest`, `encodings`: see
    `load_encoders`. `split`: see `load_transformer`. `variant`: of the weight files, see diffusers.
    `given`: parts that are there already, by name; they are moved to `device` and otherwise left.
    None: the model is loaded without that part.
    Raises `UserError` where the folder lacks a part or the transformer is not FLUX Fill's.
    """
    check_quantise(bits)
    check_weights(name, variant=variant, but=given)
    transformer = given.get("transformer")
    if "transformer" not in given:
        own = dtype_for("transformer", dtype)
        transformer = load_transformer(
            name, dtype=own, lora=lora, split=split, variant=variant, bits=bits, device=device
        )
    elif lora is not None or bits != "none":
        word = "quantise" if lora is None else "lora"
        raise UserError(f"{word}: a transformer that is given stays as it is; leave {word}")
    if transformer is not None:
        check_grids(transformer, name)
    scheduler = given.get("scheduler")
    if "scheduler" not in given:
        scheduler = load_part(name, "scheduler", FlowMatchEulerDiscreteScheduler)
    if scheduler is not None:
        check_scheduler(scheduler)
    encoders = load_encoders(
        name,
        dtype=dtype,
        device=device,
        clip_text=clip_text,
        rest=rest,
        encodings=encodings,
        variant=variant,
        given=given,
    )
    return Models(
        name=name,
        resolution=resolution_of(name),
        transformer=at(transformer, device),
        scheduler=scheduler,
        **vars(encoders),
    )


def at(network: Any, device: str | torch.device) -> Any:
    """A part on a device; None, of a model without it, stays None."""
    return network if network is None else network.to(device)


def dtype_for(part: str, dtype: Dtype) -> torch.dtype:
    """That of one part; float32 where neither it nor "default" is named, as in diffusers."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return dtype.get(part, dtype.get("default", torch.float32))


def load_encoders(
    name: str,
    *,
    dtype: Dtype = torch.float32,
    device: str = "cpu",
    clip_text: ClipText = "fit",
    rest: str | None = None,
    encodings: Encodings | None = None,
    variant: str | None = None,
    given: Mapping[str, Any] = NONE,
) -> Encoders:
    """The models of `load_models` without the transformer.

    `clip_text`: what CLIP reads of a prompt. `rest`: where they lie while they do not encode or
    decode, if not on `device`. `encodings`: where results are kept. `variant`, `given`: see
    `load_models`.
    """
    check_folder(name, parts={*_NETWORKS, *TOKENIZERS} - {*given})
    networks = {part: given[part] for part in _NETWORKS if part in given}
    with without_bars() if name == TINY else nullcontext():  # which loads in a moment
        for part, kind in _NETWORKS.items():
            if part == "vae" and part not in given:
                check_latents(name)
            if part not in given:
                own = dtype_for(part, dtype)
                kept = vae_dtype(own) if part == "vae" else own
                networks[part] = load_part(name, part, kind, torch_dtype=kept, variant=variant)
    networks = {part: at(network, rest or device) for part, network in networks.items()}
    for network in filter(None, networks.values()):
        network.eval()
    if networks["vae"] is not None:
        networks["vae"].to(memory_format=torch.channels_last)  # faster convolutions, same numbers
    tokenizers = {part: given[part] for part in TOKENIZERS if part in given}
    if len(tokenizers) < len(TOKENIZERS):
        own_tokenizers = dict(zip(TOKENIZERS, load_tokenizers(name), strict=True))
        tokenizers = own_tokenizers | tokenizers
    return Encoders(
        clip_text=clip_text,
        device=torch.device(device),
        encodings=encodings,
        **tokenizers,
        **networks,
    )


def load_tokenizers(name: str) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """The tokenizers of `load_models` alone: CLIP's and T5's.

    Raises `UserError` where one is not its encoder's own: of damaged files or none, transformers
    makes one of a few tokens and says nothing.
    """
    check_folder(name, parts=TOKENIZERS)
    clip = load_part(name, "tokenizer", CLIPTokenizer)
    t5 = load_part(name, "tokenizer_2", T5TokenizerFast)
    encoders: tuple[tuple[Any, str, str, int], ...] = (
        (clip, "tokenizer", "text_encoder", 0),
        (t5, "tokenizer_2", "text_encoder_2", SPARE),
    )
    for tokenizer, part, encoder, spare in encoders:
        with built(name, part):  # also of settings that count only when a text is read
            tokenizer([""], padding="max_length", max_length=8, truncation=True)
        if not (folder_of(name) / encoder).is_dir():  # of a model that was saved without it
            continue
        told = component_config(name, encoder)
        known = told.get("vocab_size", len(tokenizer))
        if not known - spare <= len(tokenizer) <= known:
            raise UserError(
                f"model {name!r}: {part}/ has {len(tokenizer)} tokens, {encoder}/ knows {known}; "
                "copy or download it again"
            )
        most = told.get("max_position_embeddings", CLIP_TOKENS)
        if tokenizer is clip and clip.model_max_length > most:
            raise UserError(
                f"model {name!r}: {part}/ gives texts of {clip.model_max_length} tokens, "
                f"{encoder}/ reads {most}; set model_max_length in its tokenizer_config.json"
            )
    return clip, t5


def load_transformer(
    name: str,
    *,
    dtype: torch.dtype,
    lora: str | None = None,
    split: Split | None = None,
    variant: str | None = None,
    bits: Bits = "none",
    device: str = "cpu",
) -> FluxTransformer2DModel:
    """The transformer of `load_models` alone.

    split: called on all that has weights, one layer after the other where `lora` is merged. They
    are views of their mapped files until then, in the files' precision, which `lora` is merged in.
    device: where one in `bits` is built, layer by layer; others are read into main memory.
    """
    check_folder(name, parts=("transformer",))
    changes = {} if lora is None else lora_files.changes_of(name, lora)
    if bits != "none":
        return load_quantised(
            FluxTransformer2DModel,
            folder_of(name) / "transformer",
            bits,
            dtype=dtype,
            device=device,
            changes=changes,
            variant=variant,
        )
    kept_as = stored_dtype(name) if split else dtype
    transformer = load_part(
        name, "transformer", FluxTransformer2DModel, torch_dtype=kept_as, variant=variant
    ).eval()
    check_grids(transformer, name)
    lora_names.merge(transformer, changes, merged=split)
    if split is not None:
        split(transformer)
    return transformer


def stored_dtype(name: str) -> torch.dtype:
    """The precision of the transformer's weights on disk: in it they can be mapped, not copied."""
    with safe_open(weight_files(folder_of(name) / "transformer")[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype
