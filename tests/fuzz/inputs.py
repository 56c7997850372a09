"""The inputs of the fuzz: number k of a seed is a command line, and a file or an option of it
that was spoiled. The same seed and number give the same input."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from harness import ROOM
from mutations import PLACES, Expected, Kind, Typed, copied, spoil
from parts import in_copy, parts_in

from visualcloze_deft.cli.app import cli
from visualcloze_deft.config.run_settings import Run, setting_names

WHOLE = ("*",)
DEPTH_KEYS = ("meaning", "near", "far")  # unit may be a number, too
GRID_KEYS = ("[0-9]*.task", "[0-9]*.rows", "[0-9]*.rows.*", "[0-9]*.seed", "[0-9]*.content_prompt")
ADAPTER_KEYS = ("r", "peft_type", "target_modules", "decomposition_method", "para", "init_scale")
MODEL_KEYS = tuple(
    "in_channels num_layers num_single_layers attention_head_dim num_attention_heads "
    "joint_attention_dim pooled_projection_dim axes_dims_rope".split()
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A command and the files of it that are spoiled, one at a time.

    files: a pattern of names in the material. whole: the command reads each of them to its end, so
    that damage must be seen. typed: see `mutations.spoil`. weight: how often it is drawn.
    """

    words: str
    files: str
    kind: Kind
    whole: bool = True
    typed: Typed = ()
    weight: float = 1.0


CHECK = "data check {} --workers 0"
PREVIEW = "data preview {} --count 2 --output new.png"
INFER = "infer --examples grids/grid.json --model micro --inference-steps 1 --output new"
COMPILE = (
    "compile --examples grids/grid.json --model micro --untrained-context --output new.safetensors"
)
TRAIN = "train --config run.toml --dry-run"
RESUME = "train --resume --output run --steps 3 --allow-change steps"
SCENES = (
    "eval run/adapter --model micro --suite scenes --tasks depth-to-image --limit 2 "
    "--inference-steps 1 "
    "--encoder none --output evaluated"
)
SIDES = "eval --images left --against right --prompts prompts.json --encoder none --output new"
OWN = "tasks example own-task --task-folder own --data folder=photos --resolution 32 --output new"
CAPTION = "data caption folder=named --model captioner --overwrite"
PUBLISH = "publish run --repo me/new --format kohya --evaluation evaluated --dry-run new"
OF_LIBRARIES = (
    "micro",
    "depth-model",
    "captioner",
)  # whose files they read, without a byte order mark
OF_RUN: dict[str, Kind] = {
    "run/settings.toml": "toml",
    "run/metrics.jsonl": "lines",
    "run/versions.json": "json",
    "run/index/*": "bytes",
    "run/checkpoints/*2/*.safetensors": "weights",
}
OF_EVALUATION: dict[str, Kind] = {
    "evaluated/results.jsonl": "lines",
    "evaluated/settings.json": "json",
    "evaluated/grids/*.json": "json",
    "evaluated/images/*.json": "json",
    "evaluated/**/*.png": "picture",
}
FORMATS = ("peft", "diffusers", "comfyui", "kohya", "merged")


def subjects() -> Iterator[Subject]:
    photos, listed = CHECK.format("folder=photos"), CHECK.format("folder=listed")
    yield Subject(words=photos, files="photos/target/*", kind="picture", weight=4)
    yield Subject(words=photos, files="photos/depth/*", kind="picture", weight=3)
    yield Subject(words=photos, files="photos/mask/*", kind="picture", weight=2)
    yield Subject(words=photos, files="photos/caption/*", kind="text", whole=False)
    yield Subject(words=photos, files="photos/depth.toml", kind="toml", typed=DEPTH_KEYS, weight=2)
    yield Subject(words=listed, files="listed/rows.jsonl", kind="lines", weight=3)
    yield Subject(words=listed, files="listed/*.png", kind="picture", weight=2)
    rows, sheet = CHECK.format("folder=imagefolder"), CHECK.format("folder=sheet")
    yield Subject(words=rows, files="imagefolder/metadata.jsonl", kind="lines", whole=False)
    yield Subject(words=sheet, files="sheet/metadata.csv", kind="text", whole=False, weight=2)
    shards, named = CHECK.format("folder=shards"), CHECK.format("folder=named")
    yield Subject(words=shards, files="shards/*.tar", kind="bytes", whole=False, weight=3)
    yield Subject(words=named, files="named/*", kind="bytes", whole=False, weight=2)
    graph = CHECK.format("graph200k=graph")
    yield Subject(words=graph, files="graph/data.json", kind="json", whole=False, weight=3)
    yield Subject(words=graph, files="graph/*.png", kind="picture", whole=False)
    table = CHECK.format("graph200k=table@test")
    yield Subject(words=table, files="table/data/*", kind="bytes", weight=2)
    insdet = CHECK.format("insdet=insdet")
    yield Subject(words=insdet, files="insdet/Scenes/*/*/*.xml", kind="bytes", weight=2)
    yield Subject(words=insdet, files="insdet/Objects/*/masks/*", kind="picture")
    cats, bench = "dreambooth=dreambooth", "dreambench-plus=dreambench"
    yield Subject(words=CHECK.format(cats), files="dreambooth/*/*.txt", kind="text", weight=2)
    yield Subject(words=CHECK.format(cats), files="dreambooth/*/*/*.jpg", kind="picture")
    yield Subject(words=CHECK.format(bench), files="dreambench/*/*/*/*.txt", kind="text", weight=2)
    thing = CHECK.format("photos=thing")
    yield Subject(words=thing, files="thing/*.jpg", kind="picture", weight=2)
    yield Subject(words=thing, files="thing/*.txt", kind="text", whole=False)
    learn = "train --config thing.toml --dry-run"
    yield Subject(words=learn, files="thing.toml", kind="toml", weight=2)
    yield Subject(words=learn, files="thing/*", kind="bytes", whole=False)
    for source in ("folder=photos", "folder=listed", "graph200k=graph", "insdet=insdet"):
        place = source.partition("=")[2]
        files = f"{place}/**/*.png"
        yield Subject(words=PREVIEW.format(source), files=files, kind="picture", whole=False)
    preview = (
        "tasks preview own-task --task-folder own --data folder=photos --resolution 32 --count 2"
    )
    yield Subject(
        words=f"{preview} --output new.png", files="photos/*/*", kind="bytes", whole=False
    )

    check = "tasks check own/own-task.toml"
    yield Subject(words=check, files="own/*.toml", kind="toml", typed=WHOLE, weight=4)
    yield Subject(words="tasks list --task-folder own", files="own/*.toml", kind="toml", weight=2)
    yield Subject(words="tasks list --json --task-folder own", files="own/*.toml", kind="toml")
    yield Subject(
        words="tasks show own-task --task-folder own", files="own/*.toml", kind="toml", weight=2
    )
    shown = "tasks show depth-to-image --model micro --content café"
    yield Subject(words=shown, files="micro/tokenizer*/*.json", kind="json", whole=False, weight=2)
    yield Subject(words=OWN, files="own/*.toml", kind="toml", typed=WHOLE, weight=2)
    yield Subject(words=OWN, files="photos/*/*", kind="bytes", whole=False, weight=2)

    yield Subject(words=INFER, files="grids/grid.json", kind="json", typed=GRID_KEYS, weight=5)
    yield Subject(words=INFER, files="grids/00?-??.png", kind="picture", weight=2)
    configs = "micro/transformer/config.json"
    yield Subject(words=INFER, files=configs, kind="json", typed=MODEL_KEYS, weight=3)
    yield Subject(words=INFER, files="micro/**/*.json", kind="json", whole=False, weight=5)
    yield Subject(words=INFER, files="micro/*/*.safetensors", kind="weights", weight=2)
    again = INFER.replace("new", "made")
    yield Subject(words=again, files="made/*", kind="bytes", whole=False)
    yield Subject(words=again, files="made/*.json", kind="json", whole=False, weight=2)
    record = INFER.replace("grids/grid.json", "made/grid-001.json")
    yield Subject(words=record, files="made/*.json", kind="json", whole=False, weight=2)
    adapted = f"{INFER} --adapter run/adapter=0.5"
    config, tensors = "run/adapter/*.json", "run/adapter/*.safetensors"
    yield Subject(words=adapted, files=config, kind="json", typed=ADAPTER_KEYS, weight=3)
    yield Subject(words=adapted, files=tensors, kind="weights", weight=2)
    carried = f"{INFER} --adapter run"
    yield Subject(words=carried, files="run/adapter/tasks/*.toml", kind="toml", weight=2)
    own = "eval run --suite folder=photos --model micro --inference-steps 1 --limit 1 --output new"
    yield Subject(words=own, files="run/adapter/tasks/*.toml", kind="toml")
    yield Subject(words=f"{own} --encoder none", files="photos/*/*", kind="bytes", whole=False)
    yield Subject(words=own, files="run/settings.toml", kind="toml", whole=False)
    answered = (
        "infer --compiled compiled.safetensors --queries left --context causal --untrained-context "
        "--model micro --inference-steps 1 --output new"
    )
    yield Subject(words=answered, files="compiled.safetensors", kind="weights", weight=3)
    yield Subject(words=answered, files="left/*", kind="picture")
    read = GRID_KEYS[:3]  # seeds and contents are a query's
    yield Subject(words=COMPILE, files="grids/grid.json", kind="json", typed=read, weight=2)
    for name in ("lora", "kohya"):
        file = f"{name}.safetensors"
        yield Subject(words=f"{INFER} --model-lora {file}", files=file, kind="weights", weight=2)
        back = f"import {file} --model micro --output new"
        yield Subject(words=back, files=file, kind="weights", weight=2)
    kept = f"{INFER} --embedding-cache encodings"
    yield Subject(words=kept, files="encodings/**/*", kind="bytes", whole=False)

    for kind in FORMATS:
        words = f"export run --format {kind} --model micro --output new.safetensors"
        words = words.replace(".safetensors", "") if kind in ("merged", "peft") else words
        yield Subject(words=words, files=config, kind="json", typed=ADAPTER_KEYS)
        yield Subject(words=words, files=tensors, kind="weights")
    yield Subject(
        words="export run --format diffusers --output new.safetensors",
        files="run/*.toml", kind="toml", whole=False,
    )  # fmt: skip

    yield Subject(words=PUBLISH, files=config, kind="json", typed=ADAPTER_KEYS)
    yield Subject(words=PUBLISH, files=tensors, kind="weights")
    yield Subject(words=PUBLISH, files="run/adapter/tasks/*.toml", kind="toml")
    yield Subject(words=PUBLISH, files="run/*.toml", kind="toml", whole=False)
    yield Subject(words=PUBLISH, files="run/*.json*", kind="bytes", whole=False, weight=2)
    yield Subject(words=PUBLISH, files="run/sheets/*.png", kind="picture")
    yield Subject(words=PUBLISH, files="evaluated/*.json*", kind="bytes", whole=False, weight=2)

    yield Subject(words="plan --config run.toml", files="run.toml", kind="toml", typed=WHOLE)
    planned = "plan --config run.toml --run run"
    yield Subject(words=planned, files="run/*.jsonl", kind="lines", whole=False, weight=2)
    yield Subject(words=planned, files="run/*.toml", kind="toml", whole=False)
    yield Subject(words=planned, files=configs, kind="json", typed=MODEL_KEYS, weight=2)
    yield Subject(words=planned, files="micro/*/config.json", kind="json", whole=False, weight=3)
    yield Subject(words=TRAIN, files="run.toml", kind="toml", typed=WHOLE, weight=5)
    yield Subject(words=TRAIN, files="own/*.toml", kind="toml", weight=2)
    yield Subject(words=TRAIN, files="photos/*/*", kind="bytes", whole=False, weight=2)
    yield Subject(words=TRAIN, files="micro/**/*.json", kind="json", whole=False, weight=2)
    started = f"{TRAIN} --set adapter.init_from=run/adapter"
    yield Subject(words=started, files=config, kind="json", typed=ADAPTER_KEYS)
    yield Subject(words=started, files=tensors, kind="weights")
    yield Subject(words=RESUME, files="run/checkpoints/*2/*.json", kind="json", whole=False)
    for files, kind in OF_RUN.items():
        yield Subject(words=RESUME, files=files, kind=kind, whole=False)
    encode = "data cache --config run.toml --examples 1 --output encodings"
    yield Subject(words=encode, files="encodings/**/*", kind="bytes", whole=False)

    report = "report run"
    yield Subject(words=report, files="run/metrics.jsonl", kind="lines", whole=False, weight=3)
    yield Subject(words=report, files="run/settings.toml", kind="toml", whole=False, weight=2)
    yield Subject(words=report, files="run/versions.json", kind="json", whole=False)
    yield Subject(words=report, files="run/sheets/*", kind="picture", whole=False)
    compare = "compare compare.toml --dry-run"
    yield Subject(words=compare, files="compare.toml", kind="toml", typed=WHOLE, weight=5)

    yield Subject(words=SIDES, files="left/*", kind="picture", weight=2)
    yield Subject(words=SIDES, files="prompts.json", kind="json", typed=WHOLE, weight=3)
    for files, kind in OF_EVALUATION.items():
        yield Subject(words=SCENES, files=files, kind=kind, whole=False, weight=1.5)
    annotate = "data annotate folder=listed --annotate depth=depth-model --output annotated"
    yield Subject(words=annotate, files="annotated/*.json", kind="json", whole=False, weight=2)
    fresh = annotate.replace("annotated", "new")
    yield Subject(words=fresh, files="depth-model/*.json", kind="json", whole=False, weight=2)
    yield Subject(words=fresh, files="depth-model/*.safetensors", kind="weights", whole=False)
    yield Subject(words=fresh, files="listed/*.png", kind="picture")
    yield Subject(words=CAPTION, files="captioner/*.json", kind="json", whole=False, weight=2)
    yield Subject(words=CAPTION, files="captioner/*.jinja", kind="text", whole=False)
    yield Subject(words=CAPTION, files="captioner/*.safetensors", kind="weights", whole=False)
    yield Subject(words=CAPTION, files="named/*", kind="bytes", whole=False)
    shown = (
        "tasks preview depth-to-image --data folder=listed --annotate depth=annotated "
        "--resolution 32 --count 2 --output new.png"
    )
    yield Subject(words=shown, files="annotated/*.json", kind="json", whole=False)
    yield Subject(words=shown, files="annotated/depth/*", kind="picture", whole=False)


SUBJECTS = tuple(subjects())


@dataclass(frozen=True, kw_only=True)
class Input:
    """words: the command line; how: what was spoiled; expected: what must follow; room: for files
    that are written, in bytes."""

    words: tuple[str, ...]
    how: str
    expected: Expected
    room: int = ROOM


def spoiled_input(material: Path, folder: Path, seed: int, number: int) -> Input:
    """Input `number` of `seed`, its files in the new folder `folder`."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.random()
    if kind < 0.72:
        (subject,) = rng.choices(SUBJECTS, [subject.weight for subject in SUBJECTS])
        in_copy(material, folder, parts_in([*subject.words.split(), subject.files]))
        files = [path for path in sorted(folder.glob(subject.files)) if path.is_file()]
        change = spoiled_file if kind < 0.62 else renamed_file if kind < 0.67 else crowded
        return change(folder, subject, files, rng)
    if kind < 0.77:
        in_copy(material, folder)
        return renamed_folder(folder, rng)
    given = without_room if kind < 0.8 else spoiled_setting if kind < 0.87 else spoiled_option
    found = given(rng)
    in_copy(material, folder, parts_in(found.words))
    return found


def spoiled_file(folder: Path, subject: Subject, files: list[Path], rng: random.Random) -> Input:
    path = rng.choice(files)
    done = spoil(path, subject.kind, rng, subject.typed)
    how = f"{path.relative_to(folder)}: {done.how}"
    expected = done.expected if subject.whole else "any"
    if expected == "accepted" and path.relative_to(folder).parts[0] in OF_LIBRARIES:
        expected = "any"
    if rng.random() < 0.15 and len(files) > 1:  # another file, too
        path = rng.choice([other for other in files if other != path])
        how += f"; {path.relative_to(folder)}: {spoil(path, subject.kind, rng, subject.typed).how}"
        expected = "any"
    return Input(words=tuple(subject.words.split()), how=how, expected=expected)


def crowded(folder: Path, subject: Subject, files: list[Path], rng: random.Random) -> Input:
    """A file more in one of the folders that a command reads."""
    beside = rng.choice(files)
    name = rng.choice((*PLAIN_NAMES, *ODD_NAMES, "0", "9")) + rng.choice((beside.suffix, ".png"))
    path = beside.with_name(name)
    how = "is there already"
    if not os.path.lexists(path):
        path.write_bytes(beside.read_bytes())
        how = rng.choice((*PLACES, copied))(path).how
    told = f"{path.relative_to(folder)!r} more: {how}"
    return Input(words=tuple(subject.words.split()), how=told, expected="any")


def without_room(rng: random.Random) -> Input:
    """A good command on a disk that is full soon."""
    words = rng.choice((*SHORT, *LONG, "tasks list --json", *ENDS))
    room = rng.choice((0, 0, 1, 100, 3000, 20_000))
    return Input(words=tuple(words.split()), how=f"{room} bytes free", expected="any", room=room)


# ---- names


PLAIN_NAMES = ("a b", "$x_1$ $", "[ab]", "a*b", "café 😀", "per%cent", "{brace}", "-dash", "#1")
ODD_NAMES = ("two\nlines", "\x1b[31mred", "caf\udce9", "at@home", "a=b", "x" * 200, "a,b", "'\"")


def renamed_file(folder: Path, subject: Subject, files: list[Path], rng: random.Random) -> Input:
    path, name = rng.choice(files), rng.choice((*PLAIN_NAMES, *ODD_NAMES))
    os.rename(path, path.with_name(f"{name}{path.suffix}"))
    how = f"{path.relative_to(folder)} is called {name!r}"
    return Input(words=tuple(subject.words.split()), how=how, expected="any")


def renamed_folder(folder: Path, rng: random.Random) -> Input:
    """A folder under another name, also one that is made."""
    plain = rng.random() < 0.4
    name = rng.choice(PLAIN_NAMES if plain else ODD_NAMES)
    of_folder = [
        ("photos", CHECK.format("folder={}")),
        ("photos", "data preview folder={} --count 2 --output new.png"),
        ("dreambooth", CHECK.format("dreambooth={}")),
        ("insdet", CHECK.format("insdet={}")),
        ("graph", CHECK.format("graph200k={}")),
        ("micro", "infer --examples grids/grid.json --model={} --inference-steps 1 --output new"),
        ("micro", "plan --model={} --processes 1"),
        ("run", "report {}"),
        ("run", "export {} --format diffusers --output new.safetensors"),
        ("new", PUBLISH.replace("--dry-run new", "--dry-run={}")),
        ("grids", "infer --examples={} --model micro --inference-steps 1 --output new"),
        ("left", "eval --images={} --against right --encoder none --output new"),
        ("own", "tasks list --task-folder={}"),
        ("new", "train --config run.toml --dry-run --output={}"),
        ("new", INFER.replace("--output new", "--output={}")),
        ("new", SIDES.replace("--output new", "--output={}")),
        ("new", "tasks example depth-to-image --resolution 32 --output={}"),
    ]
    place, words = rng.choice(of_folder)
    if (folder / place).exists():
        os.rename(folder / place, folder / name)
    if name.startswith("-") and words.split()[0] in ("report", "export"):
        name = f"./{name}"
    told = tuple(word.replace("{}", name) for word in words.split())
    how = f"{place} is called {name!r}"
    return Input(words=told, how=how, expected="accepted" if plain else "any")


# ---- options


NO_NUMBERS = ("", "x", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "²", "[1]", "true")
ODD_WORDS = (
    "", " ", "=", "a=", "=b", "a=b=c", "\x1b[31mred", "two\nlines", "$x$", "{0}", "%s", "[a]",
    "caf\udce9", "x" * 5000, "*", "(" * 200, "nowhere", "./nowhere", "run.toml", "photos",
    "/dev/zero", "/dev/null", "tiny", "org/model", "a@b", ",", "-", "--", "all,-all",
    "depth-to-image=nan", "folder=photos", "folder=", "folder=run.toml",
    "scenes=99999999999999999999", "scenes=-1",
    "scenes=x", "graph200k=/dev/zero", "depth=nowhere", "depth=photos", "micro=0.5", "none",
    "run/adapter=nan", "run/adapter=x", "run/adapter=1e400", "photos/caption/0.txt",
)  # fmt: skip
NUMBERS = ("-1", "0", "1", "2", "16", "1.5", "-0.5")
HUGE = ("9223372036854775807", "9223372036854775808", "1" + "0" * 30, "1e300", "-1e300", "1e-320")
SIZES = ("0GB", "-1GB", "nanGB", "infGB", "1e999GB", "GB", "9" * 400 + "GB", "1 parsec")
GRIDS = ("0x0", "-1x3", "3x", "x", "9" * 30 + "x2", "2x2x2", "1e3x2")
SHORT = (  # commands that end soon whatever their numbers are
    "plan --config run.toml",
    f"{INFER} --dry-run",
    "compare compare.toml --dry-run",
    f"{COMPILE} --dry-run",
    f"{SIDES} --dry-run",
    f"{SCENES.replace('evaluated', 'new')} --dry-run",
    "export run --format diffusers --output new.safetensors",
    "import lora.safetensors --model micro --output new",
    PUBLISH,
    "tasks list",
    "tasks check own/own-task.toml",
    "tasks show depth-to-image",
    "data check folder=photos --workers 0",
    "data preview folder=photos --output new.png",
)
LONG = (
    INFER,
    f"{INFER} --adapter run/adapter",
    TRAIN,
    RESUME,
    SCENES.replace("evaluated", "new"),
    "tasks preview depth-to-image --resolution 32 --count 2 --output new.png",
    "tasks example depth-to-image --resolution 32 --output new",
    "data cache --config run.toml --examples 1 --output new",
    "data annotate folder=listed --annotate depth=depth-model --output new",
    CAPTION,
)
ENDS = (  # commands that write a file in the end
    "report run",
    CHECK.format("folder=photos"),
    "export run --format peft --output new",
    "export run --format merged --model micro --output new",
    PUBLISH,
    SIDES,
    SCENES,
    "tasks example depth-to-image --resolution 32 --count 3 --output new",
)
TAKES_LONG = ("--compile", "--processes", "--examples", "--count")  # whatever is right of them
ABROAD = ("--output",)  # must not lead out of the folder


def command_of(words: Sequence[str]) -> click.Command:
    found: click.Command = cli
    for word in words:
        if not isinstance(found, click.Group):
            break
        found = found.commands[word]
    return found


def spoiled_option(rng: random.Random) -> Input:
    """A good command with one more option, or another argument, whose value is odd."""
    short = rng.random() < 0.6
    words = tuple(rng.choice(SHORT if short else LONG).split())
    parameters = [
        one
        for one in command_of(words).params
        if isinstance(one, click.Option) and one.opts[0] not in (*TAKES_LONG, *ABROAD)
    ]
    option = rng.choice(parameters)
    assert isinstance(option, click.Option)
    name = option.opts[0]
    if option.is_flag:
        return Input(words=(*words, name), how=f"{name} is given", expected="any")
    number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
    never = {"--memory": SIZES, "--grid": GRIDS}.get(name, NO_NUMBERS if number else ())
    odd = (*NUMBERS, *(HUGE if short else ())) if number else ODD_WORDS
    nonsense = bool(never) and rng.random() < 0.5
    value = rng.choice(never if nonsense else odd)
    return Input(
        words=(*words, f"{name}={value}"),
        how=f"{name} {value[:30]!r}",
        expected="refused" if nonsense else "any",
    )


def numeric_settings() -> list[str]:
    """Dotted names of the settings whose default is a number."""
    found = []
    for name in setting_names():
        value: object = Run()
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(name)
    return found


ODD_SETTINGS = (
    "-1", "0", "1.5", "1e400", "nan", "true", "[]", "{}", '""', "[1, 2]", "1979-05-27", "'x'",
    "9" * 5000, "9223372036854775808", "[" * 100_000, "{a = " * 500, '"\\u001b[31m"', "'''\n'''",
    '"\\ud83c"', "x\ny", "9 # c", "", " ", "/dev/zero", "photos", "x" * 5000, "(" * 300,
    "[\"folder=photos\"]", "{a.b.c = 1}", "inf", "1_000", "0x7fffffffffffffff", "caf\udce9",
    "(a+)+$", "'{x}'",
)  # fmt: skip
NEVER_NUMBERS = (
    "[]", "{}", "1979-05-27", "'often'", "nan", "true", "[" * 100_000, "{a = 1}", "''",
)  # fmt: skip
NO_SETTINGS = (
    "",
    "=",
    "=5",
    "steps",
    "steps.x=1",
    ".=1",
    "a..b=1",
    "stepps=5",
    "data=5",
    "data=[]",
)
TWO_SETTINGS = ("steps=5\nbatch=3", "batch=1\n[data]\nresolution=64")
OPEN = ("deepspeed", "logging.tracker_options.wandb", "data.annotate", "data.weights")


def spoiled_setting(rng: random.Random) -> Input:
    """A good command with one more `--set`."""
    words, prefix = rng.choice(
        (
            ("plan --config run.toml", ""),
            (TRAIN, ""),
            (TRAIN, ""),
            ("compare compare.toml --dry-run", "run."),
        )
    )
    kind = rng.random()
    expected: Expected = "any"
    if kind < 0.1:
        given, expected = rng.choice((*NO_SETTINGS, *TWO_SETTINGS)), "refused"
    elif kind < 0.4:
        given, expected = f"{rng.choice(numeric_settings())}={rng.choice(NEVER_NUMBERS)}", "refused"
    elif kind < 0.6:
        deep = "zero_optimization.stage3_max_live_parameters", "zero_optimization", "fp16", "x.y"
        given = f"{rng.choice(OPEN)}.{rng.choice(deep)}={rng.choice(ODD_SETTINGS)}"
    else:
        given = f"{rng.choice(setting_names())}={rng.choice(ODD_SETTINGS)}"
    return Input(
        words=(*words.split(), "--set", prefix + given),
        how=f"--set {given[:60]!r}",
        expected=expected,
    )
