"""The upload to the hub: what can fail is asked first, and every failure is one line."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.hub_upload import uploading


@dataclass(frozen=True, kw_only=True)
class Target:
    """A repository that can be written. exists: whether it is there already."""

    api: HfApi
    repo: str
    private: bool
    exists: bool


def check_name(repo: str) -> None:
    """Raise `UserError` unless `repo` is OWNER/NAME as the hub takes it."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo_is_name = False
    else:
        repo_is_name = repo.count("/") == 1
    if not repo_is_name:
        raise UserError(
            f"--repo {repo}: expected OWNER/NAME, of letters, digits, '-', '_' and '.', e.g. "
            "me/relight-deft"
        )


def target(repo: str, *, private: bool) -> Target:
    """The repository `repo`, asked for before anything expensive. Nothing is created.

    Raises `UserError` where the hub is not reached, the token may not write there, or the
    repository is open to all and `private` is asked for.
    """
    api = HfApi()
    with uploading(f"publish to {repo}"):
        check_owner(repo, api.whoami())
        found = repository(api, repo)
    if private and found is not None and not found.private:
        raise UserError(
            f"--private: {repo} is there already, open to all; make it private in its settings on "
            "the hub, or give another --repo"
        )
    return Target(api=api, repo=repo, private=private, exists=found is not None)


def repository(api: HfApi, repo: str) -> Any:
    """What the hub knows of a repository, None where there is none."""
    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def check_owner(repo: str, account: dict[str, Any]) -> None:
    """Raise `UserError` unless the token's owner can write under that name."""
    names = [account["name"], *(one["name"] for one in account.get("orgs", ()))]
    owner = repo.split("/")[0]
    if owner not in names:
        raise UserError(
            f"--repo {repo}: the token is of {names[0]}, who can write under {', '.join(names)}"
        )


def upload(folder: Path, to: Target, *, message: str) -> str:
    """Put the files of `folder` into the repository, in one commit on top of what is there. No file
    is deleted there. Returns the address of the repository."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with uploading(f"publish to {to.repo}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on the card's front matter
        address = to.api.create_repo(to.repo, private=to.private, exist_ok=True)
        to.api.upload_folder(repo_id=to.repo, folder_path=folder, commit_message=message)
    return str(address)
