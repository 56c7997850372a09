"""The DEFT layer: against the paper's formula in float64, peft's layer and LoRA's costs.

Axes: n tokens, o outputs, i inputs, r rank.
"""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_adapters import saved_bytes
from bitsandbytes.functional import int8_vectorwise_dequant
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import DeftConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.deft.layer import DeftLinear as PeftDeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.adapters.deft import deft_linear, factors
from visualcloze_deft.backbones.quantization import dense, quantised
from visualcloze_deft.config.run_settings import Adapter, Bits

KINDS: dict[str, dict[str, Any]] = {
    "deft": {"decomposition_method": "qr", "alpha": 6},
    "deft-relaxed": {"decomposition_method": "relu", "alpha": 6},
    "para": {"decomposition_method": "qr", "para": True},
}
NAME = "default"


def peft_net(kind: str, *, i: int = 40, o: int = 24, r: int = 4, bias: bool = True) -> nn.Module:
    """One linear layer under peft's own DEFT layer, its parameters away from their start."""
    torch.manual_seed(i * o + r)
    net = nn.Sequential(nn.Linear(i, o, bias=bias)).requires_grad_(False)
    inject_adapter_in_model(DeftConfig(r=r, target_modules=["0"], **KINDS[kind]), net, NAME)
    with torch.no_grad():
        for parameter in trained(net):
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def adopted(net: nn.Module) -> nn.Module:
    ours = copy.deepcopy(net)
    deft_linear.adopt(ours)
    return ours


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def continuous_basis(p: Tensor) -> Tensor:
    """Q of the QR decomposition with a positive diagonal."""
    q, triangle = torch.linalg.qr(p)
    return q * triangle.diagonal().sign()


def adapted_weight(layer: deft_linear.DeftLinear, p: Tensor, r: Tensor | None) -> Tensor:
    """arXiv 2509.22793: (I - Q Q^T) W + s Q R; (I - P relu(P)^T) W + s P R; without R PaRa."""
    weight = layer.base_layer.weight.double()
    relaxed = layer.deft_decomposition[NAME] == "relu"
    q = p if relaxed else continuous_basis(p)
    right = torch.relu(p) if relaxed else q
    kept = weight - q @ right.mT @ weight
    return kept if r is None else kept + layer.deft_scaling[NAME] * q @ r


def formula(layer: deft_linear.DeftLinear, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of x, P and R of <output, weights>, through W' in float64."""
    x = x.detach().double().requires_grad_()
    parameters = [p.detach().double().requires_grad_() for p in layer.parameters_of(NAME)]
    p, r = (*parameters, None)[:2]
    y = x @ adapted_weight(layer, p, r).mT
    if layer.base_layer.bias is not None:
        y = y + layer.base_layer.bias.double()
    return [y, *torch.autograd.grad(y, [x, *parameters], weights.double())]


def layer_values(layer: deft_linear.DeftLinear, x: Tensor, weights: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters_of(NAME)], weights.to(y.dtype))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("i", "o", "r"), [(40, 24, 1), (40, 24, 4), (24, 40, 7), (24, 24, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_papers(kind: str, i: int, o: int, r: int, bias: bool) -> None:
    layer = adopted(peft_net(kind, i=i, o=o, r=r, bias=bias))[0]
    x, weights = torch.randn(2, 5, i), torch.randn(2, 5, o)
    for found, expected in zip(
        layer_values(layer, x, weights), formula(layer, x, weights), strict=True
    ):
        if kind == "para" and r == o:  # everything is removed: the truth is the bias, or zero
            assert (found - expected).abs().max() < 1e-4
        else:
            assert relative(found, expected) < 1e-5


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    i=st.integers(1, 48),
    o=st.integers(1, 48),
    share=st.floats(0, 1),
    bias=st.booleans(),
    spread=st.floats(0, 3),
    size=st.floats(-4, 4),
)
def test_it_is_the_paper_for_any_shape_rank_and_conditioning(
    kind: str, i: int, o: int, share: float, bias: bool, spread: float, size: float
) -> None:
    """Ranks from 1 to full; singular values of P over `spread` decades around 10^size."""
    full = min(i, o) if kind != "para" or o == 1 else min(i, o - 1)  # PaRa leaves something over
    r = 1 + round(share * (full - 1))
    net = adopted(peft_net(kind, i=i, o=o, r=r, bias=bias))
    layer = net[0]
    left, _, right = torch.linalg.svd(layer.deft_P[NAME].data, full_matrices=False)
    scale = torch.logspace(0, -spread, r)
    if kind != "deft-relaxed":  # whose change has the size of P squared
        scale = scale * 10**size
    layer.deft_P[NAME].data = (left * scale) @ right
    x, weights = torch.randn(7, i), torch.randn(7, o)
    found, expected = layer_values(layer, x, weights), formula(layer, x, weights)
    for one, other, size in zip(found, expected, sizes(layer, x, weights), strict=True):
        assert (one.double() - other).norm() <= 1.2e-6 * size


def sizes(layer: deft_linear.DeftLinear, x: Tensor, weights: Tensor) -> list[Tensor]:
    """How large the products are that output and gradients of x, P and R add up: what rounding
    is relative to, however much of them cancels."""
    relaxed = layer.deft_decomposition[NAME] == "relu"
    p, r = (*layer.parameters_of(NAME), None)[:2]
    scale = layer.deft_scaling[NAME]
    weight = layer.base_layer.weight.double().norm()
    injected = 0 if r is None else scale * r.double().norm()
    outer = p.double().norm() if relaxed else 1
    change = outer * (outer * weight + injected)
    steep = 1 if relaxed else 1 / torch.linalg.svdvals(p.double()).min()
    x, weights = x.double().norm(), weights.double().norm()
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.double().norm()
    p_size = steep * x * weights * ((1 + outer) * weight + injected)
    found = [x * (weight + change) + 3 * bias, weights * (weight + change), p_size]
    return found if r is None else [*found, scale * outer * x * weights]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_hold_in_float64_by_finite_differences(kind: str) -> None:
    layer = adopted(peft_net(kind, i=6, o=5, r=3)).double()[0]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters_of(NAME)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adopted_layer_computes_what_pefts_computed(kind: str) -> None:
    theirs = peft_net(kind)
    ours = adopted(theirs)
    x = torch.randn(3, 40)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_pass_between_the_two_layers_both_ways(kind: str) -> None:
    theirs = peft_net(kind)
    ours = adopted(peft_net(kind, r=4))
    for parameter in trained(ours):
        nn.init.normal_(parameter)
    back = copy.deepcopy(theirs)
    x = torch.randn(3, 40)
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back(x), ours(x), atol=1e-4, rtol=1e-4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("i", "o", "r"), [(96, 80, 8), (200, 300, 1), (64, 96, 48)])
def test_in_bfloat16_the_error_is_no_worse_than_that_of_the_same_lora(
    kind: str, i: int, o: int, r: int
) -> None:
    net = adopted(peft_net(kind, i=i, o=o, r=r)).bfloat16()
    for parameter in trained(net):
        parameter.data = parameter.data.float()
    layer, lora = net[0], lora_net(i, o, r).bfloat16()
    lora[0].base_layer.load_state_dict(layer.base_layer.state_dict())
    b, a = lora[0].lora_B[NAME].weight, lora[0].lora_A[NAME].weight
    for parameter, factor in zip((b, a), layer.factors(NAME), strict=True):
        parameter.data = factor.bfloat16()
    x, weights = torch.randn(64, i).bfloat16(), torch.randn(64, o).bfloat16()
    ours, truth = layer_values(layer, x, weights), formula(layer, x, weights)
    x.requires_grad_()
    y = lora(x)
    loras = [y, *torch.autograd.grad(y, [x], weights)]
    for found, other, expected in zip(ours[:2], loras, truth[:2], strict=True):
        assert relative(found, expected) <= 1.05 * relative(other, expected)
    assert all(
        relative(found, expected) < 1e-2 for found, expected in zip(ours, truth, strict=True)
    )


@pytest.mark.parametrize("kind", ["deft", "deft-relaxed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_started_layer_is_the_base(kind: str, dtype: torch.dtype) -> None:
    net = adopted(peft_net(kind)).to(dtype)
    for parameter in trained(net):
        parameter.data = parameter.data.float()
    net[0].start(NAME)
    x = torch.randn(5, 40, dtype=dtype)
    torch.testing.assert_close(net(x), net[0].base_layer(x), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-8, 0.0])
def test_nearly_parallel_columns_leave_outputs_and_gradients_finite(spread: float) -> None:
    layer = adopted(peft_net("deft", r=4))[0]
    p = layer.deft_P[NAME]
    with torch.no_grad():
        p[:, 1] = p[:, 0] + spread * torch.randn(len(p))
    values = layer_values(layer, torch.randn(5, 40), torch.randn(5, 24))
    assert all(value.isfinite().all() for value in values)
    q, _ = layer.factors(NAME)
    size = torch.linalg.svdvals(q)
    assert size.max() < 1 + 1e-5
    determined = 4 if spread >= 1e-4 else 3  # what rounding alone tells apart is left alone
    torch.testing.assert_close(size[:determined], torch.ones(determined), atol=1e-3, rtol=0)
    if spread < 1e-5:
        usual = adopted(peft_net("deft", r=4))[0]
        plain = layer_values(usual, torch.randn(5, 40), torch.randn(5, 24))
        assert size[3] < 1e-6
        assert values[2].norm() < 100 * plain[2].norm()


def test_a_column_of_zeros_removes_and_adds_nothing() -> None:
    layer = adopted(peft_net("deft", r=2))[0]
    with torch.no_grad():
        layer.deft_P[NAME][:, 1] = 0
    q, _ = layer.factors(NAME)
    assert q[:, 1].abs().max() == 0
    values = layer_values(layer, torch.randn(5, 40), torch.randn(5, 24))
    assert all(value.isfinite().all() for value in values)


def test_the_function_is_continuous_in_p_where_pefts_jumps() -> None:
    """LAPACK's basis flips the sign of a column where a pivot passes zero; R then says the
    opposite. Along one straight way of P, in steps of a thousandth:"""
    theirs = peft_net("deft", r=8)
    ours = adopted(theirs)
    x = torch.randn(20, 40)
    jumps = {}
    for name, net in (("theirs", theirs), ("ours", ours)):
        p = net[0].deft_P[NAME].data
        start, way = p.clone(), torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        outputs = []
        for k in range(200):
            with torch.no_grad():
                net[0].deft_P[NAME].copy_(start + 0.001 * k * way)
                outputs.append(net(x))
        y = torch.stack(outputs)
        jumps[name] = float((y[1:] - y[:-1]).flatten(1).norm(dim=1).max() / y[0].norm())
    assert jumps["ours"] < 0.03
    assert jumps["theirs"] > 10 * jumps["ours"]


def two_adapters() -> nn.Module:
    net = peft_net("deft")
    inject_adapter_in_model(
        DeftConfig(r=3, target_modules=["0"], **KINDS["deft-relaxed"]), net, "other"
    )
    for parameter in (net[0].deft_P["other"], net[0].deft_R["other"]):
        parameter.data += 0.1 * torch.randn_like(parameter)
    return adopted(net)


@pytest.mark.parametrize("frozen", [True, False])
def test_scale_is_a_slider_from_the_base_to_the_adapter(frozen: bool) -> None:
    net = adopted(peft_net("deft"))
    net.requires_grad_(not frozen)
    layer, x = net[0], torch.randn(5, 40)
    full, base = net(x), layer.base_layer(x)
    layer.set_scale(NAME, 0)
    assert torch.equal(net(x), base)
    layer.set_scale(NAME, 0.25)
    torch.testing.assert_close(net(x), 0.75 * base + 0.25 * full)
    layer.scale_layer(2)
    torch.testing.assert_close(net(x), 0.5 * base + 0.5 * full)
    layer.unscale_layer()
    assert torch.equal(net(x), full)


def test_diffusers_sets_scales_by_name(micro_model: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    injection.attach(transformer, Adapter(rank=2), seed=0)
    transformer.set_adapters([NAME], [0.25])
    assert {layer.scale_of(NAME) for layer in deft_linear.layers(transformer).values()} == {0.25}


@pytest.mark.parametrize("kind", ["deft", "deft-relaxed"])
def test_an_adapter_added_later_starts_as_the_base_also_under_a_name_used_before(kind: str) -> None:
    net = adopted(peft_net("deft"))
    layer, x = net[0], torch.randn(5, 40)
    layer.set_scale("other", 3)
    for _ in range(2):
        inject_adapter_in_model(DeftConfig(r=3, target_modules=["0"], **KINDS[kind]), net, "other")
        layer.set_adapter("other")
        torch.testing.assert_close(net(x), layer.base_layer(x), atol=1e-5, rtol=1e-5)
        layer.deft_R["other"].data.normal_()
        assert relative(net(x), layer.base_layer(x)) > 0.01
        layer.delete_adapter("other")


def test_active_adapters_add_their_changes_of_the_frozen_weight() -> None:
    net = two_adapters()
    layer, x = net[0], torch.randn(5, 40)
    changes = {}
    for name in (NAME, "other"):
        layer.set_adapter(name)
        changes[name] = net(x) - layer.base_layer(x)
    layer.set_adapter([NAME, "other"])
    layer.set_scale("other", -0.5)
    expected = layer.base_layer(x) + changes[NAME] - 0.5 * changes["other"]
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    layer.enable_adapters(False)
    assert torch.equal(net(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_the_function_and_unmerging_every_bit(dtype: torch.dtype) -> None:
    net = two_adapters().to(dtype)
    layer, x = net[0], torch.randn(5, 40, dtype=dtype)
    layer.set_adapter([NAME, "other"])
    layer.set_scale("other", 0.5)
    before, weight = net(x), layer.base_layer.weight.clone()
    layer.merge(adapter_names=[NAME])
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == [NAME, "other"]
    assert relative(net(x), before) < (1e-6 if dtype == torch.float32 else 1e-2)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(net(x), before)


def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing() -> None:
    layer = adopted(peft_net("deft"))[0]
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.deft_R[NAME][0, 0] = torch.inf
    words = "NaNs detected in the merged weights. The adapter default seems to be broken"  # peft's
    with pytest.raises(ValueError, match=f"^{words}$"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_a_second_merge_that_fails_keeps_the_first() -> None:
    layer = two_adapters()[0]
    layer.merge(adapter_names=[NAME])
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.deft_R["other"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="The adapter other seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == [NAME]
    assert torch.equal(layer.base_layer.weight, weight)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, two_adapters()[0].base_layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_holds_pefts_small_factor_of_each_adapter(
    kind: str, dtype: torch.dtype
) -> None:
    """right^T W in float32, r x i, of the weight without adapters; it goes with the merge."""
    layer = adopted(peft_net(kind))[0]
    layer.base_layer.to(dtype)
    weight = layer.base_layer.weight.clone()
    q, _ = layer.factors(NAME)
    right = torch.relu(q) if kind == "deft-relaxed" else q
    layer.merge(safe_merge=True)
    factor = layer._cached_merge_factor[NAME]
    assert (factor.shape, factor.dtype) == ((4, 40), torch.float32)
    torch.testing.assert_close(factor, right.mT @ weight.float(), atol=1e-5, rtol=1e-5)
    layer.unmerge()
    assert NAME not in layer._cached_merge_factor
    assert torch.equal(layer.base_layer.weight, weight)


def test_the_factor_of_a_second_adapter_is_of_the_weight_without_the_first() -> None:
    layer = two_adapters()[0]
    layer.merge(adapter_names=["other"])
    alone = layer._cached_merge_factor["other"].clone()
    layer.unmerge()
    layer.merge(adapter_names=[NAME])
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer._cached_merge_factor["other"], alone)


def test_what_is_merged_stays_as_it_was_merged_whatever_happens_to_the_adapter() -> None:
    layer, x = two_adapters()[0], torch.randn(5, 40)
    layer.set_adapter([NAME, "other"])
    both = layer(x)
    layer.merge(adapter_names=[NAME])
    for change in (
        lambda: layer.set_scale(NAME, 0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.delete_adapter(NAME),
    ):
        with pytest.raises(ValueError, match="is merged"):
            change()
    with torch.no_grad():
        layer.deft_R[NAME].zero_()
    layer.merge(adapter_names=["other"])
    torch.testing.assert_close(layer(x), both, atol=1e-5, rtol=1e-5)


def test_a_layer_with_a_merged_adapter_is_not_adopted() -> None:
    net = peft_net("deft")
    net[0].merge()
    with pytest.raises(ValueError, match="0: an adapter is merged into it: unmerge it first"):
        deft_linear.adopt(net)


def test_the_change_of_a_weight_does_not_depend_on_what_is_merged() -> None:
    layer = two_adapters()[0]
    before = layer.get_delta_weight("other")
    layer.merge(adapter_names=[NAME])
    assert torch.equal(layer.get_delta_weight("other"), before)


def test_frozen_factors_follow_a_change_of_the_parameters() -> None:
    net = adopted(peft_net("deft")).requires_grad_(False)
    x = torch.randn(5, 40)
    before = net(x)
    other = adopted(peft_net("deft"))
    with torch.no_grad():
        other[0].deft_P[NAME].mul_(torch.randn_like(other[0].deft_P[NAME]))
    net.load_state_dict(other.state_dict())
    assert relative(net(x), before) > 0.01
    torch.testing.assert_close(net(x), other(x), atol=1e-5, rtol=1e-5)


def fused_steps(parameters: list[nn.Parameter], net: nn.Module, x: Tensor) -> None:
    """Training that leaves no trace in the parameters' version counters."""
    optimiser = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for _ in range(3):
        net(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_frozen_factors_are_new_after_training() -> None:
    net, x = adopted(peft_net("deft")), torch.randn(5, 40)
    parameters = trained(net)
    net.requires_grad_(False)
    before = net(x)
    for parameter in parameters:
        parameter.requires_grad_()
    fused_steps(parameters, net, x)
    expected = net(x).detach()
    net.requires_grad_(False)
    assert relative(net(x), before) > 0.01
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_a_shared_basis_serves_its_own_pass_alone() -> None:
    net = checkpointed_net()
    fused_steps(trained(net), net, torch.randn(5, 40))
    block, x = net.blocks[0], torch.randn(5, 40)
    alone = block(x)
    net(x)
    torch.testing.assert_close(block(x), alone, atol=1e-6, rtol=1e-6)
    layer = block[0]
    expected, *_ = formula(layer, x, torch.zeros(5, 64))
    assert relative(layer(x), expected) < 1e-5


def test_an_adapter_loaded_for_use_stays_frozen_when_it_is_chosen(
    micro_model: Path, tmp_path: Path
) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    injection.attach(transformer, Adapter(rank=2), seed=0)
    files.save(transformer, tmp_path, base="micro")
    used = FluxTransformer2DModel.from_pretrained(micro_model, subfolder="transformer")
    files.load(used, tmp_path)
    used.set_adapters([NAME], [0.25])
    used.disable_adapters()
    used.enable_adapters()
    assert all(layer.is_frozen(NAME) for layer in deft_linear.layers(used).values())
    assert {layer.scale_of(NAME) for layer in deft_linear.layers(used).values()} == {0.25}
    transformer.set_adapters([NAME], [1.0])
    assert not any(layer.is_frozen(NAME) for layer in deft_linear.layers(transformer).values())


def test_another_base_layer_gets_factors_of_its_own() -> None:
    net, x = adopted(peft_net("deft")).requires_grad_(False), torch.randn(5, 40)
    net(x)
    torch.manual_seed(3)
    net[0].base_layer = nn.Linear(40, 24).requires_grad_(False)
    expected, *_ = formula(net.requires_grad_()[0], x, torch.zeros(5, 24))
    assert relative(net.requires_grad_(False)(x), expected) < 1e-5


def test_it_works_within_inference_mode_and_after_it() -> None:
    net, x = adopted(peft_net("deft")).requires_grad_(False), torch.randn(5, 40)
    with torch.inference_mode():
        inside = net(x)
        made_inside = copy.deepcopy(net)
        torch.testing.assert_close(made_inside(x), inside)
    x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(net(x), inside)


def test_one_vector_is_enough() -> None:
    net, x = adopted(peft_net("deft")), torch.randn(3, 40)
    torch.testing.assert_close(net(x[0]), net(x)[0])


def test_a_layer_without_memory_still_has_a_state() -> None:
    net = adopted(peft_net("deft"))
    names = set(net.state_dict())
    assert set(net.to("meta").state_dict()) == names


def test_r_trains_alone_where_p_is_frozen() -> None:
    layer = adopted(peft_net("deft"))[0]
    layer.deft_P[NAME].requires_grad_(False)
    x, weights = torch.randn(5, 40), torch.randn(5, 24)
    (layer(x) * weights).sum().backward()
    expected = formula(layer, x, weights)[3]
    assert layer.deft_P[NAME].grad is None
    assert relative(layer.deft_R[NAME].grad, expected) < 1e-5


def test_training_follows_pefts_layer_from_the_same_start() -> None:
    """The same losses, while no sign of peft's basis flips."""
    theirs = peft_net("deft", r=3)
    ours = adopted(theirs)
    x, wanted = torch.randn(64, 40), torch.randn(64, 24)
    curves = []
    for net in (theirs, ours):
        optimiser = torch.optim.SGD(trained(net), lr=0.01)
        curves.append([])
        for _ in range(30):
            optimiser.zero_grad()
            loss = (net(x) - wanted).square().mean()
            loss.backward()
            optimiser.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.97 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


class Checkpointed(nn.Module):
    """Linear layers of two shapes in blocks that are computed again for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 40)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


class Seen(TorchDispatchMode):
    """Remembers the operators that ran and what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.made += [found] if isinstance(found, Tensor) else []
        return found


def checkpointed_net() -> Checkpointed:
    net = Checkpointed().requires_grad_(False)
    config = DeftConfig(r=4, target_modules=r"blocks\.\d\.(0|2)", **KINDS["deft"])
    inject_adapter_in_model(config, net, NAME)
    deft_linear.adopt(net)
    deft_linear.share_factors(net)
    return net


def test_a_pass_factorises_once_for_all_layers_however_often_blocks_are_computed() -> None:
    net = checkpointed_net()
    with Seen() as seen:
        net(torch.randn(5, 40)).square().mean().backward()
    assert factorisations(seen) == 1
    assert "linalg_qr" not in seen.names


def factorisations(seen: Seen) -> float:
    """How often all bases were made: each time, one decomposition finds what another leaves out."""
    return sum(name.startswith("linalg_cholesky") for name in seen.names) / 2


def test_while_parameters_are_constant_all_passes_share_one_factorisation() -> None:
    net, xs = checkpointed_net(), torch.randn(3, 5, 40)
    apart = [net(x) for x in xs]
    torch.stack([y.square().mean() for y in apart]).sum().backward()
    expected = [p.grad.clone() for p in trained(net)]
    net.zero_grad()
    with Seen() as seen, deft_linear.constant_parameters(net):
        with torch.no_grad():
            net(xs[0])
        for x, before in zip(xs, apart, strict=True):  # as accumulated batches of one step
            y = net(x)
            assert torch.equal(y, before)
            y.square().mean().backward()
    assert factorisations(seen) == 1
    for found, other in zip((p.grad for p in trained(net)), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-7)


def test_what_was_constant_is_made_anew_afterwards() -> None:
    net, x = checkpointed_net(), torch.randn(5, 40)
    with deft_linear.constant_parameters(net):
        before = net(x)
    fused_steps(trained(net), net, x)
    expected = copy.deepcopy(net)(x)
    assert relative(net(x), before) > 0.01
    assert torch.equal(net(x), expected)


def test_a_module_around_the_whole_makes_factors_once_for_all_its_calls() -> None:
    net, x = checkpointed_net(), torch.randn(5, 40)
    outer = nn.Sequential(net, net)
    deft_linear.share_factors(outer)
    with Seen() as seen:
        outer(x).square().mean().backward()
    assert factorisations(seen) == 1
    found = [p.grad.clone() for p in trained(net)]
    net.zero_grad()
    net(net(x)).square().mean().backward()
    for one, other in zip(found, (p.grad for p in trained(net)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_an_error_in_a_pass_closes_it() -> None:
    net = checkpointed_net()
    with pytest.raises(RuntimeError):
        net(torch.randn(5, 41))
    fused_steps(trained(net), net, torch.randn(5, 40))
    layer, x = net.blocks[0][0], torch.randn(5, 40)
    expected, *_ = formula(layer, x, torch.zeros(5, 64))
    assert relative(layer(x), expected) < 1e-5


def test_a_layer_left_out_of_a_pass_gets_no_gradient() -> None:
    net, x = checkpointed_net(), torch.randn(5, 40)
    net.blocks[1] = nn.Identity()  # taken out after its factors would have been shared
    net(x).square().mean().backward()
    net.zero_grad()
    alone = net.blocks[0]
    alone(x).square().mean().backward()
    assert all(p.grad is not None for p in trained(alone))
    assert all(p.grad is None for p in trained(net.blocks[2]))


def test_a_model_is_let_go_and_copied_also_where_no_backward_pass_followed() -> None:
    net, x = checkpointed_net(), torch.randn(5, 40)
    y = net(x)
    torch.testing.assert_close(copy.deepcopy(net)(x), y)
    gone = weakref.ref(net.blocks[0][0])
    del net, y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("i", "o"), [(3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)])
def test_three_parts_in_bfloat16_err_no_more_than_float32_does_today(i: int, o: int) -> None:
    """right^T W for FLUX's layers, 64 of each one's inputs: a column of the product does not depend
    on the others. Without a GPU the parts are multiplied in float32, which is exact for them."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(o, 64)).bfloat16()
    for rank in (16, 64, 256):
        q = torch.linalg.qr(torch.randn(o, rank)).Q
        truth = q.double().mT @ weight.double()
        (by_rows,) = factors.into_subspace(q[None], [weight])
        parts = factors.in_parts(q)
        assert torch.equal(parts.double().unflatten(-1, (3, -1)).sum(dim=-2), q.double())
        (by_parts,) = factors.added_parts([parts.float().mT @ weight.float()], rank)
        assert relative(by_parts, truth) <= relative(by_rows, truth)
        two = factors.added_parts([parts.float().mT[: 2 * rank] @ weight.float()], 2 * rank)[0]
        assert relative(two[:rank] + two[rank:], truth) > 5 * relative(by_rows, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_training_makes_no_matrix_of_the_weights_size_and_no_float32_activation(kind: str) -> None:
    net = adopted(peft_net(kind, i=1200, o=1100, r=4)).bfloat16()
    for parameter in trained(net):
        parameter.data = parameter.data.float()
    x = torch.randn(700, 1200, dtype=torch.bfloat16, requires_grad=True)
    with Seen() as seen:
        net(x).sum().backward()
    weight = net[0].base_layer.weight
    made = [t for t in seen.made if t.untyped_storage().data_ptr() != weight.data_ptr()]
    assert max(t.numel() for t in made if 700 not in t.shape) <= factors.ROWS * 1200
    assert not [t.shape for t in made if 700 in t.shape and t.dtype != torch.bfloat16]


def lora_net(i: int, o: int, r: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(i, o)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=["0"]), net, NAME)
    return net


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_no_more_than_lora(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(4000, 192, dtype=dtype, requires_grad=True)
    ours = adopted(peft_net(kind, i=192, o=256, r=16)).to(dtype)
    assert saved_bytes(ours, x) <= 1.02 * saved_bytes(lora_net(192, 256, 16).to(dtype), x)


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_no_more_than_lora(kind: str) -> None:
    x = torch.randn(4000, 192, requires_grad=True)
    counts = []
    for net in (adopted(peft_net(kind, i=192, o=256, r=16)), lora_net(192, 256, 16)):
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 1.03 * counts[1]


@pytest.mark.parametrize("bits", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantised_weight_gradients_are_those_of_its_dense_form(kind: str, bits: Bits) -> None:
    plain = adopted(peft_net(kind, i=128, o=64))
    layer = copy.deepcopy(plain)[0]
    layer.base_layer = quantised(layer.base_layer, bits).to("cpu")
    weight = dense(layer.base_layer)
    assert 0.001 < relative(weight, plain[0].base_layer.weight) < 0.15
    plain[0].base_layer.weight.data = weight.clone()
    x, weights = torch.randn(6, 128), torch.randn(6, 64)
    direct = layer.base_layer(torch.eye(128)) - layer.base_layer.bias  # what the library reads
    assert relative(direct.mT, weight) < (1e-2 if bits == "int8" else 1e-6)
    if bits == "int8":
        state = layer.base_layer.state
        assert relative(weight, int8_vectorwise_dequant(state.CB, state.SCB)) < 1e-6
    # int8's product rounds x as well, so output and gradient of x are less exact than those of P, R
    found, expected = layer_values(layer, x, weights), formula(plain[0], x, weights)
    loose = 3e-2 if bits == "int8" else 1e-5
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert relative(one, other) < (loose if k < 2 else 1e-5)
    layer.start(NAME)
    if kind != "para":
        torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="quantised weight"):
        layer.merge()


def test_a_layer_with_transposed_weights_stays_pefts() -> None:
    net = nn.Sequential(Conv1D(24, 40)).requires_grad_(False)
    config = DeftConfig(r=4, target_modules=["0"], fan_in_fan_out=True)
    inject_adapter_in_model(config, net, NAME)
    deft_linear.adopt(net)
    assert type(net[0]) is PeftDeftLinear
