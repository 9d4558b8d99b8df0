"""What the benchmarks measure with: alternating pairs, an interval, the machine's own rate of matrix products."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: for a machine shared with others


def timed(step: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Seconds of one call, the device's queue empty before and after."""
    start = _now(device, clock)
    step()
    return _now(device, clock) - start


def alternate(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    pairs: int,
    device: torch.device,
    clock: str = "wall",
    between: Callable[[], object] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Seconds of both steps in `pairs` pairs, the order swapped each time; `between` is called after each pair."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(pairs):
        steps = [("ours", ours), ("theirs", theirs)]
        for name, step in steps if number % 2 == 0 else reversed(steps):
            times[name].append(timed(step, device, clock))
        between()
    return times["ours"], times["theirs"]


def interval(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    random_ = random.Random(0)
    medians = sorted(statistics.median(random_.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """L2."""
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def matmul_rate(
    dim: int, ffn_dim: int, tokens: int, device: torch.device, dtype: torch.dtype, clock: str = "wall"
) -> Callable[[], float]:
    """A function that multiplies matrices of a block's own shapes once, forward and both backward products, and
    returns FLOP/s: what this machine gives to a model that were nothing but its matrix products."""
    products = []
    for width, height, count in ((dim, dim, 6), (dim, ffn_dim, 1), (ffn_dim, dim, 1)):
        x, w, y = (
            torch.randn(s, device=device, dtype=dtype) for s in ((tokens, width), (height, width), (tokens, height))
        )
        products.append((x, w, y, count))
    flops = sum(6 * tokens * w.numel() * count for _, w, _, count in products)

    def multiply() -> None:
        for x, w, y, count in products:
            for _ in range(count):
                torch.mm(x, w.T)
                torch.mm(y, w)
                torch.mm(y.T, x)

    return lambda: flops / timed(multiply, device, clock)


def _now(device: torch.device, clock: str) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[clock]()
