"""The planner on a synthetic trace (Wan 14B's costs, 7 aspect ratios, images to 720p × 121 frames): balance,
completeness, time and memory, compared with other ways to form batches.

python benchmarks/planner.py --out docs/planner.json                # 1 million clips on 8, 64 and 4,096 ranks
python benchmarks/planner.py --only large --clips 10000000          # buckets, steps and packs: seconds and peak memory
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stdit.data.config import DataConfig, PlanConfig
from stdit.data.plan.buckets import assign_columns
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import MicroStepPacks, split
from stdit.shapes import VideoShape, size_for

ASPECTS = (16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16)
SHORT_SIDES = (256, 360, 480, 720)
FRAMES = (1, 17, 33, 49, 65, 81, 97, 121)
STRIDE, PATCH = (4, 8, 8), (1, 2, 2)
# Wan 14B, forward: 2 FLOPs per weight and token in 40 blocks of width 5120, MLP 13824; 4·width FLOPs per block and
# token².
COST = (40 * 2 * (6 * 5120**2 + 2 * 5120 * 13824), 40 * 4 * 5120)
SETTINGS = ((1.1, 4.0), (2.0, 2.0))  # (work per step, tokens per pack), per rank, in units of the largest clip
WANTED = (0.97, 0.99)  # balance below 64 ranks, and from 64 ranks on
SAME_STEPS = (1, 2, 8, 64)  # numbers of ranks that must have the same steps


def trace(clips: int, seed: int = 0) -> tuple[np.ndarray, list[VideoShape], list[int]]:
    """(bucket of every clip, shapes, tokens per shape): 224 buckets.

    Half of the clips are images. Aspect ratios, durations and resolutions are independent; wide, short and
    medium-resolution clips are more frequent.
    """
    shapes, weights = [], []
    for aspect, aspect_weight in zip(ASPECTS, (8, 2, 3, 2, 1, 1, 3)):
        for side, side_weight in zip(SHORT_SIDES, (2, 3, 4, 2)):
            width, height = size_for(aspect, side, (16, 16))
            for frames in FRAMES:
                shapes.append(VideoShape(frames, height, width))
                weights.append(aspect_weight * side_weight * (7 * 0.24 if frames == 1 else 17 / (frames + 16)))
    share = np.array(weights) / sum(weights)
    bucket = np.random.RandomState(seed).choice(len(shapes), size=clips, p=share).astype(np.int32)
    return bucket, shapes, [shape.grid(STRIDE, PATCH).tokens for shape in shapes]


def columns(bucket: np.ndarray, shapes: list[VideoShape], seed: int = 0) -> dict[str, np.ndarray]:
    """Manifest columns of clips for these buckets at 16 fps: of 24 to 30 fps, and a little larger than needed."""
    random = np.random.RandomState(seed)
    sides = np.array([(s.frames, s.height, s.width) for s in shapes])[bucket]  # (clips, 3)
    frames, height, width = sides.T
    margin = random.randint(0, 8, len(bucket)).astype(np.int32)
    fps = random.choice([24.0, 25.0, 30.0], len(bucket))
    end = np.where(frames == 1, 0.0, frames / 16 + 0.1)
    counts = np.where(frames == 1, 1, np.ceil(end * fps)).astype(np.int32)
    found = {"frames": counts, "fps": fps, "width": (width + margin).astype(np.int32)}
    return found | {"height": (height + margin).astype(np.int32), "start": np.zeros(len(bucket)), "end": end}


# Other schemes. Each returns a (steps, ranks) array of work, and the number of clips in an epoch.

Scheme = Callable[[np.ndarray, np.ndarray, np.ndarray, int, np.random.RandomState], tuple[np.ndarray, int]]


def in_steps(work: np.ndarray, clips: np.ndarray, ranks: int) -> tuple[np.ndarray, int]:
    """Deals batches in order, one per rank; an incomplete last step is dropped."""
    full = len(work) // ranks * ranks
    return work[:full].reshape(-1, ranks), int(clips[:full].sum())


def one_clip(bucket, tokens, work, ranks, random):
    """One clip per rank."""
    return in_steps(work[random.permutation(bucket)], np.ones(len(bucket), int), ranks)


def bucket_batches(cost: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Scheme:
    """Each rank takes a batch of one bucket with the cost of the largest clip."""

    def scheme(bucket, tokens, work, ranks, random):
        each = np.maximum(1, cost(tokens, work).max() // cost(tokens, work)).astype(int)
        batches = np.repeat(np.arange(len(tokens)), np.bincount(bucket, minlength=len(tokens)) // each)
        batches = random.permutation(batches)
        return in_steps((each * work)[batches], each[batches], ranks)

    return scheme


def token_packs(bucket, tokens, work, ranks, random):
    """Packs clips of any shape in random order, up to the tokens of the largest clip."""
    sizes, costs, most = tokens.tolist(), work.tolist(), int(tokens.max())
    packs, clips, room = [0.0], [0], most
    for b in random.permutation(bucket).tolist():
        if sizes[b] > room:
            packs.append(0.0)
            clips.append(0)
            room = most
        packs[-1] += costs[b]
        clips[-1] += 1
        room -= sizes[b]
    return in_steps(np.array(packs), np.array(clips), ranks)


def same_bucket(bucket, tokens, work, ranks, random):
    """All ranks take batches of the same bucket, with the tokens of the largest clip."""
    each = tokens.max() // tokens
    steps = np.bincount(bucket, minlength=len(tokens)) // (each * ranks)
    return np.repeat(each * work, steps)[:, None].repeat(ranks, 1), int((steps * each * ranks).sum())


SCHEMES: dict[str, Scheme] = {
    "batch 1, a random bucket per rank": one_clip,
    "equal-token bucket batches": bucket_batches(lambda tokens, work: tokens),
    "token-budget packs": token_packs,
    "equal-FLOP bucket batches": bucket_batches(lambda tokens, work: work),
    "the same bucket on all ranks, equal tokens": same_bucket,
}


def others(bucket: np.ndarray, tokens: list[int], ranks: int) -> Iterator[dict[str, Any]]:
    n = np.array(tokens)
    costs = COST[0] * n.astype(float) + COST[1] * n.astype(float) ** 2
    for name, scheme in SCHEMES.items():
        work, clips = scheme(bucket, n, costs, ranks, np.random.RandomState(1))
        balance = float(work.mean(1).sum() / work.max(1).sum()) if len(work) else None
        yield {"scheme": name, "ranks": ranks, "balance": balance, "dropped": 1 - clips / len(bucket)}


def measure(plan: Plan, ranks: int, bound: int, most: int | None = None) -> dict[str, Any]:
    """Deals the epoch's steps (the first `most`) to ranks: balance, completeness, token bound."""
    steps = min(most or plan.num_steps, plan.num_steps)
    seen, wanted = np.zeros(len(plan.bucket), np.int32), plan.bucket >= 0
    if steps < plan.num_steps:
        wanted = np.isin(np.arange(len(seen)), np.concatenate([plan.items(i).row for i in range(steps)]))
    ideal, slowest, least, fullest, micro_steps = 0.0, 0.0, 1.0, 0, 0
    digest = []
    dealt = 0.0
    for index in range(steps):
        start = time.perf_counter()
        packs = split(plan.items(index), ranks, bound)
        dealt += time.perf_counter() - start
        tokens, works = zip(*(micro.sums() for micro in packs))
        rows = [item.row for micro in packs for pack in micro for item in pack]
        np.add.at(seen, rows, 1)
        digest.append(hashlib.sha256(np.sort(np.array(rows, "<i8")).tobytes()).hexdigest()[:16])
        mean, most = sum(map(sum, works)) / ranks, sum(map(max, works))
        ideal, slowest, least = ideal + mean, slowest + most, min(least, mean / most)
        fullest = max(fullest, *(max(held) for held in tokens))
        micro_steps += len(packs)
    return {
        "ranks": ranks,
        "steps": steps,
        "clips_a_step": plan.num_items / plan.num_steps,
        "balance": ideal / slowest,
        "least_balance": least,
        "micro_steps": micro_steps / steps,
        "dropped": int((seen[wanted] == 0).sum()),
        "repeated": int((seen > wanted).sum()),
        "fullest_pack": fullest,
        "tokens_per_pack": bound,
        "seconds_a_step": dealt / steps,
        "steps_are": digest,
    }


def balance_run(clips: int, ranks: int) -> dict[str, Any]:
    """Whole epochs on a number of ranks, by our planner and by the other schemes."""
    bucket, shapes, tokens = trace(clips)
    found: dict[str, Any] = {"clips": clips, "buckets": len(shapes), "stdit": [], "others": []}
    for per_rank, room in SETTINGS:
        plan = Plan(bucket, tokens, COST, PlanConfig(ranks * per_rank), seed=0, names=shapes)
        row = measure(plan, ranks, int(room * max(tokens)))
        complete = row["dropped"] == row["repeated"] == 0 and row["fullest_pack"] <= row["tokens_per_pack"]
        row |= {
            "work_per_step": plan.work_per_step,
            "largest_clips_a_rank": per_rank,
            "steps_are": row["steps_are"][:4],
        }
        row |= {"holds": complete and row["balance"] >= WANTED[ranks >= 64]}
        found["stdit"].append(row)
        print(
            f"stdit, {ranks} ranks, a step of {per_rank:g} and a pack of {room:g} largest clips a rank: balance "
            f"{row['balance']:.4f} (least {row['least_balance']:.4f}, wanted {WANTED[ranks >= 64]}), {plan.num_steps} "
            f"steps, {row['micro_steps']:.2f} micro-steps, {row['dropped']} dropped, {row['repeated']} repeated, "
            f"fullest pack {row['fullest_pack']} of {row['tokens_per_pack']}, {row['seconds_a_step'] * 1e3:.1f} ms each"
            + ("" if row["holds"] else "  DOES NOT HOLD"),
            flush=True,
        )
    for row in others(bucket, tokens, ranks):
        found["others"].append(row)
        shown = "no step" if row["balance"] is None else f"balance {row['balance']:.3f}"
        print(f"{row['scheme']}, {ranks} ranks: {shown}, {row['dropped']:.1%} dropped", flush=True)
    return found


def same_run(clips: int) -> list[dict[str, Any]]:
    """The same work_per_step on several numbers of ranks: every step must have the same clips."""
    bucket, shapes, tokens = trace(clips)
    plan = Plan(bucket, tokens, COST, PlanConfig(1.1 * max(SAME_STEPS)), seed=0, names=shapes)
    rows = [measure(plan, ranks, 4 * max(tokens), most=40) for ranks in SAME_STEPS]
    assert len({tuple(row["steps_are"]) for row in rows}) == 1, "steps differ by ranks"
    print(
        f"one work_per_step ({plan.work_per_step:.3g} FLOPs), the same {rows[0]['steps']} steps of {plan.num_steps}: "
        + ", ".join(f"{row['ranks']} ranks {row['balance']:.4f}" for row in rows)
    )
    return [{**row, "steps_are": row["steps_are"][:4]} for row in rows]


def large_run(clips: int, ranks: int) -> dict[str, Any]:
    """What training computes from a manifest's columns, on one core: buckets, steps, and all packs of all ranks."""
    bucket, shapes, tokens = trace(clips)
    table = columns(bucket, shapes)
    del bucket
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    config = DataConfig(shapes=[str(shape) for shape in shapes], fps=16.0)
    times = {}
    begun, start = time.perf_counter(), time.process_time()  # CPU time is independent of other load
    assignment = assign_columns(table, shapes, config)
    times["buckets"] = time.process_time() - start
    plan = Plan(assignment.bucket, tokens, COST, PlanConfig(1.1 * ranks), seed=0, names=shapes)
    plan.items(0)
    times["steps"] = time.process_time() - start - times["buckets"]
    for index in range(plan.num_steps):
        packs: list[MicroStepPacks] = split(plan.items(index), ranks, 4 * max(tokens))
        assert len(packs[0][0])  # one rank's clips
    times["packs"] = time.process_time() - start - sum(times.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total, wall = sum(times.values()), time.perf_counter() - begun
    print(
        f"{clips} clips for {ranks} ranks: buckets {times['buckets']:.1f} s, {plan.num_steps} steps "
        f"{times['steps']:.1f} s, all their packs {times['packs']:.1f} s, together {total:.1f} s of a core (wanted: "
        f"60), {wall:.1f} s by the clock; peak memory {peak:.2f} GiB, of which {before:.2f} before (wanted: 4); "
        f"{assignment.reasons or 'no clip'} left out"
    )
    found = {"clips": clips, "ranks": ranks, "steps": plan.num_steps, "core_seconds": times}
    return found | {"clock_seconds": wall, "peak_gib": peak, "before_gib": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("balance", "same", "large"), nargs="+", default=["balance", "same"])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 4096])
    parser.add_argument("--out", type=Path, help="JSON; what it has of other parts and ranks is kept")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    if "balance" in args.only:
        for ranks in args.ranks:
            found[f"{ranks} ranks"] = balance_run(args.clips, ranks)
    if "same" in args.only:
        found["same steps"] = same_run(args.clips)
    if "large" in args.only:
        found["large"] = large_run(args.clips, max(args.ranks))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
