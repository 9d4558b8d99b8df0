"""Choosing clips by the columns that `stdit data scan --scores` writes: `data.filter` and `data.repeats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit.data.fingerprints import repeats
from stdit.data.manifest import Manifest
from stdit.data.scores import OF_VIDEOS, SCORES
from stdit.errors import StditError, nearest_name

Bounds = tuple[float | None, float | None]


def check_filter(bounds: Mapping[str, Bounds]) -> None:
    for name, (least, most) in bounds.items():
        if name not in SCORES:
            raise StditError(
                f"data.filter: {name} is not a score.{nearest_name(name, SCORES)} "
                f"Those that `stdit data scan --scores` writes are {', '.join(SCORES)}."
            )
        if least is not None and most is not None and least > most:
            raise StditError(f"data.filter: {name} [{least:g}, {most:g}] lets nothing through: write [least, most].")


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


def with_scores(manifest: Manifest, scores: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest with a column for each score of `scores.score` and `repeats`: the id of the clip that one repeats.

    Of copies, the one with the most pixels a frame is not a repeat (the first of those). Images repeat only images.
    """
    table = manifest.table
    for name in SCORES:
        table = table.append_column(name, pa.array([one[name] for one in scores], pa.float64()))
    of: list[str | None] = [None] * len(table)
    ids = table.column("id").to_pylist()
    sizes = manifest.column("width").astype(np.int64) * manifest.column("height")
    image = manifest.column("frames") == 1
    for kind in (image, ~image):
        there = np.flatnonzero(kind)
        rows = there[np.argsort(-sizes[there], kind="stable")].tolist()
        for row, first in zip(rows, repeats([scores[row]["fingerprint"] for row in rows])):
            if first is not None:
                of[row] = ids[rows[first]]
    return Manifest(table.append_column("repeats", pa.array(of, pa.string())), manifest.folder, manifest.source)
