"""Reading a source whole: what each item has, how large it is, and what is broken."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from visualcloze_deft.data.derive import missing
from visualcloze_deft.data.item import Source
from visualcloze_deft.errors import UserError
from visualcloze_deft.registry import Task


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One item: role -> (width, height) in pixels of what could be read, role -> what is wrong."""

    key: str
    sizes: Mapping[str, tuple[int, int]]
    faults: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[str, ...] = ()


def look(source: Source, index: int) -> Seen:
    """Read every picture of an item."""
    try:
        item = source.item(index)
    except UserError as error:
        return Seen(key=f"item {index}", sizes={}, faults={"": str(error)})
    sizes, faults = {}, {}
    for role in item.images:
        try:
            sizes[role] = item.image(role).size
        except UserError as error:
            faults[role] = str(error)
    texts = tuple(name for name, text in item.texts.items() if text)
    return Seen(key=item.key, sizes=sizes, faults=faults, texts=texts)


def look_at_all(source: Source, *, workers: int) -> Iterator[Seen]:
    """Every item of `source`, in order, read by `workers` processes (0: by this one)."""
    if workers == 0:
        yield from (look(source, index) for index in range(len(source)))
        return
    with ProcessPoolExecutor(workers, initializer=_receive, initargs=(source,)) as pool:
        yield from pool.map(_look, range(len(source)), chunksize=8)


_source: Source  # of a reading process


def _receive(source: Source) -> None:
    global _source
    _source = source


def _look(index: int) -> Seen:
    return look(_source, index)


def report(seen: Iterable[Seen], tasks: Mapping[str, Task]) -> tuple[list[str], list[str]]:
    """Lines that say what there is, and lines that say what is broken."""
    sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    texts: Counter[str] = Counter()
    broken: list[str] = []
    kinds: Counter[frozenset[str]] = Counter()
    for one in seen:
        kinds[frozenset(one.sizes)] += 1
        texts.update(one.texts)
        for role, size in one.sizes.items():
            sizes[role].append(size)
        broken += [f"{one.key}{role and f', {role}'}: {why}" for role, why in one.faults.items()]
    width = max(map(len, [*sizes, *texts, "role"])) + 2
    lines = [f"{sum(kinds.values())} items", "", f"{'role':{width}}items  pixels, middle of all"]
    for role, found in sorted(sizes.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        middle = " x ".join(
            str(round(statistics.median(side))) for side in zip(*found, strict=True)
        )
        least, most = min(map(min, found)), max(map(max, found))
        lines.append(f"{role:{width}}{len(found):5}  {middle} ({least} to {most} a side)")
    lines += [f"{name:{width}}{count:5}  (text)" for name, count in texts.most_common()]
    lines += ["", "tasks that it serves, by group: how many, and with how many items"]
    by_group: dict[str, list[int]] = defaultdict(list)
    for task in tasks.values():
        count = sum(n for roles, n in kinds.items() if not missing(task.roles, roles))
        if count:
            by_group[task.group].append(count)
    if not by_group:
        asked = [t.name for t in tasks.values() if any(not missing(t.conditions, k) for k in kinds)]
        lines.append(f"  none; it can ask, without truth: {', '.join(asked) or 'nothing'}")
    for group, counts in by_group.items():
        span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        lines.append(f"  {group:40}{len(counts):3} with {span} items")
    return lines, broken
