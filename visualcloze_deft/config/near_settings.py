"""Which setting of a run was meant by a name that is none."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

OPTIONS = {
    "data.tasks": "--tasks",
    "adapter.method": "--method",
    "adapter.rank": "--rank",
    "data.resolution": "--resolution",
    "data.validation_every": "--validation-every",
    "optimiser.lr": "--lr",
}  # of `vcdeft train`, where they are not called as the setting is
ALIASES = {
    "learning_rate": "optimiser.lr",
    "warmup_steps": "optimiser.warmup",
    "epochs": "steps",
    "iterations": "steps",
    "max_steps": "steps",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "output_dir": "output",
}  # what other trainers call a setting


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown setting: the nearest one in any section, and the help.

    >>> meant("lerning_rate", ["optimiser.lr", "steps"])
    "did you mean optimiser.lr (--lr)? 'vcdeft train --help' tells more"
    >>> meant("rnak", ["adapter.rank", "steps"])
    "did you mean adapter.rank (--rank)? 'vcdeft train --help' tells more"
    """
    known = list(known)
    sections = {setting.rpartition(".")[0] for setting in known} - {""}
    whole = {place: place for place in [*known, *sections]}
    last = {setting.rpartition(".")[2]: setting for setting in reversed(known)}
    last |= {alias: setting for alias, setting in ALIASES.items() if setting in known}
    near = [
        table[found]
        for table, asked in ((whole, name), (last, name.rpartition(".")[2]))
        for found in get_close_matches(asked, table, n=1)
    ]
    if not near:
        return "'vcdeft train --help' tells which there are"
    option = f" ({OPTIONS[near[0]]})" if near[0] in OPTIONS else ""
    return f"did you mean {near[0]}{option}? 'vcdeft train --help' tells more"
