"""The cost of a training step on a GPU, counted from the real step without values."""

from __future__ import annotations

import pytest
import torch
from cost_model import FLUX, H100, Cost, step_cost

from visualcloze_deft.backbones.flops import training_flops
from visualcloze_deft.config.run_settings import Adapter

FEW = FLUX | {"num_layers": 1, "num_single_layers": 2}


def cost(method: str, rank: int, *, blocks: int | str = "none", few: bool = False) -> Cost:
    """LoRA's own products are in bfloat16, as under autocast: the cheaper way."""
    adapter = Adapter.model_validate({"method": method, "rank": rank})
    return step_cost(adapter, config=FEW if few else FLUX, blocks=blocks, lora=torch.bfloat16)


@pytest.mark.parametrize(("rank", "most"), [(64, 1.03), (256, 1.10)])
def test_a_step_with_deft_costs_what_one_with_lora_costs(rank: int, most: float) -> None:
    assert cost("deft", rank).seconds() <= most * cost("lora", rank).seconds()


def test_what_is_counted_is_the_arithmetic_of_a_frozen_model() -> None:
    class Config:
        num_attention_heads, attention_head_dim = 24, 128
        num_layers, num_single_layers = 1, 2
        in_channels, out_channels, joint_attention_dim = 384, 64, 4096

    counted = cost("lora", 1, few=True)
    flops = sum(operation.flops for operation in counted.operations)
    attention = sum(o.flops for o in counted.operations if o.name == "attention")
    needed = training_flops(Config, 5184, 512)
    # flops.py counts attention's backward pass as twice its forward, a kernel does 2.5 times
    assert flops - attention / 7 == pytest.approx(needed, rel=0.04)


def test_recomputed_blocks_cost_a_third_more_but_nothing_of_the_adapters_factors() -> None:
    kept, again = (cost("deft", 64, blocks=blocks, few=True) for blocks in ("none", "all"))
    assert 1.25 < again.seconds() / kept.seconds() < 1.5
    doubles = [c.flops(torch.float64) for c in (kept, again)]
    assert doubles[0] == doubles[1] > 0


def test_the_host_is_faster_than_the_card() -> None:
    for method in ("deft", "lora"):
        counted = cost(method, 64, few=True)
        assert counted.host(H100) < 0.5 * counted.seconds(H100)
