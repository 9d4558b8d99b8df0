from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stdit.errors import StditError, nearest_name
from stdit.shapes import (
    LatentShape,
    Stride,
    TokenGrid,
    VideoShape,
    check_size,
    frames_for,
    frames_of,
    nearest_frames,
    size_for,
)

sizes = st.integers(1, 4096)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("832x480x81", VideoShape(81, 480, 832)),
        ("832x480", VideoShape(1, 480, 832)),
        (" 64 × 48 x 9 ", VideoShape(9, 48, 64)),
    ],
)
def test_parse_reads_width_height_frames(text, shape):
    assert VideoShape.parse(text) == shape


@given(sizes, sizes, sizes)
def test_parse_reads_what_str_writes(frames, height, width):
    shape = VideoShape(frames, height, width)
    assert VideoShape.parse(str(shape)) == shape
    assert shape.is_image == (frames == 1)


@pytest.mark.parametrize(
    "text", ["", "832", "832x480x81x3", "832x-480", "0x480x81", "832x480x0", "00x480", "axb", "8.5x4"]
)
def test_parse_says_how_to_write_a_shape(text):
    with pytest.raises(StditError, match="WIDTHxHEIGHTxFRAMES"):
        VideoShape.parse(text)


@pytest.mark.parametrize(
    ("shape", "stride", "patch", "latent", "grid"),
    [  # Wan 2.1 at 480p and 720p, Wan 2.2's 5B at 704p, LTX at its default size, an image
        ("832x480x81", (4, 8, 8), (1, 2, 2), (21, 60, 104), (21, 30, 52)),
        ("1280x720x121", (4, 8, 8), (1, 2, 2), (31, 90, 160), (31, 45, 80)),
        ("1280x704x121", (4, 16, 16), (1, 2, 2), (31, 44, 80), (31, 22, 40)),
        ("704x480x161", (8, 32, 32), (1, 1, 1), (21, 15, 22), (21, 15, 22)),
        ("1024x1024", (4, 8, 8), (1, 2, 2), (1, 128, 128), (1, 64, 64)),
    ],
)
def test_latents_and_tokens_of_published_models(shape, stride, patch, latent, grid):
    shape = VideoShape.parse(shape)
    assert shape.latent(stride) == LatentShape(*latent)
    assert shape.grid(stride, patch) == TokenGrid(*grid)
    assert shape.grid(stride, patch).tokens == grid[0] * grid[1] * grid[2]


def test_frames_that_the_stride_does_not_reach_name_the_nearest():
    with pytest.raises(StditError, match="nearest are 77 and 81"):
        VideoShape(80, 480, 832).latent((4, 8, 8))


def test_sizes_that_are_not_multiples_name_the_nearest():
    with pytest.raises(StditError, match=r"848x480.*multiple of 32.*832x480 or 864x480"):
        VideoShape(81, 480, 848).grid((4, 16, 16), (1, 2, 2))
    with pytest.raises(StditError, match=r"Nearest: 16x16 or 16x32\."):
        check_size(0, 17, (16, 16))


def test_latents_that_the_patch_does_not_divide():
    with pytest.raises(StditError, match=r"5 frames are 3 latent frames, which a patch of 2.*nearest are 3 and 7"):
        VideoShape(5, 32, 32).grid((2, 4, 4), (2, 2, 2))
    with pytest.raises(StditError, match="3×4×5"):
        LatentShape(3, 4, 5).grid((1, 2, 2))


@given(st.integers(-3, 500), st.integers(1, 16))
def test_nearest_frames_surround(frames, stride):
    low, high = nearest_frames(frames, stride)
    assert low % stride == 1 % stride and high % stride == 1 % stride and low >= 1
    assert low == high == max(frames, 1) if low == high else low <= max(frames, 1) <= high == low + stride


@given(st.floats(0, 60), st.floats(0.1, 120), st.integers(1, 16))
def test_frames_for_is_the_nearest_legal_count(seconds, fps, stride):
    frames = frames_for(seconds, fps, stride)
    assert frames >= 1 and (frames - 1) % stride == 0
    legal = range(1, int(seconds * fps) + 3 * stride, stride)
    assert abs(frames - seconds * fps) == min(abs(n - seconds * fps) for n in legal)


@pytest.mark.parametrize(("seconds", "fps", "frames"), [(3, 16, 49), (5, 16, 81), (0, 16, 1), (0.1, 10, 1), (11, 1, 9)])
def test_frames_for_known_durations(seconds, fps, frames):
    assert frames_for(seconds, fps, 4) == frames  # 11 lies between 9 and 13: the shorter


@pytest.mark.parametrize("stride", [(4, 8, 8), Stride((4, 8, 8), first=4), Stride((4, 8, 8), group=17)])
def test_frames_and_latents_are_each_others_inverse(stride):
    legal = [frames_of(n, stride) for n in range(1, 40)]
    assert [VideoShape(frames, 8, 8).latent(stride).frames for frames in legal] == [*range(1, 40)]
    for frames in range(-3, legal[-1] + 1):
        low, high = nearest_frames(frames, stride)
        assert low == max([n for n in legal if n <= frames], default=legal[0])
        assert high == min(n for n in legal if n >= frames)
        if frames not in legal:
            with pytest.raises(StditError, match=f"nearest (are {low} and {high}|is {low})"):
                VideoShape(frames, 8, 8).latent(stride)


def test_groups_of_frames_as_open_sora_has_them():
    """VideoAutoencoderPipeline.get_latent_size: five latent frames per 17, and a quarter of the rest."""
    stride = Stride((4, 8, 8), group=17)
    for frames, latents in ((1, 1), (17, 5), (18, 6), (51, 15), (102, 30), (408, 120), (22, 7), (30, 9)):
        assert VideoShape(frames, 8, 8).latent(stride).frames == latents
    assert [frames_for(seconds, 24, stride) for seconds in (2, 4, 8, 0.01)] == [47, 94, 192, 1]
    with pytest.raises(StditError, match=r"takes groups of 17 frames and 1\+4k more; nearest are 98 and 102"):
        VideoShape(100, 8, 8).latent(stride)


@given(st.floats(0.1, 10), st.integers(1, 2160), st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_size_for_is_legal_and_near(aspect, short_side, multiple):
    width, height = size_for(aspect, short_side, multiple)
    check_size(width, height, multiple)
    wanted = (short_side * max(aspect, 1), short_side / min(aspect, 1))
    for size, near, step in zip((width, height), wanted, multiple):
        assert abs(size - near) <= step / 2 + 1e-9 or size == step


@pytest.mark.parametrize(
    ("aspect", "side", "size"), [(16 / 9, 720, (1280, 720)), (9 / 16, 480, (480, 848)), (1, 512, (512, 512))]
)
def test_size_for_known_sizes(aspect, side, size):
    assert size_for(aspect, side, (16, 16)) == size


@pytest.mark.parametrize(("aspect", "side"), [(0, 480), (-1, 480), (1, 0)])
def test_size_for_refuses_what_is_not_positive(aspect, side):
    with pytest.raises(StditError, match="positive"):
        size_for(aspect, side, (16, 16))


def test_nearest_name():
    assert nearest_name("larning_rate", ["learning_rate", "seed"]) == " Did you mean 'learning_rate'?"
    assert nearest_name("zzz", ["learning_rate", "seed"]) == ""
