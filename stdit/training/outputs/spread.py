"""Clips spread over a manifest, to evaluate a run on: always the same ones, cut in the same way, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple, TypeVar

from stdit.data.load.loader import Example, Loader
from stdit.data.manifest import read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.errors import StditError
from stdit.training.engine.parallel import World
from stdit.training.setup.build import RunComponents

Found = TypeVar("Found")


class SpreadClip(NamedTuple):
    """item.position: its place among the `total` clips, those that could not be read included."""

    item: PlanItem
    example: Example
    total: int


def share_clips(
    components: RunComponents,
    manifest_path: str | None,
    count: int,
    world: World,
    measure: Callable[[SpreadClip], Found],
) -> list[Found]:
    """`measure` of up to `count` clips spread over a manifest, or over the run's; each cut to its shape from start and
    centre. On every rank, in the order of the clips; each is read and measured by one rank (`World.share_out`).

    Clips that cannot be read are left out. Latents come from the run's cache if it has those of the whole manifest.
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
    mine = loader.iterate((0, [item]) for item in items[world.rank :: world.size])  # read ahead

    def measure_next(item: PlanItem) -> list[Found]:
        (example,) = next(mine)
        return [measure(SpreadClip(item, example, len(items)))] if example.failure is None else []

    with closing(mine):
        return [found for one in world.share_out(items, measure_next) for found in one]
