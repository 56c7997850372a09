"""Examples that are run once: a file of their keys and values that answers queries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import files, injection
from visualcloze_deft.backbones.flux_fill.context import ContextCache
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run
from visualcloze_deft.errors import UserError
from visualcloze_deft.inference.acceleration import cache_settings
from visualcloze_deft.inference.compiled import KINDS, as_bytes, reduced, restored

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 2
TASK = "depth-to-image"
COLOURS = ("red", "blue", "green", "yellow", "white", "purple")


def picture(colour: str, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


EXAMPLES = [[picture("red"), picture("blue")], [picture("white"), picture("yellow")]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, a file of examples, a folder of queries, and a grid file for each query."""
    (tmp_path / "queries").mkdir()
    for colour in COLOURS:
        picture(colour).save(tmp_path / f"{colour}.png")
    rows = [["red.png", "blue.png"], ["white.png", "yellow.png"]]
    write(tmp_path / "examples.json", task=TASK, rows=rows)
    for colour in ("green", "purple"):
        picture(colour).save(tmp_path / "queries" / f"{colour}.png")
        query = [f"queries/{colour}.png", None]
        write(tmp_path / f"{colour}.json", task=TASK, rows=[*rows, query], content_prompt=colour)
        (tmp_path / "queries" / f"{colour}.txt").write_text(colour)
    return tmp_path


def write(path: Path, **grid: object) -> None:
    path.write_text(json.dumps(grid))


@pytest.fixture
def adapter(micro_model: Path, tmp_path: Path) -> Path:
    """Trained, so it says, with a causal context."""
    return adapter_of("causal", micro_model, tmp_path / "adapter")


def adapter_of(context: str, model: Path, place: Path) -> Path:
    models = load_models(str(model))
    injection.attach(models.transformer, Run().adapter, seed=0)
    draws = torch.Generator().manual_seed(1)
    for parameter in injection.trainable(models.transformer).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=draws)
    place.mkdir()
    files.save(models.transformer, place, base=str(model), metadata={"context": context})
    return place


Words = Callable[[str], list[str]]
Quietly = Callable[[list[str]], str]


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Quietly:
    """Runs a command, and gives what it printed."""

    def run(arguments: list[str]) -> str:
        main(arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def words(micro_model: Path, adapter: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """Command lines, in the folder."""
    monkeypatch.chdir(folder)

    def made(command: str) -> list[str]:
        told = command.split()
        if told[0] == "infer":
            told += ["--inference-steps", str(STEPS)]
        return [*told, "--model", str(micro_model), "--adapter", str(adapter)]

    return made


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_compiled_examples_answer_as_the_whole_grids_do(
    words: Words, done: Quietly, folder: Path
) -> None:
    """Bit for bit: a folder of queries, and a grid file of a query row."""
    done(words("compile --examples examples.json --output a.safetensors"))
    done(words("infer --compiled a.safetensors --queries queries --output new"))
    for colour in ("green", "purple"):
        done(words(f"infer --examples {colour}.json --output whole-{colour}"))
        assert pixels(folder / "new" / f"{colour}.png") == pixels(
            folder / f"whole-{colour}" / "001.png"
        )
    write(folder / "row.json", rows=[["queries/green.png", None]], content_prompt="green")
    done(words("infer --compiled a.safetensors --examples row.json --output row"))
    assert pixels(folder / "row" / "001.png") == pixels(folder / "new" / "green.png")
    record = json.loads((folder / "new" / "green.json").read_text())
    assert record["compiled"] == "a.safetensors"
    assert record["rows"] == [[str(folder / "queries" / "green.png"), None]]


def test_a_query_row_of_the_examples_file_changes_nothing(
    words: Words, done: Quietly, folder: Path
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    done(words("compile --examples green.json --output b.safetensors"))
    one, other = (load_file(folder / f"{name}.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_file_is_the_same_each_time(words: Words, done: Quietly, folder: Path) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    done(words("compile --examples examples.json --output b.safetensors"))
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


@pytest.mark.parametrize(("storage", "most"), [("fp8", 0.04), ("int8", 0.01)])
def test_eight_bits_are_off_by_what_the_command_says(
    words: Words,
    done: Quietly,
    folder: Path,
    storage: str,
    most: float,
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    said = done(
        words(f"compile --examples examples.json --output b.safetensors --storage {storage}")
    )
    exact, stored = (load_file(folder / f"{name}.safetensors") for name in "ab")
    names = [name for name in exact if name.endswith((".keys", ".values"))]
    whole = {
        name: restored({"": stored[name], ".scale": stored[f"{name}.scale"]}) for name in names
    }
    off = sum(float((whole[name] - exact[name]).square().sum()) for name in names)
    size = sum(float(exact[name].square().sum()) for name in names)
    share = (off / size) ** 0.5
    assert 0 < share < most
    assert f"{storage}: keys and values are off by {share:.2%}" in said
    done(words("infer --compiled b.safetensors --queries queries --output new"))
    done(words("infer --compiled a.safetensors --queries queries --output exact"))
    pair = [np.asarray(Image.open(folder / p / "green.png"), float) for p in ("new", "exact")]
    assert 0 < np.abs(pair[0] - pair[1]).mean() < 5


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_a_head_of_zeros_and_a_large_one_are_kept_in_eight_bits(kind: torch.dtype) -> None:
    tensor = torch.stack([torch.zeros(8), torch.linspace(-3e4, 3e4, 8)])
    found = restored(reduced(tensor, kind))
    assert torch.equal(found[0], tensor[0])
    torch.testing.assert_close(found[1], tensor[1], rtol=0.07, atol=3e4 / 127)


# ---- what is refused


def test_damage_is_found_before_anything_is_made(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str]
) -> None:
    """A byte changed in the tensors, in what the header says, and a file that is cut."""
    done(words("compile --examples examples.json --output a.safetensors"))
    good = (folder / "a.safetensors").read_bytes()
    at = good.index(b"made_with")
    spoiled = {
        "tensors": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "says": good[:at] + b"mode_with" + good[at + 9 :],
        "cut": good[: len(good) // 2],
        "empty": b"",
        "other": b"hello, this is no file of tensors",
    }
    for name, data in spoiled.items():
        (folder / "b.safetensors").write_bytes(data)
        said = refused(*words("infer --compiled b.safetensors --queries queries --output new"))
        assert "b.safetensors" in said, name
        assert not (folder / "new").exists()


def test_a_file_of_other_tensors_is_no_compiled_one_and_is_not_written_over(
    words: Words, folder: Path, refused: Callable[..., str]
) -> None:
    save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
    before = (folder / "a.safetensors").read_bytes()
    told = "no compiled examples of vcdeft"
    assert told in refused(*words("infer --compiled a.safetensors --queries queries --output new"))
    compile_ = "compile --examples examples.json --output a.safetensors"
    assert "already there" in refused(*words(compile_))
    assert "holds no compiled examples" in refused(*words(f"{compile_} --overwrite"))
    assert (folder / "a.safetensors").read_bytes() == before


def test_compiled_examples_are_written_over_when_asked_for(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str]
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    data = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # damaged
    done(words("compile --examples examples.json --output a.safetensors --overwrite --storage fp8"))
    done(words("infer --compiled a.safetensors --queries queries --output new"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--resolution 48", "compiled with resolution 32, asked for is 48"),
        ("--quantise fp8", "compiled with quantise none, asked for is fp8"),
        ("--guidance 5", "compiled with guidance 30.0, asked for is 5.0"),
        ("--cells square", "compiled with cells row, asked for is square"),
        ("--context full --untrained-context", "compiled examples need a causal context"),
        ("--context-cache 1", "the context here is 'causal'"),
    ],
)
def test_another_setting_than_that_of_compiling_is_refused(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str], more: str, said: str
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    line = f"infer --compiled a.safetensors --queries queries --output new {more}"
    assert said in refused(*words(line))
    assert not (folder / "new").exists()


def test_another_adapter_or_base_than_that_of_compiling_is_refused(
    words: Words,
    done: Quietly,
    folder: Path,
    refused: Callable[..., str],
    micro_model: Path,
    tmp_path: Path,
) -> None:
    other = adapter_of("causal", micro_model, tmp_path / "other")
    done(words("compile --examples examples.json --output a.safetensors"))
    line = words("infer --compiled a.safetensors --queries queries --output new")
    tensors = load_file(other / "adapter_model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(changed, other / "adapter_model.safetensors", metadata={"context": "causal"})
    assert "compiled with adapters" in refused(*line[:-1], other)
    assert "compiled with adapters" in refused(*line[:-1], f"{line[-1]}=0.5")
    said = refused(*line[:-2], "--context", "causal", "--untrained-context")
    assert "asked for is none" in said


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"rows": [["red.png", "blue.png"], ["green.png", None]]}, "give the query row alone"),
        ({"rows": [["green.png", None]], "task": "image-to-depth"}, "task 'image-to-depth'"),
        ({"rows": [["green.png", None]], "task_prompt": "Paint."}, "task_prompt 'Paint.'"),
        ({"rows": [["green.png", "red.png", None]]}, "rows differ in length"),
    ],
)
def test_a_grid_that_does_not_fit_compiled_examples_is_refused(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str], grid: dict, said: str
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    write(folder / "query.json", **grid)
    line = "infer --compiled a.safetensors --examples query.json --output new"
    assert said in refused(*words(line))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compile --examples examples.json --output a.bin", "ends in .safetensors"),
        ("compile --examples examples.json --output queries", "ends in .safetensors"),
        ("compile --examples row.json --output a.safetensors", "there is no example to compile"),
        ("compile --examples several.json --output a.safetensors", "2 grids; give a file of one"),
        ("compile --examples none.json --output a.safetensors", "none.json"),
        ("infer --queries queries --output new", "--queries goes with --compiled"),
        ("infer --compiled a.safetensors --output new", "give --examples"),
        ("infer --compiled none.safetensors --queries queries --output new", "none.safetensors"),
    ],
)
def test_what_cannot_be_compiled_or_answered_is_one_line(
    words: Words, folder: Path, refused: Callable[..., str], line: str, said: str
) -> None:
    write(folder / "row.json", rows=[["green.png", None]], task=TASK)
    one = json.loads((folder / "examples.json").read_text())
    (folder / "several.json").write_text(json.dumps([one, one]))
    assert said in refused(*words(line))
    assert not (folder / "a.safetensors").exists()


def test_a_folder_of_queries_must_fit_the_examples(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str]
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    line = words("infer --compiled a.safetensors --queries queries --output new")
    picture("red").save(folder / "queries" / "green.jpg")
    assert "has the same stem" in refused(*line)
    (folder / "empty").mkdir()
    line[line.index("queries")] = "empty"
    assert "no picture in this folder" in refused(*line)
    rows = [["red.png", "blue.png", "white.png"], ["red.png", "green.png", None]]
    write(folder / "three.json", task_prompt="Mix.", rows=rows)
    done(words("compile --examples three.json --output b.safetensors"))
    line[line.index("a.safetensors")], line[line.index("empty")] = "b.safetensors", "queries"
    assert "a query of these examples has 3 cells, of which 1 are asked for" in refused(*line)


def test_queries_whose_images_would_have_one_name_are_refused(
    words: Words, done: Quietly, folder: Path, refused: Callable[..., str]
) -> None:
    done(words("compile --examples examples.json --output a.safetensors"))
    picture("red").save(folder / "queries" / "green-sheet.png")
    line = words("infer --compiled a.safetensors --queries queries --output new --overwrite")
    assert "green-sheet.png would also be written for" in refused(*line)
    assert not (folder / "new").exists()


def test_an_adapter_without_a_causal_context_is_refused(
    words: Words, done: Quietly, refused: Callable[..., str], micro_model: Path, tmp_path: Path
) -> None:
    other = adapter_of("isolated", micro_model, tmp_path / "isolated")
    line = words("compile --examples examples.json --output a.safetensors")[:-1]
    done([*line, str(other), "--untrained-context"])
    line[line.index("a.safetensors")] = "b.safetensors"
    assert "was trained with 'isolated' alone" in refused(*line, other)


def test_the_size_is_said_before_and_is_that_of_the_file(
    words: Words, done: Quietly, folder: Path
) -> None:
    for storage in ("model", "int8"):
        line = f"compile --examples examples.json --output {storage}.safetensors"
        said = done(words(f"{line} --storage {storage} --dry-run"))
        assert not (folder / f"{storage}.safetensors").exists()
        done(words(f"{line} --storage {storage}"))
        tensors = load_file(folder / f"{storage}.safetensors")
        size = sum(
            tensor.nbytes for name, tensor in tensors.items() if not name.startswith("picture")
        )
        assert f"{size / 1e6:,.2f} MB" in said


# ---- the Python API


@pytest.fixture
def pipe(micro_model: Path, adapter: Path) -> InContextPipeline:
    made = InContextPipeline.from_pretrained(micro_model, adapter=adapter)
    made.set_progress_bar_config(disable=True)
    return made


def answer(pipe: InContextPipeline, rows: list, **options: object) -> list[bytes]:
    made = pipe(rows=rows, num_inference_steps=STEPS, **options)
    return [image.tobytes() for image in made.images]


def test_a_pipeline_answers_query_rows_with_compiled_examples(
    pipe: InContextPipeline, tmp_path: Path
) -> None:
    query = [picture("green"), None]
    whole = answer(pipe, [*EXAMPLES, query], task=TASK, seed=[0, 1])
    other = answer(pipe, [*EXAMPLES, query[::-1]], task=TASK)
    compiled = pipe.compile_examples(EXAMPLES, task=TASK)
    compiled.save(tmp_path / "a.safetensors")
    for given in (compiled, tmp_path / "a.safetensors"):
        pipe.load_compiled(given)
        assert answer(pipe, [query], seed=[0, 1]) == whole
        # the column that is asked for is the query's own affair
        assert answer(pipe, [[None, picture("green")]]) == other
        with pytest.raises(UserError, match="give the query row alone"):
            answer(pipe, [*EXAMPLES, query])
        pipe.unload_compiled()
    assert answer(pipe, [*EXAMPLES, query], task=TASK, seed=[0, 1]) == whole


def test_a_pipeline_that_changed_refuses_its_compiled_examples(pipe: InContextPipeline) -> None:
    pipe.load_compiled(pipe.compile_examples(EXAMPLES, task=TASK))
    query = [[picture("green"), None]]
    answer(pipe, query)
    with pytest.raises(UserError, match="compiled with resolution 32, asked for is 48"):
        answer(pipe, query, resolution=48)
    with pytest.raises(UserError, match="known_latents='mode'"):
        answer(pipe, query, known_latents="sample")
    (name,) = pipe.get_active_adapters()
    pipe.set_adapters(name, 0.5)
    with pytest.raises(UserError, match="compiled with adapters"):
        answer(pipe, query)
    pipe.set_adapters(name)
    pipe.set_context("full", untrained=True)
    with pytest.raises(UserError, match="they need a causal context"):
        answer(pipe, query)
    with pytest.raises(UserError, match="use an adapter that was trained with context=causal"):
        pipe.compile_examples(EXAMPLES, task=TASK)


def test_an_adapter_that_was_replaced_since_it_was_loaded_is_another_one(
    pipe: InContextPipeline, adapter: Path, micro_model: Path, tmp_path: Path
) -> None:
    """The file says what the keys and values were computed with."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(changed, adapter / "adapter_model.safetensors", metadata={"context": "causal"})
    pipe.compile_examples(EXAMPLES, task=TASK).save(tmp_path / "a.safetensors")
    new = InContextPipeline.from_pretrained(micro_model, adapter=adapter)
    with pytest.raises(UserError, match=r"adapters .* has changed"):
        new.load_compiled(tmp_path / "a.safetensors")
    shutil.rmtree(adapter)
    pipe.load_compiled(tmp_path / "a.safetensors")


def test_another_part_of_a_pipeline_has_no_compiled_examples(
    pipe: InContextPipeline, micro_model: Path
) -> None:
    pipe.load_compiled(pipe.compile_examples(EXAMPLES, task=TASK))
    pipe.vae = load_models(str(micro_model)).vae
    with pytest.raises(UserError, match="give at least one"):
        answer(pipe, [[None, None]])


def test_compiled_examples_follow_a_pipeline_to_another_precision(pipe: InContextPipeline) -> None:
    query = [picture("green"), None]
    pipe.load_compiled(pipe.compile_examples(EXAMPLES, task=TASK))
    answer(pipe, [query])
    pipe.to(torch.bfloat16)
    low = answer(pipe, [query])
    pipe.unload_compiled()
    whole = answer(pipe, [*EXAMPLES, query], task=TASK)
    apart = np.frombuffer(low[0], np.uint8).astype(float) - np.frombuffer(whole[0], np.uint8)
    assert np.abs(apart).mean() < 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"resolution": 100}, "give a multiple of 16"),
        ({"guidance_scale": "x"}, "give a number"),
        ({"rows": None}, "give a list of rows"),
        ({"rows": [1]}, "row 1 is 1"),
        ({"rows": [*EXAMPLES[:1], [picture("red")]]}, "rows differ in length"),
    ],
)
def test_what_cannot_be_compiled_in_python_is_one_line(
    pipe: InContextPipeline, given: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        pipe.compile_examples(**{"rows": EXAMPLES, "task": TASK, **given})


def test_what_cannot_be_saved_or_loaded_in_python_is_one_line(
    pipe: InContextPipeline, tmp_path: Path
) -> None:
    compiled = pipe.compile_examples(EXAMPLES, task=TASK, guidance_scale=30)
    pipe.load_compiled(compiled)
    answer(pipe, [[picture("green"), None]], guidance_scale=30.0)
    with pytest.raises(UserError, match="storage 'fp4'"):
        compiled.save(tmp_path / "a.safetensors", storage="fp4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="compiled 3: give a file"):
        pipe.load_compiled(3)  # type: ignore[arg-type]
    pipe.transformer.enable_cache(cache_settings("first-block"))
    with pytest.raises(UserError, match="not beside a cache of diffusers"):
        pipe.compile_examples(EXAMPLES, task=TASK)


def test_an_adapter_without_a_file_cannot_be_told_from_others(
    pipe: InContextPipeline, micro_model: Path
) -> None:
    shapes = pipe.transformer.transformer_blocks[0].attn.to_q.weight.shape
    name = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    pipe.load_lora_weights(
        {name.format("A"): torch.ones(2, shapes[1]), name.format("B"): torch.ones(shapes[0], 2)}
    )
    pipe.set_context("causal", untrained=True)
    with pytest.raises(UserError, match="load it from a file"):
        pipe.compile_examples(EXAMPLES, task=TASK)


def test_examples_of_another_grid_are_refused(pipe: InContextPipeline) -> None:
    """A file whose pictures are not those that its keys and values are of."""
    compiled = pipe.compile_examples(EXAMPLES, task=TASK)
    pipe.load_compiled(replace(compiled, rows=tuple(map(tuple, reversed(EXAMPLES)))))
    with pytest.raises(UserError, match="compiled examples: the grid has others"):
        answer(pipe, [[picture("green"), None]])


def test_pictures_are_kept_without_loss() -> None:
    image = Image.effect_noise((37, 21), 60).convert("RGB")
    import io

    assert Image.open(io.BytesIO(as_bytes(image).numpy().tobytes())).tobytes() == image.tobytes()


# ---- sharing


def test_grids_with_the_same_examples_compute_them_once(
    words: Words, done: Quietly, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = [json.loads((folder / f"{c}.json").read_text()) for c in ("green", "purple")]
    other = {**grids[0], "rows": [grids[0]["rows"][1], grids[0]["rows"][0], grids[0]["rows"][2]]}
    (folder / "list.json").write_text(json.dumps([*grids, other]))
    computed: list[Tensor] = []
    original = ContextCache.prefill_examples
    monkeypatch.setattr(
        ContextCache, "prefill_examples", lambda c, task: (computed.append(task), original(c, task))
    )
    done(words("infer --examples list.json --output one"))
    assert len(computed) == 2
    done(words("infer --examples list.json --output three --batch 3"))
    assert len(computed) == 4
    for name in ("001", "002", "003"):
        one, three = (
            torch.tensor(list(pixels(folder / place / f"{name}.png"))) for place in ("one", "three")
        )
        assert (one - three).abs().max() <= 1
