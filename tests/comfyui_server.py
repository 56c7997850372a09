"""ComfyUI's own server, for tests where it is installed, with the answers of `comfyui_host`."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfyui_host import PACK, Graph, Run
from PIL import Image

import visualcloze_deft

PLACE = os.environ.get("VCDEFT_COMFYUI", "")  # a checkout of ComfyUI
PYTHON = os.environ.get("VCDEFT_COMFYUI_PYTHON", sys.executable)  # that has what ComfyUI needs
ROOT = Path(visualcloze_deft.__file__).parents[1]
NAME = "visualcloze_deft"  # of the pack's folder


class Server:
    """ComfyUI at an address, with its base directory."""

    def __init__(self, address: str, base: Path) -> None:
        self.address, self.base = address, base

    def run(self, graph: Graph, *, stop_at: int | None = None) -> Run:
        """Execute a workflow. stop_at: the number of updates of the bar before an interrupt."""
        command = [PYTHON, str(Path(__file__).with_name("comfyui_client.py")), self.address]
        done = subprocess.run(
            [*command, str(stop_at or 0)],
            input=json.dumps(graph),
            capture_output=True,
            text=True,
            check=True,
        )
        told = json.loads(done.stdout)
        if "refused" in told:
            return Run(shown={}, progress=[], previews=[], error=told["refused"])
        history = self.asked(f"history/{told['prompt_id']}")[told["prompt_id"]]
        return Run(
            shown={number: self.shown(told) for number, told in history["outputs"].items()},
            progress=[(value, total) for value, total in told["progress"]],
            previews=[Image.open(io.BytesIO(base64.b64decode(one))) for one in told["previews"]],
            error=error_of(history["status"]["messages"]),
        )

    def asked(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/{path}") as answer:
            return json.load(answer)

    def shown(self, told: dict[str, Any]) -> list[Any]:
        """The pictures or texts of an output node."""
        if "images" not in told:
            return told["text"]
        return [
            Image.open(self.base / one["type"] / one["subfolder"] / one["filename"])
            for one in told["images"]
        ]


def error_of(messages: list[tuple[str, dict[str, Any]]]) -> str:
    """The line of the node that failed, "interrupted", or ""."""
    for kind, told in messages:
        if kind == "execution_error":
            return str(told["exception_message"]).strip()
        if kind == "execution_interrupted":
            return "interrupted"
    return ""


@contextmanager
def serving(base: Path) -> Iterator[Server]:
    """ComfyUI's server on a free port, on the CPU, with the pack in its base directory."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / NAME).symlink_to(PACK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = "--cpu --disable-auto-launch --disable-api-nodes --preview-method auto"
    program = str(Path(PLACE, "main.py").absolute())
    command = [program, *f"{words} --listen 127.0.0.1 --port {port}".split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (base / "log.txt").open("w") as log:
        running = subprocess.Popen(
            [PYTHON, *command, "--base-directory", str(base)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, running, base / "log.txt")
        yield Server(address, base)
    finally:
        running.terminate()
        running.wait()


def wait_for(address: str, running: subprocess.Popen[Any], log: Path) -> None:
    for _ in range(240):
        assert running.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/queue").close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text())
