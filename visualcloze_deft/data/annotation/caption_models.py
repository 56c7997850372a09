"""Captions that a vision-language model of transformers, named by the user, gives to pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from visualcloze_deft.data.annotation.models import config_of
from visualcloze_deft.errors import UserError, why
from visualcloze_deft.storage.hub import UNLOADABLE, hub_id, loading

PROMPT = "Describe this image in one or two sentences."  # where a model answers, and none is given
MOST_TOKENS = 160  # of a caption; T5 reads 512 of a whole prompt
WAY_OUT = "name another model that captions images in transformers"
EXAMPLE = "HuggingFaceTB/SmolVLM-Instruct"


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A loaded model. question: the words that it gets with each picture; None: none."""

    place: str
    model: Any
    processor: Any
    question: str | None

    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption of each RGB picture, drawn greedily, so that it is the same each time."""
        import torch

        with generating(self.place), torch.inference_mode():
            inputs = self._inputs(pictures).to(self.model.device, dtype=self.model.dtype)
            found = self.model.generate(
                **inputs,
                max_new_tokens=MOST_TOKENS,
                do_sample=False,
                num_beams=1,
                temperature=None,  # settings of sampling, on which transformers would remark
                top_p=None,
                top_k=None,
            )
            given = inputs.get("input_ids")
            begun = 0 if given is None else given.shape[1]
            if begun and found.shape[1] >= begun and bool((found[:, :begun] == given).all()):
                found = found[:, begun:]
            texts = self.processor.batch_decode(found, skip_special_tokens=True)
        full = found.shape[1] >= MOST_TOKENS
        cut = [full and tokens[-1] not in self._ends() for tokens in found.tolist()]
        return [
            whole_sentences(text) if short else " ".join(text.split())
            for text, short in zip(texts, cut, strict=True)
        ]

    def _inputs(self, pictures: Sequence[Image.Image]) -> Any:
        """The pictures and the question, as the model takes them."""
        text = None if self.question is None else [self.question] * len(pictures)
        images = [[picture] for picture in pictures] if self.processor.chat_template else pictures
        return self.processor(
            images=[*images], text=text, padding=text is not None, return_tensors="pt"
        )

    def _ends(self) -> set[int]:
        """The tokens that a finished caption may end with."""
        config = self.model.generation_config
        ends = config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), config.pad_token_id}


def check_captioner(place: str) -> None:
    """Raise `UserError` if `place`, a folder or hub id, can be no model that answers in words about
    a picture. No weight is read; of a model on the hub its config is fetched."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KINDS,
    )

    where = f"--model {place}"
    kind = config_of(where, place, files=("config.json", "*.safetensors")).get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"{where}: its config.json says model_type {kind!r}, which gives no text for an image "
            f"in transformers; name a vision-language model such as {EXAMPLE}"
        )


def load_captioner(place: str, *, prompt: str | None, device: str) -> Captioner:
    """The model at `place`, in bfloat16 on a GPU, in float32 elsewhere.

    prompt: what it is asked; None: `PROMPT`, or nothing where it takes no questions.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    repo, revision = (place, None) if Path(place).is_dir() else hub_id(place)
    fields: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with loading(f"--model {place}", WAY_OUT):
        processor = transformers.AutoProcessor.from_pretrained(repo, **fields)
        processor.tokenizer.padding_side = "left"  # what is generated follows the last word
        question = asked(place, processor, prompt)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            repo,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            use_safetensors=True,
            **fields,
        ).to(device)
    return Captioner(place=place, model=model.eval(), processor=processor, question=question)


def asked(place: str, processor: Any, prompt: str | None) -> str | None:
    """The question about a picture in the form of the model's chats, if it has one."""
    if not processor.chat_template:
        return prompt
    parts = [{"type": "image"}, {"type": "text", "text": prompt or PROMPT}]
    chat = [{"role": "user", "content": parts}]
    try:
        return processor.apply_chat_template(chat, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"--model {place}: its chat template takes no image and question ({why(error)}); "
            f"{WAY_OUT}"
        ) from None


@contextmanager
def generating(place: str) -> Iterator[None]:
    """What transformers raises of a model that cannot caption, as one line."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--model {place}: out of memory ({why(error)}); give a lower --batch"
        ) from None
    except UNLOADABLE as error:
        raise UserError(f"--model {place}: gives no caption ({why(error)}); {WAY_OUT}") from None


def whole_sentences(text: str) -> str:
    """A caption that was cut short, in one line, without its last sentence if there is another.

    >>> whole_sentences(" A cat.  It sleeps on a"), whole_sentences("a cat"), whole_sentences("Hi!")
    ('A cat.', 'a cat', 'Hi!')
    """
    line = " ".join(text.split())
    sentences = re.match(r".*[.!?](?=[\s\"']|$)", line)
    return sentences[0] if sentences else line
