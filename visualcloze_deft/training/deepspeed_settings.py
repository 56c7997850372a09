"""DeepSpeed's own settings, checked before a process starts: it reads the names that it knows and
is silent about all others."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from visualcloze_deft.config.overrides import deep_merge
from visualcloze_deft.config.run_settings import OWNED, Run, kinds_in, leaves
from visualcloze_deft.errors import PARSED, UserError, suggestion, why
from visualcloze_deft.runtime.launch import device_environment
from visualcloze_deft.storage.text_files import brief

REQUIREMENT = "deepspeed>=0.19.8,<0.20"  # of pyproject.toml, which asks for it on Linux alone
LARGEST = 2**63 - 1
NUMBERS: dict[type, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    bool: (bool,),
    str: (str,),
}
"""Type of a default -> what a value in its place may be."""


class Asked(dict[str, Any]):
    """Settings that note which names were looked for, with their defaults. Who takes all of them,
    as pydantic's models do, checks their names itself."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__({n: Asked(v) if isinstance(v, Mapping) else v for n, v in given.items()})
        self.known: dict[str, Any] = {}
        self.taken = False

    def get(self, name: str, default: Any = None) -> Any:
        self.known.setdefault(name, default)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.known.setdefault(name, None)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.known.setdefault(str(name), None)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self.taken = True
        return super().__iter__()

    def keys(self) -> Any:
        return self  # `name in settings.keys()` is a question, too

    def items(self) -> Any:
        self.taken = True
        return super().items()

    def __copy__(self) -> Asked:
        return self  # what is asked of a copy is asked of this


def check_installed() -> None:
    """Raise `UserError` where DeepSpeed, which only training needs, is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"training needs DeepSpeed, which is not installed; pip install '{REQUIREMENT}' ninja"
        )


def check(run: Run) -> None:
    """Raise `UserError` where `run.deepspeed` names what DeepSpeed does not know, or a value is of
    another kind than DeepSpeed's default."""
    if not run.deepspeed:
        return
    check_installed()
    for value in leaves(run.deepspeed):
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise UserError(f"deepspeed: {brief(value)}: no number of 64 bits")
    os.environ.update(device_environment())  # which DeepSpeed reads when it is imported
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.utils import logger

    from visualcloze_deft.training.engine import deepspeed_config

    logger.setLevel("WARNING")
    stage = 2 if run.zero == "auto" else run.zero
    ours = deepspeed_config(run.model_copy(update={"zero": stage, "deepspeed": {}}))
    asked = Asked(deep_merge(ours, run.deepspeed))
    try:
        config = DeepSpeedConfig(asked)
    except ValidationError as error:
        raise UserError(of_model(run.deepspeed, error)) from None
    except (*PARSED, AssertionError, DeepSpeedConfigError) as error:
        raise UserError(
            f"deepspeed: DeepSpeed does not take these settings: {why(error)}"
        ) from None
    asked.known |= {n: value for n, value in ours.items() if asked.known.get(n) is None}
    check_names(asked, run.deepspeed, "deepspeed")
    for name, model in (
        ("zero_optimization", config.zero_config),
        ("fp16", config.float16_config),
        ("bf16", config.bfloat16_config),
    ):
        check_numbers(type(model), run.deepspeed.get(name, {}), f"deepspeed.{name}")


def check_names(asked: Asked, given: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for a name that was not looked for, or a value of another kind than its
    default."""
    for name, value in given.items():
        if asked.taken or not asked.known:  # by a model
            return
        if name not in asked.known:
            known = {*asked.known} - {name.partition(".")[0] for name in OWNED}
            raise UserError(f"unknown setting {f'{where}.{name}'!r}; {suggestion(name, known)}")
        wanted = NUMBERS.get(type(asked.known[name]))
        number = isinstance(value, bool) and wanted != (bool,)
        if wanted and (number or not isinstance(value, wanted)):
            raise UserError(
                f"{where}.{name} = {brief(value)}: give a value like its default, "
                f"{asked.known[name]!r}"
            )
        if isinstance(value, Mapping):
            check_names(asked[name], value, f"{where}.{name}")


def check_numbers(kind: type[BaseModel], given: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` where true or false stands for a number, which pydantic takes."""
    fields = fields_in(kind)
    for name, value in given.items():
        kinds = kinds_in(fields[name].annotation)
        if isinstance(value, bool) and not kinds & {bool, Any}:
            raise UserError(f"{where}.{name} = {value}: true and false are no numbers")
        for inner in kinds:
            if (
                isinstance(value, Mapping)
                and isinstance(inner, type)
                and issubclass(inner, BaseModel)
            ):
                check_numbers(inner, value, f"{where}.{name}")


def of_model(given: Mapping[str, Any], error: ValidationError) -> str:
    """What one of DeepSpeed's models found wrong, by the setting's name."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    place = next((p for p in paths(given) if p[-len(loc) :] == loc), loc)
    name = f"deepspeed.{'.'.join(place)}"
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; {suggestion(loc[-1], fields_of(error.title, loc[:-1]))}"
    return f"{name} = {brief(first['input'])}: {first['msg'].lower()}"


def paths(given: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The names of all settings and sections, section by section."""
    for name, value in given.items():
        yield [*before, name]
        if isinstance(value, Mapping):
            yield from paths(value, (*before, name))


def fields_of(title: str, sections: Iterable[str]) -> set[str]:
    """The fields of DeepSpeed's model of this name, or of the one in its field `sections`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model: type[BaseModel] = next(m for m in below(DeepSpeedConfigModel) if m.__name__ == title)
    for section in sections:
        kinds = kinds_in(fields_in(model)[section].annotation)
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return {*fields_in(model)}


def fields_in(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by all their names."""
    fields = model.model_fields
    return fields | {field.alias: field for field in fields.values() if field.alias}


def below(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The classes that are made of `kind`, at any distance."""
    for one in kind.__subclasses__():
        yield one
        yield from below(one)
