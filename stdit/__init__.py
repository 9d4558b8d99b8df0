"""stdit: spacetime-patch diffusion transformers for text-to-video, at any resolution, aspect ratio and duration."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_transformer": "stdit.weights.io",
    "save_transformer": "stdit.weights.io",
    "load_vae": "stdit.weights.io",
    "save_vae": "stdit.weights.io",
    "Pipeline": "stdit.sampling.pipeline",
    "SampleRequest": "stdit.sampling.request",
    "StditError": "stdit.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Heavy imports are deferred until a public name is used."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'stdit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
