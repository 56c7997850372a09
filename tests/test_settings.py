"""Settings: every value is checked, every mistake is named, and what is written reads back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import get_args

import pytest

from visualcloze_deft.adapters.method_table import METHODS
from visualcloze_deft.config.run_settings import (
    OWNED,
    RENAMED,
    Method,
    Run,
    config_for,
    load_run,
    parse_run,
    setting_names,
    write_run,
)
from visualcloze_deft.config.sameness import MAY_DIFFER, may_differ
from visualcloze_deft.errors import UserError
from visualcloze_deft.paths import CONFIGS
from visualcloze_deft.task_registry.files import load_tasks
from visualcloze_deft.training import resume
from visualcloze_deft.training.run_data import mixture_of
from visualcloze_deft.training.task_weights import weights_of


def test_without_file_and_overrides_all_is_default() -> None:
    assert load_run(None) == Run()


RUN_FILES = sorted(set(CONFIGS.glob("*.toml")) - set(CONFIGS.glob("compare-*.toml")))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_a_shipped_run_file_is_found_by_name_and_by_path(path: Path) -> None:
    assert load_run(path.stem) == load_run(str(path))


def test_the_small_base_brings_its_run_file_and_other_models_do_not() -> None:
    assert config_for(None) == config_for("tiny", ["scenes=9"]) == "tiny"
    assert config_for(None, ["scenes", "folder=x"]) == "tiny-photos"
    assert config_for(None, ["photos=dog", "folder=x"]) == "tiny-photos"
    assert config_for(None, ["photos=dog"]) == "subject"
    assert load_run("tiny").model == "tiny"
    assert load_run(config_for("some/model")) == Run()


OVERRIDES = {
    "steps=20": 20,
    "optimiser.lr=1e-4": 1e-4,
    "optimiser.lr=1": 1.0,
    "gradient_checkpointing=3": 3,
    "gradient_checkpointing=all": "all",
    "zero=auto": "auto",
    "data.recipe.shuffle_columns=false": False,
    "model=/models/flux": "/models/flux",
    'model="quoted words"': "quoted words",
    "model_lora=owner/name": "owner/name",
    "data.tasks=depth-to-image, novel-view": "depth-to-image, novel-view",
    "output=a=b": "a=b",
    "data.resolution=128": 128,
    "data.resolution=model": "model",
    "zero=3": 3,
    "adapter.method=para": "para",
    "adapter.alpha=8": 8,
    'data.sources=["scenes=9", "folder=/a b"]': ("scenes=9", "folder=/a b"),
    "optimiser.betas=[0.8, 0.9]": (0.8, 0.9),
    "data.recipe.examples=[1]": (1.0,),
    "data.weights={novel-view = 2}": {"novel-view": 2.0},
}


@pytest.mark.parametrize(("override", "value"), OVERRIDES.items(), ids=OVERRIDES)
def test_an_override_sets_its_setting_and_nothing_else(override: str, value: object) -> None:
    found: object = load_run(None, [override])
    default: object = Run()
    *sections, last = override.partition("=")[0].split(".")
    for section in sections:
        found, default = getattr(found, section), getattr(default, section)
    assert vars(found) == {**vars(default), last: value}


def test_the_last_override_wins_also_over_the_file() -> None:
    assert load_run("tiny", ["steps=3", "steps=4"]).steps == 4


def test_groups_and_patterns_do_not_weigh_what_is_named_itself() -> None:
    known = load_tasks()
    weights = {"*": 0.0, "depth-to-image": 3.0}

    def weigh(tasks: str) -> dict[str, float]:
        run = parse_run({"data": {"tasks": tasks, "weights": weights}}, where="")
        return weights_of(run, known)

    assert weigh("all") == dict.fromkeys(known, 0.0) | {"depth-to-image": 3.0}
    assert weigh("deraining, depth-to-image=2") == {"deraining": 1.0, "depth-to-image": 6.0}
    assert weigh("restoration*,deraining=2")["deraining"] == 2.0
    assert set(weigh("all,-depth-to-image").values()) == {0.0}


def test_a_task_of_weight_0_is_not_in_the_run() -> None:
    run = parse_run({"data": {"weights": {"*": 0.0, "depth-to-image": 3.0}}}, where="")
    assert set(mixture_of(run).tasks) == {"depth-to-image"}
    run = parse_run({"data": {"weights": {"*": 0.0}}}, where="")
    with pytest.raises(UserError, match="every task has weight 0"):
        mixture_of(run)


def test_a_weight_is_set_by_the_name_of_its_task() -> None:
    run = load_run(None, ["data.weights.novel-view=2", "data.weights.deblurring=0.5"])
    assert run.data.weights == {"novel-view": 2, "deblurring": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=1", "unknown setting 'step'; did you mean steps"),
        ("optimiser.lrr=1", "unknown setting 'optimiser.lrr'; did you mean optimiser.lr"),
        ("optimizer.lr=1", "unknown setting 'optimizer'; did you mean optimiser?"),
        ("data.recipe.hide_targets=1", "did you mean data.recipe.hide_target"),
        ("data.recipe.=1", "unknown setting 'data.recipe.'"),
        ("=1", "unknown setting ''; 'vcdeft train --help' tells"),
    ],
)
def test_an_unknown_setting_is_met_with_the_nearest(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_run(None, [override])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("steps=many", "steps", "'many'"),
        ("steps=0", "steps", "0"),
        ("steps=1.5", "steps", "1.5"),
        ("batch=-1", "batch", "-1"),
        ("zero=5", "zero", "5"),
        ("seed=-1", "seed", "-1"),
        ("gradient_checkpointing=perhaps", "gradient_checkpointing", "'perhaps'"),
        ("gradient_checkpointing=-1", "gradient_checkpointing", "-1"),
        ("context_weight=2", "context_weight", "2"),
        ("precision=float16", "precision", "'float16'"),
        ("model=[1]", "model", "[1]"),
        ("optimiser.lr=fast", "optimiser.lr", "'fast'"),
        ("optimiser.lr=0", "optimiser.lr", "0"),
        ("optimiser.lr=nan", "optimiser.lr", "nan"),
        ("optimiser.lr=inf", "optimiser.lr", "inf"),
        ("guidance=nan", "guidance", "nan"),
        ("optimiser.betas=[0.9]", "optimiser.betas.1", "[0.9]"),
        ("optimiser.betas=[0.9, 2]", "optimiser.betas.1", "2"),
        ("adapter.method=dora", "adapter.method", "'dora'"),
        ("adapter.rank=0", "adapter.rank", "0"),
        ("data=5", "data", "5"),
        ("data.sources=scenes", "data.sources", "'scenes'"),
        ("data.sources=[]", "data.sources", "[]"),
        ("data.resolution=100", "data.resolution", "100"),
        ("data.resolution=large", "data.resolution", "'large'"),
        ("data.weights.novel-view=-1", "data.weights.novel-view", "-1"),
        ("data.recipe.examples=[]", "data.recipe.examples", "[]"),
        ("data.recipe.examples=[0, 0]", "data.recipe.examples", "[0, 0]"),
        ("data.recipe.keep_task=1.1", "data.recipe.keep_task", "1.1"),
    ],
)
def test_a_wrong_value_is_named_with_its_setting(override: str, setting: str, value: str) -> None:
    with pytest.raises(UserError) as raised:
        load_run(None, [override])
    assert f"{setting} = {value}: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set 'steps': expected NAME=VALUE"),
        ("data.tasks.depth=1", "tasks"),
        ("steps.x=1", "steps"),
    ],
)
def test_an_override_of_the_wrong_form_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_run("tiny", [override])
    assert message in str(raised.value)


def test_a_setting_inside_a_value_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps = 5")
    with pytest.raises(UserError, match=r"--set 'steps\.x=1': steps is no section"):
        load_run(str(tmp_path / "run.toml"), ["steps.x=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps = ", "not valid TOML"),
        (b"\xff", "cannot be read as UTF-8"),
        (b"stepps = 5", "unknown setting 'stepps'; did you mean steps"),
        (b"[adapter]\nmethod = 'deff'", "adapter.method = 'deff'"),
    ],
)
def test_a_bad_run_file_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(UserError) as raised:
        load_run(str(path))
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_an_unknown_run_file_is_met_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"run file 'flux-8gpus': .* did you mean flux-8gpu"):
        load_run("flux-8gpus")


def test_a_written_run_reads_back_equal(tmp_path: Path) -> None:
    run = load_run(
        None,
        [
            "model_lora=owner/name",
            'output=C:\\runs "new" ü',
            "optimiser.lr=3.3e-7",
            "adapter.alpha=3",
            "data.resolution=96",
            'data.weights={"odd.name" = 0.1}',
            'data.task_folders=["one", "two"]',
        ],
    )
    for written in (run, Run()):
        write_run(written, tmp_path / "settings.toml")
        assert load_run(str(tmp_path / "settings.toml")) == written


def test_all_settings_are_named_once_and_all_names_are_settings() -> None:
    names = setting_names()
    assert len(names) == len(set(names))
    for name in names:
        value: object = Run()
        for part in name.split("."):
            value = getattr(value, part)


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_run({}, where="here").steps = 3  # type: ignore[misc]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    """Of trackers and of DeepSpeed's monitors, however deep; what only sounds alike is."""
    run = parse_run(
        {
            "logging": {
                "tracker_options": {
                    "wandb": {"entity": "us", "api_key": "HIDDEN", "settings": {"token": "HIDDEN"}},
                    "mlflow": {"tracking_uri": "https://me:HIDDEN@host/", "experiment": "a"},
                }
            },
            "deepspeed": {"comet": {"api_key": "HIDDEN", "project": "p"}, "layer_token_lr": 1},
        },
        where="test",
    )
    write_run(run, tmp_path / "settings.toml")
    text = (tmp_path / "settings.toml").read_text()
    assert "HIDDEN" not in text
    again = load_run(str(tmp_path / "settings.toml"))
    assert again.logging.tracker_options == {
        "wandb": {"entity": "us", "settings": {}},
        "mlflow": {"experiment": "a"},
    }
    assert again.deepspeed == {"comet": {"project": "p"}, "layer_token_lr": 1}


def test_options_of_a_tracker_may_be_any_number(tmp_path: Path) -> None:
    options = {"wandb": {"settings": {"longest": float("inf"), "names": ["a"]}}}
    run = parse_run({"logging": {"tracker_options": options}}, where="test")
    write_run(run, tmp_path / "settings.toml")
    assert load_run(str(tmp_path / "settings.toml")).logging.tracker_options == options


@pytest.mark.parametrize(
    "names",
    [
        MAY_DIFFER["train --resume"],
        MAY_DIFFER["compare"],
        resume.DECIDED,
        resume.DIVIDED,
        resume.FIXED,
        MAY_DIFFER["plan --run"],
        RENAMED.values(),
        OWNED.values(),
    ],
    ids=["resume", "compare", "decided", "divided", "fixed", "without time", "renamed", "owned"],
)
def test_lists_of_settings_name_settings(names: Collection[str]) -> None:
    known = set(setting_names())
    sections = {name.rpartition(".")[0] for name in known}
    assert {name.rstrip(".") for name in names} <= known | sections


def test_settings_that_take_no_time_do_not_tell_two_runs_apart() -> None:
    takes = {name for name in setting_names() if not may_differ(name, MAY_DIFFER["plan --run"])}
    assert {"batch", "data.resolution", "adapter.rank", "scheduled_sampling"} <= takes
    free = {"keep_checkpoints", "timestep_sampling", "logging.norms_every", "adapter.init_from"}
    assert not takes & free


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_a_setting_under_an_old_name_is_told_the_new_one(old: str) -> None:
    with pytest.raises(UserError, match=f"{old} is called {RENAMED[old]} now"):
        load_run(None, [f"{old}=1"])


def test_every_method_has_a_row() -> None:
    assert tuple(METHODS) == get_args(Method)
