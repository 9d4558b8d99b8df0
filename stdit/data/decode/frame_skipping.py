"""Which frames of a video a read can do without, known before they are decoded."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import av

AHEAD = 64  # packets that wait for those after them; H.264 reorders at most 16 frames


@dataclass(frozen=True)
class Times:
    """start, start + 1/fps, …: `count` times in seconds."""

    start: float
    fps: float
    count: int

    def any_in(self, low: float, high: float) -> bool:
        """Whether one lies between, within a microsecond."""
        first = max(0, math.ceil((low - 1e-6 - self.start) * self.fps)) if low > -math.inf else 0
        return first < self.count and self.start + first / self.fps <= high + 1e-6


def needed_packets(
    packets: Iterable[av.Packet], asked: Times | None, tick: float, origin: float
) -> Iterator[tuple[av.Packet, bool]]:
    """The packets in order, and whether the frame of each may be the nearest to one of the times `asked` for.

    tick, origin: presentation times are `pts · tick − origin` seconds. None asked: all are needed. A frame's neighbours
    in time are known as soon as a packet is decoded later than they are shown: until then packets wait.
    """
    waiting: deque[av.Packet] = deque()
    shown: list[int] = []  # of those that wait and some before
    for packet in packets:
        if asked is None or packet.pts is None or packet.dts is None or packet.is_discard:
            yield from ((one, True) for one in waiting)
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
                yield waiting.popleft(), asked.any_in(low, (pts + shown[later]) / 2 * tick - origin)
            elif len(waiting) > AHEAD:
                yield waiting.popleft(), True
            else:
                break
        if len(shown) > 8 * AHEAD:
            del shown[: -4 * AHEAD]
    yield from ((one, True) for one in waiting)
