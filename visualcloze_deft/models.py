"""The models of FLUX.1-Fill as one value: loaded by hub id, from a folder, or the embedded base.

Axes: b batch, l text tokens, d text width, c h w latents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
from transformers.utils import logging as transformers_logging

from visualcloze_deft import flow, lorafile, lowrank
from visualcloze_deft.encodings import Encodings
from visualcloze_deft.errors import UserError
from visualcloze_deft.gpus import gpus_here, precision_on, why_float32
from visualcloze_deft.launch import say_once
from visualcloze_deft.layered import load_quantised
from visualcloze_deft.modelfolder import (
    CHANNELS,
    PARTS,
    TINY,
    TOKENIZERS,
    Bits,
    Precision,
    check_folder,
    check_quantise,
    folder_of,
    has_variant,
    loading,
    part_settings,
    resolution_of,
    weight_files,
)
from visualcloze_deft.modelsize import MAX_TEXT_TOKENS, Network, settings_of
from visualcloze_deft.prompt import ClipText, Prompt, clip_text, fits, unread

CPU = torch.device("cpu")
LATENTS = CHANNELS[1] // 4  # channels of the VAE's, of which a token holds 2 x 2
CLIP_TOKENS = 77  # CLIP's default
SPARE = 128  # embeddings that T5 may have beyond its tokens: a round number on accelerators
Split = Callable[[nn.Module], None]  # leaves this process its share of a module's weights
Dtype = torch.dtype | Mapping[str, torch.dtype]  # of all parts, or by part, "default" of the others
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """VAE and text encoders, named as in diffusers, which may rest elsewhere than they work.

    device: where they work and give their results. encodings: where results are kept and looked up.
    A VAE in float16 is turned to float32, in place and for good: its activations leave the range of
    float16, and pictures come out as NaN. That is diffusers' `force_upcast`.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    clip_text: ClipText = "fit"
    device: torch.device = CPU
    encodings: Encodings | None = None

    def __post_init__(self) -> None:
        upcast(self.vae)

    @property
    def text_length(self) -> int:
        """T5 tokens of a prompt; longer ones are cut, shorter ones padded."""
        return text_length(self.tokenizer_2)

    def read_by_clip(self, prompt: Prompt | str) -> str:
        """What CLIP is given of `prompt`, see `prompt.clip_text`."""
        if isinstance(prompt, str):
            return prompt
        return clip_text(prompt, fits(self.tokenizer), self.clip_text)

    def unread(self, prompt: Prompt | str) -> dict[str, str]:
        """The words that do not fit: by encoder, "T5" and "CLIP", where there are any."""
        found = {
            "T5": unread(self.tokenizer_2, str(prompt), self.text_length),
            "CLIP": unread(
                self.tokenizer, self.read_by_clip(prompt), self.tokenizer.model_max_length
            ),
        }
        return {encoder: words for encoder, words in found.items() if words}

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[Prompt | str]) -> tuple[Tensor, Tensor]:
        """T5 tokens (b, l, d) and CLIP's pooled vector (b, d), without attention masks, as FLUX."""
        t5 = self.tokenizer_2(
            [str(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        clip = self.tokenizer(
            [self.read_by_clip(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        text, pooled = self.text_encoder_2, self.text_encoder
        return (
            self.encoded(text, t5, lambda ids: text(ids, return_dict=True).last_hidden_state),
            self.encoded(pooled, clip, lambda ids: pooled(ids, return_dict=True).pooler_output),
        )

    @torch.no_grad()
    def encode_pixels(
        self, strips: Tensor, draws: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """(b, 3, H, W) in -1..1 to (b, c, h, w), shifted and scaled as FLUX's latents: the mode, or
        drawn with one of `draws` for each strip."""
        config, strips = self.vae.config, strips.to(precision(self.vae))

        def scaled(latents: Tensor) -> Tensor:
            return (latents - config.shift_factor) * config.scaling_factor

        if draws is None:
            return self.encoded(
                self.vae, strips, lambda x: scaled(self.vae.encode(x).latent_dist.mode())
            )
        with at_work(self.vae, self.device):
            drawn = [
                self.vae.encode(one.to(self.device)).latent_dist.sample(draw)
                for one, draw in zip(strips.split(1), draws, strict=True)
            ]
        return scaled(torch.cat(drawn))

    def encoded(
        self, network: nn.Module, inputs: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`inputs` (b, ...) through `network` with `encode`, but for what `encodings` has.

        What goes there is encoded one by one: convolutions and products of matrices may round
        otherwise in a batch of another size, and an entry is not to depend on what came with it.
        """

        def together(several: Tensor) -> Tensor:
            with at_work(network, self.device):
                return encode(several.to(self.device))

        def one_by_one(several: Tensor) -> Tensor:
            with at_work(network, self.device):
                return torch.cat([encode(one.to(self.device)) for one in several.split(1)])

        if self.encodings is None:
            return together(inputs)
        return self.encodings.through(network, inputs, one_by_one).to(self.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, in float32."""
        config = self.vae.config
        latents = latents.to(precision(self.vae)) / config.scaling_factor + config.shift_factor
        with at_work(self.vae, self.device):
            return self.vae.decode(latents).sample.float()


@dataclass(frozen=True, kw_only=True)
class Models(Encoders):
    """All components. `resolution`: the side of a square cell in pixels."""

    name: str
    transformer: FluxTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    resolution: int

    def times(self, steps: int, tokens: int) -> Tensor:
        """The (steps + 1,) sampling times for a grid of `tokens` tokens."""
        config = self.scheduler.config
        mu = flow.shift_of(
            tokens,
            base=config.base_shift,
            maximum=config.max_shift,
            base_tokens=config.base_image_seq_len,
            max_tokens=config.max_image_seq_len,
        )
        return flow.schedule(steps, mu)


def precision(network: nn.Module) -> torch.dtype:
    """Of its weights. diffusers' `dtype` takes a millisecond: it asks every module for hooks."""
    return next(network.parameters()).dtype


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of the VAE in a model of `dtype`, see `Encoders`."""
    return torch.float32 if dtype == torch.float16 else dtype


def upcast(vae: AutoencoderKL | None) -> None:
    """Turn float16 weights to `vae_dtype`; others stay."""
    if vae is not None and precision(vae) == torch.float16:
        vae.to(vae_dtype(torch.float16))


@contextmanager
def at_work(network: nn.Module, device: torch.device) -> Iterator[None]:
    """`network` on `device`, and back where it rests; hooks that offload it do so themselves."""
    rest = next(network.parameters()).device
    there = rest.type == device.type and device.index in (None, rest.index)
    if there or any(
        hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in network.modules()
    ):
        yield
        return
    network.to(device)
    try:
        yield
    finally:
        network.to(rest)


def text_length(tokenizer: T5TokenizerFast) -> int:
    """How many of T5's tokens the transformer reads; a small model may have fewer than FLUX."""
    return min(int(tokenizer.model_max_length), MAX_TEXT_TOKENS)


def predict_velocity(
    transformer: FluxTransformer2DModel,
    inputs: Tensor,
    t: Tensor,
    *,
    ids: Tensor,
    text: Tensor,
    pooled: Tensor,
    guidance: float,
) -> Tensor:
    """The transformer's velocity (b, n, 64) for inputs (b, n, 384) at times t (b,) in 0..1. text is
    in the transformer's precision."""
    predicted: Tensor = transformer(
        hidden_states=inputs.to(text.dtype),
        timestep=t.to(text.dtype),
        guidance=torch.full_like(t, guidance),
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=inputs.device),
        img_ids=ids,
        return_dict=False,
    )[0]
    return predicted


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
    `lorafile.read`.
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
        raise UserError("a transformer that is given stays as it is: leave lora and quantise")
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


def check_latents(name: str) -> None:
    """Raise `UserError` unless the VAE of a model gives FLUX's latents, shifted and scaled."""
    told = part_settings(name, "vae")
    latents, shift = told.get("latent_channels"), told.get("shift_factor")
    if latents != LATENTS or shift is None:
        raise UserError(
            f"model {name!r}: its VAE has latent_channels {latents} and shift_factor {shift}; "
            f"FLUX's has {LATENTS} and a number"
        )


def load_tokenizers(name: str) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """The tokenizers of `load_models` alone: CLIP's and T5's.

    Raises `UserError` where one is not its encoder's own: of damaged files or none, transformers
    makes one of a few tokens and says nothing.
    """
    check_folder(name, parts=TOKENIZERS)
    clip = load_part(name, "tokenizer", CLIPTokenizer)
    t5 = load_part(name, "tokenizer_2", T5TokenizerFast)
    encoders: tuple[tuple[Any, str, Network, int], ...] = (
        (clip, "tokenizer", "text_encoder", 0),
        (t5, "tokenizer_2", "text_encoder_2", SPARE),
    )
    for tokenizer, part, encoder, spare in encoders:
        with built(name, part):  # also of settings that count only when a text is read
            tokenizer([""], padding="max_length", max_length=8, truncation=True)
        if not (folder_of(name) / encoder).is_dir():  # of a model that was saved without it
            continue
        told = settings_of(name, encoder)
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
    changes = {} if lora is None else lorafile.changes_of(name, lora)
    if bits != "none":
        return load_quantised(
            folder_of(name), bits, dtype=dtype, device=device, changes=changes, variant=variant
        )
    kept_as = stored_dtype(name) if split else dtype
    transformer = load_part(
        name, "transformer", FluxTransformer2DModel, torch_dtype=kept_as, variant=variant
    ).eval()
    check_grids(transformer, name)
    lowrank.merge(transformer, changes, merged=split)
    if split is not None:
        split(transformer)
    return transformer


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


def stored_dtype(name: str) -> torch.dtype:
    """The precision of the transformer's weights on disk: in it they can be mapped, not copied."""
    with safe_open(weight_files(folder_of(name) / "transformer")[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


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


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """What `precision` is on a device, see `gpus.precision_on`; where "auto" is float32 on a GPU, a
    warning says why, once. Raises `UserError` for bfloat16 on a GPU without it."""
    place = torch.device(device)
    gpu = gpus_here()[place.index or 0] if place.type == "cuda" else None
    if precision == "auto" and gpu is not None and (why := why_float32(gpu)):
        say_once(why)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision_on(precision, gpu)]


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 on GPUs that compute in it, float32 elsewhere, see `dtype_of`."""
    return dtype_of("auto", device)
