"""Files as players show them, against PyAV's own frames, and a named reason for every file that cannot be read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest
from PIL import Image

from stdit.data.decode import source, video
from stdit.data.decode.checks import Limits, VideoError
from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import contact_sheet, write_video
from stdit.errors import StditError

# From the files' matrices by hand: what PyAV's `rotation` says, with the flip that it does not know.
TURNS = {
    "nasa_13013_rotated.mp4": lambda f: np.rot90(f, 1),
    "ftyp3gp5.mp4": lambda f: np.rot90(f, -1),
    "fire2.mp4": lambda f: np.rot90(f, 2),
    "video_90.mov": lambda f: np.rot90(f, -1),
    "video_270.mov": lambda f: np.rot90(f, 1),
    "sample_rotate_and_reflect.mp4": lambda f: f.transpose(1, 0, 2),
}


def decoded(path, count=10**9):
    """(times after the stream's start, frames) straight from PyAV."""
    times, frames = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            times.append(frame.time - float((stream.start_time or 0) * stream.time_base))
            frames.append(frame)
            if len(frames) == count:
                break
    return np.array(times), frames


def moving(frames=24, width=64, height=48):
    """Frames whose mean grows by 8 a frame, so that a mean tells which frame it is."""
    ramp = (np.arange(frames, dtype=np.uint8) * 8 + 20)[:, None, None, None]
    return np.broadcast_to(ramp, (frames, height, width, 3)).copy()


def nearest(times, wanted):
    """The indices of the frames nearest to a time: two where it is halfway between them."""
    distance = np.abs(times - wanted)
    return np.flatnonzero(distance <= distance.min() + 1e-6)


# Of constant and of variable rate, with an edit list, with a size that changes.
@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("asl/again.mkv", (0.0, 1.13)),
        ("mixed/FLIR_Thermal.mp4", (0.0, 7.13)),
        ("mixed/fire2.mp4", (0.0, 1.13)),
        ("mixed/discard_first_keyframe.mp4", (0.0, 0.41)),
        ("mixed/400x300-red-resize-200x150-green.mp4", (0.0, 1.2)),
        ("mixed/no_duration.webm", (0.0, 2.0)),
    ],
)
def test_frames_are_the_nearest_in_time(videos, name, starts):
    """Within half a source frame, from the beginning and after seeking."""
    path = str(videos / name)
    times, _ = decoded(path)
    everything = read_frames(path, len(times), (16, 12))  # counted, not timed
    for fps in (8.0, 24.0, 30.0):
        for start in starts:
            wanted = start + np.arange(5) / fps
            for time, frame in zip(wanted, read_frames(path, 5, (16, 12), fps, start)):
                near = nearest(times, time)
                gap = np.diff(times)[max(0, near[0] - 1) : near[0] + 1].max()
                assert np.abs(times - time).min() <= gap / 2 + 1e-6
                assert any(np.array_equal(frame, everything[i]) for i in near)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_variable_rate_reordered_frames_and_a_start_that_is_not_zero(tmp_path, name):
    """Frames show their number as grey, at times that are known as written; MP4 has an edit list for the B-frames."""
    ticks = np.random.default_rng(1).integers(20, 120, 26).cumsum()  # milliseconds
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "2", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 32, 32, "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 8 * number, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = int(tick) + 5000, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    times = (ticks - ticks[0]) / 1000
    for fps in (8.0, 24.0, 30.0):
        for start in (0.0, 1.1):
            got = read_frames(str(tmp_path / name), 5, (16, 16), fps, start).mean((1, 2, 3))
            shown = np.rint((got - 20) / 8).astype(int)
            for time, index in zip(start + np.arange(5) / fps, shown):
                assert index in nearest(np.round(times, 3), np.round(time, 9)) or np.isclose(
                    abs(times[index] - time), np.abs(times - time).min(), atol=1.1e-3
                )


def test_a_size_that_changes_in_mid_stream_fills_the_frame(videos):
    path = str(videos / "mixed/400x300-red-resize-200x150-green.mp4")
    for size, shape in [(None, (300, 400)), ((32, 32), (32, 32))]:
        frames = read_frames(path, 118, size).astype(int)
        assert frames.shape[1:3] == shape
        red, green = frames[0], frames[-1]
        assert (red[..., 0] > 200).all() and (red[..., 1] < 60).all()
        assert (green[..., 1] > 90).all() and (green[..., 0] < 60).all()


def test_pixels_are_square_as_ffmpegs_filter_makes_them(videos):
    path = str(videos / "mixed/carphone_pristine.mp4")
    frame = decoded(path, 1)[1][0]
    with av.open(path) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
    graph = av.filter.Graph()
    given = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    scale = graph.add("scale", f"w=round(iw*{aspect}):h=ih:flags=bicubic+accurate_rnd+full_chroma_int")
    graph.link_nodes(given, scale, graph.add("format", "rgb24"), graph.add("buffersink"))
    graph.configure()
    graph.vpush(frame)
    wanted = graph.vpull().to_ndarray().astype(int)
    got = read_frames(path, 1)[0].astype(int)
    assert got.shape == wanted.shape == (144, 193, 3) and np.abs(got - wanted).mean() < 2


def test_seeking_changes_nothing(videos):
    path = str(videos / "mixed/bikes.mp4")
    times, _ = decoded(path)
    everything = read_frames(path, len(times), (16, 12))
    assert np.array_equal(read_frames(path, 5, (16, 12), 25.0, 8.0), everything[200:205])


@pytest.mark.parametrize("name", TURNS)
def test_rotation_and_mirror(videos, name):
    path = str(videos / "mixed" / name)
    got = read_frames(path, 1)[0]
    frame = decoded(path, 1)[1][0]
    plain = TURNS[name](frame.to_ndarray(format="rgb24")).astype(int)
    assert got.shape == plain.shape
    # another interpolation of the colour planes (and the matrix guessed for HD), so not the same bits
    assert np.abs(got.astype(int) - plain).mean() < 6
    for wrong in (plain[::-1], plain[:, ::-1], plain[::-1, ::-1]):
        assert np.abs(got.astype(int) - wrong).mean() > 2 * np.abs(got.astype(int) - plain).mean()


def test_a_matrix_of_zeros_turns_nothing(videos):
    assert read_frames(str(videos / "mixed/no_timescale.mp4"), 1).shape == (1, 240, 320, 3)


def test_covering_keeps_the_aspect_ratio_and_crops_where_told(tmp_path):
    """Left half red, right half blue, 2:1, to a square: the crop decides what is seen."""
    frame = np.zeros((1, 64, 128, 3), np.uint8)
    frame[:, :, :64, 0] = 255
    frame[:, :, 64:, 2] = 255
    Image.fromarray(frame[0]).save(tmp_path / "halves.png")
    write_video(tmp_path / "halves.mp4", frame, 8)
    for name in ("halves.png", "halves.mp4"):
        for x, red in [(0.0, 255), (0.5, 127), (1.0, 0)]:
            got = read_frames(str(tmp_path / name), 1, (32, 32), 8.0, crop=(x, 0.5))
            assert got.shape == (1, 32, 32, 3)
            assert got[..., 0].mean() == pytest.approx(red, abs=8)


def test_shrinking_is_antialiased(tmp_path):
    """A one-pixel checkerboard shrinks to its mean, not to stripes."""
    board = ((np.indices((96, 128)).sum(0) % 2) * 255).astype(np.uint8)
    frame = np.repeat(board[None, :, :, None], 3, -1)
    write_video(tmp_path / "board.mp4", frame, 8, crf=0)
    Image.fromarray(frame[0]).save(tmp_path / "board.png")
    for name in ("board.mp4", "board.png"):
        got = read_frames(str(tmp_path / name), 1, (32, 24), 8.0)
        assert np.abs(got.astype(int) - 127).max() < 12


@pytest.mark.parametrize("fps", [8.0, 24.0, 30000 / 1001])
def test_written_video_reads_back(tmp_path, fps):
    frames = moving()
    write_video(tmp_path / "clip.mp4", frames, fps)
    found = probe(str(tmp_path / "clip.mp4"))
    assert (found.width, found.height, found.frames, found.codec) == (64, 48, 24, "h264")
    assert found.fps == pytest.approx(fps, rel=1e-4) and found.duration == pytest.approx(24 / fps, abs=1e-3)
    got = read_frames(str(tmp_path / "clip.mp4"), 24, None, fps)
    assert np.abs(got.astype(int) - frames).max() <= 3
    assert (tmp_path / "clip.mp4").read_bytes().find(b"moov") < (tmp_path / "clip.mp4").read_bytes().find(b"mdat")


def test_frames_are_written_as_they_come(tmp_path):
    """From an iterator: the same file; no file where it raises, or where a frame is not as the first."""
    frames = moving()
    write_video(tmp_path / "whole.mp4", frames, 8)
    write_video(tmp_path / "stream.mp4", iter(frames), 8)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "stream.mp4").read_bytes()

    def broken():
        yield from frames[:3]
        raise RuntimeError("the decoder died")

    for bad, words in [(broken(), "died"), (iter([]), "there are none"), ([frames[0], frames[0, 1:]], "the first was")]:
        with pytest.raises((RuntimeError, ValueError), match=words):
            write_video(tmp_path / "bad.mp4", bad, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stream.mp4", "whole.mp4"]


def test_colours_survive_writing_and_reading(tmp_path):
    """Range and matrix agree: flat primaries come back within 4:2:0's rounding, also in HD."""
    for height in (48, 720):
        for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]:
            frames = np.broadcast_to(np.array(colour, np.uint8), (1, height, 64, 3))
            write_video(tmp_path / "flat.mp4", frames, 8)
            got = read_frames(str(tmp_path / "flat.mp4"), 1)
            assert np.abs(got.astype(int) - frames).max() <= 4, (height, colour)


def test_odd_sizes_are_refused_by_name(tmp_path):
    with pytest.raises(StditError, match=r"63x48.*Nearest: 62x48"):
        write_video(tmp_path / "odd.mp4", np.zeros((1, 48, 63, 3), np.uint8), 8)
    assert not list(tmp_path.iterdir())


def test_frames_before_the_damage_are_used(videos):
    path = str(videos / "mixed/corrupted.mp4")  # 10 fps, damaged after 28 frames
    assert read_frames(path, 28, (32, 16), 10.0).shape == (28, 16, 32, 3)
    with pytest.raises(VideoError) as error:
        read_frames(path, 31, (32, 16), 10.0)
    assert error.value.reason == "damaged" and "28 frames" in str(error.value)


def test_too_short_says_so(tmp_path):
    write_video(tmp_path / "clip.mp4", moving(8), 8)
    with pytest.raises(VideoError, match=r"last frame is at 0\.875 s") as error:
        read_frames(str(tmp_path / "clip.mp4"), 17, (32, 24), 8.0)
    assert error.value.reason == "too_short"


@pytest.mark.parametrize(
    "error", [av.error.InvalidDataError(1, "bad"), ValueError("odd"), zlib.error("bad"), IndexError("i")]
)
def test_whatever_a_strange_clip_brings_up_is_a_reason(tmp_path, monkeypatch, error):
    def strange(*_):
        raise error

    write_video(tmp_path / "a.mp4", moving(), 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(source, "to_rgb", strange)
    monkeypatch.setattr(video, "cover", strange)
    for name, count in (("a.mp4", 5), ("a.png", 1)):
        with pytest.raises(VideoError, match=rf"{name}: cannot be decoded \({type(error).__name__}") as found:
            read_frames(str(tmp_path / name), count, (8, 8), 8.0)
        assert found.value.reason == "undecodable"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name, part", [("a.mp4", "to_rgb"), ("a.png", "cover")])
def test_an_error_of_the_disk_is_not_the_clips(tmp_path, monkeypatch, number, name, part):
    write_video(tmp_path / "a.mp4", moving(), 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(source if part == "to_rgb" else video, part, failing)
    with pytest.raises(VideoError, match=os.strerror(number)) as error:
        read_frames(str(tmp_path / name), 1, (8, 8), 8.0)
    assert error.value.reason == "unreachable"

    def of_the_data(*_):  # what FFmpeg says of a file that can be read to its end
        raise av.error.OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(source if part == "to_rgb" else video, part, of_the_data)
    with pytest.raises(VideoError) as error:
        read_frames(str(tmp_path / name), 1, (8, 8), 8.0)
    assert error.value.reason in ("undecodable", "unreadable")


def test_limits(tmp_path, videos):
    write_video(tmp_path / "clip.mp4", moving(24), 8)
    path = str(tmp_path / "clip.mp4")
    for limits, reason in [
        (Limits(pixels=1000), "too_large"),
        (Limits(bytes=100), "too_large"),
        (Limits(frames=5), "too_long"),
        (Limits(packets=5), "too_long"),
        (Limits(seconds=-1), "timeout"),
    ]:
        with pytest.raises(VideoError) as error:
            read_frames(path, 20, (32, 24), 8.0, limits=limits)
        assert error.value.reason == reason
    with pytest.raises(VideoError) as error:
        read_frames(str(tmp_path / "none.mp4"), 1)
    assert error.value.reason == "missing"
    assert read_frames(str(videos / "mixed/long_4k_av1.mp4"), 2, (32, 16), 16.0).shape == (2, 16, 32, 3)


def test_a_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "secret.mp4", moving(4), 8)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(VideoError) as error:
        probe(str(tmp_path / "list.mp4"))
    assert error.value.reason == "not_media"


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "lossless.webp", lossless=True)
    image.convert("RGBA").save(tmp_path / "clear.png")
    clear = np.dstack([pixels, np.zeros((20, 30), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "transparent.png")
    assert np.array_equal(read_frames(str(tmp_path / "turned.png"), 1)[0], np.rot90(pixels, -1))
    assert np.array_equal(read_frames(str(tmp_path / "lossless.webp"), 1)[0], pixels)
    assert (read_frames(str(tmp_path / "transparent.png"), 1) == 255).all()
    found = probe(str(tmp_path / "turned.png"))
    assert (found.width, found.height, found.frames, found.image) == (20, 30, 1, True)
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("not an image")
    for name, reason in [("cut.png", "damaged"), ("text.jpg", "not_media")]:
        with pytest.raises(VideoError) as error:
            probe(str(tmp_path / name))
        assert error.value.reason == reason
    with pytest.raises(VideoError, match="an image, but 5 frames"):
        read_frames(str(tmp_path / "turned.png"), 5)


def test_contact_sheet(tmp_path):
    clips = [moving(9), moving(2, 48, 64)]
    contact_sheet(clips, tmp_path / "sheet.png", labels=["nine frames", "two"], columns=4, side=32)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (43 + 2), 2 * (32 + 14 + 2))
        assert sheet.getpixel((20, 30)) == (20, 20, 20)  # the first frame
        assert sheet.getpixel((3 * 45 + 20, 30)) == (84, 84, 84)  # the last


def test_importing_it_is_cheap():
    code = (
        "import sys, stdit.data.decode.video, stdit.data.workers.child\n"
        "print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=300).split() == ["False", "False"]


@pytest.mark.parametrize("name", ["a: b: c/clip.mp4", "http:clip.mp4", "data:,x.mp4", "-.mp4", "50%d.mp4"])
def test_a_relative_name_is_a_file_whatever_is_in_it(name, tmp_path, monkeypatch):
    """To FFmpeg, what stands before a colon is a protocol."""
    monkeypatch.chdir(tmp_path)
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    frames = np.full((3, 32, 48, 3), 128, np.uint8)
    write_video(name, frames, 8)
    assert os.path.getsize(tmp_path / name) > 0 and probe(name).frames == 3
