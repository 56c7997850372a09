"""What a run will draw, encoded before it: `vcdeft data cache`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm

from visualcloze_deft.backbones.base import Encoders
from visualcloze_deft.backbones.embedding_cache import Encodings, entries
from visualcloze_deft.backbones.precision import dtype_of
from visualcloze_deft.backbones.table import backbone_of
from visualcloze_deft.config.run_settings import ContextMode, Run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids.prompt import of_task
from visualcloze_deft.sampling.encoding import PixelExample
from visualcloze_deft.storage.atomic import check_foreign, output_folder
from visualcloze_deft.training import preparation, run_data, run_folder
from visualcloze_deft.training.datasets import PixelDataset

HEX = "[0-9a-f]" * 2  # the names of the folders that `Encodings` stores in


def prepare(run: Run, folder: Path) -> Mixture:
    """What `run` draws from; raises `UserError` where it or the folder cannot be used."""
    backbone = backbone_of(run.model)
    backbone.check(run.model)
    preparation.check_features(run, backbone)
    check_foreign(folder, (run_folder.INDEX, HEX), what="encodings of vcdeft")
    with run_folder.undone_on_failure(folder, fresh=not folder.exists()):
        output_folder(folder)
        mixture = run_data.mixture_of(run, cache=folder / run_folder.INDEX)
        preparation.check_layout(mixture, backbone)
        return mixture


def encode_run(run: Run, folder: Path, *, examples: int | None, text_only: bool) -> None:
    """Encode this process's share of the first examples of `run` into `folder`, and what it came
    to in all processes, if it is the first of them.

    examples: None: all of a run with as many processes as this group has.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    mixture = prepare(run, folder)
    count = examples or length_of(run, mixture, processes=process.num_processes)
    encodings = Encodings(folder)
    encoders = (
        backbone_of(run.model)
        .networks()
        .load_encoders(
            run.model,
            dtype=dtype_of(run.precision, process.device.type),
            device=str(process.device),
            clip_text=run.clip_text,
            encodings=encodings,
        )
    )
    loader = DataLoader(
        PixelDataset(mixture),
        sampler=range(process.process_index, count, process.num_processes),
        batch_size=1,
        collate_fn=list,
        num_workers=run.data.workers,
    )
    first = process.is_main_process
    bar = tqdm(loader, desc="encoding", unit="example", disable=not first)
    encode_all(encoders, (drawn for (drawn,) in bar), text_only=text_only, context=run.context)
    used = encodings.used_by_all()
    process.destroy_process_group()
    if first:
        sizes = [path.stat().st_size for path in entries(folder)]
        tqdm.write(f"encodings {folder}: {used}")
        tqdm.write(f"{count} examples; {len(sizes)} entries, {sum(sizes) / 1e6:.1f} MB")


def encode_all(
    encoders: Encoders,
    examples: Iterable[PixelExample | UserError],
    *,
    text_only: bool,
    context: ContextMode = "full",
) -> None:
    """Encode examples for `encoders.encodings` alone, whatever it has already."""
    assert encoders.encodings is not None
    for drawn in examples:
        if isinstance(drawn, UserError):
            raise drawn
        causal = context == "causal"  # whose examples read the text of the task alone
        encoders.encode_text([drawn.prompt, *([of_task(drawn.prompt)] if causal else [])])
        if not text_only:
            encoders.encode_grids([drawn.grid], clean=True)
        if not encoders.encodings.storing:
            raise UserError(
                f"--output {encoders.encodings.folder}: nothing more can be stored there; make "
                "room and give the same again, it goes on where it stopped"
            )


def length_of(run: Run, mixture: Mixture, *, processes: int) -> int:
    """How many examples `run` draws in all its steps."""
    plan = preparation.plan_of(run, mixture, processes=processes)
    return sum(step.examples for step in islice(plan.steps(0), run.steps))
