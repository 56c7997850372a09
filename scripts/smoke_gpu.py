"""Does every command run on a GPU? At most four minutes on one card, four commands at a time:

    python scripts/smoke_gpu.py --output runs/smoke
    python scripts/smoke_gpu.py --small --output /tmp/smoke    # the same commands on a CPU

Each row is one or several commands on the embedded base, with its seconds, the most memory of its
last step and, where it fails, the last line of its error output. Some rows also compare losses:
those of a run that was killed, and of one with dropout, must go on as if nothing had happened. The
rows lie in rows.jsonl as soon as they are known; `--table` prints them again as Markdown.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from gpu_rows import (
    ERRORS,
    LENGTH,
    OK,
    Case,
    Row,
    Sheet,
    Worker,
    chosen,
    environment,
    finished,
    kill,
    last_line,
    options,
    read,
    result,
    tables,
)

METRICS = "metrics.jsonl"  # as in visualcloze_deft.training.run_folder, which would import torch
SCENES = "canny-to-image,image-to-depth"
SAME = 0.02  # relative difference of losses whose sums a GPU may add in another order
GROWTH = 0.5  # of memory over steps whose shapes change, that is no leak: large ones come late
COMPILED = ("--set", "compile=true", "--set", "data.recipe.examples=[1,1,1]")  # several shapes
ON_CPU = ("auto", "native", "math")  # attention that every machine has
EXPORTS = {
    "peft": "folder",
    "diffusers": "file.safetensors",
    "comfyui": "file.safetensors",
    "kohya": "file.safetensors",
    "merged": "folder",
}


class Failed(Exception):
    """A command failed, or a result is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """steps: of a training. early, long: the steps whose memory is compared. together: commands at
    a time. limit: seconds of one."""

    model: str
    steps: int
    early: int
    long: int
    together: int
    processes: int
    batch: int
    limit: float


LARGE = Size(model="tiny", steps=6, early=10, long=60, together=4, processes=1, batch=4, limit=200)
SMALL = Size(model="tiny", steps=2, early=2, long=6, together=1, processes=1, batch=1, limit=500)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where the commands of one row run, and until when."""

    folder: Path
    name: str
    size: Size
    until: float

    def run(self, *words: object) -> Path:
        """Run `vcdeft WORDS`; its error output. Raises `Failed` with the last line of it."""
        return self.python("-m", "visualcloze_deft", *words)

    def python(self, *words: object) -> Path:
        process, errors = self.started(*words)
        limit = min(self.size.limit, self.until - time.monotonic())
        try:
            status = process.wait(timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            kill(process)
            raise Failed(f"not done after {limit:.0f} s: {last_line(errors)}") from None
        if status:
            raise Failed(f"exit {status}: {last_line(errors)}")
        return errors

    def started(self, *words: object) -> tuple[subprocess.Popen[bytes], Path]:
        """A process, and the file that gets its output."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        errors = logs / f"{self.name.replace('/', '-').replace(' ', '_')}-{time.monotonic_ns()}"
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdout=file,
                stderr=file,
                env=environment(),
            )
        return process, errors

    def train(self, name: str, *more: object, steps: int = 0) -> Path:
        """Train on the base; the run folder. Raises `Failed` where a loss is not finite."""
        output = self.folder / name
        self.run(*self.training(output, *more, steps=steps))
        check_losses(losses(output), steps or self.size.steps)
        return output

    def training(self, output: Path, *more: object, steps: int = 0) -> list[object]:
        """The words of a training; of settings that are named twice the last counts."""
        return ["train", *self.of_run(steps=steps), "--output", output, *more]

    def of_run(self, *, steps: int = 0) -> list[object]:
        words: list[object] = ["--model", self.size.model, "--tasks", SCENES, "--rank", 8]
        words += ["--steps", steps or self.size.steps, "--batch", self.size.batch]
        words += ["--processes", self.size.processes]
        told = settings("logging.trackers=[]", "scheduled_sampling=0", "sample_grids=2")
        return [*words, *told]

    @property
    def grids(self) -> Path:
        return self.folder / "grids" / "grid.json"

    @property
    def adapter(self) -> Path:
        """Of the row "zero 2"."""
        return self.folder / "zero-2" / "adapter"

    def infer(self, name: str, *more: object) -> Path:
        output = self.folder / name
        self.run(*self.inference(output), *more)
        if not list(output.glob("*.png")):
            raise Failed(f"no picture in {output}")
        return output

    def inference(self, output: Path) -> list[object]:
        words = [
            "infer",
            "--examples",
            self.grids,
            "--model",
            self.size.model,
            "--inference-steps",
            2,
        ]
        return [*words, "--output", output]


def settings(*given: str) -> list[str]:
    return [word for one in given for word in ("--set", one)]


def metrics(output: Path) -> list[Row]:
    path = output / METRICS
    lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def check_losses(found: Sequence[float], steps: int) -> None:
    if len(found) != steps or not all(map(math.isfinite, found)):
        raise Failed(f"{len(found)} of {steps} losses, the last {found[-1:]}")


def check_same(found: Sequence[float], right: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses; raises `Failed` where it is large."""
    check_losses(found, len(right))
    off = max(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))
    if off > SAME:
        raise Failed(f"losses differ by {off:.1%}")
    return off


# The rows: functions of a stage that return figures


def trained(stage: Stage, *, name: str, more: Sequence[object] = ()) -> Row:
    last = metrics(stage.train(name, *more))[-1]
    return {"loss": last["loss"], "step s": last["seconds"], "GB": last["memory"] / 1e9}


def quantised(stage: Stage, *, kind: str) -> Row:
    if kind != "fp8" and find_spec("bitsandbytes") is None:
        return {"left out": "bitsandbytes is not installed"}
    return trained(stage, name=kind, more=settings(f"quantise={kind}", "precision=bfloat16"))


def killed(stage: Stage, *, name: str, more: Sequence[object] = ()) -> Row:
    """A run that is killed and resumed, against one that is not."""
    steps = 3 * stage.size.steps
    more = [*more, *settings("save_every=2")]
    whole = losses(stage.train(f"{name}-whole", *more, steps=steps))
    output = stage.folder / name
    words = stage.training(output, *more, steps=steps)
    process, errors = stage.started("-m", "visualcloze_deft", *words)
    try:
        while not list((output / "checkpoints").glob("step-*")):
            if process.poll() is not None or time.monotonic() > stage.until:
                raise Failed(f"it made no checkpoint: {last_line(errors)}")
            time.sleep(0.02)
    finally:
        kill(process)
    before = len(losses(output))
    stage.run(*words, "--resume")
    return {"killed at": before, "steps": steps, "off": check_same(losses(output), whole)}


def watched(stage: Stage) -> Row:
    """Memory over many steps whose grids have many shapes."""
    early, long = stage.size.early, stage.size.long
    more = settings("data.recipe.examples=[1,1,1]", "data.cells=own", "data.recipe.run_length=1")
    found = metrics(stage.train("shapes", "--tasks", "all", *more, steps=long))
    first, last = found[early - 1]["memory"], found[long - 1]["memory"]
    growth = last / first - 1
    fault = f"memory grew by {growth:.0%}" if growth > GROWTH else ""
    return {f"GB at step {early}": first / 1e9, f"GB at step {long}": last / 1e9, "fault": fault}


def example(stage: Stage) -> Row:
    stage.run("tasks", "example", SCENES, "--output", stage.grids.parent)
    return {"grids": len(json.loads(stage.grids.read_text("utf-8")))}


def infer(stage: Stage, *, name: str, more: Sequence[object] = ()) -> Row:
    return {"pictures": len(list(stage.infer(name, *more).glob("*.png")))}


def compiled_examples(stage: Stage) -> Row:
    """Examples run once, and a folder of queries answered with them."""
    file, output = stage.folder / "compiled.safetensors", stage.folder / "compiled-images"
    one = json.loads(stage.grids.read_text("utf-8"))[0]
    told = stage.grids.with_name("first.json")
    told.write_text(json.dumps(one), encoding="utf-8")
    queries = stage.folder / "queries"
    queries.mkdir(exist_ok=True)
    shutil.copy(stage.grids.with_name(one["rows"][-1][0]), queries)
    model = ["--model", stage.size.model, "--untrained-context"]
    stage.run("compile", "--examples", told, "--output", file, "--storage", "fp8", *model)
    words = ["infer", "--compiled", file, "--queries", queries, "--context", "causal", *model]
    stage.run(*words, "--inference-steps", 2, "--output", output)
    return {"pictures": len(list(output.glob("*.png")))}


def two_adapters(stage: Stage) -> Row:
    both = ["--adapter", stage.adapter, "--adapter", f"{stage.folder / 'lora' / 'adapter'}=0.5"]
    return infer(stage, name="two", more=both)


def shared(stage: Stage) -> Row:
    """Two calls at once for one output folder."""
    words = stage.inference(stage.folder / "shared")
    other, errors = stage.started("-m", "visualcloze_deft", *words)
    try:
        stage.run(*words)
        status = other.wait(timeout=stage.size.limit)
    except subprocess.TimeoutExpired:
        raise Failed(f"the second call is not done: {last_line(errors)}") from None
    finally:
        kill(other)
    if status:
        raise Failed(f"the second call: exit {status}: {last_line(errors)}")
    return {"pictures": len(list((stage.folder / "shared").glob("*.png")))}


FLOAT16 = """
import sys
import numpy, torch
from visualcloze_deft import InContextPipeline
from visualcloze_deft.data.sources.scenes import Scenes
items = [Scenes(size=64, seed=0).item(k) for k in range(2)]
rows = [[item.image("depth"), item.image("target")] for item in items]
rows[1][1] = None
pipe = InContextPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
[picture] = pipe(rows=rows, task="depth-to-image", num_inference_steps=2)
assert pipe.transformer.dtype == torch.float16
assert numpy.asarray(picture).std() > 1, "the picture has one colour, as NaN decodes to"
"""


def float16(stage: Stage) -> Row:
    """The Python API in float16."""
    stage.python("-c", FLOAT16, stage.size.model)
    return {}


def evaluated(stage: Stage) -> Row:
    output = stage.folder / "evaluation"
    words = ["eval", stage.adapter, "--suite", "scenes", "--tasks", SCENES, "--limit", 1]
    words += ["--inference-steps", 2, "--encoder", "none", "--model", stage.size.model]
    stage.run(*words, "--output", output)
    return {"images": len((output / "results.jsonl").read_text("utf-8").splitlines())}


COMPARISON = """
output = "{output}"
base = "{model}"
methods = ["deft", "lora"]
rank = 4
seeds = [0, 1]
[run]
steps = 2
batch = 1
processes = 1
[run.data]
tasks = "image-to-normals"
[run.logging]
trackers = []
[new]
tasks = "image-to-normals"
[old]
tasks = "depth-to-image"
[evaluate]
grids = 2
steps = 1
"""


def compared(stage: Stage) -> Row:
    """The smallest comparison."""
    path, output = stage.folder / "comparison.toml", stage.folder / "comparison"
    path.write_text(COMPARISON.format(output=output, model=stage.size.model), encoding="utf-8")
    stage.run("compare", path)
    return {}


def exported(stage: Stage, *, kind: str) -> Row:
    place = stage.folder / "exported" / kind / EXPORTS[kind]
    place.parent.mkdir(parents=True, exist_ok=True)
    stage.run("export", stage.folder / "zero-2", "--format", kind, "--output", place)
    return {}


def imported(stage: Stage) -> Row:
    file = stage.folder / "exported" / "diffusers" / EXPORTS["diffusers"]
    stage.run("import", file, "--output", stage.folder / "imported", "--model", stage.size.model)
    return {}


def encoded(stage: Stage) -> Row:
    """Encodings made before a run, and the run that reads them while its encoders rest."""
    kept = stage.folder / "encodings"
    stage.run("data", "cache", *stage.of_run(), "--output", kept)
    more = settings(f'data.embedding_cache="{kept}"', "offload_encoders=true")
    return trained(stage, name="encoded", more=more)


def planned(stage: Stage) -> Row:
    stage.run("plan", "--model", stage.size.model, "--grid", "3x3", "--memory", "80GB")
    return {}


def reported(stage: Stage) -> Row:
    stage.run("report", stage.folder / "zero-2")
    return {}


def machine(stage: Stage) -> Row:
    worker = Worker("gpu_model", stage.folder / ERRORS)
    try:
        return worker.call(Case(section="machine", name="", work="machine"), stage.size.limit)
    finally:
        worker.end()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row. after: the names of the rows that must have succeeded before."""

    case: Case
    work: Callable[[Stage], Row]
    after: tuple[str, ...] = ()


def job(
    section: str, name: str, work: Callable[[Stage], Row], *after: str, required: bool = True
) -> Job:
    case = Case(section=section, name=name, work="", required=required)
    return Job(case=case, work=work, after=after)


def train(name: str, *more: object) -> Job:
    return job("train", name, partial(trained, name=name.replace(" ", "-"), more=more))


def complete(name: str, *more: object, required: bool = True) -> Job:
    """Completed grids, without an adapter."""
    folder = "infer-" + "".join(c if c.isalnum() else "-" for c in name)
    work = partial(infer, name=folder, more=more)
    return job("infer", name, work, "tasks example", required=required)


def trainings() -> list[Job]:
    half = settings("precision=bfloat16")
    dropout = settings("adapter.dropout=0.3")
    return [
        train("zero 2", "--zero", 2),
        train("zero 3, bfloat16 base", "--zero", 3, *half),
        train("lora", "--method", "lora"),
        job("train", "killed and resumed", partial(killed, name="killed")),
        job("train", "compiled", partial(trained, name="compiled", more=COMPILED)),
        job("train", "many shapes", watched),
        train("zero 0", "--zero", 0),
        train("zero 1", "--zero", 1),
        train("bfloat16", *half),
        *(job("train", kind, partial(quantised, kind=kind)) for kind in ("fp8", "int8", "nf4")),
        train("encoders offloaded", *settings("offload_encoders=true")),
        train("optimiser offloaded", "--zero", 2, *settings("offload=optimiser")),
        train("parameters offloaded", "--zero", 3, *settings("offload=parameters")),
        job("train", "dropout, killed and resumed", partial(killed, name="drop", more=dropout)),
        train(
            "sheets and held-out losses", *settings("sample_every=2", "logging.validate_every=2")
        ),
        train("para", "--method", "para"),
        train("isolated context", *settings("context=isolated")),
        train("causal context, zero 3", "--zero", 3, *settings("context=causal")),
        train("deft-relaxed", "--method", "deft-relaxed"),
    ]


def others(*, gpu: bool) -> list[Job]:
    adapted = job("infer", "two adapters", two_adapters, "tasks example", "zero 2", "lora")
    return [
        job("tasks", "tasks example", example),
        adapted,
        job("infer", "float16 through Python", float16),
        complete("processes", "--processes", 1 if gpu else 2),  # at most one for each GPU
        job("infer", "two calls share a list", shared, "tasks example"),
        complete("compiled blocks", "--compile"),
        complete("upsampled", "--upsample", 2),
        complete("first-block cache", "--cache", "first-block"),
        complete("taylorseer cache", "--cache", "taylorseer"),
        complete("context cache", "--context-cache", 1),
        complete("isolated context, not trained", "--context", "isolated", "--untrained-context"),
        job("infer", "compiled examples", compiled_examples, "tasks example"),
        complete("model offloaded", "--offload", "model", required=gpu),
        complete("fp8 weights", "--quantise", "fp8"),
        *(
            complete(f"attention {name}", "--attention", name, required=gpu or name in ON_CPU)
            for name in ("auto", "native", "cudnn", "flash", "efficient", "math")
        ),
        job("eval", "suite scenes", evaluated, "zero 2"),
        job("compare", "two methods", compared),
        *(
            job("export", kind, partial(exported, kind=kind), "zero 2")
            for kind in ("diffusers", "merged", "peft", "comfyui", "kohya")
        ),
        job("import", "a diffusers LoRA", imported, "diffusers"),
        job("data", "encode, then train", encoded),
        job("plan", "80 GB, 3x3", planned),
        job("report", "of a run", reported, "zero 2"),
    ]


def jobs(*, small: bool) -> list[Job]:
    """All rows, the most telling first."""
    first = job("machine", "card and versions", machine)
    return [first, *trainings(), *others(gpu=not small)]


# Running them


def with_needed(every: Sequence[Job], cases: Sequence[Case]) -> list[Job]:
    """The jobs of `cases`, and those that they come after."""
    by_name = {one.case.name: one for one in every}
    wanted = [case.name for case in cases]
    for name in wanted:  # grows
        wanted += [other for other in by_name[name].after if other not in wanted]
    return [one for one in every if one.case.name in wanted]


def done(one: Job, sheet: Sheet, size: Size) -> Row:
    """The row of a job."""
    began = time.monotonic()
    stage = Stage(folder=sheet.folder, name=one.case.name, size=size, until=sheet.until)
    try:
        figures = one.work(stage)
    except Failed as failure:
        late = sheet.left <= 0
        figures = {"left out": "no time left"} if late else {"fault": str(failure)[:LENGTH]}
    return result(one.case, figures, time.monotonic() - began)


def run_all(every: Sequence[Job], sheet: Sheet, size: Size) -> int:
    """Run jobs side by side, each when those before it succeeded; how many were not reached."""
    left, good, bad = list(every), set[str](), set[str]()
    running: set[Future[Row]] = set()
    with ThreadPoolExecutor(size.together) as pool:
        while running or left:
            for one in [one for one in left if bad & set(one.after)]:
                left.remove(one)
                bad.add(one.case.name)
                sheet.add(result(one.case, {"left out": "a row before it failed"}, 0))
            ready = [one for one in left if good >= set(one.after)] if sheet.left > 0 else []
            for one in ready[: size.together - len(running)]:
                left.remove(one)
                running.add(pool.submit(done, one, sheet, size))
            if not running:
                break
            finished_now, running = wait(running, return_when=FIRST_COMPLETED)
            for row in [future.result() for future in finished_now]:
                sheet.add(row)
                (good if row["verdict"] == OK else bad).add(row["name"])
    return len(left)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = options(__doc__, minutes=4, output="runs/smoke")
    asked = parser.parse_args(arguments)
    if asked.table:
        print(tables(read(asked.output)))
        return 0
    size = SMALL if asked.small else LARGE
    if asked.output.exists():  # commands would go on with what an earlier run left
        shutil.rmtree(asked.output)
    sheet = Sheet(asked.output.absolute(), asked.minutes)
    every = jobs(small=asked.small)
    wanted = with_needed(every, chosen([one.case for one in every], asked.only))
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // size.together, 1)))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return finished(sheet, run_all(wanted, sheet, size))


if __name__ == "__main__":
    sys.exit(main())
