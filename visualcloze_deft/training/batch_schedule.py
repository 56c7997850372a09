"""Which examples each process sees in which step: by number, or by the tokens they come to.

A step takes the next examples in order, whatever the number of processes. Its parts, one for each
process and accumulated batch, hold equally many examples, or as many as fit into a budget of
tokens, so that no process waits long for another and memory is used evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """parts: example indices, process by process for the first accumulated batch, then for the
    second. tokens: what each part comes to, empty where examples are counted."""

    first: int
    parts: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...] = ()

    @property
    def examples(self) -> int:
        return sum(map(len, self.parts))

    @property
    def idle(self) -> float:
        """Which share of the time processes wait for the one with most tokens."""
        return 1 - sum(self.tokens) / (len(self.tokens) * max(self.tokens)) if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Parts of `batch` examples, or with `budget` above 0 of at most that many tokens.

    tokens_of: about how many tokens example i comes to, cheap to say; never above `budget`.
    """

    world: int
    accumulate: int
    batch: int
    budget: int
    tokens_of: Callable[[int], int]

    @property
    def parts(self) -> int:
        return self.world * self.accumulate

    @property
    def size(self) -> int:
        """Examples a step, or its tokens at most."""
        return self.parts * (self.budget or self.batch)

    def steps(self, first: int) -> Iterator[StepPlan]:
        """Steps without end, from the one that begins with example `first`."""
        while True:
            step = self._packed(first) if self.budget else self._counted(first)
            yield step
            first += step.examples

    def _counted(self, first: int) -> StepPlan:
        starts = range(first, first + self.size, self.batch)
        return StepPlan(first=first, parts=tuple(tuple(range(k, k + self.batch)) for k in starts))

    def _packed(self, first: int) -> StepPlan:
        """The longest run of examples whose parts are all within the budget."""
        sizes: list[int] = []  # one for each part fits in any case
        while True:
            more = [*sizes, self.tokens_of(first + len(sizes))]
            if max(loads(pack(more, self.parts), more)) > self.budget:
                break
            sizes = more
        parts = pack(sizes, self.parts)
        return StepPlan(
            first=first,
            parts=tuple(tuple(first + k for k in part) for part in parts),
            tokens=loads(parts, sizes),
        )


def loads(parts: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[int, ...]:
    """What each part comes to."""
    return tuple(sum(sizes[k] for k in part) for part in parts)


def pack(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Places of `sizes` in `count` parts of near equal sum: the largest first, each to the part
    that has least (longest processing time first), in ascending order within a part.

    >>> pack([4, 1, 3, 2], 2)
    [[0, 1], [2, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        least = held.index(min(held))
        parts[least].append(k)
        held[least] += sizes[k]
    return [sorted(part) for part in parts]
