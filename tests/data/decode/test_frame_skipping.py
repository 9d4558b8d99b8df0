"""Frames that are skipped before decoding: a read's frames are the same, bit for bit, as with every frame decoded."""

from __future__ import annotations

import itertools

import av
import numpy as np
import pytest

from stdit.data.decode import source
from stdit.data.decode.source import SampleTimes, needed_packets
from stdit.data.decode.video import read_frames


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """H.264 with B-frames that none refers to, frames 1 to 5 hundredths apart, the first at 0.2 s."""
    path = tmp_path_factory.mktemp("needed") / "uneven.mkv"
    gaps = np.random.default_rng(0).integers(1, 6, 90)
    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100, options={"bf": "3", "b_strategy": "0", "g": "30"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for time in 20 + np.cumsum(gaps):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), np.uint8), "rgb24")
            frame.pts = int(time)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def test_a_read_is_the_same_and_skips(uneven, monkeypatch):
    skipped = []

    def every(packets, asked, tick, origin):
        return needed_packets(packets, None, tick, origin)

    def counted(*arguments):
        for packet, needed in needed_packets(*arguments):
            skipped.append(not needed)
            yield packet, needed

    for fps, start, count in itertools.product((3, 8, 24.0, 60), (0.0, 0.31, 1.3), (1, 4)):
        found = []
        for how in (every, counted):
            monkeypatch.setattr(source, "needed_packets", how)
            found.append(read_frames(uneven, count, (64, 48), fps, start))
        assert np.array_equal(*found), (fps, start, count)
    assert np.mean(skipped) > 0.5


def test_frames_that_are_nearest_to_no_time_are_not_needed():
    class Packet:
        is_discard = False

        def __init__(self, pts, dts):
            self.pts, self.dts = pts, dts

    order = [0, 4, 2, 1, 3, 8, 6, 5, 7]  # as they are decoded: a pyramid of B-frames
    packets = [Packet(pts, dts) for dts, pts in enumerate(order, -2)]
    found = {p.pts: needed for p, needed in needed_packets(packets, SampleTimes(0.19, 3.0, 3), 0.1, 0.0)}
    assert list(found) == order
    # 0.19, 0.523, 0.857 s are nearest to 0.2, 0.5 and past the last but 0.8; what comes after 6 is not known in time
    assert {pts for pts, needed in found.items() if needed} == {2, 5, 6, 7, 8}
    assert all(needed for _, needed in needed_packets(packets, None, 0.1, 0.0))
    packets[3].pts = None
    assert sum(needed for _, needed in needed_packets(packets, SampleTimes(0.19, 3.0, 3), 0.1, 0.0)) > 5


def test_times_between():
    times = SampleTimes(1.0, 4.0, 3)  # 1, 1.25, 1.5
    for low, high in itertools.product(np.arange(0.07, 2, 0.1), repeat=2):
        if low < high:
            assert times.any_in(low, high) == any(low <= t <= high for t in (1, 1.25, 1.5)), (low, high)
    assert times.any_in(-np.inf, 1) and not times.any_in(-np.inf, 0.9) and not times.any_in(1.6, np.inf)
