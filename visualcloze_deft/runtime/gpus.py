"""What the GPUs here are, and what a run can make of them: rules over plain facts.

What is asked of CUDA here starts no context: it takes no memory of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from visualcloze_deft.config.run_settings import Precision
from visualcloze_deft.errors import UserError

ALIKE = 0.05  # largest difference in memory, of the larger one: cards of one kind vary by less


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A visible GPU. memory: bytes. bfloat16: whether it computes in that, not by emulation. rocm:
    whether torch reaches it through AMD's ROCm, where nothing of this project was ever run."""

    name: str
    memory: int
    bfloat16: bool
    rocm: bool


def gpus_here() -> list[Gpu]:
    """Those that torch sees, in its order; none on a machine without."""
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        rocm = torch.version.hip is not None
        found.append(
            Gpu(
                name=facts.name,
                memory=facts.total_memory,
                bfloat16=rocm or facts.major >= 8,  # compute capability: Ampere and later
                rocm=rocm,
            )
        )
    return found


def precision_on(wanted: Precision, gpu: Gpu | None) -> Literal["float32", "bfloat16"]:
    """What `wanted` is on a GPU, None for a CPU: "auto" is bfloat16 on NVIDIA's that have it, and
    float32 elsewhere. Raises `UserError` for bfloat16 on a GPU without it."""
    if wanted == "bfloat16" and gpu is not None and not gpu.bfloat16:
        raise UserError(
            f"precision bfloat16: {gpu.name} does not compute in it; give precision=float32 or auto"
        )
    if wanted != "auto":
        return wanted
    return "float32" if gpu is None or why_float32(gpu) else "bfloat16"


def why_float32(gpu: Gpu) -> str | None:
    """Why "auto" is float32 on a GPU, in a line; None where it is bfloat16."""
    if gpu.rocm:
        return f"precision: float32, as {gpu.name} is not NVIDIA's; bfloat16 was not tried there"
    if not gpu.bfloat16:
        return f"precision: float32, as {gpu.name} does not compute in bfloat16; twice the memory"
    return None


def check_alike(gpus: Sequence[Gpu]) -> None:
    """Raise `UserError` where GPUs that are to train together differ in memory: each takes the same
    share, so the smallest would decide for all, and fail where it was not planned for."""
    sizes = [gpu.memory for gpu in gpus]
    if not sizes or min(sizes) >= (1 - ALIKE) * max(sizes):
        return
    named = ", ".join(
        f"{number}: {gpu.name} with {gpu.memory / 1e9:.1f} GB" for number, gpu in enumerate(gpus)
    )
    alike = [str(n) for n, size in enumerate(sizes) if size >= (1 - ALIKE) * max(sizes)]
    raise UserError(
        f"GPUs of different memory cannot share a run ({named}); choose with "
        f"CUDA_VISIBLE_DEVICES={','.join(alike)} or --processes 1"
    )
