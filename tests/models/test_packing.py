import pytest
import torch

from stdit.errors import StditError
from stdit.models import packing
from stdit.models.packing import (
    LevelIndex,
    Segments,
    TokenPack,
    output_tokens,
    pack_clips,
    pack_texts,
    patchify,
    unpack_clips,
    unpatchify,
)
from stdit.models.positions import widest
from stdit.shapes import LatentShape


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_patchify_is_a_convolution_whose_kernel_is_flattened(patch):
    clip = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    convolution = torch.nn.Conv3d(3, 7, patch, patch, bias=False, dtype=torch.float64)
    wanted = convolution(clip[None])[0].flatten(1).T
    found = patchify(clip, patch) @ convolution.weight.flatten(1).T
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_unpatchify_puts_channels_last_in_a_token():
    patch, grid = (2, 1, 3), LatentShape(4, 2, 6).grid((2, 1, 3))
    clip = torch.randn(5, 4, 2, 6)
    channels_first = patchify(clip, patch).unflatten(1, (5, -1))
    assert torch.equal(unpatchify(channels_first.transpose(1, 2).flatten(1), grid, patch), clip)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_output_tokens_is_the_inverse_of_unpatchify(patch):
    clip, grid = torch.randn(3, 4, 6, 6), LatentShape(4, 6, 6).grid(patch)
    assert torch.equal(unpatchify(output_tokens(clip, patch), grid, patch), clip)


def test_pack_holds_clips_in_order_without_padding():
    clips = [torch.randn(2, *shape) for shape in [(1, 4, 4), (3, 2, 6), (2, 4, 2)]]
    pack = pack_clips(clips, [torch.tensor(0.5), torch.tensor([0.0, 0.5, 0.5]), torch.rand(4)], (1, 2, 2))
    assert pack.segments.lengths == (4, 9, 4)
    assert pack.segments.offsets.tolist() == [0, 4, 13, 17] and pack.segments.offsets.dtype == torch.int32
    assert pack.tokens.shape == (17, 8) and pack.positions.shape == (17, 3)
    back = unpack_clips(pack.tokens.unflatten(1, (2, 4)).transpose(1, 2).flatten(1), pack, (1, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(back, clips))


def test_levels_are_distinct_and_found_again_per_token():
    clips = [torch.zeros(1, *shape) for shape in [(1, 4, 4), (3, 2, 6), (2, 4, 2)]]
    per_token = torch.tensor([0.25, 0.5, 0.25, 1.0], dtype=torch.float64)
    pack = pack_clips(clips, [torch.tensor(0.5), torch.tensor([0.0, 0.5, 0.5]), per_token], (1, 2, 2))
    assert pack.levels.tolist() == [0.0, 0.25, 0.5, 1.0] and pack.levels.dtype == torch.float64
    assert pack.levels[pack.level_of].tolist() == [0.5] * 4 + [0.0] * 3 + [0.5] * 6 + [0.25, 0.5, 0.25, 1.0]


def test_runs_cover_the_tokens():
    index = LevelIndex.of(torch.tensor([2, 2, 0, 1, 1, 1, 2]))
    assert index.run_bounds.tolist() == [0, 2, 3, 6, 7]
    assert index.run_levels.tolist() == [2, 0, 1, 2]


def test_extra_tokens_of_a_segment_are_not_unpacked():
    pack = pack_clips([torch.zeros(1, 1, 2, 2)], [torch.tensor(1.0)], (1, 1, 1))
    longer = TokenPack(
        tokens=torch.arange(5.0)[:, None],
        levels=pack.levels,
        level_index=LevelIndex.of(torch.zeros(5, dtype=torch.long)),
        positions=torch.zeros(5, 3),
        segments=Segments.of([5]),
        grids=pack.grids,
    )
    assert unpack_clips(longer.tokens, longer, (1, 1, 1))[0].flatten().tolist() == [0, 1, 2, 3]


def test_moving_a_pack_changes_tokens_only():
    pack = pack_clips([torch.rand(1, 1, 2, 2)], [torch.tensor(0.3)], (1, 1, 1)).to("cpu", torch.bfloat16)
    assert pack.tokens.dtype == torch.bfloat16 and pack.levels.dtype == torch.float32
    text = pack_texts([torch.rand(2, 3)], 5).to("cpu", torch.bfloat16)
    assert text.tokens.dtype == torch.bfloat16 and text.multiplicity.tolist() == [1, 1, 3]


def test_padding_is_one_zero_token_with_its_multiplicity():
    text = pack_texts([torch.ones(2, 3), torch.ones(5, 3), torch.ones(0, 3)], padding=5)
    assert text.segments.lengths == (3, 5, 1)
    assert text.multiplicity.tolist() == [1, 1, 3, 1, 1, 1, 1, 1, 5]
    assert text.tokens[2].tolist() == [0, 0, 0] and text.tokens[8].tolist() == [0, 0, 0]
    assert text.tokens.sum() == 21


@pytest.mark.parametrize("texts", [[3, 1], [5, 5]])
def test_no_padding_has_no_multiplicity(texts):
    text = pack_texts([torch.ones(length, 2) for length in texts], padding=5 if texts == [5, 5] else 0)
    assert text.multiplicity is None and text.segments.lengths == tuple(texts)


@pytest.mark.parametrize(
    ("clips", "levels", "message"),
    [
        ([torch.zeros(1, 1, 3, 4)], [torch.tensor(0.5)], "not divisible"),
        ([torch.zeros(1, 2, 4, 4)], [torch.rand(3)], r"\(3,\)"),
        ([torch.zeros(1, 2, 4, 4)], [torch.tensor(437.0)], "timesteps"),
        ([torch.zeros(1, 2, 4, 4)], [torch.tensor(float("nan"))], "nan"),
        ([torch.zeros(1, 2, 4, 4)], [torch.tensor(0.5).bfloat16()], "bfloat16"),
        ([torch.zeros(1, 2, 4, 4)], [], "1 clips with 0"),
        ([torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4)], [torch.tensor(0.5)] * 2, "one C"),
    ],
)
def test_bad_clips_are_named(clips, levels, message):
    with pytest.raises(StditError, match=message):
        pack_clips(clips, levels, (1, 2, 2))


@pytest.mark.parametrize(("length", "padding", "message"), [(6, 5, "6 tokens"), (0, 0, "empty")])
def test_bad_texts_are_named(length, padding, message):
    with pytest.raises(StditError, match=message):
        pack_texts([torch.zeros(length, 2)], padding)


def test_empty_segments_are_refused():
    with pytest.raises(StditError, match="none may be empty"):
        Segments.of([3, 0])


def test_levels_are_fp32_on_a_device_without_fp64(monkeypatch):
    """Apple's GPUs refuse fp64 tensors: moving one there raises TypeError."""
    monkeypatch.setattr(packing, "widest", lambda device: torch.float32)
    level = torch.tensor(0.437, dtype=torch.float64)
    pack = packing.pack_clips([torch.zeros(4, 1, 4, 4)], [level], (1, 2, 2))
    assert pack.levels.dtype == torch.float32 and pack.levels.item() == level.float().item()
    assert widest(torch.device("mps")) == torch.float32 and widest(torch.device("cpu")) == torch.float64
