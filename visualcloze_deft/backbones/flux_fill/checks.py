"""Whether files hold a FLUX.1-Fill: shapes, tensors, schedulers; one part of a model loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
)
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, T5EncoderModel
from transformers.utils import logging as transformers_logging

from visualcloze_deft.backbones.flux_fill.files import (
    CHANNELS,
    PARTS,
    check_folder,
    component_config,
)
from visualcloze_deft.backbones.flux_fill.model import LATENTS
from visualcloze_deft.backbones.model_files import folder_of, has_variant, weight_files
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.hub import loading


def check_latents(name: str) -> None:
    """Raise `UserError` unless the VAE of a model gives FLUX's latents, shifted and scaled."""
    told = component_config(name, "vae")
    latents, shift = told.get("latent_channels"), told.get("shift_factor")
    if latents != LATENTS or shift is None:
        raise UserError(
            f"model {name!r}: its VAE has latent_channels {latents} and shift_factor {shift}; "
            f"FLUX's has {LATENTS} and a number"
        )


def load_part(name: str, part: str, kind: Any, **options: Any) -> Any:
    """A component of a model, by its name in diffusers' layout and its class."""
    if part in _NETWORKS or part == "transformer":
        options["use_safetensors"] = True
    if not has_variant(folder_of(name) / part, options.get("variant")):
        options.pop("variant", None)
    with built(name, part):
        return kind.from_pretrained(folder_of(name), subfolder=part, **options)


def built(name: str, part: str) -> AbstractContextManager[None]:
    """See `loading`."""
    return loading(f"model {name!r}: {part}/", "copy or download it again")


FURTHER = re.compile(r"(?:text_model\.)?encoder\.(?:block|layers)\.\d")  # not a whole T5's decoder


def check_weights(name: str, *, variant: str | None = None, but: Collection[str] = ()) -> None:
    """Raise `UserError` unless the tensors of every network are those that its settings ask for.

    What is missing would be drawn at random, and blocks beyond the settings left out, without a
    word. Names and shapes alone are read. variant: of the weight files, as in diffusers. but: parts
    that are not looked at.
    """
    check_folder(name, parts={*PARTS} - {*but})
    networks = {"transformer": FluxTransformer2DModel, **_NETWORKS}
    if variant and not any(has_variant(folder_of(name) / part, variant) for part in networks):
        raise UserError(f"model {name!r}: no weight files of the variant {variant!r}")
    for part, kind in networks.items():
        if part in but:
            continue
        if not weight_files(folder_of(name) / part, variant):
            one = min((folder_of(name) / part).glob("*.safetensors")).name
            raise UserError(
                f"model {name!r}: {part}/ has weight files of a variant alone, e.g. {one}; say "
                "which with variant= (Python), or rename them"
            )
        if issubclass(kind, ModelMixin):
            missing, odd = compared_tensors(name, part, kind, variant)
        else:
            with without_report():
                _, found = load_part(
                    *(name, part, kind),
                    device_map="meta",
                    variant=variant,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            missing = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
            odd = [key for key in found["unexpected_keys"] if FURTHER.match(key)]
        where = f"model {name!r}: the weight files of {part}/"
        if missing:
            raise UserError(
                f"{where} lack {len(missing)} tensors that its config.json asks for, "
                f"{sorted(missing)[0]} among them; copy or download it again"
            )
        if odd:
            raise UserError(
                f"{where} hold {len(odd)} tensors that its config.json has no place for, "
                f"{sorted(odd)[0]} among them; its config.json is another model's"
            )


def compared_tensors(
    name: str, part: str, kind: type[ModelMixin], variant: str | None
) -> tuple[list[str], list[str]]:
    """The names of tensors that weight files lack or have in another shape, and of those that
    settings have no place for."""
    folder = folder_of(name) / part
    with built(name, part), torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    stored: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, variant):
        try:
            with safe_open(path, "pt") as file:
                stored |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"model {name!r}: {path}: damaged or truncated ({error})") from None
    missing = [key for key, shape in expected.items() if stored.get(key) != shape]
    return missing, [key for key in stored if key not in expected]


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' bars for loading weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_report() -> Iterator[None]:
    """Without transformers' bars, and its table of tensors that did not fit."""
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(shown)


def check_grids(transformer: FluxTransformer2DModel, name: str) -> None:
    """Raise `UserError` unless a transformer has FLUX.1-Fill's inputs and outputs."""
    channels = transformer.config.in_channels, transformer.config.out_channels
    if channels != CHANNELS:
        raise UserError(
            f"model {name!r}: its transformer has {channels[0]} input and {channels[1]} output "
            f"channels; FLUX.1-Fill has {CHANNELS[0]} and {CHANNELS[1]}"
        )


def check_scheduler(scheduler: Any) -> None:
    """Raise `UserError` unless `Models.times` are the times that a scheduler would give: Euler
    steps, shifted by the length of the sequence as FLUX's."""
    config = dict(scheduler.config)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise UserError(
            f"scheduler {type(scheduler).__name__}: grids are made with "
            "FlowMatchEulerDiscreteScheduler alone; give that one"
        )
    for name, value in TIMES.items():
        if config[name] != value:
            raise UserError(
                f"scheduler: {name} = {config[name]!r} is not computed here; {value!r} is, as in "
                "FLUX.1-Fill"
            )


TIMES: Mapping[str, Any] = MappingProxyType(  # settings of schedulers that times are made for
    {
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "invert_sigmas": False,
        "stochastic_sampling": False,
    }
)
_NETWORKS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
