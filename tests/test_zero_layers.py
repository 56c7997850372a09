"""Adapters under ZeRO with real processes: the same losses and adapter everywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import processes
import pytest
import torch
import zero_layers
from safetensors.torch import load_file
from torch import Tensor

from visualcloze_deft.config.run_settings import Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("zero")
    processes.run([output], function=zero_layers.main)
    return output


@cache
def plain(kind: str) -> dict[str, Tensor]:
    """The same examples in one process, without DeepSpeed."""
    net = zero_layers.Net(kind, recompute=False)
    optimiser = zero_layers.optimiser_of(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    losses = []
    for number, (x, wanted) in enumerate(zero_layers.examples(1, 0), start=1):
        loss = net(x, wanted)
        (loss / zero_layers.ACCUMULATED).backward()
        losses.append(loss.detach())
        if number % zero_layers.ACCUMULATED == 0:
            torch.nn.utils.clip_grad_norm_(parameters, Run().optimiser.max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
    found = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    return {"losses": torch.stack(losses), **found}


@pytest.mark.parametrize("kind", zero_layers.KINDS)
@pytest.mark.parametrize("way", zero_layers.WAYS)
@pytest.mark.parametrize("recompute", [True, False])
def test_losses_and_adapter_are_those_of_plain_training(
    trained: Path, kind: str, way: str, recompute: bool
) -> None:
    expected = plain(kind)
    found = load_file(trained / f"{kind}.{way}.{recompute}.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture(scope="module", params=[1, 2])
def in_nan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trainings where memory that nothing was written to reads as NaN, as it may on a GPU;
    a CPU's fresh pages are zero. In one process and in two."""
    output = tmp_path_factory.mktemp("nan")
    processes.run([output, "full of NaN"], function=zero_layers.main, processes=int(request.param))
    return output


def test_memory_full_of_nan_is_full_of_nan() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    made = torch.empty(4), torch.empty_like(torch.ones(3, 4)).unbind()
    torch.use_deterministic_algorithms(False)
    assert all(tensor.isnan().all() for tensor in (made[0], *made[1]))


@pytest.mark.parametrize("kind", zero_layers.KINDS)
@pytest.mark.parametrize("way", zero_layers.WAYS)
@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_is_read_from_memory_before_it_is_written(
    in_nan: Path, kind: str, way: str, recompute: bool
) -> None:
    expected = plain(kind)
    for name, tensor in load_file(in_nan / f"{kind}.{way}.{recompute}.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5, msg=name)
