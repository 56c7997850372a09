"""Encoders by name, and the features of images and texts that they give.

Three names stand for the encoders that the field's tables mean. Every other encoder has a name of
its own, and features carry the name of their encoder wherever they go.

Axes: b batch, n images or texts, d dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from visualcloze_deft.backbones.embedding_cache import Encodings, fingerprint
from visualcloze_deft.data.annotation.models import config_of
from visualcloze_deft.errors import UserError, suggestion
from visualcloze_deft.evaluation.encoders.efficientnet_lite0 import load_lite0, prepared
from visualcloze_deft.storage.hub import HUB_ID, at_revision, hub_id, loading

STANDARD = {  # name -> id on the hub
    "clip": "openai/clip-vit-base-patch32",
    "dino": "facebook/dino-vits16",
    "dinov2": "facebook/dinov2-small",
}
SHAPES: dict[str, Mapping[str, object]] = {  # what their configs say, so that no other takes a name
    "clip": {
        "model_type": "clip", "projection_dim": 512, "vision_config.hidden_size": 768,
        "vision_config.num_hidden_layers": 12, "vision_config.patch_size": 32,
        "vision_config.image_size": 224, "vision_config.hidden_act": "quick_gelu",
        "vision_config.intermediate_size": 3072, "vision_config.num_attention_heads": 12,
        "text_config.hidden_size": 512, "text_config.num_hidden_layers": 12,
        "text_config.vocab_size": 49408,
    },
    "dino": {
        "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 16,
        "image_size": 224, "hidden_act": "gelu", "intermediate_size": 1536,
        "num_attention_heads": 6,
    },
    "dinov2": {
        "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 14,
        "image_size": 518, "hidden_act": "gelu", "mlp_ratio": 4, "use_swiglu_ffn": False,
        "num_attention_heads": 6,
    },
}  # fmt: skip
OPENAI = {  # mean and deviation of pixels, github.com/openai/CLIP, clip.py
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}  # torchvision
SQUARE = {"height": 224, "width": 224}
SCALED = {"do_resize": True, "do_rescale": True, "do_normalize": True}
SEEN: dict[str, Mapping[str, object]] = {  # how they see pictures: preprocessor_config.json's words
    "clip": {
        **SCALED, **OPENAI, "size": {"shortest_edge": 224}, "do_center_crop": True,
        "crop_size": SQUARE,
    },
    "dino": {**SCALED, **IMAGENET, "size": SQUARE, "do_center_crop": False},
    "dinov2": {
        **SCALED, **IMAGENET, "size": {"shortest_edge": 256}, "do_center_crop": True,
        "crop_size": SQUARE,
    },
}  # fmt: skip
OFFLINE = "efficientnet-lite0"
T = TypeVar("T")
CLS = ("dinov2", "dinov2_with_registers", "vit")  # their first token is the image's
TITLES = {"clip": "CLIP-I", "dino": "DINO", "dinov2": "DINOv2"}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What an encoder makes of n images or texts: (n, d) float32, with the encoder's name."""

    encoder: str
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An image encoder, and a text encoder of the same space where `read` is given.

    name: as in tables. place: a folder, a hub id or a package. prepare: images -> (b, 3, h, w);
    look: those -> (b, d); split: texts -> token ids (b, 77); read: those -> (b, d). encodings:
    where features are kept, by the pixels an encoder is given and by all its weights.
    """

    name: str
    place: str
    network: nn.Module
    prepare: Callable[[list[Image.Image]], Tensor]
    look: Callable[[Tensor], Tensor]
    split: Callable[[list[str]], Tensor] | None
    read: Callable[[Tensor], Tensor] | None
    device: str
    batch: int
    encodings: Encodings | None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its settings and weights, for the record of a result."""
        return fingerprint(self.network)

    def images(self, pictures: Iterable[Image.Image]) -> Features:
        """The features of the images, in their order; only a batch of them is held at a time."""
        chunks = _chunks((picture.convert("RGB") for picture in pictures), self.batch)
        return self._features(self.look, (self.prepare(chunk) for chunk in chunks))

    def texts(self, sentences: Sequence[str]) -> Features:
        """The features of the texts; CLIP reads 77 tokens of each.

        Raises `UserError` where the encoder knows no words.
        """
        if self.read is None or self.split is None:
            raise UserError(
                f"encoder {self.name} has no texts; likeness to a prompt needs CLIP: clip, or "
                "NAME=FOLDER of another"
            )
        chunks = _chunks(iter(sentences), self.batch)
        return self._features(self.read, map(self.split, chunks))

    def _features(self, encode: Callable[[Tensor], Tensor], inputs: Iterator[Tensor]) -> Features:
        @torch.inference_mode()
        def encoded(part: Tensor) -> Tensor:
            return encode(part.to(self.device)).float().cpu()

        found = [
            self.encodings.through(self.network, part, encoded) if self.encodings else encoded(part)
            for part in inputs
        ]
        if not found:
            raise UserError(f"encoder {self.name}: no images or texts to encode")
        return Features(encoder=self.name, values=torch.cat(found).numpy())


def load_encoder(
    told: str,
    *,
    device: str = "cpu",
    batch: int | None = None,
    encodings: Encodings | None = None,
) -> Encoder:
    """The encoder that `told` names: clip, dino, dinov2, efficientnet-lite0, or NAME=PLACE with a
    folder or hub id of a CLIP or of a vision transformer with a CLS token; PLACE alone is its own
    name. clip=FOLDER and the like take a standard encoder from a folder, and from no other hub id.

    batch: images at a time; 32, but on CPU one, which is no slower there and gives the same bits
    whatever else is encoded.

    Raises `UserError` where it cannot be had, or a folder holds another encoder than its name says.
    """
    name, place = named(told)
    batch = batch or (1 if device == "cpu" else 32)
    where = f"encoder {name}"
    if name == OFFLINE:
        network = load_lite0().to(device)
        return Encoder(
            name=name, place=place, network=network, prepare=prepared, look=network,
            split=None, read=None, device=device, batch=batch, encodings=encodings,
        )  # fmt: skip
    if name in STANDARD and is_hub_id(place) and hub_id(place)[0] != STANDARD[name]:
        raise UserError(
            f"{where}: no folder {place}, and of the hub this name stands for {STANDARD[name]} "
            f"alone; give another a name of its own, OTHER={place}"
        )
    try:
        kind = str(config_of(where, place).get("model_type"))
    except UserError as error:
        raise UserError(f"{error}; {remedy(name, place)}") from None
    if kind != "clip" and kind not in CLS:
        raise UserError(f"{where}: {place} is a {kind}; known: clip, {', '.join(CLS)}")
    if name in STANDARD:
        check_standard(name, place)
    split = _tokenizer(name, place) if kind == "clip" else None
    loaded: Any = _loaded(name, place, kind).to(device)
    processor = _from_place(name, place, "AutoImageProcessor", backend="pil")

    def prepare(images: list[Image.Image]) -> Tensor:
        found: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
        return found

    def look(pixels: Tensor) -> Tensor:
        if kind == "clip":
            return loaded.get_image_features(pixel_values=pixels).pooler_output
        return loaded(pixel_values=pixels).last_hidden_state[:, 0]

    def read(ids: Tensor) -> Tensor:
        return loaded.get_text_features(input_ids=ids).pooler_output

    return Encoder(
        name=name, place=place, network=loaded, prepare=prepare, look=look, split=split,
        read=read if split else None, device=device, batch=batch, encodings=encodings,
    )  # fmt: skip


def named(told: str) -> tuple[str, str]:
    """The name and place of an encoder.

    >>> named("dino"), named("facebook/dino-vits16"), named("mine=models/mine")
    (('dino', 'facebook/dino-vits16'), ('dino', 'facebook/dino-vits16'), ('mine', 'models/mine'))
    """
    name, equals, place = (part.strip() for part in told.partition("="))
    ours = {**STANDARD, OFFLINE: OFFLINE}
    if not equals:
        of_place = {hub: standard for standard, hub in ours.items()}
        if told not in ours and told not in of_place and not _is_place(told):
            raise UserError(
                f"encoder {told!r}: no such encoder, {suggestion(told, ours)}; NAME=FOLDER for "
                "another"
            )
        return of_place.get(told, told), ours.get(told, told)
    if not name or not place:
        raise UserError(f"encoder {told!r}: expected NAME=FOLDER or NAME=HUB-ID")
    if name.lower() in ours and (name not in STANDARD):
        raise UserError(
            f"encoder {told!r}: {name.lower()} is another encoder's name; take a new one"
        )
    return name, place


def is_hub_id(place: str) -> bool:
    """Whether `place` can only be on the hub: of its form, and no folder here."""
    return HUB_ID.fullmatch(place) is not None and not Path(place).is_dir()


def _is_place(told: str) -> bool:
    return "/" in told or Path(told).is_dir()


def check_standard(name: str, place: str) -> None:
    """Raise `UserError` unless the configs of the model and of the image processor at `place` are
    those of the standard encoder `name`.

    That its weights are the right ones, no config tells: see `Encoder.fingerprint`.
    """
    config = _from_place(name, place, "AutoConfig")
    processor = _from_place(name, place, "AutoImageProcessor", backend="pil").to_dict()
    found: dict[str, Any] = {}
    for setting in SHAPES[name]:
        found[setting] = config
        for part in setting.split("."):
            found[setting] = getattr(found[setting], part)
    for setting in SEEN[name]:
        found[setting] = processor.get(setting)
    found["do_center_crop"] = bool(found["do_center_crop"])  # ViT's processor has none
    for setting, expected in {**SHAPES[name], **SEEN[name]}.items():
        if as_json(found[setting]) != as_json(expected):
            raise UserError(
                f"encoder {name}: {place} has {setting} {found[setting]}, but {STANDARD[name]} has "
                f"{expected}; give it a name of its own, OTHER={place}"
            )


def as_json(value: object) -> object:
    """A value as its file has it: lists for tuples."""
    return json.loads(json.dumps(value))


def remedy(name: str, place: str) -> str:
    """The end of a message on an encoder that is not to be had."""
    standard = STANDARD.get(name, place if is_hub_id(place) else "HUB-ID")
    return (
        f"bring a folder of {standard} from a machine that reaches the hub, made by transformers' "
        f'AutoModel.from_pretrained("{standard}").save_pretrained("FOLDER"), likewise by '
        f"AutoImageProcessor and for CLIP by AutoTokenizer, and say {name}=FOLDER, or take "
        f"{OFFLINE}, which needs none"
    )


def title(encoder: str) -> str:
    """How a table calls the similarity of images under an encoder.

    >>> title("clip"), title("efficientnet-lite0")
    ('CLIP-I', 'image similarity (efficientnet-lite0)')
    """
    return TITLES.get(encoder, f"image similarity ({encoder})")


def text_title(encoder: str) -> str:
    """How a table calls the similarity of images and prompts under an encoder."""
    return "CLIP-T" if encoder == "clip" else f"text similarity ({encoder})"


def _loaded(name: str, place: str, kind: str) -> Any:
    """The network in float32. Its weights are read from safetensors; a pickle is refused."""
    options = {"add_pooling_layer": False} if kind == "vit" else {}  # DINO has none
    with torch.random.fork_rng(devices=[]):  # what is drawn elsewhere does not hang on when it is
        network, found = _from_place(
            name, place, "AutoModel", dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"encoder {name}: {place} lacks {len(missing)} of its weights, {missing[0]} among them"
        )
    return network.eval().requires_grad_(False)


def _from_place(name: str, place: str, what: str, **options: Any) -> Any:
    """`from_pretrained` of one of transformers' Auto classes, its errors in one line."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with loading(f"encoder {name}: {what} of {place}", remedy(name, place)):
        kind = getattr(transformers, what)
        return kind.from_pretrained(**at_revision(place), trust_remote_code=False, **options)


def _tokenizer(name: str, place: str) -> Callable[[list[str]], Tensor]:
    """Raises `UserError` where it is not the model's own: of a folder without one, transformers
    makes one of two tokens and says nothing."""
    tokenizer = _from_place(name, place, "AutoTokenizer")
    expected = _from_place(name, place, "AutoConfig").text_config.vocab_size
    if len(tokenizer) != expected:
        raise UserError(
            f"encoder {name}: {place} has no tokenizer, or another's: it knows {len(tokenizer)} "
            f"tokens, the model {expected}; {remedy(name, place)}"
        )

    def ids(sentences: list[str]) -> Tensor:
        # what is padded comes after the end of the text, where CLIP's causal attention never looks
        found: Tensor = tokenizer(
            sentences, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )["input_ids"]
        return found

    return ids


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk
