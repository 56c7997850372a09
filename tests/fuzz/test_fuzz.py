"""Whatever a file, a name or an option holds: every command ends, and says in a line what is wrong.

    make fuzz N=2000 SEED=7
    make fuzz SEED=7 ONLY=123,456

The files of an input that failed stay, as they were before the command, in runs/fuzz/SEED-NUMBER;
`bash runs/fuzz/SEED-NUMBER/again.sh` gives that command again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shlex
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest
from harness import TRACEBACK, Done, call, faults, group_of
from inputs import SHORT, SUBJECTS, Input, spoiled_input
from material import make
from parts import in_copy, parts_in

pytestmark = pytest.mark.fuzz

N = int(os.environ.get("N", "300"))
SEED = int(os.environ.get("SEED", "1"))
ONLY = os.environ.get("ONLY", "")  # numbers joined by commas
ROOT = Path(__file__).parents[2]
KEPT = ROOT / "runs" / "fuzz"
AT_ONCE = os.cpu_count() or 1


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is spoiled, and every library that a fork would load again."""
    import deepspeed.runtime.engine  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch

    import visualcloze_deft.adapters.export
    import visualcloze_deft.comparison.compare
    import visualcloze_deft.evaluation.evaluate
    import visualcloze_deft.publishing.card
    import visualcloze_deft.publishing.figures
    import visualcloze_deft.publishing.weights
    import visualcloze_deft.training.cache_latents
    import visualcloze_deft.training.train  # noqa: F401

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fuzz") / "material"
    make(folder)
    return folder


def test_every_input_ends_in_a_result_or_one_clear_line(material: Path) -> None:
    numbers = [int(k) for k in ONLY.split(",")] if ONLY else list(range(N))
    failed = []
    with ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("fork")) as pool:
        for number, wrong in zip(numbers, pool.map(tried, repeat(material), numbers), strict=True):
            if wrong:
                failed.append(number)
                print(f"{SEED}-{number}: {wrong}", flush=True)
    assert not failed, f"SEED={SEED} ONLY={','.join(map(str, failed))}; kept in {KEPT}"


def tried(material: Path, number: int) -> str:
    """What is wrong with how input `number` ended, which is then kept; "" where nothing is."""
    folder = material.with_name(f"{SEED}-{number}")
    given = spoiled_input(material, folder, SEED, number)
    done = call(given.words, folder, room=given.room)
    wrong = "; ".join(faults(done, given.words, expected=given.expected))
    shutil.rmtree(folder)
    if not wrong:
        return ""
    keep(number, material)
    last = "".join(f"\n  {line[:300]}" for line in done.err.splitlines()[-4:])
    return f"{wrong}\n  {told(given)}{last}"


def told(given: Input) -> str:
    words = " ".join(word if len(word) < 60 else f"{word[:50]}..." for word in given.words)
    return f"vcdeft {words!r}   {given.how[:120]!r}   expected: {given.expected}"


def keep(number: int, material: Path) -> None:
    """The input as it was before the command, and a script that gives it again."""
    place = KEPT / f"{SEED}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    given = spoiled_input(material, place, SEED, number)
    lines = (
        "#!/bin/bash",
        'cd "$(dirname "$0")"',
        f"export PYTHONPATH={shlex.quote(str(ROOT))} HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=",
        *(f"export {name}={value}" for name, value in group_of(given.words).items()),
        f"ulimit -f {-(-given.room // 1024)}",  # of 1024 bytes
        f"exec {shlex.join([sys.executable, '-m', 'visualcloze_deft', *given.words])}",
    )
    (place / "again.sh").write_bytes(os.fsencode("\n".join(lines) + "\n"))


def test_what_is_spoiled_works_before(material: Path, tmp_path: Path) -> None:
    for number, words in enumerate(sorted({subject.words for subject in SUBJECTS} | {*SHORT})):
        folder = tmp_path / str(number)
        in_copy(material, folder, parts_in(words.split()))
        done = call(words.split(), folder)
        assert done.status == 0, f"vcdeft {words}: {done.err[-1000:]}"
        shutil.rmtree(folder)


def test_a_traceback_a_hang_and_an_accepted_mistake_are_faults() -> None:
    words = ("infer",)
    crash = Done(status=70, out="", err=f"{TRACEBACK}:\nValueError: x\n")
    assert faults(crash, words, expected="any") == ["a traceback"]
    assert faults(Done(status=None, out="", err=""), words, expected="any")
    assert faults(Done(status=0, out="", err=""), words, expected="refused")
    assert faults(Done(status=2, out="", err="vcdeft: x"), words, expected="accepted")
    assert faults(Done(status=2, out="", err=""), words, expected="any")
    assert faults(Done(status=2, out="", err="x" * 401), words, expected="any")
    assert faults(Done(status=0, out="\x1b[31m", err=""), words, expected="any")
    assert not faults(Done(status=2, out="", err="vcdeft: no"), words, expected="refused")


def test_an_input_is_a_function_of_its_seed_and_number(material: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        random.seed(name)
        found.append(spoiled_input(material, tmp_path / name, 5, 3))
    assert found[0] == found[1]
