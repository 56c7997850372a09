"""The adapter methods: a row for each, with all that differs between them outside their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visualcloze_deft.config.run_settings import Method


@dataclass(frozen=True, kw_only=True)
class AdapterMethod:
    """One row. peft: the fields of peft's settings that tell this method from the others. factors:
    matrices that a layer trains. slow: the one that learns at `adapter.p_lr_ratio` of the rate.
    colour: in charts, matplotlib's.
    """

    peft: Mapping[str, Any]
    factors: tuple[str, ...]
    slow: str = ""
    colour: str


METHODS: dict[Method, AdapterMethod] = {
    "deft": AdapterMethod(
        peft={"peft_type": "DEFT", "decomposition_method": "qr", "para": False},
        factors=("P", "R"),
        slow="P",
        colour="C0",
    ),
    "deft-relaxed": AdapterMethod(
        peft={"peft_type": "DEFT", "decomposition_method": "relu", "para": False},
        factors=("P", "R"),
        slow="P",
        colour="C9",
    ),
    "para": AdapterMethod(
        peft={"peft_type": "DEFT", "decomposition_method": "qr", "para": True},
        factors=("P",),
        colour="C2",
    ),
    "lora": AdapterMethod(peft={"peft_type": "LORA"}, factors=("A", "B"), colour="C3"),
}
DEFAULTS = {"decomposition_method": "qr", "para": False}  # peft's, where a file does not say


def method_of(fields: Mapping[str, Any]) -> Method:
    """The method of an adapter, by peft's settings of it.

    >>> method_of({"peft_type": "DEFT", "para": True}), method_of({"peft_type": "LORA", "r": 4})
    ('para', 'lora')
    """
    told = DEFAULTS | {name: getattr(value, "value", value) for name, value in fields.items()}
    if told.get("para"):
        told["decomposition_method"] = "qr"  # which PaRa takes in any case
    for name, method in METHODS.items():
        if all(told.get(field) == value for field, value in method.peft.items()):
            return name
    raise ValueError(f"peft_type {told.get('peft_type')!r}")
