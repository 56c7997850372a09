"""The classes of FLUX.1-Fill's seven parts, in diffusers and transformers."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "FlowMatchEulerDiscreteScheduler",
    "FluxTransformer2DModel",
    "T5EncoderModel",
    "T5TokenizerFast",
]
