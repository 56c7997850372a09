"""Captions for the pictures of a folder, each in a .txt where the source reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from visualcloze_deft.data.annotation.caption_models import Captioner, load_captioner
from visualcloze_deft.data.annotation.models import fastest
from visualcloze_deft.data.annotation.source import Written
from visualcloze_deft.data.sources.folder import Folder
from visualcloze_deft.data.sources.layouts.reading import TARGET
from visualcloze_deft.errors import UserError, one_line
from visualcloze_deft.storage.atomic import check_foreign, clear_parts, output_folder, write_text
from visualcloze_deft.storage.locks import folder_held


@dataclass(frozen=True, kw_only=True)
class Job:
    """A picture without a caption, and the file that gets it."""

    key: str
    picture: Callable[[], Image.Image]
    path: Path


@dataclass(kw_only=True)
class Jobs:
    """What is to be captioned. kept: captions that are there. broken: a line for each item whose
    texts cannot be read."""

    new: list[Job] = field(default_factory=list)
    kept: int = 0
    broken: list[str] = field(default_factory=list)


def caption(
    source: Folder,
    model: str,
    *,
    prompt: str | None,
    batch: int,
    output: Path | None,
    overwrite: bool,
) -> Written:
    """Caption the targets of `source` that have no caption, `batch` at a time.

    model: a folder or hub id, checked. output: a folder for all captions; None: each stands where
    `source` reads it. overwrite: files that are there are written anew; texts in a table or a shard
    stay. Raises `UserError` where nothing has a target, or nothing can be written.
    """
    if TARGET not in source.roles:
        raise UserError(f"{source.folder}: no item has a target, so there is nothing to caption")
    held = source.folder if output is None else output
    if output is not None:
        check_foreign(output, names_in(source), what="captions of vcdeft")
        output_folder(output)
    with folder_held(held):
        jobs = jobs_of(source, output, overwrite=overwrite)
        if not jobs.new:
            return Written(made=0, kept=jobs.kept, broken=tuple(jobs.broken))
        for folder in {job.path.parent for job in jobs.new}:
            output_folder(folder)
            clear_parts(folder, "*.txt")
        return write(jobs, load_captioner(model, prompt=prompt, device=fastest()), batch, overwrite)


def targets(source: Folder) -> Iterator[int]:
    """The items that have a target, in order."""
    yield from sorted(k for roles, found in source.kinds.items() if TARGET in roles for k in found)


def names_in(source: Folder) -> set[str]:
    """The names of files and folders that captions of a source have in a folder of their own."""
    return {Path(source.caption_name(index)).parts[0] for index in targets(source)}


def jobs_of(source: Folder, output: Path | None, *, overwrite: bool) -> Jobs:
    """What is to be done, each file once: several items may have one target."""
    jobs, seen = Jobs(), set()
    for index in targets(source):
        places = source.caption_files(index)
        if output is not None:
            places = [output / source.caption_name(index)]
        path = next((place for place in places if place.exists()), places[-1])
        if path in seen:
            continue
        seen.add(path)
        try:
            item = source.item(index)
        except UserError as error:
            jobs.broken.append(one_line(f"item {index}: {error}"))
            continue
        there = path.exists()
        elsewhere = output is None and not there and item.texts.get("caption")
        if elsewhere or (there and not overwrite):
            jobs.kept += 1
        else:
            jobs.new.append(Job(key=item.key, picture=item.images[TARGET], path=path))
    return jobs


def write(jobs: Jobs, model: Captioner, batch: int, overwrite: bool) -> Written:
    made, kept, broken = 0, jobs.kept, [*jobs.broken]
    with tqdm(total=len(jobs.new), desc="captioning", unit="image") as bar:
        for start in range(0, len(jobs.new), batch):
            part = jobs.new[start : start + batch]
            read: dict[Path, Image.Image] = {}
            for job in part:
                try:
                    read[job.path] = job.picture()
                except UserError as error:
                    broken.append(one_line(f"{job.key}: {error}"))
            texts = model.captions([*read.values()]) if read else []
            for path, text in zip(read, texts, strict=True):
                if path.exists() and not overwrite:  # written by hand meanwhile
                    kept += 1
                elif text:
                    write_text(path, f"{text}\n")
                    made += 1
                else:
                    broken.append(one_line(f"{path}: the model gives no text"))
            bar.update(len(part))
    return Written(made=made, kept=kept, broken=tuple(broken))
