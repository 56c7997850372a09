"""Models on the hub, by id: repository and revision, and what its client raises, as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)

from visualcloze_deft.errors import PARSED, UserError, why

UNLOADABLE: tuple[type[Exception], ...] = (
    *PARSED,
    RuntimeError,
    AssertionError,
    ImportError,
    StrictDataclassError,
)
"""What transformers and diffusers raise of files that hold something else than they build. What the
library `tokenizers` raises is an Exception and nothing more."""
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
UNREACHED = (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError)  # HTTPError: the client's


def hub_id(name: str) -> tuple[str, str | None]:
    """The repository, and the revision behind an @, of a model or LoRA on the hub.

    >>> hub_id("black-forest-labs/FLUX.1-Fill-dev@main")
    ('black-forest-labs/FLUX.1-Fill-dev', 'main')

    Raises `UserError` where `name` can be no id.
    """
    found = HUB_ID.fullmatch(name)
    if found is None:
        raise UserError(
            f"unknown model {name!r}; give 'tiny', a diffusers folder or a hub id such as "
            "black-forest-labs/FLUX.1-Fill-dev, with @REVISION if not the newest"
        )
    return found["repo"], found["revision"]


def at_revision(place: str) -> dict[str, Any]:
    """A folder, or a hub id of any kind of model, as `from_pretrained` takes it.

    >>> at_revision("facebook/dinov2-small@main")
    {'pretrained_model_name_or_path': 'facebook/dinov2-small', 'revision': 'main'}
    """
    repo, revision = (place, None) if Path(place).is_dir() else hub_id(place)
    told = {"pretrained_model_name_or_path": repo, "revision": revision}
    return {name: value for name, value in told.items() if value is not None}


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        why = next(line for line in [*str(error).splitlines(), "no reason given"] if line.strip())
        raise UserError(f"{what}: cannot be had from the hub: {why[:200]}") from None
    except UNREACHED as error:
        raise UserError(
            f"{what}: not in the hub's cache on this machine, and the hub cannot be reached "
            f"({str(error).splitlines()[0][:120]})"
        ) from None


@contextmanager
def loading(where: str, way_out: str) -> Iterator[None]:
    """What libraries raise within, on the files of a model, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of which only those that files are the reason of
        if not isinstance(error, UNLOADABLE) and type(error) is not Exception:
            raise
        raise UserError(f"{where} cannot be loaded: {why(error)}; {way_out}") from None
