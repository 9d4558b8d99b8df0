"""Filters clips by the columns that `stdit data scan --scores` writes: `data.filter` and `data.repeats`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit.data.config import Bounds
from stdit.data.manifest import Manifest
from stdit.data.measure.scores import VIDEO_SCORES
from stdit.errors import StditError


def outside_bounds(manifest: Manifest, bounds: Mapping[str, Bounds]) -> dict[str, np.ndarray]:
    """(rows,) bool per score: the clips whose score is outside its bounds.

    Images have no motion and no still_frames, so these exclude none of them.
    """
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
