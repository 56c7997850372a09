"""Which examples a step sees: the next ones, dealt evenly, whoever asks."""

from __future__ import annotations

import hashlib
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from visualcloze_deft.config.run_settings import parse_run
from visualcloze_deft.data.mixture import Mixture
from visualcloze_deft.data.sources.scenes import Scenes
from visualcloze_deft.errors import UserError
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training.batch_schedule import BatchSchedule, StepPlan, pack
from visualcloze_deft.training.datasets import PixelDataset, RankBatchSampler
from visualcloze_deft.training.preparation import plan_of
from visualcloze_deft.training.run_data import mixture_of

SIZES = [32, 96, 64, 32, 128, 48]  # in turn


def plan(world: int = 2, accumulate: int = 1, batch: int = 4, budget: int = 0) -> BatchSchedule:
    return BatchSchedule(
        world=world,
        accumulate=accumulate,
        batch=batch,
        budget=budget,
        tokens_of=lambda index: SIZES[index % len(SIZES)],
    )


def steps(of: BatchSchedule, count: int, first: int = 0) -> list[StepPlan]:
    return list(islice(of.steps(first), count))


def test_a_step_sees_the_same_examples_whatever_the_number_of_processes() -> None:
    for world, accumulate, batch in [(1, 1, 8), (2, 1, 4), (2, 2, 2), (4, 2, 1)]:
        [step] = steps(plan(world, accumulate, batch), 1, first=24)
        assert sorted(i for part in step.parts for i in part) == list(range(24, 32))
    for world, accumulate in [(1, 4), (2, 2), (4, 1)]:
        assert steps(plan(world, accumulate, budget=256), 9) == steps(plan(4, budget=256), 9)


@given(
    world=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    budget=st.integers(128, 1024),
    first=st.integers(0, 10**9),
)
def test_parts_hold_the_next_examples_each_once_within_the_budget(
    world: int, accumulate: int, budget: int, first: int
) -> None:
    following = first
    for step in steps(plan(world, accumulate, budget=budget), 4, first):
        indices = sorted(i for part in step.parts for i in part)
        assert indices == list(range(following, following + step.examples))
        assert len(step.parts) == world * accumulate
        assert min(map(len, step.parts)) > 0
        for part, tokens in zip(step.parts, step.tokens, strict=True):
            assert sum(SIZES[i % len(SIZES)] for i in part) == tokens <= budget
        following += step.examples


def test_a_plan_goes_on_from_any_step_as_it_would_have() -> None:
    whole = steps(plan(budget=300), 12)
    assert steps(plan(budget=300), 5, first=whole[7].first) == whole[7:]


def test_processes_wait_little_for_the_one_with_most() -> None:
    found = steps(plan(world=8, budget=1024), 50)
    assert sum(step.idle for step in found) / len(found) < 0.05


def test_no_grid_has_more_tokens_than_a_run_says_and_a_smaller_budget_is_refused() -> None:
    tasks = "depth-to-image,object-insertion"
    run = parse_run({"data": {"tasks": tasks, "resolution": 32}}, where="")
    mixture = mixture_of(run)
    assert max(map(mixture.tokens, range(200))) == mixture.most_tokens == 3 * 3 * 4
    tight = run.model_copy(update={"batch_tokens": 35})
    with pytest.raises(UserError, match="batch_tokens = 35: grids of this run have up to 36"):
        plan_of(tight, mixture, processes=1)


def test_the_largest_go_first_to_the_part_that_has_least() -> None:
    assert pack([9, 1, 5, 4, 1], 2) == [[0, 1], [2, 3, 4]]


def hashes(world: int, workers: int, first: int = 0) -> dict[int, str]:
    """Every example of eight steps, as two sums of bytes: the strips' and the words'."""
    names = ("depth-to-image", "deraining", "image-editing", "object-insertion")
    known = load_tasks()
    mixture = Mixture(
        {name: known[name] for name in names}, [Scenes(size=32, seed=3)], seed=3, resolution=32
    )
    dealt = BatchSchedule(
        world=world, accumulate=2 // world, batch=1, budget=64, tokens_of=mixture.tokens
    )
    before = sum(step.examples for step in islice(dealt.steps(0), first))
    found = {}
    for rank in range(world):
        loader = DataLoader(
            PixelDataset(mixture),
            batch_sampler=RankBatchSampler(dealt, first=before, steps=8 - first, rank=rank),
            collate_fn=list,
            num_workers=workers,
        )
        for drawn in (one for part in loader for one in part):
            digest = hashlib.sha256(str(drawn.prompt).encode())
            for strip in (*drawn.grid.strips, *drawn.grid.hidden):
                digest.update(strip.numpy().tobytes())
            found[drawn.index] = digest.hexdigest()
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_examples_are_the_same_bytes_whatever_reads_them() -> None:
    whole = hashes(world=1, workers=0)
    assert len(set(whole.values())) == len(whole) > 16
    assert hashes(world=2, workers=0) == whole
    assert hashes(world=2, workers=4) == whole
    resumed = hashes(world=1, workers=2, first=5)
    assert resumed == {index: whole[index] for index in resumed}
    assert max(resumed) == max(whole)
