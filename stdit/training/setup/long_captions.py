"""Counts a manifest's captions that are longer than what the run's text encoder is given."""

from __future__ import annotations

import pyarrow.compute as pc

from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import Assignment
from stdit.text.lengths import LongTexts, TextLimit
from stdit.training.config import RunConfig
from stdit.weights.families import treatment_of

LONGER = " text.padding says how many are used, the weights how many they know."


def long_captions(config: RunConfig, manifest: Manifest, assignment: Assignment) -> LongTexts | None:
    """Of the clips that are trained, each text once. config: as `follow_init` completes it. None: no text is there."""
    padding = config.text.padding or None
    if config.objective.kind == "vae" or (config.text.path is None and config.text.trained is None):
        return None
    captions = pc.list_flatten(manifest.table.column("captions").take(assignment.rows()))
    texts = pc.unique(pc.struct_field(captions, "text")).to_pylist()
    if config.text.path:
        limit = TextLimit.of_folder(config.text.path, treatment_of(config.text.path), padding)
    else:
        limit = TextLimit.of_words(padding or 512)
    return limit.among(texts)
