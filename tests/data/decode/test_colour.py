"""Colours against the standards' formulas, on losslessly coded files with known samples; fields against pictures."""

from __future__ import annotations

from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest

from stdit.data.decode.video import probe, read_frames

WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # Kr, Kb by H.273's matrix: 709, 601, 2020
LIMITED, FULL = 1, 2


def write_flat(path, samples, fmt="yuv444p", matrix=2, full=0, transfer=2, primaries=2, size=(32, 16)):
    """One frame a row of samples (T, 3) Y, Cb, Cr, all its pixels the same."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, full
        context.color_trc, context.color_primaries = transfer, primaries
        for number, row in enumerate(samples):
            frame = av.VideoFrame(*size, fmt)
            for plane, value in zip(frame.planes, row):
                wide = "10" in fmt
                line = np.frombuffer(plane, np.uint16 if wide else np.uint8)
                plane.update(np.full_like(line, value).tobytes())
            frame.colorspace, frame.color_range = matrix, full
            frame.color_trc, frame.color_primaries = transfer, primaries
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def samples_of(rgb, matrix, full, bits):
    """Y, Cb, Cr as integers of R'G'B' (T, 3) in [0, 1], by BT.709 section 3, BT.2020 table 4."""
    kr, kb = WEIGHTS[matrix]
    red, green, blue = np.asarray(rgb, float).T
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    one = 2 ** (bits - 8)
    if full == FULL:
        values = [y * (256 * one - 1), 128 * one + cb * (256 * one - 1), 128 * one + cr * (256 * one - 1)]
    else:
        values = [(16 + 219 * y) * one, (128 + 224 * cb) * one, (128 + 224 * cr) * one]
    return np.clip(np.rint(np.stack(values, 1)), 0, 256 * one - 1).astype(int)


def colours(count, low=0.05, high=0.95):
    return np.random.default_rng(0).uniform(low, high, (count, 3))


def read(path, count):
    got = read_frames(str(path), count).astype(int)
    assert (got == got[:, :1, :1]).all()  # flat
    return got[:, 0, 0]


@pytest.mark.parametrize("fmt", ["yuv444p", "yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("full", [LIMITED, FULL])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_range_matrix_and_depth(tmp_path, fmt, full, matrix):
    rgb = np.vstack([colours(6), np.eye(3) * 0.9, np.zeros(3), np.ones(3)])
    write_flat(tmp_path / "a.mkv", samples_of(rgb, matrix, full, 10 if "10" in fmt else 8), fmt, matrix, full)
    assert np.abs(read(tmp_path / "a.mkv", len(rgb)) - 255 * rgb).max() < (1.6 if "10" in fmt else 3)


@pytest.mark.parametrize(("height", "matrix"), [(480, 6), (720, 1)])
def test_a_file_that_does_not_say_is_limited_and_of_its_size_s_matrix(tmp_path, height, matrix):
    rgb = colours(2)
    write_flat(tmp_path / "a.mkv", samples_of(rgb, matrix, LIMITED, 8), size=(16, height))
    assert np.abs(read(tmp_path / "a.mkv", 2) - 255 * rgb).max() < 3


def srgb(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pq(light):
    """SMPTE ST 2084: the code of cd/m²."""
    y = (np.asarray(light) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light):
    """BT.2100 HLG: the code of a grey that a screen of 1,000 cd/m² shows as `light` cd/m²."""
    scene = (np.asarray(light) / 1000) ** (1 / 1.2)
    return np.where(
        scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    )


def to_xyz(primaries, white=(0.3127, 0.3290)):
    """The matrix from linear RGB to XYZ by chromaticities (SMPTE RP 177)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, [white[0] / white[1], 1, (1 - sum(white)) / white[1]])


BT709 = to_xyz([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)])
BT2020 = to_xyz([(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)])


@pytest.mark.parametrize(("transfer", "encode"), [(16, pq), (18, hlg)])
def test_hdr_greys_are_shown_on_a_white_of_203_and_highlights_roll_off(tmp_path, transfer, encode):
    light = np.array([0.5, 2, 10, 40, 90, 150, 203, 400, 1000])
    write_flat(
        tmp_path / "a.mkv", samples_of(np.repeat(encode(light)[:, None], 3, 1), 9, LIMITED, 10), "yuv420p10le", 9,
        LIMITED, transfer, 9,
    )  # fmt: skip
    got = read(tmp_path / "a.mkv", len(light))
    assert (np.ptp(got, axis=1) <= 2).all()  # grey
    got = got.mean(1)
    assert np.abs(got[:5] - srgb(light[:5] / 203)).max() < 2.5
    assert (np.diff(got) > 0).all() and got[-1] == 255  # the highlights are told apart
    assert srgb(0.6) < got[6] < 250


def test_hdr_colours_are_the_same_colours(tmp_path):
    wanted = colours(8, 0.02, 0.4)  # linear light in sRGB's primaries, below the roll-off
    wide = np.linalg.solve(BT2020, BT709 @ wanted.T).T
    write_flat(tmp_path / "a.mkv", samples_of(pq(wide * 203), 9, LIMITED, 10), "yuv444p10le", 9, LIMITED, 16, 9)
    assert np.abs(read(tmp_path / "a.mkv", 8) - srgb(wanted)).max() < 4


def test_interlaced_frames_show_one_moment(tmp_path):
    """A bar that jumps between the fields: no comb is left, and each frame is the picture of its first field."""
    pictures = np.zeros((16, 64, 96, 3), np.uint8)
    for number, picture in enumerate(pictures):
        picture[:, 4 * number : 4 * number + 24] = 220
    woven = pictures[::2].copy()
    woven[:, 1::2] = pictures[1::2, 1::2]
    graph = av.filter.Graph()
    given = graph.add_buffer(width=96, height=64, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 8))
    graph.link_nodes(given, graph.add("setfield", "mode=tff"), graph.add("buffersink"))
    graph.configure()
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"flags": "+ildct+ilme", "qscale": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 8_000_000
        for number, picture in enumerate(woven):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            graph.vpush(frame)
            frame = graph.vpull()
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert probe(str(tmp_path / "a.mkv")).frames == 8
    got = read_frames(str(tmp_path / "a.mkv"), 8).astype(int)

    def comb(frames):
        return np.abs(np.diff(frames.astype(int), axis=1)).mean()

    assert comb(got[1:-1]) < 0.2 * comb(woven)
    assert np.abs(got - pictures[::2]).mean() < 0.5 * np.abs(got - pictures[1::2]).mean()
    timed = read_frames(str(tmp_path / "a.mkv"), 6, None, 25.0)
    assert np.array_equal(timed, got[:6])
