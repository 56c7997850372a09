"""Figures, curves, the running average and the report: what they say, and that they agree."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, get_args

import deepspeed
import numpy as np
import processes
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones import flops
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.config.run_settings import Run, Tracker, load_run, write_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.reporting import plots
from visualcloze_deft.sampling.encoding import PixelExample, encode
from visualcloze_deft.training import checkpoint, engine, metrics_log, report, run_data, run_folder
from visualcloze_deft.training.batch_schedule import StepPlan
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.rate_schedules import averaging_factor
from visualcloze_deft.training.validation import ValidationLosses


def join() -> None:
    """A process group of this process alone, and DeepSpeed in it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    join()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it
        yield
    deepspeed.comm.destroy_process_group()


def micro_run(model: Path, output: Path, *more: str) -> Run:
    fields = [f"model={model}", f"output={output}", "data.tasks=depth-to-image,novel-view"]
    return load_run(None, [*fields, "adapter.rank=4", "gradient_checkpointing=none", *more])


def seen(task: str, error: float, tokens: int = 10) -> metrics_log.ExampleLoss:
    return metrics_log.ExampleLoss(task=task, error=error, tokens=tokens, items=2, skipped=())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("group")
def test_a_line_a_step_says_what_happened_and_trackers_the_same(
    micro_model: Path, tmp_path: Path
) -> None:
    run = micro_run(micro_model, tmp_path)
    watched = metrics_log.MetricsLog(run, load_models(run.model), rank=0, world=1, start=-1)
    assert list(watched.timed(iter([1, 2]))) == [1, 2]
    planned = StepPlan(first=0, parts=((0, 1, 2),), tokens=(30,))
    told = {2: seen("b", 4.0), 0: seen("a", 1.0), 1: seen("a", 2.0, tokens=20)}
    figures = {"step": 7, "examples": 3, "norms": {"P": 0.5}}
    merged, written = watched.step(planned, told, figures, seconds=0.5)
    assert list(merged) == [0, 1, 2]
    measured = {
        1: ValidationLosses(task="a", errors=(1.0, 3.0)),
        0: ValidationLosses(task="b", errors=(0.0, 1.0)),
    }
    assert watched.evaluated(7, 3, measured, [0.25, 0.75]) == 1.25
    watched.close()
    (line,) = lines(tmp_path / run_folder.METRICS)
    assert line == written
    assert line["tasks"] == {"a": 1.5, "b": 4.0}
    assert (line["loss"], line["tokens"], line["norms"]) == (7 / 3, 30, {"P": 0.5})
    assert (line["examples_per_second"], line["tokens_per_second"]) == (6, 80)
    assert line["memory"] > 0
    assert 0 <= line["waiting"] < 1
    (evaluation,) = lines(tmp_path / run_folder.EVALUATION)
    assert evaluation["times"] == {"0.250": 0.5, "0.750": 2.0}
    assert evaluation["tasks"] == {"a": 2.0, "b": 0.5}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"loss", "task/a", "norm/P", "memory", "evaluation/task/b", "evaluation/time/0.750"}
    assert names <= set(board.Tags()["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("task/a")] == [(7, 1.5)]


def test_tensorboard_shows_no_step_twice_after_a_resumed_run(tmp_path: Path) -> None:
    run = Run(output=str(tmp_path))
    for start, value in ((-1, 1.0), (2, 2.0)):  # the first one is killed: never finished
        tracker = metrics_log.started("tensorboard", run, start)
        for step in range(start + 1, 5):
            tracker.log({"loss": value}, step=step)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_tracker_without_its_package_is_refused_before_the_run(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    installed = {found.name.lower().replace("-", "_") for found in distributions()}
    missing = next(name for name in get_args(Tracker) if name not in installed)
    output = tmp_path / "run"
    words = ["train", "--output", output, "--set", f'logging.trackers=["{missing}"]']
    assert f"logging.trackers names {missing}, whose package is not installed" in refused(*words)
    assert not output.exists()
    assert "logging.trackers.0 = 'tensorbord'" in refused(
        "train", "--output", output, "--set", 'logging.trackers=["tensorbord"]'
    )


def test_flops_agree_with_those_that_torch_counts() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=3,
            num_single_layers=5,
            guidance_embeds=True,
        ).requires_grad_(False)
        image, text, config = 2592, 512, transformer.config
        inputs = {
            "hidden_states": torch.empty(1, image, 384),
            "encoder_hidden_states": torch.empty(1, text, 4096, requires_grad=True),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(image, 3),
            "txt_ids": torch.empty(text, 3),
            "guidance": torch.empty(1),
        }
        inputs["hidden_states"].requires_grad_(True)
        with FlopCounterMode(display=False) as forward:
            out = transformer(**inputs, return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    assert sum(flops.forward_flops(config, image, text)) == pytest.approx(
        forward.get_total_flops(), rel=0.01
    )
    both = forward.get_total_flops() + backward.get_total_flops()
    assert flops.training_flops(config, image, text) == pytest.approx(both, rel=0.05)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_running_average_is_a_plain_one_and_is_saved_shown_and_taken_up_again(
    micro_model: Path, tmp_path: Path, zero: int
) -> None:
    """In a process of its own: ZeRO-3 exchanges torch's linear function for good."""
    processes.run([micro_model, tmp_path, zero], processes=1, function=averaged)


def averaged(model: str, folder: str, zero: str) -> None:
    join()
    tmp_path = Path(folder)
    run = micro_run(Path(model), tmp_path, f"zero={zero}", "optimiser.lr=0.01")
    models = load_models(run.model)
    injection.attach(models.transformer, run.adapter, seed=0)
    trained = engine.start_engine(models.transformer, run)
    draws = PixelDataset(run_data.mixture_of(run))
    plain: dict[str, torch.Tensor] = {}
    for step in range(1, 4):
        drawn = [one for one in [draws[step]] if isinstance(one, PixelExample)]
        trained.backward(trained(encode(models, drawn, seed=0)).sum())
        trained.step()
        engine.average(trained, averaging_factor(step, 0.5))
        now, decay = engine.whole_parameters(trained), min(0.5, (1 + step) / (10 + step))
        plain = {n: decay * plain.get(n, now[n]) + (1 - decay) * now[n] for n in now}
    before = engine.gather_adapter(trained)
    average = engine.by_parameter(engine.gather_average(trained))
    for name, tensor in plain.items():
        torch.testing.assert_close(average[name], tensor, atol=1e-7, rtol=1e-5)
    with engine.published(trained, averaged=True):
        shown = engine.whole_parameters(trained)
    assert all(torch.equal(shown[name], average[name]) for name in average)
    assert not all(torch.equal(shown[name], now[name]) for name in now)
    after = engine.whole_parameters(trained)
    assert all(torch.equal(after[name], now[name]) for name in now)

    progress = checkpoint.Progress(step=3, examples=3, seed=0, global_batch=1)
    saved = checkpoint.save(
        tmp_path / "checkpoints",
        progress,
        engine.gather_moments(trained),
        lambda at: files.save(models.transformer, at, base=run.model, tensors=before),
        keep=1,
        average=engine.gather_average(trained),
    )
    again = load_models(run.model)
    files.load(again.transformer, saved, trainable=True)
    resumed = engine.start_engine(again.transformer, run)
    engine.restore_moments(resumed, checkpoint.Checkpoint(folder=saved, progress=progress))
    kept = engine.gather_average(resumed)
    assert all(torch.equal(kept[f"average.{name}"], average[name]) for name in average)


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def written_run(folder: Path, steps: int, **more: float) -> Path:
    """A run folder as `steps` steps would leave it. more: losses of other tasks."""
    folder.mkdir()
    write_run(Run(output="<b>runs</b>"), folder / run_folder.SETTINGS)
    for step in range(1, steps + 1):
        line = {"step": step, "examples": 4 * step, "loss": 1 / step, "lr": 1e-4, "seconds": 0.5}
        run_folder.append_line(
            folder / run_folder.METRICS, line | {"tasks": {"a<b": 1 / step} | more}
        )
    return folder


def test_the_report_shows_what_there_is_and_needs_no_other_file(tmp_path: Path) -> None:
    folder = written_run(tmp_path / "run", 40, c=0.1)
    for step in (0, 20):
        line = {"step": step, "examples": 4 * step, "loss": 0.5, "tasks": {"a<b": 0.25}}
        run_folder.append_line(folder / run_folder.EVALUATION, line | {"times": {"0.500": 0.5}})
    run_folder.append_line(
        folder / run_folder.SKIPPED,
        {"step": 1, "source": "folder", "item": "7", "why": "<cut short>"},
    )
    with (folder / run_folder.METRICS).open("a") as file:
        file.write('{"step": 41, "examp')  # what a run under way is writing
    (folder / "sheets").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "sheets" / "step-000020.png")
    text = report.write_report(folder).read_text()
    page = Page(text)
    assert "40 of 1000, 160 examples" in page.text
    assert "The training loss may stand above the validation loss" in page.text
    assert "0.500 at step 0, 0.500 at step 20" in page.text
    assert "a<b" in page.text
    assert "<cut short>" in page.text
    assert page.tags.count("img") == 1
    assert "b" not in page.tags  # what files say is text, not markup
    assert "data:image/jpeg;base64," in text
    assert not {"link", "script", "iframe"} & set(page.tags)
    assert 'src="http' not in text
    svgs = [f"<svg{part.split('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len(svgs) == 5  # loss, by task, by time, learning rate, examples per second
    assert all(ET.fromstring(svg).tag.endswith("svg") for svg in svgs)


def test_a_chart_that_would_show_another_one_again_is_left_out(tmp_path: Path) -> None:
    one, two = written_run(tmp_path / "one", 9), written_run(tmp_path / "two", 9, c=0.1)
    titles = [report.write_report(folder).read_text().count("<svg") for folder in (one, two)]
    assert titles == [3, 4]  # loss, learning rate, examples per second; and loss by task


def test_a_report_of_nothing_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no run there" in refused("report", tmp_path)
    with pytest.raises(UserError, match="has not taken a step yet"):
        report.write_report(written_run(tmp_path / "run", 0))


def test_smoothing_keeps_a_constant_and_passes_over_what_is_not_finite() -> None:
    y = np.array([np.nan, 2.0, np.inf, 2.0, np.nan])
    smoothed = plots.smooth(y)
    assert np.isnan(smoothed[0])
    assert smoothed[1:].tolist() == [2.0] * 4


def test_a_value_without_weight_does_not_move_a_mean() -> None:
    y, weights = np.array([1.0, 5.0, 9.0]), np.array([2.0, 0.0, 1.0])
    assert plots.smooth(y, share=1.0, weights=weights)[1] == 1
    heavier, lighter = (plots.smooth(y, share=1.0, weights=w)[-1] for w in (weights + 1, weights))
    assert 1 < lighter < 9
    assert heavier != lighter


def test_a_loss_that_was_not_finite_is_a_gap() -> None:
    lines = [{"loss": 1.0}, {"loss": None}, {}]
    assert np.isnan(plots.values(lines, "loss")).tolist() == [False, True, True]


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    x = np.arange(10_001.0)
    few, _ = plots.thinned(x, x)
    assert len(few) <= plots.POINTS
    assert few[-1] == 10_000


def test_options_that_a_tracker_does_not_know_are_one_line_without_their_values(
    tmp_path: Path,
) -> None:
    run = load_run(
        None, ["logging.tracker_options.tensorboard.api_key=hush", f"output='{tmp_path}'"]
    )
    with pytest.raises(UserError, match=r"tracker_options\.tensorboard: .* api_key") as raised:
        metrics_log.started("tensorboard", run, 0)
    assert "hush" not in str(raised.value)
