"""Memory known beforehand: each count against the real network, backward pass or process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import zero_memory
from diffusers import FluxTransformer2DModel
from living import Living
from micro_model import copy_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones import quantization
from visualcloze_deft.backbones.base import Load, Seen
from visualcloze_deft.backbones.flux_fill.activations import activations_of
from visualcloze_deft.backbones.flux_fill.context import ContextCache
from visualcloze_deft.backbones.flux_fill.files import PUBLISHED, component_config
from visualcloze_deft.backbones.flux_fill.layers import FLUX_LAYERS
from visualcloze_deft.backbones.flux_fill.loading import load_models, load_transformer
from visualcloze_deft.backbones.flux_fill.model import predict_velocity
from visualcloze_deft.backbones.flux_fill.packing import FluxText, Latents
from visualcloze_deft.backbones.flux_fill.sizes import (
    ENCODERS,
    Flux,
    encoder_parameters,
    flux,
    parameters_in,
)
from visualcloze_deft.backbones.model_files import FILL
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Adapter, Bits, load_run, write_run
from visualcloze_deft.planning.machine import RESERVE, main_memory, usable
from visualcloze_deft.planning.memory import ZERO, MemoryPlan, memory_plan
from visualcloze_deft.planning.sizes import FP8_ROWS, adapted_layers, quantising_bytes, stored
from visualcloze_deft.sampling.denoising import prefill
from visualcloze_deft.training import preparation, run_folder
from visualcloze_deft.training.engine import recompute


def layers_of(sizes: Flux, settings: Adapter) -> list[str]:
    return adapted_layers(sizes, settings, FLUX_LAYERS)


def asked(model: nn.Module, load: Load) -> dict[str, Tensor]:
    """Random inputs of `predict_velocity` for a load."""
    config, dtype = model.config, model.dtype
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    return {
        "inputs": random(load.grids, load.image, config.in_channels),
        "t": torch.rand(load.grids, generator=draw),
        "ids": torch.ones(load.image, 3),
        "text": random(load.grids, load.text, config.joint_attention_dim),
        "pooled": random(load.grids, config.pooled_projection_dim),
    }


def computed_once(
    model: nn.Module,
    context: Seen,
    inputs: Tensor,
    t: Tensor,
    ids: Tensor,
    text: Tensor,
    pooled: Tensor,
) -> ContextCache:
    """A call of an eighth of the tokens, which attends to the others; these do not see them."""
    ids[inputs.shape[1] // 2 :, 0] = 2  # two rows
    mask = torch.zeros(*inputs.shape[:2], 256)
    mask[:, -inputs.shape[1] // 8 :] = 1
    noisy, seen = inputs[..., :64], inputs[..., 64:128]
    latents = Latents(clean=seen, seen=seen, mask=mask, ids=ids)
    cache = ContextCache(model, latents, text=FluxText(text, pooled), guidance=1.0)
    prefill(cache, context, cache.text)
    cache.active(noisy, t)
    return cache


def bytes_saved(model: nn.Module, load: Load) -> int:
    """What autograd keeps of one forward pass, without parameters: storages, each counted once."""
    ours = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            found[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    given = asked(model, load)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if load.seen != "full":
            cache = computed_once(model, load.seen, **given)
            for part in filter(None, (cache.examples, cache.rest)):
                for pair in part.values():
                    [*map(keep, pair)]  # which a recomputed block has until its turn comes
        else:
            predict_velocity(model, **given, guidance=1.0)
    return sum(size for size, _ in found.values())


FLUX, FLUX_VAE, CLIP_L, T5_XXL = (
    json.loads((PUBLISHED / part / "config.json").read_text())
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
)


@pytest.fixture
def flux_settings(tmp_path: Path) -> Path:
    return write_flux_settings(tmp_path / "flux")


def write_flux_settings(folder: Path) -> Path:
    """A folder with the settings of FLUX.1-Fill's networks and nothing else."""
    shutil.copytree(PUBLISHED, folder)
    return folder


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_networks_are_as_large_as_their_settings_say(micro_model: Path, name: str) -> None:
    name = str(micro_model) if name == "micro" else name
    models = load_models(name)
    transformer = flux(component_config(name, "transformer"))
    assert transformer.parameters == size(models.transformer)
    linear = {n: m for n, m in models.transformer.named_modules() if isinstance(m, nn.Linear)}
    assert transformer.linear == {n: (m.in_features, m.out_features) for n, m in linear.items()}
    for part in ENCODERS:
        assert encoder_parameters(name, part) == size(getattr(models, part))


def test_flux_is_as_large_as_published() -> None:
    assert flux(FLUX).parameters / 1e9 == pytest.approx(11.9, abs=0.01)
    published = {
        "text_encoder_2": (T5_XXL, 4762),
        "text_encoder": (CLIP_L, 123.1),
        "vae": (FLUX_VAE, 83.8),
    }
    for part, (settings, millions) in published.items():
        assert parameters_in(part, json.dumps(settings)) / 1e6 == pytest.approx(millions, rel=0.005)


WAYS = [
    Adapter(rank=4),
    Adapter(rank=4, method="para", dropout=0.1),
    Adapter(rank=4, method="lora"),
    Adapter(rank=4, target_modules=r".*transformer_blocks.*(to_q|proj_out|norm1\.linear)"),
]


def adapted(name: str, settings: Adapter) -> FluxTransformer2DModel:
    model = load_transformer(name, dtype=torch.float32).train()
    injection.attach(model, settings, seed=0)
    return model


@pytest.mark.parametrize("settings", WAYS, ids=lambda s: f"{s.method}-{s.target_modules[-5:]}")
@pytest.mark.parametrize("name", ["micro", "tiny"])
def test_what_autograd_keeps_is_as_planned(micro_model: Path, name: str, settings: Adapter) -> None:
    name = str(micro_model) if name == "micro" else name
    model = adapted(name, settings)
    sizes = flux(component_config(name, "transformer"))
    for load in (Load(grids=1, image=36, text=40), Load(grids=2, image=96, text=40)):
        plan = activations_of(sizes, settings, layers_of(sizes, settings), load, 4)
        for blocks in (0, 1, len(sizes.blocks)):
            recompute(model, blocks)
            assert bytes_saved(model, load) == pytest.approx(plan.kept(blocks), rel=0.06)


@pytest.mark.parametrize("seen", ["isolated", "causal"])
@pytest.mark.parametrize("settings", WAYS[:3], ids=lambda s: s.method)
def test_what_autograd_keeps_of_a_context_computed_once_is_as_planned(
    settings: Adapter, seen: Seen
) -> None:
    model = adapted("tiny", settings)
    sizes = flux(component_config("tiny", "transformer"))
    load = Load(grids=2, image=96, text=40, strip=12, seen=seen)
    plan = activations_of(sizes, settings, layers_of(sizes, settings), load, 4)
    for blocks in (0, 1, len(sizes.blocks)):
        recompute(model, blocks)
        assert bytes_saved(model, load) == pytest.approx(plan.kept(blocks), rel=0.1)


def test_gradients_are_the_same_however_many_blocks_are_recomputed() -> None:
    model = adapted("tiny", Adapter(rank=4))
    load, found = Load(grids=2, image=36, text=40), []
    for blocks in (0, 2, "all"):
        recompute(model, blocks)
        predict_velocity(model, **asked(model, load), guidance=1.0).square().mean().backward()
        found.append([parameter.grad.clone() for parameter in injection.trainable(model).values()])
        model.zero_grad()
    assert any(gradient.any() for gradient in found[0])
    assert all(
        torch.equal(*pair) for more in found[1:] for pair in zip(found[0], more, strict=True)
    )


class FlashAttention(TorchFunctionMode):
    """Attention that keeps no weights, as on CPU and GPU, on the meta device too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        parts = args[:3] or (kwargs["query"], kwargs["key"], kwargs["value"])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts)[0]


@pytest.mark.parametrize("method", ["deft", "lora"])
def test_a_step_of_flux_peaks_as_planned(method: str) -> None:
    """At FLUX's width and a 3x3 grid of 384 pixels in bfloat16, on one block of either kind."""
    few = FLUX | {"num_layers": 1, "num_single_layers": 1}
    load = Load(grids=1, image=5184, text=512)
    settings = Adapter(rank=32, method=method)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(few).to(torch.bfloat16).train()
        injection.attach(model, settings, seed=0)
        given = {k: v.to("meta") for k, v in asked(model, load).items()}
        with FlashAttention():
            kept = bytes_saved(model, load)
            with Living() as living:
                predict_velocity(model, **given, guidance=1.0).sum().backward()
    plan = activations_of(flux(few), settings, layers_of(flux(few), settings), load, 2)
    assert kept == pytest.approx(plan.kept(0), rel=0.03)
    assert living.most == pytest.approx(plan.peak(0), rel=0.1)


@pytest.mark.processes
def test_every_zero_stage_holds_what_is_planned(tmp_path: Path) -> None:
    processes.run([tmp_path / "held.json"], function=zero_memory.main)
    held = json.loads((tmp_path / "held.json").read_text())
    for stage in ZERO:
        run = zero_memory.run_under(stage)
        plan = memory_plan(run, Load(grids=1, image=16, text=8), processes=2, gpu=False)
        parts = plan.parts(stage, 0)
        # what is there between two passes: stage 0 has let go of what it summed in
        planned = parts.base + parts.adapter + parts.gradients + parts.optimiser
        if stage == 0:
            planned -= sum(plan.tensors) * 4
        assert held[str(stage)] == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("bits", ["none", "fp8", "int8", "nf4"])
def test_a_base_takes_the_bytes_that_are_planned(bits: Bits) -> None:
    model = load_transformer("tiny", dtype=torch.bfloat16, bits=bits)
    tensors = [*model.parameters(), *model.buffers()]
    scales = 0.03 if bits in ("int8", "nf4") else 0  # bitsandbytes has those beside parameters
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    planned = stored(flux(component_config("tiny", "transformer")), bits, 2)
    assert found == pytest.approx(planned, rel=0.002 + scales)


def test_fp8_is_made_of_as_many_rows_as_planned() -> None:
    assert FP8_ROWS == quantization.ROWS


def test_a_quantised_base_that_cannot_fit_is_refused_before_anything_is_loaded(
    micro_model: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container of 1 GB. Its weights are no weights: reading them would fail otherwise."""
    (tmp_path / "memory.max").write_text("1000000000\n")
    monkeypatch.setattr("visualcloze_deft.planning.machine.CONTAINER", tmp_path / "memory.max")
    model = copy_model(micro_model, tmp_path / "model")
    (model / "transformer/config.json").write_text(json.dumps(FLUX))
    words = ["--model", model, "--output", tmp_path / "run", "--processes", 1, "--zero", 2]
    for bits, base in (("fp8", 12), ("nf4", 6)):
        line = refused("train", *words, "--set", f"quantise={bits}")
        found = re.search(
            r"quantise = '(\w+)': about ([\d.]+) GB a process.* there are 1.0 GB", line
        )
        assert found
        assert found[1] == bits
        assert base < float(found[2]) < base + 40
    assert not (tmp_path / "run").exists()


def test_a_container_without_a_limit_has_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = main_memory()
    monkeypatch.setattr("visualcloze_deft.planning.machine.CONTAINER", tmp_path / "memory.max")
    assert main_memory() >= whole
    (tmp_path / "memory.max").write_text("max\n")
    assert main_memory() >= whole
    (tmp_path / "memory.max").write_text("4096\n")
    assert main_memory() == 4096


def test_quantising_counts_in_a_plan(flux_settings: Path) -> None:
    plan = plan_of(flux_settings, "quantise=nf4", "zero=2", processes=1)
    load = replace(plan.load, grids=1, image=16, text=8, strip=16)
    few = replace(plan, load=load, encoders=0)
    beside = quantising_bytes(few.model, "nf4", 2)
    assert beside == 15 * 6 * 3072 * 3072  # of the first norm
    assert few.peak(2, few.blocks) >= few.base + beside


@pytest.mark.parametrize("method", ["deft", "lora"])
def test_a_base_in_fp8_answers_nearly_as_before_and_can_be_trained_on(method: str) -> None:
    load = Load(grids=2, image=36, text=40)
    model = load_transformer("tiny", dtype=torch.float32)
    given = asked(model, load)
    with torch.no_grad():
        before = predict_velocity(model, **given, guidance=1.0)
        model = load_transformer("tiny", dtype=torch.float32, bits="fp8")
        after = predict_velocity(model, **given, guidance=1.0)
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    injection.attach(model, Adapter(method=method, rank=4), seed=0)
    optimiser = torch.optim.AdamW(injection.trainable(model).values(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = predict_velocity(model, **given, guidance=1.0).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(after.float().square().mean().item(), rel=0.05)
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in injection.trainable(model).values()} == {torch.float32}


def plan_of(folder: Path, *overrides: str, processes: int = 8) -> MemoryPlan:
    words = [f"model={folder}", "precision=bfloat16", "adapter.rank=32", *overrides]
    run = load_run(None, words)
    return memory_plan(run, Load(grids=1, image=5184, text=512), processes=processes, gpu=True)


def test_as_few_blocks_are_recomputed_as_fit(flux_settings: Path) -> None:
    plan = plan_of(flux_settings)
    for memory in (48 * 10**9, 80 * 10**9):
        for stage in ZERO:
            least = plan.least(stage, memory)
            assert least is not None
            assert plan.peak(stage, least) <= usable(memory)
            assert least == 0 or plan.peak(stage, least - 1) > usable(memory)
    assert plan.least(2, 24 * 10**9) is None


def test_auto_takes_the_lowest_stage_that_fits_and_zero_3_where_the_base_does_not(
    flux_settings: Path,
) -> None:
    plan = plan_of(flux_settings, "zero=auto")
    assert plan.choose(200 * 10**9) == (0, 0)
    assert plan.choose(80 * 10**9) == (0, plan.least(0, 80 * 10**9))
    between = (plan.peak(1, 57) + plan.peak(3, 57)) // 2
    stage, blocks = plan.choose(int(between / (1 - RESERVE))) or (0, 0)
    assert (stage, blocks > 0) == (3, True)
    assert plan.choose(10**9) is None
    alone = plan_of(flux_settings, "zero=auto", processes=1)
    assert alone.choose(80 * 10**9) == (0, alone.least(0, 80 * 10**9))
    fixed = plan_of(flux_settings, "zero=2", "gradient_checkpointing=all")
    assert fixed.choose(80 * 10**9) == (2, 57)


def test_a_run_folder_says_what_auto_became(micro_model: Path, tmp_path: Path) -> None:
    run = load_run(None, [f"model={micro_model}", f"output={tmp_path / 'run'}", "zero=auto"])
    preparation.prepare(run, processes=2, resume=False)
    kept = load_run(str(tmp_path / "run" / run_folder.SETTINGS))
    assert (kept.zero, kept.gradient_checkpointing) == (0, 0)
    assert preparation.as_decided(run) == kept


def test_plan_needs_settings_alone(flux_settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "flux-8gpu", "--model", str(flux_settings), "--grid", "3x3"]
    main([*words, "--memory", "48GB", "--rank", "32", "--batch", "1"])
    assert "choose   --zero 0 --gradient-checkpointing " in capsys.readouterr().out
    main([*words, "--memory", "24GB", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] is None
    assert found["parameters"] == flux(FLUX).parameters
    assert {way["zero"] for way in found["ways"]} == {0, 1, 2, 3}
    for way in found["ways"]:
        assert way["peak"] >= sum(way["parts"].values())


def test_steps_an_hour_are_those_of_an_earlier_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"examples": 1, "loss": 0.5, "tasks": {}}
    steps = enumerate((9.0, 2.0, 2.0), 1)
    lines = [json.dumps({"step": k, "seconds": seconds, **line}) for k, seconds in steps]
    (tmp_path / run_folder.METRICS).write_text("\n".join(lines))
    write_run(load_run("tiny", ["batch=4"]), tmp_path / run_folder.SETTINGS)
    main(["plan", "--grid", "2x2", "--run", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1800 steps an hour" in said
    assert "other settings, though: batch\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much"], "--memory 'much': expected a size"),
        (["--grid", "3"], "--grid '3': expected ROWSxCOLUMNS"),
        (["--run", "nowhere"], "--run nowhere: no steps"),
        (["--gradient-checkpointing", "9"], "the model has 5 blocks"),
        (["--zero", "3", "--set", "quantise=fp8"], "cannot be split over processes"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--model", "no/where"], "hub id 'no/where': not in the hub's cache"),
        (["--gradient-checkpointing", "some"], "gradient_checkpointing = 'some'"),
    ],
)
def test_a_mistake_is_named(refused: Callable[..., str], words: list[str], message: str) -> None:
    grid = [] if "--grid" in words else ["--grid", "2x2"]
    assert message in refused("plan", *grid, *words)


def test_a_plan_for_flux_fill_needs_no_hub(
    capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    words = ["plan", "--config", "flux-1gpu", "--grid", "3x3", "--memory", "24GB", "--json"]
    main([*words, "--revision", "gone", "--model", FILL])
    told = capsys.readouterr()
    plan = json.loads(told.out)
    assert plan["parameters"] == pytest.approx(11.9e9, rel=0.01)
    assert plan["model"] == f"{FILL}@gone"
    line = f"{FILL}@gone: not here, and the hub is not reached; planned from its known sizes\n"
    assert line in told.err
    assert "not in the hub's cache" in refused(*words, "--model", "nobody/another")
