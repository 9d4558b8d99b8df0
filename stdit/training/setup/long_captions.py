"""Counts the captions that are longer than the positions of the run's text encoder."""

from __future__ import annotations

import pyarrow.compute as pc

from stdit.data.manifest import Manifest
from stdit.data.plan.buckets import Assignment
from stdit.text.lengths import LongTexts, TextLimit
from stdit.training.setup.resolve import ResolvedConfig
from stdit.weights.families import treatment_of

LONGER = " text.padding says how many are used, the weights how many they know."


def long_captions(config: ResolvedConfig, manifest: Manifest, assignment: Assignment) -> LongTexts | None:
    """Counts among the distinct captions of the clips that train. None if the run has no text encoder."""
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
