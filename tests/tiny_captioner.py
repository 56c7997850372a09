"""A random vision-language model of a few thousand parameters, in the format of the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}: {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    " {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Each printable ASCII character is a token."""
    letters = map(chr, range(32, 127))
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    found.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def write_captioner(folder: Path) -> Path:
    """A LLaVA whose answers hang on the picture."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, intermediate_size=16, image_size=32, patch_size=16),
        text_config=LlamaConfig(
            **sizes,
            vocab_size=len(words),
            intermediate_size=32,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.5,
        ),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder
