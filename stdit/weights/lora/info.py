"""Describes a LoRA file without its model: families, ranks, alphas, layers."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from typing import Any

from stdit.models.config import TransformerConfig
from stdit.weights.families import families, table_of
from stdit.weights.families.record import Family
from stdit.weights.lora.read import LoraFile, fitted, open_adapter


def describe(path: str | os.PathLike[str], config: TransformerConfig | None = None) -> dict[str, Any]:
    """The families whose names a LoRA file has, its ranks, alphas and adapted layers.

    config: of its model, to check shapes too; without it only names are compared.
    """
    found = open_adapter(path, partly=True)
    if config is not None:
        fitted(found, config)
    entries = found.files.entries.values()
    targets = Counter(re.sub(r"(?<=block)\d+|(?<=[._])\d+(?=[._])", "*", name, count=1) for name in found.modules)
    return {
        "kind": "adapter",
        "path": str(found.files.path),
        "fits": [
            f"{family.title} ({dialect} names)"
            for family in families("transformer")
            for dialect in ("original", "diffusers")
            if _fits(found, family, dialect)
        ],
        "prefix": found.files.prefix,
        "ranks": dict(sorted(Counter(found.ranks.values()).items())),
        "alphas": dict(sorted(Counter(map(found.alpha, found.ranks)).items())),
        "for_other_models": len(found.others),
        "differences": sum("diff" in parts or "diff_b" in parts for parts in found.modules.values()),
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries)),
        "targets": dict(targets),
    }


def _fits(found: LoraFile, family: Family, dialect: str) -> bool:
    """Whether a small model of the family, with as many layers as the file names, has all of the file's names."""
    numbers = re.findall(r"blocks?[._]?(\d{1,3})(?=[._])", "\n".join(found.modules))
    layers = max(map(int, numbers), default=0) + 1
    return any(len(found.resolve(table_of(config, dialect))) == len(found.modules) for config in family.samples(layers))
