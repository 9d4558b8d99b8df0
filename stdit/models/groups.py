"""The segments of a pack as batches: which of them one dense attention call takes, and where their rows lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where the segments of a group lie among the packed rows. Shorter segments are padded to the longest."""

    segments: int
    start: int | None  # if they lie side by side and are of one length: of the first
    rows: Tensor  # (segments · length,) int64, on the device of the packed rows; any row in place of padding
    real: Tensor | None  # (segments · length,) bool, false for padding; None if there is none

    @classmethod
    def of(cls, bounds: Sequence[tuple[int, int]], device: torch.device) -> Places:
        """bounds: start and stop of each segment."""
        length = max(stop - start for start, stop in bounds)
        starts, stops = torch.tensor(bounds).T[:, :, None]  # (segments, 1) each
        rows = starts + torch.arange(length)  # (segments, length)
        padded = any(stop - start < length for start, stop in bounds)
        together = not padded and all(stop == start for (_, stop), (start, _) in pairwise(bounds))
        real = (rows < stops).flatten().to(device, non_blocking=True) if padded else None
        rows = rows.where(rows < stops, starts).flatten().to(device, non_blocking=True)
        return cls(len(bounds), bounds[0][0] if together else None, rows, real)

    def gather(self, x: Tensor, padding: float | None = None) -> Tensor:
        """Rows of x (N, …) as (segments, …, length), heads before length; a view if they lie side by side.

        padding: the value of padding; None: any.
        """
        if self.start is not None:
            rows = x[self.start : self.start + len(self.rows)]
        else:
            rows = x.index_select(0, self.rows)
        if self.real is not None and padding is not None:
            rows = rows.masked_fill(~self.real.unflatten(0, (-1, *[1] * (x.ndim - 1))), padding)
        rows = rows.unflatten(0, (self.segments, -1))
        return rows.transpose(1, 2) if x.ndim > 1 else rows

    def gather_bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The bias of the keys (N,), -inf for padding, as (segments, 1, 1, length); None for 0 everywhere."""
        if bias is not None:
            return self.gather(bias, padding=-math.inf)[:, None, None]
        if self.real is None:
            return None
        rows = torch.zeros(len(self.rows), dtype=dtype, device=self.rows.device)
        return rows.masked_fill_(~self.real, -math.inf).unflatten(0, (self.segments, 1, 1, -1))


class Group(NamedTuple):
    """Segments whose attention is one dense call."""

    queries: Places
    keys: Places


@lru_cache(maxsize=256)
def group_segments(
    q_host: tuple[int, ...], k_host: tuple[int, ...], worth: int, device: torch.device
) -> tuple[Group, ...]:
    """Groups segments of equal numbers of queries and keys.

    q_host, k_host: offsets of the segments' queries and keys.
    worth: up to so many pairs of query and key, a group is padded to be part of another one; 0: none is.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (a, b, c, d) in enumerate(zip(q_host, q_host[1:], k_host, k_host[1:])):
        alike.setdefault((b - a, d - c), []).append(number)
    groups = [(*sizes, numbers) for sizes, numbers in alike.items()]
    if worth:
        groups = _merged(sorted(groups, reverse=True), worth)
    return tuple(
        Group(*(Places.of([(ends[n], ends[n + 1]) for n in numbers], device) for ends in (q_host, k_host)))
        for _, _, numbers in groups
    )


def _merged(groups: Sequence[tuple[int, int, list[int]]], worth: int) -> list[tuple[int, int, list[int]]]:
    """groups: numbers of queries and of keys, and the segments; most queries first."""
    merged = [groups[0]]
    for queries, keys, numbers in groups[1:]:
        most_queries, most_keys, others = merged[-1]
        wide = max(most_keys, keys)
        padding = len(numbers) * (most_queries * wide - queries * keys)
        padding += len(others) * most_queries * (wide - most_keys)
        if padding <= worth:
            merged[-1] = most_queries, wide, sorted(others + numbers)
        else:
            merged.append((queries, keys, numbers))
    return merged


def scatter(parts: Sequence[Tensor], places: Sequence[Places]) -> Tensor:
    """Undoes `Places.gather` of all groups: (S, H, L, …) each to rows (N, H, …), a view if all lie side by side."""
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    if len(rows) == 1 and places[0].start is not None:
        return rows[0]
    total = sum(len(at.rows) if at.real is None else int(at.real.sum()) for at in places)
    x = rows[0].new_empty(total, *rows[0].shape[1:])
    for group, at in zip(rows, places):
        if at.real is None:
            x.index_copy_(0, at.rows, group)
        else:
            x.index_copy_(0, at.rows[at.real], group[at.real])
    return x
