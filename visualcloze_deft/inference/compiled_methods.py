"""A pipeline's examples, run once and kept for all queries of their task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.inference.arguments import checked_rows, enough_memory, requests_of
from visualcloze_deft.inference.compiled import Compiled, read_compiled
from visualcloze_deft.inference.example_parts import ExampleParts, key_of
from visualcloze_deft.inference.fingerprints import Used, weights_of
from visualcloze_deft.inference.generation import Generating
from visualcloze_deft.inference.pictures import Picture
from visualcloze_deft.inference.request import Request
from visualcloze_deft.sampling.context import Context
from visualcloze_deft.sampling.denoising import GUIDANCE, conditions_of, examples_of
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.task_registry.task import Task


class CompiledMethods:
    """What a pipeline does with examples that are computed before any query is known."""

    blend: ActiveAdapters
    config: Any
    lora: str | None
    quantise: Bits = "none"
    tasks: Mapping[str, Task]
    transformer: Any
    _compiled: Compiled | None = None
    _examples: ExampleParts | None = None

    if TYPE_CHECKING:  # what the pipeline's other classes have

        def context_for(self, steps: int) -> Context: ...

        def check_parts(self, asked: Sequence[Request], *, with_text: bool) -> None: ...

        def maybe_free_model_hooks(self) -> None: ...

        @property
        def models(self) -> Models: ...

    def compile_examples(
        self,
        rows: Sequence[Sequence[Picture | None]],
        *,
        task: str | None = None,
        task_prompt: str | None = None,
        resolution: int | None = None,
        guidance_scale: float = GUIDANCE,
    ) -> Compiled:
        """Run examples once. `Compiled.save` writes the result, `load_compiled` uses it.

        rows: examples. A last row with a None is a query, whose place is then filled by other
        queries; its pictures are not used. The adapters in use must know a causal context.
        """
        own = {"task": task, "task_prompt": task_prompt, "content_prompt": None}
        (asked,) = requests_of(
            None,
            self.tasks,
            rows=with_query(checked_rows(rows)),
            own=own,
            seed=None,
            images=1,
            upsampling=None,
        )
        return self.compile_request(asked, resolution=resolution, guidance=guidance_scale)

    @torch.no_grad()
    def compile_request(
        self, asked: Request, *, resolution: int | None, guidance: float
    ) -> Compiled:
        """`compile_examples` for a checked grid."""
        if self.context_for(1).seen != "causal":
            raise UserError(
                "compile: examples see the query unless the context is causal; use an adapter "
                "that was trained with context=causal, or allow others with "
                "set_context('causal', untrained=True)"
            )
        check_examples(asked)
        how = Generating(guidance=guidance, resolution=resolution)
        self.check_parts([asked], with_text=True)
        models, side = self.models, how.resolution or self.config.resolution
        built = grid.build(asked.rows, resolution=side, cells=self.config.cells)
        given = conditions_of(models, [built], [asked.prompt], seen="causal")
        with enough_memory("running the examples"):
            part = examples_of(models, given, guidance=how.guidance)
        self.maybe_free_model_hooks()
        return Compiled(
            rows=tuple(tuple(filter(None, row)) for row in asked.rows[:-1]),
            task=asked.task,
            task_prompt=asked.task_prompt,
            targets=asked.targets,
            made_with=self.made_with(side, guidance),
            key=key_of(built, asked.prompt, guidance=guidance),
            part=part,
        )

    def load_compiled(self, compiled: str | Path | Compiled) -> None:
        """Answer query rows with compiled examples from now on: calls give a row alone.

        Raises `UserError` where they were compiled with another model, adapters or settings.
        """
        if not isinstance(compiled, Compiled | str | Path):
            raise UserError(f"compiled {brief(compiled)}: give a file of compiled examples")
        found = compiled if isinstance(compiled, Compiled) else read_compiled(Path(compiled))
        asked = found.made_with["resolution"], found.made_with["guidance"]
        found.check_made_with(self.made_with(*asked), where="compiled")
        if found.part is None:
            raise UserError(
                "compiled examples in use already: load the file, or what compile_examples() gave"
            )
        self._compiled, self._examples = found, None

    def unload_compiled(self) -> None:
        """Take examples from the rows of calls again."""
        self._compiled = self._examples = None

    def made_with(self, side: int, guidance: float) -> dict[str, Any]:
        """What tells this pipeline from others, see `compiled.COMPARED`."""
        used, model = [], self.config.get("_name_or_path") or ""
        for name, scale in self.blend.scales.items():
            hashes = self.blend.hashes[name]
            if hashes is None:
                raise UserError(
                    f"adapter {name!r}: compiled examples hold the hash of its file, and it has "
                    "none; load it from a file"
                )
            used.append(Used(folder=self.blend.places[name], scale=scale, **hashes._asdict()))
        return {
            **weights_of(model, self.lora, used),
            "quantise": self.quantise,
            "clip_text": self.config.clip_text,
            "cells": self.config.cells,
            "resolution": side,
            "guidance": float(guidance),
        }

    def compiled_for(self, side: int, guidance: float) -> ExampleParts | None:
        """The compiled examples in use, which must be this pipeline's as it is now."""
        if self._compiled is None:
            return None
        self._compiled.check_made_with(self.made_with(side, guidance), where="compiled")
        place, dtype = self.models.device, self.transformer.dtype
        if self._examples is None or not self._examples.on(place, dtype):
            assert self._compiled.part is not None
            self._examples = ExampleParts((self._compiled.key, self._compiled.part))
            self._examples.to(place, dtype)
        return self._examples


def check_examples(asked: Request) -> None:
    if len(asked.rows) < 2:
        raise UserError("there is no example to compile; give rows of them before the query")


def with_query(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Rows that end in a query: one whose last picture is asked for, where all are examples."""
    complete = bool(rows) and all(cell is not None for cell in rows[-1])
    return [*rows, [*rows[-1][:-1], None]] if complete else list(rows)
