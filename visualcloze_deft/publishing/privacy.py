"""Nothing of this machine leaves it: what is published is searched for paths, names and tokens."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from visualcloze_deft.config.secrets import WITH_PASSWORD
from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.tensor_headers import read_texts
from visualcloze_deft.storage.text_files import brief, read_text

SEARCHED = (".md", ".json", ".toml")
ROOTS = "Users data export home media mnt opt private root scratch srv tmp var work workspace"
_BEFORE = r"(?<![\w.:/<>~*-])"  # of a slash that begins a path, and is no address or fraction
KINDS = {
    "a path of a machine": re.compile(
        rf"{_BEFORE}/(?:{ROOTS.replace(' ', '|')})\b[^\s\"'`]*"
        rf"|{_BEFORE}/[\w.+@-]+/[^\s\"'`]+"
        r"|(?<!\w)~\w*/\w[^\s\"'`]*|(?<![\w.])\.\./[^\s\"'`]*"
        r"|(?<!\w)[A-Za-z]:[\\/]+\w[^\s\"'`]*|file:/[^\s\"'`]*"
    ),
    "a token": re.compile(
        r"\b(?:hf_|gh[opsur]_|github_pat_|sk-|xox[abp]-)\w{16,}|\bAKIA[0-9A-Z]{16}\b"
    ),
    "a password": WITH_PASSWORD,
}
LEAST = 3  # letters of a user's or a host's name that can be told from other words


def check_public(folder: Path, repo: str) -> None:
    """Raise `UserError` where a file of `folder` that can hold words, or its name, tells of this
    machine. repo: where it is published; its words are public."""
    names = names_here(but=repo.lower().split("/"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.suffix == ".md", path)):  # made of the others
        name = path.relative_to(folder).as_posix()
        for text in (name, *texts_of(path)):
            for kind, found in private_in(text, names):
                raise UserError(
                    f"{name} would hold {kind}, {brief(found)}, and is not published; take it out "
                    "of the run's files (settings.toml, tasks/, adapter/) first"
                )


def texts_of(path: Path) -> Iterator[str]:
    """The words in a file that is published; none of a picture, which is drawn anew."""
    if path.suffix in SEARCHED:
        yield read_text(path)
    elif path.suffix == ".safetensors":
        for key, value in read_texts(path).items():
            yield f"{key}: {value}"


def private_in(text: str, names: Collection[re.Pattern[str]] = ()) -> Iterator[tuple[str, str]]:
    """What in a text tells of a machine or its user: kind and words.

    >>> [kind for kind, _ in private_in("from /home/anna/flux, see https://huggingface.co/a/b")]
    ['a path of a machine']
    """
    for kind, pattern in KINDS.items():
        if found := pattern.search(text):
            yield kind, found[0]
    for name in names:
        if found := name.search(text):
            yield "a name of this machine or its user", found[0]


def names_here(*, but: Collection[str] = ()) -> list[re.Pattern[str]]:
    """Patterns for the names of this machine and its user.

    A name that could be any word counts only before an @.
    """
    found = []
    for name in (user_here(), socket.gethostname()):
        if len(name) >= LEAST and name.lower() not in (*but, "localhost"):
            word = re.escape(name)
            ends = r"@" if name.isalpha() else r"(?!\w)"
            found.append(re.compile(rf"(?<!\w){word}{ends}", re.IGNORECASE))
    return found


def user_here() -> str:
    """The user's name; nothing where the system knows none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of Python before and from 3.13
        return ""
