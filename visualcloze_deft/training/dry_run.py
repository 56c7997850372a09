"""`vcdeft train --dry-run`: a run's first step, checkpoint and sheet, and what the whole takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.images.reading import read_image
from visualcloze_deft.reporting.contact_sheet import check_replaceable, write_preview
from visualcloze_deft.reporting.numbers import duration, three_digits
from visualcloze_deft.storage import jsonl
from visualcloze_deft.storage.atomic import output_folder
from visualcloze_deft.training import checkpoint, preparation, run_folder


@contextmanager
def dry_run_of(run: Run) -> Iterator[Run]:
    """The run cut down to one step, in a folder of its own that is removed afterwards.

    Raises `UserError` where `run.output`, in which nothing is written, is not fit for the run.
    """
    output = Path(os.path.realpath(run.output))
    run_folder.check_output(output)
    if run_folder.saved_anything(output):
        raise UserError(
            f"output {output} holds another run; go on with --resume or choose another --output"
        )
    preparation.check_settings(run)  # of which the first step needs only some
    optimiser = run.optimiser.model_copy(update={"warmup": 0})
    logging = run.logging.model_copy(update={"trackers": ()})
    check_replaceable(sheet_of(output), way_out="move it, or choose another --output")
    if output.exists() and not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"output {output}: not writable")
    with temporary_in(nearest_folder(output.parent)) as folder:
        fields = {"output": folder, "steps": 1, "sample_every": 0}
        yield run.model_copy(update=fields | {"optimiser": optimiser, "logging": logging})


def sheet_of(output: Path) -> Path:
    """Where the sheet of a rehearsal of the run in `output` stays."""
    return output.with_name(f"{output.name}.dry-run.png")


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there: on the same disk."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


@contextmanager
def temporary_in(place: Path) -> Iterator[str]:
    """A new folder in `place`, removed in the end. Raises `UserError` where it cannot be made."""
    try:
        folder = tempfile.mkdtemp(prefix=".dry-run-", dir=place)
    except OSError as error:
        raise UserError(f"output {place}: not writable ({error.strerror})") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(run: Run, rehearsed: Run) -> list[str]:
    """What the rehearsal found, as lines for the user; its sheet is copied beside the output."""
    folder = Path(rehearsed.output)
    (step,) = jsonl.read_lines(folder / run_folder.METRICS)
    (saved,) = (folder / "checkpoints").glob("step-*")
    each = checkpoint.size(saved)
    free = shutil.disk_usage(folder.parent).free
    output = Path(os.path.realpath(run.output))
    sheet = sheet_of(output)
    output_folder(sheet.parent)
    drawn = max((folder / run_folder.SHEETS).glob("*.png"), default=None)
    if drawn is not None:
        write_preview(read_image(drawn), sheet, of=f"a dry run of {run.output}")
    size = f"{each / 1e6:,.1f} MB"
    seconds, whole = three_digits(step["seconds"]), duration(run.steps * step["seconds"])
    loss = three_digits(step["loss"])
    found = [
        f"dry run  step 1: {step['examples']} grids, {seconds} s, loss {loss}",
        f"         {run.steps} such steps: {whole} (a first step is slower)",
        f"         checkpoint {size}; {run.keep_checkpoints} are kept; {free / 1e6:,.0f} MB free",
    ]
    found += [f"         sheet {sheet}"] if drawn else []
    if warning := checkpoint.short_of_room(folder.parent, (run.keep_checkpoints + 1) * each):
        found.append(f"         {warning}")
    return found
