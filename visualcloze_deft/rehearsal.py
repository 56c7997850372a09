"""`vcdeft train --dry-run`: a run's first step, checkpoint and sheet, and what the whole takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from visualcloze_deft import checkpoint, rundir
from visualcloze_deft.errors import UserError
from visualcloze_deft.settings import Run


def rehearsal(run: Run) -> Run:
    """The run cut down to one step, in a folder of its own beside `run.output`."""
    if rundir.saved_anything(Path(run.output)):
        raise UserError(
            f"output {run.output} holds another run; go on with --resume or choose another --output"
        )
    rundir.check_settings(run)  # of which the first step needs only some
    optimiser = run.optimiser.model_copy(update={"warmup": 0})
    watch = run.watch.model_copy(update={"trackers": ()})
    output = Path(run.output)
    beside = str(output.with_name(f"{output.name}.dry-run"))
    fields = {"output": beside, "steps": 1, "sheet_every": 0}
    return run.model_copy(update=fields | {"optimiser": optimiser, "watch": watch})


def clear(rehearsed: Run) -> None:
    """Remove what a rehearsal left that was ended."""
    shutil.rmtree(rehearsed.output, ignore_errors=True)


def report(run: Run, rehearsed: Run) -> list[str]:
    """What the rehearsal found, as lines for the user; of its folder only the sheet stays."""
    folder = Path(rehearsed.output)
    (line,) = (folder / rundir.METRICS).read_text(encoding="utf-8").splitlines()
    step = json.loads(line)
    (saved,) = (folder / "checkpoints").glob("step-*")
    each = checkpoint.size(saved)
    free = shutil.disk_usage(folder.parent).free
    sheet = folder.with_suffix(".dry-run.png")
    shutil.copyfile(max((folder / "sheets").glob("*.png")), sheet)
    shutil.rmtree(folder)
    hours = run.steps * step["seconds"] / 3600
    found = [
        f"dry run  step 1: {step['examples']} grids, {step['seconds']:.1f} s, loss {step['loss']}",
        f"         {run.steps} such steps: {hours:.1f} hours (a first step is slower)",
        f"         checkpoint {each / 1e6:,.1f} MB, {run.keep} are kept; {free / 1e6:,.0f} MB free",
        f"         sheet {sheet}",
    ]
    if warning := checkpoint.short_of_room(folder.parent, (run.keep + 1) * each):
        found.append(f"         {warning}")
    return found
