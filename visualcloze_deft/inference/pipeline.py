"""The Python API: a diffusers pipeline that completes grids of images, with adapters.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.backbones.attention import NATIVE, Choice
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
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.inference.adapter_methods import AdapterMethods
from visualcloze_deft.inference.arguments import TEXT_PARTS, folders_of, requests_of
from visualcloze_deft.inference.compiled_methods import CompiledMethods
from visualcloze_deft.inference.context_methods import ContextMethods
from visualcloze_deft.inference.example_parts import ExampleParts
from visualcloze_deft.inference.generation import Generating, Generation, KnownCells, KnownLatents
from visualcloze_deft.inference.loading import LoadingMethods
from visualcloze_deft.inference.output import Completed, OutputType
from visualcloze_deft.inference.parts import PartsMethods
from visualcloze_deft.inference.pictures import Picture
from visualcloze_deft.inference.request import Request
from visualcloze_deft.inference.saving import SavingMethods
from visualcloze_deft.inference.upsampling import Enlarging
from visualcloze_deft.sampling.denoising import GUIDANCE, STEPS
from visualcloze_deft.task_registry.files import load_tasks

logger = logging.getLogger(__name__)
COMPUTING = ("transformer", "vae", "text_encoder", "text_encoder_2")
StepCallback = Callable[["InContextPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor]]


class InContextPipeline(
    ContextMethods,
    CompiledMethods,
    PartsMethods,
    AdapterMethods,
    SavingMethods,
    LoadingMethods,
    DiffusionPipeline,  # type: ignore[misc]
):
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
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._guidance_scale = GUIDANCE

    def __setattr__(self, name: str, value: Any) -> None:
        """As diffusers. Another transformer has no adapters, and torch's choice of attention; no
        other part has the compiled examples."""
        super().__setattr__(name, value)
        if name in COMPUTING and self._compiled is not None:
            self.unload_compiled()
        if name == "transformer" and "blend" in vars(self):
            own = value._orig_mod if is_compiled_module(value) else value
            if own is not self.blend.transformer:
                self.blend = ActiveAdapters(own, merge=self.blend.merge)
                self.attention = Choice(backend=NATIVE)

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
            compiled=self._compiled,
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
        examples: ExampleParts | None = None,
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
        what there is. examples: where a causal context keeps what it reads of examples, for
        further calls of the same weights.
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
        self.check_parts(asked, with_text=prompt_embeds is None)

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
            context=self.context_for(num_inference_steps),
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            examples=self.compiled_for(how.resolution or self.config.resolution, how.guidance)
            or examples
            or ExampleParts(),
        )
        call.check()
        self._interrupt = False
        self._num_timesteps, self._guidance_scale = num_inference_steps, guidance_scale
        with self.progress_bar(total=call.total_steps) as bar:
            answers = dict(call.answers())
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return Completed([answers[order] for order in sorted(answers)])

    def check_parts(self, asked: Sequence[Request], *, with_text: bool) -> None:
        """Raise `UserError` where the parts, as they are now, cannot make these grids."""
        self.need("transformer", "vae", "scheduler")
        check_grids(self.transformer, self.config.get("_name_or_path") or "here")
        check_scheduler(self.scheduler)
        own_words = any(how and how.prompt for one in asked for how in one.upsampling)
        if with_text or own_words:
            self.need(*TEXT_PARTS)
