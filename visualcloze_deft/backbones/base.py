"""What a backbone is: one model family behind tasks, trainer, sampler, memory plan and exports.

A family is two values. `Backbone` is what files alone tell of it; its `networks` gives `Networks`,
its functions on torch modules. Training, sampling, the memory plan and exports work through them: a
further family is a folder beside `flux_fill` and a row of `table.BACKBONES`.

Latents are (b, n, c) tokens for every family; a network that computes with maps folds them itself.
Axes: b samples, n tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from visualcloze_deft.backbones.embedding_cache import Encodings
    from visualcloze_deft.config.run_settings import Adapter
    from visualcloze_deft.diffusion.process import Process
    from visualcloze_deft.grids.grid import Grid
    from visualcloze_deft.grids.prompt import Prompt

SINGLE = 4  # bytes of float32
Sides = tuple[int, int]  # inputs and outputs of a linear layer
Feature = Literal["context-cache", "lora-files", "pipeline", "quantised", "scheduled-sampling"]
"""What a family may have beside training and sampling: a context that is computed once, LoRA files
of other tools, a pipeline for `vcdeft infer`, `eval` and `compare`, frozen weights in 8 or 4 bits,
samples that a step of the model's own begins."""


class Text(Protocol):
    """Encoded prompts of b samples; what is in them is the family's own business."""

    def some(self, places: Sequence[int]) -> Self:
        """Of the prompts at `places`, which may name one several times."""


class Latents(Protocol):
    """Grids of one shape as tokens, with all that the network is shown beside them."""

    @property
    def clean(self) -> Tensor:
        """(b, n, c) without noise."""

    @property
    def is_target(self) -> Tensor:
        """(b, n), 1 for tokens that are generated."""

    def some(self, places: Sequence[int]) -> Self:
        """The samples at `places`, which may name one several times."""


class Encoders(Protocol):
    """The frozen networks around the one that is adapted.

    device: where they work and give their results. encodings: where results are kept, if anywhere.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def encodings(self) -> Encodings | None: ...
    @property
    def vae(self) -> Any: ...

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        """All of them, which may rest elsewhere than they work."""

    def encode_text(self, prompts: Sequence[Prompt | str]) -> Text: ...

    def encode_grids(
        self,
        grids: Sequence[Grid],
        *,
        clean: bool,
        draws: Sequence[torch.Generator] | None = None,
    ) -> Latents:
        """Grids of one shape. Without `clean`, hidden cells are not known and not encoded. draws:
        one for each grid, to draw what is seen from the encoder's distribution."""

    def decode_query(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Clean tokens (b, n, c) of grids to the pixels (b, 3, h, w) in -1..1 of their last row."""


class Models(Encoders, Protocol):
    """A loaded model: encoders, and the network that adapters change.

    name: as it was given. resolution: the side of a square cell in pixels.
    """

    @property
    def name(self) -> str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def networks(self) -> Networks: ...
    @property
    def denoiser(self) -> Any: ...

    @property
    def process(self) -> Process:
        """What is learnt, and how it is sampled; a model's scheduler may say."""

    @property
    def guidance(self) -> float:
        """Of sampling, where nothing else is asked for."""

    def times(self, steps: int, tokens: int) -> Tensor:
        """The (steps + 1,) sampling times from 1 to 0 for a grid of `tokens` tokens."""


class Predict(Protocol):
    """Calls the denoiser: noisy tokens (b, n, c) at times t (b,) in 0..1 to its prediction."""

    def __call__(
        self,
        denoiser: Any,
        latents: Any,
        noisy: Tensor,
        t: Tensor,
        /,
        *,
        text: Any,
        guidance: float,
    ) -> Tensor: ...


Seen = Literal["full", "isolated", "causal"]
"""What context sees: "full", all tokens, in every step; "isolated", itself and a fixed noise in the
place of targets, once; "causal", the same, but examples see themselves and the text of their task
only."""
Part: TypeAlias = "Mapping[str, tuple[Tensor, Tensor]]"
"""Keys and values (b, n, h, d) of some tokens in every layer, by its name; with b = 1 they serve
any number of samples."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Image tokens of a grid whose context is computed once. targets: what is generated. query: of
    known cells beside them, in a causal context, whose examples do not see these; else None."""

    targets: int
    query: int | None = None


class ContextCache(Protocol):
    """The denoiser for samples of one shape whose targets are at the same places.

    Tokens of text and known cells are context. What attention needs of them is kept, so that a call
    may compute the m tokens of targets alone. Noisy tokens are (b, n, c), times t (b,) in 0..1.
    examples: what `prefill_examples` kept, or a part of an earlier cache of the same examples.
    """

    examples: Part | None

    @property
    def targets(self) -> Tensor:
        """(m,) the places of the targets' tokens."""

    def some(self, places: Sequence[int]) -> Self:
        """Of the samples at `places`, with what is kept of them."""

    def full(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The prediction (b, n, c) with full attention; keeps the context anew."""

    def prefill_examples(self, task: Any) -> None:
        """Keep the examples, which see themselves and the text of their task alone, at time 1."""

    def prefill(self) -> None:
        """Keep a context that sees itself, and noise in the place of targets, at time 1: all of it,
        or what `examples` leaves, which sees these too. The noise is the same for all samples."""

    def active(self, noisy: Tensor, t: Tensor) -> Tensor:
        """The prediction (b, m, c) of the targets, which see the context that is kept."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """A family's functions on torch modules."""

    load: Callable[..., Models]
    """A model by its name and how it is wanted, see `flux_fill.loading.load_models`."""

    load_encoders: Callable[..., Encoders]
    """The same without the denoiser."""

    load_denoiser: Callable[..., Any]
    """The denoiser alone."""

    predict: Predict
    """The call of the denoiser."""

    probe: Callable[[Any, torch.Generator], Mapping[str, Any]]
    """Random inputs of a denoiser by the names of its arguments, for the proof of an export."""

    load_lora: Callable[[Path, Any], None] | None = None
    """Reads a LoRA file into a denoiser as diffusers' own loader does. None where the family has no
    "lora-files"."""

    context_cache: Callable[..., ContextCache] | None = None
    """A `ContextCache` of a denoiser and latents, told text and guidance by name. None where the
    family has none."""


class Sizes(Protocol):
    """The sides of a denoiser. linear: its linear layers by name. width: features of a token;
    heads, head: of its widest attention, and features of one."""

    @property
    def linear(self) -> Mapping[str, Sides]: ...
    @property
    def blocks(self) -> tuple[str, ...]:
        """Names, in the order of the forward pass."""

    @property
    def parameters(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a process computes at once: so many grids of `image` and `text` tokens each.

    strip: image tokens of the widest row of a grid; without, a grid is one row. seen: what
    context sees; unless all, its calls are its own, and the targets read their keys and values.
    """

    grids: int
    image: int
    text: int
    strip: int | None = None
    seen: Seen = "full"

    @property
    def widest(self) -> int:
        return self.image if self.strip is None else self.strip

    @property
    def tokens(self) -> int:
        return self.grids * (self.image + self.text)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a forward pass leaves for the backward pass, in bytes.

    blocks: what autograd keeps of each block. factors: of that, DEFT's Q and A, which stay also
    where a block is recomputed. entry: what it keeps of a recomputed one, its input.
    outside: what it keeps after the last. positions: sines and cosines that all blocks read.
    batch: the encoded grids. work: what the backward pass of one block holds beside.
    """

    blocks: tuple[int, ...]
    factors: tuple[int, ...]
    entry: int
    outside: int
    positions: int
    batch: int
    work: int

    def kept(self, recomputed: int) -> int:
        """By autograd when the forward pass ends, the first `recomputed` blocks recomputed."""
        read = self.positions if recomputed < len(self.blocks) else 0
        return self.outside + recomputed * self.entry + sum(self.blocks[recomputed:]) + read

    def peak(self, recomputed: int) -> int:
        """The most at any time. A recomputed block comes back when all later ones are done."""
        before = self.outside + recomputed * self.entry + sum(self.factors[:recomputed])
        pairs = zip(self.blocks[:recomputed], self.factors, strict=False)
        again = max((kept - factors for kept, factors in pairs), default=0)
        most = before + max(again, sum(self.blocks[recomputed:]))
        return self.batch + self.positions + self.work + most


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What is known of a family from a model's files, before any weight is read."""

    name: str
    """Of the family."""

    denoiser: str
    """The folder of the network that adapters change."""

    recognises: Callable[[str, Mapping[str, Any]], bool]
    """Whether a denoiser is of this family, by the name of its class and its settings."""

    check: Callable[..., None]
    """Raises `UserError` where a model, or those of its `parts` that are named, is not whole."""

    refuses: Callable[[int, int, int], str | None]
    """Told the rows, columns and targets of a grid: why the family cannot make it, or None."""

    blocks: str
    """A regular expression for the names of the denoiser's blocks: those that diffusers recomputes.
    They are compiled and quantised, too."""

    target_modules: str
    """A regular expression for the layers that get an adapter by default."""

    resolution: Callable[[str], int]
    """The side of a square cell in pixels, of a model."""

    sizes: Callable[[str], Sizes]
    """Of a model's denoiser."""

    text_tokens: Callable[[str], int]
    """How many tokens of text the denoiser of a model reads."""

    encoders: Callable[[str], Mapping[str, int]]
    """How many parameters a model's other networks have, by folder."""

    vae: Callable[[str], Mapping[str, Any]]
    """The settings of a model's `AutoencoderKL`."""

    activations: Callable[[Any, Adapter, Collection[str], Load, int], Activations]
    """Bytes of a training step: told the denoiser's sizes, the adapter's settings, the layers that
    have one, the load, and the bytes of a value."""

    features: frozenset[Feature]
    """What the family has beside training and sampling."""

    networks: Callable[[], Networks]
    """Its functions on torch modules, imported when they are asked for."""

    flops: Callable[[Any, int, int, Split | None], float] | None = None
    """Operations of a sample's training step: told the denoiser's settings, image tokens, text
    tokens, and how a context that is computed once splits them, else None. None where operations
    are not counted."""
