"""The context of a grid: kept between steps, or computed once and alone."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from processes import run
from test_train import adapter_of, arguments, losses, plain_training
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visualcloze_deft import InContextPipeline
from visualcloze_deft.adapters import injection
from visualcloze_deft.backbones.attention import use
from visualcloze_deft.backbones.base import Seen, Split
from visualcloze_deft.backbones.flops import forward_flops
from visualcloze_deft.backbones.flux_fill.context import ContextCache, noise_of, read_contexts
from visualcloze_deft.backbones.flux_fill.loading import load_models
from visualcloze_deft.backbones.flux_fill.model import Models, predict
from visualcloze_deft.backbones.peft_files import read_metadata
from visualcloze_deft.cli import main
from visualcloze_deft.config.run_settings import Run, load_run
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.prompt import Prompt
from visualcloze_deft.sampling.context import full_steps_of
from visualcloze_deft.sampling.denoising import Conditions, conditions_of, prefill
from visualcloze_deft.sampling.encoding import SEEN, encode, filled, kinds_in, seen_of
from visualcloze_deft.training import run_data
from visualcloze_deft.training.datasets import PixelDataset
from visualcloze_deft.training.objective import GridLoss
from visualcloze_deft.training.run_folder import SETTINGS
from visualcloze_deft.training.step import Batch, seen_in

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


ROWS = [[picture("red"), picture("blue")], [picture("green"), None]]


@pytest.fixture
def models(micro_model: Path) -> Models:
    loaded = load_models(str(micro_model))
    injection.attach(loaded.transformer, Run().adapter, seed=0)
    draws = torch.Generator().manual_seed(1)
    for parameter in injection.trainable(loaded.transformer).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=draws)  # else some have no gradient
    return loaded


@pytest.fixture
def given(models: Models) -> Conditions:
    built = [grid.build(ROWS, resolution=32, cells="row")]
    return conditions_of(models, built, ["From the depth map to the photo."], seen="full")


def cache_of(models: Models, given: Conditions) -> ContextCache:
    return ContextCache(models.transformer, given.latents, text=given.text, guidance=1.0)


def noise_for(given: Conditions) -> Tensor:
    return torch.randn(given.latents.clean.shape, generator=torch.Generator().manual_seed(2))


def gradients(models: Models, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    named = injection.trainable(models.transformer)
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    models.transformer.zero_grad()
    return found


def masked(models: Models, given: Conditions, noisy: Tensor, seen: Seen) -> Tensor:
    """One call at time 1 in place of those of a context that is computed once: its tokens, then the
    targets, with a mask of who sees whom. A causal one also has the text twice, first the
    examples' own."""
    latents, length = given.latents, given.text.text.shape[1]
    rows, targets = latents.ids[:, 0], latents.is_target[0] > 0
    example = rows < rows[-1] if seen == "causal" else torch.zeros(len(rows), dtype=torch.bool)
    texts = [0, 2] if seen == "causal" else [2]
    kind = [torch.full((length,), number) for number in texts]
    kind += [torch.where(example, 1, torch.where(targets, 3, 2)), torch.full((targets.sum(),), 4)]
    seen_by = {0: {0, 1}, 1: {0, 1}, 2: {1, 2, 3}, 3: {1, 2, 3}, 4: {1, 2, 4}}
    kinds = torch.cat(kind).tolist()
    sees = torch.tensor([[other in seen_by[own] for other in kinds] for own in kinds])
    inputs = latents.inputs(noise_of(rows, 64)[None])
    found: Tensor = models.transformer(
        hidden_states=torch.cat([inputs, latents.inputs(noisy)[:, targets]], dim=1),
        timestep=torch.ones(1),
        guidance=torch.ones(1),
        pooled_projections=given.text.pooled,
        encoder_hidden_states=torch.cat([given.text.text for _ in texts], dim=1),
        txt_ids=torch.zeros(len(texts) * length, 3),
        img_ids=torch.cat([latents.ids, latents.ids[targets]]),
        joint_attention_kwargs={"attention_mask": sees[None, None]},
        return_dict=False,
    )[0]
    return found[:, inputs.shape[1] :]


def test_layers_that_know_contexts_compute_as_diffusers_do(
    models: Models, given: Conditions
) -> None:
    noisy, t = noise_for(given), torch.tensor([0.6])
    before = predict(models.transformer, given.latents, noisy, t, text=given.text, guidance=1.0)
    read_contexts(models.transformer)
    after = predict(models.transformer, given.latents, noisy, t, text=given.text, guidance=1.0)
    assert torch.equal(before, after)
    assert torch.equal(before, cache_of(models, given).full(noisy, t))


def test_a_layer_with_attention_of_its_own_is_refused(models: Models, given: Conditions) -> None:
    class Other(FluxAttnProcessor):
        pass

    models.transformer.set_attn_processor(Other())
    with pytest.raises(UserError, match="is Other, which computes attention in a way of its own"):
        cache_of(models, given)


def test_fused_projections_and_another_kernel_are_used(models: Models, given: Conditions) -> None:
    injection.detach(models.transformer)
    noisy, t = noise_for(given), torch.tensor([0.6])
    before = cache_of(models, given).full(noisy, t)
    models.transformer.fuse_qkv_projections()
    use(models.transformer, "math")
    cache = cache_of(models, given)
    torch.testing.assert_close(cache.full(noisy, t), before, rtol=1e-5, atol=1e-5)
    active = cache.active(noisy, t)
    torch.testing.assert_close(active, before[:, cache.targets], rtol=1e-5, atol=1e-5)


def test_targets_alone_see_what_a_full_call_kept(models: Models, given: Conditions) -> None:
    noisy, t = noise_for(given), torch.tensor([0.6])
    cache = cache_of(models, given)
    full = cache.full(noisy, t)[:, cache.targets]
    torch.testing.assert_close(cache.active(noisy, t), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", ["isolated", "causal"])
def test_calls_of_a_context_computed_once_are_one_call_with_a_block_mask(
    models: Models, given: Conditions, seen: Seen
) -> None:
    """Forward and backward."""
    noisy, cache = noise_for(given), cache_of(models, given)
    prefill(cache, seen, given.text)
    once = masked(models, given, noisy, seen)
    twice = cache.active(noisy, torch.ones(1))
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-5)
    of_once = gradients(models, once.square().sum())
    of_twice = gradients(models, twice.square().sum())
    assert of_once.keys() == of_twice.keys()
    for name, gradient in of_once.items():
        torch.testing.assert_close(of_twice[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seen", ["isolated", "causal"])
def test_recomputed_blocks_give_the_same_gradients(
    models: Models, given: Conditions, seen: Seen
) -> None:
    def loss() -> Tensor:
        cache = cache_of(models, given)
        prefill(cache, seen, given.text)
        return cache.active(noise_for(given), torch.tensor([0.5])).square().sum()

    plain = gradients(models, loss())
    models.transformer.enable_gradient_checkpointing()
    models.transformer.train()
    again = gradients(models, loss())
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


def test_the_only_context_serves_several_samples(models: Models, given: Conditions) -> None:
    cache, t = cache_of(models, given), torch.tensor([0.5])
    cache.prefill()
    noises = torch.cat([noise_for(given), -noise_for(given)])
    together = cache.some([0, 0]).active(noises, t.expand(2))
    for one, noisy in zip(together, noises, strict=True):
        torch.testing.assert_close(one[None], cache.active(noisy[None], t), rtol=1e-5, atol=1e-5)


def test_examples_of_a_causal_context_do_not_depend_on_the_query(
    models: Models, given: Conditions
) -> None:
    other = grid.build([ROWS[0], [picture("white"), None]], resolution=32, cells="row")
    query = conditions_of(
        models, [other], [Prompt(rows=2, columns=2, content="a lamp")], seen="full"
    )
    parts = []
    for one in (given, query):
        cache = cache_of(models, one)
        cache.prefill_examples(given.text)
        assert cache.examples is not None
        parts.append(cache.examples)
    assert parts[0].keys() == parts[1].keys()
    for layer, (keys, values) in parts[0].items():
        assert torch.equal(keys, parts[1][layer][0])
        assert torch.equal(values, parts[1][layer][1])


def test_a_causal_grid_without_examples_is_an_isolated_one(models: Models) -> None:
    alone = conditions_of(
        models, [grid.build(ROWS[1:], resolution=32)], ["To the photo."], seen="full"
    )
    noisy, t, found = noise_for(alone), torch.tensor([0.5]), []
    for seen in ("isolated", "causal"):
        cache = cache_of(models, alone)
        prefill(cache, seen, alone.text)
        found.append(cache.active(noisy, t))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_full_steps_are_evenly_spaced_in_time_from_the_first() -> None:
    straight = [1 - k / 30 for k in range(30)]
    assert sorted(full_steps_of(1, straight)) == [0]
    assert sorted(full_steps_of(3, straight)) == [0, 10, 20]
    late = [0.5 + t / 2 for t in straight]  # most steps near noise, as in a large grid
    assert sorted(full_steps_of(2, late)) == [0, 29]
    assert sorted(full_steps_of(4, late)) == [0, 15, 28, 29]
    for count in range(1, 31):
        assert len(full_steps_of(count, late)) == count
    assert full_steps_of(30, late) == frozenset(range(30))


@pytest.mark.parametrize("seen", ["isolated", "causal"])
def test_a_context_computed_once_takes_the_operations_that_are_counted(
    models: Models, given: Conditions, seen: Seen
) -> None:
    """In the linear layers and attention of blocks, and at both ends."""
    cache, noisy = cache_of(models, given), noise_for(given)
    injection.detach(models.transformer)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prefill(cache, seen, given.text)
        cache.active(noisy, torch.ones(1))
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    text, targets = given.text.text.shape[1], len(cache.targets)
    config = models.transformer.config
    split = Split(targets=targets, query=targets if seen == "causal" else None)
    linear, attention = forward_flops(config, noisy.shape[1], text, split)
    assert found.pop("aten.bmm") == attention
    # beside what reads the time and the pooled text in each of the two calls
    assert sum(found.values()) == pytest.approx(linear, rel=0.1)


def test_the_bench_counts_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """At FLUX's size, on the meta device."""
    scripts = Path(__file__).parents[1] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    bench_context = importlib.import_module("bench_context")
    work = bench_context.counted(2, 2, 384)
    assert work.full / work.active == pytest.approx(4.9, abs=0.05)
    page = (scripts.parent / "docs" / "context-cache.md").read_text()
    cached = " / ".join(f"{work.speed(full_steps=full):.2f}" for full in (1, 3, 6))
    once = f"{work.speed():.2f}x | {work.speed(seeds=4):.2f}x | {work.speed(compiled=True):.2f}x"
    assert f"{once} | {cached}x" in page


# ---- training


def groups_of(models: Models, micro_model: Path, *settings: str, count: int = 12) -> list:
    run = load_run(None, [f"model={micro_model}", "data.recipe.hide_target=0.5", *settings])
    draws = PixelDataset(run_data.mixture_of(run))
    return encode(models, [draws[k] for k in range(count)], seed=0, context=run.context)


def test_a_mixed_run_draws_the_context_of_each_example_from_seed_and_index(
    models: Models, micro_model: Path
) -> None:
    groups = groups_of(models, micro_model, "context=mixed")
    assert {group.seen for group in groups} == {"full", "isolated"}
    for group in groups:
        assert {seen_of("mixed", 0, i) for i in group.indices} == {group.seen}
    drawn = [seen_of("mixed", 3, k) == "isolated" for k in range(2000)]
    assert 0.66 < np.mean(drawn) < 0.74


def test_samples_of_an_isolated_group_have_their_targets_at_the_same_places(
    models: Models, micro_model: Path
) -> None:
    for group in groups_of(models, micro_model, "context=isolated"):
        assert group.seen == "isolated"
        assert (group.latents.is_target == group.latents.is_target[:1]).all()


def test_examples_of_a_causal_run_read_the_task_without_the_content(
    models: Models, micro_model: Path
) -> None:
    run = load_run(None, [f"model={micro_model}", "context=causal", "data.recipe.keep_content=1.0"])
    draws = PixelDataset(run_data.mixture_of(run))
    drawn = [draws[k] for k in range(12)]
    assert any(one.prompt.content for one in drawn)
    prompts = {one.index: replace(one.prompt, content="") for one in drawn}
    for group in encode(models, drawn, seed=0, context="causal"):
        wanted = models.encode_text([prompts[index] for index in group.indices])
        assert group.task is not None
        assert torch.equal(group.task.text, wanted.text)


def test_noise_and_times_are_those_of_a_full_run(models: Models, micro_model: Path) -> None:
    found = []
    for context in ("full", "mixed"):
        groups = groups_of(models, micro_model, f"context={context}")
        found.append({i: (g.noise[k], g.t[k]) for g in groups for k, i in enumerate(g.indices)})
    for index, (noise, t) in found[0].items():
        assert torch.equal(found[1][index][0], noise)
        assert torch.equal(found[1][index][1], t)


def test_what_is_known_counts_nothing_in_an_isolated_loss(
    models: Models, micro_model: Path
) -> None:
    """The error of a known token does not reach the loss, whatever `context_weight` is."""
    (group, *_) = groups_of(models, micro_model, "context=isolated", count=2)
    told = {"guidance": 1.0, "scheduled_sampling": False}
    losses = [GridLoss(models.transformer, context_weight=w, **told)([group]) for w in (0.0, 1.0)]
    assert torch.equal(losses[0], losses[1])
    full = replace(group, seen="full")
    losses = [GridLoss(models.transformer, context_weight=w, **told)([full]) for w in (0.0, 1.0)]
    assert not torch.equal(losses[0], losses[1])


def test_fillers_bring_the_groups_of_both_kinds_to_the_same_number(
    models: Models, micro_model: Path
) -> None:
    groups = groups_of(models, micro_model, "context=mixed")
    full, isolated, causal = kinds_in(groups)
    more = filled(groups, (full + 2, isolated + 1, causal))
    assert kinds_in(more) == (full + 2, isolated + 1, 0)
    assert [group for group in more if not group.filler] == sorted(
        groups, key=lambda group: SEEN.index(group.seen)
    )
    assert GridLoss(models.transformer, context_weight=1.0, guidance=1.0)(more).isfinite().all()


def test_a_filler_does_not_say_what_the_context_of_its_example_sees(
    models: Models, micro_model: Path
) -> None:
    run = load_run(None, [f"model={micro_model}"])
    draws = PixelDataset(run_data.mixture_of(run))
    drawn = [draws[k] for k in range(6)]
    groups = encode(models, drawn, seed=0, context="full")
    batch = Batch(drawn=drawn, groups=filled(groups, (len(groups), 1, 0)))
    assert all(one.split is None for one in seen_in([batch], [0.0] * len(drawn)).values())


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [
        "--zero 2 --gradient-checkpointing all --set context=mixed",
        "--zero 3 --set context=mixed",
        "--zero 1 --set context=isolated --method lora",
        "--zero 0 --set context=isolated --batch 1 --set accumulate=2",
        "--zero 3 --set context=causal",
        "--zero 2 --set context=causal --gradient-checkpointing 1 --method para",
    ],
)
def test_runs_follow_plain_training_and_resume_to_the_same_adapter(
    micro_model: Path, tmp_path: Path, options: str
) -> None:
    output = tmp_path / "run"
    run([*arguments(micro_model, output), *options.split()])
    assert losses(output) == pytest.approx(plain_training(output)[0], rel=1e-4)
    adapter = adapter_of(output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "step-000006")
    run(["train", "--output", output, "--resume"])
    assert all(torch.equal(adapter[name], tensor) for name, tensor in adapter_of(output).items())
    assert read_metadata(output / "adapter")["context"] == load_run(str(output / SETTINGS)).context


# ---- inference


@pytest.fixture
def pipe(micro_model: Path) -> InContextPipeline:
    made = InContextPipeline.from_pretrained(micro_model)
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: InContextPipeline, **options: object) -> list[bytes]:
    told = {"task": "depth-to-image", "num_inference_steps": STEPS} | options
    return [image.tobytes() for image in pipe(rows=ROWS, **told).images]


def test_as_many_full_steps_as_steps_change_no_bit(pipe: InContextPipeline) -> None:
    before = images(pipe)
    pipe.enable_context_cache(STEPS)
    assert images(pipe) == before
    pipe.enable_context_cache(1)
    cached = images(pipe)
    assert cached != before
    pipe.disable_context_cache()
    assert images(pipe) == before


def test_seeds_and_batches_share_a_context_and_stay_what_they_are_alone(
    pipe: InContextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.set_context("isolated", untrained=True)
    alone = [images(pipe, seed=seed)[0] for seed in (0, 1, 2)]
    prefills = []
    original = ContextCache.prefill
    monkeypatch.setattr(ContextCache, "prefill", lambda c: (prefills.append(c), original(c))[1])
    assert images(pipe, seed=[0, 1, 2]) == alone
    assert len(prefills) == 1


def test_targets_at_other_places_are_computed_apart(pipe: InContextPipeline) -> None:
    """A batch of grids of one shape that ask for different columns."""
    other = [[picture("red"), picture("blue")], [None, picture("green")]]
    asked = [{"task": "depth-to-image", "rows": ROWS}, {"task": "image-to-depth", "rows": other}]
    pipe.enable_context_cache(2)
    told = {"num_inference_steps": STEPS}
    together = pipe(asked, batch_size=2, **told).images
    apart = [pipe([one], **told).images[0] for one in asked]
    assert [image.tobytes() for image in together] == [image.tobytes() for image in apart]


@pytest.mark.parametrize("full_steps", [0, -1, 1.5, True, "3"])
def test_full_steps_that_are_no_count_are_refused(
    pipe: InContextPipeline, full_steps: object
) -> None:
    with pytest.raises(UserError, match="give a whole number, 1 or more"):
        pipe.enable_context_cache(full_steps)  # type: ignore[arg-type]


def test_more_full_steps_than_steps_are_refused(pipe: InContextPipeline) -> None:
    pipe.enable_context_cache(STEPS + 1)
    with pytest.raises(UserError, match="full_steps 5: more than 4 steps"):
        images(pipe)


def test_a_cache_of_diffusers_beside_it_is_refused(pipe: InContextPipeline) -> None:
    from visualcloze_deft.inference.acceleration import cache_settings

    pipe.transformer.enable_cache(cache_settings("first-block"))
    pipe.enable_context_cache(2)
    with pytest.raises(UserError, match="not beside a cache of diffusers"):
        images(pipe)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--context-cache 5", "--context-cache 5: more than the 4 steps"),
        ("--context-cache 0", "0 is not in the range"),
        ("--context-cache 2 --cache first-block", "--cache first-block: not beside a context"),
        ("--context isolated", "the base alone was not trained with it"),
        (
            "--context isolated --untrained-context --context-cache 2",
            "--context-cache 2: the context here is 'isolated'",
        ),
        ("--context some", "'some' is not one of 'full', 'isolated', 'causal'"),
    ],
)
def test_what_the_command_line_cannot_do_with_a_context_is_one_line(
    refused: Callable[..., str],
    grid_file: Callable[..., Path],
    micro_model: Path,
    tmp_path: Path,
    words: str,
    said: str,
) -> None:
    told = ("infer", "--examples", grid_file(), "--model", micro_model, "--inference-steps", STEPS)
    assert said in refused(*told, *words.split(), "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_record_says_which_context_made_an_image(
    grid_file: Callable[..., Path],
    micro_model: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = ["infer", "--examples", grid_file(), "--model", micro_model, "--output", tmp_path / "o"]
    words = [*map(str, told), "--inference-steps", str(STEPS)]
    main([*words, "--context-cache", "2"])
    (record,) = (tmp_path / "o").glob("*.json")
    assert json.loads(record.read_text())["context_cache"] == 2
    capsys.readouterr()
    assert "context_cache" in refused(*words)


# ---- adapters


@pytest.fixture
def adapter_with(models: Models, micro_model: Path, tmp_path: Path) -> object:
    """Writes an adapter that says it was trained with a context."""
    from visualcloze_deft.adapters import files

    def write(context: str | None) -> Path:
        folder = tmp_path / f"adapter-{context}"
        folder.mkdir()
        told = {"context": context} if context else {}
        files.save(models.transformer, folder, base=str(micro_model), metadata=told)
        return folder

    return write


def test_an_adapter_is_run_with_the_context_that_it_was_trained_with(
    pipe: InContextPipeline, adapter_with
) -> None:
    for context, isolated in (
        (None, False),
        ("full", False),
        ("mixed", False),
        ("isolated", True),
        ("causal", True),
    ):
        name = pipe.load_adapter(adapter_with(context))
        assert pipe.context.once is isolated
        pipe.delete_adapters(name)
    assert not pipe.context.once


def test_a_context_that_an_adapter_does_not_know_is_refused_unless_allowed(
    pipe: InContextPipeline, adapter_with
) -> None:
    pipe.set_context("isolated")
    with pytest.raises(UserError, match="the base alone was not trained with it"):
        images(pipe)
    pipe.load_adapter(adapter_with("mixed"), "both")
    assert pipe.context.seen == "isolated"
    pipe.load_adapter(adapter_with("full"), "one")
    with pytest.raises(UserError, match="adapter-full was trained with 'full' alone"):
        images(pipe)
    pipe.set_context("isolated", untrained=True)
    assert pipe.context.seen == "isolated"
    pipe.set_context()
    pipe.delete_adapters("both")
    pipe.load_adapter(adapter_with("isolated"), "other")
    with pytest.raises(UserError, match="adapters without a context in common"):
        images(pipe)
    with pytest.raises(UserError, match="context 'some': give one of full, isolated, causal"):
        pipe.set_context("some")


def test_a_context_of_a_later_version_is_refused(pipe: InContextPipeline, adapter_with) -> None:
    with pytest.raises(UserError, match="'sparse', which this version does not know"):
        pipe.load_adapter(adapter_with("sparse"))
    assert pipe.get_active_adapters() == []


def test_the_context_of_an_adapter_stays_when_its_files_are_gone(
    pipe: InContextPipeline, adapter_with
) -> None:
    folder = adapter_with("isolated")
    pipe.load_adapter(folder)
    shutil.rmtree(folder)
    assert pipe.context.seen == "isolated"
