"""Finds scene changes of a video with PySceneDetect's AdaptiveDetector: hard cuts, not fades.

Its settings are the defaults, except that cuts may be as close together as it can detect them: its default
`min_scene_len` of 15 frames leaves cuts inside clips. It is given our frames (shorter side 144 pixels), so that times,
rotation and damage are handled as everywhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import pairwise, repeat

import numpy as np

from stdit.data.decode.checks import LIMITS, Limits, VideoError, reading
from stdit.data.decode.pictures import content_of_path
from stdit.data.decode.video import open_source
from stdit.errors import StditError

SHORT_SIDE = 144
MIN_FRAMES = 5  # of a scene that becomes a clip: a shorter one is a flash, or a blend of two scenes
SAME_RATE = 0.01  # relative difference up to which a scene has the video's frame rate


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("scenedetect", "cv2"))


def check_available() -> None:
    if not available():
        raise StditError("--scenes needs PySceneDetect and OpenCV: pip install 'stdit[scenes]'.")


def find_scenes(path: str, end: float, fps: float, limits: Limits = LIMITS) -> list[tuple[float, float, int, float]]:
    """(start, end, frames, fps) of every scene, in seconds; empty if there is no cut.

    end, fps: the video's, from `probe`. A scene has the video's fps, or its own if the rate varies. It ends a little
    before the next one starts (by as much as a clip may be read beyond its end), so that no clip contains a frame of
    another scene. Raises VideoError.
    """
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)
    detector = AdaptiveDetector(min_scene_len=1)
    padding = detector.window_width
    times, cuts = list[float](), set[int]()

    def pictures() -> Iterator[np.ndarray]:
        """The frames, the first and the last `padding` times more: the detector finds no cut in its window of them."""
        bgr = None
        try:
            with open_source(path, content_of_path(path), limits) as source:
                for now, frame in source.frames():
                    bgr = np.ascontiguousarray(source.small_rgb(frame, SHORT_SIDE)[..., ::-1])
                    yield from repeat(bgr, 1 if times else 1 + padding)
                    times.append(now)
        except VideoError as error:
            if error.reason != "damaged":
                raise
        if bgr is not None:
            yield from repeat(bgr, padding)

    with reading(path, limits):
        for number, picture in enumerate(pictures()):
            found = detector.process_frame(FrameTimecode(number, fps), picture)
            cuts.update(cut.frame_num - padding for cut in found)
    cuts &= set(range(1, len(times)))
    if not cuts:
        return []
    return [_scene(times, first, after, end, fps) for first, after in pairwise([0, *sorted(cuts), len(times)])]


def _scene(times: list[float], first: int, after: int, end: float, fps: float) -> tuple[float, float, int, float]:
    """The scene from frame `first` to `after` − 1."""
    last, own = times[after - 1], fps
    if after - first > 1 and last > times[first]:
        own = (after - first - 1) / (last - times[first])
    uneven = abs(own / fps - 1) >= SAME_RATE
    own = own if uneven else fps  # the container's rate is exact
    until = last + 1 / own
    if after < len(times):
        until = min(times[after], until) - 2e-6
    elif not uneven:
        until = end
    return round(times[first], 6), round(until, 6), after - first, own
