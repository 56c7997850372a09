"""All settings of a run: files in TOML and dotted overrides become one frozen, checked value."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from visualcloze_deft.config.near_settings import meant
from visualcloze_deft.config.numbers import (
    HEAVIEST,
    LARGEST,
    Count,
    Factor,
    Positive,
    Probability,
    Weight,
    _Momentum,
)
from visualcloze_deft.config.overrides import apply_override, find_config
from visualcloze_deft.config.patterns import sound_pattern
from visualcloze_deft.config.secrets import without_secrets
from visualcloze_deft.config.source_specs import from_root, spec_from_root
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.cell_sizes import Cells
from visualcloze_deft.grids.prompt import ClipText
from visualcloze_deft.storage.adapter_places import adapter_folder
from visualcloze_deft.storage.atomic import write_text
from visualcloze_deft.storage.text_files import brief
from visualcloze_deft.storage.toml_files import read_toml

ContextMode = Literal["full", "isolated", "causal", "mixed"]
Times = Literal["logit-normal", "uniform"]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "trackio",
    "comet_ml",
    "aim",
    "mlflow",
    "clearml",
    "dvclive",
    "swanlab",
]  # accelerate's trackers, each named as its package

LONGEST_NAME = 60  # characters of a trigger or a class word
Method = Literal["deft", "deft-relaxed", "para", "lora"]  # of an adapter
Bits = Literal["none", "int8", "nf4", "fp8"]  # what frozen blocks are kept in
Precision = Literal["auto", "float32", "bfloat16"]  # of a frozen base


class Section(BaseModel):
    """Settings. True and false stand for numbers nowhere, and no text holds the character 0."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # of the sections `FOREIGN`; TOML has no null
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, place: ValidationInfo) -> Any:
        kinds = kinds_in(cls.model_fields[str(place.field_name)].annotation)
        section = any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
        for one in () if section else leaves(value):
            if isinstance(one, bool) and not kinds & {bool, Any}:
                raise ValueError("true and false are no numbers and no texts")
            if isinstance(one, str) and "\0" in one:
                raise ValueError("holds the character 0, which no name has")
        return value


def kinds_in(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation, *(kind for part in get_args(annotation) for kind in kinds_in(part))}


def leaves(value: Any) -> Iterator[Any]:
    """The values in lists and tables within one another, or the value itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for one in value:
        yield from leaves(one)


def _some_positive(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not any(weights):
        raise ValueError("at least one must be above 0")
    return weights


def _folder_or_word(place: str) -> str:
    return place if place in ("", "run") else os.path.abspath(place)


def _adapter_place(place: str | None) -> str | None:
    return place and str(adapter_folder(Path(place)))


def _none_or_some(every: int) -> int:
    if not (every == 0 or 2 <= every <= LARGEST):
        raise ValueError("give 0 for none, or 2 and more for every n-th item")
    return every


class Recipe(Section):
    """How a grid is drawn. The defaults are VisualCloze's (arXiv 2504.07960)."""

    examples: Annotated[
        tuple[Weight, ...],
        Field(min_length=1, max_length=17),
        AfterValidator(_some_positive),
    ] = (0.3, 0.4, 0.3)
    """Weight of 0, 1, 2, ... in-context examples."""
    run_length: Positive = 16
    """Consecutive training examples with one number of rows: batches need not be torn apart."""
    hide_target: Probability = 0.5
    """How often the task's own targets are hidden; otherwise one uniformly drawn column."""
    keep_task: Probability = 0.8
    """How often the task sentence is said."""
    keep_content: Probability = 0.8
    """How often the content sentence is said."""
    caption_dropout: Probability = 0.1
    """How often both are left out."""
    paraphrase: Probability = 1.0
    """How often phrases and sentences are drawn among all that mean the same, not the usual ones.
    """
    shuffle_columns: bool = True
    """Whether condition columns come in a random order."""


_Source = Annotated[str, AfterValidator(spec_from_root)]
_Place = Annotated[str, AfterValidator(from_root)]


class Data(Section):
    """What is trained on."""

    sources: Annotated[tuple[_Source, ...], Field(min_length=1)] = ("scenes",)
    """NAME or NAME=PATH each: scenes, subject, folder, photos, graph200k, dreambooth,
    dreambench-plus, insdet. A relative path is one of the folder that the command is given in; the
    run records where that is."""
    tasks: str = "all"
    """"all", names, groups and patterns joined by commas: "-restoration/*" takes tasks out,
    "depth-to-image=2" draws one twice as often. Of "all", groups and patterns, tasks without data
    are left out, and every group is drawn equally often."""
    task_folders: tuple[_Place, ...] = ()
    """Folders with task files of your own, beside the shipped ones."""
    weights: dict[str, Weight] = {}
    """Task, group or pattern -> how often it is drawn, relative to 1; 0: not at all. A group counts
    as one, however many tasks it has; a task that is named here counts by itself. Of several keys
    for one task the last counts; groups and patterns do not weigh what `tasks` names."""
    resolution: Annotated[int, Field(ge=32, le=2048, multiple_of=16)] | Literal["model"] = "model"
    """Side of a square cell in pixels; "model": the model's own (tiny 128, FLUX 384)."""
    cells: Cells = "row"
    """Shape of cells: "row", all of a row in that of its first picture, as VisualCloze generates;
    "own", each in its picture's, at the height of its row; "square", as VisualCloze was trained."""
    annotate: dict[str, _Place] = {}
    """Role -> what computes it from the target where a source lacks it: a model of transformers (a
    folder or hub id), or a folder that `vcdeft data annotate` wrote."""
    validation_every: Annotated[int, AfterValidator(_none_or_some)] = 0
    """Every n-th item of each source is never trained on, and is what sheets show; 0: none. Where
    items share pictures, every n-th unit: of DreamBooth a subject, of InsDet an object or place, of
    `photos` a photo, and one at least."""
    skip_at_most: Probability = 0.02
    """Items that cannot be read are replaced by others and listed in `skipped.jsonl`; where they
    are a larger share than this of at least 100 drawn, the run stops."""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Reading processes per training process."""
    embedding_cache: Annotated[str, AfterValidator(_folder_or_word)] = ""
    """Folder in which encodings of strips and texts are kept and looked up, of this run and others;
    "run": in the run folder; "": none are kept."""
    recipe: Recipe = Recipe()


def _one_name(text: str) -> str:
    if not text.isprintable() or text != text.strip() or len(text) > LONGEST_NAME:
        raise ValueError(
            f"expected a word or two on one line, up to {LONGEST_NAME} characters that can be seen"
        )
    return text


_Name = Annotated[str, AfterValidator(_one_name)]


class Subject(Section):
    """The one thing that the source `photos` shows: its name in texts, and others of its class."""

    trigger: _Name = ""
    """Word that stands for the subject, e.g. "sks": put into every caption. Choose one that means
    nothing else. "": captions stay as they are."""
    class_word: _Name = ""
    """What the subject is, e.g. "dog". Photos without a caption are called "a photo of sks dog" and
    the like; without trigger and class word, they have no content sentence."""
    class_data: _Source = ""
    """Source of other things of the class for prior preservation, e.g. folder=dogs or
    dreambooth=PATH; "": none. Pairs of two photos of one thing are trained on as subject-driven.
    Single pictures are paired with each other, as things of one class."""
    class_weight: Factor | Literal["auto"] = "auto"
    """Weight of class examples in the loss, relative to the subject's. A weight w draws w / (1 + w)
    of all examples from the class; "auto": 1 where there is `class_data`, as in DreamBooth."""

    @property
    def class_share(self) -> float:
        """Share of the class in all examples."""
        if not self.class_data:
            return 0.0
        weight = 1.0 if self.class_weight == "auto" else self.class_weight
        return weight / (1 + weight)


class Adapter(Section):
    """Which adapter, and how large."""

    method: Method = "deft"
    """deft: (I - Q Q^T) W + s Q R, Q = qr(P); deft-relaxed: P and relu(P) for Q; para: no R."""
    rank: Positive = 32
    """Rank of the adapter."""
    alpha: Positive | None = None
    """Scale of what is injected: s = alpha / rank, 1 where not set. PaRa has none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[str, AfterValidator(sound_pattern)] = "default"
    """Regular expression for whole layer names; "default": attention and feed-forward layers."""
    init_from: Annotated[str | None, AfterValidator(_adapter_place)] = None
    """An adapter or run folder of the same method and rank that training starts from. Its layers
    and its scale are kept: `alpha` and `target_modules` must not be set beside it."""
    p_lr_ratio: Factor = 0.1
    """Learning rate of DEFT's P relative to R's (the authors' 0.1); PaRa's P takes the full."""


class Optimiser(Section):
    """AdamW and its schedule."""

    lr: Factor = 1e-4
    """Learning rate that is reached after the warm-up."""
    betas: tuple[_Momentum, _Momentum] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    warmup: Count | Literal["auto"] = "auto"
    """Steps until the learning rate is reached; "auto": 50, or a tenth of a short run."""
    schedule: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: Factor = 2.0
    """Largest gradient norm."""

    def warmup_of(self, steps: int) -> int:
        """Warm-up of a run of `steps` steps."""
        return min(50, steps // 10) if self.warmup == "auto" else self.warmup


class Logging(Section):
    """What is written while a run trains, for a person to look at; nothing here changes it."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves go beside `metrics.jsonl`: accelerate's trackers by name, e.g.
    ["tensorboard", "wandb"]; each is a package of its own."""
    project: str = "visualcloze-deft"
    """What trackers other than TensorBoard, which writes into the run folder, file the run under.
    """
    tracker_options: dict[Tracker, dict[str, Any]] = {}
    """Tracker -> what else it is started with, e.g. logging.tracker_options.wandb.entity=us. Keys,
    tokens and passwords are not written into the run folder: give them again with --resume, or in
    the tracker's environment variable."""
    norms_every: Count = 50
    """Steps between measurements of the adapter's norms; 0: never."""
    validate_every: Count = 0
    """Steps between losses on held-out grids, also before the first step and after the last; 0:
    never. Needs `data.validation_every` where data is more than scenes."""
    validation_examples: Positive = 64
    """Held-out grids, the same each time, each at five times."""


OWNED = {
    "zero_optimization.stage": "zero",
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "optimiser.max_grad_norm",
    "optimizer": "optimiser",
    "scheduler": "optimiser.schedule",
}  # DeepSpeed's settings that one of ours decides


ON_CPU = {"device": "cpu", "pin_memory": False}  # which DeepSpeed 0.19 does by itself
OFFLOADED: dict[str, dict[str, Any]] = {
    "none": {},
    "optimiser": {"offload_optimizer": ON_CPU},
    "parameters": {"offload_optimizer": ON_CPU, "offload_param": ON_CPU},
}  # DeepSpeed's settings for `offload`


def _not_owned(settings: dict[str, Any]) -> dict[str, Any]:
    for name, ours in OWNED.items():
        *sections, last = name.split(".")
        found: Any = settings
        for section in sections:
            found = found.get(section, {})
            if not isinstance(found, Mapping):
                raise ValueError(f"{section} is a table of settings, not {brief(found)}")
        if last in found:
            raise ValueError(f"{name} is decided by the setting {ours}; set that one")
    return settings


class Run(Section):
    """Everything `vcdeft train` needs; each field is `--set NAME=VALUE` on the command line."""

    model: str = "tiny"
    """"tiny" (the built-in model), a diffusers folder, or a hub id of FLUX.1-Fill's layout."""
    model_lora: str | None = None
    """A FLUX LoRA merged into the base before training, e.g. VisualCloze's released one."""
    output: str = "runs/demo"
    """The run folder. A run file may name another one than runs/demo."""
    steps: Positive = 1000
    """Optimiser steps in all."""
    batch: Positive = 1
    """Grids per process and step."""
    batch_tokens: Count = 0
    """Instead of `batch`: as many grids per process and step as come to this many tokens, small
    and large ones spread so that processes wait little for each other; 0: `batch` grids."""
    accumulate: Positive = 1
    """Batches whose gradients are summed before a step."""
    processes: Count = 0
    """Training processes. 0 starts one per GPU, or two on a machine without a GPU."""
    zero: Literal[0, 1, 2, 3, "auto"] = 2
    """DeepSpeed ZeRO stage: 0, 1, 2, 3, or "auto" for the lowest whose memory fits."""
    offload: Literal["none", "optimiser", "parameters"] = "none"
    """What a GPU leaves in the computer's memory: the optimiser's state (ZeRO 1 to 3), or that and
    its share of the weights (ZeRO 3). That memory is not pinned, so that a machine with little of
    it can still swap; with plenty, pinned memory is faster to copy:
    deepspeed.zero_optimization.offload_optimizer.pin_memory=true."""
    deepspeed: Annotated[dict[str, Any], AfterValidator(_not_owned)] = {}
    """Anything of DeepSpeed's configuration, over what is set here, e.g.
    deepspeed.zero_optimization.stage3_max_live_parameters=100000000."""
    precision: Precision = "auto"
    """Of the frozen base; "auto": bfloat16 on NVIDIA's GPUs that compute in it, float32 elsewhere.
    The adapter is float32."""
    quantise: Bits = "none"
    """What the frozen blocks are kept in; int8 and nf4 (4 bits) need bitsandbytes, fp8 does not."""
    offload_encoders: bool = False
    """Text encoders and VAE rest in main memory and come to the GPU while they encode or decode:
    worth it where `data.embedding_cache` has most of what is asked."""
    gradient_checkpointing: Count | Literal["auto", "none", "all"] = "auto"
    """How many blocks, from the first on, are recomputed in the backward pass: less memory, all of
    them about a third more time. "auto": as many as memory needs; on CPU none."""
    attention: str = "auto"
    """The kernel that computes attention: "auto"; "native", torch's own choice; one of torch's:
    "cudnn", "flash", "efficient", "math"; or any other backend of diffusers. On a GPU "auto" takes
    the fastest of torch's whose results, forward and backward, agree with plain attention in
    float32 for this run's shapes; on a CPU it is "native". Where gradients are not finite and
    another kernel mends them, the run goes on with that one."""
    compile: bool = False
    """Compile each block (torch.compile): some minutes at the start for faster steps. Under ZeRO-3
    weights come and go between the operations of a block: not there."""
    context: ContextMode = "full"
    """What known cells and text see: "full", all, with the noise of each step; "isolated",
    themselves, and one noise in the place of all targets, so that inference computes them once;
    "causal", the same with examples that do not see the query, so that one file of them serves all
    queries, see `vcdeft compile`; "mixed", an adapter for "full" and "isolated", each example one
    of them."""
    context_weight: Probability = 1.0
    """What a token that is only to be copied counts in the loss; VisualCloze's 1."""
    clip_text: ClipText = "fit"
    """Of a text that is too long for CLIP: "fit" keeps the content sentence and drops the layout
    first; "original" keeps the beginning, as VisualCloze's released weights were trained."""
    guidance: Annotated[float, Field(ge=-HEAVIEST, le=HEAVIEST)] = 1.0
    """Guidance the model is told in training; VisualCloze's 1."""
    timestep_sampling: Times = "logit-normal"
    """How training times are drawn; "uniform" sees more of the noisiest ones."""
    timestep_shift: Factor = 1.0
    """Times t become s t / (1 + (s - 1) t): more than 1 trains more on noise, where layout and
    colours are decided."""
    scheduled_sampling: Probability = 0.0
    """How often a sample is not on the straight line from picture to noise but where a sampling
    step of the model's own leads: it learns to mend its errors and, where the answer is open, the
    mean of what fits. One more forward pass a batch."""
    ema: _Momentum = 0.0
    """Decay of a running average of what is trained, e.g. 0.999; the average is published as
    `adapter`, the last step's as `adapter-last`. 0: none."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: examples, noise, times, and the start of the adapter."""
    save_every: Positive = 200
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints that stay; older ones go."""
    timeout: Annotated[float, Field(ge=1, le=LARGEST)] = 1800.0
    """Seconds without progress after which a process that hangs, or waits for one, ends the run
    with the reason: more than a step, a save, a sheet, or loading and downloading the model takes.
    On GPUs NCCL gives up by itself after 10 minutes in a collective operation of DeepSpeed's."""
    not_finite_at_most: Count = 5
    """Steps in a row without a finite gradient, each skipped by all processes, that a run bears."""
    sample_every: Count = 0
    """Steps between sample sheets; 0: only before the first step and after the last."""
    sample_grids: Count = 12
    """Grids on a sample sheet at most, of the tasks drawn most often, up to four of a task; each
    takes 20 sampling steps of the adapter, once also of the base. 0: no sheets."""
    data: Data = Data()
    subject: Subject = Subject()
    adapter: Adapter = Adapter()
    optimiser: Optimiser = Optimiser()
    logging: Logging = Logging()


def load_run(
    file: str | None, overrides: Sequence[str] = (), *, options: Sequence[tuple[str, str]] = ()
) -> Run:
    """A run file (a path, or the name of a shipped one) with `a.b=value` overrides on top.

    options: overrides that go before, each behind the name of the option that stands for it.
    """
    fields = read_toml(find_config(file)) if file else {}
    given: dict[str, str] = {}
    for option, override in [*options, *(("--set", override) for override in overrides)]:
        apply_override(fields, override)
        given[override.partition("=")[0].strip()] = option
    own = file is not None and Path(file).is_file()  # a shipped one is not at fault
    return parse_run(fields, where=str(file) if own else "command line", given=given)


RENAMED = {
    "sheet_every": "sample_every",
    "checkpoint_blocks": "gradient_checkpointing",
    "times": "timestep_sampling",
    "time_shift": "timestep_shift",
    "rollout": "scheduled_sampling",
    "keep": "keep_checkpoints",
    "watch": "logging",
    "logging.evaluate_every": "logging.validate_every",
    "logging.evaluate_examples": "logging.validation_examples",
    "adapter.layers": "adapter.target_modules",
    "adapter.start": "adapter.init_from",
    "optimiser.clip": "optimiser.max_grad_norm",
    "data.hold_out": "data.validation_every",
    "data.encodings": "data.embedding_cache",
    "data.recipe.drop_text": "data.recipe.caption_dropout",
}  # settings of before 0.1.0
EITHER = (
    ["data", "resolution"],
    ["gradient_checkpointing"],
    ["subject", "class_weight"],
)  # settings that are a number or a word


def parse_run(
    fields: Mapping[str, Any], *, where: str, given: Mapping[str, str] | None = None
) -> Run:
    """The settings in `fields`. Messages name the option in `given` that gave a setting, or
    `where`."""
    try:
        return Run.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [str(part) for part in first["loc"]]
        one_of = next((p for p in EITHER if loc[: len(p)] == p), loc)  # without the kind tried
        place = ".".join(one_of)
        for name, option in (given or {}).items():
            unknown_section = first["type"] == "extra_forbidden" and name.startswith(f"{place}.")
            if unknown_section or f"{place}.".startswith(f"{name}."):
                where = option
        if first["type"] == "extra_forbidden":
            if place in RENAMED:
                raise UserError(
                    f"{where}: the setting {place} is called {RENAMED[place]} now"
                ) from None
            raise UserError(
                f"{where}: unknown setting {place!r}; {meant(place, setting_names())}"
            ) from None
        said = first["msg"].removeprefix("Value error, ").lower()
        raise UserError(f"{where}: {place} = {brief(first['input'])}: {said}") from None


def description(setting: str) -> str:
    """The first sentence of a setting's docstring, e.g. of "adapter.rank".

    >>> description("adapter.rank")
    'Rank of the adapter.'
    """
    section: Any = Run
    *sections, last = setting.split(".")
    for name in sections:
        section = section.model_fields[name].annotation
    text = " ".join((section.model_fields[last].description or "").split())
    return text.split(". ")[0].removesuffix(".") + "."


def setting_names(section: type[BaseModel] = Run, prefix: str = "") -> list[str]:
    """Dotted names of all settings."""
    names = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += setting_names(kind, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def write_run(run: Run, path: Path) -> None:
    """Write all settings of `run` but secrets in TOML; the file at `path` is replaced whole or not
    at all."""
    fields = without_secrets(run.model_dump(mode="json", exclude_none=True))
    write_text(path, tomli_w.dumps(fields))


def config_for(model: str | None, sources: Sequence[str] = ()) -> str | None:
    """The shipped run file that holds where none is named: the small base has one for scenes, one
    for a few photos of one thing, and one for other pictures of the user's own."""
    if model not in (None, "tiny"):
        return None
    if sources and all(s.startswith("photos=") for s in sources):
        return "subject"
    return "tiny-photos" if any(not s.startswith("scenes") for s in sources) else "tiny"
