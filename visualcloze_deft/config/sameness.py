"""Whether what a folder holds is what is asked for now: one comparison, and what may differ.

Five commands ask it: a run that goes on, a training that a comparison finds, an evaluation's grids,
images that `vcdeft infer` made, and the speed of an earlier run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Command = Literal["train --resume", "compare", "plan --run", "infer"]

# What may differ from a training that is there: where and how often it writes and how it is spread
# over machines, not what it learns.
SPREAD = frozenset(
    "output zero gradient_checkpointing attention offload save_every keep_checkpoints compile "
    "timeout not_finite_at_most sample_every sample_grids data.workers data.skip_at_most "
    "data.embedding_cache offload_encoders deepspeed logging".split()
)
MAY_DIFFER: Mapping[Command, frozenset[str]] = MappingProxyType(
    {
        # They leave the examples of every step as they were: their product is checked apart.
        # Another `steps` stretches a cosine schedule and the "auto" warm-up of a run of less than
        # 500 steps, so the learning rate goes on from where the new one is.
        "train --resume": SPREAD | {"steps", "batch", "accumulate", "processes"},
        "compare": SPREAD,
        # They leave the time of a step as it is.
        "plan --run": frozenset(
            "output steps seed save_every sample_every sample_grids keep_checkpoints timeout "
            "not_finite_at_most context_weight guidance clip_text timestep_sampling timestep_shift "
            "adapter.alpha adapter.init_from adapter.p_lr_ratio model_lora data.validation_every "
            "data.skip_at_most logging optimiser".split()
        ),
        # They leave an image as it is, or what counts of them stands beside as a hash.
        "infer": frozenset(
            "images device dtype versions rows task adapters model model_lora compiled batch "
            "of_seed attention_used attention_check".split()
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting, what it was, and what it is now; None where there is none."""

    name: str
    before: Any
    now: Any


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = ()
) -> Iterator[Difference]:
    """Where two sets of settings differ, in their order. free: names, or sections, that may.

    >>> [d.name for d in differences({"a": 1, "b.c": 2, "d": 3}, {"a": 1, "d": 4}, free=["b"])]
    ['d']
    """
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name) and not may_differ(name, free):
            yield Difference(name=name, before=before.get(name), now=now.get(name))


def may_differ(name: str, free: Collection[str]) -> bool:
    """Whether a dotted name, or a section that it stands in, is one of those.

    >>> may_differ("logging.trackers", ["logging"]), may_differ("loggings", ["logging"])
    (True, False)
    """
    parts = name.split(".")
    return any(".".join(parts[:k]) in free for k in range(1, len(parts) + 1))
