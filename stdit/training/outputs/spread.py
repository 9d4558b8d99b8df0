"""Clips spread over a manifest, to evaluate a run on: always the same ones, cut in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stdit.data.load.loader import Example, Loader
from stdit.data.manifest import read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.errors import StditError
from stdit.training.setup.build import RunComponents


class SpreadClip(NamedTuple):
    """item.position: its place among the `total` clips, those that could not be read included."""

    item: PlanItem
    example: Example
    total: int


def spread_clips(components: RunComponents, manifest_path: str | None, count: int) -> Iterator[SpreadClip]:
    """Up to `count` clips spread over a manifest, or over the run's; each cut to its shape from start and centre.

    One is in memory at a time. Clips that cannot be read are left out. Latents come from the run's cache if it has
    those of the whole manifest.
    """
    data = components.config.data.fixed()
    manifest, assignment = components.manifest, components.assignment
    if manifest_path is not None:
        manifest = read_manifest(manifest_path)
        assignment = assign(manifest, data)
    rows = [int(row) for row in (assignment.bucket >= 0).nonzero()[0]]
    rows = rows[:: max(1, len(rows) // count)][:count]
    items = []
    for position, row in enumerate(rows):
        bucket = int(assignment.bucket[row])
        items.append(PlanItem(row, 0, bucket, components.objective.tokens(assignment.shapes[bucket]), 0, position))
    try:
        loader = Loader(manifest, assignment, data, seed=0, cache=components.loader.cache)
    except StditError:  # clips are missing there, or cut in another way
        loader = Loader(manifest, assignment, data, seed=0)
    for item, (example,) in zip(items, loader.iterate((0, [item]) for item in items)):
        if example.failure is None:
            yield SpreadClip(item, example, len(items))
