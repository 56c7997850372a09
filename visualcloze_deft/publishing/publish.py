"""What `vcdeft publish` does: a run becomes a folder, which is searched and then uploaded.

README.md                            the model card
adapter/                             the adapter as vcdeft and peft read it, with its task files
pytorch_lora_weights.safetensors     the same as a LoRA for diffusers
comfyui/NAME.safetensors, kohya/     for other tools
images/samples.jpg                   the newest sample sheet
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visualcloze_deft.publishing import dry_run
from visualcloze_deft.publishing.facts import RunFacts, facts_of
from visualcloze_deft.publishing.privacy import check_public
from visualcloze_deft.publishing.upload import Target, check_name, target, upload

CARD, PICTURE = "README.md", "images/samples.jpg"
WIDEST = 1600  # pixels of the sample sheet
Format = Literal["diffusers", "comfyui", "kohya"]


@dataclass(frozen=True, kw_only=True)
class PublishRequest:
    """What `vcdeft publish RUN` is told. base: the id on the hub of a base that is a local folder.
    model, lora: the base on this machine, for the exports. pictures: whether samples are shown."""

    run: Path
    repo: str
    private: bool = False
    base: str | None = None
    evaluations: Sequence[Path] = ()
    formats: Sequence[Format] = ("diffusers", "comfyui")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    model: str | None = None
    lora: str | None = None
    pictures: bool = False


def publish(asked: PublishRequest, *, into: Path | None = None) -> list[str]:
    """Upload the run, or write what would be uploaded into the folder `into`. Returns what there is
    to say. Raises `UserError` before anything expensive where it can be known."""
    check_name(asked.repo)
    if into is not None:
        dry_run.check_output(into)
        facts = facts_of(asked.run, base=asked.base)
        with dry_run.replaced(into) as folder:
            said = fill(folder, asked, facts)
        return [*said, *tree(into)]
    to = target(asked.repo, private=asked.private)
    facts = facts_of(asked.run, base=asked.base)
    with tempfile.TemporaryDirectory(prefix="vcdeft-publish-") as name:
        said = fill(Path(name), asked, facts)
        listed = tree(Path(name), shown=asked.repo)
        address = upload(Path(name), to, message=message_of(facts))
    return [*said, *listed, uploaded(to, address)]


def message_of(facts: RunFacts) -> str:
    return f"{facts.method} adapter of rank {facts.run.adapter.rank}, {facts.steps} steps"


def uploaded(to: Target, address: str) -> str:
    kept = "; what else was there stays" if to.exists else ""
    return f"uploaded: {address}{kept}"


def fill(folder: Path, asked: PublishRequest, facts: RunFacts) -> list[str]:
    """Write all files into the empty folder `folder`. Returns remarks for the user."""
    from visualcloze_deft.publishing import weights  # with torch: what is wrong is said before
    from visualcloze_deft.publishing.card import card_of
    from visualcloze_deft.publishing.figures import figures_of

    figures = [figures_of(one, facts.adapter) for one in asked.evaluations]
    remarks = weights.copy_adapter(facts, folder)
    for kind in asked.formats:
        remarks += weights.export_to(folder / file_of(kind, asked.repo), kind, asked, facts)
    picture = asked.pictures and facts.sheet is not None
    if picture:
        assert facts.sheet is not None
        write_picture(facts.sheet, folder / PICTURE)
    card = card_of(
        facts,
        figures,
        repo=asked.repo,
        formats=asked.formats,
        picture=PICTURE if picture else None,
        files=contents(asked),
    )
    (folder / CARD).write_text(dry_run.signed(card), encoding="utf-8")
    check_public(folder, asked.repo)
    return [*about(facts, asked, picture=picture), *dict.fromkeys(remarks)]


def about(facts: RunFacts, asked: PublishRequest, *, picture: bool) -> list[str]:
    """What the user should look at before others do."""
    base, licence = facts.base, facts.base.licence
    lines = [f"base     {base.name}, licence {licence.name or licence.identifier}"]
    if base.hub is None and base.name != "tiny":
        lines.append("         a folder of this machine; --base ID names it on the hub")
    if not asked.evaluations:
        measured = "validation losses" if facts.validation else "no figures"
        lines.append(f"figures  {measured}; --evaluation DIR adds those of vcdeft eval")
    if picture:
        assert facts.sheet is not None
        lines.append(f"pictures {facts.sheet.name}, which holds pictures of your data")
    elif facts.sheet is not None:
        lines.append("pictures none; --with-pictures shows samples, with pictures of your data")
    return lines


def file_of(kind: Format, repo: str) -> str:
    """The path of an export in the repository: diffusers looks for its own name at the top."""
    name = f"{repo.split('/')[1]}.safetensors"
    return "pytorch_lora_weights.safetensors" if kind == "diffusers" else f"{kind}/{name}"


def contents(asked: PublishRequest) -> Mapping[str, str]:
    """What each file is, by path."""
    readers = {"diffusers": "diffusers", "comfyui": "ComfyUI", "kohya": "tools with kohya's names"}
    found = {"adapter/": "the adapter for vcdeft and peft, and its tasks"}
    for kind in asked.formats:
        found[file_of(kind, asked.repo)] = f"the same adapter as a LoRA for {readers[kind]}"
    return found


def write_picture(sheet: Path, path: Path) -> None:
    """The sample sheet, made small; nothing of the file but its pixels."""
    from visualcloze_deft.images.reading import read_image

    image = read_image(sheet).convert("RGB")
    image.info = {}
    image.thumbnail((WIDEST, image.height))
    path.parent.mkdir()
    image.save(path, quality=85)


def tree(folder: Path, *, shown: object = None) -> list[str]:
    """The files of a folder with their sizes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    lines = [
        f"  {path.relative_to(folder).as_posix():44} {size / 1000:12,.1f} kB"
        for path, size in zip(files, sizes, strict=True)
    ]
    total = f"  {len(files)} files, {sum(sizes) / 1e6:,.1f} MB"
    return [str(shown or folder), *lines, total]
