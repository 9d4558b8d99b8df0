from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from stdit.errors import StditError
from stdit.sampling.request import SampleRequest
from stdit.sampling.reuse import FEWEST, FIRST, Reuse

X = torch.ones(1, 4)


def runs(reuse: Reuse, output, levels, kinds=None) -> tuple[list[int], list[torch.Tensor]]:
    """The steps in which the network ran, and all outputs. output: of a level, times X."""
    ran, found = [], []
    for step, level in enumerate(levels):
        x = X * (1 - level)
        out = reuse.predict(step, len(levels), level, x, kinds[step] if kinds else "")
        if out is None:
            out = output(level) * X
            reuse.note(level, x, out)
            ran.append(step)
        found.append(out)
    return ran, found


LEVELS = [1 - n / 20 for n in range(20)]


def test_without_a_tolerance_and_in_few_steps_the_network_always_runs():
    assert runs(Reuse(0.0), math.sin, LEVELS)[0] == list(range(20))
    assert runs(Reuse(0.9), math.sin, LEVELS[: FEWEST - 1])[0] == list(range(FEWEST - 1))


def test_an_output_on_a_line_is_continued_exactly_and_never_longer_than_the_tolerance():
    line = lambda t: 2.0 + 0.3 * t  # noqa: E731
    ran, found = runs(Reuse(0.5), line, LEVELS)
    assert ran == [*range(FIRST), 19]  # the whole change is 0.3 of 2
    torch.testing.assert_close(torch.stack(found), torch.stack([line(t) * X for t in LEVELS]))
    ran, _ = runs(Reuse(0.02), line, LEVELS)
    change = [(line(LEVELS[a]) - line(LEVELS[b - 1])) / line(LEVELS[a]) for a, b in pairwise(ran)]
    assert max(change) < 0.02 and len(ran) < 10
    assert all((line(LEVELS[a]) - line(LEVELS[b])) / line(LEVELS[a]) >= 0.02 for a, b in pairwise(ran[2:-1]))


def test_a_smaller_tolerance_is_nearer():
    wave = lambda t: 2 + math.sin(4 * t)  # noqa: E731
    exact, off, count = torch.stack([wave(t) * X for t in LEVELS]), [], []
    for tolerance in (0.02, 0.1, 0.3):
        ran, found = runs(Reuse(tolerance), wave, LEVELS)
        off.append(float((torch.stack(found) - exact).abs().max()))
        count.append(len(ran))
    assert off == sorted(off) and off[0] < 0.15 and count == sorted(count, reverse=True) and count[2] < 14


def test_what_another_kind_gave_predicts_nothing():
    kinds = ["high"] * 8 + ["low"] * 12
    ran, _ = runs(Reuse(0.9), lambda t: 2.0, LEVELS, kinds)
    assert ran == [0, 1, 2, 8, 9, 19]


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_tolerance_out_of_range_is_named(value):
    with pytest.raises(StditError, match="reuse is"):
        SampleRequest(["a"], reuse=value)
