"""Files with a byte changed or the end cut off: read, or named; never a crash of the run, never a hang."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from stdit.data.decode.checks import Limits, VideoError, file_sha256
from stdit.data.decode.video import read_frames
from stdit.data.workers.pool import Reader

# H.264, VP9, MPEG-4, H.263, and H.264 in AVI
FILES = ["nasa_13013_rotated.mp4", "bear-vp9-odd-dimensions.webm", "sample.3gp", "bbb_176x144_128kbps_15fps_h263.3gp"]
FILES.append("sample-with-large-length.avi")
TENTHS = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]  # points at which a file is cut off


def broken(whole: bytes, changes: int, cuts: list[float], seed: int):
    """(what was done, bytes): single bytes changed, then beginnings of the file."""
    random = np.random.default_rng(seed)
    for _ in range(changes):
        place = int(random.integers(len(whole)))
        if random.random() < 0.5:  # half of them in the headers, which decide more
            place = int(random.integers(min(len(whole), 4096)))
        value = whole[place] ^ int(random.integers(1, 256))
        yield f"byte {place} is {value}", whole[:place] + bytes([value]) + whole[place + 1 :]
    for share in cuts:
        yield f"cut off at {share}", whole[: int(len(whole) * share)]


@pytest.mark.parametrize(
    ("changes", "cuts"), [(3, TENTHS[2::5]), pytest.param(60, TENTHS, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_a_broken_file_is_read_or_named(videos, tmp_path, changes, cuts):
    """With the manifest's hash every one is named; without, processes of their own answer for each, in time."""
    reader, outcomes = Reader(), Counter[str]()
    for seed, name in enumerate(FILES):
        whole = (videos / "mixed" / name).read_bytes()
        sha256 = file_sha256(str(videos / "mixed" / name))
        path = tmp_path / name
        for done, content in broken(whole, changes, cuts, seed):
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            with pytest.raises(VideoError) as error:
                read_frames(str(path), 5, (32, 32), 8.0, sha256=sha256)
            assert error.value.reason == ("changed" if content else "empty"), (name, done)
            try:
                frames = reader(str(path), 5, (32, 32), 8.0, limits=Limits(seconds=30.0))
                assert frames.shape == (5, 32, 32, 3), (name, done)
                outcomes["read"] += 1
            except VideoError as found:
                outcomes[found.reason] += 1
    reader.close()
    print(dict(outcomes))
    assert sum(outcomes.values()) == len(FILES) * (changes + len(cuts))
    assert not outcomes["timeout"] and not outcomes["crashed"], outcomes  # the decoders themselves hold
