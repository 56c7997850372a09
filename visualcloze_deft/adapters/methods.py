"""DEFT, PaRa and LoRA as peft's settings, and which of their parameters learn how fast."""

from __future__ import annotations

from peft import DeftConfig, LoraConfig, PeftConfig

from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.config.run_settings import Adapter

NAME = "default"  # peft's name for the adapter inside the model


def layers(settings: Adapter, default: str) -> str:
    """A regular expression for the layers that get an adapter. default: the family's own."""
    return default if settings.target_modules == "default" else settings.target_modules


def peft_config(settings: Adapter, layers: str) -> PeftConfig:
    """peft's settings of an adapter on `layers`, a regular expression."""
    told = METHODS[settings.method].peft
    if told["peft_type"] == "LORA":
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha or settings.rank,
            lora_dropout=settings.dropout,
            target_modules=layers,
        )
    return DeftConfig(
        r=settings.rank,
        alpha=settings.alpha,
        deft_dropout=settings.dropout,
        target_modules=layers,
        decomposition_method=told["decomposition_method"],
        para=told["para"],
    )


def kind(name: str) -> str:
    """Which part of its layer the adapter parameter `name` is.

    >>> kind("transformer_blocks.0.ff.net.2.deft_P.default"), kind("proj_out.lora_A.default.weight")
    ('P', 'A')
    """
    return name.partition(f".{NAME}")[0][-1]


def file_name(name: str) -> str:
    """The name in peft's file of the adapter parameter `name` of the model."""
    return f"base_model.model.{name.replace(f'.{NAME}', '')}"
