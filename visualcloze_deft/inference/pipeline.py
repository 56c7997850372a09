"""The Python API: a diffusers pipeline that completes grids of images, with adapters.

Axes: b batch, n tokens, l text tokens, d text width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from visualcloze_deft.adapters import files
from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.adapters.metadata import check_base, lora_mismatch
from visualcloze_deft.backbones import tensor_files
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
from visualcloze_deft.backbones.flux_fill.layers import MAX_TEXT_TOKENS
from visualcloze_deft.backbones.flux_fill.loading import Dtype, dtype_for, load_models
from visualcloze_deft.backbones.flux_fill.model import Models, text_length, upcast
from visualcloze_deft.backbones.flux_fill.packing import FluxText
from visualcloze_deft.backbones.model_files import (
    FLUX_RESOLUTION,
    TINY,
    check_lora,
    index_of,
    pinned,
)
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.backbones.precision import default_dtype
from visualcloze_deft.backbones.quantization import is_quantised
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import CELL_STEP, Cells, Shape, strip_shapes
from visualcloze_deft.grids.prompt import ClipText, Prompt
from visualcloze_deft.inference.arguments import (
    PARTS,
    TEXT_PARTS,
    Adapters,
    check_attention,
    device_of,
    enough_memory,
    here,
    known_or_default,
    left_out,
    name_of,
    strengths_of,
)
from visualcloze_deft.inference.batching import Job, batches_of
from visualcloze_deft.inference.output import Answer, Completed, OutputType, check_finite, converted
from visualcloze_deft.inference.request import Request, read_requests, request
from visualcloze_deft.inference.upsampling import Upsampling, enlarge, upsample
from visualcloze_deft.sampling.denoising import (
    GUIDANCE,
    STEPS,
    Conditions,
    denoise,
    draw_of,
    predictor,
)
from visualcloze_deft.task_registry.files import load_tasks

logger = logging.getLogger(__name__)
KnownLatents = Literal["mode", "sample"]
KnownCells = Literal["paste", "decode"]
StepCallback = Callable[["InContextPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor]]


class InContextPipeline(DiffusionPipeline):  # type: ignore[misc]
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
        task_folders: Sequence[str | Path] = (),
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
        self.tasks = load_tasks(Path(folder) for folder in task_folders)
        self.blend = ActiveAdapters(transformer, merge=merge)
        self.encodings = Recent(Path(encodings) if encodings else None)
        self.attention = Choice(backend=NATIVE)
        self.lora: str | None = None  # that the base was loaded with
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
        task_folders: Sequence[str | Path] = (),
        merge: bool = True,
        attention: str = AUTO,
        resolution: int | None = None,
        **parts: Any,
    ) -> InContextPipeline:
        """The model "tiny", a diffusers folder or a hub id of FLUX.1-Fill's layout.

        adapter: a folder in peft's format, e.g. RUN/adapter, or several with their strengths. lora:
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
        named = pinned(str(pretrained_model_name_or_path), revision)
        assert named is not None
        name = here(named, token)
        if use_safetensors is False:
            raise UserError("use_safetensors=False: weights are read from safetensors files alone")
        if unknown := sorted(set(parts) - set(PARTS)):
            logger.warning("Arguments %s are not expected by %s: ignored", unknown, cls.__name__)
        device = device_of(device, device_map)
        dtype = dtype or torch_dtype or default_dtype(device)
        given = left_out(name) | {part: value for part, value in parts.items() if part in PARTS}
        whole = given.get("transformer", True) is not None
        if whole:
            of_transformer = dtype_for("transformer", dtype)
            check_attention(attention, name, device=device, dtype=of_transformer)
        elif lora is not None or adapter is not None:
            raise UserError("lora and adapter change the transformer, and transformer is None")
        if lora is not None:
            check_lora(lora)
        wanted = strengths_of(adapter)
        for folder in wanted:
            files.read_config(folder)
            files.read_weights(folder)
            check_base(folder, name, lora=lora)
        short = [name_of(folder) for folder in wanted]
        names = {f: str(f) if short.count(name_of(f)) > 1 else name_of(f) for f in wanted}
        told = index_of(name) | (read_metadata(next(iter(wanted))) if wanted else {})
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
            task_folders=task_folders,
            merge=merge,
        )
        pipe.register_to_config(_name_or_path=named)
        pipe.lora = lora
        if whole:
            pipe.set_attention(attention)
        with enough_memory("merging adapters"):
            for folder in wanted:
                pipe._say_other_lora(folder)
                pipe.blend.add(names[folder], folder, used=False)  # merged once, all together
            pipe.set_adapters(list(names.values()), list(wanted.values()))
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
                raise UserError(f"this pipeline has no {part}: load it with one{way}")

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

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As diffusers; adapters that are merged are then part of the weights.

        Raises `UserError` where the blocks are quantised or adapters stand beside the weights.
        """
        layers = self.transformer.modules() if self.transformer is not None else ()
        if any(is_quantised(m) for m in layers if isinstance(m, torch.nn.Linear)):
            raise UserError("save_pretrained: a quantised base is not saved; load it unquantised")
        if any(self.blend.strengths.values()) and not self.blend.merge:
            raise UserError("save_pretrained: adapters stand beside the weights; load with merge")
        super().save_pretrained(save_directory, **options)
        tensor_files.open_to(Path(save_directory))

    # Adapters

    def load_adapter(self, folder: str | Path, adapter_name: str | None = None) -> str:
        """Read an adapter (peft's format) and use it beside those in use; returns its name.

        adapter_name: by default that of the folder, or of the run it lies in.
        Raises `UserError` where the name is taken or the adapter does not fit.
        """
        name = adapter_name or name_of(Path(folder))
        self.need("transformer")
        self.blend.check_reachable()
        files.read_config(Path(folder))
        if base := self.config.get("_name_or_path"):
            check_base(Path(folder), base, lora=self.lora)
            self._say_other_lora(Path(folder))
        self.blend.add(name, Path(folder))
        return name

    def _say_other_lora(self, folder: Path) -> None:
        if line := lora_mismatch(folder, self.lora):
            logger.warning("%s", line)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Sequence[float] | None = None
    ) -> None:
        """Use exactly these, each with its strength (1 by default); none: the base alone."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = [1.0] * len(names) if adapter_weights is None else list(adapter_weights)
        if len(weights) != len(names):
            raise UserError(f"set_adapters: {len(names)} names and {len(weights)} strengths")
        self.blend.use(dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        return list(self.blend.strengths)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off and forget them; the base's weights come back bit for bit."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.blend.delete(name)

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
        grids: str | Path | Sequence[Mapping[str, Any]] | None = None,
        *,
        rows: Sequence[grid.Row] | None = None,
        task: str | None = None,
        task_prompt: str | None = None,
        content_prompt: str | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        upsampling: Upsampling | Sequence[Upsampling | None] | None = None,
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

        Give a grid file (or a folder of them), or a list of objects with the keys of `request`
        (rows, task, seed, ...), or `rows` of PIL images, None for what is to be generated in the
        last one. The same seed gives the same image, whatever else is generated with it.

        num_images_per_prompt: of each grid, with seeds that follow one another. upsampling: see
        `upsampling.Upsampling`; one for all targets or one each. num_inference_steps: 1 and more.
        guidance_scale: any finite number. resolution: the side of a square cell in pixels, a
        multiple of 16; the model's own by default. return_dict: False gives a tuple that holds
        them, as in diffusers. The others, and options: those of `complete`.
        """
        own = {"task": task, "task_prompt": task_prompt, "content_prompt": content_prompt}
        if (grids is None) == (rows is None):
            raise UserError("give either grids or rows, not both and not neither")
        if grids is not None and any(value is not None for value in own.values()):
            raise UserError("task and prompts go with rows; grids say their own")
        if rows is not None:
            grids = [{"rows": rows, **own}]
        assert grids is not None
        asked: list[Request] = []
        if isinstance(grids, str | Path):
            if not isinstance(seed, int | None) or not isinstance(upsampling, Upsampling | None):
                raise UserError("for a grid file give one seed and one upsampling, or none")
            asked = read_requests(
                Path(grids),
                self.tasks,
                seed=seed,
                images=num_images_per_prompt,
                upsampling=upsampling,
            )
        else:
            for number, each in enumerate(grids, 1):
                try:
                    keys = dict(each)
                    if seed is not None:
                        keys["seed"] = seed
                    if isinstance(keys.get("seed") or 0, int):
                        keys.setdefault("images", num_images_per_prompt)
                    keys = {key: value for key, value in keys.items() if value is not None}
                    keys.setdefault("upsampling", upsampling)
                    asked.append(
                        request([list(row) for row in keys.pop("rows", ())], self.tasks, **keys)
                    )
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"grid {number}: expected an object such as {{'rows': ..., 'seed': 0}}: "
                        f"{error}"
                    ) from None
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
        if num_inference_steps < 1:
            raise UserError(f"steps must be 1 or more, not {num_inference_steps}")
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, not {batch_size}")
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance {guidance_scale}: give a number, e.g. 30")
        if resolution is not None and (resolution < 1 or resolution % CELL_STEP):
            raise UserError(f"resolution {resolution}: give a multiple of {CELL_STEP}")
        for name, value, known in (
            ("output_type", output_type, get_args(OutputType)),
            ("known_latents", known_latents, get_args(KnownLatents)),
            ("known_cells", known_cells, get_args(KnownCells)),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r}: give one of {', '.join(known)}")
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs {list(callback_on_step_end_tensor_inputs)}: "
                "give some of latents"
            )
        self._check_parts(asked, with_text=prompt_embeds is None)
        models = self.models
        side, kind = resolution or models.resolution, self.config.cells
        shapes = [strip_shapes(one.sizes, side, kind) for one in asked]
        places = [(number, seed) for number, one in enumerate(asked) for seed in one.seeds]
        jobs = [Job(order=k, grid=g, seed=seed) for k, (g, seed) in enumerate(places)]
        draws = self._draws(jobs, generator)
        noises = self._given_noise(jobs, shapes, latents)
        texts = self._given_text(asked, prompt_embeds, pooled_prompt_embeds)
        self._interrupt = False
        self._num_timesteps, self._guidance_scale = num_inference_steps, guidance_scale
        answers: dict[int, Answer] = {}
        chunks = batches_of(jobs, shapes, batch_size)
        total = len(chunks) * num_inference_steps + sum(
            how.steps(num_inference_steps) * len(one.seeds)
            for one in asked
            for how in one.upsampling
            if how is not None
        )
        with self.progress_bar(total=total) as bar:

            def after(number: int, t: Tensor, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None or self._interrupt:
                    return x
                told = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                changed = callback_on_step_end(self, number, 1000 * t, told)
                return changed.get("latents", x) if changed else x

            for chunk in chunks:
                if self._interrupt:
                    break
                built = {
                    number: grid.build(asked[number].rows, resolution=side, cells=kind)
                    for number in {job.grid for job in chunk}
                }
                tokens = sum(h * w for h, w in shapes[chunk[0].grid]) // CELL_STEP**2
                with enough_memory(f"making {len(chunk)} grids of {tokens} tokens together"):
                    finals = self._denoised(
                        models,
                        chunk,
                        [built[job.grid] for job in chunk],
                        [texts[job.grid] if texts else asked[job.grid].prompt for job in chunk],
                        [draws[job.order] for job in chunk],
                        [noises[job.order] for job in chunk] if noises else None,
                        known_latents=known_latents,
                        steps=num_inference_steps,
                        guidance=guidance_scale,
                        after=after,
                    )
                for job, final in zip(chunk, finals, strict=True):
                    check_finite(job, final)
                    answers[job.order] = self._answer(
                        models,
                        job,
                        built[job.grid],
                        asked[job.grid],
                        final,
                        text=texts[job.grid] if texts else None,
                        draw=draws[job.order],
                        known_cells=known_cells,
                        output_type=output_type,
                        steps=num_inference_steps,
                        guidance=guidance_scale,
                        after=after,
                    )
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

    def _denoised(
        self,
        models: Models,
        jobs: Sequence[Job],
        grids: Sequence[grid.Grid],
        texts: Sequence[Any],
        draws: Sequence[torch.Generator],
        noises: Sequence[Tensor] | None,
        *,
        known_latents: KnownLatents,
        steps: int,
        guidance: float,
        after: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The (b, n, 64) clean tokens of grids of one shape."""
        if isinstance(texts[0], tuple):
            text = FluxText(*(torch.stack(part) for part in zip(*texts, strict=True)))
        else:
            text = models.encode_text(texts)
        if known_latents == "sample":
            seen = models.encode_grids(grids, clean=False, draws=draws)
            given = Conditions(latents=seen, text=text)
        else:  # once for all images of a grid
            numbers = list(dict.fromkeys(job.grid for job in jobs))
            first = [next(k for k, job in enumerate(jobs) if job.grid == n) for n in numbers]
            once = models.encode_grids([grids[k] for k in first], clean=False)
            of_jobs = [numbers.index(job.grid) for job in jobs]
            given = Conditions(latents=once.some(of_jobs), text=text)
        shape = given.latents.clean.shape[1:]
        drawn = noises or [torch.randn(shape, generator=d, device=d.device) for d in draws]
        place = given.latents.clean.device
        noise = torch.stack([one.to(place, torch.float32) for one in drawn])
        predict = predictor(models, given, guidance=guidance, steps=steps)
        times = models.times(steps, noise.shape[1]).to(place)

        def unless_interrupted(x: Tensor, t: Tensor) -> Tensor:
            self._current_timestep = 1000 * t
            return torch.zeros_like(x) if self._interrupt else predict(x, t)

        return denoise(unless_interrupted, noise, times, after=after)

    def _answer(
        self,
        models: Models,
        job: Job,
        built: grid.Grid,
        asked: Request,
        final: Tensor,
        *,
        text: tuple[Tensor, Tensor] | None,
        draw: torch.Generator,
        known_cells: KnownCells,
        output_type: OutputType,
        steps: int,
        guidance: float,
        after: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Answer:
        """The images of one grid's clean tokens (n, 64); only the query's strip is decoded."""
        if output_type == "latent":
            return Answer(grid=job.grid, seed=job.seed, images=(final,), row=())
        with enough_memory("decoding a strip"):
            (pixels,) = models.decode_query(final[None], [built])
        check_finite(job, pixels)
        made = list(grid.cells(pixels, built.widths[-1]))
        asis = grid.cells(built.strips[-1], built.widths[-1])
        row = [
            cell if known_cells == "decode" or column in asked.targets else asis[column].to(cell)
            for column, cell in enumerate(made)
        ]
        for column, how in zip(asked.targets, asked.upsampling, strict=False):
            if how is None:
                continue
            image = grid.to_image(row[column])
            if not how.steps(steps) or self._interrupt:
                row[column] = enlarge(image, how)
                continue
            if text is not None and how.prompt is None:
                words = FluxText(*(part[None] for part in text))
            else:
                said = asked.content_prompt if how.prompt is None else how.prompt
                words = models.encode_text([said])
            width, height = how.size(*image.size)
            with enough_memory(f"upsampling to {width} x {height}"):
                row[column] = upsample(
                    models,
                    image,
                    how,
                    text=words,
                    draw=draw,
                    steps=steps,
                    guidance=guidance,
                    after=after,
                )
            check_finite(job, row[column])
        given = tuple(converted(cell, output_type) for cell in row)
        return Answer(
            grid=job.grid,
            seed=job.seed,
            images=tuple(given[column] for column in asked.targets),
            row=given,
        )

    def _draws(
        self, jobs: Sequence[Job], generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> list[torch.Generator]:
        if generator is None:
            return [draw_of(job.seed) for job in jobs]
        if isinstance(generator, torch.Generator) and len(jobs) == 1:
            return [generator]
        if isinstance(generator, torch.Generator):  # split up, so that no grouping changes a draw
            seeds = torch.randint(2**62, (len(jobs),), generator=generator, device=generator.device)
            return [torch.Generator(generator.device).manual_seed(int(s)) for s in seeds]
        if len(generator) != len(jobs):
            raise UserError(f"{len(generator)} generators for {len(jobs)} images; give one each")
        return list(generator)

    def _given_noise(
        self,
        jobs: Sequence[Job],
        shapes: Sequence[Shape],
        latents: Tensor | Sequence[Tensor] | None,
    ) -> list[Tensor]:
        if latents is None:
            return []
        found = list(latents)
        if len(found) != len(jobs):
            raise UserError(f"{len(found)} latents for {len(jobs)} images; give one each")
        for job, one in zip(jobs, found, strict=True):
            wanted = (sum(h * w for h, w in shapes[job.grid]) // CELL_STEP**2, 64)
            if tuple(one.shape) != wanted:
                raise UserError(f"latents of shape {tuple(one.shape)}: this grid takes {wanted}")
        return found

    def _given_text(
        self, asked: Sequence[Request], text: Tensor | None, pooled: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        if text is None and pooled is None:
            return []
        if text is None or pooled is None:
            raise UserError("give prompt_embeds and pooled_prompt_embeds together")
        for name, tensor in (("prompt_embeds", text), ("pooled_prompt_embeds", pooled)):
            if len(tensor) not in (1, len(asked)):
                raise UserError(f"{name}: {len(tensor)} for {len(asked)} grids; give one each")
        place, dtype = self.place, self.transformer.dtype
        return [
            (text[k % len(text)].to(place, dtype), pooled[k % len(pooled)].to(place, dtype))
            for k in range(len(asked))
        ]
