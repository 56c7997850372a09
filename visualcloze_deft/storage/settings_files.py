"""Settings files in JSON, checked: a value must be of its kind, and of a size that networks have,
before a library builds one from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visualcloze_deft.errors import UserError
from visualcloze_deft.storage.text_files import brief, read_object

WIDEST = 2**17  # features of a layer; a product of two stays a size of a tensor
Side = Annotated[int, Field(ge=1, le=WIDEST)]
Blocks = Annotated[int, Field(ge=0, le=1000)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Above = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=WIDEST)]
Names = list[str] | str | None


class SettingsFile(BaseModel):
    """What we, or a library without a word, compute with; what else a file holds may be anything.
    A number is a number: no text, no true."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def checked(path: Path, kind: type[SettingsFile], what: str) -> dict[str, Any]:
    """What a settings file says, as it stands there. what: it is, in words.

    Raises `UserError` where it is no JSON object, or something in it is not of its kind.
    """
    fields = read_object(path, what)
    check_fields(f"{path}: {what}", kind, fields)
    return fields


def check_fields(where: str, kind: type[SettingsFile], fields: dict[str, Any]) -> None:
    """Raise `UserError`, which begins with `where`, unless `fields` can be settings of a kind."""
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise UserError(f"{where}: {first['loc'][-1]!r} is missing") from None
        said = first["msg"].removeprefix("Value error, ").lower()
        place = ".".join(str(part) for part in first["loc"] if str(part) in known_in(fields))
        value = f" {place} = {brief(first['input'])}:" if first["loc"] else ""
        raise UserError(f"{where}:{value} {said}") from None


def known_in(value: object) -> set[str]:
    """The keys of objects, and the places in lists, within one another: what pydantic adds to the
    place of a mistake, the kind that it tried, is none of them."""
    if isinstance(value, dict):
        return {*value, *(key for inner in value.values() for key in known_in(inner))}
    if isinstance(value, list):
        return {*map(str, range(len(value))), *(key for inner in value for key in known_in(inner))}
    return set()
