"""A base that is split over two real processes as it is read: what it is, and what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zero_shards
from diffusers import FluxTransformer2DModel
from micro_model import write_micro_model
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.flux_fill.loading import load_transformer, stored_dtype

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose transformer is larger than all else that a process allocates."""
    folder = write_micro_model(tmp_path_factory.mktemp("models") / "large")
    with torch.device("meta"):
        empty = FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=64,
            num_attention_heads=7,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(16, 24, 24),
        )
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    empty.to_empty(device="cpu").requires_grad_(False)
    for parameter in empty.parameters():
        parameter.fill_(0.01)
    empty.save_pretrained(folder / "transformer", max_shard_size="100MB")
    return folder


@pytest.fixture(scope="module")
def lora(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in diffusers' format that changes some layers of the micro model."""
    transformer = load_transformer(str(micro_model), dtype=torch.float32)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"]))
    tensors = get_peft_model_state_dict(transformer)
    draw = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    drawn = {f"transformer.{n}": torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
    save_file(drawn, path)
    return path


@pytest.fixture(scope="module")
def split(
    large: Path, micro_model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("split")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given_back = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # what is freed is held no longer
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **given_back}
    done = subprocess.run(
        [*words, zero_shards.__file__, *map(str, (large, micro_model, lora, output))],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_no_process_holds_more_than_its_share_of_the_base(split: Path, large: Path) -> None:
    base = sum(path.stat().st_size for path in (large / "transformer").glob("*.safetensors"))
    for rank in (0, 1):
        found = json.loads((split / f"{rank}.json").read_text())
        assert 0.49 * base < found["held_after_loading"] < 0.51 * base
        assert found["held_after_loading"] < found["taken"] < 0.85 * base


def test_gathered_again_it_is_the_whole_base_with_a_lora_merged_and_the_same_adapter(
    split: Path, micro_model: Path, lora: Path
) -> None:
    whole = load_transformer(str(micro_model), dtype=torch.float32, lora=str(lora))
    injection.attach(whole, zero_shards.RUN.adapter, seed=zero_shards.RUN.seed)
    gathered = load_file(split / "gathered.safetensors")
    expected = dict(whole.named_parameters())
    assert gathered.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(gathered[name], parameter), name


def test_a_base_of_another_precision_is_known_before_it_is_read(micro_model: Path) -> None:
    assert stored_dtype("tiny") == torch.float16
    assert stored_dtype(str(micro_model)) == torch.float32
