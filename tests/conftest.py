"""What several test files share: pictures on disk, grid files and a refused command line."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when the library is imported
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is compared to the bit is computed on CPUs

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from visualcloze_deft.backbones.flux_fill.files import CHANNELS, NETWORKS, PARTS, TOKENIZERS

collect_ignore = ["comfyui_client.py", "comfyui_server.py"]  # run by ComfyUI's own Python

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand parameters only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def grid_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a grid file of two good rows beside the pictures a.png and b.png.

    Keywords replace or add keys; one positional argument replaces the whole content.
    """
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)

    def write(*content: object, **keys: object) -> Path:
        good = {"task": "depth-to-image", "rows": [["a.png", "b.png"], ["a.png", None]]}
        path = tmp_path / "grid.json"
        path.write_text(json.dumps(content[0] if content else good | keys), encoding="utf-8")
        return path

    return write


@pytest.fixture
def hollow_model(tmp_path: Path) -> Path:
    """A model folder without any weight: whatever fails with another message failed before it."""
    folder = tmp_path / "hollow"
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    for part in NETWORKS:
        (folder / part / "config.json").write_text("{}")
        save_file({}, folder / part / "model.safetensors")
    for part in TOKENIZERS:
        (folder / part / "tokenizer.json").write_text("{}")
        (folder / part / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    channels = dict(zip(("in_channels", "out_channels"), CHANNELS, strict=True))
    (folder / "transformer" / "config.json").write_text(json.dumps(channels))
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `vcdeft ARGUMENTS`, which must end in exit code 2 and one line on stderr: that line."""
    from visualcloze_deft.cli import main

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        line = capsys.readouterr().err.rstrip("\n")
        assert ended.value.code == 2
        assert line.startswith("vcdeft: ")
        assert "\n" not in line
        return line

    return run


@pytest.fixture
def no_room() -> Callable[[], AbstractContextManager[None]]:
    """A context in which files cannot grow beyond 100 bytes, as on a disk that is nearly full."""

    @contextmanager
    def within() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return within


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1-Fill of a few thousand parameters in the real folder format."""
    from micro_model import write_micro_model

    return write_micro_model(tmp_path_factory.mktemp("models") / "micro")
