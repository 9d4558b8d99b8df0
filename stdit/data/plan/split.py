"""Splits a global step into micro-steps × groups of ranks, so that in every micro-step all groups have nearly the same
work, and no pack exceeds the token bound."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

GOOD_BALANCE = 0.99  # at which `split` stops searching
WORTH_A_MICRO_STEP = 0.003  # balance that a further micro-step has to gain
HEIGHTS = (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6)  # tried work per group, in units of the largest clip's work
EVEN = 0.995  # balance at which a micro-step counts as even: of several even ones, the highest is taken
HOPELESS = 0.9  # balance below which no higher micro-step is tried
MANY = 256  # mean clips per kind above which all clips of a kind are dealt at once


class PlanItem(NamedTuple):
    """One clip's place in the plan."""

    row: int  # of the manifest
    occurrence: int  # 0, 1, … if the epoch contains the clip several times
    bucket: int
    tokens: int = 0
    work: int = 0  # forward FLOPs
    position: int = 0  # in the global step; the same for any number of ranks, and unrelated to the bucket


@dataclass(frozen=True)
class StepItems:
    """A step's items as arrays (items,); tokens and work are per bucket."""

    row: np.ndarray
    occurrence: np.ndarray
    bucket: np.ndarray
    position: np.ndarray
    tokens: Sequence[int]
    work: Sequence[int]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: np.ndarray | slice = slice(None)) -> list[PlanItem]:
        buckets = self.bucket[which].tolist()
        tokens, work = ([costs[b] for b in buckets] for costs in (self.tokens, self.work))
        rows, occurrences, positions = (a[which].tolist() for a in (self.row, self.occurrence, self.position))
        fields = zip(rows, occurrences, buckets, tokens, work, positions)
        return list(map(partial(tuple.__new__, PlanItem), fields))


class MicroStepPacks:
    """One micro-step: the pack of each group, created when accessed.

    which, group: (n,) indices of the micro-step's items, largest first, and the group of each.
    """

    def __init__(self, items: StepItems, which: np.ndarray, group: np.ndarray, groups: int) -> None:
        self._items = items
        self._which = which[np.argsort(group, kind="stable")]
        ends = np.cumsum(np.bincount(group, minlength=groups)).tolist()
        self._bounds = list(zip([0, *ends], ends))  # of each group, in `_which`

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, group: int) -> list[PlanItem]:
        return self._items.take(self._which[slice(*self._bounds[group])])

    def sums(self) -> tuple[list[int], list[int]]:
        """(tokens, work) of each group."""
        bucket = self._items.bucket[self._which].tolist()
        parts = [bucket[first:end] for first, end in self._bounds]
        tokens, work = self._items.tokens, self._items.work
        return [sum(tokens[b] for b in part) for part in parts], [sum(work[b] for b in part) for part in parts]


def split(items: StepItems, groups: int, token_bound: int) -> list[MicroStepPacks]:
    """Deals a step to groups of ranks. Returns its micro-steps, each with a pack per group.

    In every micro-step all groups have nearly the same work, and at most `token_bound` tokens. All groups have the same
    number of micro-steps; a further one must improve the balance. A group without work in a micro-step has an empty
    pack. A pack's items are sorted largest first, with equal shapes adjacent.

    Work per token grows with a clip's tokens, so under a tight token bound a pack of images cannot match the work of a
    long video. Therefore micro-steps differ in height: each takes, from the largest clips down, what fills all groups
    to the same work, with small clips closing the gaps. The rest goes on to the next micro-step. The last micro-step is
    placed where dealing all remaining clips at once gives the best balance.
    """
    tokens = np.array(items.tokens)[items.bucket]
    order = np.lexsort((items.occurrence, items.row, items.bucket, -tokens))  # by kind, largest first
    assert tokens[order[0]] <= token_bound  # see `Plan.token_bound`
    ordered = items.bucket[order]
    begins = [0, *np.flatnonzero(np.diff(ordered)) + 1]
    buckets = ordered[begins].tolist()
    counts = np.diff([*begins, len(order)]).tolist()
    # work beyond 64 bits is dealt in coarser units
    shift = max(0, sum(n * items.work[b] for n, b in zip(counts, buckets)).bit_length() - 61)
    kinds = [ClipKind(items.tokens[b], max(1, items.work[b] >> shift), n) for b, n in zip(buckets, counts)]

    micro_steps = []
    for deal in _best_deals(kinds, groups, token_bound):
        ends = [begin + len(places) for begin, places in zip(begins, deal.places)]
        which = np.concatenate([order[begin:end] for begin, end in zip(begins, ends)])
        group = np.concatenate([np.asarray(places, np.int64) for places in deal.places])
        micro_steps.append(MicroStepPacks(items, which, group, groups))
        begins = ends
    return micro_steps


def balance(*splits: Sequence[MicroStepPacks]) -> float:
    """Mean work per group divided by Σ over micro-steps of the largest group's work; 1 is perfect. Over all steps."""
    works = [micro.sums()[1] for packs in splits for micro in packs]
    return sum(sum(work) / len(work) for work in works) / sum(map(max, works))


class ClipKind(NamedTuple):
    """A number of clips with equal tokens and work."""

    tokens: int
    work: int
    clips: int


class Deal(NamedTuple):
    """How a micro-step is dealt."""

    places: list[Sequence[int] | np.ndarray]  # by kind, the group of each clip that was dealt
    work: Sequence[int]  # of each group

    def remaining(self, kinds: Iterable[ClipKind]) -> list[ClipKind]:
        return [kind._replace(clips=kind.clips - len(places)) for kind, places in zip(kinds, self.places)]


def _best_deals(kinds: list[ClipKind], groups: int, token_bound: int) -> list[Deal]:
    """The best micro-steps for a step's clips."""
    rest, ideal = kinds, _work(kinds) / groups
    best: list[Deal] = []
    best_balance = 0.0
    done: list[Deal] = []
    spent = 0  # Σ of the largest group's work over `done`
    while _work(rest) and ideal > best_balance * spent:
        whole = _deal(rest, groups, token_bound)
        if whole is not None:
            found = ideal / (spent + max(whole.work))
            if found > best_balance + (WORTH_A_MICRO_STEP if best else 0):
                best, best_balance = [*done, whole], found
            if best_balance >= GOOD_BALANCE:
                break
        even = _even_micro_step(rest, groups, token_bound)
        rest = even.remaining(rest)
        done.append(even)
        spent += max(even.work)
    else:
        if not _work(rest) and ideal > best_balance * spent:
            best = done
    return best


def _work(kinds: Iterable[ClipKind]) -> int:
    return sum(kind.work * kind.clips for kind in kinds)


def _even_micro_step(kinds: list[ClipKind], groups: int, token_bound: int) -> Deal:
    """The highest of several even micro-steps; if none is even, the one with the best balance."""
    total, largest = _work(kinds), next(kind.work for kind in kinds if kind.clips)
    best: tuple[float, Deal] | None = None
    # a single group is always even: it takes as much as it can hold
    for height in [int(largest * factor) for factor in HEIGHTS] if groups > 1 else [total]:
        if height > largest and height * groups > total:
            break
        deal = _deal(kinds, groups, token_bound, height)
        assert deal is not None
        even = min(EVEN, sum(deal.work) / (groups * max(deal.work)))
        if best is None or even >= best[0]:
            best = (even, deal)
        elif even < HOPELESS:
            break
    assert best is not None
    return best[1]


def _deal(kinds: Sequence[ClipKind], groups: int, token_bound: int, height: int | None = None) -> Deal | None:
    """Longest processing time first: deals each clip to the group with the least work that has room for its tokens.

    height: the most work per group; clips that do not fit remain. None: all clips must fit, or None is returned.
    """
    clips = sum(kind.clips for kind in kinds)
    return (_deal_kinds if clips > MANY * len(kinds) else _deal_clips)(kinds, groups, token_bound, height)


def _deal_clips(kinds: Sequence[ClipKind], groups: int, token_bound: int, height: int | None) -> Deal | None:
    """As `_deal`, clip by clip."""
    ready = [(0, g) for g in range(groups)]  # heap of (work, group)
    full: list[tuple[int, int, int]] = []  # heap of (−room, work, group) without room for the kinds dealt so far
    room = [token_bound] * groups
    found: list[Sequence[int] | np.ndarray] = []
    for tokens, item_work, count in kinds:
        places: list[int] = []
        found.append(places)
        while full and -full[0][0] >= tokens:
            _, work, g = heapq.heappop(full)
            heapq.heappush(ready, (work, g))
        for _ in range(count):
            while ready and room[ready[0][1]] < tokens:
                work, g = heapq.heappop(ready)
                heapq.heappush(full, (-room[g], work, g))
            if not ready or (height is not None and ready[0][0] + item_work > height):
                break
            work, g = ready[0]
            places.append(g)
            room[g] -= tokens
            heapq.heapreplace(ready, (work + item_work, g))
        if height is None and len(places) < count:
            return None
    return Deal(found, [work for work, _ in ready] + [work for _, work, _ in full])


def _deal_kinds(kinds: Sequence[ClipKind], groups: int, token_bound: int, height: int | None) -> Deal | None:
    """As `_deal`, all clips of a kind at once; each group gets the same number of each kind."""
    work = np.zeros(groups, np.int64)
    room = np.full(groups, token_bound, np.int64)
    found: list[Sequence[int] | np.ndarray] = []
    for tokens, item_work, count in kinds:
        most = room // tokens
        if height is not None:
            most = np.minimum(most, (height - work) // item_work)
        taken = fill(work, item_work, count, most)
        if height is None and taken.sum() < count:
            return None
        work += taken * item_work
        room -= taken * tokens
        found.append(np.repeat(np.arange(groups), taken))
    return Deal(found, work.tolist())


def fill(load: np.ndarray, work: int, count: int, most: np.ndarray | None = None) -> np.ndarray:
    """(bins,) how many of `count` equal items each bin gets if each item goes to the bin with the least load.

    most: (bins,) the most items that each bin takes; the rest is left over.

    A bin's j-th item is placed at level load + j·work. The `count` lowest levels win, ties go to the lower index.
    """
    limit = np.full(len(load), count) if most is None else np.minimum(most, count)
    if int(limit.sum()) <= count:
        return limit

    def below(level: int) -> np.ndarray:  # items placed below a level
        return np.minimum(limit, np.maximum(0, (level - load + work - 1) // work))

    low, high = int(load.min()), int(load.max()) + work * int(limit.max())
    while high - low > work:  # below(low) ≤ count ≤ below(high)
        middle = (low + high) // 2
        if int(below(middle).sum()) <= count:
            low = middle
        else:
            high = middle
    taken = below(low)
    open_ = np.flatnonzero(taken < limit)  # each has at most one level in [low, high)
    levels = (load + taken * work)[open_]
    taken[open_[np.argsort(levels, kind="stable")[: count - int(taken.sum())]]] += 1
    return taken
