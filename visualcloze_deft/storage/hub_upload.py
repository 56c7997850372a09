"""Uploads to the hub: every way in which the hub or its client fails is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from visualcloze_deft.errors import UserError, why

NO_TOKEN = "no token; 'hf auth login' stores one, or put it in HF_TOKEN"
REFUSALS = {
    401: "the hub does not know the token; 'hf auth login' stores another, or set HF_TOKEN",
    402: "the hub wants to be paid for it",
    403: "this token may not write there; give one with the right to write, or another repository",
    429: "the hub has had too many requests; try later",
}


@contextmanager
def uploading(what: str) -> Iterator[None]:
    """What the hub's client raises within, as one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError:
        raise UserError(f"{what}: {NO_TOKEN}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{what}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HFValidationError as error:
        raise UserError(f"{what}: no name of a repository ({why(error)[:200]})") from None
    except HfHubHTTPError as error:
        said = REFUSALS.get(error.response.status_code, "the hub refuses")
        reason = error.server_message or why(error)
        raise UserError(f"{what}: {said} ({reason[:160]})") from None
    except HTTPError as error:  # the client's own: no connection, no answer
        raise UserError(
            f"{what}: {constants.ENDPOINT} cannot be reached ({why(error)[:120]})"
        ) from None
    except (RuntimeError, ValueError) as error:  # of the upload: files sent in vain, odd answers
        cause = error.__cause__ or error
        raise UserError(f"{what}: the upload failed ({why(cause)[:200]})") from None
