"""Decides, before decoding, which frames of a video can be skipped."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import av

MAX_WAITING = 64  # packets held back until later ones are known; H.264 reorders at most 16 frames


@dataclass(frozen=True)
class SampleTimes:
    """The times start, start + 1/fps, …: `count` of them, in seconds."""

    start: float
    fps: float
    count: int

    def any_in(self, low: float, high: float) -> bool:
        """Whether a sample time lies in [low, high], within a microsecond."""
        first = max(0, math.ceil((low - 1e-6 - self.start) * self.fps)) if low > -math.inf else 0
        return first < self.count and self.start + first / self.fps <= high + 1e-6


def needed_packets(
    packets: Iterable[av.Packet], wanted: SampleTimes | None, tick: float, origin: float
) -> Iterator[tuple[av.Packet, bool]]:
    """Yields (packet, needed) in order. A packet is needed if its frame may be the nearest to a sample time.

    wanted: None if all packets are needed.
    tick, origin: presentation times are `pts · tick − origin` seconds.

    A packet is held back until its frame's neighbours in time are known: once a packet's decoding time is later than
    the next frame's presentation time, no frame in between can follow.
    """
    waiting: deque[av.Packet] = deque()
    shown: list[int] = []  # sorted presentation times of waiting packets and of some before them
    for packet in packets:
        if wanted is None or packet.pts is None or packet.dts is None or packet.is_discard:
            yield from ((held, True) for held in waiting)
            waiting.clear()
            yield packet, True
            continue
        waiting.append(packet)
        insort(shown, packet.pts)
        while waiting:
            pts = waiting[0].pts
            assert pts is not None
            later = bisect_right(shown, pts)
            if later < len(shown) and shown[later] <= packet.dts:
                before = bisect_left(shown, pts) - 1
                low = (shown[before] + pts) / 2 * tick - origin if before >= 0 else -math.inf
                yield waiting.popleft(), wanted.any_in(low, (pts + shown[later]) / 2 * tick - origin)
            elif len(waiting) > MAX_WAITING:
                yield waiting.popleft(), True
            else:
                break
        if len(shown) > 8 * MAX_WAITING:
            del shown[: -4 * MAX_WAITING]
    yield from ((held, True) for held in waiting)
