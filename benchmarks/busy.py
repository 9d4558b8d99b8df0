"""A training step of the demo's transformer on a quiet machine, and beside processes that keep one core busy.

Compares the OpenMP settings of the `stdit` commands with none at all. Run it on a machine that does nothing else.

python benchmarks/busy.py                                  # prints both ratios and exits 1 if they miss the goals
python benchmarks/busy.py --try GOMP_SPINCOUNT=500         # also another setting
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from stdit.machine import SHORT_SPIN, VARIABLES

BUSY_GOAL = 2.6  # a step beside one busy process, over a quiet one
QUIET_GOAL = 1.05  # a quiet step with the commands' settings, over one without
SHAPES = [(5, 8, 8), (5, 6, 10), (5, 10, 6), (3, 8, 8), (1, 8, 8)] * 3 + [(5, 8, 8)]  # latents of the demo's clips
TEXT_TOKENS, TEXT_DIM, Z_DIM = 32, 96, 8


def measure(steps: int) -> float:
    """Median seconds per step (forward, backward, AdamW), in this process."""
    import torch

    from stdit.models.packing import pack_clips, pack_texts, unpack_clips
    from stdit.models.transformer import STDiT, TransformerConfig

    torch.manual_seed(0)
    model = STDiT(TransformerConfig.preset("toy", in_channels=Z_DIM, out_channels=Z_DIM, text_dim=TEXT_DIM))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    clips = [torch.randn(Z_DIM, *shape) for shape in SHAPES]
    levels = [torch.rand(()) for _ in SHAPES]
    texts = [torch.randn(TEXT_TOKENS // 2, TEXT_DIM) for _ in SHAPES]

    def step() -> float:
        began = time.perf_counter()
        pack = pack_clips(clips, levels, model.config.patch)
        outputs = unpack_clips(model(pack, pack_texts(texts, TEXT_TOKENS)), pack, model.config.patch)
        torch.stack([(out - clip).square().mean() for out, clip in zip(outputs, clips)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    for _ in range(3):
        step()
    return statistics.median(step() for _ in range(steps))


def seconds(environment: dict[str, str], steps: int, threads: int, busy: int) -> float:
    """`measure` in a process of its own, with these OpenMP variables, beside `busy` processes that spin."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        found = subprocess.run(
            [sys.executable, __file__, "--measure", "--steps", str(steps)],
            env=inherited | {"OMP_NUM_THREADS": str(threads)} | environment,
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    return float(found.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="each measures every setting quiet and busy, in turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core busy")
    parser.add_argument("--try", dest="tried", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.steps))
        return 0
    settings = {"none": {}, "stdit's": SHORT_SPIN} | {text: dict([text.split("=", 1)]) for text in args.tried}
    found: dict[str, dict[int, list[float]]] = {name: {0: [], args.busy: []} for name in settings}
    for number in range(args.rounds):
        for name in list(settings)[:: -1 if number % 2 else 1]:
            for busy, times in found[name].items():
                times.append(seconds(settings[name], args.steps, args.threads, busy))
    median = {name: {busy: statistics.median(times) for busy, times in rows.items()} for name, rows in found.items()}
    print(f"{args.threads} threads on {os.cpu_count()} cores; seconds per step, the median of {args.rounds} rounds")
    for name, row in median.items():
        quiet, busy = row[0], row[args.busy]
        print(f"{name:>24}: quiet {quiet:.3f}, beside {args.busy} busy {busy:.3f}: {busy / quiet:.2f} times")
    ours, none = median["stdit's"], median["none"]
    busy_ratio, quiet_ratio = ours[args.busy] / ours[0], ours[0] / none[0]
    print(f"busy over quiet: {busy_ratio:.2f}, at most {BUSY_GOAL}")
    print(f"quiet over quiet without the settings: {quiet_ratio:.2f}, at most {QUIET_GOAL}")
    print(json.dumps({"settings": settings, "seconds": found}))
    return int(busy_ratio > BUSY_GOAL or quiet_ratio > QUIET_GOAL)


if __name__ == "__main__":
    sys.exit(main())
