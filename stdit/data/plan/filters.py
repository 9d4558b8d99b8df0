"""Which clips are taken, and how often: `data.filter` and `data.repeats`, by the scores that `stdit data scan --scores`
adds, and `data.sources`, by patterns of paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit.data.config import Bounds
from stdit.data.manifest import Manifest
from stdit.data.measure.scores import VIDEO_SCORES
from stdit.errors import StditError, nearest_name


def outside_bounds(manifest: Manifest, bounds: Mapping[str, Bounds]) -> dict[str, np.ndarray]:
    """(rows,) bool per score: the clips whose score is outside its bounds. Images never are for VIDEO_SCORES."""
    out = {}
    for name, (least, most) in bounds.items():
        scores = _score_column(manifest, name).to_numpy()
        out[name] = (scores < (-np.inf if least is None else least)) | (scores > (np.inf if most is None else most))
    return out


def redundant_copies(manifest: Manifest, usable: np.ndarray) -> np.ndarray:
    """(rows,) bool: of the usable clips that look alike, all but the original, or but the one with the most pixels.

    usable: (rows,) bool. An original that is not usable must not exclude its copies.
    """
    original = pc.index_in(_score_column(manifest, "repeats"), value_set=manifest.ids).fill_null(-1).to_numpy()
    rows = np.flatnonzero(usable)
    first = np.where(original[rows] < 0, rows, original[rows])
    pixels = manifest.column("width").astype(np.int64) * manifest.column("height")
    order = np.lexsort((rows, -pixels[rows], first != rows, first))
    out = np.zeros(len(manifest), bool)
    out[rows[order[1:]]] = np.diff(first[order]) == 0
    return out


def _score_column(manifest: Manifest, name: str) -> pa.ChunkedArray:
    setting = "data.repeats" if name == "repeats" else "data.filter"
    if name not in manifest.table.column_names:
        raise StditError(
            f"{manifest.source} has no column {name}, which {setting} needs: run `stdit data scan --scores` with the "
            f"same folder and --out to add it."
        )
    column = manifest.table.column(name)
    missing = name != "repeats" and column.is_null().to_numpy().astype(bool)
    if name in VIDEO_SCORES:
        missing &= manifest.column("frames") > 1
    if np.any(missing):
        raise StditError(
            f"{manifest.source}: row {np.flatnonzero(missing)[0]} has no {name}, which {setting} needs: "
            f"`stdit data scan --scores` gives every clip one."
        )
    return column


def source_of(manifest: Manifest, patterns: Sequence[str]) -> np.ndarray:
    """(rows,) int32: the first pattern that matches the clip's path as stored in the manifest; −1 if none does.

    `*` matches any characters, `?` a single one.
    """
    paths, any_of = manifest.table.column("path"), {"*": ".*", "?": "."}
    found = np.full(len(manifest), -1, np.int32)
    for number, pattern in enumerate(patterns):
        regex = "".join(any_of.get(letter) or re.escape(letter) for letter in pattern)
        fits = pc.match_substring_regex(paths, f"(?s)^{regex}$").to_numpy()
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
