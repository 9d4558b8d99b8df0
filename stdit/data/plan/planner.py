"""The plan: which clips form which global step, and which ranks compute them. It is computed, never drawn.

Two pure functions: `Plan` cuts an epoch into global steps of nearly equal work, whatever the number of ranks;
`split.split` deals one step to ranks.

Work is forward FLOPs as exact integers: linear·n + quadratic·n² for a clip of n tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from stdit.data.config import PlanConfig
from stdit.data.plan.split import PlanItem, StepItems, fill
from stdit.errors import StditError
from stdit.keyed import keyed_seed

FORMAT = 1  # part of the plan's hash: raise it when the same inputs would give different steps
MOST_CLIPS = 2**31 - 1  # per epoch: their indices are int32


class Plan:
    """The global steps of one epoch.

    bucket: (rows,) the bucket of each manifest row; −1 for a row that is left out.
    tokens: (buckets,) tokens per clip, at least 1.
    cost: forward FLOPs (per token, per token²), integers, not both 0.
    names: (buckets,) names for error messages, usually their `VideoShape`.
    weights: (rows,) how often an epoch contains each row on average, > 0; None: once. With fractions, rows take turns.
    source: the manifest's hash, which enters the plan's.

    Steps are keyed by (seed, epoch). Their work is nearly equal: the total divided by their number, which is total /
    work_per_step rounded to the nearest integer, from 1 to the number of clips. They have nearly the same mixture of
    buckets: clips go, from most to least work, to the step with the least work, so images fill the gaps between videos.
    Each (row, occurrence) is in exactly one step. Without weights, all epochs have the same number of steps.
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
        weights: np.ndarray | None = None,
        source: str = "",
    ) -> None:
        self.config, self.seed, self.epoch, self.source = config, seed, epoch, source
        self.cost = (int(cost[0]), int(cost[1]))
        self.bucket = np.ascontiguousarray(bucket, dtype=np.int32)  # (rows,)
        self.tokens = [int(n) for n in tokens]
        self.names = list(map(str, names or [f"bucket {b}" for b in range(len(tokens))]))
        self.work = [self.cost[0] * n + self.cost[1] * n * n for n in self.tokens]
        self.weights = None if weights is None else np.ascontiguousarray(weights, dtype=np.float64)
        if self.weights is not None and (clips := self.weights.sum()) > MOST_CLIPS:
            raise StditError(f"data.sources make an epoch of {clips:.3g} clips; it can have at most {MOST_CLIPS:,}.")

        self.rows = np.flatnonzero(self.bucket >= 0).astype(np.int32)  # (items,)
        self._occurrence: np.ndarray | None = None  # (items,); None: all 0
        if not len(self.rows):
            raise StditError(
                "the plan has no steps: no clip is in any bucket. `stdit data plan` tells why each was dropped; add "
                "shapes that fit the clips to data.shapes, or scan more files."
            )
        self._present = np.bincount(self.bucket[self.rows], minlength=len(self.tokens)) > 0  # (buckets,)
        if self.weights is not None:
            times = _occurrences(self.weights[self.rows], seed, epoch)
            self.rows = np.repeat(self.rows, times)
            firsts = np.repeat(np.cumsum(times) - times, times)
            self._occurrence = (np.arange(len(firsts)) - firsts).astype(np.int32)
        self.counts = np.bincount(self.bucket[self.rows], minlength=len(self.tokens))  # (buckets,)
        self.total_work = sum(int(count) * work for count, work in zip(self.counts, self.work))
        self.work_per_step = self._work_per_step()
        steps = max(1, (2 * self.total_work + self.work_per_step) // (2 * self.work_per_step))  # to the nearest
        self.num_items = len(self.rows)
        self.num_steps = min(steps, self.num_items)

    def step(self, index: int) -> list[PlanItem]:
        """A step's items, in an order unrelated to their buckets."""
        return self.items(index).take()

    def items(self, index: int) -> StepItems:
        """The same as arrays: a step may have 100,000 items, of which a rank needs only a few."""
        order, ends = self._steps
        items = order[ends[index] : ends[index + 1]]
        rows = self.rows[items]
        occurrences = np.zeros(len(items), np.int32) if self._occurrence is None else self._occurrence[items]
        return StepItems(rows, occurrences, self.bucket[rows], np.arange(len(items)), self.tokens, self.work)

    def token_bound(self) -> int:
        """The most tokens in a pack. Raises StditError if a clip has more."""
        most, bucket = max((n, b) for b, n in enumerate(self.tokens) if self._present[b])
        bound = self.config.tokens_per_pack
        if bound is None:
            return max(2 * most, 16384)
        if most > bound:
            raise StditError(
                f"a clip of {self.names[bucket]} has {most} tokens, but a pack has at most {bound}. Raise "
                f"plan.tokens_per_pack to {most} if memory allows, with more ranks to a pack "
                f"(parallel.sequence_parallel) if not, or remove the shape from data.shapes."
            )
        return bound

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that the steps of all epochs depend on; the number of ranks is not part of it."""
        parts = [FORMAT, self.source, self.tokens, self.cost, self.work_per_step, self.seed]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(self.bucket.tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())
        return digest.hexdigest()

    def _work_per_step(self) -> int:
        name, wanted = "plan.work_per_step", self.config.work_per_step
        if wanted is None:
            largest = max(work for work, present in zip(self.work, self._present) if present)
            name, wanted = "plan.largest_clips_per_step", round(self.config.largest_clips_per_step * largest)
        if wanted < 1:
            raise StditError(f"{name} makes steps of {wanted} FLOPs; it must be positive.")
        return int(wanted)

    @cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray]:
        """Items (indices into `rows`) step after step, (items,), and where each step begins and ends, (steps + 1,)."""
        # Whole epochs overflow int64 in FLOPs: coarser units, in which the epoch's work stays under 2^61.
        shift = max(0, self.total_work.bit_length() - 61)
        shuffled = _shuffle(len(self.rows), keyed_seed(self.seed, "plan", self.epoch))  # (items,)
        bucket = self.bucket[self.rows[shuffled]]  # (items,)
        by_bucket = np.argsort(bucket, kind="stable").astype(np.int32)  # (items,), shuffled within a bucket
        begins = np.cumsum(self.counts) - self.counts
        names = _shuffle(self.num_steps, keyed_seed(self.seed, "plan steps", self.epoch)).astype(np.int32)
        load = np.zeros(self.num_steps, dtype=np.int64)
        step_of = np.empty(len(shuffled), dtype=np.int32)
        for b in sorted(np.flatnonzero(self.counts), key=lambda b: (-self.work[b], b)):
            work = max(1, self.work[b] >> shift)
            taken = fill(load, work, int(self.counts[b]))  # (steps,)
            load += taken * work
            step_of[by_bucket[begins[b] : begins[b] + self.counts[b]]] = np.repeat(names, taken)
        step_of[shuffled] = step_of.copy()  # (items,), from shuffled to their own order
        # A second shuffle: by the first, the clips of a rare bucket would come first or last in their step.
        order = _shuffle(len(self.rows), keyed_seed(self.seed, "plan positions", self.epoch)).astype(np.int32)
        order = order[np.argsort(step_of[order], kind="stable")]
        ends = np.concatenate([[0], np.cumsum(np.bincount(step_of, minlength=self.num_steps))])
        return order, ends


def _occurrences(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """(items,) how often an epoch contains each: over epochs, equally often for equal weights."""
    times = np.floor(weights).astype(np.int64)
    fractions = weights - times
    for fraction in np.unique(fractions[fractions > 0]).tolist():
        items = np.flatnonzero(fractions == fraction)
        order = _shuffle(len(items), keyed_seed(seed, "plan weights", str(fraction)))
        turns = np.arange(*(math.ceil(e * fraction * len(items)) for e in (epoch, epoch + 1)))
        times[items[order[turns % len(items)]]] += 1
    return times


def _shuffle(count: int, key: int) -> np.ndarray:
    """A keyed permutation of 0 … count−1 by splitmix64 (Steele et al. 2014); numpy's own may change by version."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z)  # there are no ties
