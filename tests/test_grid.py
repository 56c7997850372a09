"""The grid is VisualCloze's, number for number as diffusers makes it, and can be taken apart."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.visualcloze.pipeline_visualcloze_generation import (
    VisualClozeGenerationPipeline,
)
from diffusers.pipelines.visualcloze.visualcloze_utils import VisualClozeProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visualcloze_deft.backbones.flux_fill import packing
from visualcloze_deft.backbones.flux_fill.model import Models
from visualcloze_deft.errors import UserError
from visualcloze_deft.grids import grid
from visualcloze_deft.grids.cell_sizes import cell_size, row_sizes
from visualcloze_deft.grids.prompt import CONTENT_PREFIX, layout_sentence

PARTS = ("transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WIDE, TALL, SQUARE = (96, 64), (50, 90), (70, 70)


def noise(size: tuple[int, int] = SQUARE, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def rows_of(*sizes: tuple[int, int], columns: int = 2, targets: int = 1) -> list[list[Any]]:
    """One row a size, the last `targets` images of the last row missing."""
    rows: list[list[Any]] = [
        [noise(size, 10 * r + c) for c in range(columns)] for r, size in enumerate(sizes)
    ]
    rows[-1][columns - targets :] = [None] * targets
    return rows


GRIDS = {
    "query alone": rows_of(SQUARE),
    "two rows": rows_of(SQUARE, SQUARE),
    "three aspects": rows_of(WIDE, TALL, SQUARE, columns=3),
    "one column": rows_of(WIDE, WIDE, columns=1),
    "two targets": rows_of(SQUARE, SQUARE, columns=3, targets=2),
    "first column": [[noise(WIDE), noise(WIDE, 1)], [None, noise(TALL, 2)]],
}


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Random, with latents of mean 100 and hardly any variance: a sample rounds to the mode."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    with torch.no_grad():
        vae.encoder.conv_out.bias[:16] += 100
        vae.encoder.conv_out.bias[16:] -= 1000  # clamped to -30 by diffusers
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference(vae: AutoencoderKL) -> VisualClozeGenerationPipeline:
    return VisualClozeGenerationPipeline(
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(PARTS),
        resolution=64,
    )


def their_cells(strips: tuple[torch.Tensor, ...], built: grid.Grid) -> list[list[torch.Tensor]]:
    return [
        [cell[None] for cell in grid.cells(strip, widths)]
        for strip, widths in zip(strips, built.widths, strict=True)
    ]


# ---- agreement with diffusers


@pytest.mark.parametrize("rows", GRIDS.values(), ids=GRIDS)
def test_tokens_masks_and_ids_are_those_of_diffusers_bit_for_bit(
    rows: list[list[Image.Image | None]],
    vae: AutoencoderKL,
    reference: VisualClozeGenerationPipeline,
) -> None:
    built = grid.build(rows, resolution=64)
    models = Models(name="vae", vae=vae, scheduler=None, resolution=64, **dict.fromkeys(PARTS))
    ours = models.encode_grids([built], clean=False)
    _, seen, mask, ids = reference._prepare_latents(
        their_cells(built.seen, built),
        their_cells(built.hidden, built),
        torch.Generator().manual_seed(0),
        8,
        torch.device("cpu"),
        torch.float32,
    )
    assert torch.equal(ours.seen, seen)
    assert torch.equal(ours.mask, mask)
    assert torch.equal(ours.ids, ids)
    noisy = torch.zeros_like(seen)
    assert torch.equal(ours.inputs(noisy), torch.cat([noisy, torch.cat((seen, mask), -1)], -1))


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (640, 480), (64, 64)])
def test_pixels_and_masks_are_those_of_diffusers(size: tuple[int, int]) -> None:
    """But for where a crop begins: diffusers rounds it to whole pixels of the resized image."""
    image = Image.radial_gradient("L").resize(size, Image.Resampling.BICUBIC).convert("RGB")
    rows = [[image, image.rotate(90)], [image, None]]
    given = VisualClozeProcessor(vae_scale_factor=16, resolution=64).preprocess(
        "", "", [list(row) for row in rows], vae_scale_factor=8
    )
    built = grid.build(rows, resolution=64)
    for strip, hidden, theirs, their_mask in zip(
        built.seen, built.hidden, given["init_image"][0], given["mask"][0], strict=True
    ):
        assert torch.allclose(strip, torch.cat(theirs, dim=-1)[0], atol=0.04)
        assert torch.equal(hidden, torch.cat(their_mask, dim=-1)[0].float())


@pytest.mark.parametrize("resolution", [64, 128, 384, 512, 1024])
def test_cells_have_the_size_that_diffusers_gives_them(resolution: int) -> None:
    processor = VisualClozeProcessor(vae_scale_factor=16, resolution=resolution)
    sides = (1, 7, 64, 100, 333, 480, 512, 640, 768, 999, 1080)
    for size in product(sides, sides):
        if max(size) / min(size) <= 20:
            image = Image.new("1", size)
            _, [[[height, width]]], _ = processor.preprocess_image([[image]], 8)
            assert cell_size(size, resolution) == (width, height), size


def test_cells_of_whole_ratios_have_the_size_that_diffusers_gives_them() -> None:
    """Where the side comes out whole but for rounding: the formula, for far more sizes."""
    for resolution, width, height in product(
        (64, 384, 512), range(16, 1040, 16), range(16, 1040, 16)
    ):
        aspect = width / height
        new_height = int((resolution * resolution / aspect) ** 0.5)
        new_width = int(new_height * aspect)
        theirs = max(new_width // 16, 1) * 16, max(new_height // 16, 1) * 16
        assert cell_size((width, height), resolution) == theirs, (width, height)


@pytest.mark.parametrize(("rows", "columns"), list(product((1, 2, 3), (1, 2, 4))))
def test_the_layout_is_said_in_the_words_of_diffusers(rows: int, columns: int) -> None:
    (theirs,) = VisualClozeProcessor().get_layout_prompt((rows, columns))
    assert layout_sentence(rows, columns) == theirs


def test_the_content_is_said_in_the_words_of_diffusers() -> None:
    source = inspect.getsource(VisualClozeGenerationPipeline.encode_prompt)
    assert f'f"{CONTENT_PREFIX} {{prompt}}"' in source


# ---- taking apart what was put together


def test_pack_and_unpack_are_inverse() -> None:
    shape = ((32, 64), (48, 16), (16, 16))
    strips = [torch.randn(3, 16, h // 8, w // 8) for h, w in shape]
    tokens = torch.cat([packing.pack(strip) for strip in strips], dim=1)
    assert tokens.shape == (3, 2 * 4 + 3 * 1 + 1, 64)
    for strip, back in zip(strips, packing.unpack(tokens, shape), strict=True):
        assert torch.equal(strip, back)


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (1, 1)])
def test_to_pixels_and_to_image_are_inverse(size: tuple[int, int]) -> None:
    image = noise(size)
    pixels = grid.to_pixels(grid.fitted(image, size))
    assert pixels.shape == (3, size[1], size[0])
    assert (pixels.min() >= -1) & (pixels.max() <= 1)
    assert grid.to_image(pixels).tobytes() == image.tobytes()


def test_black_is_blank_and_white_is_one() -> None:
    for colour, value in (("black", grid.BLANK), ("white", 1.0)):
        assert (grid.to_pixels(Image.new("RGB", (16, 16), colour)) == value).all()


def test_an_image_of_another_shape_is_cropped_evenly() -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (16, 0, 48, 32))
    pixels = grid.to_pixels(grid.fitted(image, (32, 32)))
    assert (pixels == torch.tensor([-1.0, -1, 1])[:, None, None]).all()


def test_values_out_of_range_are_cut_off() -> None:
    pixels = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    assert grid.to_image(pixels).getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("rows", GRIDS.values(), ids=GRIDS)
def test_a_strip_is_its_cells_side_by_side(rows: list[list[Image.Image | None]]) -> None:
    built = grid.build(rows, resolution=64)
    assert built.shape == tuple((s.shape[1], s.shape[2]) for s in built.hidden)
    for row, strip, widths in zip(rows, built.strips, built.widths, strict=True):
        cells = grid.cells(strip, widths)
        assert torch.equal(torch.cat(cells, dim=-1), strip)
        for image, cell in zip(row, cells, strict=True):
            whole = torch.full_like(cell, grid.BLANK)
            if image is not None:
                whole = grid.to_pixels(grid.fitted(image, (cell.shape[2], cell.shape[1])))
            assert torch.equal(cell, whole)


@given(
    sizes=st.lists(st.tuples(st.integers(32, 4000), st.integers(32, 4000)), min_size=1, max_size=4),
    resolution=st.sampled_from([64, 384, 512]),
)
def test_cells_of_their_own_shape_share_a_height_and_the_area_of_the_row(
    sizes: list[tuple[int, int]], resolution: int
) -> None:
    sizes = [(w, h) for w, h in sizes if 0.5 <= w / h <= 2] or [(64, 64)]
    found = row_sizes(sizes, resolution, "own")
    [height] = {cell[1] for cell in found}
    assert {side % 16 for cell in found for side in cell} == {0}
    area = len(found) * resolution**2
    wide, many = sum(width for width, _ in found), len(found)
    rounded = 17 * wide + 9 * height * many + 256 * many  # 8 pixels of height, 8 of each width
    assert abs(wide * height - area) <= rounded
    for (width, _), (w, h) in zip(found, sizes, strict=True):
        assert abs(width - height * w / h) <= 8 or width == 16


def test_square_cells_are_square_whatever_the_pictures() -> None:
    assert row_sizes([WIDE, None, TALL], 64, "square") == [(64, 64)] * 3


def test_a_target_of_its_own_shape_takes_that_of_the_example_above() -> None:
    rows = [[noise(WIDE), noise(TALL)], [noise(SQUARE), None]]
    built = grid.build(rows, resolution=64, cells="own")
    (_, tall), (square, made) = built.widths
    heights = [height for height, _ in built.shape]
    assert tall < heights[0]
    assert made < heights[1] == square


def test_joined_cells_are_taken_as_they_are() -> None:
    rows = [[noise((32, 48)), noise((64, 48))]]
    built = grid.join(rows, hidden=[False, True])
    assert built.widths == ((32, 64),)
    assert torch.equal(built.strips[0][:, :, :32], grid.to_pixels(rows[0][0]))
    assert built.hidden[0][:, :, 32:].all()
    assert not built.hidden[0][:, :, :32].any()


def test_only_missing_cells_are_hidden_and_only_hidden_ones_are_blank() -> None:
    built = grid.build(rows_of(WIDE, WIDE, columns=3), resolution=64)
    assert not built.hidden[0].any()
    assert torch.equal(built.seen[0], built.strips[0])
    *kept, target = grid.cells(built.hidden[1], built.widths[1])
    assert not torch.cat(kept, -1).any()
    assert target.all()
    shown = grid.cells(built.seen[1], built.widths[1])
    assert (shown[2] == grid.BLANK).all()
    assert torch.equal(shown[0], grid.cells(built.strips[1], built.widths[1])[0])


def test_a_hidden_column_is_known_to_the_strip_and_not_seen() -> None:
    rows = [[noise(seed=1), noise(seed=2)]]
    built = grid.build(rows, resolution=64, hidden=[True, False])
    known, shown = (grid.cells(strips[0], built.widths[0]) for strips in (built.strips, built.seen))
    assert torch.equal(known[0], grid.to_pixels(grid.fitted(rows[0][0], (64, 64))))
    assert (shown[0] == grid.BLANK).all()
    assert torch.equal(known[1], shown[1])


def test_a_query_without_images_takes_the_size_of_the_row_above() -> None:
    rows = [[noise(WIDE), noise(WIDE)], [None, None]]
    assert len(set(grid.build(rows, resolution=64).shape)) == 1


def test_is_target_marks_the_tokens_of_hidden_cells(vae: AutoencoderKL) -> None:
    built = grid.build(rows_of(SQUARE, SQUARE), resolution=64)
    mask = torch.cat([packing.pack_mask(hidden[None]) for hidden in built.hidden], dim=1)
    latents = packing.Latents(
        clean=mask, seen=mask, mask=mask, ids=packing.position_ids(built.shape)
    )
    row, _, x = latents.ids.unbind(-1)
    assert torch.equal(latents.is_target[0], ((row == 2) & (x >= 4)).float())


def test_every_token_has_an_id_of_its_own() -> None:
    ids = packing.position_ids(((32, 64), (64, 32), (16, 16)))
    assert len(ids) == len(ids.unique(dim=0)) == 8 + 8 + 1
    assert ids.min(dim=0).values.tolist() == [1, 0, 0]
    assert ids.max(dim=0).values.tolist() == [3, 3, 3]


# ---- what is no grid

A = Image.new("RGB", (16, 16))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the grid has no rows"),
        ([[]], "the grid has no rows"),
        ([[A], []], "the grid has no rows"),
        ([[A, A], [A]], "rows differ in length: row 1 has 2 images, row 2 has 1"),
        ([[A, A], [A, A, A], [A, None]], "rows differ in length: row 1 has 2 images, row 2 has 3"),
        ([[A, None], [A, None]], "row 1 is an example and has a hole"),
        ([[A, A], [None, None], [A, None]], "row 2 is an example and has a hole"),
        ([[A, A], [A, A]], "no target"),
        ([[A]], "no target"),
        ([[None]], "the grid shows no image"),
        ([[None, None]], "the grid shows no image"),
    ],
)
def test_what_is_no_grid_is_refused(rows: list[grid.Row], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid.check_rows(rows)


@pytest.mark.parametrize("rows", [*GRIDS.values(), [[A, A], [None, None]]])
def test_what_is_a_grid_is_accepted(rows: list[grid.Row]) -> None:
    grid.check_rows(rows)
