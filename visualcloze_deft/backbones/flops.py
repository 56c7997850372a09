"""How much arithmetic a training step is, and how much a GPU can do.

Axes: n image tokens, l text tokens, d width of the transformer.
"""

from __future__ import annotations

from typing import Any

from visualcloze_deft.backbones.base import Split

PEAKS = {
    "H200 NVL": 835.5e12,
    "H200": 989.5e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362.05e12,
    "RTX 4090": 165.2e12,
}
"""Dense bfloat16 operations per second with float32 sums, by a part of the device's name; longer
names first. From NVIDIA's data sheets (H100, H200, A100, L40S: where they count sparsity, half of
what they say) and the Ada architecture's white paper, appendix A (RTX 4090)."""


def peak(device: str) -> float | None:
    """What a GPU of this name can do at most, in operations per second, where it is known.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("NVIDIA T4")
    (989500000000000.0, None)
    """
    return next((value for name, value in PEAKS.items() if name in device), None)


def training_flops(
    config: Any, image_tokens: int, text_tokens: int, split: Split | None = None
) -> float:
    """Operations that one sample's forward and backward pass need, for a frozen base.

    The backward pass computes no gradients of weights: a linear layer counts twice its forward
    pass, attention three times. What checkpointing computes again, what `scheduled_sampling` adds,
    the adapter itself and the modulation by time are not counted. config: FluxTransformer2DModel's.
    split: of the image, where its context is computed once.
    """
    linear, attention = forward_flops(config, image_tokens, text_tokens, split)
    return 2 * linear + 3 * attention


def calls_of(image: int, text: int, split: Split | None) -> list[tuple[int, int, int]]:
    """Of each call of the denoiser for a sample: its tokens of text and of the image, and how many
    keys a query of it has."""
    if split is None:
        return [(text, image, text + image)]
    active = (0, split.targets, text + image)
    if split.query is None:
        return [(text, image, text + image), active]
    query = split.query + split.targets
    examples = image - query
    return [(text, examples, text + examples), (text, query, text + image), active]


def forward_flops(
    config: Any, image_tokens: int, text_tokens: int, split: Split | None = None
) -> tuple[float, float]:
    """Operations of the linear layers and of attention. A block of either kind has 12 d^2 weights
    for each token: 4 d^2 of attention and 8 d^2 of feed-forward."""
    d = config.num_attention_heads * config.attention_head_dim
    blocks = config.num_layers + config.num_single_layers
    calls = calls_of(image_tokens, text_tokens, split)
    texts, images = sum(text for text, _, _ in calls), sum(image for _, image, _ in calls)
    ends = images * (config.in_channels + (config.out_channels or config.in_channels))
    ends += texts * config.joint_attention_dim
    linear = 2 * d * (12 * d * (texts + images) * blocks + ends)
    attention = 4 * d * blocks * sum((text + image) * keys for text, image, keys in calls)
    return float(linear), float(attention)
