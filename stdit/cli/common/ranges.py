"""Ranges of numeric arguments. (Those of click let NaN pass.)"""

from __future__ import annotations

from collections.abc import Callable

import typer

Number = float | int


def within(low: Number, high: Number) -> Callable[[Number | None], Number | None]:
    """For `typer.Option(callback=…)`: refuses numbers below low or above high."""

    def check(value: Number | None) -> Number | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value} is not from {low:g} to {high:g}.")
        return value

    return check


# Ranges that several commands share.
STEPS = within(1, 1000)  # of a solver; no schedule has more
GUIDANCE = within(0, 1000)
FPS = within(0.001, 1000)
SECONDS = within(1, 1_000_000)  # of a time limit
SEED = within(-(2**63), 2**63 - 1)
