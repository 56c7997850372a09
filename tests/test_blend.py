"""Adapters in use: they add up by scale, and leave the base bit for bit as it was."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.merging import ActiveAdapters
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Adapter, Bits
from visualcloze_deft.errors import UserError

METHODS = ("deft", "deft-relaxed", "para", "lora")


@pytest.fixture(scope="module")
def trained(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each method, moved away from its start."""
    folders = {}
    for number, method in enumerate(METHODS):
        transformer = load_models(str(micro_model)).transformer
        injection.attach(transformer, Adapter(rank=2, method=method), seed=number)
        random = torch.Generator().manual_seed(number)
        for parameter in injection.trainable(transformer).values():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
        folders[method] = tmp_path_factory.mktemp("adapters") / method
        folders[method].mkdir()
        files.save(transformer, folders[method], base="micro")
    return folders


def velocity(transformer: torch.nn.Module) -> torch.Tensor:
    config = transformer.config
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 8, 384, generator=random),
            timestep=torch.tensor([0.6]),
            guidance=torch.tensor([30.0]),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=random),
            encoder_hidden_states=torch.randn(1, 4, config.joint_attention_dim, generator=random),
            txt_ids=torch.zeros(4, 3),
            img_ids=torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(4.0)),
            return_dict=False,
        )[0]


def weights(transformer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in transformer.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_in_use_an_adapter_is_what_its_layers_compute(
    micro_model: Path, trained: dict[str, Path], method: str, merge: bool
) -> None:
    layered = load_models(str(micro_model)).transformer
    plain = velocity(layered)
    files.load(layered, trained[method])
    wanted = velocity(layered)
    assert (wanted - plain).abs().max() > 0.01
    transformer = load_models(str(micro_model)).transformer
    ActiveAdapters(transformer, merge=merge).add("one", trained[method])
    torch.testing.assert_close(velocity(transformer), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
def test_taken_off_the_base_is_bit_for_bit_what_it_was(
    micro_model: Path, trained: dict[str, Path], merge: bool
) -> None:
    transformer = load_models(str(micro_model)).transformer
    before, plain = weights(transformer), velocity(transformer)
    blend = ActiveAdapters(transformer, merge=merge)
    for method in METHODS:
        blend.add(method, trained[method])
    blend.use({"deft": 0.7, "lora": -1.0})
    assert not torch.equal(velocity(transformer), plain)
    blend.use(dict.fromkeys(METHODS, 0.0))
    assert torch.equal(velocity(transformer), plain)
    for method in METHODS:
        blend.delete(method)
    assert same(weights(transformer), before)
    assert torch.equal(velocity(transformer), plain)


def test_what_was_used_before_leaves_no_trace(micro_model: Path, trained: dict[str, Path]) -> None:
    found = []
    for order in permutations(METHODS[:3]):
        transformer = load_models(str(micro_model)).transformer
        blend = ActiveAdapters(transformer)
        for method in order:
            blend.add(method, trained[method])
        blend.use({"deft": 0.5, "para": 0.25})
        found.append(weights(transformer))
    assert all(same(found[0], other) for other in found[1:])


def test_changes_add_up_by_scale(micro_model: Path, trained: dict[str, Path]) -> None:
    transformer = load_models(str(micro_model)).transformer
    name = "transformer_blocks.0.attn.to_q"
    weight = transformer.get_parameter(f"{name}.weight")
    base, blend, change = weight.clone(), ActiveAdapters(transformer), {}
    for method in ("deft", "lora"):
        blend.add(method, trained[method])
        blend.use({method: 1.0})
        change[method] = weight - base
        blend.use({})
    blend.use({"deft": 0.5, "lora": -2.0})
    torch.testing.assert_close(weight - base, 0.5 * change["deft"] - 2 * change["lora"])


@pytest.mark.parametrize("bits", ["fp8", "int8", "nf4"])
def test_beside_a_quantised_base_the_change_is_that_of_its_weights(
    micro_model: Path, trained: dict[str, Path], bits: Bits
) -> None:
    layered = load_models(str(micro_model), bits=bits).transformer
    files.load(layered, trained["deft"])
    transformer = load_models(str(micro_model), bits=bits).transformer
    blend = ActiveAdapters(transformer)
    blend.add("one", trained["deft"])
    torch.testing.assert_close(velocity(transformer), velocity(layered), atol=1e-4, rtol=1e-3)
    assert all(".change_" not in name for name in transformer.state_dict())


def test_a_merged_model_is_saved_as_a_model(
    micro_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    rows = [[Image.new("RGB", (32, 32), "red"), None]]
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained["deft"])
    (wanted,) = pipe(rows=rows, num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    again = InContextPipeline.from_pretrained(tmp_path)
    (found,) = again(rows=rows, num_inference_steps=2)
    assert found.tobytes() == wanted.tobytes()
    theirs = diffusers.VisualClozePipeline.from_pretrained(tmp_path)
    assert same(weights(theirs.transformer), weights(pipe.transformer))


def test_what_cannot_be_saved_is_refused(
    micro_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    small = InContextPipeline.from_pretrained(str(micro_model), quantise="fp8")
    with pytest.raises(UserError, match="quantised"):
        small.save_pretrained(tmp_path)
    beside = InContextPipeline.from_pretrained(
        str(micro_model), adapter=trained["lora"], merge=False
    )
    with pytest.raises(UserError, match="beside"):
        beside.save_pretrained(tmp_path)


def test_several_are_named_after_their_folders_and_runs(
    micro_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mugs").mkdir()
    (tmp_path / "mugs" / "adapter").symlink_to(trained["para"])
    given = {trained["deft"]: 0.5, tmp_path / "mugs" / "adapter": 2.0}
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=given)
    assert pipe.blend.scales == {"deft": 0.5, "mugs": 2.0}
    pipe.set_adapters("mugs")
    assert pipe.get_active_adapters() == ["mugs"]
    pipe.delete_adapters(["deft", "mugs"])
    assert pipe.get_active_adapters() == []


def test_mistakes_with_adapters_are_named(micro_model: Path, trained: dict[str, Path]) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained["deft"])
    before = weights(pipe.transformer)
    with pytest.raises(UserError, match="of this name already"):
        pipe.load_adapter(trained["deft"])
    with pytest.raises(UserError, match="did you mean deft"):
        pipe.set_adapters("def")
    with pytest.raises(UserError, match="scale nan"):
        pipe.set_adapters("deft", [float("nan")])
    with pytest.raises(UserError, match="2 scales for 1 names"):
        pipe.set_adapters("deft", [1, 2])
    assert pipe.get_active_adapters() == ["deft"]
    assert same(weights(pipe.transformer), before)


def test_an_adapter_that_does_not_fit_changes_nothing(
    micro_model: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    other = load_models("tiny").transformer
    injection.attach(other, Adapter(rank=2), seed=0)
    files.save(other, tmp_path, base="tiny")
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained["lora"])
    before = weights(pipe.transformer)
    with pytest.raises(UserError, match=r"made for another model|has shape"):
        pipe.load_adapter(tmp_path)
    assert pipe.get_active_adapters() == ["lora"]
    assert same(weights(pipe.transformer), before)


def test_layers_that_are_offloaded_are_left_alone(
    micro_model: Path, trained: dict[str, Path]
) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained["deft"])
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UserError, match="offloaded"):
        pipe.set_adapters([])


def test_beside_the_weights_changes_come_along_when_offloaded(
    micro_model: Path, trained: dict[str, Path]
) -> None:
    rows = [[Image.new("RGB", (32, 32), "red"), None]]
    images = []
    for offload in (False, True):
        pipe = InContextPipeline.from_pretrained(
            str(micro_model), adapter=trained["deft"], merge=False
        )
        if offload:
            pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        images += pipe(rows=rows, num_inference_steps=2)
    assert images[0].tobytes() == images[1].tobytes()


def test_settled_adapters_stay(micro_model: Path, trained: dict[str, Path]) -> None:
    pipe = InContextPipeline.from_pretrained(str(micro_model), adapter=trained["deft"])
    before = weights(pipe.transformer)
    pipe.blend.settle()
    with pytest.raises(UserError, match="settled"):
        pipe.load_adapter(trained["lora"])
    assert same(weights(pipe.transformer), before)
