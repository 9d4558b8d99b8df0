"""Where a video's scenes change, by PySceneDetect's AdaptiveDetector with its own settings: hard cuts, not fades.

It is given our frames (shorter side 144 pixels), so that times, rotation and damage are what they are everywhere else.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import numpy as np

from stdit.data.pixels import LIMITS, Limits, VideoError, check_file, displayed_size, strange_file, to_rgb, within
from stdit.data.video_io import open_source
from stdit.errors import StditError

SHORT_SIDE = 144


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("scenedetect", "cv2"))


def check_available() -> None:
    if not available():
        raise StditError("--scenes needs PySceneDetect and OpenCV: pip install 'stdit[scenes]'.")


def find_scenes(path: str, end: float, fps: float, limits: Limits = LIMITS) -> list[tuple[float, float, int]]:
    """(start, end, frames) of every scene, in seconds; none if it never changes.

    end, fps: the video's, as `probe` has them. A scene ends before the next one starts by as much as a clip may be read
    beyond its end, so that no clip has a frame of another scene. Raises VideoError.
    """
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode

    cv2.setNumThreads(1)
    detector, times, changes, size = AdaptiveDetector(), list[float](), set[int](), None
    with strange_file(path):
        check_file(path, limits)
        try:
            with open_source(path, limits) as source:
                for now, frame in source.frames():
                    size = size or within(displayed_size(frame, source.pixel_aspect), SHORT_SIDE)
                    rgb = to_rgb(frame, source.pixel_aspect, size, (0.5, 0.5), source.reformatter)
                    bgr = np.ascontiguousarray(rgb[..., ::-1])
                    changes |= {
                        found.frame_num for found in detector.process_frame(FrameTimecode(len(times), fps), bgr)
                    }
                    times.append(now)
        except VideoError as error:
            if error.reason != "damaged":
                raise
    if not changes:
        return []
    scenes = []
    for first, following in pairwise([0, *sorted(changes), len(times)]):
        if following < len(times):
            until = min(times[following], times[following - 1] + 1 / fps) - 2e-6
        else:
            until = end
        scenes.append((round(times[first], 6), round(until, 6), following - first))
    return scenes
