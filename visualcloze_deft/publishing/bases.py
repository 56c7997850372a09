"""What the world knows a run's base by: its name, its id on the hub, its licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visualcloze_deft.backbones.model_files import FILL, TINY, on_hub, public_name
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.hub import HUB_ID


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence as the hub's front matter names it; name and link where it is none of the hub's."""

    identifier: str
    name: str | None = None
    link: str | None = None


OTHER = Licence(identifier="other")
LICENCES = {
    TINY: Licence(identifier="apache-2.0"),
    FILL: Licence(
        identifier="other",
        name="flux-1-dev-non-commercial-license",
        link=f"https://huggingface.co/{FILL}/blob/main/LICENSE.md",
    ),
}


@dataclass(frozen=True, kw_only=True)
class PublicBase:
    """name: in words and files. hub: its id there, None for a base that is on no hub."""

    name: str
    hub: str | None
    licence: Licence

    @property
    def words(self) -> str:
        """What a sentence calls it."""
        return "the small model built into visualcloze_deft" if self.name == TINY else self.name


def public_base(model: str, given: str | None = None) -> PublicBase:
    """What to call the base `model` of a run in public. given: its id on the hub, for a folder.

    >>> public_base("black-forest-labs/FLUX.1-Fill-dev@main").hub
    'black-forest-labs/FLUX.1-Fill-dev'

    Raises `UserError` where `given` is no id, or contradicts the run.
    """
    if given is None:
        hub = public_name(model) if model != TINY and on_hub(model) else None
    else:
        hub = checked_id(given, model)
    name = hub or public_name(model)
    return PublicBase(name=name, hub=hub, licence=LICENCES.get(name, OTHER))


def checked_id(given: str, model: str) -> str:
    if model == TINY:
        raise UserError(f"--base {given}: this run's base is the built-in model; leave --base")
    found = HUB_ID.fullmatch(given)
    if found is None or Path(given).exists():
        raise UserError(f"--base {given}: no id on the hub; give one such as {FILL}")
    return found["repo"]
