"""Time, memory and balance of the planner on a synthetic trace (7 aspect ratios, images to 720p×121 frames, Wan 14B).

python benchmarks/planner.py --clips 1000000 --groups 8 64
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from stdit.data.planner import Plan, PlanConfig, balance, split
from stdit.shapes import VideoShape, size_for

ASPECTS = (16 / 9, 3 / 2, 4 / 3, 1.0, 3 / 4, 2 / 3, 9 / 16)
SHORT_SIDES = (256, 360, 480, 720)
FRAMES = (1, 17, 33, 49, 65, 81, 97, 121)
STRIDE, PATCH = (4, 8, 8), (1, 2, 2)
# Wan 14B, forward: 2 FLOPs a weight and token in 40 blocks of width 5120, MLP 13824; 4·width FLOPs a block and token².
COST = (40 * 2 * (6 * 5120**2 + 2 * 5120 * 13824), 40 * 4 * 5120)


def trace(clips: int, seed: int = 0) -> tuple[np.ndarray, list[VideoShape], list[int]]:
    """(bucket of every clip, shapes, tokens of a clip of each): 224 buckets.

    Half of the clips are images. Aspect ratios, durations and resolutions are independent; wide ones, short ones and
    middle resolutions are the more frequent.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--largest-per-group", type=float, nargs="+", default=[1, 2, 4], help="work of a step")
    parser.add_argument("--bound", type=float, nargs="+", default=[1.0, 1.5, 2, 4], help="tokens of a pack / largest")
    parser.add_argument("--steps", type=int, default=20, help="how many steps to split; 0: all")
    args = parser.parse_args()
    bucket, shapes, tokens = trace(args.clips)
    images = np.isin(bucket, [b for b, shape in enumerate(shapes) if shape.is_image]).mean()
    print(f"{args.clips} clips, {len(shapes)} buckets, {images:.0%} images")
    for groups in args.groups:
        for per_group in args.largest_per_group:
            start = time.perf_counter()
            plan = Plan(bucket, tokens, COST, PlanConfig(groups * per_group), seed=0, names=shapes)
            made = time.perf_counter() - start
            count = min(args.steps or plan.num_steps, plan.num_steps)
            steps = [plan.step(i) for i in range(count)]
            work = np.array([float(sum(item.work for item in step)) for step in steps])
            print(
                f"groups {groups}, a step of {per_group:g} largest clips a group: {plan.num_steps} steps of "
                f"{len(steps[0])} clips, made in {made:.2f} s; work of steps min/mean {work.min() / work.mean():.5f}"
            )
            for bound in args.bound:
                start = time.perf_counter()
                splits = [split(step, groups, int(bound * max(tokens))) for step in steps]
                took = (time.perf_counter() - start) / count
                values = [balance(s) for s in splits]
                print(
                    f"  bound {bound:g}×: balance {balance(*splits):.4f} (least {min(values):.4f}), micro-steps "
                    f"{np.mean([len(s) for s in splits]):.1f}, {took * 1e3:.1f} ms a step"
                )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
