"""The recipe of the embedded base: its stages end to end, and states that survive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_base
from recipe import bank, bundles, stage, transformer
from recipe.optimiser import Optimiser, like_adamw, orthogonal
from recipe.stage import Plan
from safetensors.torch import load_file, save_file

from visualcloze_deft.backbones.flux_fill.files import resolution_of
from visualcloze_deft.backbones.flux_fill.loading import load_transformer
from visualcloze_deft.inference.pipeline import InContextPipeline
from visualcloze_deft.paths import BASE

SCRIPTS = Path(__file__).parents[1] / "scripts"
CELL = 32


def plan_at(output: Path, *, cell: int = CELL, bundles: int = 20) -> Plan:
    return Plan(
        output=output,
        cell=cell,
        minutes=dict.fromkeys(train_base.STAGES, 0.01),
        anneal=0,
        processes=1,
        bundles=bundles,
        batch=0.01,
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A recipe that begins with the shipped base, and one part of its bank."""
    plan = plan_at(tmp_path_factory.mktemp("base"))
    train_base.begin_with(plan, BASE)
    plan.bank.mkdir()
    for columns, arrays in bundles.Writer(plan).part(0, 0).items():
        np.savez(plan.bank / f"000000-{columns}.npz", **arrays)
    return plan


@pytest.fixture(scope="module")
def trainer(started: Plan) -> transformer.Trainer:
    opened = transformer.open_bank(started)
    (started.bank / ".000001-2.npz").write_bytes(b"half of it")  # a kill left it
    opened.refresh()
    torch.manual_seed(0)
    return transformer.Trainer(started, transformer.first_net(started, opened), opened)


def test_only_whole_parts_are_read_and_each_once(trainer: transformer.Trainer) -> None:
    assert 0 < len(trainer.bank) <= bundles.PART
    assert trainer.bank.refresh() == 0


def test_a_bundle_is_a_function_of_its_number(started: Plan) -> None:
    first, again = (bundles.Writer(started).part(3, 0) for _ in range(2))
    assert first.keys() == again.keys()
    for columns, arrays in first.items():
        for name, values in arrays.items():
            assert (values == again[columns][name]).all()


def test_what_is_drawn_hides_what_the_bundle_hides(trainer: transformer.Trainer) -> None:
    torch.manual_seed(0)
    drawn = trainer.bank.draw(2, (2, 0), 8)
    rows = drawn.mask.unflatten(1, (2, -1))
    assert not rows[:, 0].any()  # examples are whole
    cells = rows[:, 1].unflatten(1, (CELL // 16, 2, CELL // 16))
    assert ((cells.amax(dim=(1, 3)) == cells.amin(dim=(1, 3))) & (cells.amax((1, 3)) < 2)).all()
    assert (cells.amax(dim=(1, 3)).sum(dim=1) == 1).all()
    hidden = drawn.mask > 0
    assert (drawn.seen[~hidden] == drawn.clean[~hidden]).all()
    assert (drawn.seen[hidden] == trainer.bank.blank).all()


def error_of(trainer: transformer.Trainer) -> float:
    """On the same grids, noise and times each time."""
    torch.manual_seed(1)
    trainer.take_errors()
    for _ in range(2):
        trainer.step(1, (2, 0), 0.0)
    return trainer.take_errors()["target_error"]


@pytest.mark.scripts
def test_a_step_learns_and_what_captures_it_leaves_no_trace(trainer: transformer.Trainer) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    trainer.optimiser.rate.fill_(1e-3)
    with trainer.unchanged():
        trainer.compute(1, (2, 0))
        changed = [n for n, t in trainer.state().items() if not torch.equal(t, before[n])]
        assert len(changed) > len(before) / 2
    for name, tensor in trainer.state().items():
        assert torch.equal(tensor, before[name]), name
    trainer.steps = transformer.WARM_UP
    first = error_of(trainer)
    for _ in range(6):
        trainer.step(1, (2, 0), 1.0)
    assert error_of(trainer) < first
    weights = dict(zip(trainer.names, trainer.masters, strict=True))
    name = "transformer.x_embedder.weight"
    assert torch.equal(weights[name][:, 128:], before[f"weight.{name}"][:, 128:])


def test_a_recipe_begins_with_the_base_that_it_is_given(started: Plan) -> None:
    plan = plan_at(started.output, cell=resolution_of("tiny"))
    net = transformer.first_net(plan, transformer.open_bank(plan))
    shipped = load_transformer("tiny", dtype=torch.float32).state_dict()
    for name, tensor in net.transformer.state_dict().items():
        torch.testing.assert_close(tensor, shipped[name].float())


def test_heads_look_one_cell_aside_at_any_size() -> None:
    wide = transformer.Net(128, torch.ones(64)).transformer
    turned = transformer.Net(64, torch.ones(64)).transformer
    transformer.look_further(turned, (128 - 64) // 16)
    for mine, other in zip(
        wide.single_transformer_blocks, turned.single_transformer_blocks, strict=True
    ):
        torch.testing.assert_close(mine.attn.to_q.bias, other.attn.to_q.bias)


def test_a_step_of_its_own_is_not_asked_how_a_hidden_pattern_is_turned() -> None:
    classes = torch.zeros(2, 3, 16, 3, dtype=torch.uint8)  # plain balls
    classes[:, 1, 3, 2] = 1  # stripes in one square of the second token
    mask = torch.tensor([[0.0, 1.0, 1.0]] * 2)
    weight = transformer.weights_of(mask, classes, unsettled=torch.tensor([True, False]))
    assert weight[0, 1] == 0
    assert (weight[0, 2] == weight[1, 2]).all()
    assert weight[1, 1] > weight[1, 2] > weight[1, 0] > 0


def test_orthogonal_updates_have_singular_values_near_one() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 64), (2, 64, 16)):
        found = orthogonal(torch.randn(shape, generator=draw))
        values = torch.linalg.svdvals(found)
        assert found.shape == shape
        assert 0.6 < values.min() < values.max() < 1.3


def test_the_optimiser_finds_a_minimum() -> None:
    draw = torch.Generator().manual_seed(0)
    right = [torch.randn(8, 4, generator=draw), torch.randn(5, generator=draw)]
    found = [torch.zeros_like(one) for one in right]
    optimiser = Optimiser(found[:1], found[1:], scale=like_adamw)
    for step in range(300):
        optimiser.rate.fill_(0.1 * (1 - step / 300))
        off = [a - b for a, b in zip(found, right, strict=True)]
        optimiser.step(off[:1], off[1:])
    for a, b in zip(found, right, strict=True):
        assert (a - b).abs().max() < 0.05


# States


def test_a_state_of_another_size_or_of_something_else_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_at(tmp_path)
    stage.keep(plan, "vae", {"x": torch.ones(2)}, {"strips": 3})
    tensors, progress = stage.kept(plan, "vae") or ({}, {})
    assert (tensors["x"].tolist(), progress) == ([1, 1], {"strips": 3})
    with pytest.raises(SystemExit, match="2"):
        stage.kept(plan_at(tmp_path, cell=64), "vae")
    assert "vae_state.safetensors has cell 32, this run 64" in capsys.readouterr().err
    save_file({"x": torch.ones(1)}, plan.state("vae"))
    with pytest.raises(SystemExit, match="2"):
        stage.kept(plan, "vae")
    assert "is not a state of this recipe" in capsys.readouterr().err


def test_a_state_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_at(tmp_path)
    stage.keep(plan, "vae", {"x": torch.zeros(2)}, {"strips": 1})
    plan.state("vae").with_suffix(".part").mkdir()  # nothing can be written there
    with pytest.raises(SystemExit, match="2"):
        stage.keep(plan, "vae", {"x": torch.ones(2)}, {"strips": 2})
    assert "the state before it is whole" in capsys.readouterr().err
    assert load_file(plan.state("vae"))["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cell", "40"], "--cell 40: give a multiple of 16"),
        (["--minutes", "-1"], "--minutes -1.0: give a number above 0"),
        (["--start", "nowhere"], "--start nowhere: no model_index.json there"),
        (["--stage", "pack"], "run the stage transformer first"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_base.main(["--output", str(tmp_path / "base"), *words])
    assert said in capsys.readouterr().err


@pytest.mark.scripts
def test_all_stages_make_a_base_that_generates(tmp_path: Path) -> None:
    """From nothing, then a second sitting, then a picture."""
    output = tmp_path / "base"
    words = ["--output", output, "--cell", CELL, "--minutes", 0.02, "--anneal", 0.01]
    words += ["--bundles", 60, "--processes", 1, "--batch", 0.01]

    def run(*more: object) -> None:
        command = [sys.executable, SCRIPTS / "train_base.py", *words, *more]
        subprocess.run([str(word) for word in command], check=True, timeout=400)

    run()
    log = [json.loads(line) for line in (output / "transformer_log.jsonl").open()]
    run("--stage", "transformer")
    again = [json.loads(line) for line in (output / "transformer_log.jsonl").open()]
    assert again[-1]["steps"] > log[-1]["steps"] > 0
    assert again[-1]["minutes"] > log[-1]["minutes"] > 0
    assert list((output / "samples").glob("0*.png"))
    assert bank.ROOM.keys() == {kind for _, kind in transformer.ODDS}
    pipe = InContextPipeline.from_pretrained(str(output / "base"))
    assert pipe.resolution == CELL
    figures = json.loads((output / "measures.json").read_text())
    assert 0 <= figures["truth"]["textures"] <= 1
    assert figures["vae"]["psnr"] > figures["copy"]["10"]["psnr"]
    assert "| depth-to-image |" in (output / "base" / "README.md").read_text()
