"""The plan: which clips form which global step, and which group of ranks computes which of them. Computed, never drawn.

It has two parts, both pure functions:

* `Plan` cuts an epoch into global steps of nearly equal work. It does not know how many ranks there are.
* `split` deals one step into packs: A micro-steps × groups of ranks, so that in every micro-step all groups have nearly
  the same work and no pack has more tokens than fit in memory.

Work is in forward FLOPs as exact integers: linear·n + quadratic·n² for a clip of n tokens.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from stdit.errors import StditError
from stdit.keyed import keyed_seed

FORMAT = 1  # part of the plan's hash: raise it when the same inputs would give other steps
GOOD_BALANCE = 0.99  # `split` stops looking for a better deal above this
WORTH_A_MICRO_STEP = 0.003  # a further micro-step has to buy this much balance
HEIGHTS = (1, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 6)  # of a micro-step, in work of its largest clip
EVEN = 0.995  # of even micro-steps `split` takes the highest
HOPELESS = 0.9  # and looks for none higher than one less even than this


@dataclass
class PlanConfig:
    """How an epoch is cut.

    largest_clips_per_step: work of a global step, as so many clips of the largest shape that has clips.
    work_per_step: the same in forward FLOPs; when set, it takes the place of `largest_clips_per_step`.
    tokens_per_pack: what one rank holds in a micro-step; unset: twice the largest clip, at least 16384.
    """

    largest_clips_per_step: float = 16.0
    work_per_step: int | None = None
    tokens_per_pack: int | None = None


class PlanItem(NamedTuple):
    """One clip's place in the plan."""

    row: int  # of the manifest
    occurrence: int  # 0, 1, … when the epoch has the clip several times
    bucket: int
    tokens: int
    work: int  # forward FLOPs
    position: int  # in the global step; the same for any number of ranks, and unrelated to the bucket


_WORK = attrgetter("work")

Packs = list[list[PlanItem]]  # one micro-step: what each group computes
Split = list[Packs]  # the micro-steps of a step


class Plan:
    """The global steps of one epoch.

    bucket: (rows,) the bucket of every row of the manifest, −1 for a row that is left out.
    tokens: (buckets,) tokens of a clip of each bucket.
    cost: forward FLOPs (per token, per token²) as integers.
    names: (buckets,) what errors call the buckets; usually their `VideoShape`.
    occurrences: (rows,) how often an epoch has each row; unset: once.
    source: the manifest's hash, for the plan's.

    Steps are keyed by (seed, epoch) and have nearly equal work, total / num_steps, where num_steps = total /
    work_per_step to the nearest integer, at least 1 and at most one a clip. Each has nearly the same mixture of
    buckets: from the most to the least work, clips go to the step that has the least, so images fill the gaps between
    videos. Every (row, occurrence) is in exactly one step. All epochs have equally many steps.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        tokens: Sequence[int],
        cost: tuple[int, int],
        config: PlanConfig,
        seed: int,
        epoch: int = 0,
        *,
        names: Sequence[object] | None = None,
        occurrences: np.ndarray | None = None,
        source: str = "",
    ) -> None:
        self.config, self.seed, self.epoch, self.source = config, seed, epoch, source
        self.cost = (int(cost[0]), int(cost[1]))
        self.bucket = np.ascontiguousarray(bucket, dtype=np.int32)  # (rows,)
        self.tokens = [int(n) for n in tokens]
        self.names = [str(name) for name in names] if names is not None else [f"bucket {b}" for b in range(len(tokens))]
        self.work = [self.cost[0] * n + self.cost[1] * n * n for n in self.tokens]
        self.occurrences = None if occurrences is None else np.ascontiguousarray(occurrences, dtype=np.int64)
        self._check()

        kept = self.bucket >= 0
        if self.occurrences is None:
            self._rows = np.flatnonzero(kept).astype(np.int32)  # (items,)
            self._occurrence = None
        else:
            times = np.where(kept, self.occurrences, 0)  # (rows,)
            self._rows = np.repeat(np.arange(len(times), dtype=np.int32), times)
            firsts = np.repeat(np.cumsum(times) - times, times)
            self._occurrence = (np.arange(len(firsts)) - firsts).astype(np.int32)
        if not len(self._rows):
            raise StditError(
                "the plan has no step: no clip is in any bucket. `stdit data plan` says why each was dropped; add "
                "shapes that the clips reach to data.shapes, or scan more files."
            )
        self.counts = np.bincount(self.bucket[self._rows], minlength=len(self.tokens))  # (buckets,)
        self.total_work = sum(int(count) * work for count, work in zip(self.counts, self.work))
        self.work_per_step = self._work_per_step()
        steps = max(1, (2 * self.total_work + self.work_per_step) // (2 * self.work_per_step))  # to the nearest
        self.num_steps = min(steps, len(self._rows))
        self._order, self._ends = self._cut()

    def __len__(self) -> int:
        return self.num_steps

    @property
    def num_items(self) -> int:
        return len(self._rows)

    def step(self, index: int) -> list[PlanItem]:
        """The items of a step, in an order that says nothing about their buckets."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of an epoch of {self.num_steps}")
        items = self._order[self._ends[index] : self._ends[index + 1]]
        rows = self._rows[items]
        buckets = self.bucket[rows]
        occurrences = [0] * len(items) if self._occurrence is None else self._occurrence[items].tolist()
        tokens, work = ([costs[b] for b in buckets.tolist()] for costs in (self.tokens, self.work))
        fields = zip(rows.tolist(), occurrences, buckets.tolist(), tokens, work, range(len(items)))
        return list(map(partial(tuple.__new__, PlanItem), fields))  # a step may have 100 000

    def token_bound(self, group_size: int = 1) -> int:
        """The tokens that a pack may have on a group of ranks. Raises if a clip has more."""
        largest = max((n, b) for b, n in enumerate(self.tokens) if self.counts[b])
        if self.config.tokens_per_pack is None:
            return max(2 * largest[0], 16384 * group_size)
        bound = self.config.tokens_per_pack * group_size
        if largest[0] > bound:
            raise StditError(
                f"a clip of {self.names[largest[1]]} has {largest[0]} tokens, a pack at most {bound} "
                f"(plan.tokens_per_pack {self.config.tokens_per_pack} × {group_size} ranks a group). Raise "
                f"plan.tokens_per_pack to {-(-largest[0] // group_size)} if memory allows, raise "
                f"parallel.sequence_parallel, or take the shape out of data.shapes."
            )
        return bound

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides the steps of all epochs. Neither ranks nor memory do."""
        about = [FORMAT, self.source, self.tokens, self.cost, self.work_per_step, self.seed]
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update(self.bucket.tobytes())
        if self.occurrences is not None:
            digest.update(self.occurrences.tobytes())
        return digest.hexdigest()

    def _check(self) -> None:
        if min(self.cost) < 0 or sum(self.cost) == 0:
            raise StditError(f"cost coefficients {self.cost}: two integers ≥ 0, not both 0.")
        if len(self.names) != len(self.tokens) or (self.tokens and min(self.tokens) < 1):
            raise StditError(f"tokens {self.tokens} of buckets {self.names}: one number ≥ 1 for each.")
        if len(self.bucket) and self.bucket.max() >= len(self.tokens):
            raise StditError(f"bucket {self.bucket.max()} of a row, but there are only {len(self.tokens)} buckets.")
        if self.occurrences is not None and len(self.occurrences) != len(self.bucket):
            raise StditError(f"occurrences of {len(self.occurrences)} rows, the manifest has {len(self.bucket)}.")

    def _work_per_step(self) -> int:
        if self.config.work_per_step is not None:
            wanted, name = int(self.config.work_per_step), "plan.work_per_step"
        else:
            largest = max(work for work, count in zip(self.work, self.counts) if count)
            wanted = round(self.config.largest_clips_per_step * largest)
            name = "plan.largest_clips_per_step"
        if wanted < 1:
            raise StditError(f"{name} makes steps of {wanted} FLOPs; it must be positive.")
        return wanted

    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        """Items (indices into `_rows`) step after step, (items,), and where each step begins and ends, (steps + 1,)."""
        # Whole epochs overflow int64 in FLOPs: coarser units, in which the epoch's work stays under 2^61.
        shift = max(0, self.total_work.bit_length() - 61)
        shuffled = _shuffle(len(self._rows), keyed_seed(self.seed, "plan", self.epoch))  # (items,)
        bucket = self.bucket[self._rows[shuffled]]  # (items,)
        by_bucket = np.argsort(bucket, kind="stable").astype(np.int32)  # (items,), shuffled within a bucket
        begins = np.cumsum(self.counts) - self.counts
        names = _shuffle(self.num_steps, keyed_seed(self.seed, "plan steps", self.epoch)).astype(np.int32)
        load = np.zeros(self.num_steps, dtype=np.int64)
        step_of = np.empty(len(shuffled), dtype=np.int32)
        for b in sorted(np.flatnonzero(self.counts), key=lambda b: (-self.work[b], b)):
            work = max(1, self.work[b] >> shift)
            taken = _fill(load, work, int(self.counts[b]))  # (steps,)
            load += taken * work
            step_of[by_bucket[begins[b] : begins[b] + self.counts[b]]] = np.repeat(names, taken)
        step_of[shuffled] = step_of.copy()  # (items,), from shuffled to their own order
        # A second shuffle: by the first, the clips of a rare bucket would come first or last in their step.
        order = _shuffle(len(self._rows), keyed_seed(self.seed, "plan positions", self.epoch)).astype(np.int32)
        order = order[np.argsort(step_of[order], kind="stable")]
        ends = np.concatenate([[0], np.cumsum(np.bincount(step_of, minlength=self.num_steps))])
        return order, ends


def split(step: Sequence[PlanItem], groups: int, token_bound: int) -> Split:
    """Deals a step to groups of ranks: a list over micro-steps of a list over groups of items.

    In every micro-step all groups have nearly the same work, and none more than `token_bound` tokens. All groups have
    the same number of micro-steps, and a further one has to buy balance. A group that has nothing to do in a micro-step
    has an empty list. Items of a pack stand largest first, equal shapes adjacent.

    Work per token grows with a clip's tokens, so under a tight bound a pack of images cannot have a long video's work.
    Hence micro-steps of different height: each takes from the largest clips what fills all groups to the same work, the
    small ones closing the gaps, and what is left goes on. The end is wherever a plain deal of the rest comes out best.
    """
    if groups < 1:
        raise StditError(f"a step cannot be split over {groups} groups.")
    rest = _largest_first(step)
    if rest[0].tokens > token_bound:
        raise StditError(
            f"row {rest[0].row} has {rest[0].tokens} tokens, a pack at most {token_bound}: raise plan.tokens_per_pack."
        )
    ideal = _work(step) / groups
    best: list[Packs] = []
    best_balance = 0.0
    done: list[Packs] = []
    spent = 0  # Σ of the largest group's work over `done`
    while rest and ideal > best_balance * spent:
        packs, left = _deal(rest, groups, token_bound)
        if not left:
            found = ideal / (spent + max(map(_work, packs)))
            if found > best_balance + (WORTH_A_MICRO_STEP if best else 0):
                best, best_balance = [*done, packs], found
            if best_balance >= GOOD_BALANCE:
                break
        packs, rest = _even_micro_step(rest, groups, token_bound)
        done.append(packs)
        spent += max(map(_work, packs))
    else:
        if not rest and ideal > best_balance * spent:
            best = done
    return best


def balance(*splits: Split) -> float:
    """Mean work of the groups over Σ over micro-steps of the largest group's, 1 at best, over one or several steps."""
    total = slowest = 0.0
    for packs in (packs for split in splits for packs in split):
        work = [_work(pack) for pack in packs]
        total += sum(work) / len(work)
        slowest += max(work)
    return total / slowest


def _work(pack: Iterable[PlanItem]) -> int:
    return sum(map(_WORK, pack))


def _largest_first(items: Iterable[PlanItem]) -> list[PlanItem]:
    """By falling tokens, and so by falling work; then by bucket, row and occurrence."""
    buckets: dict[tuple[int, int], list[PlanItem]] = {}
    for item in items:
        buckets.setdefault((-item.tokens, item.bucket), []).append(item)
    return [item for _, alike in sorted(buckets.items()) for item in sorted(alike)]


def _even_micro_step(items: list[PlanItem], groups: int, token_bound: int) -> tuple[Packs, list[PlanItem]]:
    """The highest of several micro-steps that are even, or the most even one; and the items left for later."""
    total = _work(items)
    best: tuple[float, Packs, list[PlanItem]] = (0.0, [], items)
    for factor in HEIGHTS:
        height = int(items[0].work * factor)
        if factor > 1 and height * groups > total:
            break
        packs, left = _deal(items, groups, token_bound, height)
        work = [_work(pack) for pack in packs]
        even = min(EVEN, sum(work) / (groups * max(work)))
        if even >= best[0]:
            best = (even, packs, left)
        elif even < HOPELESS:
            break
    return best[1], best[2]


def _deal(
    items: Sequence[PlanItem], groups: int, token_bound: int, height: int | None = None
) -> tuple[Packs, list[PlanItem]]:
    """Longest-processing-time first: each item to the group with the least work that has room for its tokens.

    items: largest first. height: no group gets more work. Returns packs, and what had no
    room; without a height it stops at the first item that has none.
    """
    packs: Packs = [[] for _ in range(groups)]
    ready = [(0, g) for g in range(groups)]  # heap of (work, group)
    full: list[tuple[int, int, int]] = []  # heap of (−room, work, group): no room for the items that came so far
    room = [token_bound] * groups
    left = []
    for item in items:
        tokens, item_work = item.tokens, item.work
        while full and -full[0][0] >= tokens:
            _, work, g = heapq.heappop(full)
            heapq.heappush(ready, (work, g))
        while ready and room[ready[0][1]] < tokens:
            work, g = heapq.heappop(ready)
            heapq.heappush(full, (-room[g], work, g))
        if not ready or (height is not None and ready[0][0] + item_work > height):
            left.append(item)
            if height is None:
                break
            continue
        work, g = ready[0]
        packs[g].append(item)
        room[g] -= tokens
        heapq.heapreplace(ready, (work + item_work, g))
    return packs, left


def _shuffle(count: int, key: int) -> np.ndarray:
    """A permutation of 0 … count−1 keyed by an integer: sorted by splitmix64 (Steele et al. 2014), which has no ties.

    Not numpy's, whose streams may change between versions.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z)


def _fill(load: np.ndarray, work: int, count: int) -> np.ndarray:
    """How many of `count` equal items each bin gets when each item goes to the bin with the least load: (bins,).

    The j-th item of a bin comes at the level load + j·work; the `count` lowest levels win, ties to the lower index.
    """

    def below(level: int) -> np.ndarray:  # items that come under a level
        return np.maximum(0, (level - load + work - 1) // work)

    low, high = int(load.min()), int(load.max()) + work * (count // len(load) + 1)
    while high - low > work:  # below(low) ≤ count ≤ below(high)
        middle = (low + high) // 2
        if int(below(middle).sum()) <= count:
            low = middle
        else:
            high = middle
    taken = below(low)
    rest = count - int(taken.sum())  # each bin has at most one level in [low, high)
    levels = load + taken * work
    taken[np.argsort(levels, kind="stable")[:rest]] += 1
    return taken
