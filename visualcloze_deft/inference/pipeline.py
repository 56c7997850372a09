"""The Python API: a diffusers pipeline that completes grids of images, with adapters.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from visualcloze_deft.adapters.contexts import check_context, context_of
from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.adapters.metadata import check_base
from visualcloze_deft.backbones.attention import AUTO, NATIVE, Choice, decide
from visualcloze_deft.backbones.attention import use as use_attention
from visualcloze_deft.backbones.attention_check import Shapes
from visualcloze_deft.backbones.embedding_cache import Recent
from visualcloze_deft.backbones.flux_fill.checks import check_grids, check_scheduler
from visualcloze_deft.backbones.flux_fill.classes import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    T5EncoderModel,
    T5TokenizerFast,
)
from visualcloze_deft.backbones.flux_fill.files import FLUX_RESOLUTION
from visualcloze_deft.backbones.flux_fill.layers import MAX_TEXT_TOKENS
from visualcloze_deft.backbones.flux_fill.loading import Dtype, dtype_for, load_models
from visualcloze_deft.backbones.flux_fill.model import Models, text_length, upcast
from visualcloze_deft.backbones.lora_places import check_lora
from visualcloze_deft.backbones.model_files import TINY, index_of, pinned
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.config.numbers import is_whole
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells
from visualcloze_deft.grids.prompt import ClipText, Prompt
from visualcloze_deft.inference.adapter_methods import AdapterMethods
from visualcloze_deft.inference.arguments import (
    PARTS,
    TEXT_PARTS,
    Adapters,
    check_attention,
    check_words,
    device_of,
    enough_memory,
    folders_of,
    here,
    known_or_default,
    left_out,
    requests_of,
    stored_adapters,
)
from visualcloze_deft.inference.generation import (
    Generating,
    Generation,
    KnownCells,
    KnownLatents,
)
from visualcloze_deft.inference.output import Completed, OutputType
from visualcloze_deft.inference.pictures import Picture
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.saving import SavingMethods
from visualcloze_deft.inference.upsampling import Enlarging
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.sampling.denoising import GUIDANCE, STEPS
from visualcloze_deft.storage.adapter_places import task_folders_of
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.task_registry.files import load_tasks

logger = logging.getLogger(__name__)
StepCallback = Callable[["InContextPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor]]


class InContextPipeline(AdapterMethods, SavingMethods, DiffusionPipeline):  # type: ignore[misc]
    """Completes grids of images with FLUX.1-Fill, through VisualCloze (arXiv 2504.07960).

    Parts, `to`, `save_pretrained`, offloading (`enable_model_cpu_offload` and others), progress bar
    and callbacks are those of diffusers' pipelines. `models` is the same parts as one value.

    >>> pipe = InContextPipeline.from_pretrained("tiny")  # doctest: +SKIP
    >>> images = pipe(rows=[[a, b], [c, None]], task="depth-to-image")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = list(TEXT_PARTS)  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler | None,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: T5EncoderModel | None,
        tokenizer_2: T5TokenizerFast | None,
        transformer: FluxTransformer2DModel | None,
        resolution: int = FLUX_RESOLUTION,
        cells: Cells = "row",
        clip_text: ClipText = "fit",
        encodings: str | Path | None = None,
        task_folders: str | Path | Sequence[str | Path] = (),
        merge: bool = True,
    ) -> None:
        """Parts may be None, of a pipeline that only encodes texts, or is given encoded ones.

        resolution: side of a square cell in pixels. cells: their shape, see `cell_sizes.Cells`.
        clip_text: what CLIP reads, see `prompt.ClipText`. encodings: folder in which what encoders
        made is kept and looked up, beside the latest in memory. merge: adapters into the weights,
        see `merging.ActiveAdapters`."""
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.register_to_config(resolution=resolution, cells=cells, clip_text=clip_text)
        self.task_folders = folders_of(task_folders)
        self.tasks = load_tasks(self.task_folders)
        self.blend = ActiveAdapters(transformer, merge=merge)
        self.encodings = Recent(Path(encodings) if encodings else None)
        self.attention = Choice(backend=NATIVE)
        self.lora: str | None = None  # that the base was loaded with
        self._full_steps: int | None = None
        self._context: str | None = None
        self._untrained = False
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._guidance_scale = GUIDANCE

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = TINY,
        *,
        adapter: Adapters | None = None,
        lora: str | None = None,
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
    ) -> InContextPipeline:
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
        pipe = cls(
            **{part: getattr(models, part) for part in PARTS},
            resolution=resolution or models.resolution,
            cells=cells or known_or_default(told.get("cells"), get_args(Cells)),
            clip_text=clip_text or known_or_default(told.get("clip_text"), get_args(ClipText)),
            encodings=encodings,
            task_folders=[*folders, *task_folders_of(one.folder for one in wanted)],
            merge=merge,
        )
        pipe.register_to_config(_name_or_path=named)
        pipe.lora = lora
        if whole:
            pipe.set_attention(attention)
        pipe.use_stored(wanted)
        return pipe

    def __setattr__(self, name: str, value: Any) -> None:
        """As diffusers. Another transformer has no adapters, and torch's choice of attention."""
        super().__setattr__(name, value)
        if name == "transformer" and "blend" in vars(self):
            own = value._orig_mod if is_compiled_module(value) else value
            if own is not self.blend.transformer:
                self.blend = ActiveAdapters(own, merge=self.blend.merge)
                self.attention = Choice(backend=NATIVE)

    def need(self, *parts: str) -> None:
        """Raise `UserError` where this pipeline is without one of `parts`."""
        for part in parts:
            if getattr(self, part) is None:
                embeds = ", or give prompt_embeds and pooled_prompt_embeds"
                way = embeds if part in TEXT_PARTS else ""
                raise UserError(f"{part}: this pipeline has none; load it with one{way}")

    @property
    def models(self) -> Models:
        """The parts as one value, their results on the device where they work."""
        return Models(
            **{part: getattr(self, part) for part in PARTS},
            name=self.config.get("_name_or_path") or "",
            resolution=self.config.resolution,
            clip_text=self.config.clip_text,
            device=self.place,
            encodings=self.encodings,
        )

    @property
    def place(self) -> torch.device:
        """Where the parts work. diffusers' search for hooks takes ten milliseconds: only where
        weights may rest elsewhere."""
        if self.transformer is None:
            return self._execution_device
        device = next(self.transformer.parameters()).device
        moved = device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available())
        return self._execution_device if moved else device

    def to(self, *args: Any, **kwargs: Any) -> InContextPipeline:
        """As diffusers, but that in float16 the VAE is float32, see `model.Encoders`."""
        super().to(*args, **kwargs)
        upcast(self.vae)
        return self

    def set_attention(self, attention: str, *, device: str | None = None) -> None:
        """Compute attention with another kernel; `attention` then says which, and why.

        attention: "native", torch's own choice; one of torch's: "cudnn", "flash", "efficient",
        "math"; any other backend of diffusers, flash-attn as "flash_attn"; or "auto": on a GPU the
        fastest of torch's that agrees with plain attention in float32 (grids of 1x2 to 3x3 cells,
        the forward pass alone), on a CPU "native". device: where the transformer works, if its
        weights rest elsewhere; "auto" is decided for it and stays on another one.
        Raises `UserError` where this machine lacks the kernel.
        """
        self.need("transformer")
        config = self.transformer.config
        text = text_length(self.tokenizer_2) if self.tokenizer_2 else MAX_TEXT_TOKENS
        cell = (self.config.resolution // CELL_STEP) ** 2
        shapes = Shapes(
            lengths=(text + 2 * cell, text + 9 * cell),
            heads=config.num_attention_heads,
            width=config.attention_head_dim,
            dtype=self.transformer.dtype,
            device=torch.device(device) if device else self.place,
        )
        self.attention = decide(attention, shapes, passes="forward")
        use_attention(self.transformer, self.attention.backend)
        if self.attention.line:
            logger.info(self.attention.line)

    def enable_context_cache(self, full_steps: int = 3) -> None:
        """Compute all tokens of a grid in `full_steps` evenly spaced sampling steps alone. In the
        others the targets attend to what such a step kept of examples, known cells and text.

        Any weights do; images change a little, see docs/context-cache.md. As many as there are
        steps change nothing. Upsampling has no context, and goes on as it is.
        """
        if not is_whole(full_steps) or full_steps < 1:
            raise UserError(f"full_steps {brief(full_steps)}: give a whole number, 1 or more")
        self._full_steps = int(full_steps)

    def disable_context_cache(self) -> None:
        self._full_steps = None

    def set_context(self, context: str | None = None, *, untrained: bool = False) -> None:
        """What known cells see: "full", all, in every step; "isolated", themselves alone, computed
        once; None, as the adapters in use were trained, and full where they know both.

        untrained: allows one that they were not trained with. The next call raises `UserError`
        for such a context otherwise.
        """
        check_context(context)
        self._context, self._untrained = context, untrained

    @property
    def context(self) -> Context:
        """How the next call uses the tokens of examples, known cells and text."""
        used = [self.blend.places[name] for name in self.blend.scales]
        seen = context_of(used, self._context, untrained=self._untrained)
        if seen == "full":
            return Context(full_steps=self._full_steps)
        if self._full_steps is not None:
            raise UserError(
                "context cache: an isolated context is computed once anyway; call "
                "disable_context_cache(), or set_context('full')"
            )
        return Context(isolated=True)

    # Generation

    def encode_prompt(
        self, prompts: str | Prompt | Sequence[str | Prompt]
    ) -> tuple[Tensor, Tensor]:
        """T5's tokens (b, l, d) and CLIP's pooled vector (b, d) of whole prompts, as `__call__`
        takes them as `prompt_embeds` and `pooled_prompt_embeds`."""
        self.need(*TEXT_PARTS)
        several = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
        return self.models.encode_text(several)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Sampling steps of the call under way, or of the last one."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The time of the step under way, 1000 at noise, which diffusers' caches go by; None
        between calls."""
        return self._current_timestep

    @property
    def guidance_scale(self) -> float:
        """Of the call under way, or of the last one."""
        return self._guidance_scale

    def __call__(
        self,
        grids: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        rows: Sequence[Sequence[Picture | None]] | None = None,
        task: str | None = None,
        task_prompt: str | None = None,
        content_prompt: str | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        upsampling: Enlarging | Sequence[Enlarging | None] | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        resolution: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> Completed | tuple[Completed]:
        """The generated images: by grid, then by seed, then left to right.

        Give a grid file (or a folder of them), or objects with the keys of `request` (rows, task,
        seed, ...), or `rows` of pictures (paths, PIL images, arrays, tensors: see
        `pictures.picture`), None for what is to be generated in the last one. The same seed gives
        the same image, whatever else is generated with it.

        num_images_per_prompt: of each grid, with seeds that follow one another. upsampling: a
        scale, or see `upsampling.Upsampling`; one for all targets or one each.
        num_inference_steps: 1 and more. guidance_scale: any finite number. resolution: the side of
        a square cell in pixels, a multiple of 16; the model's own by default. return_dict: False
        gives a tuple that holds them, as in diffusers. The others, and options: of `complete`.
        """
        asked = requests_of(
            grids,
            self.tasks,
            rows=rows,
            own={"task": task, "task_prompt": task_prompt, "content_prompt": content_prompt},
            seed=seed,
            images=num_images_per_prompt,
            upsampling=upsampling,
        )
        if prompt_embeds is None:
            self.need(*TEXT_PARTS)
            models = self.models
            for one in asked:
                for encoder, unread in models.unread(one.prompt).items():
                    logger.warning("%s does not read the end of its text: %s", encoder, unread)
        made = self.complete(
            asked,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            resolution=resolution,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **options,
        )
        return made if return_dict else (made,)

    @torch.no_grad()
    def complete(
        self,
        asked: Sequence[Request],
        *,
        num_inference_steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        resolution: int | None = None,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        known_latents: KnownLatents = "mode",
        known_cells: KnownCells = "paste",
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Completed:
        """What `__call__` does, for checked grids.

        batch_size: images of grids of one shape that go through the transformer together; each is
        the one made alone, to rounding. generator: draws in place of the seeds; one for all images
        in their order, or one each. latents: noise (n, 64) of each image in place of drawn noise.
        prompt_embeds, pooled_prompt_embeds: (b, l, d) and (b, d), of every grid or one for all, in
        place of encoded text; of upsampling's, too, where that has no prompt. known_latents: what
        the model sees of known cells, the encoder's mode, or a draw, which the image's generator
        then makes before its noise. known_cells: whether `Answer.row` holds them as they went in,
        resized, or decoded.
        output_type: PIL images; "pt" (3, h, w) or "np" (h, w, 3) in 0..1; "latent" the (n, 64)
        tokens of the whole grid. callback_on_step_end: as in diffusers; setting `_interrupt` leaves
        what there is.
        """
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs {list(callback_on_step_end_tensor_inputs)}: "
                "give some of latents"
            )
        how = Generating(
            steps=num_inference_steps,
            guidance=guidance_scale,
            resolution=resolution,
            batch_size=batch_size,
            known_latents=known_latents,
            known_cells=known_cells,
            output_type=output_type,
        )
        self._check_parts(asked, with_text=prompt_embeds is None)
        context = self.context
        if context.cached(num_inference_steps) and self.transformer.is_cache_enabled:
            raise UserError(
                "context cache: not beside a cache of diffusers; call transformer.disable_cache()"
            )

        def after(number: int, t: Tensor, x: Tensor) -> Tensor:
            bar.update()
            if callback_on_step_end is None or self._interrupt:
                return x
            told = {"latents": x} if callback_on_step_end_tensor_inputs else {}
            changed = callback_on_step_end(self, number, 1000 * t, told)
            return changed.get("latents", x) if changed else x

        call = Generation(
            models=self.models,
            asked=asked,
            how=how,
            cells=self.config.cells,
            after=after,
            interrupted=lambda: self._interrupt,
            at_time=lambda t: setattr(self, "_current_timestep", t),
            generator=generator,
            context=context,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
        )
        call.check()
        self._interrupt = False
        self._num_timesteps, self._guidance_scale = num_inference_steps, guidance_scale
        with self.progress_bar(total=call.total_steps) as bar:
            answers = dict(call.answers())
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return Completed([answers[order] for order in sorted(answers)])

    def _check_parts(self, asked: Sequence[Request], *, with_text: bool) -> None:
        """Raise `UserError` where the parts, as they are now, cannot make these grids."""
        self.need("transformer", "vae", "scheduler")
        check_grids(self.transformer, self.config.get("_name_or_path") or "here")
        check_scheduler(self.scheduler)
        own_words = any(how and how.prompt for one in asked for how in one.upsampling)
        if with_text or own_words:
            self.need(*TEXT_PARTS)
