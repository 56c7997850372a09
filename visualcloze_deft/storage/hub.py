"""Models on the hub, by id: repository and revision, and what its client raises, as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
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


class Unreached(UserError):
    """A model is neither in the cache here, nor can the hub be asked for it."""


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


def may_be_hub_id(name: str) -> bool:
    """Whether `name` is written as an id on the hub, and its first part is no folder here.

    >>> may_be_hub_id("someone/lora"), may_be_hub_id("./lora"), may_be_hub_id("a/b/c")
    (True, False, False)
    """
    return HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir()


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        why = next(line for line in [*str(error).splitlines(), "no reason given"] if line.strip())
        raise UserError(f"{what}: cannot be had from the hub: {why[:200]}") from None
    except UNREACHED as error:
        if constants.HF_HUB_OFFLINE:
            fault, more = "HF_HUB_OFFLINE is set", ""
        else:
            fault = f"the hub cannot be reached ({reason(error)})"
            more = "; HF_HUB_OFFLINE=1 asks the cache alone"
        raise Unreached(
            f"{what}: not in the hub's cache on this machine, and {fault}; name a folder here "
            f"instead, e.g. --model FOLDER{more}"
        ) from None


def reason(error: BaseException) -> str:
    """What the error says that `error` goes back to, shortly."""
    while error.__context__ is not None:
        error = error.__context__
    return why(error)[:80]


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
