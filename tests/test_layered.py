"""A quantised base is read layer by layer: numbers of the whole one, memory of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from living import Living, tensors_in
from micro_model import copy_model
from safetensors.torch import save_file
from torch import nn

from visualcloze_deft.backbones.flux_fill.backbone import FLUX_FILL
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.backbones.flux_fill.sizes import flux
from visualcloze_deft.backbones.layered_loading import load_quantised
from visualcloze_deft.backbones.quantization import dense, is_quantised, layers_of, quantise
from visualcloze_deft.config.run_settings import Bits
from visualcloze_deft.errors import UserError
from visualcloze_deft.planning.sizes import quantising_bytes, stored

KINDS: list[Bits] = ["fp8", "int8", "nf4"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def sharded_model(micro_model: Path, tmp_path: Path) -> Path:
    """Its transformer in several files of float32."""
    folder = copy_model(micro_model, tmp_path / "sharded")
    transformer = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "transformer", max_shard_size="30KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", KINDS)
def test_it_is_the_whole_transformer_quantised(
    sharded_model: Path, tmp_path: Path, bits: Bits, dtype: torch.dtype
) -> None:
    """With a LoRA merged into it before, bit for bit; also outside of blocks."""
    layers = ["transformer_blocks.0.attn.to_q", "x_embedder"]
    whole = load_transformer(str(sharded_model), dtype=dtype)
    lora = {}
    for layer in layers:
        outputs, inputs = whole.get_submodule(layer).weight.shape
        lora[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, inputs)
        lora[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    words = {"dtype": dtype, "lora": str(tmp_path / "lora.safetensors")}
    whole = load_transformer(str(sharded_model), **words)
    read = load_transformer(str(sharded_model), **words, bits=bits)
    quantise(whole, bits, device="cpu")
    in_block = layers_of(FLUX_FILL.blocks)
    for name, layer in whole.named_modules():
        if isinstance(layer, nn.Linear):
            other = read.get_submodule(name)
            assert is_quantised(layer) == is_quantised(other) == in_block(name)
            assert torch.equal(dense(layer), dense(other))
            assert torch.equal(layer.bias, other.bias)
    norms = [key for key in whole.state_dict() if "norm_" in key and key.endswith("weight")]
    assert len(norms) > 5
    for key in norms:
        assert torch.equal(whole.state_dict()[key], read.state_dict()[key])
    assert read.config["_name_or_path"] == str(whole.config["_name_or_path"])
    assert not read.training


class Owned(Living):
    """`Living`, but for tensors without memory, of the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if any(t.is_meta for t in tensors_in(args)) or str(given.get("device")) == "meta":
            return func(*args, **given)
        return super().__torch_dispatch__(func, types, args, kwargs)


def write_wide(folder: Path, *, blocks: int) -> None:
    """A bfloat16 transformer of so many single blocks."""
    torch.set_default_dtype(torch.bfloat16)
    model = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=1,
        num_single_layers=blocks,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=16,
        pooled_projection_dim=16,
    )
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "transformer")


@pytest.mark.parametrize("bits", KINDS)
def test_one_layer_is_held_unquantised(tmp_path: Path, bits: Bits) -> None:
    """Beside the layers that are done: no more than is planned for the widest, of any number."""
    most, done = [], []
    for blocks in (1, 4):
        write_wide(tmp_path / str(blocks), blocks=blocks)
        with Owned() as owned:
            read = load_quantised(
                FluxTransformer2DModel,
                tmp_path / str(blocks) / "transformer",
                bits,
                dtype=torch.bfloat16,
                device="cpu",
                changes={},
            )
        most.append(owned.most)
        done.append(owned.now)
        sizes = flux(read.config)
        assert owned.now == pytest.approx(stored(sizes, bits, 2), rel=0.05)
        assert owned.most < owned.now + quantising_bytes(sizes, bits, 2)
        assert owned.most < 2 * sizes.parameters
    assert most[1] - most[0] < 1.1 * (done[1] - done[0])


def mapped(folder: Path) -> int:
    """Bytes of the files in a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if str(folder) in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ends)


def test_no_file_stays_mapped(sharded_model: Path) -> None:
    folder = sharded_model / "transformer"
    whole = load_transformer(str(sharded_model), dtype=torch.float32)
    assert mapped(folder) > 0
    del whole
    read = load_transformer(str(sharded_model), dtype=torch.float32, bits="fp8")
    assert mapped(folder) == 0
    for file in folder.glob("*.safetensors"):  # it needs them no more
        file.unlink()
    assert all(parameter.isfinite().all() for parameter in read.parameters())


def test_a_damaged_file_is_named(sharded_model: Path) -> None:
    file = sorted((sharded_model / "transformer").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file.name}: damaged or truncated"):
        load_transformer(str(sharded_model), dtype=torch.float32, bits="fp8")
