"""Choosing clips by the columns that `stdit data scan --scores` writes: `data.filter` and `data.repeats`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit.data.config import Bounds
from stdit.data.manifest import Manifest
from stdit.data.measure.scores import OF_VIDEOS
from stdit.errors import StditError


def left_out(manifest: Manifest, bounds: Mapping[str, Bounds]) -> dict[str, np.ndarray]:
    """(rows,) bool for each score: the clips whose score is not within its bounds.

    Images have neither motion nor still frames, and none is left out for them.
    """
    out = {}
    for name, (least, most) in bounds.items():
        scores = _scored(manifest, name).to_numpy()
        out[name] = (scores < (-np.inf if least is None else least)) | (scores > (np.inf if most is None else most))
    return out


def repeated(manifest: Manifest, usable: np.ndarray) -> np.ndarray:
    """(rows,) bool: of the usable clips that look alike all but one, the one that repeats none or that has most pixels.

    usable: (rows,) bool. What a clip repeats may be of no use itself, and must not take its copies with it.
    """
    of = pc.index_in(_scored(manifest, "repeats"), value_set=manifest.ids).fill_null(-1).to_numpy()
    rows = np.flatnonzero(usable)
    first = np.where(of[rows] < 0, rows, of[rows])
    pixels = manifest.column("width").astype(np.int64) * manifest.column("height")
    order = np.lexsort((rows, -pixels[rows], first != rows, first))
    out = np.zeros(len(manifest), bool)
    out[rows[order[1:]]] = np.diff(first[order]) == 0
    return out


def _scored(manifest: Manifest, name: str) -> pa.ChunkedArray:
    if name not in manifest.table.column_names:
        raise StditError(
            f"{manifest.source} has no column {name}, which data.{'repeats' if name == 'repeats' else 'filter'} needs: "
            f"`stdit data scan --scores` with the same folder and --out adds it."
        )
    column = manifest.table.column(name)
    missing = name != "repeats" and column.is_null().to_numpy().astype(bool)
    if name in OF_VIDEOS:
        missing &= manifest.column("frames") > 1
    if np.any(missing):
        raise StditError(
            f"{manifest.source}: row {np.flatnonzero(missing)[0]} has no {name}, which data.filter needs: "
            f"`stdit data scan --scores` gives every clip one."
        )
    return column
