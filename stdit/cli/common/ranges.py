"""Ranges of numeric arguments. Click's own let NaN pass, which no comparison refuses."""

from __future__ import annotations

from collections.abc import Callable

import typer

Number = float | int


def within(low: Number, high: Number) -> Callable[[Number | None], Number | None]:
    """For `typer.Option(callback=…)`: the number, if it is from low to high, both included; else wrong arguments."""

    def check(value: Number | None) -> Number | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value} is not from {low:g} to {high:g}.")
        return value

    return check


# What arguments of several commands may be.
STEPS = within(1, 1000)  # of a solver; no schedule has more
GUIDANCE = within(0, 1000)
FPS = within(0.001, 1000)
SECONDS = within(1, 1_000_000)  # that something may take
SEED = within(-(2**63), 2**63 - 1)
