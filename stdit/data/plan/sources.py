"""Sources: groups clips by patterns of their paths, and weights how often an epoch contains each group."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.compute as pc

from stdit.data.manifest import Manifest
from stdit.errors import StditError, nearest_name


def source_of(manifest: Manifest, patterns: Sequence[str]) -> np.ndarray:
    """(rows,) int32: the first pattern that matches the clip's path as stored in the manifest; −1 if none does.

    `*` matches any characters, `?` a single one.
    """
    paths = manifest.table.column("path")
    found = np.full(len(manifest), -1, np.int32)
    for number, pattern in enumerate(patterns):
        fits = pc.match_substring_regex(paths, _regex(pattern)).to_numpy()
        if not fits.any():
            some = [paths[row].as_py() for row in range(min(len(manifest), 1000))]
            like = nearest_name(pattern, some) or (f" Its first is {some[0]!r}." if some else "")
            raise StditError(f"data.sources: no path of {manifest.source} matches {pattern!r}.{like}")
        found[(found < 0) & fits.astype(bool)] = number
    return found


def source_weights(manifest: Manifest, sources: Mapping[str, float]) -> np.ndarray | None:
    """(rows,) how often an epoch contains each clip, from `data.sources`; None if every clip comes once."""
    if not sources:
        return None
    bad = next((f"{pattern!r} {weight}" for pattern, weight in sources.items() if not weight > 0), None)
    if bad:
        raise StditError(f"data.sources: {bad} must be positive. To leave clips out, remove them from the manifest.")
    return np.array([*sources.values(), 1.0])[source_of(manifest, list(sources))]


def _regex(pattern: str) -> str:
    parts = {"*": ".*", "?": "."}
    return "(?s)^" + "".join(parts.get(letter) or re.escape(letter) for letter in pattern) + "$"
