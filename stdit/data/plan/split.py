"""A global step dealt to groups of ranks: A micro-steps × groups, so that in every micro-step all groups have nearly
the same work and no pack has more tokens than fit in memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np

from stdit.errors import StditError

GOOD_BALANCE = 0.99  # `split` stops looking for a better deal above this
WORTH_A_MICRO_STEP = 0.003  # a further micro-step has to buy this much balance
HEIGHTS = (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6)  # of a micro-step, in work of its largest clip
EVEN = 0.995  # of even micro-steps `split` takes the highest
HOPELESS = 0.9  # and looks for none higher than one less even than this
MANY = 256  # clips of a kind, from which on they are dealt together


class PlanItem(NamedTuple):
    """One clip's place in the plan."""

    row: int  # of the manifest
    occurrence: int  # 0, 1, … when the epoch has the clip several times
    bucket: int
    tokens: int
    work: int  # forward FLOPs
    position: int  # in the global step; the same for any number of ranks, and unrelated to the bucket


@dataclass(frozen=True)
class StepItems:
    """Items of a step as arrays (items,); tokens and work are a bucket's."""

    row: np.ndarray
    occurrence: np.ndarray
    bucket: np.ndarray
    position: np.ndarray
    tokens: Sequence[int]
    work: Sequence[int]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, items: Sequence[PlanItem]) -> StepItems:
        row, occurrence, bucket, position = (
            np.array([getattr(item, name) for item in items]) for name in ("row", "occurrence", "bucket", "position")
        )
        costs = {item.bucket: (item.tokens, item.work) for item in items}
        tokens, work = zip(*(costs.get(b, (0, 0)) for b in range(max(costs) + 1)))
        return cls(row, occurrence, bucket, position, tokens, work)

    def take(self, which: np.ndarray | slice = slice(None)) -> list[PlanItem]:
        buckets = self.bucket[which].tolist()
        tokens, work = ([costs[b] for b in buckets] for costs in (self.tokens, self.work))
        rows, occurrences, positions = (a[which].tolist() for a in (self.row, self.occurrence, self.position))
        fields = zip(rows, occurrences, buckets, tokens, work, positions)
        return list(map(partial(tuple.__new__, PlanItem), fields))


class MicroStep(Sequence[list[PlanItem]]):
    """One micro-step: what each group computes, made when it is asked for.

    items: of the step. which: (n,) those of this micro-step, the largest first. group: (n,) who has each.
    """

    def __init__(self, items: StepItems, which: np.ndarray, group: np.ndarray, groups: int) -> None:
        self._items = items
        self._which = which[np.argsort(group, kind="stable")]
        self._ends = np.cumsum(np.bincount(group, minlength=groups)).tolist()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> list[PlanItem]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[PlanItem]]: ...
    def __getitem__(self, index: int | slice) -> list[PlanItem] | list[list[PlanItem]]:
        if isinstance(index, slice):
            return [self[g] for g in range(*index.indices(len(self)))]
        g = range(len(self))[index]
        return self._items.take(self._which[self._ends[g - 1] if g else 0 : self._ends[g]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def sums(self) -> tuple[list[int], list[int]]:
        """Tokens and work of each group."""
        bucket = self._items.bucket[self._which].tolist()
        ends = [0, *self._ends]
        parts = [bucket[a:b] for a, b in pairwise(ends)]
        tokens, work = self._items.tokens, self._items.work
        return [sum(tokens[b] for b in part) for part in parts], [sum(work[b] for b in part) for part in parts]


Split = Sequence[Sequence[Sequence[PlanItem]]]  # the micro-steps of a step, what each group computes in each


def split(step: StepItems | Sequence[PlanItem], groups: int, token_bound: int) -> list[MicroStep]:
    """Deals a step to groups of ranks: a list over micro-steps of what each group has.

    In every micro-step all groups have nearly the same work, and none more than `token_bound` tokens. All groups have
    the same number of micro-steps, and a further one has to buy balance. A group that has nothing to do in a micro-step
    has an empty list. Items of a pack stand largest first, equal shapes adjacent.

    Work per token grows with a clip's tokens, so under a tight bound a pack of images cannot have a long video's work.
    Hence micro-steps of different height: each takes from the largest clips what fills all groups to the same work, the
    small ones closing the gaps, and what is left goes on. The end is wherever a plain deal of the rest comes out best.
    """
    if groups < 1:
        raise StditError(f"a step cannot be split over {groups} groups.")
    items = step if isinstance(step, StepItems) else StepItems.of(step)
    tokens = np.array(items.tokens)[items.bucket]
    order = np.lexsort((items.occurrence, items.row, items.bucket, -tokens))  # kind by kind, the largest first
    if tokens[order[0]] > token_bound:
        raise StditError(
            f"row {items.row[order[0]]} has {tokens[order[0]]} tokens, a pack at most {token_bound}: raise "
            f"plan.tokens_per_pack."
        )
    ordered = items.bucket[order]
    ends = [*np.flatnonzero(np.diff(ordered)) + 1, len(order)]
    buckets = [int(ordered[end - 1]) for end in ends]
    counts = [int(b - a) for a, b in zip([0, *ends], ends)]
    # steps of more work than 64 bits have are dealt in coarser units
    shift = max(0, sum(n * items.work[b] for n, b in zip(counts, buckets)).bit_length() - 61)
    kinds = [ClipKind(items.tokens[b], max(1, items.work[b] >> shift), n) for b, n in zip(buckets, counts)]
    dealt = _best_deals(kinds, groups, token_bound)

    begins = [0, *ends[:-1]]
    packs = []
    for deal in dealt:
        which = [order[begin : begin + len(places)] for begin, places in zip(begins, deal.places)]
        begins = [begin + len(places) for begin, places in zip(begins, deal.places)]
        group = np.concatenate([np.asarray(places, np.int64) for places in deal.places])
        packs.append(MicroStep(items, np.concatenate(which), group, groups))
    return packs


def balance(*splits: Split) -> float:
    """Mean work of the groups over Σ over micro-steps of the largest group's, 1 at best, over one or several steps."""
    total = slowest = 0.0
    for packs in (packs for split in splits for packs in split):
        work = packs.sums()[1] if isinstance(packs, MicroStep) else [sum(item.work for item in pack) for pack in packs]
        total += sum(work) / len(work)
        slowest += max(work)
    return total / slowest


class ClipKind(NamedTuple):
    """So many clips alike."""

    tokens: int
    work: int
    clips: int


class Deal(NamedTuple):
    """Of a micro-step: of every kind the group of each clip that has a place; the groups' work."""

    places: list[Sequence[int] | np.ndarray]
    work: Sequence[int]

    def left(self, kinds: Iterable[ClipKind]) -> list[ClipKind]:
        return [kind._replace(clips=kind.clips - len(places)) for kind, places in zip(kinds, self.places)]


def _best_deals(kinds: list[ClipKind], groups: int, token_bound: int) -> list[Deal]:
    """The micro-steps of a step."""
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
        rest = even.left(rest)
        done.append(even)
        spent += max(even.work)
    else:
        if not _work(rest) and ideal > best_balance * spent:
            best = done
    return best


def _work(kinds: Iterable[ClipKind]) -> int:
    return sum(kind.work * kind.clips for kind in kinds)


def _even_micro_step(kinds: list[ClipKind], groups: int, token_bound: int) -> Deal:
    """The highest of several micro-steps that are even, or the most even one."""
    total, largest = _work(kinds), next(kind.work for kind in kinds if kind.clips)
    best: tuple[float, Deal] | None = None
    # one group is even with itself: it takes as much as it holds
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
    """Longest-processing-time first: each clip to the group with the least work that has room for its tokens.

    kinds: largest first. height: no group gets more work. Without a height None if a clip has no room.
    """
    clips = sum(kind.clips for kind in kinds)
    return (_deal_kinds if clips > MANY * len(kinds) else _deal_clips)(kinds, groups, token_bound, height)


def _deal_clips(kinds: Sequence[ClipKind], groups: int, token_bound: int, height: int | None) -> Deal | None:
    """`_deal`, a clip at a time."""
    ready = [(0, g) for g in range(groups)]  # heap of (work, group)
    full: list[tuple[int, int, int]] = []  # heap of (−room, work, group): no room for the kinds that came so far
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
    """`_deal`, all clips of a kind at once; every group ends with as many of each kind."""
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
    """How many of `count` equal items each bin gets when each item goes to the bin with the least load: (bins,).

    The j-th item of a bin comes at the level load + j·work; the `count` lowest levels win, ties to the lower index.
    most: (bins,) that a bin takes; what has no room is left over.
    """
    limit = np.full(len(load), count) if most is None else np.minimum(most, count)
    if int(limit.sum()) <= count:
        return limit

    def below(level: int) -> np.ndarray:  # items that come under a level
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
