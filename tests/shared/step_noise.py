"""The noise that a scheduler of diffusers draws in its steps, the same for whoever runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch


def same_noise(monkeypatch: pytest.MonkeyPatch, scheduler: type) -> Callable[[], None]:
    """Until the test ends, the scheduler's draws follow from their number. Returns what makes them begin again."""
    count = 0

    def drawn(shape: Any, **_: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(count))

    def again() -> None:
        nonlocal count
        count = 0

    monkeypatch.setattr(sys.modules[scheduler.__module__], "randn_tensor", drawn, raising=False)
    return again
